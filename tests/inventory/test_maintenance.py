"""A host goes into maintenance: its VMs leave it, and whoever can't is named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from services.inventory.service import service as inventory
from services.scheduler.service import service as scheduler
from tests.inventory.world import Machine, World, until, world_of
from tests.support.plane import (
    Agent,
    Plane,
    default_cluster,
    ended,
    enrolled_agent,
    plane_servers,
    running_plane,
    succeeded,
    until_host,
)
from volery.contracts.cluster import GetById
from volery.contracts.domain_orders import MIGRATE_DOMAIN, RUN_DOMAIN
from volery.contracts.host import GET_HOST, MAINTAIN_HOST, HostStatus, MaintainHost
from volery.contracts.operation import Operation, OperationState
from volery.contracts.vm import (
    CREATE_VM,
    GET_VM,
    MIGRATE_VM,
    START_VM,
    CreateVm,
    HighAvailability,
    MigrateVm,
    StartVm,
    Vm,
    VmStatus,
)
from volery.runtime.bus import Bus
from volery.runtime.programs import Settings

MIB = 1024 * 1024
PREPARING = HostStatus.PREPARING_FOR_MAINTENANCE


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        yield made


@pytest.fixture
async def at(plane: Plane) -> AsyncIterator[tuple[Bus, Agent, list[Vm]]]:
    """The only host of a cluster with five VMs."""
    async with running_plane(plane, inventory, scheduler) as bus:
        cluster = await default_cluster(bus)
        agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI="test:///default")
        agent.start()
        try:
            await until_host(bus, agent.host.id, HostStatus.UP)
            vms = []
            for number in range(5):
                ask = CreateVm(
                    name=f"vm{number}",
                    cluster_id=cluster.id,
                    memory_bytes=32 * MIB,
                    start=True,
                    high_availability=HighAvailability(enabled=number == 3, priority=number + 1),
                )
                made = await succeeded(bus, await bus.ask(CREATE_VM, ask))
                vms.append(await bus.ask(GET_VM, GetById(id=made.object_id)))
            yield bus, agent, vms
        finally:
            agent.stop()


async def test_vms_that_can_go_nowhere_are_named_and_the_host_stays_up(
    at: tuple[Bus, Agent, list[Vm]],
) -> None:
    bus, agent, vms = at
    plan = await bus.ask(MAINTAIN_HOST, MaintainHost(id=agent.host.id, dry_run=True))
    assert [fate["name"] for fate in plan.result["plan"]] == ["vm3", "vm4", "vm2", "vm1", "vm0"]
    assert all(not fate["host_id"] and fate["message"] for fate in plan.result["plan"])

    op = await ended(bus, await bus.ask(MAINTAIN_HOST, MaintainHost(id=agent.host.id)))
    assert op.state is OperationState.FAILED
    assert op.problem is not None
    assert all(f"{vm.name}: " in op.problem.message for vm in vms)
    host = await bus.ask(GET_HOST, GetById(id=agent.host.id))
    assert (host.status, host.busy_with) == (HostStatus.UP, "")
    for vm in vms:
        assert (await bus.ask(GET_VM, GetById(id=vm.id))).status is VmStatus.UP


async def test_with_stop_vms_they_are_shut_down_and_the_result_says_so(
    at: tuple[Bus, Agent, list[Vm]],
) -> None:
    bus, agent, vms = at
    op = await succeeded(bus, await bus.ask(MAINTAIN_HOST, MaintainHost(id=agent.host.id, stop_vms=True)))
    assert op.result == {"stopped": [vm.name for vm in vms]}
    assert op.progress == 100
    await until_host(bus, agent.host.id, HostStatus.MAINTENANCE)
    for vm in vms:
        assert (await bus.ask(GET_VM, GetById(id=vm.id))).status is VmStatus.DOWN


async def test_without_a_plan_vms_leave_one_after_the_other(configured: Settings) -> None:
    async with world_of(configured) as (world, (first, second)):
        plain, available = await world.vm(), await world.vm(ha=True)
        shown = await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id, dry_run=True))
        fates = [(fate["name"], fate["host_id"]) for fate in shown.result["plan"]]
        assert fates == [(available.name, second.id), (plain.name, second.id)]
        op = await world.ended(await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id)))
        assert (op.state, op.result) == (OperationState.SUCCEEDED, {"moved": sorted(("vm1", "vm2"))})
        assert world.scheduler.plans_asked == 2
        await world.host_is(first, HostStatus.MAINTENANCE)


@pytest.mark.parametrize("moves", [False, True], ids=["start", "move"])
async def test_who_is_on_its_way_to_a_host_arrives_and_leaves_again_before_it_is_empty(
    configured: Settings, moves: bool
) -> None:
    """Whoever switches a host off that is in maintenance must not meet a VM."""
    async with world_of(configured) as (world, (first, second)):
        vm, coming, gate = await _comes(world, first, second, moves)
        machine, kind = (second, MIGRATE_DOMAIN.kind) if moves else (first, RUN_DOMAIN.kind)
        machine.held[kind] = gate
        machine.begun.clear()
        begun = await coming()
        await machine.begun.wait()
        world.scheduler.host_ids.reverse()
        op = await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id))
        await asyncio.sleep(0.5)
        assert (await world.bus.ask(GET_HOST, GetById(id=first.id))).status is PREPARING
        gate.set()
        assert (await world.ended(begun)).problem is None
        op = await world.ended(op)
        assert (op.state, op.result) == (OperationState.SUCCEEDED, {"moved": [vm.name]})
        assert ((await world.get(vm.id)).host_id, first.domains) == (second.id, {})
        await world.host_is(first, HostStatus.MAINTENANCE)


@pytest.mark.parametrize("moves", [False, True], ids=["start", "move"])
async def test_who_chose_a_host_that_went_into_maintenance_since_goes_elsewhere(
    configured: Settings, moves: bool
) -> None:
    async with world_of(configured) as (world, (first, second)):
        vm, coming, _ = await _comes(world, first, second, moves)
        world.scheduler.asked.clear()
        world.scheduler.may_place.clear()
        begun = await coming()

        async def chooses() -> bool:
            return bool(world.scheduler.asked)

        await until(chooses)
        assert (
            await world.ended(await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id)))
        ).problem is None
        world.scheduler.may_place.set()
        op = await world.ended(begun)
        assert ((await world.get(vm.id)).host_id, first.domains) == (second.id, {})
        if moves:
            assert op.problem is not None
            assert "the destination goes into maintenance" in op.problem.message
        else:
            assert op.state is OperationState.SUCCEEDED


async def _comes(
    world: World, first: Machine, second: Machine, moves: bool
) -> tuple[Vm, Callable[[], Awaitable[Operation]], asyncio.Event]:
    """A VM, and what has it start on the first host, or move there from the second."""
    vm = await world.vm(start=False)
    if not moves:
        return vm, lambda: world.bus.ask(START_VM, StartVm(id=vm.id)), asyncio.Event()
    world.scheduler.host_ids = [second.id, first.id]
    assert (await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))).problem is None
    world.scheduler.host_ids = [first.id, second.id]
    return vm, lambda: world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id)), asyncio.Event()
