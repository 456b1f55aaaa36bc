"""Disks, NICs and CDs of a VM: plugged at once when it runs, else with its next start.

Attach: storage (or network) first, then the device. Detach: the device first. So a disk is never free for
another VM while this one's QEMU still has it open.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from msgspec import UNSET
from msgspec.structs import replace

from services.inventory import holders, late_unplug, model, restored
from services.inventory.desk import Inventory
from services.inventory.protection import check_vm_restartable
from services.inventory.specs import device_disk, device_nic, prepared_bridges, prepared_disks
from services.inventory.store import VMS, PlacementRow
from services.inventory.vms import check_disk, check_iso, detach_disk, new_nic
from volery.contracts.base import Done, Message, Order
from volery.contracts.cluster import GetById
from volery.contracts.domain import DomainNic
from volery.contracts.domain_orders import (
    ATTACH_DISK,
    ATTACH_NIC,
    CHANGE_MEDIA,
    DETACH_DISK,
    DETACH_NIC,
    RESIZE_DOMAIN_DISK,
    UPDATE_NIC,
    AttachDisk,
    AttachNic,
    ChangeMedia,
    DetachDisk,
    DetachNic,
    ResizeDomainDisk,
    UpdateNic,
)
from volery.contracts.errors import Refused, conflict, not_found
from volery.contracts.network import ALLOCATE_NIC, RELEASE_NIC, AllocatedNic, AllocateNic, ReleaseNic
from volery.contracts.operation import Operation
from volery.contracts.storage import ATTACH_DISK_TO, GET_DISK, AttachDiskTo, Disk
from volery.contracts.vm import (
    ATTACH_VM_DISK,
    ATTACH_VM_NIC,
    CHANGE_VM_CD,
    DETACH_VM_DISK,
    DETACH_VM_NIC,
    RESIZE_VM_DISK,
    UPDATE_VM_NIC,
    AttachVmDisk,
    AttachVmNic,
    CdRom,
    ChangeVmCd,
    DetachVmDisk,
    DetachVmNic,
    DiskAttachment,
    Nic,
    ResizeVmDisk,
    UpdateVmNic,
    Vm,
)
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Stale

log = logging.getLogger(__name__)
part = Part()
Q = TypeVar("Q", bound=Message)
DEVICE_SECONDS = 180.0


class NicWork(Message):
    """A NIC with the identity that it will have."""

    id: str
    nic: Nic


async def _begin(
    inv: Inventory,
    vm_id: str,
    if_revision: int,
    action: str,
    check: Callable[[Vm], Message],
    caller: Caller,
) -> Operation:
    """Take the VM for one device operation. `check` refuses, or gives the operation's input."""
    while True:
        row = await VMS.get(inv.core.pool, vm_id)
        vm = row.public
        checks.revision(vm, if_revision, "VM")
        await holders.check_action(inv, vm, action)
        op, begun = inv.core.operations.begin(
            f"vm.{action}",
            object_kind="vm",
            object_id=vm.id,
            object_name=vm.name,
            question=check(vm),
            caller=caller,
        )
        try:
            await inv.core.commit(
                VMS.update(row, replace(vm, busy_with=op.id, allowed_actions=())),
                begun,
                caller=caller,
                answer=op,
            )
        except Stale:
            continue
        return op


async def _edit(inv: Inventory, run: Run, vm_id: str, change: Callable[[Vm], Vm]) -> None:
    while True:
        row = await VMS.get(inv.core.pool, vm_id)
        try:
            await run.commit(VMS.update(row, change(row.public)))
        except Stale:
            continue
        return


async def _home(inv: Inventory, vm_id: str) -> PlacementRow | None:
    """Where it runs; None when it is down."""
    placement = await inv.store.placement(vm_id)
    return placement if placement.state == "running" else None


# --- disks ------------------------------------------------------------------------------------------------


