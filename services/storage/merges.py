"""Snapshots of disks that go: of each disk, the volume above the snapshot's is merged into it and takes its place.

All the time the disk is what it was, read through the volume that is being merged. So nothing is undone: what was cut short
stays `merging`, the disk may be used, and deleting the snapshot again goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count

from msgspec.structs import replace

from services.storage import chain_model, snapshots, volume_leases, volume_work
from services.storage.chain_model import Chain
from services.storage.storage import Storage
from services.storage.store import DISKS, DiskPrivate
from volery.contracts.base import Done, Message
from volery.contracts.domain import ChainSource, FileSource
from volery.contracts.errors import Refused, unavailable
from volery.contracts.operation import Operation
from volery.contracts.storage import Disk
from volery.contracts.together import Work
from volery.contracts.volume_orders import MERGE_VOLUME, MergeVolume
from volery.contracts.volumes import FORGET_SNAPSHOT, ForgetSnapshot
from volery.runtime.bus import Caller
from volery.runtime.deaths import host_died
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

part = Part()


class _Merges(Message):
    """The operation's question: disk → its volume of the snapshot."""

    volume_ids: dict[str, str]


@part.answers(FORGET_SNAPSHOT)
async def forget(svc: Storage, ask: ForgetSnapshot, caller: Caller) -> Operation:
    """Everything that could be refused is refused here."""
    while True:
        rows = await snapshots.of_snapshot(svc, ask.snapshot_id)
        held = await snapshots.held_disks(svc, rows, Work.MERGE)
        volume_ids = {row.id: _frozen(chain, ask.snapshot_id) for row, _, chain in held}
        op, begun = svc.core.operations.begin(
            "disk.merge",
            object_kind="snapshot",
            object_id=ask.snapshot_id,
            object_name=ask.name or ", ".join(row.public.name for row in rows[:5]),
            question=_Merges(volume_ids=volume_ids),
            caller=caller,
        )
        changes: list[Change] = [svc.store.while_active(d) for d in sorted({d.id for _, d, _ in held})]
        for row, _, chain in held:
            new = chain_model.merging(chain, volume_ids[row.id])
            public = chain_model.described(row.public, new)
            changes.append(DISKS.update(row, replace(public, busy_with=op.id)))
            changes.append(svc.volumes.write(row.id, new.volumes))
        try:
            await svc.core.commit(*changes, begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


def _frozen(chain: Chain, snapshot_id: str) -> str:
    return next(volume.id for volume in chain.volumes if volume.snapshot_id == snapshot_id)


@part.runs("disk.merge", deadline_seconds=86400)
async def merging(svc: Storage, run: Run) -> None:
    for disk_id, volume_id in run.input(_Merges).volume_ids.items():
        host_id = await _merge(svc, run, disk_id, volume_id)
        settle = partial(_settled, svc, disk_id, volume_id, host_id)
        await run.write(f"settle-{disk_id}", "Go on without the merged volume", settle, Done)
        await volume_work.clean_up(svc, disk_id, svc.config.discard_seconds)


async def _merge(svc: Storage, run: Run, disk_id: str, volume_id: str) -> str:
    """Which host did it: the next one, once a former one is proven dead."""
    for turn in count():
        choose = partial(_choose, svc, disk_id)
        host_id = await run.step(f"choose-{disk_id}-{turn}", "Choose a host to do it", choose, str)
        try:
            await run.order(
                f"merge-{disk_id}-{turn}",
                "Merge what was written since",
                MERGE_VOLUME,
                partial(_question, svc, disk_id, volume_id, host_id),
                host_id=host_id,
                object_id=disk_id,
            )
        except Refused as refused:
            if not host_died(refused):
                raise
            continue
        return host_id
    raise AssertionError("the turns never end")


async def _choose(svc: Storage, disk_id: str) -> str:
    """Written down before its order."""
    domain = (await svc.domain((await svc.disk(disk_id)).public.storage_domain_id)).public
    able = set(domain.host_ids) - svc.core.orders.deaths.down.keys()
    host_id = volume_leases.chosen_host(domain, able, disk_id)
    if not host_id:
        raise unavailable(
            f"no host reaches storage domain {domain.name} any more: bring one up and try again"
        )

    def chosen(row: Row[Disk, DiskPrivate]) -> tuple[Disk, DiskPrivate]:
        return row.public, replace(row.private, writer_host_id=host_id)

    await svc.edit(DISKS, disk_id, chosen)
    return host_id


async def _question(svc: Storage, disk_id: str, volume_id: str, host_id: str) -> MergeVolume:
    row = await svc.disk(disk_id)
    domain = await svc.domain(row.public.storage_domain_id)
    below, (merged, *rest) = chain_model.split(await svc.chain(row.public), volume_id)
    source = svc.source_of(domain, row.public, (*below, merged))
    above = svc.source_of(domain, row.public, [rest[0]]) if rest else None
    assert isinstance(source, ChainSource)
    assert above is None or isinstance(above, FileSource)
    return MergeVolume(
        disk_id=disk_id,
        source=source,
        above=above,
        lease=await volume_leases.lease_for(svc, domain, disk_id, host_id),
    )


async def _settled(svc: Storage, disk_id: str, volume_id: str, host_id: str) -> tuple[Done, Sequence[Change]]:
    row = await svc.disk(disk_id)
    new = chain_model.merged(await svc.chain(row.public), volume_id, host_id)
    public = chain_model.described(row.public, new)
    # What goes gives its place up first.
    return Done(), [DISKS.update(row, public), svc.volumes.write(disk_id, [*new.loose, *new.volumes])]
