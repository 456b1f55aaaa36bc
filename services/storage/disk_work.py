"""How a disk's volume is made, grown and removed: by one host at a time, by orders of an operation.

The host is chosen once per operation and written down before its first order. No other host gets an order for
the volume until that one has ended, which the operation's hold on the disk (`busy_with`) ensures.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

import msgspec
from msgspec.structs import replace

from services.storage import chain_model, disk_model, luns, volume_leases, volume_work
from services.storage.storage import Storage
from services.storage.store import DISKS, DiskPrivate
from volery.contracts.agent import Outcome
from volery.contracts.base import Message
from volery.contracts.domain import DomainLease, VolumeSource
from volery.contracts.errors import Kind, Refused, unavailable
from volery.contracts.ids import random_id
from volery.contracts.operation import Operation
from volery.contracts.storage import CreateDisk, Disk, DiskStatus, ResizeDisk, StorageDomain
from volery.contracts.vm import RESIZE_VM_DISK, ResizeVmDisk
from volery.contracts.volume_orders import (
    COPY_VOLUME,
    CREATE_VOLUME,
    DELETE_VOLUME,
    IMPORT_VOLUME,
    RESIZE_VOLUME,
    CopyVolume,
    CreateVolume,
    DeleteVolume,
    ImportVolume,
    ResizeVolume,
    VolumeInfo,
)
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

log = logging.getLogger(__name__)

part = Part()


class Writer(Message):
    host_id: str


class _Copied(Message):
    """What is read of any disk operation's question when it ends."""

    copy_of: str = ""


async def writer(svc: Storage, run: Run, disk_id: str, *domain_ids: str) -> str:
    """The one host that works on this disk for this operation, chosen among those that reach all the domains."""

    async def choose() -> Writer:
        found: set[str] | None = None
        for domain_id in domain_ids:
            reach = set((await svc.domain(domain_id)).public.host_ids)
            found = reach if found is None else found & reach
        host_id = volume_leases.chosen_host((await svc.domain(domain_ids[0])).public, found or (), disk_id)
        if not host_id:
            raise unavailable(
                f"no host reaches the storage of disk {run.operation.object_name} any more: bring one up and try again"
            )

        def chosen(row: Row[Disk, DiskPrivate]) -> tuple[Disk, DiskPrivate]:
            return row.public, replace(row.private, writer_host_id=host_id)

        await svc.edit(DISKS, disk_id, chosen)
        return Writer(host_id=host_id)

    return (await run.step("choose", "Choose a host to do it", choose, Writer)).host_id


async def creating(svc: Storage, run: Run) -> None:
    ask = run.input(CreateDisk)
    run.undo("disk", partial(discard, svc, ask.id))
    disk = (await svc.disk(ask.id)).public
    info = await _make(svc, run, ask, disk)
    run.checkpoint()  # made after it was cancelled, or too late: then it goes again

    def made(row: Row[Disk, DiskPrivate]) -> tuple[Disk, DiskPrivate]:
        return chain_model.alone(_filled(row.public, info, ask.sha256)), row.private

    base = chain_model.base_of(_filled(disk, info, ask.sha256))
    await svc.edit(DISKS, ask.id, made, svc.volumes.write(ask.id, [base]))


part.runs("disk.create", deadline_seconds=86400)(creating)
part.runs("disk.copy", deadline_seconds=86400)(creating)


async def _make(svc: Storage, run: Run, ask: CreateDisk, disk: Disk) -> VolumeInfo:
    """Order the volume made, empty or with content. A source is read where it can be reached, too."""
    domain = await svc.domain(disk.storage_domain_id)
    source = (await svc.disk(ask.copy_of)).public if ask.copy_of else None
    reached = [domain.id] if source is None else [domain.id, source.storage_domain_id]
    host_id = await writer(svc, run, disk.id, *reached)
    disk = await luns.claim(svc, run, ask, host_id)
    target = await svc.source(domain, disk)
    lease = await volume_leases.lease_for(svc, domain, disk.id, host_id)
    if source is not None:
        return await run.order(
            "copy",
            "Copy the disk",
            COPY_VOLUME,
            CopyVolume(
                disk_id=disk.id,
                source=await svc.source(await svc.domain(source.storage_domain_id), source),
                target=target,
                size_bytes=disk.size_bytes,
                lease=lease,
            ),
            host_id=host_id,
        )
    if ask.import_url:
        return await _import(svc, run, ask, disk, target, host_id, lease)
    return await run.order(
        "create",
        "Make the volume",
        CREATE_VOLUME,
        CreateVolume(
            disk_id=disk.id,
            source=target,
            size_bytes=disk.size_bytes,
            preallocate=disk.preallocated,
            lease=lease,
        ),
        host_id=host_id,
    )


