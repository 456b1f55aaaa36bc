"""What a VM no longer has is given back, however the operation that took it away went on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from msgspec.structs import replace

from tests.inventory.test_leases import Storage
from tests.inventory.world import until, world_of
from tests.support.speaker import Speaker
from volery.contracts.agent import DOMAIN_EVENT_HAPPENED
from volery.contracts.base import Done, Owner
from volery.contracts.domain_orders import DETACH_DISK, DETACH_NIC
from volery.contracts.errors import Kind, Refused
from volery.contracts.network import RELEASE_NIC, ReleaseNic
from volery.contracts.operation import CANCEL_OPERATION, CancelOperation, OperationState
from volery.contracts.vm import (
    ATTACH_VM_DISK,
    DETACH_VM_DISK,
    DETACH_VM_NIC,
    AttachVmDisk,
    DetachVmDisk,
    DetachVmNic,
    NewDisk,
    NewNic,
)
from volery.runtime.bus import Caller
from volery.runtime.programs import Settings


@dataclass
class Network(Speaker):
    owner: Owner = Owner.NETWORK
    released: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [(RELEASE_NIC, self._release)]

    async def _release(self, _: Speaker, ask: ReleaseNic, caller: Caller) -> Done:
        self.released.append(ask.nic_id)
        return Done()


async def test_the_address_of_a_nic_that_was_unplugged_is_freed_also_when_somebody_cancels(
    configured: Settings,
) -> None:
    """The cancellation is under way while the guest lets go of the NIC."""
    network = Network()
    async with world_of(configured, network.service(), hosts=1) as (world, (host,)):
        vm = await world.vm(nics=(NewNic(mac="52:54:00:00:00:01"),))
        (nic,) = vm.nics
        host.begun.clear()
        host.held[DETACH_NIC.kind] = asyncio.Event()
        host.agent.heeds_cancels = False
        op = await world.bus.ask(DETACH_VM_NIC, DetachVmNic(id=vm.id, nic_id=nic.id))
        await host.begun.wait()
        await world.bus.ask(CANCEL_OPERATION[Owner.INVENTORY], CancelOperation(id=op.id))
        host.held[DETACH_NIC.kind].set()
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        assert (await world.get(vm.id)).nics == ()
        assert network.released == [nic.id]


async def test_a_nic_that_its_guest_lets_go_of_too_late_is_the_vms_no_more(configured: Settings) -> None:
    """QEMU goes on asking after the operation gave up; a guest that is reset lets go."""
    network = Network()
    async with world_of(configured, network.service(), hosts=1) as (world, (host,)):
        vm = await world.vm(nics=(NewNic(mac="52:54:00:00:00:01"),))
        (nic,) = vm.nics
        host.domains[vm.id] = replace(host.domains[vm.id], nic_ids=(nic.id,))
        host.refusals[DETACH_NIC.kind] = Refused(Kind.TIMEOUT, "the guest did not let go")
        op = await world.bus.ask(DETACH_VM_NIC, DetachVmNic(id=vm.id, nic_id=nic.id))
        assert (await world.ended(op)).state is OperationState.FAILED
        await host.agent.report("inventory")
        await host.agent.until_committed("inventory")
        assert (await world.get(vm.id)).nics == (nic,)
        assert network.released == []

        del host.refusals[DETACH_NIC.kind]
        host.domains[vm.id] = replace(host.domains[vm.id], nic_ids=())
        said = {"vm_id": vm.id, "epoch": vm.epoch, "event": "device_removed"}
        await host.agent.say("inventory", DOMAIN_EVENT_HAPPENED, **said)

        async def without() -> bool:
            now = await world.get(vm.id)
            return now.nics == () and not now.busy_with

        await until(without)
        assert network.released == [nic.id]


async def test_a_disk_that_its_guest_lets_go_of_too_late_is_the_vms_no_more(configured: Settings) -> None:
    storage = Storage()
    async with world_of(configured, storage.service(), hosts=1) as (world, (host,)):
        assert world.cluster is not None
        disk = storage.disk(storage.domain(world.cluster.data_center_id, leases=False))
        vm = await world.vm(disks=(NewDisk(disk_id=disk.id),))
        host.domains[vm.id] = replace(host.domains[vm.id], disk_ids=(disk.id,))
        host.refusals[DETACH_DISK.kind] = Refused(Kind.TIMEOUT, "the guest did not let go")
        op = await world.bus.ask(DETACH_VM_DISK, DetachVmDisk(id=vm.id, disk_id=disk.id))
        assert (await world.ended(op)).state is OperationState.FAILED
        await host.agent.report("inventory")
        await host.agent.until_committed("inventory")
        assert [d.disk_id for d in (await world.get(vm.id)).disks] == [disk.id]

        del host.refusals[DETACH_DISK.kind]
        host.domains[vm.id] = replace(host.domains[vm.id], disk_ids=())
        said = {"vm_id": vm.id, "epoch": vm.epoch, "event": "device_removed"}
        await host.agent.say("inventory", DOMAIN_EVENT_HAPPENED, **said)

        async def without() -> bool:
            now = await world.get(vm.id)
            return now.disks == () and not now.busy_with

        await until(without)
        assert storage.detached == [disk.id]


async def test_a_disk_goes_from_one_vm_to_another_though_its_host_has_not_reported_since(
    configured: Settings,
) -> None:
    storage = Storage()
    async with world_of(configured, storage.service(), hosts=1) as (world, (host,)):
        assert world.cluster is not None
        disk = storage.disk(storage.domain(world.cluster.data_center_id, leases=False))
        vm, other = await world.vm(disks=(NewDisk(disk_id=disk.id),)), await world.vm()
        host.domains[vm.id] = replace(host.domains[vm.id], disk_ids=(disk.id,))
        await host.agent.report("inventory")
        await host.agent.until_committed("inventory")
        for call, ask in (
            (DETACH_VM_DISK, DetachVmDisk(id=vm.id, disk_id=disk.id)),
            (ATTACH_VM_DISK, AttachVmDisk(id=other.id, disk_id=disk.id)),
        ):
            ended = await world.ended(await world.bus.ask(call, ask))
            assert ended.state is OperationState.SUCCEEDED, ended.problem
        assert host.domains[other.id].disk_ids == (disk.id,)
