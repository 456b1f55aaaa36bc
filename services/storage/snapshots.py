"""Snapshots of disks: what they hold stays as it is, and they go on in new volumes; all of them or none.

A row says that a volume is being made before there is a file. The files are made by one host per disk, then one commit
makes all of them leaves. Whatever ends before that removes what was made; nothing was read from there yet. After it there
is nothing to undo: an empty volume above another one holds what that one does. A VM that runs with the disks goes on in the
new volumes before that commit, and from then on nothing is undone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from services.storage import (
    chain_model,
    domain_model,
    holders,
    snapshot_model,
    volume_leases,
    volume_work,
)
from services.storage.chain_model import Chain
from services.storage.storage import Storage
from services.storage.store import DISKS, DiskPrivate
from volery.contracts.base import Done, Message
from volery.contracts.domain import ChainSource
from volery.contracts.domain_orders import NOT_SWITCHED, SwitchDisks, SwitchedDisk
from volery.contracts.errors import Refused, conflict, not_found, unavailable
from volery.contracts.ids import new_id
from volery.contracts.naming import checked_id
from volery.contracts.operation import Operation
from volery.contracts.snapshot import SWITCH_VM_DISKS
from volery.contracts.storage import Disk, StorageDomain
from volery.contracts.together import Work
from volery.contracts.volume_orders import MAKE_OVERLAY, MakeOverlay
from volery.contracts.volumes import REVERT_DISKS, SNAPSHOT_DISKS, RevertDisks, SnapshotDisks, Volume
from volery.runtime.bus import LOST, Caller
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

log = logging.getLogger(__name__)

part = Part()


class _Overlay(Message):
    disk_id: str
    volume_id: str


class _Overlays(Message):
    """The operation's question."""

    snapshot_id: str
    overlays: tuple[_Overlay, ...]
    reverts: bool = False
    """They go above the snapshot's volumes, in place of the leaves."""
    vm_id: str = ""
    """May run with the disks."""


class _Hosts(Message):
    host_ids: dict[str, str]
    """By disk."""


@part.answers(SNAPSHOT_DISKS)
async def create(svc: Storage, ask: SnapshotDisks, caller: Caller) -> Operation:
    """Everything that could be refused is refused here."""
    ask = snapshot_model.checked(ask)
    if await svc.volumes.of_snapshot(ask.snapshot_id):
        raise conflict(
            f"there is a snapshot {ask.snapshot_id} already: choose another id", id=ask.snapshot_id
        )
    disks = await svc.store.disks_with(ask.disk_ids)
    for disk_id in ask.disk_ids:
        if disk_id not in disks:
            raise not_found("disk", disk_id)
    return await _begin(svc, "disk.snapshot", ask, caller, [disks[disk_id] for disk_id in ask.disk_ids])


async def _begin(
    svc: Storage,
    kind: str,
    ask: SnapshotDisks | RevertDisks,
    caller: Caller,
    rows: Sequence[Row[Disk, DiskPrivate]],
) -> Operation:
    question = _Overlays(
        snapshot_id=ask.snapshot_id,
        overlays=tuple(_Overlay(disk_id=row.id, volume_id=new_id()) for row in rows),
        reverts=isinstance(ask, RevertDisks),
        vm_id=ask.vm_id if isinstance(ask, SnapshotDisks) else "",
    )
    while True:
        op, begun = svc.core.operations.begin(
            kind,
            object_kind="snapshot",
            object_id=ask.snapshot_id,
            object_name=ask.name or ", ".join(row.public.name for row in rows[:5]),
            question=question,
            caller=caller,
        )
        changes = await _announced(svc, rows, question, op.id)
        try:
            await svc.core.commit(*changes, begun, caller=caller, answer=op)
        except Stale:
            rows = [await svc.disk(row.id) for row in rows]
            continue
        return op


