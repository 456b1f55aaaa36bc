"""Child processes with deadlines: whatever may hang, or is fed by strangers, runs in one.

A mount that hangs stalls the child that touched it and nothing else. A child dies with the agent, with its
order and at its deadline; one that can't die (uninterruptible I/O) keeps the locks that it was given, so that
nobody writes its volume until it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from volery.contracts.errors import Kind, Refused
from volery.runtime.clock import monotonic
from volery.runtime.tasks import end

log = logging.getLogger(__name__)
T = TypeVar("T")

REAP_SECONDS = 5.0
"""How long a killed child may take to go; beyond it, it is stuck in the kernel and left alone."""
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
STDERR_BYTES = 2000
LOCK_POLL_SECONDS = 0.05
NOTE_BYTES = 4096
CONFINED = (
    "--no-new-privs",
    "--inh-caps=-all",
    "--bounding-set=-all,+dac_override,+dac_read_search,+fowner,+chown",
)
"""A bounded child can touch files as root does, and nothing else of the host."""
NOT_FOUND = 127
PACKAGES = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on a child that reads what strangers wrote."""

    cpu_seconds: int
    address_space_bytes: int


class ChildFailed(Exception):
    """A child ended with a status other than 0; `reason` is the end of what it said, on one line."""

    def __init__(self, program: str, status: int, reason: str) -> None:
        super().__init__(f"{program} ended with status {status}: {reason}")
        self.program = program
        self.status = status
        self.reason = reason


class ChildTimedOut(ChildFailed):
    """A child that was killed because its time was over."""

    def __init__(self, program: str, timeout_seconds: float) -> None:
        super().__init__(program, -signal.SIGKILL, f"it did not come back within {timeout_seconds:g} s")


@contextlib.asynccontextmanager
async def child(
    arguments: Sequence[str],
    *,
    stdin: int = DEVNULL,
    stdout: int = PIPE,
    environment: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    pass_fds: Sequence[int] = (),
) -> AsyncIterator[Process]:
    """A running child in a process group of its own, killed on leaving if it hasn't ended."""
    spawning = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", *(CONFINED if limits is not None else ()), "--"),
            *arguments,
            stdin=stdin,
            stdout=stdout,
            stderr=PIPE,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    )
    try:
        process = await asyncio.shield(spawning)
    except asyncio.CancelledError:
        await asyncio.wait({spawning}, timeout=REAP_SECONDS)
        if spawning.done() and not spawning.cancelled() and spawning.exception() is None:
            await _end(spawning.result())
        raise
    except FileNotFoundError as error:
        raise Refused(
            Kind.UNAVAILABLE, "this host has no program setpriv: install util-linux on it", program="setpriv"
        ) from error
    try:
        if limits is not None:
            _bound(process.pid, limits)
        yield process
    finally:
        await _end(process)


def _bound(pid: int, limits: Limits) -> None:
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds))
        resource.prlimit(pid, resource.RLIMIT_AS, (limits.address_space_bytes,) * 2)
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


