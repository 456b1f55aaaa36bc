"""When a crashed VM is restarted, how long a next attempt waits, and when no more is made."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.ha.config import HaConfig
from services.ha.policies.restart_order import (
    Step,
    WatchedVm,
    decide,
    ended,
    is_over,
    waits_for_more_important,
    waits_for_place,
    within,
)
from volery.contracts.liveness import LivenessState

CONFIG = HaConfig()
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def watched(**fields: object) -> WatchedVm:
    made: dict = {
        "id": "v", "name": "web", "epoch": 1, "status": "down", "desired": "up", "reason": "crashed",
        "host_id": "h", "enabled": True, "priority": 50, "busy": False,
    }  # fmt: skip
    return WatchedVm(**(made | fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"reason": "panic"}, True),
        ({"enabled": False}, False),
        ({"desired": "down"}, False),
        ({"status": "unknown"}, False),
        ({"status": "not_responding"}, False),
        ({"reason": "user"}, False),
        ({"reason": "guest_shutdown"}, True),  # still desired up: inventory's option
        ({"reason": "guest_shutdown", "desired": "down"}, False),
        ({"reason": "host_died"}, True),
        ({"reason": "host_shutdown"}, True),
        ({"reason": "host_died", "desired": "down"}, False),
        ({"reason": "host_lost"}, False),
        ({"reason": "start_failed"}, False),
        ({"busy": True}, False),
        # wanted up after a blackout, though not highly available
        ({"enabled": False, "after_blackout": True, "reason": "host_died"}, True),
        ({"enabled": False, "after_blackout": True, "reason": "host_shutdown"}, True),
        ({"enabled": False, "after_blackout": True, "reason": "crashed"}, False),
        ({"enabled": False, "after_blackout": True, "reason": "host_died", "desired": "down"}, False),
    ],
)
def test_only_a_proven_unasked_end_is_a_crash(fields: dict, expected: bool) -> None:
    assert ended(watched(**fields)) is expected


@pytest.mark.parametrize(
    ("priority", "waited", "waits"),
    [(51, 0.0, True), (51, 59.9, True), (51, 60.0, False), (50, 0.0, False), (49, 0.0, False)],
)
def test_after_a_blackout_the_more_important_vm_of_a_missing_host_is_waited_for(
    priority: int, waited: float, waits: bool
) -> None:
    other = watched(id="w", name="db", priority=priority)
    sentence = waits_for_more_important(watched(), other, "h2", waited, 60.0)
    assert bool(sentence) is waits
    assert not waits or "host h2, which isn't back since ha began, since VM db there" in sentence


@pytest.mark.parametrize(
    ("priority", "waited", "waits"),
    [(51, 0.0, True), (51, 599.9, True), (51, 600.0, False), (50, 0.0, False), (49, 0.0, False)],
)
def test_a_more_important_vm_without_a_host_is_waited_for(priority: int, waited: float, waits: bool) -> None:
    sentence = waits_for_place(watched(), watched(id="w", name="db", priority=priority), waited, 600.0)
    assert bool(sentence) is waits
    assert not waits or "until VM db, which is more important, has a host" in sentence
    assert not waits_for_place(watched(), watched(priority=90), 0.0, 600.0), "it never waits for itself"


def test_the_first_is_at_once_and_each_next_waits_longer() -> None:
    attempts: tuple[datetime, ...] = ()
    now, waits = NOW, []
    while True:
        verdict = decide(watched(), LivenessState.UP, attempts, now, CONFIG)
        if verdict.step is Step.GIVE_UP:
            break
        if verdict.step is Step.WAIT:
            assert verdict.due is not None
            waits.append((verdict.due - now).total_seconds())
            now = verdict.due
        else:
            attempts = (*attempts, now)
    assert waits == [10, 20, 40, 80, 160, 300, 300, 300, 300]
    assert len(attempts) == 10
    assert "left down" in verdict.message


def test_one_that_ends_with_each_of_its_hosts_is_given_up_as_well() -> None:
    """It may be what takes them down."""
    attempts = tuple(NOW - timedelta(minutes=n) for n in range(10, 0, -1))
    verdict = decide(watched(reason="host_died"), LivenessState.DEAD, attempts, NOW, CONFIG)
    assert verdict.step is Step.GIVE_UP
    assert "ended together with its host again after 10 restarts within 60 minutes" in verdict.message


def test_old_attempts_stop_counting() -> None:
    attempts = tuple(NOW - timedelta(seconds=3601 + n) for n in range(10))
    assert within(attempts, NOW, CONFIG) == ()
    assert decide(watched(), LivenessState.UP, within(attempts, NOW, CONFIG), NOW, CONFIG).step is Step.ASK


def test_a_clock_that_was_set_back_holds_nothing_up() -> None:
    """The simulation's seed 1: the attempt before was made while the leader's clock was an hour ahead."""
    ahead = (NOW + timedelta(hours=1),)
    assert decide(watched(), LivenessState.UP, ahead, NOW, CONFIG).step is Step.ASK
    assert within(ahead, NOW, CONFIG) == ahead  # it still counts


def test_a_silent_host_is_waited_for() -> None:
    assert decide(watched(), LivenessState.NON_RESPONSIVE, (), NOW, CONFIG).step is Step.WAIT
    assert decide(watched(), LivenessState.UP, (), NOW, CONFIG).step is Step.ASK
    assert decide(watched(), None, (), NOW, CONFIG).step is Step.ASK


def test_a_record_ends_when_it_says_nothing_any_more() -> None:
    assert is_over(None, (NOW,), False)
    assert is_over(watched(desired="down"), (NOW,), False)
    assert is_over(watched(status="up"), (NOW,), True)
    assert is_over(watched(status="up"), (), False)
    assert not is_over(watched(status="up"), (NOW,), False)
    assert not is_over(watched(), (NOW,), True)


def ago(*seconds: float) -> tuple[datetime, ...]:
    return tuple(NOW - timedelta(seconds=s) for s in seconds)


@pytest.mark.parametrize(
    ("reason", "host", "attempts", "preferred", "avoided"),
    [
        ("crashed", LivenessState.UP, (), "h", ()),
        ("crashed", LivenessState.UP, ago(1800, 1700), "h", ()),
        ("crashed", LivenessState.UP, ago(1800, 1700, 1600), "", ("h",)),
        ("crashed", LivenessState.DEAD, (), "", ("h",)),
        ("host_died", LivenessState.DEAD, (), "", ("h",)),
        ("host_died", LivenessState.UP, (), "", ("h",)),
        ("host_died", LivenessState.NON_RESPONSIVE, (), "", ("h",)),
        ("host_shutdown", None, (), "", ("h",)),
        ("io_error", LivenessState.UP, (), "", ("h",)),
    ],
)
def test_where(
    reason: str,
    host: LivenessState | None,
    attempts: tuple[datetime, ...],
    preferred: str,
    avoided: tuple[str, ...],
) -> None:
    verdict = decide(watched(reason=reason), host, attempts, NOW, CONFIG)
    assert verdict.step is Step.ASK
    assert (verdict.preferred_host_id, verdict.avoided_host_ids) == (preferred, avoided)


def test_the_first_restart_after_a_hosts_death_never_waits_for_the_vms_own_crashes() -> None:
    crashes = ago(300, 200, 1)
    dead = watched(reason="host_died")
    assert decide(dead, None, crashes, NOW, CONFIG, "crashed").step is Step.ASK
    again = decide(dead, None, crashes, NOW, CONFIG, "host_died")
    assert again.step is Step.WAIT
    assert again.due == NOW + timedelta(seconds=9)


@pytest.mark.parametrize("reason", ["crashed", "host_died", "host_shutdown"])
@pytest.mark.parametrize("tried", range(5))
def test_restarted_on_its_own_host_only_it_waits_until_that_is_up_and_is_asked_for_nowhere_else(
    reason: str, tried: int
) -> None:
    vm = watched(reason=reason, same_host=True)
    attempts = tuple(NOW - timedelta(seconds=3000 - n) for n in range(tried))
    for state in (None, *LivenessState):
        verdict = decide(vm, state, attempts, NOW, CONFIG, reason)
        if state is LivenessState.UP:
            assert (verdict.step, verdict.only_host_id) == (Step.ASK, "h")
            assert not verdict.avoided_host_ids
        else:
            assert verdict.step is Step.WAIT
