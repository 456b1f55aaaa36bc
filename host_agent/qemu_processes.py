"""QEMU's processes as the kernel has them, whatever libvirt says: which VM's, whether killed, what they wait for.

Only those of this agent's own namespace of processes: others belong to another host's libvirtd. A process is there as long
as one of its threads is; its first thread may have ended long before the one that waits for a disk.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

_KILLED = 1 << (signal.SIGKILL - 1)


def find(vm_ids: Collection[str]) -> dict[str, int]:
    """VM → the id of its QEMU's process, for those that have one. Reads all of /proc: in a thread."""
    ours = _namespace("self")
    found: dict[str, int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or not _read(Path("/proc", entry, "comm")).startswith("qemu"):
            continue
        if _namespace(entry) == ours and (vm_id := _vm_of(entry)) in vm_ids:
            found[vm_id] = int(entry)
    return found


def is_killed(pid: int) -> bool:
    """Whether SIGKILL waits for one of its threads to come back from the kernel."""
    for task in _tasks(pid):
        for line in _read(task / "status").splitlines():
            name, _, mask = line.partition(":")
            if name in ("SigPnd", "ShdPnd") and int(mask, 16) & _KILLED:
                return True
    return False


def waits(pid: int) -> str:
    """Where its threads are that can't be interrupted, as far as the kernel says so; "" when none is."""
    places: Counter[str] = Counter()
    for task in _tasks(pid):
        if _state(task) == "D":
            places[_read(task / "wchan").strip("0\n") or "the kernel"] += 1
    return ", ".join(f"{count} in {place}" for place, count in places.most_common(3))


def _vm_of(entry: str) -> str:
    """By the command line, of any thread that is left; "" when none is."""
    for task in _tasks(entry):
        if _state(task) in ("", "Z", "X"):
            continue
        arguments = _read(task / "cmdline").split("\0")
        if "-uuid" in arguments[:-1]:
            return arguments[arguments.index("-uuid") + 1]
    return ""


def _tasks(pid: int | str) -> Iterator[Path]:
    return Path(f"/proc/{pid}/task").glob("*")


def _state(task: Path) -> str:
    return _read(task / "stat").rpartition(")")[2].strip()[:1]


def _namespace(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _read(file: Path) -> str:
    """What /proc says; "" of what has ended meanwhile."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
