"""A VM that runs is never ended by the operation that started it."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from tests.inventory.scripted_scheduler import not_claimed
from tests.inventory.world import Machine, found_cluster, inventory_of, surroundings, until, world_of
from volery.contracts.base import Owner
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import FORGET_DOMAIN, RUN_DOMAIN
from volery.contracts.errors import Kind, Refused
from volery.contracts.operation import CANCEL_OPERATION, CancelOperation, OperationState
from volery.contracts.scheduling import ClaimKey
from volery.contracts.vm import RESTART_VM, START_VM, RestartVm, StartVm, VmStatus
from volery.runtime.bus import LOST
from volery.runtime.clock import CLOCK, Clock
from volery.runtime.programs import Settings

BEHIND = 0.97
"""A clock that is up to 90 ms behind the loop's after three seconds: more than a look at the database takes."""


def runs_on(machine: Machine, vm_id: str) -> bool:
    return vm_id in machine.domains and not machine.agent.begun(FORGET_DOMAIN.kind)


async def test_a_claim_that_is_gone_does_not_end_the_vm_that_runs(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        world.scheduler.confirming = not_claimed
        op = await world.ended(await world.create())
        assert op.state is OperationState.SUCCEEDED, op.problem
        await world.vm_is(op.object_id, VmStatus.UP)
        assert runs_on(host, op.object_id)


async def test_a_claim_that_is_not_confirmed_in_time_is_confirmed_later(configured: Settings) -> None:
    lost = 2

    def away(ask: ClaimKey) -> None:
        nonlocal lost
        if lost:
            lost -= 1
            raise Refused(Kind.TIMEOUT, "the scheduler answers late", **{LOST: True})

    async with world_of(configured, hosts=1) as (world, (host,)):
        world.scheduler.confirming = away
        op = await world.ended(await world.create())
        assert op.state is OperationState.SUCCEEDED, op.problem
        vm = await world.vm_is(op.object_id, VmStatus.UP)

        async def confirmed() -> bool:
            return ClaimKey(vm_id=vm.id, epoch=vm.epoch) in world.scheduler.confirmed

        await until(confirmed)
        assert runs_on(host, vm.id)


async def test_a_cancellation_that_comes_when_it_runs_is_too_late(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        world.scheduler.may_confirm.clear()
        op = await world.create()
        await world.scheduler.confirm_asked.wait()
        with pytest.raises(Refused, match="too late to cancel") as refused:
            await world.bus.ask(CANCEL_OPERATION[Owner.INVENTORY], CancelOperation(id=op.id))
        assert refused.value.kind is Kind.CONFLICT
        world.scheduler.may_confirm.set()
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        assert runs_on(host, op.object_id)


async def test_a_vm_that_runs_stays_when_inventory_dies_before_it_is_confirmed(configured: Settings) -> None:
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            host = await world.machine("h1")
            world.scheduler.may_confirm.clear()
            op = await world.create()
            await world.scheduler.confirm_asked.wait()
        world.scheduler.confirming = not_claimed
        world.scheduler.may_confirm.set()
        async with inventory_of(world):
            assert (await world.ended(op)).state is OperationState.SUCCEEDED
            await world.vm_is(op.object_id, VmStatus.UP)
            assert runs_on(host, op.object_id)
            assert len(host.agent.begun(RUN_DOMAIN.kind)) == 1


async def test_a_cancelled_start_that_was_quicker_is_told_as_what_it_is(configured: Settings) -> None:
    """The cancellation is under way while the host says that the VM runs."""
    async with world_of(configured, hosts=1) as (world, (host,)):
        host.held[RUN_DOMAIN.kind] = asyncio.Event()
        host.agent.heeds_cancels = False
        op = await world.create()
        await host.begun.wait()
        await world.bus.ask(CANCEL_OPERATION[Owner.INVENTORY], CancelOperation(id=op.id))
        host.held[RUN_DOMAIN.kind].set()
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        await world.vm_is(op.object_id, VmStatus.UP)
        assert runs_on(host, op.object_id)


async def test_a_report_from_before_its_start_does_not_end_it(configured: Settings) -> None:
    """The host's facts are late, and the answer to its order, sent again, would overtake them: a report among them doesn't
    name the VM yet."""
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await world.vm(start=False, ha=True)
        host.agent.muted = True
        await host.agent.report("inventory")
        op = await world.bus.ask(START_VM, StartVm(id=vm.id))

        async def asked_again() -> bool:
            return any(entry.sent > 1 for entry in host.agent.journal.values())

        await until(asked_again)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await world.ended(op)
        host.agent.muted = False
        await host.agent.until_committed("inventory")
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        await world.vm_is(vm.id, VmStatus.UP)
        assert runs_on(host, vm.id)


@pytest.mark.parametrize("not_yet", [1, 2])
async def test_a_start_that_may_find_room_in_a_moment_asks_once_more(
    configured: Settings, not_yet: int
) -> None:
    async with world_of(configured) as (world, _):
        vm = await world.vm(start=False)
        world.scheduler.not_yet = not_yet
        ended = await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert ended.state is (OperationState.SUCCEEDED if not_yet == 1 else OperationState.FAILED)
        assert [ask.epoch for ask in world.scheduler.asked] == [1, 1]


async def test_a_vm_that_fits_nowhere_says_why_until_it_runs(configured: Settings) -> None:
    async with world_of(configured) as (world, (h1, _)):
        vm = await world.vm(start=False)
        world.scheduler.host_ids.clear()
        op = await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert op.state is OperationState.FAILED
        assert (await world.vm_is(vm.id, VmStatus.DOWN)).fits_nowhere == "no host is left"
        world.scheduler.host_ids.append(h1.id)
        await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert (await world.vm_is(vm.id, VmStatus.UP)).fits_nowhere == ""


async def test_a_host_that_was_never_heard_is_left_out_also_when_the_timer_is_early(
    configured: Settings,
) -> None:
    """After a blackout: the loop wakes inventory up a moment before its own clock says that the host was silent for long
    enough, and what is brought back then isn't sent to a host that is missing."""
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            missing, present = [await world.machine(name) for name in ("h1", "h2")]
            vm = await world.vm(ha=True)
            await missing.tell(vm.id, DomainState.CRASHED, vm.epoch, "crashed")
            await world.vm_is(vm.id, VmStatus.DOWN)
            await missing.agent.kill()
        began = time.monotonic()
        behind = CLOCK.set(Clock(lambda: began + (time.monotonic() - began) * BEHIND))
        try:
            async with inventory_of(world):
                ask = RestartVm(vm_id=vm.id, epoch=vm.epoch, reason="crashed")
                op = await world.ended(await world.bus.ask(RESTART_VM, ask))
                assert op.state is OperationState.SUCCEEDED, op.problem
        finally:
            CLOCK.reset(behind)
        assert world.scheduler.asked[-1].excluded_host_ids == (missing.id,)
        assert runs_on(present, vm.id)
