"""One child process: secrets by standard input or memory, a deadline, and nothing of it left afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from volery.contracts.errors import unavailable

ALARMED = str(Path(__file__).with_name("alarmed.py"))
PLACES = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Looked at after PATH, where services and people's shells often lack the sbin ones."""
INHERITED = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
"""Whom to trust. Nothing else is handed on: not a proxy, and none of our own settings."""
REAP_SECONDS = 5.0
LATE_SECONDS = 1.0
"""Between our own deadline, which has words, and the kernel's."""
MAX_OUTPUT_BYTES = 256 * 1024
MFD_EXEC = 0x10
"""Which Python 3.11 has no name for."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended. `exit_code` is None when it was killed because its time was over."""

    exit_code: int | None
    output: str
    errors: str


def search_path() -> str:
    return os.pathsep.join(dict.fromkeys([*os.environ.get("PATH", "").split(os.pathsep), *PLACES]))


def find_program(name: str, path: str = "") -> str | None:
    """Its absolute path, looked for in `path` or where this machine has programs."""
    found = shutil.which(name, path=path or search_path())
    return None if found is None else os.path.abspath(found)


async def run(
    arguments: Sequence[str],
    *,
    stdin: bytes = b"",
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Runs a program, by its path, to its end or its deadline; then its whole process group is killed.

    Raises Refused(unavailable) when it can't be started. It dies with this process.
    """
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    alarm = str(timeout_seconds + LATE_SECONDS)
    setpriv = find_program("setpriv")
    if setpriv is None:
        raise unavailable("setpriv is missing on this machine: install util-linux", program="setpriv")
    command = [
        *(setpriv, "--pdeathsig", "KILL", "--"),
        *(sys.executable, "-S", "-E", ALARMED, alarm),
        *arguments,
    ]
    process = await _started(
        command, {"PATH": search_path(), "LC_ALL": "C", **inherited, **(environment or {})}, bool(stdin)
    )
    flows = [asyncio.create_task(_tail(stream)) for stream in (process.stdout, process.stderr)]
    exit_code: int | None = None
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await _feed(process, stdin)
                exit_code = await process.wait()
    finally:
        await _end(process, flows)
    output, errors = (flow.result() if flow.done() and not flow.cancelled() else b"" for flow in flows)
    return Ended(exit_code, output.decode(errors="replace"), errors.decode(errors="replace"))


async def _started(command: Sequence[str], environment: Mapping[str, str], feeds: bool) -> Process:
    """The child. When whoever waits is cancelled in mid-start, it is ended, not forgotten."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command,
            stdin=PIPE if feeds else DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            env=dict(environment),
            cwd="/",
            start_new_session=True,
        )
    )
    try:
        return await asyncio.shield(starting)
    except OSError as error:
        raise unavailable(f"{command[-1]} can't be started: {error}") from error
    except asyncio.CancelledError:
        await asyncio.wait({starting}, timeout=REAP_SECONDS)
        if starting.done() and not starting.cancelled() and starting.exception() is None:
            await _end(starting.result(), [])
        raise


async def _feed(process: Process, data: bytes) -> None:
    if process.stdin is None:
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, RuntimeError):  # the last is uvloop's
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()


async def _tail(stream: asyncio.StreamReader | None) -> bytes:
    """What it says, up to a limit; the rest is read and dropped, so that it can't block."""
    assert stream is not None
    kept = b""
    while piece := await stream.read(65536):
        kept = (kept + piece)[-MAX_OUTPUT_BYTES:]
    return kept


async def _end(process: Process, flows: Sequence[asyncio.Task[bytes]]) -> None:
    """Kills the whole group, also what the program left behind, and reads its pipes to their ends."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    ends = {asyncio.ensure_future(process.wait()), *flows}
    _, late = await asyncio.wait(ends, timeout=REAP_SECONDS)
    for task in late:
        task.cancel()


@contextlib.contextmanager
def memory_file(content: bytes, *, executable: bool = False) -> Iterator[str]:
    """The path of a file in memory, which this user's processes can read until the block ends."""
    flags = os.MFD_CLOEXEC
    if executable:
        try:
            descriptor = os.memfd_create("volery", flags | MFD_EXEC)
        except OSError:
            # A kernel before 6.3 doesn't know the flag, and lets any memory be executed.
            descriptor = os.memfd_create("volery", flags)
    else:
        descriptor = os.memfd_create("volery", flags)
    try:
        os.fchmod(descriptor, 0o700 if executable else 0o600)
        os.write(descriptor, content)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
