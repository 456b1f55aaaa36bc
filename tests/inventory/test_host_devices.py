"""Devices of hosts that VMs ask for: what may be asked, what hosts are told, and what a VM with some can't do."""

from __future__ import annotations

import pytest

from services.inventory import host_devices
from tests.inventory.world import World, world_of
from volery.contracts.cluster import GetById
from volery.contracts.domain_orders import RunDomain
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import MAINTAIN_HOST, MaintainHost
from volery.contracts.host_devices import AskedDevice, DeviceKind, GivenDevice
from volery.contracts.operation import OperationState
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeeds
from volery.contracts.vm import (
    GET_VM,
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

NAMED = AskedDevice(device="pci_0000_65_00_0")
GPU = AskedDevice(model="10de:1eb8")
HERE = (GivenDevice(name="pci_0000_65_00_0", kind=DeviceKind.PCI, address="0000:65:00.0"),)
THERE = (GivenDevice(name="pci_0000_17_00_0", kind=DeviceKind.PCI, address="0000:17:00.0"),)


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        ((AskedDevice(),), "names one of device, model and mdev_type"),
        (
            (AskedDevice(device="pci_0000_65_00_0", model="10de:1eb8"),),
            "names one of device, model and mdev_type",
        ),
        ((AskedDevice(device="0000:65:00.0"),), "is no name of a device like pci_0000_65_00_0"),
        ((AskedDevice(device="pci_/etc/passwd"),), "is no name of a device"),
        ((AskedDevice(model="10DE:1EB8"),), "is no vendor:product like 10de:1eb8"),
        ((AskedDevice(model="nvidia"),), "is no vendor:product"),
        ((AskedDevice(mdev_type="a b"),), "is no type of mediated devices"),
        ((AskedDevice(model="10de:1eb8", count=0),), "at least one is asked for; not 0"),
        ((AskedDevice(model="10de:1eb8", count=-3),), "at least one is asked for; not -3"),
        ((AskedDevice(device="pci_0000_65_00_0", count=2),), "a certain device is there once"),
        ((AskedDevice(model="10de:1eb8", count=17),), "at most 16 devices of its host, not 17"),
        ((GPU, AskedDevice(model="10de:1eb8", count=2)), "10de:1eb8 is asked for twice"),
        ((AskedDevice(mdev_type="a"), AskedDevice(mdev_type="b")), "for one type of mediated devices"),
        (tuple(AskedDevice(device=f"pci_0000_0{n}_00_0") for n in range(9)), "at most 8 kinds"),
    ],
)
def test_what_no_host_could_give_is_refused(asks: tuple[AskedDevice, ...], says: str) -> None:
    with pytest.raises(Refused) as refused:
        host_devices.check(asks)
    assert refused.value.kind is Kind.INVALID
    assert says in refused.value.message


def test_what_makes_sense_passes() -> None:
    host_devices.check(())
    host_devices.check((NAMED, GPU, AskedDevice(mdev_type="i915-GVTg_V5_4", count=4)))
    host_devices.check((AskedDevice(device="usb_1_1_4"), AskedDevice(device="scsi_2_0_0_3")))


async def vm_with(world: World, *asks: AskedDevice, start: bool = True) -> Vm:
    vm = await world.vm(host_devices=asks)
    assert vm.status is VmStatus.UP
    if not start:
        await world.ended(await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True)))
        await world.vm_is(vm.id, VmStatus.DOWN)
    return vm


async def test_hosts_are_told_the_devices_that_the_scheduler_chose_and_the_vm_shows_them(
    configured: Settings,
) -> None:
    async with world_of(configured, hosts=2) as (world, (first, second)):
        world.scheduler.devices = {first.id: HERE, second.id: THERE}
        vm = await vm_with(world, GPU, start=False)
        assert world.scheduler.asked[-1].need.host_devices == (GPU,)
        (run,) = [order for order in first.asked if isinstance(order, RunDomain)]
        assert run.spec.devices == HERE
        assert (await world.bus.ask(GET_VM, GetById(id=vm.id))).given_devices == HERE

        await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id, host_id=second.id)))
        (run,) = [order for order in second.asked if isinstance(order, RunDomain)]
        assert run.spec.devices == THERE
        assert (await world.bus.ask(GET_VM, GetById(id=vm.id))).given_devices == THERE


async def test_a_vm_that_was_placed_without_its_devices_is_not_started(configured: Settings) -> None:
    """By a scheduler of the previous release."""
    async with world_of(configured, hosts=1) as (world, (host,)):
        world.scheduler.devices = {host.id: HERE}
        vm = await vm_with(world, GPU, start=False)
        starts = len(host.started)
        world.scheduler.devices = {}
        op = await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert op.state is OperationState.FAILED
        assert op.problem is not None
        assert "is of an older release" in op.problem.message
        assert len(host.started) == starts


async def test_a_vm_with_devices_is_neither_moved_nor_suspended_and_whoever_asks_hears_why(
    configured: Settings,
) -> None:
    async with world_of(configured, hosts=2) as (world, (first, _second)):
        world.scheduler.devices = {first.id: HERE}
        vm, other = await vm_with(world, NAMED), await world.vm()
        assert {"migrate", "suspend"}.isdisjoint(vm.allowed_actions)
        assert {"migrate", "suspend", "stop"} <= set(other.allowed_actions)
        assert {"stop", "reboot", "pause"} <= set(vm.allowed_actions)
        for asked, says in (
            (world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id)), "it can't be moved while it runs"),
            (world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id, dry_run=True)), "start it on another host"),
            (world.bus.ask(SUSPEND_VM, SuspendVm(id=vm.id)), "whose state can't be saved"),
        ):
            with pytest.raises(Refused) as refused:
                await asked
            assert refused.value.kind is Kind.CONFLICT
            assert f"VM {vm.name} has devices of its host (pci_0000_65_00_0)" in refused.value.message
            assert says in refused.value.message

        needs = (await world.bus.ask(DESCRIBE_NEEDS, VmNeeds(vm_ids=(vm.id, other.id)))).vms
        kept = {each.need.vm_id: each.kept for each in needs}
        assert "has devices of its host" in kept[vm.id]
        assert kept[other.id] == ""

        shown = await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id, dry_run=True))
        fates = {fate["vm_id"]: (fate["host_id"] != "", fate["message"]) for fate in shown.result["plan"]}
        assert fates[other.id][0]
        assert not fates[vm.id][0]
        assert "has devices of its host" in fates[vm.id][1]
        op = await world.ended(await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id)))
        assert op.state is OperationState.FAILED
        assert op.problem is not None
        assert f"{vm.name}: VM {vm.name} has devices of its host" in op.problem.message


async def test_devices_are_edited_only_while_the_vm_is_down(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (_host,)):
        vm = await world.vm()
        with pytest.raises(Refused) as refused:
            await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, host_devices=(GPU,)))
        assert refused.value.kind is Kind.CONFLICT
        assert "shut it down before its host devices are changed" in refused.value.message
        same = await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, host_devices=(), description="x"))
        assert same.description == "x"

        await world.ended(await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True)))
        await world.vm_is(vm.id, VmStatus.DOWN)
        given = await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, host_devices=(GPU,)))
        assert given.host_devices == (GPU,)
        with pytest.raises(Refused, match="is asked for twice"):
            await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, host_devices=(GPU, GPU)))
