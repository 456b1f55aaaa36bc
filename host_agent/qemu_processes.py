"""QEMU's processes as the kernel has them, whatever libvirt says: which VM's, whether killed, what they wait for.

Only those of this agent's own namespace of processes: others belong to another host's libvirtd. A process is there as long
as one of its threads is; its first thread may have ended long before the one that waits for a disk.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path

from host_agent.domxml import ALIAS

_KILLED = 1 << (signal.SIGKILL - 1)
_OURS = re.compile(rf'\bid(?:=|":\s*"){ALIAS}([^",]+)')
"""A device of ours, in either of the forms in which QEMU takes them."""
_NETDEV = re.compile(r'\bnetdev(?:=|":)')


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


def devices(pid: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids of the disks and of the NICs with which it was started. What was plugged in later isn't among them."""
    disks, nics = list[str](), list[str]()
    for device in _after(_arguments(pid), "-device"):
        if (ours := _OURS.search(device)) is not None:
            (nics if _NETDEV.search(device) else disks).append(ours[1])
    return tuple(disks), tuple(nics)


def _vm_of(entry: str) -> str:
    return next(_after(_arguments(entry), "-uuid"), "")


def _arguments(pid: int | str) -> list[str]:
    """The command line, of any thread that is left; empty when none is."""
    for task in _tasks(pid):
        if _state(task) not in ("", "Z", "X") and (said := _read(task / "cmdline")):
            return said.split("\0")
    return []


def _after(arguments: list[str], option: str) -> Iterator[str]:
    return (value for name, value in pairwise(arguments) if name == option)


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