async def _import(
    svc: Storage,
    run: Run,
    ask: CreateDisk,
    disk: Disk,
    target: VolumeSource,
    host_id: str,
    lease: DomainLease | None,
) -> VolumeInfo:
    """The image may hold as much as was asked for, or as is allowed; a larger disk than the image is grown."""
    max_bytes = disk.size_bytes or svc.config.max_disk_bytes
    question = ImportVolume(
        disk_id=disk.id,
        url=ask.import_url,
        target=target,
        max_bytes=max_bytes,
        sha256=ask.sha256,
        lease=lease,
    )
    info = await run.order(
        "import", "Download and convert the image", IMPORT_VOLUME, question, host_id=host_id
    )
    if info.size_bytes >= disk.size_bytes:
        return info
    grow = ResizeVolume(disk_id=disk.id, source=target, size_bytes=disk.size_bytes, lease=lease)
    grown = await run.order("grow", "Grow it to its size", RESIZE_VOLUME, grow, host_id=host_id)
    return replace(grown, sha256=info.sha256)


def _filled(disk: Disk, info: VolumeInfo, sha256: str) -> Disk:
    return replace(
        disk,
        status=DiskStatus.OK,
        size_bytes=disk.size_bytes if disk.lun >= 0 else info.size_bytes,
        used_bytes=info.used_bytes,
        sha256=info.sha256 or sha256,
    )


async def discard(svc: Storage, disk_id: str) -> None:
    """Remove a disk that could not be made, its volume first. When its host can't now, that is done later."""
    row = await DISKS.find(svc.core.pool, disk_id)
    if row is None:
        return
    try:
        await remove_volume(svc, row, svc.config.discard_seconds)
    except Refused as refused:
        log.warning("disk %s is removed later: %s", disk_id, refused.message)

        def doomed(row: Row[Disk, DiskPrivate]) -> tuple[Disk, DiskPrivate]:
            return replace(row.public, status=DiskStatus.ILLEGAL), replace(row.private, doomed=True)

        await svc.edit(DISKS, disk_id, doomed)
        return
    await drop(svc, disk_id)


async def remove_volume(svc: Storage, row: Row[Disk, DiskPrivate], timeout_seconds: float) -> None:
    """Have the host that wrote the volume remove it. Raises Refused."""
    if not row.private.writer_host_id or await _is_foreign(svc, row):
        return
    order_id = await _removal(svc, row)
    try:
        async with asyncio.timeout(timeout_seconds):
            result = await svc.core.orders.result(order_id)
    except TimeoutError:
        raise Refused(Kind.TIMEOUT, "the host that wrote its volume has not removed it yet") from None
    if result.outcome is not Outcome.SUCCEEDED:
        await svc.edit(DISKS, row.id, lambda row: (row.public, replace(row.private, removal="")))
    result.answer(DELETE_VOLUME)


async def _removal(svc: Storage, row: Row[Disk, DiskPrivate]) -> str:
    """The order that removes the volume: given once, since it may take longer than anybody waits for it."""
    while not (row.private.removal and await svc.core.orders.exists(row.private.removal)):
        domain = await svc.domain(row.public.storage_domain_id)
        order_id, host_id = random_id(), _remover(svc, row, domain.public)
        lease = await volume_leases.lease_for(svc, domain, row.id, host_id)
        given = svc.core.orders.give(
            DELETE_VOLUME,
            DeleteVolume(disk_id=row.id, source=await svc.source(domain, row.public), lease=lease),
            order_id=order_id,
            host_id=host_id,
            object_id=row.id,
        )
        try:
            private = replace(row.private, removal=order_id, writer_host_id=host_id)
            noted = DISKS.update(row, private=private)
            await svc.core.commit(*given, noted)
        except Stale:
            fresh = await svc.disk(row.id)
            if fresh.public.revision == row.public.revision:  # another replica leads by now
                raise
            row = fresh
            continue
        return order_id
    return row.private.removal


def _remover(svc: Storage, row: Row[Disk, DiskPrivate], domain: StorageDomain) -> str:
    """The host that wrote the volume, unless it is proven dead: whatever wrote there has ended, and another may go on."""
    down, writer_id = svc.core.orders.deaths.down, row.private.writer_host_id
    if writer_id not in down:
        return writer_id
    return volume_leases.chosen_host(domain, set(domain.host_ids) - down.keys(), row.id) or writer_id


async def _is_foreign(svc: Storage, row: Row[Disk, DiskPrivate]) -> bool:
    """Whether the disk has a LUN that was never proven its own, or that hosts know as another disk's by now: then the
    disk goes and what is on the LUN stays."""
    if row.public.lun < 0 or not row.private.claimed:
        return row.public.lun >= 0
    try:
        await luns.refuse_foreign(svc, row.public, (await svc.domain(row.public.storage_domain_id)).public)
    except Refused as refused:
        log.warning("disk %s goes, its LUN is left alone: %s", row.id, refused.message)
        return True
    return False


async def drop(svc: Storage, disk_id: str) -> None:
    """The disk's row ends, with its tombstone."""
    while (row := await DISKS.find(svc.core.pool, disk_id)) is not None:
        try:
            lease = volume_leases.gone(svc, row.public.storage_domain_id, row.id)
            volumes = svc.volumes.forget_all(disk_id)
            await svc.core.commit(DISKS.delete(row), volumes, lease, *await luns.closed(svc, row.public))
        except Stale:
            continue
        svc.core.wake(f"domain:{row.public.storage_domain_id}")
        return