@part.answers(ATTACH_VM_DISK)
async def attach_vm_disk(inv: Inventory, ask: AttachVmDisk, caller: Caller) -> Operation:
    await check_disk(inv, ask.disk_id, ask.id, Caller(caller.principal))
    found = (await VMS.get(inv.core.pool, ask.id)).public
    await check_vm_restartable(inv, found, caller, ask.disk_id)

    def check(vm: Vm) -> AttachVmDisk:
        if any(d.disk_id == ask.disk_id for d in vm.disks):
            raise conflict(f"this disk is attached to VM {vm.name} already", disk_id=ask.disk_id)
        if len(vm.disks) >= model.MAX_DISKS:
            raise conflict(f"VM {vm.name} has {model.MAX_DISKS} disks already, which is the limit")
        return ask

    return await _begin(inv, ask.id, ask.if_revision, "attach_disk", check, caller)


@part.runs("vm.attach_disk", deadline_seconds=DEVICE_SECONDS)
async def attach_disk(inv: Inventory, run: Run) -> None:
    ask = run.input(AttachVmDisk)
    vm = (await VMS.get(inv.core.pool, ask.id)).public

    async def reserve() -> Disk:
        question = AttachDiskTo(disk_id=ask.disk_id, vm_id=vm.id, read_only=ask.read_only)
        return await inv.core.bus.ask(ATTACH_DISK_TO, question, run.caller_for("reserve"))

    run.undo("reservation", lambda: _take_back_disk(inv, run, vm.id, ask))
    disk = await run.step("reserve", "Reserving the disk", reserve, Disk)
    attachment = _attachment(vm, ask, disk)
    home = await _home(inv, vm.id)
    if home is not None:
        volumes = await prepared_disks(inv, vm.id, home.epoch, home.host_id, (disk.id,), run.caller)
        device = device_disk(attachment, volumes[disk.id])
        await run.order(
            restored.order_name(run, "plug"),
            "Plugging it in",
            ATTACH_DISK,
            AttachDisk(vm_id=vm.id, disk=device),
            host_id=home.host_id,
            epoch=home.epoch,
        )
    await _edit(inv, run, vm.id, lambda v: _with_disk(v, attachment))


def _attachment(vm: Vm, ask: AttachVmDisk, disk: Disk) -> DiskAttachment:
    """The same again after a crash, when the VM may have it already."""
    taken = [d.target for d in vm.disks if d.disk_id != disk.id] + [c.target for c in vm.cdroms] + ["sda"]
    return DiskAttachment(
        disk_id=disk.id,
        name=disk.name,
        bus=ask.bus,
        target=model.free_target(taken, ask.bus),
        boot_order=ask.boot_order,
        read_only=ask.read_only,
        shareable=disk.shareable,
        size_bytes=disk.size_bytes,
    )


async def _take_back_disk(inv: Inventory, run: Run, vm_id: str, ask: AttachVmDisk) -> None:
    """It was not plugged, or nobody knows whether it was. A guest that keeps it has it: no other VM may get it then."""
    if await _unplugged(inv, run, vm_id, DETACH_DISK, DetachDisk(vm_id=vm_id, disk_id=ask.disk_id)):
        await detach_disk(inv, run, vm_id, ask.disk_id)
        return
    disk = await inv.core.bus.ask(GET_DISK, GetById(id=ask.disk_id), run.caller)

    await _edit(inv, run, vm_id, lambda v: _with_disk(v, _attachment(v, ask, disk)))


def _with_disk(vm: Vm, disk: DiskAttachment) -> Vm:
    return replace(vm, disks=(*(d for d in vm.disks if d.disk_id != disk.disk_id), disk))


def _with_nic(vm: Vm, nic: Nic) -> Vm:
    return replace(vm, nics=(*(n for n in vm.nics if n.id != nic.id), nic))


async def _unplugged(inv: Inventory, run: Run, vm_id: str, order: Order[Q, Done], question: Q) -> bool:
    """Whether the device that was to be plugged in is in no guest."""
    home = await _home(inv, vm_id)
    if home is None or not (run.from_backup or await inv.core.orders.exists(run.order_id("plug"))):
        return True
    try:
        name = restored.order_name(run, "unplug")
        await run.order(name, "Unplugging it", order, question, host_id=home.host_id, epoch=home.epoch)
    except Refused as refused:
        log.warning("VM %s may have kept a device: %s", vm_id, refused.message)
        return await _home(inv, vm_id) is None
    return True


