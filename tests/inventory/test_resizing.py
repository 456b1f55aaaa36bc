"""VMs that are resized to their host: what hosts are told, what is shown, and what one keeps where it moves."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from services.inventory import model, resizing
from tests.inventory.world import World, world_of
from volery.contracts.cpus import CpuPinning, GivenCpus, PinningPolicy
from volery.contracts.domain import NumaNode
from volery.contracts.domain_orders import RUN_DOMAIN, AdmitMigration, RunDomain
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import MAINTAIN_HOST, MaintainHost
from volery.contracts.operation import OperationState
from volery.contracts.resizing import VmShape
from volery.contracts.scheduling import Need
from volery.contracts.vm import (
    MIGRATE_VM,
    START_VM,
    STOP_VM,
    SUSPEND_VM,
    UPDATE_VM,
    MigrateVm,
    StartVm,
    StopVm,
    SuspendVm,
    UpdateVm,
    Vm,
    VmStatus,
)
from volery.runtime.programs import Settings

RESIZE = CpuPinning(policy=PinningPolicy.RESIZE_AND_PIN)
HALF = 32 * 1024**2
SHAPE = VmShape(
    vcpus=4, sockets=2, cores=1, threads=2,
    numa_nodes=tuple(
        NumaNode(memory_bytes=HALF, vcpus=(2 * n, 2 * n + 1), host_cells=(n,)) for n in range(2)
    ),
)  # fmt: skip
PINS = GivenCpus(pins=((1,), (5,), (3,), (7,)))
SMALL = VmShape(vcpus=1, sockets=1, cores=1, threads=1)


async def resized(world: World, *hosts: str) -> Vm:
    world.scheduler.cpus = dict.fromkeys(hosts, PINS)
    world.scheduler.shapes = dict.fromkeys(hosts, SHAPE)
    return await world.vm(vcpus=3, cpu_pinning=RESIZE)


def asked(world: World) -> Need:
    return world.scheduler.asked[-1].need


async def test_a_vm_runs_with_what_its_host_gives_keeps_its_own_and_shows_both(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await resized(world, host.id)
        (run,) = [order for order in host.asked if isinstance(order, RunDomain)]
        spec = run.spec
        assert (spec.vcpus, spec.sockets, spec.cores, spec.threads) == (4, 2, 1, 2)
        assert (spec.numa_nodes, spec.cpus) == (SHAPE.numa_nodes, PINS)
        assert (vm.vcpus, vm.runs_with) == (3, SHAPE)
        assert (asked(world).vcpus, asked(world).shape) == (3, None)

        edited = await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, vcpus=2))
        assert (edited.vcpus, edited.runs_with, edited.next_run) == (2, SHAPE, True)

        await world.ended(await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True)))
        assert (await world.vm_is(vm.id, VmStatus.DOWN)).runs_with is None
        world.scheduler.shapes[host.id] = SMALL
        await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert asked(world).shape is None, "it takes the shape that its host has now"
        assert (await world.vm_is(vm.id, VmStatus.UP)).runs_with == SMALL


async def test_one_that_moves_asks_for_what_it_runs_with(configured: Settings) -> None:
    async with world_of(configured, hosts=2) as (world, (first, second)):
        vm = await resized(world, first.id, second.id)
        first.domains[vm.id] = replace(first.domains[vm.id], vcpus=SHAPE.vcpus)
        await first.agent.report("inventory")
        await first.agent.until_committed("inventory")
        op = await world.ended(await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id, host_id=second.id)))
        assert op.state is OperationState.SUCCEEDED, op.problem
        assert (asked(world).vcpus, asked(world).shape) == (3, SHAPE)
        (admit,) = [order for order in second.asked if isinstance(order, AdmitMigration)]
        assert (admit.spec.vcpus, admit.spec.numa_nodes) == (4, SHAPE.numa_nodes)
        assert (await world.vm_is(vm.id, VmStatus.UP)).runs_with == SHAPE


async def test_the_next_host_that_is_tried_gives_a_shape_of_its_own(configured: Settings) -> None:
    async with world_of(configured, hosts=2) as (world, (first, second)):
        world.scheduler.shapes = {first.id: SHAPE, second.id: SMALL}
        first.refusals[RUN_DOMAIN.kind] = Refused(Kind.UNAVAILABLE, "its QEMU doesn't start")
        vm = await world.vm(vcpus=3, cpu_pinning=RESIZE)
        assert [place.need.shape for place in world.scheduler.asked] == [None, None]
        assert (vm.host_id, vm.runs_with) == (second.id, SMALL)


async def test_memory_that_was_saved_goes_on_with_what_it_ran_with(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await resized(world, host.id)
        await world.ended(await world.bus.ask(SUSPEND_VM, SuspendVm(id=vm.id)))
        assert (await world.vm_is(vm.id, VmStatus.SUSPENDED)).runs_with == SHAPE
        await world.bus.ask(START_VM, StartVm(id=vm.id, dry_run=True))
        assert asked(world).shape == SHAPE
        await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert asked(world).shape == SHAPE


def test_one_whose_shape_a_restored_database_forgot_stays_where_it_is() -> None:
    now = datetime.now(UTC)
    vm = Vm(
        id="vm", revision=1, created_at=now, updated_at=now, name="db", cluster_id="c", data_center_id="dc",
        status=VmStatus.UP, cpu_pinning=RESIZE,
    )  # fmt: skip
    with pytest.raises(Refused, match="isn't known since the database was restored") as refused:
        resizing.kept(vm)
    assert refused.value.kind is Kind.CONFLICT
    assert resizing.kept(replace(vm, runs_with=SHAPE)) == SHAPE
    assert resizing.kept(replace(vm, cpu_pinning=CpuPinning())) is None


async def test_one_that_nobody_could_move_keeps_no_maintenance_from_being_shown(configured: Settings) -> None:
    """Why it can't be moved is said of it, beside where the others would go."""
    async with world_of(configured, hosts=2) as (world, (first, second)):
        forgotten = await world.vm(vcpus=3, cpu_pinning=RESIZE)  # this scheduler says of no shape
        other = await world.vm()
        op = await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id, dry_run=True))
        fates = {fate["vm_id"]: (fate["host_id"], fate["message"]) for fate in op.result["plan"]}
        assert fates[other.id] == (second.id, "")
        assert fates[forgotten.id][0] == ""
        assert "isn't known since the database was restored" in fates[forgotten.id][1]


def test_it_has_no_numa_nodes_of_its_own_and_no_pins() -> None:
    node = NumaNode(memory_bytes=HALF, vcpus=(0,))
    with pytest.raises(Refused, match="gets the NUMA nodes of that host") as refused:
        resizing.check(RESIZE, (node,))
    assert refused.value.kind is Kind.INVALID
    resizing.check(RESIZE, ())
    resizing.check(CpuPinning(), (node,))
    with pytest.raises(Refused, match="resize_and_pin chooses CPUs itself"):
        model.check_pinning(CpuPinning(policy=PinningPolicy.RESIZE_AND_PIN, pins=((0,),)), 1)
