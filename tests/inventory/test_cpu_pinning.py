"""Physical CPUs of a VM: what may be asked, when it may be edited, and what hosts are told."""

from __future__ import annotations

import pytest

from services.inventory import model
from tests.inventory.world import world_of
from volery.contracts.cpus import CpuPinning, GivenCpus, PinningPolicy
from volery.contracts.domain_orders import AdmitMigration, MigrateDomain, RunDomain
from volery.contracts.errors import Kind, Refused
from volery.contracts.operation import OperationState
from volery.contracts.vm import MIGRATE_VM, STOP_VM, UPDATE_VM, MigrateVm, StopVm, UpdateVm, VmStatus
from volery.runtime.programs import Settings

DEDICATED = CpuPinning(policy=PinningPolicy.DEDICATED)


def manual(*pins: tuple[int, ...]) -> CpuPinning:
    return CpuPinning(policy=PinningPolicy.MANUAL, pins=pins)


@pytest.mark.parametrize(
    ("pinning", "says"),
    [
        (manual((0,)), "names the CPUs of each vCPU: 2 lists are needed, 1 are there"),
        (manual((0,), ()), "vCPU 1 is pinned to at least one CPU of the host"),
        (manual((0, 0), (1,)), "vCPU 0 is pinned to at least one CPU of the host, each of them once"),
        (manual((0,), (-1,)), "from 0 to 8191"),
        (CpuPinning(policy=PinningPolicy.DEDICATED, pins=((0,), (1,))), "dedicated chooses CPUs itself"),
    ],
)
def test_a_pinning_that_no_host_could_give_is_refused(pinning: CpuPinning, says: str) -> None:
    with pytest.raises(Refused) as refused:
        model.check_pinning(pinning, 2)
    assert refused.value.kind is Kind.INVALID
    assert says in refused.value.message


def test_pinnings_that_make_sense_pass() -> None:
    for pinning in (CpuPinning(), DEDICATED, manual((0,), (1, 3))):
        model.check_pinning(pinning, 2)


async def test_hosts_are_told_the_cpus_that_the_scheduler_chose(configured: Settings) -> None:
    async with world_of(configured, hosts=2) as (world, (first, second)):
        here = GivenCpus(pins=((4,), (5,)), exclusive=(4, 5), revision=3)
        there = GivenCpus(pins=((0,), (1,)), exclusive=(0, 1), revision=7)
        second.shared_cpus = (2, 3)
        world.scheduler.cpus = {first.id: here, second.id: there}
        vm = await world.vm(vcpus=2, threads=2, cores=1, sockets=1, cpu_pinning=DEDICATED)
        need = world.scheduler.asked[-1].need
        assert (need.cpu_pinning, need.threads) == (DEDICATED, 2)
        (run,) = [order for order in first.asked if isinstance(order, RunDomain)]
        assert run.spec.cpus == here

        op = await world.ended(await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id, host_id=second.id)))
        assert op.state is OperationState.SUCCEEDED, op.problem
        (admit,) = [order for order in second.asked if isinstance(order, AdmitMigration)]
        (move,) = [order for order in first.asked if isinstance(order, MigrateDomain)]
        assert (admit.spec.cpus, move.cpus, move.shared_cpus) == (there, there, (2, 3))


async def test_a_pinning_is_edited_only_while_the_vm_is_down(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (_host,)):
        vm = await world.vm(vcpus=2)
        with pytest.raises(Refused) as refused:
            await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, cpu_pinning=DEDICATED))
        assert refused.value.kind is Kind.CONFLICT
        assert "shut it down before its CPU pinning is changed" in refused.value.message
        same = await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, cpu_pinning=CpuPinning(), description="x"))
        assert same.description == "x"

        await world.ended(await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True)))
        await world.vm_is(vm.id, VmStatus.DOWN)
        pinned = await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, cpu_pinning=manual((0,), (1,))))
        assert pinned.cpu_pinning.pins == ((0,), (1,))
        with pytest.raises(Refused, match="3 lists are needed, 2 are there"):
            await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, vcpus=3))