@part.answers(DETACH_VM_DISK)
async def detach_vm_disk(inv: Inventory, ask: DetachVmDisk, caller: Caller) -> Operation:
    def check(vm: Vm) -> DetachVmDisk:
        if not any(d.disk_id == ask.disk_id for d in vm.disks):
            raise not_found("disk of this VM", ask.disk_id)
        return ask

    return await _begin(inv, ask.id, ask.if_revision, "detach_disk", check, caller)


@part.runs("vm.detach_disk", deadline_seconds=DEVICE_SECONDS)
async def detach_vm_disk_now(inv: Inventory, run: Run) -> None:
    ask = run.input(DetachVmDisk)
    home = await _home(inv, ask.id)
    if home is not None:
        late_unplug.asked(inv, run, ask.id, home.host_id, ask.disk_id)
        await run.order(
            restored.order_name(run, "unplug"),
            "Unplugging it",
            DETACH_DISK,
            DetachDisk(vm_id=ask.id, disk_id=ask.disk_id),
            host_id=home.host_id,
            epoch=home.epoch,
        )
    await run.only_forward()  # or it would be the VM's no more, and kept for it for ever
    await _edit(
        inv,
        run,
        ask.id,
        lambda v: replace(v, disks=tuple(d for d in v.disks if d.disk_id != ask.disk_id)),
    )
    await run.step("free", "Freeing the disk", lambda: detach_disk(inv, run, ask.id, ask.disk_id))


@part.leader_answers(RESIZE_VM_DISK)
async def resize_vm_disk(inv: Inventory, ask: ResizeVmDisk, caller: Caller) -> Done:
    """storage asks: a disk grows while its VM runs. Its own operation holds the disk."""
    home = await _home(inv, ask.vm_id)
    if home is None:
        raise conflict("this VM doesn't run; resize the volume itself", vm_id=ask.vm_id)
    question = ResizeDomainDisk(vm_id=ask.vm_id, disk_id=ask.disk_id, size_bytes=ask.size_bytes)
    await inv.order_now(
        RESIZE_DOMAIN_DISK, question, host_id=home.host_id, object_id=ask.vm_id, epoch=home.epoch
    )
    while True:
        row = await VMS.get(inv.core.pool, ask.vm_id)
        disks = tuple(
            replace(d, size_bytes=ask.size_bytes) if d.disk_id == ask.disk_id else d for d in row.public.disks
        )
        try:
            await inv.core.commit(
                VMS.update(row, replace(row.public, disks=disks)), caller=caller, answer=Done()
            )
        except Stale:
            continue
        return Done()


# --- NICs ---------------------------------------------------------------------------------------------------


@part.answers(ATTACH_VM_NIC)
async def attach_vm_nic(inv: Inventory, ask: AttachVmNic, caller: Caller) -> Operation:
    model.check_mac(ask.nic.mac)
    if ask.nic.network_id:
        checks.object_id(ask.nic.network_id, "network")

    def check(vm: Vm) -> NicWork:
        if len(vm.nics) >= model.MAX_NICS:
            raise conflict(f"VM {vm.name} has {model.MAX_NICS} NICs already, which is the limit")
        return NicWork(id=vm.id, nic=new_nic(ask.nic, len(vm.nics)))

    return await _begin(inv, ask.id, ask.if_revision, "attach_nic", check, caller)


@part.runs("vm.attach_nic", deadline_seconds=DEVICE_SECONDS)
async def attach_nic(inv: Inventory, run: Run) -> None:
    work = run.input(NicWork)
    run.undo("address", lambda: _take_back_nic(inv, run, work))
    nic = await _addressed(inv, run, work)
    home = await _home(inv, work.id)
    if home is not None:
        await run.order(
            restored.order_name(run, "plug"),
            "Plugging it in",
            ATTACH_NIC,
            AttachNic(vm_id=work.id, nic=await _device(inv, run, home, nic)),
            host_id=home.host_id,
            epoch=home.epoch,
        )
    await _edit(inv, run, work.id, lambda v: _with_nic(v, nic))


