"""Snapshots of VMs: made, also while they run; deleted and reverted to while they are down. Storage does it to the disks; here is what it is for.

The VM is held by the operation meanwhile, so that it neither starts nor changes. A snapshot is announced before storage is
asked for it, and goes after storage has none of it any more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from msgspec.structs import replace

from services.inventory import holders
from services.inventory.desk import Inventory
from services.inventory.snapshot_store import SNAPSHOTS, of_vm
from services.inventory.store import VMS, VmPrivate
from volery.contracts import together
from volery.contracts.agent import Outcome
from volery.contracts.base import Call, Done, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.domain_orders import NOT_SWITCHED, SWITCH_DISKS, SwitchDisks
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.ids import new_id
from volery.contracts.naming import checked_description, checked_id, checked_name
from volery.contracts.operation import ListQuery, Operation
from volery.contracts.snapshot import (
    CREATE_SNAPSHOT,
    DELETE_SNAPSHOT,
    GET_SNAPSHOT,
    LIST_SNAPSHOTS,
    REVERT_TO_SNAPSHOT,
    SWITCH_VM_DISKS,
    CreateSnapshot,
    FrozenDisk,
    RevertToSnapshot,
    Snapshot,
    SnapshotStatus,
)
from volery.contracts.storage import GET_DISK
from volery.contracts.together import Held, Thing, Work
from volery.contracts.vm import DiskAttachment, Vm, VmStatus
from volery.contracts.volumes import (
    FORGET_SNAPSHOT,
    REVERT_DISKS,
    SNAPSHOT_DISKS,
    ForgetSnapshot,
    RevertDisks,
    SnapshotDisks,
    VolumeState,
)
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Row, Stale, Taken

part = Part()
NOUN = "snapshot"
MOST_SNAPSHOTS = 50
"""Of one VM: fewer than a disk may have volumes."""
SECONDS = 86400.0
UNSURE = frozenset({Kind.INTERNAL, Kind.TIMEOUT, Kind.UNAVAILABLE})
"""Of a host's refusal to switch: it may have happened. All others come before anything is touched."""


class _Work(Message):
    """An operation's question."""

    snapshot_id: str
    name: str
    disk_ids: tuple[str, ...] = ()


@part.answers(GET_SNAPSHOT)
async def get(inv: Inventory, ask: GetById, caller: Caller) -> Any:
    return await SNAPSHOTS.raw(inv.core.pool, ask.id)


@part.answers(LIST_SNAPSHOTS)
async def listed(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, SNAPSHOTS, ask)


DOWN = frozenset({VmStatus.DOWN})
LIVE = DOWN | {VmStatus.UP, VmStatus.PAUSED}


async def _idle(
    inv: Inventory, vm_id: str, work: Work, doing: str, possible: frozenset[VmStatus] = DOWN
) -> Row[Vm, VmPrivate]:
    """The VM, if it is in one of these states and nothing is done to it. Raises Refused(conflict)."""
    row = await VMS.get(inv.core.pool, checked_id("VM", vm_id))
    vm = row.public
    if vm.external:
        raise conflict(f"VM {vm.name} was not made by Volery: it is shown but left alone", vm_id=vm.id)
    if vm.busy_with:
        holder = await holders.at_work(inv, vm.busy_with)
        together.refuse(work, Thing(Held.VM, vm.id, vm.name), [holder])
    if vm.status not in possible:
        advice = "stop the VM first" if possible is DOWN else "wait until it is up, paused or down"
        raise conflict(
            f"a snapshot of VM {vm.name} can't be {doing} while it is {vm.status}: {advice}",
            status=vm.status,
            vm_id=vm.id,
        )
    return row


def _begin(
    inv: Inventory, kind: str, row: Row[Vm, VmPrivate], work: _Work, caller: Caller
) -> tuple[Operation, list[Change]]:
    """An operation that holds the VM."""
    op, begun = inv.core.operations.begin(
        kind,
        object_kind="vm",
        object_id=row.id,
        object_name=row.public.name,
        question=work,
        caller=caller,
    )
    held = replace(row.public, busy_with=op.id, allowed_actions=())
    return op, [VMS.update(row, held), begun]


