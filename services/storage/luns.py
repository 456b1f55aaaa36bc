"""How a LUN becomes a disk's: none that a host has open or may have open, none that holds anything unexplained."""

from __future__ import annotations

import logging
from dataclasses import replace as replaced
from functools import partial

from msgspec.structs import replace

from services.storage import domain_model, lun_model
from services.storage.backends import iscsi
from services.storage.lun_model import Seen
from services.storage.storage import Storage
from services.storage.store import DISKS, DOMAINS, DiskPrivate, DomainPrivate
from volery.contracts.domain import IscsiSource
from volery.contracts.errors import Refused, unavailable
from volery.contracts.operation import Operation, OperationState
from volery.contracts.storage import CreateDisk, Disk, DomainKind, StorageDomain
from volery.contracts.volume_orders import CLAIM_LUN, ClaimLun
from volery.runtime.clock import monotonic
from volery.runtime.run import Run
from volery.runtime.tables import Change, Row, Taken

log = logging.getLogger(__name__)

BEATS_SECONDS = 10.0
"""A host whose last beat is no older than this lives, and can say what it has open."""


async def seen(svc: Storage, domain: StorageDomain) -> Seen:
    """What is known about the LUNs of this domain; nothing for one that has none."""
    if domain.kind is not DomainKind.ISCSI:
        return Seen()
    return Seen(await svc.store.host_luns(domain.iqn), await svc.store.claims_of(domain.iqn))


async def refuse_foreign(svc: Storage, disk: Disk, domain: StorageDomain) -> None:
    """Raises Refused(conflict) while the disk's LUN may be another one's."""
    if disk.lun >= 0:
        disks = [row.public for row in await svc.store.disks_of(domain.id)]
        lun_model.refuse_foreign(domain, disk, await seen(svc, domain), disks)


async def place(svc: Storage, row: Row[StorageDomain, DomainPrivate], ask: CreateDisk) -> int:
    """The LUN for a disk, or -1 where the storage has none. Raises Refused."""
    domain, stained, known = row.public, row.private.stained, await seen(svc, row.public)
    disks = [disk.public for disk in await svc.store.disks_of(row.id)]
    taken = frozenset(disk.lun for disk in disks if disk.lun >= 0)
    if ask.lun < 0:
        withheld = lun_model.withheld(domain, stained, known, disks)
        backend = domain_model.BACKENDS[domain.kind]
        return backend.place(
            domain, ask.size_bytes, ask.preallocate, taken, withheld, svc.config.reserve_bytes
        )
    if ask.overwrite:
        stained, known = {}, known.believed()
    withheld = lun_model.withheld(domain, stained, known, disks)
    return iscsi.named(domain, ask.lun, ask.size_bytes, taken, withheld)


async def claim(svc: Storage, run: Run, ask: CreateDisk, host_id: str) -> Disk:
    """Have a host prove the disk's LUN blank; another one is taken for each that isn't. Raises Refused."""
    while True:
        row = await svc.disk(ask.id)
        disk = row.public
        if disk.lun < 0 or row.private.claimed:
            return disk
        try:
            await _prove(svc, run, ask, disk, host_id)
        except Refused as refused:
            if refused.details.get("rule") != lun_model.RULE_CONTENT:
                raise
            await run.save(partial(_failed, step(disk.lun)))
            await _stain(svc, disk, refused.message)
            if ask.lun >= 0:
                raise _told(refused, disk) from None
            await _take_another(svc, ask)
            continue
        await svc.edit(DISKS, disk.id, lambda row: (row.public, replace(row.private, claimed=True)))
        await _clear(svc, disk)


def step(lun: int) -> str:
    return f"claim-{lun}"


def _failed(name: str, op: Operation) -> Operation:
    """The operation with this step over, though it goes on itself."""
    steps = tuple(
        replace(s, state=OperationState.FAILED, progress=100.0) if s.name == name else s for s in op.steps
    )
    return replace(op, steps=steps)