async def _announced(
    svc: Storage, rows: Sequence[Row[Disk, DiskPrivate]], question: _Overlays, operation_id: str
) -> list[Change]:
    """Each disk held, and its new volume written down. Raises Refused."""
    work = Work.MERGE if question.reverts else Work.SNAPSHOT
    held = await held_disks(svc, rows, work, question.vm_id)
    changes = [svc.store.while_active(domain_id) for domain_id in sorted({d.id for _, d, _ in held})]
    for (row, domain, chain), wanted in zip(held, question.overlays, strict=True):
        if question.reverts:
            snapshot_model.refuse_revert(row.public, chain, question.snapshot_id)
        else:
            snapshot_model.refuse_depth(row.public, chain)
        domain_model.BACKENDS[domain.kind].place(
            domain, row.public.size_bytes, False, frozenset(), {}, svc.config.reserve_bytes
        )
        below = chain.volumes[-2] if question.reverts else chain.leaf
        size = below.size_bytes if question.reverts else row.public.size_bytes
        made = chain_model.overlay(wanted.volume_id, below, size, operation_id)
        public = chain_model.described(row.public, Chain(chain.volumes, (*chain.loose, made)))
        changes.append(DISKS.update(row, replace(public, busy_with=operation_id)))
        changes.append(svc.volumes.write(row.id, [*chain.volumes, made]))
    return changes


async def held_disks(
    svc: Storage, rows: Sequence[Row[Disk, DiskPrivate]], work: Work, live: str = ""
) -> list[tuple[Row[Disk, DiskPrivate], StorageDomain, Chain]]:
    """These disks, with their domains and chains, if their volumes may be changed now. `live`: the VM that may run with
    them. Raises Refused."""
    vms = await svc.users(*rows)
    chains = await svc.chains([row.public for row in rows])
    domains = await svc.store.domains_with({row.public.storage_domain_id for row in rows})
    held = [(row, domains[row.public.storage_domain_id].public, chains[row.id]) for row in rows]
    for row, domain, _ in held:
        domain_model.refuse_unusable(domain)
        at_work = await holders.at_work(svc, row)
        snapshot_model.refuse(work, row.public, domain, at_work, vms, live)
    return held


async def of_snapshot(svc: Storage, snapshot_id: str) -> list[Row[Disk, DiskPrivate]]:
    """The disks that have a volume of this snapshot. Raises Refused(not_found) when none has."""
    disks = await svc.store.disks_with(await svc.volumes.of_snapshot(checked_id("snapshot", snapshot_id)))
    if not disks:
        raise not_found("snapshot", snapshot_id)
    return [disks[disk_id] for disk_id in sorted(disks)]


@part.answers(REVERT_DISKS)
async def revert(svc: Storage, ask: RevertDisks, caller: Caller) -> Operation:
    return await _begin(svc, "disk.revert", ask, caller, await of_snapshot(svc, ask.snapshot_id))


async def snapping(svc: Storage, run: Run) -> None:
    ask = run.input(_Overlays)
    run.undo("overlays", partial(_take_back, svc, ask))
    choose = partial(_choose, svc, ask)
    hosts = await run.step("choose", "Choose hosts to do it", choose, _Hosts)
    for wanted in ask.overlays:
        host_id = hosts.host_ids[wanted.disk_id]
        await run.order(
            f"overlay-{wanted.disk_id}",
            "Make a new volume",
            MAKE_OVERLAY,
            partial(_question, svc, ask, wanted, host_id),
            host_id=host_id,
            object_id=wanted.disk_id,
        )
    if ask.vm_id and run.recorded("switch", Done) is None:
        await _switch_vm(svc, run, ask)
        await run.only_forward()  # QEMU may write there
    await run.write("switch", "Go on in the new volumes", partial(_switched, svc, ask), Done)
    run.undone("overlays")
    for wanted in ask.overlays:
        await volume_work.clean_up(svc, wanted.disk_id, svc.config.discard_seconds)


part.runs("disk.snapshot", deadline_seconds=600)(snapping)
part.runs("disk.revert", deadline_seconds=600)(snapping)


async def _choose(svc: Storage, ask: _Overlays) -> _Hosts:
    """One host for each disk, written down before its first order."""
    host_ids = {}
    for wanted in ask.overlays:
        row = await svc.disk(wanted.disk_id)
        domain = (await svc.domain(row.public.storage_domain_id)).public
        host_id = volume_leases.chosen_host(domain, domain.host_ids, wanted.disk_id)
        if not host_id:
            raise unavailable(
                f"no host reaches storage domain {domain.name} any more: bring one up and try again"
            )
        host_ids[wanted.disk_id] = host_id
        await _noted(svc, wanted, host_id)
    return _Hosts(host_ids=host_ids)


