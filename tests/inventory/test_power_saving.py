"""What inventory makes of what ha says, or fails to say, about a host's power; ha is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.inventory.scripted_scheduler import Scheduler
from tests.inventory.world import Machine, World, found_cluster, inventory_of, until
from tests.support.bell import Bell
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.cluster import UPGRADE_CLUSTER, GetById, UpgradeCluster
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import PowerState
from volery.contracts.host import (
    GET_HOST,
    SAVE_POWER,
    WAKE_HOST,
    Host,
    HostStatus,
    PowerSaving,
    SavePower,
    WakeHost,
)
from volery.contracts.operation import GET_OPERATION, GetOperation, Operation, OperationState
from volery.contracts.power import POWER_DOWN, POWER_UP, OrderPower, PowerOrdered
from volery.contracts.vm import MIGRATE_VM, START_VM, MigrateVm, StartVm
from volery.runtime.bus import Caller
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


@dataclass
class Switch(Bell):
    """An ha that says one thing after the other of a host's power; the last again and again."""

    down: list[PowerState | Kind] = field(default_factory=lambda: [PowerState.OFF])
    up: list[PowerState | Kind] = field(default_factory=lambda: [PowerState.ON])
    ordered: list[OrderPower] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.answers = [*self.answers, (POWER_DOWN, self._down), (POWER_UP, self._up)]

    async def _down(self, _: Speaker, ask: OrderPower, caller: Caller) -> PowerOrdered:
        return PowerOrdered(id=ask.id, state=PowerState.UNKNOWN) if ask.dry_run else self._say(ask, self.down)

    async def _up(self, _: Speaker, ask: OrderPower, caller: Caller) -> PowerOrdered:
        return self._say(ask, self.up)

    def _say(self, ask: OrderPower, said: list[PowerState | Kind]) -> PowerOrdered:
        self.ordered.append(ask)
        word = said.pop(0) if len(said) > 1 else said[0]
        if isinstance(word, Kind):
            raise Refused(word, "its BMC stutters")
        return PowerOrdered(id=ask.id, state=word, was=PowerState.UNKNOWN)


@asynccontextmanager
async def switched(
    configured: Settings, **more: str
) -> AsyncIterator[tuple[World, Switch, Machine, Machine]]:
    settings = replace(configured, environ=more)
    scheduler, ha = Scheduler(), Switch()
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(running(settings, scheduler.service(), ha.service()))
        world = World(bus, settings, scheduler, ha)
        await stack.enter_async_context(inventory_of(world))
        await found_cluster(world)
        try:
            yield world, ha, await world.machine("h1"), await world.machine("h2")
        finally:
            for machine in world.machines.values():
                await machine.agent.kill()


async def saved(world: World, machine: Machine, **fields: Any) -> Operation:
    return await world.ended(await world.bus.ask(SAVE_POWER, SavePower(id=machine.id, **fields)))


async def host_of(world: World, machine: Machine) -> Host:
    return await world.bus.ask(GET_HOST, GetById(id=machine.id))


@pytest.mark.parametrize("kind", [Kind.INTERNAL, Kind.UNAVAILABLE, Kind.TIMEOUT, Kind.EXHAUSTED])
async def test_an_answer_that_leaves_open_what_was_done_is_asked_for_again(
    configured: Settings, kind: Kind
) -> None:
    """Under the same revision: until it is certain the host is not taken for awake."""
    async with switched(configured) as (world, ha, first, _):
        ha.down = [kind, PowerState.OFF]
        op = await saved(world, first)
        assert op.state is OperationState.SUCCEEDED, op.problem
        assert len({(ask.revision, ask.boot_id) for ask in ha.ordered}) == 1
        assert len(ha.ordered) == 2
        assert (await host_of(world, first)).power_saving is PowerSaving.ASLEEP


async def test_a_cluster_isnt_upgraded_while_one_of_its_hosts_sleeps(configured: Settings) -> None:
    async with switched(configured) as (world, _, first, _):
        assert world.cluster is not None
        assert (await saved(world, first)).state is OperationState.SUCCEEDED
        with pytest.raises(Refused) as refused:
            await world.bus.ask(UPGRADE_CLUSTER, UpgradeCluster(id=world.cluster.id))
        assert "host h1 sleeps to save power: wake it first" in refused.value.message


