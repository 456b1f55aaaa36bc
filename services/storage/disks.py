"""Disks: asked for, edited, grown, copied, deleted. What takes time is an operation; see disk_work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from services.storage import chain_model, disk_model, domain_model, holders, lun_model, luns
from services.storage.storage import Storage
from services.storage.store import DISK_ID, DISK_LUN, DISKS, USED_BY, DiskPrivate, DomainPrivate, VmRow
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Refused, conflict, unavailable
from volery.contracts.ids import new_id
from volery.contracts.naming import checked_id, checked_revision
from volery.contracts.operation import ListQuery, Operation
from volery.contracts.storage import (
    COPY_DISK,
    CREATE_DISK,
    DELETE_DISK,
    GET_DISK,
    LIST_DISKS,
    RESIZE_DISK,
    UPDATE_DISK,
    CopyDisk,
    CreateDisk,
    Disk,
    DiskStatus,
    DiskUse,
    ResizeDisk,
    StorageDomain,
    UpdateDisk,
)
from volery.contracts.together import Work
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale, Taken

part = Part()
NOUN = "disk"


@part.answers(CREATE_DISK)
async def create(svc: Storage, ask: CreateDisk, caller: Caller) -> Operation:
    return await begin(svc, ask, caller, "disk.create")


@part.answers(COPY_DISK)
async def copy(svc: Storage, ask: CopyDisk, caller: Caller) -> Operation:
    source = await svc.disk(checked_id(NOUN, ask.id))
    wanted = CreateDisk(
        name=ask.name,
        storage_domain_id=ask.storage_domain_id or source.public.storage_domain_id,
        format=ask.format or source.public.format,
        content=source.public.content,
        copy_of=ask.id,
    )
    return await begin(svc, wanted, caller, "disk.copy")


async def begin(svc: Storage, ask: CreateDisk, caller: Caller, kind: str) -> Operation:
    """Everything that could be refused is refused here; the operation then makes the volume."""
    ask = disk_model.checked(ask, svc.config.max_disk_bytes)
    while True:
        domain = await svc.domain(ask.storage_domain_id)
        domain_model.refuse_unusable(domain.public)
        source = await _source(svc, ask)
        fit = disk_model.fitted(_sized(ask, source), domain.public)
        lun_model.checked(fit, domain.public)
        await _reachable(svc, domain.public, source)
        disk = await _new_disk(svc, fit, domain)
        op, begun = svc.core.operations.begin(
            kind,
            object_kind="disk",
            object_id=disk.id,
            object_name=disk.name,
            question=replace(fit, id=disk.id),
            caller=caller,
        )
        if ask.dry_run:
            return replace(op, result={"lun": disk.lun, "storage_domain_id": domain.id})
        changes = [
            DISKS.insert(replace(disk, busy_with=op.id), DiskPrivate()),
            svc.volumes.write(disk.id, [chain_model.base_of(disk)]),
            svc.store.while_active(domain.id),
            *_read(source, op.id),
        ]
        try:
            await svc.core.commit(*changes, begun, caller=caller, answer=op)
        except Stale:
            continue
        except Taken as taken:
            if taken.constraint == DISK_LUN:
                continue
            raise _taken(taken, disk) from None
        return op


def _taken(taken: Taken, disk: Disk) -> Refused:
    if taken.constraint == DISK_ID:
        return conflict(f"there is a disk {disk.id} already: choose another id, or none", id=disk.id)
    return conflict(f"disk {disk.name} clashes with another one ({taken.constraint})")


async def _source(svc: Storage, ask: CreateDisk) -> Row[Disk, DiskPrivate] | None:
    """The disk that is copied. Raises Refused when it can't be read now."""
    if not ask.copy_of:
        return None
    source = await svc.disk(ask.copy_of)
    disk_model.refuse_unsound(source.public)
    disk_model.refuse(Work.COPY, source.public, await holders.all_of(svc, source))
    return source


def _sized(ask: CreateDisk, source: Row[Disk, DiskPrivate] | None) -> CreateDisk:
    if source is None:
        return ask
    size = ask.size_bytes or source.public.size_bytes
    disk_model.refuse_shrinking(source.public, size)
    return replace(ask, size_bytes=size)


async def _reachable(svc: Storage, domain: StorageDomain, source: Row[Disk, DiskPrivate] | None) -> None:
    """Raises Refused unless some host reaches both ends of a copy."""
    if source is None or source.public.storage_domain_id == domain.id:
        return
    other = (await svc.domain(source.public.storage_domain_id)).public
    domain_model.refuse_unusable(other)
    if not set(other.host_ids) & set(domain.host_ids):
        raise unavailable(
            f"no host reaches both storage domain {other.name} and {domain.name}: connect them to one host, or "
            "download the disk and upload it there",
            storage_domain_ids=[other.id, domain.id],
        )


