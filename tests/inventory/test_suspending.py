"""A suspended VM's memory is a file on one host: it goes on there, or its memory is given up; never from older memory."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.inventory.world import Machine, World, found_cluster, inventory_of, surroundings, until, world_of
from volery.contracts.base import Owner
from volery.contracts.domain_orders import DISCARD_MEMORY, RUN_DOMAIN, SAVE_DOMAIN, RunDomain
from volery.contracts.errors import Kind, Refused
from volery.contracts.operation import Operation, OperationState
from volery.contracts.vm import (
    START_VM,
    STOP_VM,
    SUSPEND_VM,
    RunOnce,
    StartVm,
    StopVm,
    SuspendVm,
    VmStatus,
)
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


async def done(world: World, op: Operation) -> None:
    ended = await world.ended(op)
    assert ended.state is OperationState.SUCCEEDED, ended.problem


async def suspend(world: World, vm_id: str) -> None:
    await done(world, await world.bus.ask(SUSPEND_VM, SuspendVm(id=vm_id)))
    await world.vm_is(vm_id, VmStatus.SUSPENDED)


def resumed(machine: Machine) -> list[str]:
    """From which memory this host started VMs, in that order; "" for none."""
    runs: list[RunDomain] = machine.agent.begun(RUN_DOMAIN.kind)
    return [run.restore_path for run in runs]


async def test_it_goes_on_where_its_memory_is(configured: Settings) -> None:
    """Another host may have a file of the same name, of an earlier suspension whose memory was given up: restored onto disks
    that have changed since it would ruin them."""
    async with world_of(configured) as (world, (first, second)):
        vm = await world.vm()
        await suspend(world, vm.id)
        await done(world, await world.bus.ask(STOP_VM, StopVm(id=vm.id)))
        await done(world, await world.bus.ask(START_VM, StartVm(id=vm.id, host_id=second.id)))
        await suspend(world, vm.id)
        plan = await world.bus.ask(START_VM, StartVm(id=vm.id, dry_run=True))
        assert plan.result["placement"]["host_id"] == second.id
        await done(world, await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == second.id
        assert resumed(first) == [""]
        before, memory = resumed(second)
        assert (before, memory.startswith(vm.id)) == ("", True)


async def test_another_host_is_refused_and_what_can_be_done_is_said(configured: Settings) -> None:
    async with world_of(configured) as (world, (first, second)):
        vm = await world.vm()
        await suspend(world, vm.id)
        with pytest.raises(Refused) as refused:
            await world.bus.ask(START_VM, StartVm(id=vm.id, host_id=second.id))
        assert refused.value.kind is Kind.CONFLICT
        assert refused.value.details["host_id"] == first.id
        assert "give its memory up" in refused.value.message
        world.scheduler.host_ids.remove(first.id)
        ended = await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert ended.state is OperationState.FAILED
        await world.vm_is(vm.id, VmStatus.SUSPENDED)
        assert resumed(second) == []
        # Its memory given up, it starts anywhere.
        await done(world, await world.bus.ask(STOP_VM, StopVm(id=vm.id)))
        await done(world, await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert resumed(second) == [""]


async def test_what_is_suspended_is_not_started_paused(configured: Settings) -> None:
    """libvirt would show it as it shows what waits for a migration: nobody could resume it, and its memory would be lost."""
    async with world_of(configured) as (world, (first, _)):
        vm = await world.vm()
        await suspend(world, vm.id)
        with pytest.raises(Refused, match="start it without `paused`") as refused:
            await world.bus.ask(START_VM, StartVm(id=vm.id, run_once=RunOnce(paused=True)))
        assert refused.value.kind is Kind.CONFLICT
        assert resumed(first) == [""]
        await done(world, await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert [path.startswith(vm.id) for path in resumed(first)] == [False, True]


async def test_where_its_memory_is_outlives_a_crash_in_the_last_step(configured: Settings) -> None:
    """The suspension was written, and not yet that its operation has ended."""
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(surroundings(configured))
        vms, operations = [
            await stack.enter_async_context(open_direct(configured.database, Owner.INVENTORY)) for _ in "12"
        ]

        async def somebody_waits() -> bool:
            return bool(await vms.fetchval("select count(*) from pg_locks where not granted"))

        async with inventory_of(world):
            await found_cluster(world)
            first, second = [await world.machine(name) for name in ("h1", "h2")]
            vm = await world.vm()
            saving = first.held[SAVE_DOMAIN.kind] = asyncio.Event()
            first.begun.clear()
            op = await world.bus.ask(SUSPEND_VM, SuspendVm(id=vm.id))
            await first.begun.wait()
            async with vms.transaction():
                await vms.execute("select 1 from vm where id = $1 for update", vm.id)
                saving.set()
                await until(somebody_waits, "the suspension is about to be written")
                held = operations.transaction()
                await held.start()
                await operations.execute("select 1 from operation where id = $1 for update", op.id)
            await until(somebody_waits, "it is written, and the operation about to end")
        await held.rollback()
        async with inventory_of(world):
            await done(world, op)
            await world.vm_is(vm.id, VmStatus.SUSPENDED)
            world.scheduler.host_ids.reverse()
            await done(world, await world.bus.ask(START_VM, StartVm(id=vm.id)))
            assert resumed(second) == []
            assert [bool(memory) for memory in resumed(first)] == [False, True]


async def test_memory_that_is_given_up_goes_from_its_host(configured: Settings) -> None:
    """Also when its host was away meanwhile; what the VM's next suspension saved stays."""
    async with world_of(configured) as (world, (first, second)):
        vm = await world.vm()
        await suspend(world, vm.id)
        assert len(first.memories) == 1
        await done(world, await world.bus.ask(STOP_VM, StopVm(id=vm.id)))
        await none_left(first)
        # A host that is away keeps it until it is back; the VM's next memory, on another host, stays.
        await done(world, await world.bus.ask(START_VM, StartVm(id=vm.id, host_id=first.id)))
        await suspend(world, vm.id)
        await first.agent.kill()
        await done(world, await world.bus.ask(STOP_VM, StopVm(id=vm.id)))
        await done(world, await world.bus.ask(START_VM, StartVm(id=vm.id, host_id=second.id)))
        await suspend(world, vm.id)
        assert (len(first.memories), len(second.memories)) == (1, 1)
        await first.agent.start()
        await none_left(first)
        assert len(second.memories) == 1


