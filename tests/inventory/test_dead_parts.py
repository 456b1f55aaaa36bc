"""A living host that has lost storage: non-operational with its name, its highly available VMs moved, up again by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import msgspec
from msgspec.structs import replace

from tests.inventory.world import Machine, World, until, world_of
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import MIGRATE_DOMAIN
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HostStatus
from volery.contracts.ids import new_id
from volery.contracts.operation import LIST_OPERATIONS, ListQuery, Operation, OperationState
from volery.contracts.storage import (
    STORAGE_DOMAIN_CHANGED,
    STORAGE_DOMAIN_DELETED,
    DomainKind,
    DomainStatus,
    StorageDomain,
)
from volery.contracts.vm import VmStatus
from volery.runtime.bus import Bus
from volery.runtime.programs import Settings

WHY = "/srv/data hangs"


class Storage(Speaker):
    """A storage service that says which hosts have lost its one domain."""

    def __init__(self) -> None:
        super().__init__(Owner.STORAGE)
        now = datetime.now(UTC)
        self.domain = StorageDomain(
            id=new_id(),
            revision=1,
            created_at=now,
            updated_at=now,
            name="data",
            kind=DomainKind.DIRECTORY,
            status=DomainStatus.ACTIVE,
        )

    async def lost(self, *machines: Machine) -> None:
        lost = {machine.id: WHY for machine in machines}
        self.domain = replace(self.domain, revision=self.domain.revision + 1, lost=lost)
        await self.says(STORAGE_DOMAIN_CHANGED, self.domain)


@asynccontextmanager
async def stage(configured: Settings) -> AsyncIterator[tuple[World, list[Machine], Storage]]:
    storage = Storage()
    quick = dataclasses.replace(configured, environ={"VOLERY_INVENTORY_EVACUATE_AGAIN_SECONDS": "1"})
    async with world_of(quick, storage.service()) as (world, machines):
        yield world, machines, storage


async def evacuations(bus: Bus) -> list[Operation]:
    page = await bus.ask(LIST_OPERATIONS[Owner.INVENTORY], ListQuery(filter={"kind": "host.evacuate"}))
    return [msgspec.json.decode(raw, type=Operation) for raw in page.items]


async def test_its_highly_available_vms_leave_and_it_comes_back_by_itself(configured: Settings) -> None:
    async with stage(configured) as (world, (here, there), storage):
        saved, other = await world.vm(ha=True), await world.vm()
        await storage.lost(here)
        host = await world.host_is(here, HostStatus.NON_OPERATIONAL)
        assert host.reasons == ("storage_unreachable",)
        (problem,) = host.problems
        assert (problem.object_kind, problem.object_id) == ("storage_domain", storage.domain.id)
        assert (
            problem.message
            == f"host h1 has lost storage domain data, which other hosts of its cluster have: {WHY}"
        )

        async def moved() -> bool:
            return (await world.vm_is(saved.id, VmStatus.UP)).host_id == there.id

        await until(moved)

        async def ended() -> Operation | None:
            found = await evacuations(world.bus)
            return found[0] if found and found[0].state is OperationState.SUCCEEDED else None

        op = await until(ended)
        assert (op.object_id, op.result) == (here.id, {"moved": [saved.name]})
        assert (await world.vm_is(other.id, VmStatus.UP)).host_id == here.id
        await here.agent.report("inventory")
        await storage.lost()
        host = await world.host_is(here, HostStatus.UP)
        assert (host.reasons, host.problems) == ((), ())
        assert (await world.vm_is(saved.id, VmStatus.UP)).host_id == there.id
        assert len(await evacuations(world.bus)) == 1


async def test_one_that_cannot_leave_is_named_and_left_until_its_host_says_it_ended(
    configured: Settings,
) -> None:
    async with stage(configured) as (world, (here, there), storage):
        stuck = await world.vm(ha=True)
        here.refusals[MIGRATE_DOMAIN.kind] = Refused(Kind.CONFLICT, "cannot migrate domain with I/O error")
        await storage.lost(here)

        async def failed() -> Operation | None:
            found = [op for op in await evacuations(world.bus) if op.state is OperationState.FAILED]
            return found[0] if found else None

        op = await until(failed)
        assert op.problem is not None
        assert f"{stuck.name}: cannot migrate domain with I/O error" in op.problem.message
        vm = await world.vm_is(stuck.id, VmStatus.UP)
        assert vm.host_id == here.id
        assert not there.domains, "it runs once"
        del here.refusals[MIGRATE_DOMAIN.kind]

        async def moved() -> bool:
            return (await world.get(stuck.id)).host_id == there.id

        await until(moved)  # tried again after a while
        vm = await world.vm_is(stuck.id, VmStatus.UP)
        assert list(there.domains) == [vm.id]
        assert there.domains[vm.id].state is DomainState.RUNNING
        assert not here.domains


async def test_what_a_host_lost_is_no_matter_once_it_is_deleted(configured: Settings) -> None:
    async with stage(configured) as (world, (here, there), storage):
        await storage.lost(here, there)
        await world.host_is(there, HostStatus.NON_OPERATIONAL)
        await storage.says(STORAGE_DOMAIN_DELETED, replace(storage.domain, revision=99))
        for machine in (here, there):
            assert (await world.host_is(machine, HostStatus.UP)).problems == ()