async def _take_back_nic(inv: Inventory, run: Run, work: NicWork) -> None:
    """Likewise: the address of a NIC that a guest kept stays its own."""
    if await _unplugged(inv, run, work.id, DETACH_NIC, DetachNic(vm_id=work.id, nic_id=work.nic.id)):
        await _release(inv, run, work.id, work.nic.id)
        return
    nic = await _addressed(inv, run, work)
    await _edit(inv, run, work.id, lambda v: _with_nic(v, nic))


async def _addressed(inv: Inventory, run: Run, work: NicWork) -> Nic:
    async def allocate() -> AllocatedNic:
        nic = work.nic
        question = AllocateNic(nic_id=nic.id, vm_id=work.id, network_id=nic.network_id, mac=nic.mac)
        return await inv.core.bus.ask(ALLOCATE_NIC, question, run.caller_for("allocate"))

    allocated = await run.step("allocate", "Reserving an address", allocate, AllocatedNic)
    return replace(work.nic, mac=allocated.mac)


async def _device(inv: Inventory, run: Run, home: PlacementRow, nic: Nic) -> DomainNic:
    networks = (nic.network_id,) if nic.network_id else ()
    return device_nic(nic, await prepared_bridges(inv, home.host_id, networks, run.caller))


async def _release(inv: Inventory, run: Run, vm_id: str, nic_id: str) -> None:
    question = ReleaseNic(nic_id=nic_id, vm_id=vm_id)
    await inv.core.bus.ask(RELEASE_NIC, question, run.caller_for(f"release-{nic_id}"))


def _nic(vm: Vm, nic_id: str) -> Nic:
    found = next((nic for nic in vm.nics if nic.id == nic_id), None)
    if found is None:
        raise not_found("NIC of this VM", nic_id)
    return found


@part.answers(UPDATE_VM_NIC)
async def update_vm_nic(inv: Inventory, ask: UpdateVmNic, caller: Caller) -> Operation:
    if ask.network_id is not UNSET and ask.network_id:
        checks.object_id(ask.network_id, "network")

    def check(vm: Vm) -> NicWork:
        fields = model.given(ask)
        fields.pop("nic_id")
        nic = replace(_nic(vm, ask.nic_id), **fields)
        checks.name(nic.name, "NIC name")
        return NicWork(id=vm.id, nic=nic)

    return await _begin(inv, ask.id, ask.if_revision, "update_nic", check, caller)


@part.runs("vm.update_nic", deadline_seconds=DEVICE_SECONDS)
async def update_nic(inv: Inventory, run: Run) -> None:
    work = run.input(NicWork)
    vm = (await VMS.get(inv.core.pool, work.id)).public
    nic = work.nic
    before = _nic(vm, nic.id)
    if before.network_id != nic.network_id:
        run.undo("network of its address", lambda: _move_back(inv, run, vm.id, before))
        nic = await _addressed(inv, run, work)
    home = await _home(inv, work.id)
    if home is not None:
        await run.order(
            restored.order_name(run, "update"),
            "Changing it",
            UPDATE_NIC,
            UpdateNic(vm_id=work.id, nic=await _device(inv, run, home, nic)),
            host_id=home.host_id,
            epoch=home.epoch,
        )
    await _edit(
        inv,
        run,
        work.id,
        lambda v: replace(v, nics=tuple(nic if n.id == nic.id else n for n in v.nics)),
    )


async def _move_back(inv: Inventory, run: Run, vm_id: str, nic: Nic) -> None:
    question = AllocateNic(nic_id=nic.id, vm_id=vm_id, network_id=nic.network_id, mac=nic.mac)
    await inv.core.bus.ask(ALLOCATE_NIC, question, run.caller_for(f"move-back-{nic.id}"))


@part.answers(DETACH_VM_NIC)
async def detach_vm_nic(inv: Inventory, ask: DetachVmNic, caller: Caller) -> Operation:
    def check(vm: Vm) -> DetachVmNic:
        _nic(vm, ask.nic_id)
        return ask

    return await _begin(inv, ask.id, ask.if_revision, "detach_nic", check, caller)


