"""Reads and writes of one host to one block device that don't come back until they are let go.

A limit of one byte per second in the host's control groups. Whoever waits for such a read or write, past the page cache
or in fsync, can't be killed: that is how a disk behaves whose path is gone. Only the standard library is imported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lab import cgroups
from lab.errors import LabError

V1 = ("blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device")
V2 = "io.max"


def begin(group: str, device: str) -> None:
    """`device`: MAJOR:MINOR. Holds for the control groups that are there now. Raises LabError where the kernel can't."""
    done = False
    for directory in _directories(group):
        for name in V1:
            if (file := directory / name).exists():
                file.write_text(f"{device} 1")
                done = True
        if (file := directory / V2).exists():
            file.write_text(f"{device} rbps=1 wbps=1")
            done = True
    if not done:
        raise LabError(
            f"Nothing of {group} can be stalled: this machine's kernel limits no reads and writes (CONFIG_BLK_DEV_THROTTLING,"
            " with the blkio or io controller mounted)."
        )


def end(group: str) -> None:
    """Whatever was stalled goes on. Harmless when nothing was, or the group is gone."""
    for directory in _directories(group):
        for name in V1:
            _lift(directory / name, "{} 0")
        _lift(directory / V2, "{} rbps=max wbps=max")


def _lift(file: Path, words: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text().splitlines():
            file.write_text(words.format(line.split()[0]))


def _directories(group: str) -> Iterator[Path]:
    """Of v1 each group has a limit of its own, whatever those above it have."""
    for hierarchy in cgroups.hierarchies():
        for directory, _, _ in os.walk(hierarchy.mount_point / group):
            yield Path(directory)
