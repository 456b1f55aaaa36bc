"""Off, and looked at twice: an action is never repeated, and nothing but two looks proves it."""

from __future__ import annotations

import pytest

from volery.contracts.errors import Kind, Refused, conflict
from volery.contracts.fencing import PowerAction, PowerAnswer, PowerState
from volery.fencing.confirm import APART_SECONDS, LOOKS, Confirmed, confirm_off

LOST = Refused(Kind.TIMEOUT, "no answer")
Step = PowerState | Refused

OFF, ON, UNKNOWN = PowerState.OFF, PowerState.ON, PowerState.UNKNOWN


async def play(off: Step, *looks: Step) -> tuple[Confirmed, list[str]]:
    """What came of it, and what was done in turn: actions, and pauses as `wait`."""
    done: list[str] = []
    steps = {PowerAction.OFF: iter([off]), PowerAction.STATUS: iter(looks)}

    async def act(action: PowerAction) -> PowerAnswer:
        done.append(action.value)
        step = next(steps[action])
        if isinstance(step, Refused):
            raise step
        return PowerAnswer(ask_id="a", action=action, state=step, words=f"it is {step}")

    async def sleep(seconds: float) -> None:
        assert seconds >= APART_SECONDS
        done.append("wait")

    return await confirm_off(act, sleep), done


@pytest.mark.parametrize(
    ("off", "looks", "proven", "done"),
    [
        (OFF, (OFF, OFF), True, "off status wait status"),
        (OFF, (OFF, ON), False, "off status wait status"),
        (OFF, (ON,), False, "off status"),
        (UNKNOWN, (OFF, OFF), True, "off status wait status"),
        (LOST, (OFF, OFF), True, "off status wait status"),
        (LOST, (ON,), False, "off status"),
        (OFF, (LOST, OFF, OFF), True, "off status wait status wait status"),
        (OFF, (UNKNOWN, UNKNOWN, UNKNOWN), False, "off status wait status wait status"),
        (OFF, (LOST,) * LOOKS, False, "off status wait status wait status"),
        (OFF, (OFF, LOST, LOST, LOST), False, "off status wait status wait status wait status"),
    ],
)
async def test_rows(off: Step, looks: tuple[Step, ...], proven: bool, done: str) -> None:
    found, did = await play(off, *looks)
    assert found.off is proven
    assert did == done.split()
    assert found.words


async def test_what_was_refused_is_no_answer_that_was_lost() -> None:
    with pytest.raises(Refused, match="itself"):
        await play(conflict("the target is the executor itself"), OFF, OFF)


async def test_the_actions_own_words_are_kept() -> None:
    found, _ = await play(Refused(Kind.TIMEOUT, "h2 did not answer"), ON)
    assert found.words == "it is on (to off: h2 did not answer)"
    assert [answer.action for answer in found.answers] == [PowerAction.STATUS]
