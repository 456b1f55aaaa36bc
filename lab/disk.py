"""A file system on a disk of its own that every host of a lab has mounted at one path, and that one host can lose.

To the hosts it is a directory that they share, as NFS or a cluster's file system is. What a host's guests and agents read
and write there past the page cache stalls while it is cut from it, and only that host's.
"""

from __future__ import annotations

import os

from lab import stalls
from lab.commands import run
from lab.errors import LabError
from lab.host import Host
from lab.layout import LabLayout

SIZE = 2 * 1024**3
"""Sparse."""


def make(lab: LabLayout) -> None:
    """Before hosts boot, which have what the machine has mounted then. Harmless when it is there. Raises LabError."""
    if os.path.ismount(lab.disk):
        return
    lab.disk.mkdir(parents=True, exist_ok=True)
    if not lab.disk_image.exists():
        new = lab.disk_image.with_suffix(".new")
        with new.open("wb") as file:
            file.truncate(SIZE)
        run(["mkfs.ext4", "-q", "-F", str(new)])
        new.rename(lab.disk_image)
    run(["mount", "-o", "loop", str(lab.disk_image), str(lab.disk)])


def remove(lab: LabLayout) -> None:
    """Unmounts it, once no host runs. Harmless when it isn't there."""
    if os.path.ismount(lab.disk):
        run(["umount", str(lab.disk)])


def cut(host: Host) -> None:
    """From now on it gets no answer from the disk, until `join`, or until its power is lost. Raises LabError."""
    lab = host.layout.lab
    if not os.path.ismount(lab.disk):
        raise LabError(f"Lab {lab.name} has no disk: make it with `up --disk`, before its hosts boot.")
    number = lab.disk.stat().st_dev
    stalls.begin(host.layout.cgroup, f"{os.major(number)}:{os.minor(number)}")


def join(host: Host) -> None:
    stalls.end(host.layout.cgroup)
