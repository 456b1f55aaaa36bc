"""Processes that outlive the one that started them: known by pid *and* start time, never by name.

A child holds its directory's lock for as long as it, or a child of its own, lives: the lock is
an open file it inherits. So "is one running?" is asked of the kernel, not of a pid file, and a
second server on one directory can't start even when the pid file is lost.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from volery.setup.errors import SetupError

_POLL_SECONDS = 0.005
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    return BOOT_ID.read_text().strip()


@dataclass(frozen=True)
class ProcessId:
    """A process that can't be mistaken for a later one with the same pid."""

    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of /proc/PID/stat."""
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this pid now; None when there is none or it has ended."""
        start_time = _start_time(pid)
        return None if start_time is None else cls(pid, start_time, boot_id())

    def alive(self) -> bool:
        return self.boot == boot_id() and _start_time(self.pid) == self.start_time


def _start_time(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name may hold blanks and brackets: fields are counted from the last one.
    fields = text[text.rindex(")") + 2 :].split()
    # A killed process whose main thread is a zombie still has its files open, locks and ports
    # among them, until its last thread has ended.
    ended = fields[0] in ("Z", "X") and int(fields[17]) <= 1
    return None if ended else int(fields[19])


def write_record(path: Path, process: ProcessId) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(
        json.dumps({"pid": process.pid, "start_time": process.start_time, "boot": process.boot})
    )
    temporary.replace(path)


def read_record(path: Path) -> ProcessId | None:
    """The recorded process if it is alive, else None."""
    try:
        record = json.loads(path.read_text())
        process = ProcessId(int(record["pid"]), int(record["start_time"]), str(record["boot"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return process if process.alive() else None


@contextmanager
def exclusive(path: Path, *, timeout_seconds: float) -> Iterator[None]:
    """Only one process at a time passes; SetupError when another stays longer than the time."""
    with path.open("a") as file:
        if not _lock(file, timeout_seconds):
            raise SetupError(
                f"Another process has been working on {path.parent} for {timeout_seconds:.0f} s"
                f" (it holds {path}). Wait for it to end, or end it, and try again."
            )
        yield


def _lock(file: IO[str], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True


def running(lock: Path, record: Path) -> ProcessId | None:
    """Who holds the directory's lock; None when nobody does.

    A recorded process counts only while the lock is held. When the record is lost (its writer
    was killed between start and record) the holder is looked up in /proc.
    """
    if not lock.exists():
        return None
    with lock.open("a") as file:
        if _lock(file, 0):
            return None
    return read_record(record) or _oldest_holder(lock)


def _oldest_holder(lock: Path) -> ProcessId | None:
    identity = lock.stat()
    found: list[ProcessId] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _has_open(entry, identity):
            process = ProcessId.of(int(entry.name))
            if process is not None:
                found.append(process)
    return min(found, key=lambda p: (p.start_time, p.pid), default=None)


def _has_open(process: Path, identity: os.stat_result) -> bool:
    try:
        for descriptor in (process / "fd").iterdir():
            stat = descriptor.stat()
            if (stat.st_dev, stat.st_ino) == (identity.st_dev, identity.st_ino):
                return True
    except OSError:  # it ended meanwhile, or isn't ours to look into
        return False
    return False


def spawn(
    arguments: Sequence[str],
    *,
    lock: Path,
    record: Path,
    log: Path,
    user: int | None = None,
    group: int | None = None,
    environment: Mapping[str, str] | None = None,
    lock_timeout_seconds: float = 10.0,
    when_alone: Callable[[], None] = lambda: None,
) -> ProcessId:
    """Starts a program detached, in a session of its own, holding the lock while it lives.

    `when_alone` is called with the lock held: nothing of a predecessor is left alive then.

    Waits for what a killed predecessor left behind to let go of the lock. Raises SetupError when
    it doesn't, or when the program can't be started.
    """
    with lock.open("a") as held, log.open("ab") as output:
        if not _lock(held, lock_timeout_seconds):
            raise SetupError(
                f"{arguments[0]} isn't started: {lock} is still held by process"
                f" {_holder_name(lock)}. End that process and try again."
            )
        when_alone()
        try:
            child = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=dict(environment) if environment is not None else None,
                start_new_session=True,
                pass_fds=(held.fileno(),),
                user=user,
                group=group,
                extra_groups=[] if user is not None else None,
            )
        except OSError as error:
            raise SetupError(f"{arguments[0]} can't be started: {error.strerror}.") from error
    process = ProcessId.of(child.pid)
    if process is None:
        child.wait()
        raise SetupError(exit_report(arguments[0], log))
    write_record(record, process)
    # The child outlives us on purpose; without this Python would warn that it is still running.
    child.returncode = 0
    return process


def become(
    arguments: Sequence[str],
    *,
    lock: Path,
    record: Path,
    user: int | None = None,
    group: int | None = None,
    environment: Mapping[str, str] | None = None,
    lock_timeout_seconds: float = 10.0,
    when_alone: Callable[[], None] = lambda: None,
) -> NoReturn:
    """This process turns into the program, holding the lock: for a supervisor that isn't ours.

    Raises SetupError when another process holds the lock.
    """
    held = lock.open("a")
    if not _lock(held, lock_timeout_seconds):
        raise SetupError(
            f"{arguments[0]} is already running here: {lock} is held by process {_holder_name(lock)}."
        )
    when_alone()
    myself = ProcessId.of(os.getpid())
    assert myself is not None
    write_record(record, myself)
    os.set_inheritable(held.fileno(), True)
    if user is not None and group is not None:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
    values = dict(os.environ if environment is None else environment)
    os.execvpe(arguments[0], list(arguments), values)  # noqa: S606 - no shell is what we want


def _holder_name(lock: Path) -> str:
    holder = _oldest_holder(lock)
    return "in another container" if holder is None else str(holder.pid)


def exit_report(program: str, log: Path) -> str:
    """A sentence with the end of the program's log, for a program that ended too early."""
    try:
        tail = log.read_text(errors="replace").splitlines()[-8:]
    except FileNotFoundError:
        tail = []
    return "\n  ".join([f"{program} ended while it started. Its log, {log}, ends:", *tail])


def signal_process(process: ProcessId, number: int) -> bool:
    """Sends a signal to exactly this process; False when it has ended."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not process.alive():
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def wait_for_exit(process: ProcessId, timeout_seconds: float) -> bool:
    """Whether the process ended within the time."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if not process.alive():
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(timeout_seconds * 1000))
    finally:
        os.close(descriptor)
        _reap(process.pid)


def _reap(pid: int) -> None:
    """Takes the status of a child of ours, so that no zombie stays while we live on."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def stop(process: ProcessId, escalation: Sequence[tuple[int, float]]) -> bool:
    """Sends each signal and waits its seconds until the process has ended; whether it did."""
    for number, timeout_seconds in escalation:
        if not signal_process(process, number) or wait_for_exit(process, timeout_seconds):
            return True
    return not process.alive()


def free_port(preferred: int | None = None, host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on: the preferred one, else one outside the ephemeral range.

    The kernel hands ephemeral ports to outgoing connections, so a port kept for next time
    must not be one of them.
    """
    candidates = [] if preferred is None else [preferred]
    candidates += [10_000 + int.from_bytes(os.urandom(2), "big") % 20_000 for _ in range(50)]
    for port in candidates:
        if port_is_free(port, host):
            return port
    raise SetupError("No free TCP port was found between 10000 and 30000.")


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
