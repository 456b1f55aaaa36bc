"""How volumes that nothing reads any more go: the file first, by the host that made it, then the row."""

from __future__ import annotations

import logging
from collections.abc import Collection

from msgspec.structs import replace

from services.storage import chain_model, volume_leases
from services.storage.chain_model import Chain
from services.storage.storage import Storage
from services.storage.store import DISKS, DiskPrivate
from volery.contracts.errors import Refused
from volery.contracts.storage import Disk
from volery.contracts.volume_orders import DELETE_VOLUME, DeleteVolume
from volery.contracts.volumes import Volume, VolumeState
from volery.runtime.tables import Row, Stale

log = logging.getLogger(__name__)


async def describe(svc: Storage, disk: Disk) -> None:
    """A disk of before its volumes were said says them."""
    if disk.leaf_id:
        return
    chain = await svc.chain(disk)
    base = svc.volumes.write(disk.id, chain.all)
    await svc.edit(DISKS, disk.id, lambda row: (chain_model.described(row.public, chain), row.private), base)


async def forget(svc: Storage, disk: Disk, chain: Chain, volume_id: str) -> Chain:
    """The row of a volume whose file is gone. For whoever holds the disk: nobody else changes its volumes."""
    left = chain_model.without(chain, volume_id)

    def without(row: Row[Disk, DiskPrivate]) -> tuple[Disk, DiskPrivate]:
        return chain_model.described(row.public, left), row.private

    await svc.edit(DISKS, disk.id, without, svc.volumes.forget([volume_id]))
    return left


async def doom(svc: Storage, disk_id: str, volume_ids: Collection[str]) -> None:
    """These volumes of the disk, which are in no chain, are to be removed."""
    while (row := await DISKS.find(svc.core.pool, disk_id)) is not None:
        chain = await svc.chain(row.public)
        leaving = [
            replace(volume, state=VolumeState.REMOVING) for volume in chain.loose if volume.id in volume_ids
        ]
        if not leaving:
            return
        others = tuple(volume for volume in chain.loose if volume.id not in volume_ids)
        public = chain_model.described(row.public, Chain(chain.volumes, (*others, *leaving)))
        try:
            await svc.core.commit(DISKS.update(row, public), svc.volumes.write(disk_id, leaving))
        except Stale:
            continue
        return


async def clean(svc: Storage, disk_id: str, timeout_seconds: float) -> None:
    """Remove the volumes of a disk that are to be removed. Raises Refused when a host can't now."""
    row = await DISKS.find(svc.core.pool, disk_id)
    if row is None:
        return
    for volume in (await svc.chain(row.public)).loose:
        if volume.state is VolumeState.REMOVING:
            if volume.host_id:
                await _remove(svc, row.public, volume, timeout_seconds)
            await _forgotten(svc, disk_id, volume.id)


async def _remove(svc: Storage, disk: Disk, volume: Volume, timeout_seconds: float) -> None:
    """By the host that made it, unless that is proven dead: whatever wrote there has ended, and another may do it."""
    domain = await svc.domain(disk.storage_domain_id)
    down, host_id = svc.core.orders.deaths.down, volume.host_id
    if host_id in down:
        able = set(domain.public.host_ids) - down.keys()
        host_id = volume_leases.chosen_host(domain.public, able, disk.id) or host_id
    order = DeleteVolume(
        disk_id=disk.id,
        volume_id=volume.id,
        source=svc.source_of(domain, disk, [volume]),
        wipe=disk.wipe_after_delete,
        lease=await volume_leases.lease_for(svc, domain, disk.id, host_id),
    )
    await svc.core.orders.carry_out(
        DELETE_VOLUME, order, host_id=host_id, object_id=disk.id, timeout_seconds=timeout_seconds
    )


async def _forgotten(svc: Storage, disk_id: str, volume_id: str) -> None:
    while (row := await DISKS.find(svc.core.pool, disk_id)) is not None:
        left = chain_model.without(await svc.chain(row.public), volume_id)
        public = chain_model.described(row.public, left)
        try:
            await svc.core.commit(DISKS.update(row, public), svc.volumes.forget([volume_id]))
        except Stale:
            continue
        return


async def clean_up(svc: Storage, disk_id: str, timeout_seconds: float) -> None:
    """The same; what can't be removed now is removed when its host is back."""
    try:
        await clean(svc, disk_id, timeout_seconds)
    except Refused as refused:
        log.warning("volumes of disk %s are removed later: %s", disk_id, refused.message)