async def test_what_was_not_begun_leaves_it_up_and_what_is_never_certain_leaves_it_asleep(
    configured: Settings,
) -> None:
    async with switched(configured, VOLERY_INVENTORY_POWER_SECONDS="3") as (world, ha, first, second):
        ha.down = [Kind.CONFLICT]
        op = await saved(world, first)
        assert op.state is OperationState.FAILED
        host = await host_of(world, first)
        assert (host.power_saving, host.status, host.busy_with) == (PowerSaving.AWAKE, HostStatus.UP, "")
        ha.down = [Kind.INTERNAL]
        op = await saved(world, second)
        assert op.state is OperationState.FAILED
        host = await host_of(world, second)
        assert (host.power_saving, host.status) == (PowerSaving.ASLEEP, HostStatus.MAINTENANCE)
        op = await world.ended(await world.bus.ask(WAKE_HOST, WakeHost(id=second.id)))
        assert op.state is OperationState.SUCCEEDED, op.problem
        assert (await host_of(world, second)).power_saving is PowerSaving.AWAKE
        assert ha.ordered[-1].revision > ha.ordered[-2].revision


async def test_it_is_asked_to_sleep_only_where_it_is_empty_if_so_wished(configured: Settings) -> None:
    async with switched(configured) as (world, ha, first, second):
        vm = await world.vm()
        assert vm.host_id == first.id
        with pytest.raises(Refused) as refused:
            await world.bus.ask(SAVE_POWER, SavePower(id=first.id, empty_only=True))
        assert refused.value.details["vm_ids"] == [vm.id]
        assert (await saved(world, second, empty_only=True)).state is OperationState.SUCCEEDED
        assert [ask.id for ask in ha.ordered] == [second.id]
        # The scheduler of this test would still take it: inventory passes it over.
        world.scheduler.host_ids = [second.id, first.id]
        other = await world.vm()
        assert other.host_id == first.id
        assert not second.domains


async def test_a_host_that_copies_a_disk_is_not_cut_off_in_the_middle(configured: Settings) -> None:
    async with switched(configured, VOLERY_INVENTORY_POWER_SECONDS="3") as (world, ha, first, second):
        first.storage_work = ("volume.copy",)
        op = await saved(world, first)
        assert op.state is OperationState.FAILED
        assert op.problem is not None
        assert "h1 stays up, since it is at work for storage (volume.copy)" in op.problem.message
        assert ha.ordered == []
        host = await host_of(world, first)
        assert (host.power_saving, host.status) == (PowerSaving.AWAKE, HostStatus.UP)

        second.storage_work = ("volume.copy",)
        begun = await world.bus.ask(SAVE_POWER, SavePower(id=second.id))

        async def looks() -> bool:
            now = await world.bus.ask(GET_OPERATION[Owner.INVENTORY], GetOperation(id=begun.id))
            return any(step.title == "Making sure that nothing runs there" for step in now.steps)

        await until(looks)
        second.storage_work = ()
        op = await world.ended(begun)
        assert op.state is OperationState.SUCCEEDED, op.problem


@pytest.mark.parametrize("moves", [False, True], ids=["start", "move"])
async def test_who_chose_a_host_before_it_falls_asleep_isnt_switched_off_with_it(
    configured: Settings, moves: bool
) -> None:
    """That a VM comes there is being written, and not committed yet, when the host is told to sleep: either the sleep waits for
    it, or the VM goes elsewhere. It is the lock on the host's row that sees to that, not the look at it before."""
    async with switched(configured) as (world, ha, first, second):
        vm = await world.vm(start=False)
        if moves:
            world.scheduler.host_ids = [second.id, first.id]
            await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
            world.scheduler.host_ids = [first.id, second.id]
        async with open_direct(configured.database, Owner.INVENTORY) as tables:

            async def waiters() -> int:
                sql = "select count(distinct pid) from pg_locks where not granted"
                return int(await tables.fetchval(sql))

            async def chooses() -> bool:
                return bool(world.scheduler.asked)

            async def sleeps_or_waits() -> bool:
                return bool(ha.ordered) or await waiters() > 1

            world.scheduler.asked.clear()
            world.scheduler.may_place.clear()
            if moves:
                coming = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id))
            else:
                coming = await world.bus.ask(START_VM, StartVm(id=vm.id))
            await until(chooses, "a host is being chosen")
            async with tables.transaction():
                await tables.execute("select 1 from placement where vm_id = $1 for update", vm.id)
                world.scheduler.may_place.set()
                await until(waiters, "that the VM comes there is about to be written")
                saving = asyncio.create_task(saved(world, first))
                await until(sleeps_or_waits, "the host is off, or its sleep waits for the VM")
            op = await saving
        ended = await world.ended(coming)
        assert not (ha.ordered and first.domains), "a VM runs on a host that is off"
        if ha.ordered:
            assert (op.problem, (await world.get(vm.id)).host_id) == (None, second.id)
        else:
            assert op.problem is not None
            assert "host h1 is not empty: VMs vm1 run there, or may" in op.problem.message
            assert (ended.problem, (await world.get(vm.id)).host_id) == (None, first.id)
            assert (await host_of(world, first)).power_saving is PowerSaving.AWAKE
