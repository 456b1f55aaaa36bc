"""Off, and looked at twice: how a machine's power becomes a proof. Pure but for the asking and the waiting it is given."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import PowerAction, PowerAnswer, PowerState

APART_SECONDS = 2.0
"""At least so long between the two looks: a BMC that repeats what it remembers is found out."""
LOOKS = 3
"""How often a look whose answer was lost is taken again, in a row."""

Act = Callable[[PowerAction], Awaitable[PowerAnswer]]
Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What came of it. `off` is true only when two looks, APART_SECONDS apart, both said off, the action's end known."""

    off: bool
    words: str
    """Of the last answer, or why there was none."""
    answers: tuple[PowerAnswer, ...]


async def confirm_off(act: Act, sleep: Sleep = asyncio.sleep) -> Confirmed:
    """Switches off once, and reads the status twice.

    An answer that was lost (Refused of kind timeout or unavailable) is never followed by the action again, only by
    looks: whoever acts on a machine that was switched on again meanwhile would switch off a healthy one. Any other
    refusal is raised: nothing was done then.
    """
    answers: list[PowerAnswer] = []
    words = ""
    try:
        answers.append(await act(PowerAction.OFF))
        words = answers[-1].words
    except Refused as lost:
        if lost.kind not in _LOST:
            raise
        words = lost.message
    for look in range(2):
        if look:
            await sleep(APART_SECONDS)
        answer = await _look(act, sleep)
        if isinstance(answer, Refused):
            return Confirmed(False, answer.message, tuple(answers))
        answers.append(answer)
        if answer.state is not PowerState.OFF:
            said = answer.words or f"the device says {answer.state.value}"
            return Confirmed(False, f"{said} (to off: {words})" if words else said, tuple(answers))
    return Confirmed(True, answers[-1].words, tuple(answers))


_LOST = (Kind.TIMEOUT, Kind.UNAVAILABLE)


async def _look(act: Act, sleep: Sleep) -> PowerAnswer | Refused:
    """The status; read again when the answer is lost or says nothing."""
    last: PowerAnswer | Refused | None = None
    for attempt in range(LOOKS):
        if attempt:
            await sleep(APART_SECONDS)
        try:
            last = await act(PowerAction.STATUS)
        except Refused as lost:
            if lost.kind not in _LOST:
                raise
            last = lost
            continue
        if last.state is not PowerState.UNKNOWN:
            return last
    assert last is not None
    return last
