"""Tools that write a volume run under its lease: no lease, no tool; and a lease that is lost ends the tool.

`sanlock client command` registers itself with the daemon, takes the lease and becomes the tool, so that the daemon
watches the tool's own process: it kills it when the lease is lost, and gives the lease back when it has ended. Only
that process: a tool must not leave its work to children.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from host_agent import children, sanlock
from host_agent.children import ChildFailed, Limits
from host_agent.leased_tool import BEGAN
from host_agent.sanlock import SanlockFailed
from volery.contracts.domain import DomainLease
from volery.contracts.errors import Kind, Refused
from volery.runtime.clock import monotonic

LETTING_GO = -11
"""Its last holder on this host has just ended, and sanlock is writing so to the storage."""
LET_GO_SECONDS = 10.0
LOOK_AGAIN_SECONDS = 0.1
HEARD_BYTES = 4096
"""Of a tool whose output goes elsewhere: enough to read why it got no lease."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What programs that work on a volume hold for as long as they live: its lock on this host, and its lease."""

    descriptor: int = -1
    lease: DomainLease | None = None

    @property
    def pass_fds(self) -> tuple[int, ...]:
        return () if self.descriptor < 0 else (self.descriptor,)

    @property
    def reading(self) -> Hold:
        """For a program that writes nothing."""
        return Hold(self.descriptor)


FREE = Hold()


class NoLease(Refused):
    """The lease could not be had, or was lost: the volume may be another host's by now."""


async def run_holding(
    hold: Hold,
    arguments: Sequence[str],
    *,
    timeout_seconds: float,
    stdin: bytes | None = None,
    environment: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    pass_fds: Sequence[int] = (),
    on_output: Callable[[bytes], None] | None = None,
) -> bytes:
    """As `children.run`. Raises also NoLease."""
    options: dict[str, Any] = {
        "timeout_seconds": timeout_seconds,
        "stdin": stdin,
        "environment": environment,
        "limits": limits,
        "pass_fds": (*pass_fds, *hold.pass_fds),
        "on_output": on_output,
    }
    if hold.lease is None:
        return await children.run(arguments, **options)
    try:
        return await run(hold.lease, arguments, **options)
    except SanlockFailed as failure:
        raise NoLease(
            failure.kind,
            f"volume {hold.lease.key} can't be written by this host: {failure.message}",
            sanlock_code=failure.code,
        ) from failure
    except ChildFailed as failure:
        if failure.status != -signal.SIGTERM:
            raise
        raise NoLease(
            Kind.UNAVAILABLE,
            f"writing volume {hold.lease.key} was ended: this host could not renew its lease on storage domain "
            f"{hold.lease.lockspace}, which did not answer for too long. Look at the storage, then try again",
        ) from failure


async def run(lease: DomainLease, arguments: Sequence[str], **options: Any) -> bytes:
    """As `children.run`, with its options, and with the lease held for as long as the tool lives.

    Raises SanlockFailed when the lease can't be had: then the tool never began. ChildFailed with status -SIGTERM or
    -SIGKILL is also how a tool ends whose lease was lost.
    """
    deadline = monotonic() + LET_GO_SECONDS
    while True:
        try:
            return await _once(lease, arguments, **options)
        except SanlockFailed as failure:
            if failure.code != LETTING_GO or monotonic() > deadline:
                raise
        await asyncio.sleep(LOOK_AGAIN_SECONDS)


async def _once(
    lease: DomainLease,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    on_output: Callable[[bytes], None] | None = None,
    **options: Any,
) -> bytes:
    reader, writer = os.pipe()
    what = sanlock.resource(lease.lockspace, lease.key, lease.path, lease.offset)
    begin = children.python_arguments("host_agent.leased_tool", str(writer), *arguments)
    said = bytearray()

    def hear(piece: bytes) -> None:
        if on_output is None or len(said) < HEARD_BYTES:
            said.extend(piece)
        if on_output is not None:
            on_output(piece)

    failure: ChildFailed | None = None
    try:
        await children.run(
            [sanlock.PROGRAM, "client", "command", "-r", what, "-c", *begin],
            environment={**(environment or {}), **children.PYTHON_ENVIRONMENT},
            pass_fds=(writer, *pass_fds),
            on_output=hear,
            **options,
        )
    except ChildFailed as failed:
        failure = failed
    finally:
        os.close(writer)
        began = _told(reader)
    if not began and not isinstance(failure, children.ChildTimedOut):
        code = sanlock.result_of(said.decode(errors="replace"), failure.status if failure else 1)
        raise SanlockFailed(f"take the lease of {lease.key}", code) from failure
    if failure is not None:
        raise failure
    return bytes(said)


def _told(reader: int) -> bool:
    """Whether the tool said that it begins. One that can't be killed may still hold the other end."""
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1) == BEGAN
    except BlockingIOError:
        return False
    finally:
        os.close(reader)