@part.answers(CREATE_SNAPSHOT)
async def create(inv: Inventory, ask: CreateSnapshot, caller: Caller) -> Operation:
    ask = replace(
        ask,
        name=checked_name(NOUN, ask.name),
        description=checked_description(ask.description),
        disk_ids=tuple(dict.fromkeys(ask.disk_ids)),
    )
    while True:
        row = await _idle(inv, ask.vm_id, Work.SNAPSHOT, "made", LIVE)
        disks = _chosen(row.public, ask.disk_ids)
        if len(await of_vm(inv.core.pool, row.id)) >= MOST_SNAPSHOTS:
            raise conflict(
                f"VM {row.public.name} has {MOST_SNAPSHOTS} snapshots, and more aren't made: delete some first",
                rule="snapshots",
            )
        now = utc_now()
        made = Snapshot(
            id=new_id(),
            revision=1,
            created_at=now,
            updated_at=now,
            name=ask.name,
            vm_id=row.id,
            description=ask.description,
            disks=tuple(FrozenDisk(disk_id=d.disk_id, name=d.name, size_bytes=d.size_bytes) for d in disks),
            configuration=row.public,
        )
        work = _Work(snapshot_id=made.id, name=_called(row.public, made), disk_ids=_ids(disks))
        op, changes = _begin(inv, "vm.snapshot", row, work, caller)
        try:
            await inv.core.commit(SNAPSHOTS.insert(made, Nothing()), *changes, caller=caller, answer=op)
        except Stale:
            continue
        except Taken:
            raise conflict(
                f"VM {row.public.name} has a snapshot {ask.name!r} already: choose another name",
                name=ask.name,
            ) from None
        return op


def _ids(disks: tuple[DiskAttachment, ...]) -> tuple[str, ...]:
    return tuple(disk.disk_id for disk in disks)


def _called(vm: Vm, snapshot: Snapshot) -> str:
    """For operations of storage, which knows neither."""
    return f"{snapshot.name} of {vm.name}"


def _chosen(vm: Vm, disk_ids: tuple[str, ...]) -> tuple[DiskAttachment, ...]:
    """Raises Refused(invalid) for disks that aren't the VM's, or when there is none."""
    has = {disk.disk_id: disk for disk in vm.disks}
    for disk_id in disk_ids:
        if disk_id not in has:
            raise invalid(
                f"VM {vm.name} has no disk {disk_id}: name disks that are attached to it", field="disk_ids"
            )
    chosen = tuple(has[i] for i in disk_ids) or tuple(
        disk for disk in vm.disks if not disk.shareable and not disk.read_only
    )
    if not chosen:
        raise invalid(
            f"VM {vm.name} has no disk that a snapshot could be of: shareable and read-only ones are left out",
            field="disk_ids",
        )
    return chosen


@part.runs("vm.snapshot", deadline_seconds=SECONDS)
async def creating(inv: Inventory, run: Run) -> None:
    work = run.input(_Work)
    run.undo("snapshot", partial(_take_back, inv, run, work))
    ask = SnapshotDisks(
        snapshot_id=work.snapshot_id,
        disk_ids=work.disk_ids,
        name=work.name,
        vm_id=run.operation.object_id,
    )
    await run.step("disks", "New volumes for its disks", partial(_have, inv, run, SNAPSHOT_DISKS, ask))
    await run.step("ready", "Writing it down", partial(_ready, inv, work.snapshot_id))
    run.undone("snapshot")


