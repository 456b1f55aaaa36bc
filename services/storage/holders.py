"""Who is at work on a disk: looked up where whoever comes may have to be told."""

from __future__ import annotations

from services.storage import disk_model
from services.storage.storage import Storage
from services.storage.store import DiskPrivate
from volery.contracts.storage import Disk
from volery.contracts.together import KINDS, Holder, Work
from volery.runtime.tables import Row


async def at_work(svc: Storage, row: Row[Disk, DiskPrivate]) -> list[Holder]:
    """What is done with the disk itself."""
    busy_with = row.public.busy_with
    operation = await svc.core.operations.table.find(svc.core.pool, busy_with) if busy_with else None
    return disk_model.at_work(row, None if operation is None else KINDS.get(operation.public.kind))


async def all_of(svc: Storage, row: Row[Disk, DiskPrivate]) -> list[Holder]:
    """And the VMs that may have it open."""
    return await at_work(svc, row) + disk_model.vms_with(row.public, await svc.users(row))


async def refuse_removal(svc: Storage, row: Row[Disk, DiskPrivate], done: str) -> None:
    """Raises Refused while anything is done with the disk itself."""
    disk_model.refuse(Work.REMOVE, row.public, await at_work(svc, row), done=done)