async def _end(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # To the end of its pipes, too: a pipe that is closed later keeps the event loop from closing.
    gone = asyncio.ensure_future(process.communicate())
    await asyncio.wait({gone}, timeout=REAP_SECONDS)
    if gone.done():
        gone.result()
    else:
        gone.cancel()
        log.warning("child %d does not end after SIGKILL: its storage hangs", process.pid)


async def run(
    arguments: Sequence[str],
    *,
    timeout_seconds: float,
    stdin: bytes | None = None,
    environment: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    pass_fds: Sequence[int] = (),
    on_output: Callable[[bytes], None] | None = None,
) -> bytes:
    """What the child wrote to its standard output, once it ended with status 0.

    `on_output` hears each piece as it comes (then nothing is collected). Raises ChildFailed, ChildTimedOut;
    Refused(unavailable) when this host doesn't have the program.
    """
    program = os.path.basename(arguments[0])
    collected = bytearray()

    def keep(piece: bytes) -> None:
        collected.extend(piece)
        if len(collected) > MAX_OUTPUT_BYTES:
            raise ChildFailed(program, 0, f"it said more than {MAX_OUTPUT_BYTES} bytes")

    try:
        async with (
            asyncio.timeout(timeout_seconds),
            child(
                arguments,
                stdin=DEVNULL if stdin is None else PIPE,
                environment=environment,
                limits=limits,
                pass_fds=pass_fds,
            ) as process,
        ):
            copying, feeding = _copy_out(process, on_output or keep), _feed(process, stdin)
            async with works(last_words(process), copying, feeding) as flows:
                said, _, _ = await asyncio.gather(*flows)
            status = await process.wait()
    except TimeoutError as error:
        raise ChildTimedOut(program, timeout_seconds) from error
    if status == NOT_FOUND and said.startswith("setpriv:"):
        raise Refused(
            Kind.UNAVAILABLE, f"this host has no program {program}: install it there", program=program
        )
    if status:
        raise ChildFailed(program, status, said or _signal_name(status))
    return bytes(collected)


@contextlib.asynccontextmanager
async def works(*coroutines: Coroutine[Any, Any, Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Tasks beside a child's pipes; they have ended when the child is."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield tasks
    finally:
        await end(tasks)


async def _copy_out(process: Process, take: Callable[[bytes], None]) -> None:
    assert process.stdout is not None
    while piece := await process.stdout.read(65536):
        take(piece)


async def _feed(process: Process, data: bytes | None) -> None:
    if process.stdin is None or data is None:
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, RuntimeError):  # the last is uvloop's
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()


async def last_words(process: Process) -> str:
    """The end of what the child writes to its standard error, on one line; returns when it closes it."""
    assert process.stderr is not None
    tail = b""
    while piece := await process.stderr.read(4096):
        tail = (tail + piece)[-STDERR_BYTES:]
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return "; ".join(lines[-3:])[:500]


def _signal_name(status: int) -> str:
    if status >= 0:
        return "it gave no reason"
    if -status in (signal.SIGXCPU, signal.SIGKILL):
        return "it was killed, having used all the CPU time allowed to it"
    return f"it was ended by {signal.Signals(-status).name}"


async def python(
    module: str,
    verb: str,
    request: msgspec.Struct,
    answer: type[T],
    *,
    timeout_seconds: float,
    pass_fds: Sequence[int] = (),
) -> T:
    """Asks one of our own stand-alone programs (`host_agent.files`, …) and decodes its last line.

    A line `{"refused": kind, "message": …}` is raised as Refused. Raises ChildFailed, ChildTimedOut.
    """
    output = await run(
        python_arguments(module, verb),
        timeout_seconds=timeout_seconds,
        stdin=msgspec.json.encode(request),
        environment=PYTHON_ENVIRONMENT,
        pass_fds=pass_fds,
    )
    return answered(output, answer)


def answered(output: bytes, answer: type[T]) -> T:
    """What one of our own programs said last. Raises Refused as it was told."""
    return decode_answer(output.rstrip().rsplit(b"\n", 1)[-1], answer)


PYTHON_ENVIRONMENT = {"PYTHONPATH": PACKAGES}


def python_arguments(module: str, *arguments: str) -> list[str]:
    """Without site-packages: such a program needs the standard library only, and starts in 18 ms."""
    return [sys.executable, "-S", "-m", module, *arguments]


class LineReader:
    """Cuts what a child says into lines; `last` is the newest whole one."""

    def __init__(self) -> None:
        self._rest = b""
        self.last = b""

    def feed(self, piece: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if lines:
            self.last = lines[-1]
        return lines


class _Refusal(msgspec.Struct):
    refused: Kind | None = None
    message: str = ""


def decode_answer(line: bytes, answer: type[T]) -> T:
    refusal = msgspec.json.decode(line, type=_Refusal)
    if refusal.refused is not None:
        raise Refused(refusal.refused, refusal.message)
    return msgspec.json.decode(line, type=answer)


@contextlib.asynccontextmanager
async def held(path: Path, *, wait_seconds: float, otherwise: str) -> AsyncIterator[int]:
    """An exclusive lock; children that are passed its descriptor hold it as long as they live.

    Raises Refused(conflict, otherwise) when its holder doesn't let go in time.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = monotonic() + wait_seconds
    while (descriptor := _lock(path)) is None:
        if monotonic() >= deadline:
            raise Refused(Kind.CONFLICT, otherwise)
        await asyncio.sleep(LOCK_POLL_SECONDS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        _tidy(path)


def _lock(path: Path) -> int | None:
    """The descriptor of the locked file, or None while somebody else holds it (or just removed it)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def note_of(path: Path) -> bytes:
    """What the holder of a lock wrote into its file; nothing when nobody holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, NOTE_BYTES, 0)
    finally:
        os.close(descriptor)
    return b""


def _tidy(path: Path) -> None:
    """Removes the lock's file unless a child that outlived us holds it."""
    descriptor = _lock(path)
    if descriptor is not None:
        path.unlink()
        os.close(descriptor)


@contextlib.contextmanager
def secret_descriptor(secret: str) -> Iterator[int]:
    """A secret in memory for a child: it reads /proc/self/fd/{descriptor}; no argument and no file shows it."""
    descriptor = os.memfd_create("secret", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, secret.encode())
        yield descriptor
    finally:
        os.close(descriptor)