async def _have(inv: Inventory, run: Run, call: Call[Any, Operation], ask: Message) -> None:
    """Have storage do it. Raises Refused, also while something else is done with a disk: whoever asked is told, or the VM
    would be held as long as a copy takes. What is undone waits for that."""
    caller = run.caller_for(call.subject)

    async def begin() -> Operation:
        return await inv.core.bus.ask(call, ask, caller)

    op = await (inv.once_free(begin) if run.undoing else begin())
    await inv.foreign_operation(op.id)


@part.leader_answers(SWITCH_VM_DISKS)
async def switch_disks(inv: Inventory, ask: SwitchDisks, caller: Caller) -> Done:
    """storage asks, whose own operation holds the disks. A VM that is down goes on in the new volumes with its next start."""
    placement = await inv.store.placement(ask.vm_id)
    if placement.state == "none":
        return Done()
    if placement.state != "running":
        raise conflict(
            f"VM {ask.vm_id} is about to start or move: wait for that, then make the snapshot",
            rule=NOT_SWITCHED,
        )
    try:
        return await inv.order_now(
            SWITCH_DISKS, ask, host_id=placement.host_id, object_id=ask.vm_id, epoch=placement.epoch
        )
    except Refused as refused:
        if refused.details.get("outcome") != Outcome.FAILED or refused.kind in UNSURE:
            raise
        raise Refused(refused.kind, refused.message, **refused.details | {"rule": NOT_SWITCHED}) from refused


async def _forgotten(inv: Inventory, run: Run, work: _Work) -> None:
    """Storage has nothing of it any more, or never had."""
    try:
        await _have(inv, run, FORGET_SNAPSHOT, ForgetSnapshot(snapshot_id=work.snapshot_id, name=work.name))
    except Refused as refused:
        if refused.kind is not Kind.NOT_FOUND:
            raise


async def _take_back(inv: Inventory, run: Run, work: _Work) -> None:
    """A snapshot that didn't come to be. One that storage made and can't take back now, since the VM runs, stays, to be
    deleted by a person."""
    try:
        await _forgotten(inv, run, work)
    except Refused:
        await _left(inv, work)
        return
    await _drop(inv, work.snapshot_id)


async def _ready(inv: Inventory, snapshot_id: str) -> None:
    row = await SNAPSHOTS.get(inv.core.pool, snapshot_id)
    disks = tuple([replace(d, volume_id=await _volume(inv, d, snapshot_id)) for d in row.public.disks])
    await _set(inv, snapshot_id, SnapshotStatus.OK, disks)


async def _volume(inv: Inventory, disk: FrozenDisk, snapshot_id: str) -> str:
    found = await inv.core.bus.ask(GET_DISK, GetById(id=disk.disk_id))
    return next((v.id for v in found.volumes if v.snapshot_id == snapshot_id), "")


async def _set(
    inv: Inventory, snapshot_id: str, status: SnapshotStatus, disks: tuple[FrozenDisk, ...] | None = None
) -> None:
    while (row := await SNAPSHOTS.find(inv.core.pool, snapshot_id)) is not None:
        new = replace(row.public, status=status, disks=row.public.disks if disks is None else disks)
        try:
            await inv.core.commit(SNAPSHOTS.update(row, new))
        except Stale:
            continue
        return


async def _drop(inv: Inventory, snapshot_id: str) -> None:
    while (row := await SNAPSHOTS.find(inv.core.pool, snapshot_id)) is not None:
        try:
            await inv.core.commit(SNAPSHOTS.delete(row))
        except Stale:
            continue
        return


async def gone_with(inv: Inventory, vm_id: str) -> list[Change]:
    """The snapshots of a VM that ends."""
    return [SNAPSHOTS.delete(row) for row in await of_vm(inv.core.pool, vm_id)]


async def refuse_kept_disks(inv: Inventory, vm: Vm) -> None:
    """Raises Refused(conflict) when disks would outlive the VM with snapshots that nobody could delete any more."""
    if found := await of_vm(inv.core.pool, vm.id):
        raise conflict(
            f"VM {vm.name} has {len(found)} snapshots, which can't be deleted without it: delete them first, or let its "
            "disks be deleted, too",
            rule="snapshots",
        )


