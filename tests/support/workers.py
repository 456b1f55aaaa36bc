"""Which tests a worker of `make test WORKERS=2` runs in a row, and what begins first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

TOGETHER: Mapping[str, Sequence[str]] = {
    "labs": (
        "faults/test_lab_chaos.py",
        "lab",
        "system",
    ),
    "installations": (
        "compose",
        "docs",
        "faults/test_chaos.py",
        "setup/test_clean.py",
        "setup/test_guest_image.py",
        "setup/test_up.py",
    ),
}
"""Rooms of tests, never two of one at the same time. Labs: watchdogs go against the clock. Installations: the engine of
containers, its images and cache, build/guest, the machine's packet filter."""


def room(test: str) -> str:
    """The key of TOGETHER, or the test's own file. `test`: a node's id, `tests/lab/test_bmc.py::test_…`."""
    file = PurePosixPath(test.split("::")[0])
    for name, places in TOGETHER.items():
        if any(file.is_relative_to(PurePosixPath("tests", place)) for place in places):
            return name
    return str(file)


def longest_first(test: str) -> int:
    """The rooms that take long begin first; among files, what is collected first."""
    rooms = list(TOGETHER)
    return rooms.index(name) if (name := room(test)) in TOGETHER else len(rooms)


class ByRoom(LoadScopeScheduling):
    """xdist's `loadgroup` goes by the ids that it gives to nodes, which pytest 9.2 no longer lets it change (pytest-xdist,
    issue 1386): then a room's tests are dealt out one by one."""

    def _split_scope(self, nodeid: str) -> str:
        return room(nodeid)
