"""Uploads and downloads of images: opened on a host, fed by the gateway, finished, cancelled, expired.

An upload lands beside the volume; only finishing writes the disk, on the one host that was chosen for it. The
ticket that admits the bytes is made here, kept sealed, and told to the host and the gateway alone.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from msgspec.structs import replace

from services.storage import (
    chain_model,
    disk_model,
    domain_model,
    holders,
    luns,
    transfer_model,
    volume_leases,
)
from services.storage.storage import Storage
from services.storage.store import (
    DISKS,
    TRANSFERS,
    DiskPrivate,
    DomainPrivate,
    TransferPrivate,
)
from volery.contracts.base import Message
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused, unavailable
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery, Operation
from volery.contracts.storage import (
    CANCEL_TRANSFER,
    CREATE_TRANSFER,
    FIND_TRANSFER_ENDPOINT,
    FINISH_DISK_TRANSFER,
    GET_TRANSFER,
    LIST_TRANSFERS,
    CreateTransfer,
    Disk,
    DiskStatus,
    DomainKind,
    FindTransferEndpoint,
    FinishDiskTransfer,
    StorageDomain,
    Transfer,
    TransferEndpoint,
)
from volery.contracts.together import Holder
from volery.contracts.volume_orders import (
    FINISH_TRANSFER,
    OPEN_TRANSFER,
    FinishTransfer,
    OpenTransfer,
    TransferDirection,
    TransferOpened,
    VolumeInfo,
)
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

log = logging.getLogger(__name__)

part = Part()
REOPEN_SECONDS = 25.0


class Ended(Message):
    """Why a transfer is cancelled, when nobody asked."""

    problem: str = ""


@part.answers(CREATE_TRANSFER)
async def create(svc: Storage, ask: CreateTransfer, caller: Caller) -> Operation:
    ask = transfer_model.checked(ask)
    while True:
        row = await svc.disk(ask.disk_id)
        domain = (await svc.domain(row.public.storage_domain_id)).public
        domain_model.refuse_unusable(domain)
        await luns.refuse_foreign(svc, row.public, domain)
        held = await holders.all_of(svc, row)
        transfer = _new(svc, ask, domain)
        op, begun = _begin(svc, "create", transfer, row.public, caller)
        private = TransferPrivate(ticket=svc.vault.seal(secrets.token_urlsafe(32)))
        changes = [
            TRANSFERS.insert(replace(transfer, operation_id=op.id), private),
            _hold(row, ask, transfer.id, held),
            svc.store.while_active(domain.id),
        ]
        try:
            await svc.core.commit(*changes, begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


def _new(svc: Storage, ask: CreateTransfer, domain: StorageDomain) -> Transfer:
    now = utc_now()
    transfer_id = new_id()
    host_id = volume_leases.chosen_host(domain, domain.host_ids, ask.disk_id)
    if not host_id:
        raise unavailable(f"no host reaches storage domain {domain.name}: bring one up and try again")
    return Transfer(
        id=transfer_id,
        revision=1,
        created_at=now,
        updated_at=now,
        disk_id=ask.disk_id,
        direction=ask.direction,
        size_bytes=ask.size_bytes,
        format=ask.format,
        sha256=ask.sha256,
        host_id=host_id,
        expires_at=now + timedelta(seconds=svc.config.transfer_seconds),
    )


def _hold(
    row: Row[Disk, DiskPrivate], ask: CreateTransfer, transfer_id: str, held: Sequence[Holder]
) -> Change:
    """The disk is locked for an upload, and may not be written during a download. Raises Refused."""
    if ask.direction is TransferDirection.DOWNLOAD:
        transfer_model.refuse_download(row, held)
        readers = (*row.private.readers, transfer_id)
        return DISKS.update(row, private=replace(row.private, readers=readers))
    transfer_model.refuse_upload(row, ask.size_bytes, held)
    private = replace(row.private, transfer_id=transfer_id, before=row.public.status)
    return DISKS.update(row, replace(row.public, status=DiskStatus.LOCKED), private)


def _begin(
    svc: Storage,
    verb: str,
    transfer: Transfer,
    disk: Disk | None,
    caller: Caller,
    question: Message | None = None,
) -> tuple[Operation, Change]:
    return svc.core.operations.begin(
        f"transfer.{verb}",
        object_kind="transfer",
        object_id=transfer.id,
        object_name=disk.name if disk is not None else transfer.disk_id,
        question=question,
        caller=caller,
    )


async def _places(
    svc: Storage, transfer: Transfer
) -> tuple[Row[Disk, DiskPrivate], Row[StorageDomain, DomainPrivate]]:
    row = await svc.disk(transfer.disk_id)
    return row, await svc.domain(row.public.storage_domain_id)


async def _opening(svc: Storage, transfer_id: str) -> tuple[Transfer, OpenTransfer]:
    found = await TRANSFERS.get(svc.core.pool, transfer_id)
    transfer = found.public
    disk, domain = await _places(svc, transfer)
    left = (transfer.expires_at or utc_now()) - utc_now()
    return transfer, OpenTransfer(
        transfer_id=transfer.id,
        disk_id=transfer.disk_id,
        ticket=svc.vault.open(found.private.ticket),
        direction=transfer.direction,
        source=await svc.source(domain, disk.public),
        size_bytes=transfer.size_bytes if transfer.direction is TransferDirection.UPLOAD else 0,
        format=transfer.format,
        expires_seconds=max(left.total_seconds(), 1.0),
    )


@part.runs("transfer.create", deadline_seconds=86400)
async def opening(svc: Storage, run: Run) -> None:
    transfer_id = run.operation.object_id
    run.undo("transfer", partial(_give_up, svc, transfer_id, run))
    transfer, question = await _opening(svc, transfer_id)
    title = "Open it on its host"
    opened = await run.order("open", title, OPEN_TRANSFER, question, host_id=transfer.host_id)
    await _ready(svc, transfer_id, opened)


async def _ready(svc: Storage, transfer_id: str, opened: TransferOpened) -> None:
    def ready(row: Row[Transfer, TransferPrivate]) -> tuple[Transfer, TransferPrivate]:
        public = replace(
            row.public,
            state="ready",
            size_bytes=opened.size_bytes or row.public.size_bytes,
            received_bytes=opened.received_bytes,
        )
        return public, replace(row.private, data_address=opened.data_address)

    await svc.edit(TRANSFERS, transfer_id, ready)


async def _give_up(svc: Storage, transfer_id: str, run: Run) -> None:
    """Opening failed or was cancelled."""
    problem = run.row.private.failed
    await _end(svc, transfer_id, "failed", problem.message if problem is not None else "it was cancelled")
    await _close(svc, transfer_id)


async def _end(
    svc: Storage, transfer_id: str, state: str, problem: str = "", status: DiskStatus | None = None
) -> None:
    """The transfer is over, and its disk free: with its former status unless another one is said."""

    def over(row: Row[Transfer, TransferPrivate]) -> tuple[Transfer, TransferPrivate]:
        return replace(row.public, state=state, problem=problem), TransferPrivate()

    transfer = (await TRANSFERS.get(svc.core.pool, transfer_id)).public
    await svc.edit(
        DISKS,
        transfer.disk_id,
        lambda row: transfer_model.freed(row, transfer_id, status or row.private.before),
    )
    await svc.edit(TRANSFERS, transfer_id, over)


async def _close(svc: Storage, transfer_id: str) -> None:
    """Have the host drop the ticket and what was received. Best effort: tickets expire by themselves."""
    transfer = (await TRANSFERS.get(svc.core.pool, transfer_id)).public
    try:
        disk, domain = await _places(svc, transfer)
        await svc.core.orders.carry_out(
            FINISH_TRANSFER,
            FinishTransfer(
                transfer_id=transfer_id,
                disk_id=transfer.disk_id,
                target=await svc.source(domain, disk.public),
                max_bytes=0,
                cancel=True,
            ),
            host_id=transfer.host_id,
            object_id=transfer_id,
            timeout_seconds=svc.config.discard_seconds,
        )
    except Refused as refused:
        log.info("transfer %s stays on host %s: %s", transfer_id, transfer.host_id, refused.message)


@part.answers(FINISH_DISK_TRANSFER)
async def finish(svc: Storage, ask: FinishDiskTransfer, caller: Caller) -> Operation:
    sha256 = disk_model.checked_sha256(ask.sha256)
    while True:
        found = await TRANSFERS.get(svc.core.pool, ask.id)
        transfer_model.refuse_not_ready(found.public)
        disk, domain = await _places(svc, found.public)
        domain_model.refuse_unusable(domain.public)
        op, begun = _begin(svc, "finish", found.public, disk.public, caller)
        new = replace(
            found.public,
            state="finishing",
            operation_id=op.id,
            sha256=sha256 or found.public.sha256,
        )
        changes = [TRANSFERS.update(found, new)]
        if found.public.direction is TransferDirection.UPLOAD:
            writer = replace(disk.private, writer_host_id=found.public.host_id)
            changes.append(DISKS.update(disk, replace(disk.public, busy_with=op.id), writer))
        try:
            await svc.core.commit(*changes, begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.runs("transfer.finish", deadline_seconds=86400)
async def finishing(svc: Storage, run: Run) -> None:
    transfer = (await TRANSFERS.get(svc.core.pool, run.operation.object_id)).public
    if transfer.direction is TransferDirection.DOWNLOAD:
        await run.step("close", "Close it on its host", partial(_close, svc, transfer.id))
        await _end(svc, transfer.id, "succeeded")
        return
    run.undo("finish", partial(_unfinished, svc, transfer.id, run))
    disk, domain = await _places(svc, transfer)
    info = await run.order(
        "finish",
        "Check the image and put it into the disk",
        FINISH_TRANSFER,
        FinishTransfer(
            transfer_id=transfer.id,
            disk_id=transfer.disk_id,
            target=await svc.source(domain, disk.public),
            max_bytes=disk.public.size_bytes,
            sha256=transfer.sha256,
            lease=await volume_leases.lease_for(svc, domain, transfer.disk_id, transfer.host_id),
        ),
        host_id=transfer.host_id,
        object_id=transfer.disk_id,
    )
    await _succeed(svc, transfer, info)


async def _succeed(svc: Storage, transfer: Transfer, info: VolumeInfo) -> None:
    def filled(row: Row[Disk, DiskPrivate]) -> tuple[Disk, DiskPrivate]:
        public, private = transfer_model.freed(row, transfer.id, DiskStatus.OK)
        size = public.size_bytes if public.lun >= 0 else max(info.size_bytes, 1)
        public = replace(
            public,
            size_bytes=size,
            used_bytes=info.used_bytes,
            sha256=info.sha256 or transfer.sha256,
        )
        return chain_model.alone(public), private

    await svc.edit(DISKS, transfer.disk_id, filled)

    def over(row: Row[Transfer, TransferPrivate]) -> tuple[Transfer, TransferPrivate]:
        public = replace(
            row.public,
            state="succeeded",
            problem="",
            received_bytes=row.public.size_bytes,
            sha256=info.sha256 or row.public.sha256,
        )
        return public, TransferPrivate()

    await svc.edit(TRANSFERS, transfer.id, over)


async def _unfinished(svc: Storage, transfer_id: str, run: Run) -> None:
    """Finishing failed: an upload that only lacks bytes goes on; any other is over."""
    failed = run.row.private.failed
    if failed is None or run.row.private.cancelled:
        refused = Refused(Kind.CONFLICT, "finishing it was cancelled")
    else:
        refused = Refused(failed.kind, failed.message, **failed.details)
    if transfer_model.is_incomplete(refused):

        def again(row: Row[Transfer, TransferPrivate]) -> tuple[Transfer, TransferPrivate]:
            received = int(refused.details["received_bytes"])
            return replace(row.public, state="ready", received_bytes=received), row.private

        await svc.edit(TRANSFERS, transfer_id, again)
        return
    transfer = (await TRANSFERS.get(svc.core.pool, transfer_id)).public
    disk, domain = await _places(svc, transfer)
    in_place = domain.public.kind is DomainKind.ISCSI
    status = transfer_model.after_failure(refused.kind, disk.private.before, in_place)
    await _close(svc, transfer_id)
    await _end(svc, transfer_id, "failed", refused.message, status)


@part.answers(CANCEL_TRANSFER)
async def cancel(svc: Storage, ask: GetById, caller: Caller) -> Operation:
    while True:
        found = await TRANSFERS.get(svc.core.pool, ask.id)
        transfer_model.refuse_not_ready(found.public)
        op, changes = await _cancelling(svc, found, caller, "")
        try:
            await svc.core.commit(*changes, caller=caller, answer=op)
        except Stale:
            continue
        return op


async def _cancelling(
    svc: Storage, found: Row[Transfer, TransferPrivate], caller: Caller, problem: str
) -> tuple[Operation, list[Change]]:
    disk = await DISKS.find(svc.core.pool, found.public.disk_id)
    public = None if disk is None else disk.public
    op, begun = _begin(svc, "cancel", found.public, public, caller, Ended(problem=problem))
    new = replace(found.public, state="finishing", operation_id=op.id)
    return op, [TRANSFERS.update(found, new), begun]


@part.runs("transfer.cancel", deadline_seconds=300)
async def cancelling(svc: Storage, run: Run) -> None:
    """Nothing of an upload is in the disk before it is finished: the disk is free at once."""
    transfer_id, problem = run.operation.object_id, run.input(Ended).problem
    await run.step("close", "Close it on its host", partial(_close, svc, transfer_id))
    await _end(svc, transfer_id, "cancelled", problem)


@part.every(30.0)
async def expire(svc: Storage) -> None:
    """Transfers whose time is up are cancelled; ended ones are forgotten after a week."""
    for found in await svc.store.expired_transfers():
        if found.public.state != "ready":
            continue
        _, changes = await _cancelling(svc, found, Caller("service:storage"), "its time was up")
        await svc.core.commit(*changes)
    for found in await svc.store.old_transfers():
        await svc.core.commit(TRANSFERS.delete(found))


@part.leader_answers(FIND_TRANSFER_ENDPOINT)
async def endpoint(svc: Storage, ask: FindTransferEndpoint, caller: Caller) -> TransferEndpoint:
    found = await TRANSFERS.get(svc.core.pool, ask.id)
    transfer_model.refuse_not_ready(found.public)
    if ask.again:
        await _reopen(svc, ask.id)
        found = await TRANSFERS.get(svc.core.pool, ask.id)
    host = await svc.store.host(found.public.host_id)
    return TransferEndpoint(
        ticket=svc.vault.open(found.private.ticket),
        data_address=(host.data_address if host is not None else "") or found.private.data_address,
        direction=found.public.direction,
        size_bytes=found.public.size_bytes,
    )


async def _reopen(svc: Storage, transfer_id: str) -> None:
    """The host's agent was restarted and knows the ticket no more; what came of an upload is still there."""
    transfer, question = await _opening(svc, transfer_id)
    opened = await svc.core.orders.carry_out(
        OPEN_TRANSFER,
        question,
        host_id=transfer.host_id,
        object_id=transfer_id,
        timeout_seconds=REOPEN_SECONDS,
    )
    await _ready(svc, transfer_id, opened)


@part.answers(GET_TRANSFER)
async def get(svc: Storage, ask: GetById, caller: Caller) -> Any:
    return await TRANSFERS.raw(svc.core.pool, ask.id)


@part.answers(LIST_TRANSFERS)
async def listed(svc: Storage, ask: ListQuery, caller: Caller) -> Any:
    return await page(svc.core.pool, TRANSFERS, ask)


async def release(svc: Storage, operation: Operation) -> Sequence[Change]:
    """What frees the disk of an ended operation."""
    found = await TRANSFERS.find(svc.core.pool, operation.object_id)
    if found is None:
        return ()
    row = await DISKS.find(svc.core.pool, found.public.disk_id)
    if row is None or row.public.busy_with != operation.id:
        return ()
    return [DISKS.update(row, replace(row.public, busy_with=""))]