async def _new_disk(svc: Storage, ask: CreateDisk, domain: Row[StorageDomain, DomainPrivate]) -> Disk:
    preallocated = ask.preallocate
    lun = await luns.place(svc, domain, ask)
    now = utc_now()
    disk = Disk(
        id=ask.id or new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        name=ask.name,
        storage_domain_id=domain.id,
        data_center_id=domain.public.data_center_id,
        status=DiskStatus.LOCKED,
        description=ask.description,
        tags=ask.tags,
        content=ask.content,
        format=ask.format,
        size_bytes=ask.size_bytes,
        preallocated=preallocated,
        shareable=ask.shareable,
        read_only=ask.read_only,
        wipe_after_delete=ask.wipe_after_delete,
        lun=lun,
        uses=(DiskUse(vm_id=ask.attach_to, read_only=ask.read_only),) if ask.attach_to else (),
    )
    return chain_model.alone(disk)


def _read(source: Row[Disk, DiskPrivate] | None, reader: str) -> list[Change]:
    if source is None:
        return []
    private = replace(source.private, readers=(*source.private.readers, reader))
    return [DISKS.update(source, private=private)]


@part.answers(UPDATE_DISK)
async def update(svc: Storage, ask: UpdateDisk, caller: Caller) -> Disk:
    while True:
        row = await svc.disk(checked_id(NOUN, ask.id))
        checked_revision(NOUN, row.public.name, row.public.revision, ask.if_revision)
        new = disk_model.edited(row.public, ask)
        new = replace(new, revision=row.public.revision + 1, updated_at=utc_now())
        try:
            await svc.core.commit(DISKS.update(row, new), caller=caller, answer=new)
        except Stale:
            continue
        return new


async def free(
    svc: Storage, disk_id: str, if_revision: int, work: Work
) -> tuple[Row[Disk, DiskPrivate], Row[StorageDomain, DomainPrivate]]:
    """The disk and its domain, when nothing is done with it that keeps this from beginning. Raises Refused."""
    row = await svc.disk(checked_id(NOUN, disk_id))
    checked_revision(NOUN, row.public.name, row.public.revision, if_revision)
    disk_model.refuse(work, row.public, await holders.at_work(svc, row))
    domain = await svc.domain(row.public.storage_domain_id)
    domain_model.refuse_unusable(domain.public)
    return row, domain


@part.answers(RESIZE_DISK)
async def resize(svc: Storage, ask: ResizeDisk, caller: Caller) -> Operation:
    disk_model.checked_size(ask.size_bytes, svc.config.max_disk_bytes)
    while True:
        row, domain = await free(svc, ask.id, ask.if_revision, Work.RESIZE)
        disk = row.public
        disk_model.refuse_unsound(disk)
        await luns.refuse_foreign(svc, disk, domain.public)
        disk_model.refuse_shrinking(disk, ask.size_bytes)
        disk_model.refuse_beyond_lun(disk, domain.public, ask.size_bytes)
        vms = await svc.users(row)
        disk_model.refuse(Work.RESIZE, disk, disk_model.vms_with(disk, vms))
        _refuse_shared(disk, vms)
        if domain_model.BACKENDS[domain.public.kind].GROWS:
            domain_model.BACKENDS[domain.public.kind].place(
                domain.public,
                ask.size_bytes,
                False,
                frozenset(),
                {},
                svc.config.reserve_bytes,
            )
        op, begun = svc.core.operations.begin(
            "disk.resize",
            object_kind="disk",
            object_id=disk.id,
            object_name=disk.name,
            question=ask,
            caller=caller,
        )
        changes = [DISKS.update(row, replace(disk, busy_with=op.id)), svc.store.while_active(domain.id)]
        try:
            await svc.core.commit(*changes, begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


def _refuse_shared(disk: Disk, vms: Mapping[str, VmRow]) -> None:
    """Only one running VM would learn of its new size."""
    vm = disk_model.running_vm(disk, vms)
    if vm is not None and len(disk.uses) > 1:
        raise conflict(
            f"disk {disk.name} is shared and VM {vm.name} runs with it: stop the VMs that have it first",
            vm_id=vm.id,
        )


@part.answers(DELETE_DISK)
async def delete(svc: Storage, ask: DeleteById, caller: Caller) -> Operation:
    while True:
        row, domain = await free(svc, ask.id, ask.if_revision, Work.REMOVE)
        disk = row.public
        disk_model.refuse_attached(disk, await svc.users(row), "deleted")
        op, begun = svc.core.operations.begin(
            "disk.delete",
            object_kind="disk",
            object_id=disk.id,
            object_name=disk.name,
            caller=caller,
        )
        changes = [DISKS.update(row, replace(disk, busy_with=op.id)), svc.store.while_active(domain.id)]
        try:
            await svc.core.commit(*changes, begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.answers(GET_DISK)
async def get(svc: Storage, ask: GetById, caller: Caller) -> Any:
    return await DISKS.raw(svc.core.pool, ask.id)


@part.answers(LIST_DISKS)
async def listed(svc: Storage, ask: ListQuery, caller: Caller) -> Any:
    """Filters: the disk's own columns, and `vm_id`, a VM that it is attached to."""
    vm_id = ask.filter.get("vm_id")
    if vm_id is None:
        return await page(svc.core.pool, DISKS, ask)
    others = {column: value for column, value in ask.filter.items() if column != "vm_id"}
    wanted = replace(ask, filter=others)
    return await page(svc.core.pool, DISKS, wanted, USED_BY, checked_id("VM", vm_id))
