"""A living host that has lost storage: non-operational with its name, its highly available VMs moved, up again by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from services.inventory import dead_parts
from services.inventory.service import service as inventory
from tests.inventory.world import Machine, World, found_cluster, surroundings, until, world_of
from tests.support.runtime import running
from tests.support.service_process import captured
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import MIGRATE_DOMAIN
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import GET_HOST, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.network import LIST_NETWORKS, NETWORK_CHANGED, Network
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import LIST_OPERATIONS, ListQuery, Operation, OperationState
from volery.contracts.storage import (
    LIST_STORAGE_DOMAINS,
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
        super().__init__(Owner.STORAGE, lists=[(LIST_STORAGE_DOMAINS, StorageDomain)])
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


class Networks(Speaker):
    """A network service that says which hosts have lost its one network."""

    def __init__(self) -> None:
        super().__init__(Owner.NETWORK, lists=[(LIST_NETWORKS, Network)])
        now = datetime.now(UTC)
        self.network = Network(
            id=new_id(),
            revision=1,
            created_at=now,
            updated_at=now,
            name="office",
            data_center_id=new_id(),
            kind=NetworkKind.BRIDGE,
            required=True,
        )

    async def lost(self, *machines: Machine) -> None:
        lost = dict.fromkeys((machine.id for machine in machines), "eth1 has no link")
        self.network = replace(self.network, revision=self.network.revision + 1, lost=lost)
        await self.says(NETWORK_CHANGED, self.network)


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


async def test_a_host_that_lost_two_things_is_up_when_it_has_both_back(configured: Settings) -> None:
    storage, networks = Storage(), Networks()
    async with world_of(configured, storage.service(), networks.service()) as (world, (here, there)):
        saved = await world.vm(ha=True)
        await networks.lost(here)
        host = await world.host_is(here, HostStatus.NON_OPERATIONAL)
        assert host.reasons == ("network_missing",)
        assert host.problems[0].message == (
            "host h1 has lost network office, which other hosts of its cluster have: eth1 has no link"
        )

        async def moved() -> bool:
            return (await world.get(saved.id)).host_id == there.id

        await until(moved)
        await storage.lost(here)

        async def reasons(*wanted: str) -> None:
            async def shown() -> bool:
                return (await world.bus.ask(GET_HOST, GetById(id=here.id))).reasons == wanted

            await until(shown)

        await reasons("network_missing", "storage_unreachable")
        await networks.lost()
        await reasons("storage_unreachable")
        assert (await world.host_is(here, HostStatus.NON_OPERATIONAL)).problems[0].object_name == "data"
        await storage.lost()
        await world.host_is(here, HostStatus.UP)


async def test_what_was_missed_is_taken_from_the_list(configured: Settings) -> None:
    """Facts that are lost for good: the list has the last word, also on what isn't in it any more."""
    storage, networks, found = Storage(), Networks(), list[Any]()
    beside = storage.service(), networks.service()
    async with surroundings(configured, *beside) as world, running(configured, captured(inventory, found)):
        await found_cluster(world)
        here, there = [await world.machine(name) for name in ("h1", "h2")]
        await networks.lost(here)
        await world.host_is(here, HostStatus.NON_OPERATIONAL)
        networks.objects.clear()
        storage.knows(replace(storage.domain, lost={there.id: WHY}))
        for stream in ("FACTS_STORAGE", "FACTS_NETWORK", "FACTS_HA"):
            await dead_parts.list_again(found[0], stream)
        assert (await world.host_is(there, HostStatus.NON_OPERATIONAL)).problems[0].object_name == "data"
        assert (await world.host_is(here, HostStatus.UP)).problems == ()


async def test_what_a_host_lost_is_no_matter_once_it_is_deleted(configured: Settings) -> None:
    async with stage(configured) as (world, (here, there), storage):
        await storage.lost(here, there)
        await world.host_is(there, HostStatus.NON_OPERATIONAL)
        await storage.says(STORAGE_DOMAIN_DELETED, replace(storage.domain, revision=99))
        for machine in (here, there):
            assert (await world.host_is(machine, HostStatus.UP)).problems == ()
