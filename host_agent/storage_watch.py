"""Reads a little of each connected storage domain all the time, and says when it can't any more, or can again.

Each read is a child process with a deadline, so a storage that hangs stalls nothing here: not the beats, not the other
domains' reads, not the orders. A child that can't be killed keeps its lock, and the next read says so at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from host_agent import children, files, iscsi, places
from host_agent.action import Host
from host_agent.children import ChildFailed, ChildTimedOut
from host_agent.config import AgentConfig
from host_agent.places import ConnectedDomain
from volery.contracts.errors import Refused
from volery.contracts.volume_orders import DirectoryLocation, IscsiLocation
from volery.runtime.tasks import end

log = logging.getLogger(__name__)

BLOCK_BYTES = 4096
NO_DIRECT_IO = "Invalid argument"
"""What dd says on a file system that has none, such as an older kernel's tmpfs, which is local."""

Tell = Callable[[str, str], Awaitable[None]]
"""(domain, why it can't be read; "" when it can) → told."""


@dataclass(slots=True)
class Watch:
    """What was said of each domain last, and what reads it now."""

    host: Host
    tell: Tell
    said: dict[str, str] = field(default_factory=dict)
    reading: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    luns: dict[str, int] = field(default_factory=dict)
    """iSCSI domain → the LUN that is asked, one of those that were there."""

    async def run(self) -> None:
        """For as long as the agent lives."""
        try:
            while True:
                self._begin()
                await asyncio.sleep(self.host.config.storage_check_seconds)
        finally:
            await end(list(self.reading.values()))

    def _begin(self) -> None:
        """One read of each domain, unless its former one is still at it."""
        domains = places.connected(self.host.config)
        for gone in sorted(self.said.keys() - {domain.domain_id for domain in domains}):
            del self.said[gone]
        for domain in domains:
            if domain.domain_id not in self.reading:
                task = asyncio.create_task(self._look(domain))
                self.reading[domain.domain_id] = task
                task.add_done_callback(partial(self._ended, domain.domain_id))

    def _ended(self, domain_id: str, task: asyncio.Task[None]) -> None:
        del self.reading[domain_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the read of storage domain %s broke", domain_id, exc_info=error)

    async def _look(self, domain: ConnectedDomain) -> None:
        """A domain counts as readable until it was found not to be: it was connected, or it would not be here."""
        problem = await self.problem(domain)
        if bool(problem) == bool(self.said.get(domain.domain_id, "")):
            return
        if problem:
            log.warning("storage domain %s: %s", domain.domain_id, problem)
        else:
            log.info("storage domain %s can be read again", domain.domain_id)
        self.said[domain.domain_id] = problem
        await self.tell(domain.domain_id, problem)

    async def problem(self, domain: ConnectedDomain) -> str:
        """Why the domain can't be read now, as a sentence; "" when it can."""
        try:
            if isinstance(domain.location, DirectoryLocation):
                await read_directory(self.host.config, domain, domain.location)
            else:
                await self._read_target(domain.domain_id, domain.location)
        except Refused as refused:
            return refused.message
        except ChildFailed as failure:
            return f"it can't be read: {failure.reason}"
        return ""

    async def _read_target(self, domain_id: str, location: IscsiLocation) -> None:
        """Asks one LUN for its size; when that fails, the target for its LUNs, since a LUN may just have been removed."""
        seconds = self.host.config.storage_check_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                if (lun := self.luns.get(domain_id)) is not None:
                    with contextlib.suppress(Refused):
                        await iscsi.size(iscsi.source(location, lun))
                        return
                sizes = await iscsi.lun_sizes(location)
        except TimeoutError:
            raise ChildTimedOut("iscsi-ls", seconds) from None
        if sizes:
            self.luns[domain_id] = sizes[0][0]


async def read_directory(config: AgentConfig, domain: ConnectedDomain, where: DirectoryLocation) -> None:
    """Reads the domain's marker past every cache. Raises Refused, ChildFailed."""
    async with children.held(
        Path(config.state_dir) / "locks" / f"check-{domain.domain_id}",
        wait_seconds=0.0,
        otherwise=f"{where.path} hangs: a former read of it has not come back",
    ) as lock:
        marker = os.path.join(domain.root, files.MARKER)
        try:
            await _dd(config, marker, lock, "iflag=direct")
        except ChildFailed as failure:
            if NO_DIRECT_IO not in failure.reason:
                raise
            await _dd(config, marker, lock)


async def _dd(config: AgentConfig, path: str, lock: int, *flags: str) -> None:
    await children.run(
        ["dd", f"if={path}", f"bs={BLOCK_BYTES}", "count=1", "status=none", *flags],
        timeout_seconds=config.storage_check_timeout_seconds,
        pass_fds=(lock,),
    )


async def watch(host: Host, tell: Tell) -> None:
    """Reads every connected domain, for as long as the agent lives."""
    await Watch(host, tell).run()
