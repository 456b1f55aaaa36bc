"""A host's leases in a lockspace of its own storage domain, under a real sanlock daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from host_agent import leased, leases, storage
from host_agent.action import Host
from tests.support.agent_host import make_host, running
from volery.contracts.domain import DomainLease
from volery.contracts.ids import new_id
from volery.contracts.leases import (
    CreateLease,
    DeleteLease,
    JoinLockspace,
    LeaveLockspace,
    LockspaceReport,
    ReportLeases,
)
from volery.contracts.volume_orders import ConnectStorage, DirectoryLocation

NAME = "a-host"


@contextlib.contextmanager
def sanlock_daemon(directory: Path) -> Iterator[None]:
    """A sanlock of our own, without privileges or watchdog; programs find it by its directory in the environment."""
    before = dict(os.environ)
    os.environ |= {"SANLOCK_RUN_DIR": str(directory), "SANLOCK_PRIVILEGED": "0"}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(["sanlock", "daemon", "-D", "-w", "0", "-e", NAME], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()
        os.environ.clear()
        os.environ.update(before)


class Joined:
    def __init__(self, host: Host, directory: Path, domain_id: str) -> None:
        self.host = host
        self.domain_id = domain_id
        self.directory = directory / domain_id / "leases"

    @property
    def leaving(self) -> LeaveLockspace:
        return LeaveLockspace(domain_id=self.domain_id, path=str(self.directory / "lockspace"))

    async def join(
        self, number: int = 7, *, initialise: bool = True, reset_host: bool = False
    ) -> LockspaceReport:
        order = JoinLockspace(
            domain_id=self.domain_id,
            path=str(self.directory / "lockspace"),
            host_number=number,
            io_timeout_seconds=1,
            reset_host=reset_host,
            initialise=initialise,
        )
        return await leases.join(self.host, order, running())

    async def lease(self) -> DomainLease:
        key = new_id()
        order = CreateLease(domain_id=self.domain_id, key=key, path=str(self.directory / key))
        await leases.create(self.host, order, running())
        await leases.create(self.host, order, running())  # a repeat changes nothing
        return DomainLease(lockspace=self.domain_id, key=key, path=str(self.directory / key))

    async def held(self) -> list[str]:
        said = await leases.report(self.host, ReportLeases(), running())
        return [one.key for one in said.held if one.lockspace == self.domain_id]

    def deleting(self, lease: DomainLease) -> DeleteLease:
        return DeleteLease(domain_id=self.domain_id, key=lease.key, path=lease.path)

    @classmethod
    async def at(cls, path: Path) -> Joined:
        """A host with a storage domain there. It has not joined yet: that takes sanlock three seconds."""
        made = cls(make_host(path / "state"), path, new_id())
        location = DirectoryLocation(path=str(path))
        order = ConnectStorage(domain_id=made.domain_id, location=location, initialise=True)
        await storage.connect(made.host, order, running())
        return made


@contextlib.asynccontextmanager
async def holding(world: Joined, lease: DomainLease) -> AsyncIterator[asyncio.Task[bytes]]:
    """A tool that holds the lease until it is ended."""
    begun = asyncio.Event()
    script = ["sh", "-c", "echo begun; exec sleep 1000"]
    tool = asyncio.create_task(
        leased.run(lease, script, timeout_seconds=120, on_output=lambda piece: begun.set())
    )
    waiting = asyncio.create_task(begun.wait())
    await asyncio.wait({waiting, tool}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        assert lease.key in await world.held()
        yield tool
    finally:
        tool.cancel()
        await asyncio.wait({tool})
