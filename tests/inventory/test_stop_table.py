"""The stop table, row by row."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.inventory.stop_table import USER, After, End, Where, Wish, after, end_of, wish
from volery.contracts.vm import DesiredState, Vm

UP, DOWN = DesiredState.UP, DesiredState.DOWN
NOW = datetime.now(UTC)

PROTECTED = {
    End.GUEST_SHUTDOWN: (DOWN, Where.NOWHERE),
    End.CRASHED: (UP, Where.SAME_HOST),
    End.DESTROYED: (DOWN, Where.NOWHERE),
    End.WATCHDOG: (DOWN, Where.NOWHERE),
    End.IO_ERROR: (UP, Where.ELSEWHERE),
    End.SAVED: (DOWN, Where.NOWHERE),
    End.MIGRATED: (DOWN, Where.NOWHERE),
    End.HOST_SHUTDOWN: (UP, Where.ELSEWHERE),
    End.HOST_DIED: (UP, Where.ELSEWHERE),
}
"""A highly available VM that nobody asked to stop."""


def test_every_end_has_its_row() -> None:
    assert set(PROTECTED) == set(End)


@pytest.mark.parametrize("end", End)
def test_a_protected_vm_is_brought_back_from_what_nobody_wanted(end: End) -> None:
    desired, where = PROTECTED[end]
    assert after(end, Wish.RUN, protected=True) == After(end, desired, where)


@pytest.mark.parametrize("end", End)
@pytest.mark.parametrize("option", [False, True])
def test_any_other_vm_stays_down_with_the_reason(end: End, option: bool) -> None:
    found = after(end, Wish.RUN, protected=False, restart_after_guest_shutdown=option)
    assert found == After(end, DOWN, Where.NOWHERE)


@pytest.mark.parametrize("end", End)
@pytest.mark.parametrize("option", [False, True])
def test_who_asked_for_a_stop_has_it_whatever_ended_it_first(end: End, option: bool) -> None:
    found = after(end, Wish.STOP, protected=True, restart_after_guest_shutdown=option)
    assert found == After(USER, DOWN, Where.NOWHERE)


@pytest.mark.parametrize("end", End)
def test_the_option_brings_back_only_what_its_guest_switched_off(end: End) -> None:
    found = after(end, Wish.RUN, protected=True, restart_after_guest_shutdown=True)
    if end is End.GUEST_SHUTDOWN:
        assert found == After(end, UP, Where.SAME_HOST)
    else:
        assert found == after(end, Wish.RUN, protected=True)


@pytest.mark.parametrize("end", End)
@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("option", [None, False, True])
def test_after_a_blackout_the_option_decides_about_what_ended_with_its_host(
    end: End, protected: bool, option: bool | None
) -> None:
    found = after(end, Wish.RUN, protected=protected, start_after_blackout=option, blackout=True)
    with_host = end in (End.HOST_DIED, End.HOST_SHUTDOWN)
    as_if = option if with_host and option is not None else protected
    assert found == after(end, Wish.RUN, protected=as_if)
    alone = after(end, Wish.RUN, protected=protected, start_after_blackout=option)
    assert alone == after(end, Wish.RUN, protected=protected), "its host's own death is no blackout"
    asked = after(end, Wish.STOP, protected=protected, start_after_blackout=option, blackout=True)
    assert asked == After(USER, DOWN, Where.NOWHERE)


@pytest.mark.parametrize(
    ("reason", "shown", "end"),
    [
        ("shutdown", "", End.GUEST_SHUTDOWN),
        ("shutdown", "watchdog", End.WATCHDOG),
        ("crashed", "watchdog", End.CRASHED),
        ("crashed", "", End.CRASHED),
        ("failed", "", End.CRASHED),
        ("panicked", "panic", End.CRASHED),
        ("daemon", "", End.CRASHED),
        ("", "", End.CRASHED),
        ("a reason of a later libvirt", "", End.CRASHED),
        ("destroyed", "", End.DESTROYED),
        ("saved", "", End.SAVED),
        ("migrated", "", End.MIGRATED),
        ("host_shutdown", "", End.HOST_SHUTDOWN),
        ("host_died", "", End.HOST_DIED),
    ],
)
def test_what_the_host_said_is_an_end(reason: str, shown: str, end: End) -> None:
    assert end_of(reason, shown) is end


@pytest.mark.parametrize(
    ("desired", "stop_asked", "asked"),
    [
        (UP, False, Wish.RUN),
        (DesiredState.PAUSED, False, Wish.RUN),
        (UP, True, Wish.STOP),
        (DOWN, False, Wish.STOP),
        (DOWN, True, Wish.STOP),
    ],
)
def test_a_stop_is_asked_until_it_is_taken_back(desired: DesiredState, stop_asked: bool, asked: Wish) -> None:
    vm = Vm(
        id="v",
        revision=1,
        created_at=NOW,
        updated_at=NOW,
        name="v",
        cluster_id="c",
        data_center_id="d",
        desired=desired,
    )
    assert wish(vm, stop_asked) is asked