@part.runs("vm.detach_nic", deadline_seconds=DEVICE_SECONDS)
async def detach_nic(inv: Inventory, run: Run) -> None:
    ask = run.input(DetachVmNic)
    home = await _home(inv, ask.id)
    if home is not None:
        late_unplug.asked(inv, run, ask.id, home.host_id, ask.nic_id)
        await run.order(
            restored.order_name(run, "unplug"),
            "Unplugging it",
            DETACH_NIC,
            DetachNic(vm_id=ask.id, nic_id=ask.nic_id),
            host_id=home.host_id,
            epoch=home.epoch,
        )
    await run.only_forward()  # likewise its address
    await _edit(inv, run, ask.id, lambda v: replace(v, nics=tuple(n for n in v.nics if n.id != ask.nic_id)))
    await run.step("free", "Freeing its address", lambda: _release(inv, run, ask.id, ask.nic_id))


# --- CDs ----------------------------------------------------------------------------------------------------


@part.answers(CHANGE_VM_CD)
async def change_vm_cd(inv: Inventory, ask: ChangeVmCd, caller: Caller) -> Operation:
    if ask.disk_id:
        await check_iso(inv, ask.disk_id, Caller(caller.principal))

    def check(vm: Vm) -> ChangeVmCd:
        if not any(c.target == ask.target for c in vm.cdroms):
            if vm.host_id:
                raise conflict(
                    f"VM {vm.name} has no CD drive {ask.target}, and a drive can't be added while it runs; stop it first"
                )
            if ask.target[:2] != "sd" or len(vm.cdroms) >= 4:
                raise conflict("a VM has up to four CD drives, named sda, sdb, sdc, sdd")
        return ask

    return await _begin(inv, ask.id, ask.if_revision, "change_cd", check, caller)


@part.runs("vm.change_cd", deadline_seconds=DEVICE_SECONDS)
async def change_cd(inv: Inventory, run: Run) -> None:
    ask = run.input(ChangeVmCd)
    home = await _home(inv, ask.id)
    if home is not None:
        wanted = (ask.disk_id,) if ask.disk_id else ()
        volumes = await prepared_disks(inv, ask.id, home.epoch, home.host_id, wanted, run.caller)
        source = volumes[ask.disk_id].source if ask.disk_id else None
        device = f"cdrom-{ask.target}"
        await run.order(
            restored.order_name(run, "change"),
            "Changing the medium" if ask.disk_id else "Ejecting the medium",
            CHANGE_MEDIA,
            ChangeMedia(vm_id=ask.id, disk_id=device, source=source, target=ask.target),
            host_id=home.host_id,
            epoch=home.epoch,
        )

    def changed(vm: Vm) -> Vm:
        new = CdRom(target=ask.target, disk_id=ask.disk_id)
        others = tuple(c for c in vm.cdroms if c.target != ask.target)
        return replace(vm, cdroms=tuple(sorted((*others, new), key=lambda c: c.target)))

    await _edit(inv, run, ask.id, changed)


# --- what a guest let go of too late --------------------------------------------------------------------------


async def unplugged(inv: Inventory, vm_id: str) -> None:
    """Its guest has let go of a device after the operation that asked for it gave up: as if it were asked for now."""
    row = await VMS.find(inv.core.pool, vm_id)
    home = await _home(inv, vm_id)
    seen = inv.seen.get((home.host_id, vm_id)) if home is not None else None
    if row is None or home is None or seen is None or seen.epoch != home.epoch or row.public.busy_with:
        return  # looked at again before long
    late = late_unplug.gone(late_unplug.waited_for(row.public, row.private), seen)
    if not late:
        return
    ident = min(late)  # one operation at a time
    is_disk = any(disk.disk_id == ident for disk in row.public.disks)
    question = DetachVmDisk(id=vm_id, disk_id=ident) if is_disk else DetachVmNic(id=vm_id, nic_id=ident)
    action = "detach_disk" if is_disk else "detach_nic"
    log.warning("the guest of VM %s let go of %s after all", row.public.name, ident)
    try:
        await _begin(inv, vm_id, 0, action, lambda _: question, Caller("service:inventory"))
    except Refused as refused:
        log.info("what VM %s lost isn't written yet: %s", row.public.name, refused.message)
