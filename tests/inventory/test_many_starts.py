"""Many VMs are started in one call: what becomes of each, whoever crashes, cancels or changes something meanwhile."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.inventory.world import (
    Machine,
    World,
    found_cluster,
    inventory_of,
    surroundings,
    until,
    world_of,
)
from volery.contracts.base import Owner
from volery.contracts.domain_orders import RUN_DOMAIN
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import CANCEL_OPERATION, CancelOperation, Operation, OperationState
from volery.contracts.scheduling import ClaimKey
from volery.contracts.vm import (
    ACT_ON_VM,
    START_VM,
    SUSPEND_VM,
    UPDATE_VM,
    ActOnVm,
    StartVm,
    SuspendVm,
    UpdateVm,
    Vm,
    VmAction,
    VmStatus,
)
from volery.contracts.vm_starts import START_VMS, Became, StartVms, VmStart
from volery.runtime.bus import Caller
from volery.runtime.programs import Settings


async def vms_of(world: World, count: int) -> list[Vm]:
    made = []
    for _ in range(count):
        op = await world.ended(await world.create(start=False))
        made.append(await world.get(op.object_id))
    return made


async def start(world: World, *vms: Vm, who: Caller | None = None, **fields: Any) -> Operation:
    question = StartVms(vm_ids=tuple(vm.id for vm in vms), **fields)
    return await world.bus.ask(START_VMS, question, who or Caller("user:ann", new_id(), "x"))


def became(op: Operation) -> list[Became]:
    return [each.became for each in starts(op)]


def starts(op: Operation) -> list[VmStart]:
    return msgspec.convert(op.result["vms"], list[VmStart])


async def test_each_starts_under_the_epoch_that_its_place_was_claimed_for(configured: Settings) -> None:
    async with world_of(configured) as (world, _):
        vms = await vms_of(world, 3)
        already = await world.vm()
        op = await world.ended(await start(world, *vms, already))
        assert op.state is OperationState.SUCCEEDED, op.problem
        assert became(op) == [Became.STARTED] * 3 + [Became.RUNNING]
        assert op.progress == 100.0
        (many,) = world.scheduler.many
        assert [(each.need.vm_id, each.epoch) for each in many.places] == [(vm.id, 1) for vm in vms]
        own = {ask.need.vm_id: ask for ask in world.scheduler.asked if ask.operation_id}
        for vm in vms:
            assert own[vm.id].epoch == 1
            now = await world.vm_is(vm.id, VmStatus.UP)
            assert (now.epoch, now.busy_with) == (1, "")
        assert world.scheduler.given_back == []


async def test_who_has_no_place_is_not_touched_and_the_others_start(configured: Settings) -> None:
    async with world_of(configured) as (world, _):
        vms = await vms_of(world, 3)
        world.scheduler.nowhere.add(vms[1].id)
        op = await world.ended(await start(world, *vms))
        assert op.state is OperationState.FAILED
        assert op.problem is not None
        assert op.problem.message == "2 of 3 VMs run, 1 don't. vm2: no host is left"
        assert became(op) == [Became.STARTED, Became.REFUSED, Became.STARTED]
        assert await world.get(vms[1].id) == vms[1]
        tried = await start(world, vms[1], dry_run=True)
        assert (tried.id, became(tried)) == ("", [Became.REFUSED])


async def test_who_rests_and_can_not_be_started_is_named_to_the_scheduler(configured: Settings) -> None:
    """A suspended VM's memory is on one host; what runs, or is being started, is on its way to a place."""
    async with world_of(configured) as (world, (first, second)):
        suspended, rests = await world.vm(), (await vms_of(world, 1))[0]
        await world.ended(await world.bus.ask(SUSPEND_VM, SuspendVm(id=suspended.id)))
        paused = await world.vm()
        await world.ended(await world.bus.ask(ACT_ON_VM, ActOnVm(id=paused.id, action=VmAction.PAUSE)))
        op = await world.ended(await start(world, suspended, rests, paused, host_id=second.id))
        assert became(op) == [Became.REFUSED, Became.STARTED, Became.REFUSED]
        (many,) = world.scheduler.many
        assert list(many.absent) == [suspended.id]
        assert f"its memory is on host {first.id}" in many.absent[suspended.id]


