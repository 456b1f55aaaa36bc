"""The control groups of a lab, on cgroup v1, hybrid and v2 machines.

They limit what a host's libvirt sees, and are the kernel's own record of which processes a lab started.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.processes import send

# What libvirt uses, and pids. A hierarchy without any of these (name=systemd) isn't ours.
CONTROLLERS = {
    "cpu", "cpuacct", "cpuset", "memory", "blkio", "devices", "freezer", "pids", "io",
}  # fmt: skip


@dataclass(frozen=True)
class Hierarchy:
    """One mounted tree. `options` are what mounts the same tree elsewhere; empty on v2."""

    mount_point: Path
    options: str

    @property
    def unified(self) -> bool:
        return not self.options


def hierarchies() -> list[Hierarchy]:
    """The trees with controllers that this machine has: several on v1, one on v2."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount_point, kind, options = line.split()[:4]
        if kind == "cgroup":
            ours = [option for option in options.split(",") if option in CONTROLLERS]
            if ours:
                found.append(Hierarchy(Path(mount_point), ",".join(ours)))
        elif kind == "cgroup2":
            controllers = Path(mount_point, "cgroup.controllers").read_text().split()
            if CONTROLLERS.intersection(controllers):
                found.append(Hierarchy(Path(mount_point), ""))
    # libvirt can't mix the two either: with controllers in both, v1's are the ones that count.
    found.sort(key=lambda hierarchy: hierarchy.unified)
    if found and not found[0].unified:
        found = [hierarchy for hierarchy in found if not hierarchy.unified]
    if not found:
        raise LabError(
            "No control group hierarchy is mounted on this machine, and libvirt needs one: mount "
            "cgroup2 at /sys/fs/cgroup, then run the command again."
        )
    return found


def create(group: str) -> None:
    """Makes `group` (a path such as `volery-lab-x/h1`) in every hierarchy. Harmless when it exists."""
    for hierarchy in hierarchies():
        directory = hierarchy.mount_point
        for part in group.split("/"):
            if hierarchy.unified:
                _enable_controllers(directory)
            parent, directory = directory, directory / part
            directory.mkdir(exist_ok=True)
            if "cpuset" in hierarchy.options.split(","):
                _inherit_cpuset(parent, directory)


def _enable_controllers(directory: Path) -> None:
    for controller in (directory / "cgroup.controllers").read_text().split():
        try:
            (directory / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            # A controller that can't be delegated here (cpu with real-time tasks) is left out.
            if error.errno not in (errno.EINVAL, errno.ENOENT, errno.EBUSY):
                raise


def _inherit_cpuset(parent: Path, child: Path) -> None:
    """A v1 cpuset starts empty, and nothing can be moved into it before it has CPUs and memory."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (child / name).read_text().strip():
            (child / name).write_text((parent / name).read_text())
    (child / "cgroup.clone_children").write_text("1")


def join(group: str) -> None:
    """Moves this process into `group` in every hierarchy."""
    for hierarchy in hierarchies():
        (hierarchy.mount_point / group / "cgroup.procs").write_text(str(os.getpid()))


def members(group: str) -> set[int]:
    """Pids in `group` and in every group below it, in any hierarchy."""
    found: set[int] = set()
    for hierarchy in hierarchies():
        for directory, _, _ in os.walk(hierarchy.mount_point / group):
            try:
                lines = Path(directory, "cgroup.procs").read_text().split()
            except (FileNotFoundError, OSError):
                continue  # the group went away while we looked
            found.update(int(line) for line in lines)
    return found


def remove(group: str, timeout_seconds: float = 10.0) -> None:
    """Kills what is in `group` and removes it with all groups below. Harmless when it isn't there.

    Raises LabError when processes or groups are still there after the time.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        pids = members(group)
        for pid in pids - {os.getpid()}:
            send(pid, signal.SIGKILL)
        left = [hierarchy for hierarchy in hierarchies() if not _remove_tree(hierarchy, group)]
        if not left:
            return
        if time.monotonic() > deadline:
            raise LabError(
                f"Control group {group} is still there {timeout_seconds:g} s after its processes "
                f"({', '.join(map(str, sorted(pids))) or 'none'}) were killed: look at their state "
                "in /proc, then run the command again."
            )
        time.sleep(0.005)  # the kernel announces neither the last exit nor a group's release


def _remove_tree(hierarchy: Hierarchy, group: str) -> bool:
    top = hierarchy.mount_point / group
    for directory, _, _ in os.walk(top, topdown=False):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                return False
            raise
    return not top.exists()