@part.answers(DELETE_SNAPSHOT)
async def delete(inv: Inventory, ask: DeleteById, caller: Caller) -> Operation:
    while True:
        found = await SNAPSHOTS.get(inv.core.pool, checked_id(NOUN, ask.id))
        checks.revision(found.public, ask.if_revision, NOUN)
        row = await _idle(inv, found.public.vm_id, Work.MERGE, "deleted")
        work = _Work(snapshot_id=found.id, name=_called(row.public, found.public))
        op, changes = _begin(inv, "vm.delete_snapshot", row, work, caller)
        leaving = SNAPSHOTS.update(found, replace(found.public, status=SnapshotStatus.DELETING))
        try:
            await inv.core.commit(leaving, *changes, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.runs("vm.delete_snapshot", deadline_seconds=SECONDS)
async def deleting(inv: Inventory, run: Run) -> None:
    work = run.input(_Work)
    run.undo("deleting", partial(_left, inv, work))
    await run.step("disks", "Merge its volumes", partial(_forgotten, inv, run, work))
    await run.step("row", "Removing it", partial(_drop, inv, work.snapshot_id))
    run.undone("deleting")


async def _left(inv: Inventory, work: _Work) -> None:
    """What a deletion that failed leaves: the snapshot as it was, if nothing of it was merged yet."""
    row = await SNAPSHOTS.get(inv.core.pool, work.snapshot_id)
    whole = True
    for disk in row.public.disks:
        found = await inv.core.bus.ask(GET_DISK, GetById(id=disk.disk_id))
        frozen = {volume.id for volume in found.volumes if volume.snapshot_id == work.snapshot_id}
        merging = {v.parent_id for v in found.volumes if v.state is VolumeState.MERGING}
        whole = whole and bool(frozen) and not frozen & merging
    await _set(inv, work.snapshot_id, SnapshotStatus.OK if whole else SnapshotStatus.BROKEN)


@part.answers(REVERT_TO_SNAPSHOT)
async def revert(inv: Inventory, ask: RevertToSnapshot, caller: Caller) -> Operation:
    while True:
        found = await SNAPSHOTS.get(inv.core.pool, checked_id(NOUN, ask.id))
        checks.revision(found.public, ask.if_revision, NOUN)
        row = await _idle(inv, found.public.vm_id, Work.MERGE, "reverted to")
        if found.public.status is not SnapshotStatus.OK:
            raise conflict(
                f"snapshot {found.public.name} is {found.public.status}, so it isn't whole: delete it again",
                status=str(found.public.status),
            )
        work = _Work(snapshot_id=found.id, name=_called(row.public, found.public))
        op, changes = _begin(inv, "vm.revert", row, work, caller)
        try:
            await inv.core.commit(*changes, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.runs("vm.revert", deadline_seconds=SECONDS)
async def reverting(inv: Inventory, run: Run) -> None:
    """One commit of storage's is when it happens: nothing to undo before, nor after."""
    work = run.input(_Work)
    ask = RevertDisks(snapshot_id=work.snapshot_id, name=work.name)
    await run.step("disks", "New volumes above the snapshot's", partial(_have, inv, run, REVERT_DISKS, ask))
    await run.step("sizes", "Writing it down", partial(_sized, inv, run.operation.object_id))


async def _sized(inv: Inventory, vm_id: str) -> None:
    """The disks are as large as they were then."""
    while True:
        row = await VMS.get(inv.core.pool, vm_id)
        sizes = {
            disk.disk_id: (await inv.core.bus.ask(GET_DISK, GetById(id=disk.disk_id))).size_bytes
            for disk in row.public.disks
        }
        disks = tuple(replace(disk, size_bytes=sizes[disk.disk_id]) for disk in row.public.disks)
        try:
            await inv.core.commit(VMS.update(row, replace(row.public, disks=disks)))
        except Stale:
            continue
        return