@part.runs("disk.resize", deadline_seconds=3600)
async def resizing(svc: Storage, run: Run) -> None:
    ask = run.input(ResizeDisk)
    disk = (await svc.disk(ask.id)).public
    chain = await svc.chain(disk)
    vm_id = await run.step("who", "See who runs with it", partial(_online, svc, disk.id), str)
    if vm_id:
        question = ResizeVmDisk(vm_id=vm_id, disk_id=disk.id, size_bytes=ask.size_bytes)
        grow = partial(svc.core.bus.ask, RESIZE_VM_DISK, question, run.caller_for("grow"))
        await run.step("grow", "Grow it in the running VM", grow)
        size, used = ask.size_bytes, disk.used_bytes
    else:
        domain = await svc.domain(disk.storage_domain_id)
        host_id = await writer(svc, run, disk.id, domain.id)
        order = ResizeVolume(
            disk_id=disk.id,
            volume_id=chain.leaf.id,
            source=svc.source_of(domain, disk, chain.volumes),
            size_bytes=ask.size_bytes,
            lease=await volume_leases.lease_for(svc, domain, disk.id, host_id),
        )
        info = await run.order("resize", "Grow the volume", RESIZE_VOLUME, order, host_id=host_id)
        size = max(ask.size_bytes, 0 if disk.lun >= 0 else info.size_bytes)
        used = disk.used_bytes if len(chain.volumes) > 1 else info.used_bytes
    leaf = replace(chain.leaf, size_bytes=size)
    grown_chain = chain_model.Chain((*chain.volumes[:-1], leaf), chain.loose)

    def grown(row: Row[Disk, DiskPrivate]) -> tuple[Disk, DiskPrivate]:
        public = replace(row.public, size_bytes=size, used_bytes=used)
        return chain_model.described(public, grown_chain), row.private

    await svc.edit(DISKS, disk.id, grown, svc.volumes.write(disk.id, [leaf]))


async def _online(svc: Storage, disk_id: str) -> str:
    row = await svc.disk(disk_id)
    vm = disk_model.running_vm(row.public, await svc.users(row))
    return "" if vm is None else vm.id


@part.runs("disk.delete", deadline_seconds=86400)
async def deleting(svc: Storage, run: Run) -> None:
    disk_id = run.operation.object_id
    row = await DISKS.find(svc.core.pool, disk_id)
    if row is None:  # the row went, and then the process
        return
    if await _is_foreign(svc, row):
        await drop(svc, disk_id)
        return
    await _delete_volumes(svc, run, row.public)
    await drop(svc, disk_id)


async def _delete_volumes(svc: Storage, run: Run, disk: Disk) -> None:
    """Each of them, those that others are read from last: what is left of a chain is no disk."""
    domain, chain = await svc.domain(disk.storage_domain_id), await svc.chain(disk)
    host_id = await writer(svc, run, disk.id, domain.id)
    if disk.wipe_after_delete or disk.lun >= 0 or len(chain.volumes) > 1:
        run.undo("wipe", partial(_half_wiped, svc, disk.id))
    for volume in (*chain.loose, *reversed(chain.volumes)):
        is_base = volume.id == disk.id
        await run.order(
            "delete" if is_base else f"delete-{volume.id}",
            "Delete the volume",
            DELETE_VOLUME,
            DeleteVolume(
                disk_id=disk.id,
                volume_id=volume.id,
                source=svc.source_of(domain, disk, [volume]),
                wipe=disk.wipe_after_delete,
                lease=await volume_leases.lease_for(svc, domain, disk.id, host_id),
            ),
            host_id=host_id,
        )
        if not is_base:
            chain = await volume_work.forget(svc, disk, chain, volume.id)


async def _half_wiped(svc: Storage, disk_id: str) -> None:
    """Wiping or deleting was cut short: what is left of the content is nobody's data any more."""

    def illegal(row: Row[Disk, DiskPrivate]) -> tuple[Disk, DiskPrivate]:
        return replace(row.public, status=DiskStatus.ILLEGAL), row.private

    await svc.edit(DISKS, disk_id, illegal)


async def release(svc: Storage, operation: Operation) -> Sequence[Change]:
    """What frees the disk of an ended operation, and the disk that it read."""
    row = await DISKS.find(svc.core.pool, operation.object_id)
    changes: list[Change] = []
    if row is not None and row.public.busy_with == operation.id:
        free = DISKS.update(row, replace(row.public, busy_with=""))
        changes.append(svc.then_wake(free, f"domain:{row.public.storage_domain_id}", f"disk:{row.id}"))
    changes += await let_go(svc, operation)
    return changes


async def let_go(svc: Storage, operation: Operation) -> list[Change]:
    """The disk that was copied may be written again."""
    private = (await svc.core.operations.table.get(svc.core.pool, operation.id)).private
    source_id = msgspec.json.decode(private.input, type=_Copied).copy_of
    source = await DISKS.find(svc.core.pool, source_id) if source_id else None
    if source is None or operation.id not in source.private.readers:
        return []
    left = tuple(reader for reader in source.private.readers if reader != operation.id)
    return [DISKS.update(source, private=replace(source.private, readers=left))]