async def _prove(svc: Storage, run: Run, ask: CreateDisk, disk: Disk, host_id: str) -> None:
    domain = await svc.domain(disk.storage_domain_id)
    known = await seen(svc, domain.public)
    number = partial(
        svc.store.next_claim, domain.public.iqn, disk.lun, known.newest(domain.public.iqn, disk.lun)
    )
    _refuse_unheard(svc)
    disks = [row.public for row in await svc.store.disks_of(domain.id)]
    believed = known.believed() if ask.overwrite else known
    lun_model.refuse_foreign(domain.public, disk, believed, disks)
    source = await svc.source(domain, disk)
    assert isinstance(source, IscsiSource)
    await run.order(
        step(disk.lun),
        f"Overwrite LUN {disk.lun}" if ask.overwrite else f"See that LUN {disk.lun} is blank",
        CLAIM_LUN,
        ClaimLun(
            disk_id=disk.id,
            source=source,
            size_bytes=disk.size_bytes,
            claim=await run.step(f"number-{disk.lun}", f"Note that LUN {disk.lun} is claimed", number, int),
            overwrite=ask.overwrite,
        ),
        host_id=host_id,
    )


def _refuse_unheard(svc: Storage) -> None:
    """Raises Refused(unavailable) while a host lives that hasn't said what it has open."""
    now = monotonic()
    unheard = sorted(
        host_id
        for host_id, (_, at) in svc.core.beats.newest.items()
        if now - at < BEATS_SECONDS and host_id not in svc.core.hosts.positions
    )
    if unheard:
        raise unavailable(
            f"host {', '.join(unheard[:5])} has not said yet which LUNs it has open: try again in some seconds",
            hosts=unheard[:100],
        )


def _told(refused: Refused, disk: Disk) -> Refused:
    return Refused(
        refused.kind,
        f"{refused.message}. Leave it to whom it belongs, or create the disk with lun {disk.lun} and overwrite, "
        "which destroys what is there",
        **refused.details,
    )


async def _stain(svc: Storage, disk: Disk, why: str) -> None:
    """The LUN holds something: it is reported, and no disk gets it until it is looked at anew or overwritten."""
    log.warning("LUN %d of storage domain %s: %s", disk.lun, disk.storage_domain_id, why)

    def stained(
        row: Row[StorageDomain, DomainPrivate],
    ) -> tuple[StorageDomain, DomainPrivate]:
        return row.public, replace(row.private, stained=row.private.stained | {str(disk.lun): why})

    await svc.edit(DOMAINS, disk.storage_domain_id, stained)


async def _clear(svc: Storage, disk: Disk) -> None:
    def clean(
        row: Row[StorageDomain, DomainPrivate],
    ) -> tuple[StorageDomain, DomainPrivate]:
        left = {lun: why for lun, why in row.private.stained.items() if lun != str(disk.lun)}
        return row.public, replace(row.private, stained=left)

    await svc.edit(DOMAINS, disk.storage_domain_id, clean)


async def _take_another(svc: Storage, ask: CreateDisk) -> None:
    """Raises Refused(exhausted) when there is none left."""
    while True:
        lun = await place(svc, await svc.domain(ask.storage_domain_id), ask)

        def moved(row: Row[Disk, DiskPrivate], lun: int = lun) -> tuple[Disk, DiskPrivate]:
            return replace(row.public, lun=lun), row.private

        try:
            await svc.edit(DISKS, ask.id, moved)
        except Taken:  # by a disk that is being made at the same time
            continue
        return


async def closed(svc: Storage, disk: Disk) -> list[Change]:
    """The changes by which a deleted disk is open nowhere: what hosts said of it is older than its deletion."""
    if disk.lun < 0:
        return []
    return [
        svc.store.keep_luns([replaced(host, luns=tuple(one for one in host.luns if one.disk_id != disk.id))])
        for host in await svc.store.host_luns(disk.id)
        if any(one.disk_id == disk.id for one in host.luns)
    ]
