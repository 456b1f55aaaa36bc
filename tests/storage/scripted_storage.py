"""Storage by itself with scripted hosts, and what tests ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from services.storage.service import make_service
from tests.storage.scripted_host import GIB, Shelf, StorageHost
from tests.support.runtime import running
from tests.support.scripted_agent import ScriptedAgent, scripted
from tests.support.service_process import ServiceProcess, service_process
from tests.support.stand_in import World, inventory
from volery.contracts.base import Owner
from volery.contracts.cluster import DataCenter, GetById
from volery.contracts.host import Host
from volery.contracts.operation import GET_OPERATION, GetOperation, Operation
from volery.contracts.storage import (
    CREATE_DISK,
    CREATE_STORAGE_DOMAIN,
    GET_DISK,
    GET_STORAGE_DOMAIN,
    CreateDisk,
    CreateStorageDomain,
    Disk,
    DomainKind,
    StorageDomain,
)
from volery.contracts.vm import Vm
from volery.runtime.bus import Bus, Caller
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings
from volery.runtime.service import Service


@dataclass
class Site:
    """A running storage service with its world."""

    bus: Bus
    world: World
    center: DataCenter
    shelf: Shelf
    hosts: list[StorageHost]
    rows: list[Host]
    settings: Settings

    async def ended(self, operation: Operation, seconds: float = 20.0) -> Operation:
        async with asyncio.timeout(seconds):
            while True:
                op = await self.bus.ask(GET_OPERATION[Owner.STORAGE], GetOperation(id=operation.id))
                if op.ended_at is not None:
                    return op
                await asyncio.sleep(0.01)

    async def done(self, operation: Operation) -> Operation:
        op = await self.ended(operation)
        assert op.state == "succeeded", op.problem
        return op

    async def refused(self, operation: Operation) -> str:
        op = await self.ended(operation)
        assert op.state == "failed", op
        assert op.problem is not None
        return op.problem.message

    async def domain(self, domain_id: str) -> StorageDomain:
        return await self.bus.ask(GET_STORAGE_DOMAIN, GetById(id=domain_id))

    async def disk(self, disk_id: str) -> Disk:
        return await self.bus.ask(GET_DISK, GetById(id=disk_id))

    async def new_domain(self, name: str = "data", **fields: Any) -> StorageDomain:
        fields = {"kind": DomainKind.DIRECTORY, "data_center_id": self.center.id} | fields
        if fields["kind"] is DomainKind.DIRECTORY:
            fields.setdefault("path", "/srv/data")
        op = await self.done(
            await self.bus.ask(CREATE_STORAGE_DOMAIN, CreateStorageDomain(name=name, **fields))
        )
        return await self.domain(op.object_id)

    async def new_disk(self, domain: StorageDomain, name: str = "d1", **fields: Any) -> Disk:
        ask = CreateDisk(name=name, storage_domain_id=domain.id, **({"size_bytes": GIB} | fields))
        return await self.disk((await self.done(await self.bus.ask(CREATE_DISK, ask))).object_id)

    async def heard_of(self, vm: Vm) -> None:
        """Until storage knows that the VM is as it is now."""
        async with open_direct(self.settings.database, Owner.STORAGE) as connection:

            async def heard() -> bool:
                return await connection.fetchval("select status from vm where id = $1", vm.id) == vm.status

            await self.until(heard)

    async def until(self, true: Any, seconds: float = 15.0) -> Any:
        """What the async `true` answers, once it is true. For what shows only by asking."""
        async with asyncio.timeout(seconds):
            while not (found := await true()):
                await asyncio.sleep(0.02)
            return found


def key(name: str) -> Caller:
    return Caller("user:1", name, "hash")


def storage_process(configured: Settings, **environment: str) -> AbstractAsyncContextManager[ServiceProcess]:
    return service_process("storage", configured, **environment)


@asynccontextmanager
async def site(
    configured: Settings, hosts: int = 2, service: Service | None = None, outside: bool = False
) -> AsyncIterator[Site]:
    """Storage and a stand-in for inventory, with a data center of so many hosts that are up.

    `outside`: storage runs elsewhere (see storage_process).
    """
    world, shelf = World(), Shelf()
    async with AsyncExitStack() as stack:
        inside = () if outside else (service or make_service(),)
        bus = await stack.enter_async_context(running(configured, *inside, inventory(world)))
        center = await world.data_center()
        made = []
        rows = []
        for number in range(hosts):
            scripted_agent = ScriptedAgent(configured.bus.servers, owners=("storage",))
            made.append(StorageHost(shelf, scripted_agent))
            await stack.enter_async_context(scripted(scripted_agent))
            rows.append(await world.host(center, scripted_agent.host_id, f"h{number + 1}"))
        found = Site(bus, world, center, shelf, made, rows, configured)
        for host in made:
            await host.agent.until_committed("storage", 30)
        await known(configured, [row.id for row in rows])
        yield found


async def known(configured: Settings, host_ids: list[str]) -> None:
    """Until storage has heard of these hosts."""
    async with open_direct(configured.database, Owner.STORAGE) as connection, asyncio.timeout(15):
        while True:
            found = {row["id"] for row in await connection.fetch("select id from host")}
            if found.issuperset(host_ids):
                return
            await asyncio.sleep(0.02)
