"""Who uses a disk, and where its volume is for the host that runs it: what inventory asks on behalf of a VM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from msgspec.structs import replace

from services.storage import disk_model, domain_model, holders, lease_model, luns
from services.storage.chain_model import Chain
from services.storage.storage import Storage
from services.storage.store import DISKS, DiskPrivate, DomainPrivate
from volery.contracts.base import Done
from volery.contracts.domain import DomainDisk
from volery.contracts.errors import conflict, not_found, unavailable
from volery.contracts.naming import checked_id
from volery.contracts.storage import (
    ATTACH_DISK_TO,
    DETACH_DISK_FROM,
    PREPARE_DISKS,
    REACH_DISKS,
    REACH_DISKS_OF_MANY,
    AttachDiskTo,
    ContentType,
    DetachDiskFrom,
    Disk,
    DiskReach,
    DiskReaches,
    DomainStatus,
    PreparedDisks,
    PrepareDisks,
    ReachDisks,
    ReachDisksOfMany,
    StorageDomain,
)
from volery.contracts.together import Holder, Work
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

part = Part()


@part.answers(ATTACH_DISK_TO)
async def attach(svc: Storage, ask: AttachDiskTo, caller: Caller) -> Disk:
    """Idempotent per (disk, VM): a second attach answers the disk as it is."""
    checked_id("VM", ask.vm_id)
    while True:
        row = await svc.disk(checked_id("disk", ask.disk_id))
        new = disk_model.attached(row.public, ask.vm_id, ask.read_only, await svc.users(row))
        if new == row.public:
            await svc.core.commit(caller=caller, answer=new)
            return new
        disk_model.refuse_unsound(row.public)
        disk_model.refuse(Work.DEVICES, row.public, await holders.at_work(svc, row), reading=True)
        new = replace(new, revision=row.public.revision + 1, updated_at=utc_now())
        try:
            await svc.core.commit(DISKS.update(row, new), caller=caller, answer=new)
        except Stale:
            continue
        return new


@part.answers(DETACH_DISK_FROM)
async def detach(svc: Storage, ask: DetachDiskFrom, caller: Caller) -> Done:
    done = Done()
    while True:
        row = await DISKS.find(svc.core.pool, ask.disk_id)
        if row is None or not any(use.vm_id == ask.vm_id for use in row.public.uses):
            await svc.core.commit(caller=caller, answer=done)
            return done
        try:
            left = DISKS.update(row, *disk_model.let_go(row, ask.vm_id))
            await svc.core.commit(left, caller=caller, answer=done)
        except Stale:
            continue
        return done


Disks = dict[str, Row[Disk, DiskPrivate]]
Domains = dict[str, Row[StorageDomain, DomainPrivate]]


async def _rows(svc: Storage, disk_ids: tuple[str, ...]) -> tuple[Disks, Domains]:
    disks = await svc.store.disks_with(disk_ids)
    domains = await svc.store.domains_with({row.public.storage_domain_id for row in disks.values()})
    return disks, domains


@part.answers(PREPARE_DISKS)
async def prepare(svc: Storage, ask: PrepareDisks, caller: Caller) -> PreparedDisks:
    """Raises Refused naming the first disk that can't be used there, and why. What is answered is noted first: whoever
    would write one of the disks finds it so, also when no fact says yet that the VM runs."""
    while True:
        disks, domains = await _rows(svc, ask.disk_ids)
        chains = await svc.chains([row.public for row in disks.values()])
        prepared, begun = [], list[Change]()
        for disk_id in ask.disk_ids:
            row = disks.get(disk_id)
            if row is None:
                raise not_found("disk", disk_id)
            domain = domains[row.public.storage_domain_id]
            refuse_unprepared(row, domain.public, ask, await holders.at_work(svc, row))
            await luns.refuse_foreign(svc, row.public, domain.public)
            prepared.append(_prepared(svc, row.public, chains[disk_id], domain, ask.vm_id))
            if (private := disk_model.begun(row, ask.vm_id, ask.epoch)) is not None:
                begun.append(DISKS.update(row, private=private))
        try:
            await svc.core.commit(*begun)
        except Stale:
            continue
        return PreparedDisks(disks=tuple(prepared))


def _prepared(
    svc: Storage, disk: Disk, chain: Chain, domain: Row[StorageDomain, DomainPrivate], vm_id: str
) -> DomainDisk:
    use = next((use for use in disk.uses if use.vm_id == vm_id), None)
    iso = disk.content is ContentType.ISO
    return DomainDisk(
        disk_id=disk.id,
        source=svc.source_of(domain, disk, chain.volumes),
        read_only=iso or disk.read_only or (use is not None and use.read_only),
        shareable=disk.shareable,
        shared_storage=not domain.public.host_id,
    )


def refuse_unprepared(
    row: Row[Disk, DiskPrivate], domain: StorageDomain, ask: PrepareDisks, held: Sequence[Holder]
) -> None:
    """Raises Refused unless this VM may open this disk on this host now. An ISO image needs no attachment."""
    disk = row.public
    use = next((use for use in disk.uses if use.vm_id == ask.vm_id), None)
    if use is None and disk.content is not ContentType.ISO:
        raise conflict(f"disk {disk.name} isn't attached to VM {ask.vm_id}: attach it first", disk_id=disk.id)
    disk_model.refuse_unsound(disk)
    disk_model.refuse(ask.work, disk, held, reading=use is None or use.read_only or disk.read_only)
    domain_model.refuse_unusable(domain)
    if ask.host_id not in domain.host_ids:
        why = domain.unreachable.get(ask.host_id) or (
            "it belongs to another host"
            if domain.host_id
            else "the host is not up, not connected yet, or in another data center"
        )
        raise unavailable(
            f"host {ask.host_id} doesn't reach storage domain {domain.name}, where disk {disk.name} is: {why}",
            disk_id=disk.id,
            storage_domain_id=domain.id,
            host_ids=list(domain.host_ids),
        )


@part.answers(REACH_DISKS)
async def reach(svc: Storage, ask: ReachDisks, caller: Caller) -> DiskReach:
    found = _reach(ask.disk_ids, *await _rows(svc, ask.disk_ids))
    if not ask.lease_domain_id:
        return found
    return _holding(found, (await svc.domain(ask.lease_domain_id)).public)


@part.answers(REACH_DISKS_OF_MANY)
async def reach_of_many(svc: Storage, ask: ReachDisksOfMany, caller: Caller) -> DiskReaches:
    rows = await _rows(svc, tuple(dict.fromkeys(chain.from_iterable(ask.sets))))
    return DiskReaches(reaches=tuple(_reach(disk_ids, *rows) for disk_ids in ask.sets))


def _reach(disk_ids: tuple[str, ...], disks: Disks, domains: Domains) -> DiskReach:
    unready: dict[str, str] = {}
    hosts: set[str] | None = None
    used: dict[str, StorageDomain] = {}
    for disk_id in disk_ids:
        row = disks.get(disk_id)
        if row is None:
            unready[disk_id] = f"there is no disk {disk_id}"
            continue
        domain = used[row.public.storage_domain_id] = domains[row.public.storage_domain_id].public
        if why := disk_model.why_unready(row):
            unready[disk_id] = why
        elif domain.status is not DomainStatus.ACTIVE:
            unready[disk_id] = f"storage domain {domain.name} is {domain.status}"
        hosts = set(domain.host_ids) if hosts is None else hosts & set(domain.host_ids)
    return DiskReach(
        any_host=hosts is None,
        host_ids=tuple(sorted(hosts or ())),
        domain_ids=tuple(sorted(used)),
        unready=unready,
        local_host_id=next((d.host_id for d in used.values() if d.host_id), ""),
    )


def _holding(found: DiskReach, domain: StorageDomain) -> DiskReach:
    """Only hosts that can hold a lease in this domain."""
    hosts = None if found.any_host else set(found.host_ids)
    able = set(domain.lease_host_ids)
    return replace(
        found,
        any_host=False,
        host_ids=tuple(sorted(able if hosts is None else hosts & able)),
        lease_problem=lease_model.no_holder(domain, hosts),
    )
