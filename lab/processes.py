"""Which processes of a lab exist, as the kernel says: nothing here is remembered."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError


@dataclass(frozen=True)
class ProcessId:
    """A pid with its start time in clock ticks, so that a reused pid is not taken for the old one."""

    pid: int
    start_ticks: int


@dataclass(frozen=True)
class ProcessState:
    name: str
    state: str  # as in /proc/PID/stat: R, S, D, T (stopped), Z (dead, not yet reaped)
    start_ticks: int


def read_state(pid: int) -> ProcessState | None:
    """None when there is no such process."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, _, rest = raw.partition("(")[2].rpartition(")")
    fields = rest.split()
    return ProcessState(name=name, state=fields[0], start_ticks=int(fields[19]))


def identify(pid: int) -> ProcessId | None:
    state = read_state(pid)
    return None if state is None else ProcessId(pid, state.start_ticks)


def is_alive(process: ProcessId) -> bool:
    """True while it can still do something: a zombie is dead."""
    state = read_state(process.pid)
    return state is not None and state.start_ticks == process.start_ticks and state.state not in "ZX"


def all_pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def pids_in_namespace(kind: str, member: int) -> list[int]:
    """Living processes in the same namespace of this kind (`pid`, `net`, …) as process `member`."""
    wanted = _namespace(member, kind)
    if wanted is None:
        return []
    return [pid for pid in all_pids() if _namespace(pid, kind) == wanted and not _is_dead(pid)]


def _is_dead(pid: int) -> bool:
    """Also true of a zombie, which keeps its pid namespace until its parent has reaped it; not of one whose first thread
    has ended while another waits for a disk.
    """
    return all(state is None or state.state in "ZX" for state in threads(pid))


def threads(pid: int) -> list[ProcessState | None]:
    return [read_state(int(task.name)) for task in Path(f"/proc/{pid}/task").glob("*")]


def command_line(pid: int) -> str:
    """Also of a process whose first thread has ended; "" when it is gone."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            if line := (task / "cmdline").read_bytes():
                return line.decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ""


def _namespace(pid: int, kind: str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def is_program(pid: int, program: str) -> bool:
    """Whether this process runs `program`: by the base name of its first argument, or its comm."""
    state = read_state(pid)
    if state is None:
        return False
    try:
        first = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0", 1)[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    # The kernel keeps 15 characters of a name.
    return os.path.basename(first.decode(errors="replace")) == program or (state.name == program[:15])


def inner_pid(pid: int) -> int | None:
    """The pid that this process has in its own, innermost pid namespace."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return None


def send(pid: int, number: signal.Signals) -> bool:
    """False when the process is gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_and_wait(
    process: ProcessId, then: Callable[[], None] = lambda: None, timeout_seconds: float = 10.0
) -> None:
    """SIGKILL, `then`, and waits for the exit. For pid 1 of a host: until every process in it has ended.

    Raises LabError when the process is still there after the time, which uninterruptible I/O can do.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        # Compared after the descriptor pins the pid: it can't be reused between the two.
        if not is_alive(process):
            return
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        then()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(timeout_seconds * 1000):
            raise LabError(
                f"Process {process.pid} did not end within {timeout_seconds:g} s of SIGKILL: it is "
                "probably waiting for I/O that doesn't return. Look at /proc/"
                f"{process.pid}/stack, then run the command again."
            )
    finally:
        os.close(descriptor)
