"""The table of trials: each kind has a name of its own, and takes place once, in a lab that it can share."""

from __future__ import annotations

from trials.__main__ import HOSTS, RACK_HOSTS, grouped
from trials.kinds import BRAKE_WINDOW, KINDS, Nothing


def test_names_and_titles_are_each_kinds_own() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert len({kind.title for kind in KINDS}) == len(KINDS)


def test_every_kind_is_in_one_lab_with_what_it_needs() -> None:
    groups = grouped(KINDS)
    assert sorted(kind.name for kinds in groups.values() for kind in kinds) == sorted(
        kind.name for kind in KINDS
    )
    for needs, kinds in groups.items():
        assert {kind.io_timeout_seconds for kind in kinds} == {needs.io_timeout_seconds}
    by_name = {kind.name: needs for needs, kinds in groups.items() for kind in kinds}
    assert by_name["plug"] == by_name["storage-cut"]
    assert (by_name["plug"].hosts, by_name["rack-off"].hosts) == (HOSTS, RACK_HOSTS)
    assert BRAKE_WINDOW not in dict(by_name["rack-silent"].settings), (
        "the brake holds as long as it does for people"
    )


def test_a_guest_that_stands_still_is_never_taken_for_one_that_writes() -> None:
    """A fault that stops the guest's host, or its disk, can't ask it to write meanwhile."""
    stopped = {
        "short-freeze",
        "frozen-unproven",
        "says-on",
        "swapped",
        "storage-cut",
        "storage-away",
        "directory-cut",
    }
    assert {kind.name for kind in KINDS if isinstance(kind, Nothing) and kind.still} == stopped
