"""VMs: create, edit, delete, list. What happens to them while they live is in `lifecycle` and its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from services.inventory import admission, holders, leases, model, restored, snapshots
from services.inventory.clusters import name_taken
from services.inventory.desk import Inventory
from services.inventory.protection import check_restartable, check_vm_restartable
from services.inventory.starting import Starting, bring_up
from services.inventory.store import CLUSTERS, TEMPLATES, VMS, VmPrivate
from volery.contracts.base import Done
from volery.contracts.cluster import Cluster, DeleteById, GetById
from volery.contracts.errors import Kind, Refused, conflict, not_found
from volery.contracts.ids import new_id
from volery.contracts.network import (
    ALLOCATE_NIC,
    GET_NETWORK,
    RELEASE_NIC,
    AllocatedNic,
    AllocateNic,
    ReleaseNic,
)
from volery.contracts.operation import ListQuery, Operation
from volery.contracts.storage import (
    ATTACH_DISK_TO,
    CREATE_DISK,
    DELETE_DISK,
    DETACH_DISK_FROM,
    GET_DISK,
    GET_STORAGE_DOMAIN,
    AttachDiskTo,
    ContentType,
    CreateDisk,
    DetachDiskFrom,
    Disk,
    DiskStatus,
)
from volery.contracts.vm import (
    CREATE_VM,
    DELETE_VM,
    GET_VM,
    LIST_VMS,
    UPDATE_VM,
    CreateVm,
    DeleteVm,
    DesiredState,
    DiskAttachment,
    NewDisk,
    NewNic,
    Nic,
    UpdateVm,
    Vm,
    VmStatus,
)
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Stale, Taken

part = Part()


@part.answers(GET_VM)
async def get_vm(inv: Inventory, ask: GetById, caller: Caller) -> Any:
    return await VMS.raw(inv.core.pool, ask.id)


@part.answers(LIST_VMS)
async def list_vms(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, VMS, ask)


async def check_references(inv: Inventory, ask: CreateVm, cluster: Cluster, caller: Caller) -> None:
    """Everything that a new VM names exists and may be used, before anything is touched."""
    local_host_id = ""
    bus = inv.core.bus
    if ask.template_id:
        await TEMPLATES.get(inv.core.pool, ask.template_id)
    for network_id in dict.fromkeys(nic.network_id for nic in ask.nics if nic.network_id):
        network = await bus.ask(GET_NETWORK, GetById(id=network_id), caller)
        if network.data_center_id != cluster.data_center_id:
            raise conflict(f"network {network.name} belongs to another data center", network_id=network_id)
    for domain_id in dict.fromkeys(d.storage_domain_id for d in ask.disks if not d.disk_id):
        domain = await bus.ask(GET_STORAGE_DOMAIN, GetById(id=domain_id), caller)
        if domain.data_center_id != cluster.data_center_id:
            raise conflict(
                f"storage domain {domain.name} isn't attached to this VM's data center; attach it first",
                storage_domain_id=domain_id,
            )
        local_host_id = local_host_id or domain.host_id
    for disk_id in [d.disk_id for d in ask.disks if d.disk_id]:
        await check_disk(inv, disk_id, "", caller)
    for cdrom in ask.cdroms:
        if cdrom.disk_id:
            await check_iso(inv, cdrom.disk_id, caller)
    named = [d.disk_id for d in ask.disks] + [c.disk_id for c in ask.cdroms]
    given = [disk_id for disk_id in named if disk_id]
    available, affinity = ask.high_availability, ask.affinity
    await check_restartable(inv, ask.name, cluster.id, available, affinity, given, caller, local_host_id)


async def check_disk(inv: Inventory, disk_id: str, vm_id: str, caller: Caller) -> Disk:
    """A disk that may be attached to this VM. Raises Refused with the reason."""
    checks.object_id(disk_id, "disk")
    disk = await inv.core.bus.ask(GET_DISK, GetById(id=disk_id), caller)
    others = [use.vm_id for use in disk.uses if use.vm_id != vm_id]
    if others and not disk.shareable:
        raise conflict(
            f"disk {disk.name} is attached to VM {others[0]} and not shareable; detach it there first",
            disk_id=disk_id,
            vm_id=others[0],
        )
    if disk.status not in (DiskStatus.OK, DiskStatus.LOCKED):
        raise conflict(f"disk {disk.name} is {disk.status} and can't be used", disk_id=disk_id)
    return disk


async def check_iso(inv: Inventory, disk_id: str, caller: Caller) -> Disk:
    checks.object_id(disk_id, "disk")
    disk = await inv.core.bus.ask(GET_DISK, GetById(id=disk_id), caller)
    if disk.content is not ContentType.ISO:
        raise conflict(f"disk {disk.name} is no ISO image; a CD drive takes only those", disk_id=disk_id)
    if disk.status is not DiskStatus.OK:
        raise conflict(f"ISO {disk.name} is {disk.status}; wait until it is ok", disk_id=disk_id)
    return disk


def _attachments(disks: Sequence[NewDisk]) -> tuple[DiskAttachment, ...]:
    made: list[DiskAttachment] = []
    for number, disk in enumerate(disks):
        target = model.free_target([d.target for d in made] + ["sda"], disk.bus)
        made.append(
            DiskAttachment(
                disk_id=disk.disk_id or new_id(),
                name=disk.name,
                bus=disk.bus,
                target=target,
                boot_order=disk.boot_order or (1 if number == 0 else 0),
                read_only=disk.read_only,
                shareable=disk.shareable,
                size_bytes=disk.size_bytes,
            )
        )
    return tuple(made)


def new_nic(nic: NewNic, number: int) -> Nic:
    return Nic(
        id=new_id(),
        name=nic.name or f"nic{number}",
        network_id=nic.network_id,
        mac=nic.mac.lower(),
        model=nic.model,
        link_up=nic.link_up,
        boot_order=nic.boot_order,
    )


@part.answers(CREATE_VM)
async def create_vm(inv: Inventory, ask: CreateVm, caller: Caller) -> Operation:
    model.check_create(ask)
    checks.object_id(ask.cluster_id, "cluster")
    cluster = (await CLUSTERS.get(inv.core.pool, ask.cluster_id)).public
    await check_references(inv, ask, cluster, Caller(caller.principal))
    now = utc_now()
    fields = model.given(ask)
    for other in ("disks", "nics", "start"):
        fields.pop(other)
    fields["lease"] = await leases.for_new(inv, ask, cluster.data_center_id, Caller(caller.principal))
    vm = Vm(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        data_center_id=cluster.data_center_id,
        status=VmStatus.IMAGE_LOCKED,
        disks=_attachments(ask.disks),
        nics=tuple(new_nic(nic, number) for number, nic in enumerate(ask.nics)),
        **fields,
    )
    op, begun = inv.core.operations.begin(
        "vm.create",
        object_kind="vm",
        object_id=vm.id,
        object_name=vm.name,
        question=ask,
        caller=caller,
        deadline_seconds=86400 if ask.disks else 300,
    )
    if ask.dry_run:
        return replace(op, id="", result={"vm": vm})
    try:
        await inv.core.commit(
            VMS.insert(replace(vm, busy_with=op.id), VmPrivate()), begun, caller=caller, answer=op
        )
    except Taken as taken:
        raise name_taken("VM", ask.name) from taken
    return op


@part.runs("vm.create", deadline_seconds=86400)
async def create(inv: Inventory, run: Run) -> None:
    """Make its disks and reserve its addresses; what fails half-way leaves nothing behind."""
    ask = run.input(CreateVm)
    vm = (await VMS.get(inv.core.pool, run.operation.object_id)).public
    if not run.goes_only_forward:
        await restored.refuse_running(inv, run, vm.id)
    run.undo("the VM itself", lambda: _remove(inv, vm.id))
    nics = []
    for nic in vm.nics:
        nics.append(replace(nic, mac=await _allocate(inv, run, vm.id, nic)))
    disks = []
    for number, (attachment, wanted) in enumerate(zip(vm.disks, ask.disks, strict=True)):
        disks.append(await _provide(inv, run, vm, attachment, wanted, number))
    await run.step("ready", "Writing it down", lambda: _ready(inv, vm.id, nics, disks, start=ask.start))
    run.undos.clear()  # it exists now, also if it can't be started
    if ask.start:
        await bring_up(inv, run, Starting(vm_id=vm.id))


async def _ready(
    inv: Inventory, vm_id: str, nics: list[Nic], disks: list[DiskAttachment], *, start: bool
) -> None:
    while True:
        row = await VMS.get(inv.core.pool, vm_id)
        new = replace(row.public, nics=tuple(nics), disks=tuple(disks), status=VmStatus.DOWN)
        if start:
            new = replace(new, status=VmStatus.WAIT_FOR_LAUNCH, desired=DesiredState.UP)
        try:
            await inv.core.commit(VMS.update(row, model.with_actions(new)))
        except Stale:
            continue
        return


async def _allocate(inv: Inventory, run: Run, vm_id: str, nic: Nic) -> str:
    if not nic.network_id and nic.mac:
        return nic.mac

    async def release() -> None:
        await inv.core.bus.ask(
            RELEASE_NIC, ReleaseNic(nic_id=nic.id, vm_id=vm_id), run.caller_for(f"release-{nic.id}")
        )

    async def allocate() -> AllocatedNic:
        question = AllocateNic(nic_id=nic.id, vm_id=vm_id, network_id=nic.network_id, mac=nic.mac)
        return await inv.core.bus.ask(ALLOCATE_NIC, question, run.caller_for(f"nic-{nic.id}"))

    run.undo(f"address of {nic.name}", release)
    allocated = await run.step(f"nic-{nic.id}", f"Address for {nic.name}", allocate, AllocatedNic)
    return allocated.mac


async def _provide(
    inv: Inventory, run: Run, vm: Vm, attachment: DiskAttachment, wanted: NewDisk, number: int
) -> DiskAttachment:
    """The disk exists and is reserved for the VM."""
    disk_id = attachment.disk_id
    name = wanted.name or f"{vm.name}_disk{number}"
    if not wanted.disk_id:

        async def delete() -> None:
            await delete_disk(inv, run, disk_id)

        async def make() -> None:
            ask = CreateDisk(
                id=disk_id,
                name=name,
                storage_domain_id=wanted.storage_domain_id,
                size_bytes=wanted.size_bytes,
                format=wanted.format,
                preallocate=wanted.preallocate,
                copy_of=wanted.copy_of,
                shareable=wanted.shareable,
            )
            op = await inv.core.bus.ask(CREATE_DISK, ask, run.caller_for(f"disk-{disk_id}"))
            await inv.foreign_operation(op.id)

        run.undo(f"disk {name}", delete)
        await run.step(f"disk-{disk_id}", f"Disk {name}", make)

    async def attach() -> Disk:
        question = AttachDiskTo(disk_id=disk_id, vm_id=vm.id, read_only=attachment.read_only)
        return await inv.core.bus.ask(ATTACH_DISK_TO, question, run.caller_for(f"attach-{disk_id}"))

    async def detach() -> None:
        await detach_disk(inv, run, vm.id, disk_id)

    run.undo(f"attachment of {name}", detach)
    # Somebody may be at work on it already, since it is shown as the VM's.
    disk = await run.step(f"attach-{disk_id}", f"Attaching {name}", partial(inv.once_free, attach), Disk)
    return replace(attachment, name=disk.name, size_bytes=disk.size_bytes, shareable=disk.shareable)


async def detach_disk(inv: Inventory, run: Run, vm_id: str, disk_id: str) -> None:
    question = DetachDiskFrom(disk_id=disk_id, vm_id=vm_id)
    await inv.core.bus.ask(DETACH_DISK_FROM, question, run.caller_for(f"detach-{disk_id}"))


async def delete_disk(inv: Inventory, run: Run, disk_id: str) -> None:
    """Gone, or never there."""
    caller = run.caller_for(f"delete-{disk_id}")
    try:
        op = await inv.once_free(lambda: inv.core.bus.ask(DELETE_DISK, DeleteById(id=disk_id), caller))
        await inv.foreign_operation(op.id)
    except Refused as refused:
        if refused.kind is not Kind.NOT_FOUND:
            raise


async def _remove(inv: Inventory, vm_id: str) -> None:
    """The row goes, and `deleted` is announced: the only tombstone."""
    while True:
        row = await VMS.find(inv.core.pool, vm_id)
        if row is None:
            return
        try:
            gone = await snapshots.gone_with(inv, vm_id)
            await inv.core.commit(VMS.delete(row), inv.store.forget_placement(vm_id), *gone)
        except Stale:
            continue
        return


@part.answers(UPDATE_VM)
async def update_vm(inv: Inventory, ask: UpdateVm, caller: Caller) -> Any:
    while True:
        row = await VMS.get(inv.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "VM")
        if row.public.external:
            raise conflict(f"VM {row.public.name} was not made by Volery; edit it where it was made")
        asking = Caller(caller.principal)
        new = await leases.for_edited(inv, row.public, ask, model.edited(row.public, ask), asking)
        if ask.high_availability is not UNSET or ask.affinity is not UNSET:
            await check_vm_restartable(inv, new, caller)
        if model.asks_anew(row.public, new):
            await admission.of_vm(inv, new, caller)
        try:
            update = VMS.update(row, new)
            await inv.core.commit(update, caller=caller, answer=update.document)
        except Stale:
            continue
        except Taken:
            raise name_taken("VM", new.name) from None
        await leases.let_go(inv, row.public, new, asking)
        return update.document


@part.answers(DELETE_VM)
async def delete_vm(inv: Inventory, ask: DeleteVm, caller: Caller) -> Operation:
    while True:
        row = await VMS.get(inv.core.pool, ask.id)
        vm = row.public
        checks.revision(vm, ask.if_revision, "VM")
        await holders.check_action(inv, vm, "delete")
        if not ask.delete_disks:
            await snapshots.refuse_kept_disks(inv, vm)
        if vm.delete_protected:
            raise conflict(
                f"VM {vm.name} is protected against deletion; take the protection off first", vm_id=vm.id
            )
        placement = await inv.store.placement(vm.id)
        if placement.state != "none":
            raise conflict(f"VM {vm.name} may still run on host {placement.host_id}; wait for its host")
        op, begun = inv.core.operations.begin(
            "vm.delete",
            object_kind="vm",
            object_id=vm.id,
            object_name=vm.name,
            question=ask,
            caller=caller,
            deadline_seconds=86400,
        )
        new = replace(vm, status=VmStatus.DELETING, busy_with=op.id, allowed_actions=())
        try:
            private = replace(row.private, delete_disks=ask.delete_disks)
            await inv.core.commit(VMS.update(row, new, private), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.runs("vm.delete", deadline_seconds=86400)
async def delete(inv: Inventory, run: Run) -> None:
    """A saga: listed as `deleting` until the last step removes the row."""
    ask = run.input(DeleteVm)
    row = await VMS.find(inv.core.pool, ask.id)
    if row is None:
        return
    vm = row.public
    await restored.refuse_running(inv, run, vm.id)

    async def back() -> None:
        await _undelete(inv, vm.id)

    run.undo("deleting", back)
    going = {disk.disk_id for disk in vm.disks if ask.delete_disks and not disk.shareable}
    await restored.refuse_open_elsewhere(inv, vm.id, going, "deleted")
    for disk in vm.disks:
        ident = disk.disk_id
        await run.step(
            f"detach-{ident}", f"Detaching {disk.name}", partial(detach_disk, inv, run, vm.id, ident)
        )
        # The VM has lost it: from here on deleting goes on until it is done, in another operation if this one fails
        # or is cancelled.
        run.undone("deleting")
        if ident in going:
            await run.step(f"disk-{ident}", f"Disk {disk.name}", partial(delete_disk, inv, run, ident))
    for nic in vm.nics:

        async def release(nic: Nic = nic) -> Done:
            question = ReleaseNic(nic_id=nic.id, vm_id=vm.id)
            return await inv.core.bus.ask(RELEASE_NIC, question, run.caller_for(f"nic-{nic.id}"))

        await run.step(f"nic-{nic.id}", f"Address of {nic.name}", release)
        run.undone("deleting")
    await run.step("row", "Removing it", lambda: _remove(inv, vm.id))


async def _undelete(inv: Inventory, vm_id: str) -> None:
    while True:
        row = await VMS.find(inv.core.pool, vm_id)
        if row is None:
            raise not_found("VM", vm_id)
        try:
            await inv.core.commit(VMS.update(row, replace(row.public, status=VmStatus.DOWN)))
        except Stale:
            continue
        return