async def test_memory_that_went_on_goes_though_its_host_could_not_remove_it(configured: Settings) -> None:
    async with world_of(configured) as (world, (first, _)):
        vm = await world.vm()
        await suspend(world, vm.id)
        await done(world, await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert resumed(first)[-1]
        await none_left(first)


async def test_what_a_failed_suspension_leaves_goes_and_a_refusal_is_not_the_last_word(
    configured: Settings,
) -> None:
    async with world_of(configured) as (world, (first, _)):
        vm = await world.vm()
        first.memories.add("half a memory")
        first.refusals[SAVE_DOMAIN.kind] = Refused(Kind.EXHAUSTED, "no room")
        first.refusals[DISCARD_MEMORY.kind] = Refused(Kind.UNAVAILABLE, "its directory hangs")
        assert (await world.ended(await world.bus.ask(SUSPEND_VM, SuspendVm(id=vm.id)))).problem
        await world.vm_is(vm.id, VmStatus.UP)
        await until(lambda: asked_to_discard(first), "it is asked to")
        del first.refusals[DISCARD_MEMORY.kind]
        asked = len(first.agent.begun(DISCARD_MEMORY.kind))
        await first.agent.report("inventory")

        async def again() -> bool:
            return len(first.agent.begun(DISCARD_MEMORY.kind)) > asked

        await until(again, "it is asked again")
        paths = {ask.path for ask in first.agent.begun(DISCARD_MEMORY.kind)}
        assert len(paths) == 1


async def none_left(machine: Machine) -> None:
    async def none() -> bool:
        return not machine.memories

    await until(none, "the memory goes", seconds=60)


async def asked_to_discard(machine: Machine) -> bool:
    return bool(machine.agent.begun(DISCARD_MEMORY.kind))