async def test_a_start_that_fails_is_told_with_its_reason(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vms = await vms_of(world, 2)
        host.refusals[RUN_DOMAIN.kind] = Refused(Kind.INVALID, "its QEMU is too old")
        op = await world.ended(await start(world, *vms))
        assert op.state is OperationState.FAILED
        assert became(op) == [Became.FAILED] * 2
        assert all("its QEMU is too old" in each.message for each in starts(op))
        for vm in vms:
            await world.vm_is(vm.id, VmStatus.DOWN)


async def test_a_vm_that_is_changed_after_its_place_was_chosen_is_refused_and_its_claim_given_back(
    configured: Settings,
) -> None:
    async with world_of(configured) as (world, _):
        vms = await vms_of(world, 2)
        world.scheduler.may_place.clear()
        op = await start(world, *vms)
        await world.scheduler.many_asked.wait()
        await world.bus.ask(
            UPDATE_VM, UpdateVm(id=vms[0].id, memory_bytes=vms[0].memory_bytes * 2), Caller("user:bob")
        )
        world.scheduler.may_place.set()
        ended = await world.ended(op)
        assert became(ended) == [Became.REFUSED, Became.STARTED]
        assert world.scheduler.given_back == [ClaimKey(vm_id=vms[0].id, epoch=1)]
        assert (await world.get(vms[0].id)).status is VmStatus.DOWN


async def test_a_vm_that_somebody_else_starts_meanwhile_keeps_its_claim(configured: Settings) -> None:
    """Both starts ask under the same epoch, so one claim is there, which is the other's now."""
    async with world_of(configured, hosts=1) as (world, _):
        (vm,) = await vms_of(world, 1)
        world.scheduler.may_place.clear()
        op = await start(world, vm)
        await world.scheduler.many_asked.wait()
        other = await world.bus.ask(START_VM, StartVm(id=vm.id), Caller("user:bob", new_id(), "x"))
        world.scheduler.may_place.set()
        assert became(await world.ended(op)) == [Became.REFUSED]
        assert (await world.ended(other)).state is OperationState.SUCCEEDED
        assert world.scheduler.given_back == []
        await world.vm_is(vm.id, VmStatus.UP)


@pytest.mark.parametrize("when", ["hosts are chosen", "they start"])
async def test_cancelling_leaves_nothing_behind(configured: Settings, when: str) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vms = await vms_of(world, 3)
        gate = world.scheduler.may_place
        if when == "hosts are chosen":
            gate.clear()
        else:
            gate = host.held[RUN_DOMAIN.kind] = type(gate)()
        op = await start(world, *vms)
        await (world.scheduler.many_asked.wait() if when == "hosts are chosen" else host.begun.wait())
        await world.bus.ask(CANCEL_OPERATION[Owner.INVENTORY], CancelOperation(id=op.id), Caller("user:ann"))
        if when == "hosts are chosen":
            gate.set()
        ended = await world.ended(op)
        assert ended.state is OperationState.CANCELLED, ended
        for vm in vms:
            now = await world.vm_is(vm.id, VmStatus.DOWN)
            assert now.busy_with == ""
        assert not host.domains
        assert {key.vm_id for key in world.scheduler.given_back} >= {vm.id for vm in vms}


@pytest.mark.parametrize("when", ["hosts are chosen", "they start"])
async def test_a_crash_changes_nothing(configured: Settings, when: str) -> None:
    """Inventory ends while the scheduler chooses, or while hosts start them, and goes on when it is back."""
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            host: Machine = await world.machine("h1")
            vms = await vms_of(world, 3)
            gate = world.scheduler.may_place
            if when == "hosts are chosen":
                gate.clear()
            else:
                gate = host.held[RUN_DOMAIN.kind] = type(gate)()
            who = Caller("user:ann", new_id(), "x")
            op = await start(world, *vms, who=who)
            await (world.scheduler.many_asked.wait() if when == "hosts are chosen" else host.begun.wait())
        gate.set()
        async with inventory_of(world):
            assert (await start(world, *vms, who=who)).id == op.id
            ended = await world.ended(op)
            assert ended.state is OperationState.SUCCEEDED, ended.problem
            assert became(ended) == [Became.STARTED] * 3
            for vm in vms:
                assert (await world.vm_is(vm.id, VmStatus.UP)).epoch == 1
            assert sorted(vm_id for _, vm_id in host.started) == sorted(vm.id for vm in vms)


async def test_two_calls_for_the_same_vms_start_each_once(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vms = await vms_of(world, 4)
        first, second = await start(world, *vms), await start(world, *vms)
        ended = [await world.ended(op) for op in (first, second)]
        for number, vm in enumerate(vms):
            said = {became(op)[number] for op in ended}
            assert Became.STARTED in said
            assert said <= {Became.STARTED, Became.RUNNING, Became.REFUSED}
            assert (await world.vm_is(vm.id, VmStatus.UP)).epoch == 1

        async def each_once() -> bool:
            return sorted(vm_id for _, vm_id in host.started) == sorted(vm.id for vm in vms)

        await until(each_once)