async def _noted(svc: Storage, wanted: _Overlay, host_id: str) -> None:
    while True:
        row = await svc.disk(wanted.disk_id)
        chain = await svc.chain(row.public)
        loose = tuple(replace(v, host_id=host_id) if v.id == wanted.volume_id else v for v in chain.loose)
        public = chain_model.described(row.public, Chain(chain.volumes, loose))
        private = replace(row.private, writer_host_id=host_id)
        try:
            await svc.core.commit(DISKS.update(row, public, private), svc.volumes.write(row.id, loose))
        except Stale:
            continue
        return


async def _question(svc: Storage, ask: _Overlays, wanted: _Overlay, host_id: str) -> MakeOverlay:
    row, made, source = await _made(svc, wanted)
    domain = await svc.domain(row.public.storage_domain_id)
    return MakeOverlay(
        disk_id=row.id,
        volume_id=made.id,
        source=source,
        size_bytes=made.size_bytes,
        live=bool(ask.vm_id),
        lease=await volume_leases.lease_for(svc, domain, row.id, host_id),
    )


async def _made(svc: Storage, wanted: _Overlay) -> tuple[Row[Disk, DiskPrivate], Volume, ChainSource]:
    """The disk, the volume that is being made, and where hosts find it."""
    row = await svc.disk(wanted.disk_id)
    domain = await svc.domain(row.public.storage_domain_id)
    chain = await svc.chain(row.public)
    made = next(volume for volume in chain.loose if volume.id == wanted.volume_id)
    below, _ = chain_model.split(chain, made.parent_id)
    source = svc.source_of(domain, row.public, (*below, made))
    assert isinstance(source, ChainSource)
    return row, made, source


async def _switch_vm(svc: Storage, run: Run, ask: _Overlays) -> None:
    """The VM, if it runs, goes on in the new volumes. Raises Refused when it surely doesn't. If nobody knows, they are its
    leaves: an empty volume above one that is still written shows what that one holds."""
    made = [await _made(svc, wanted) for wanted in ask.overlays]
    disks = tuple(SwitchedDisk(disk_id=row.id, source=source) for row, _, source in made)
    question = SwitchDisks(vm_id=ask.vm_id, disks=disks)

    async def switch() -> None:
        try:
            await svc.core.bus.ask(SWITCH_VM_DISKS, question, run.caller_for("switch-vm"))
        except Refused as refused:
            if refused.details.get(LOST) or refused.details.get("rule") == NOT_SWITCHED:
                raise
            log.warning("VM %s may go on in its new volumes, or not yet: %s", ask.vm_id, refused.message)

    await run.step("switch-vm", "Have the VM go on in them", switch)


async def _switched(svc: Storage, ask: _Overlays) -> tuple[Done, Sequence[Change]]:
    """All new volumes are leaves with one commit, and what was below them belongs to the snapshot."""
    changes: list[Change] = []
    for wanted in ask.overlays:
        row = await svc.disk(wanted.disk_id)
        chain = await svc.chain(row.public)
        made = next(volume for volume in chain.loose if volume.id == wanted.volume_id)
        new = chain_model.with_leaf(chain, made, ask.snapshot_id)
        public = chain_model.described(replace(row.public, size_bytes=made.size_bytes), new)
        changes.append(DISKS.update(row, public))
        changes.append(
            svc.volumes.write(row.id, [*new.loose, *new.volumes])
        )  # what goes gives its place up first
    return Done(), changes


async def _take_back(svc: Storage, ask: _Overlays) -> None:
    """Nothing of the new volumes stays, or is removed as soon as its host can."""
    for wanted in ask.overlays:
        await volume_work.doom(svc, wanted.disk_id, [wanted.volume_id])
        await volume_work.clean_up(svc, wanted.disk_id, svc.config.discard_seconds)


async def release(svc: Storage, operation: Operation) -> Sequence[Change]:
    """What frees the disks of an ended operation."""
    return [
        svc.then_wake(
            DISKS.update(row, replace(row.public, busy_with="")),
            f"domain:{row.public.storage_domain_id}",
            f"disk:{row.id}",
        )
        for row in await svc.volumes.busy_disks(operation.id)
    ]
