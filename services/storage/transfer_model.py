"""What may be uploaded and downloaded when, and what a disk is afterwards. Pure: no bus, no database, no clock."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from services.storage import disk_model
from services.storage.store import DiskPrivate
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.naming import checked_id
from volery.contracts.storage import CreateTransfer, Disk, DiskStatus, Transfer
from volery.contracts.together import Holder, Work
from volery.contracts.volume_orders import TransferDirection
from volery.runtime.tables import Row

OPEN = frozenset({"opening", "ready", "finishing"})
OVERHEAD_BYTES = 64 * 1024**2
"""What an image's own tables may take beside its content, with a sixteenth of it."""
UNTOUCHED = frozenset({Kind.INVALID, Kind.MISMATCH, Kind.TOO_LARGE, Kind.NOT_FOUND})
"""Refusals that come before a byte of the volume is written."""


def checked(ask: CreateTransfer) -> CreateTransfer:
    """Raises Refused(invalid)."""
    checked_id("disk", ask.disk_id)
    if ask.direction is TransferDirection.DOWNLOAD:
        if ask.size_bytes or ask.sha256:
            raise invalid("a download has neither size_bytes nor sha256: the answer tells its size")
        return ask
    if ask.size_bytes <= 0:
        raise invalid("say in size_bytes how many bytes will be uploaded", field="size_bytes")
    return replace(ask, sha256=disk_model.checked_sha256(ask.sha256))


def refuse_upload(row: Row[Disk, DiskPrivate], size_bytes: int, holders: Sequence[Holder]) -> None:
    """Raises Refused unless the disk's content may be replaced now. An illegal disk is cured by a good upload."""
    disk = row.public
    disk_model.refuse(Work.UPLOAD, disk, holders)
    if disk.status is not DiskStatus.ILLEGAL:
        disk_model.refuse_unsound(disk)
    disk_model.refuse_layers(disk, "uploaded into")
    limit = disk.size_bytes + disk.size_bytes // 16 + OVERHEAD_BYTES
    if size_bytes > limit:
        raise Refused(
            Kind.TOO_LARGE,
            f"an image of {size_bytes} bytes is larger than disk {disk.name} ({disk.size_bytes} bytes) can hold: make "
            "the disk larger first",
            max_bytes=limit,
        )


def refuse_download(row: Row[Disk, DiskPrivate], holders: Sequence[Holder]) -> None:
    """Raises Refused while anything may write the disk."""
    disk_model.refuse_unsound(row.public)
    disk_model.refuse(Work.DOWNLOAD, row.public, holders)


def refuse_not_ready(transfer: Transfer) -> None:
    """Raises Refused unless bytes may flow, or the transfer be finished."""
    if transfer.state == "ready":
        return
    if transfer.state in ("opening", "finishing"):
        raise conflict(
            f"transfer {transfer.id} is {transfer.state}: wait for operation {transfer.operation_id}",
            operation=transfer.operation_id,
        )
    raise Refused(
        Kind.GONE,
        f"transfer {transfer.id} has {transfer.state}"
        + (f": {transfer.problem}" if transfer.problem else "")
        + "; make a new one",
        state=transfer.state,
    )


def is_incomplete(refused: Refused) -> bool:
    """Whether a finish was refused only because bytes are missing: the upload can go on."""
    return refused.kind is Kind.CONFLICT and "received_bytes" in refused.details


def freed(row: Row[Disk, DiskPrivate], transfer_id: str, status: DiskStatus) -> tuple[Disk, DiskPrivate]:
    """The disk without the transfer that held it."""
    private, public = row.private, row.public
    if private.transfer_id == transfer_id:
        public = replace(public, status=status)
        private = replace(private, transfer_id="")
    return public, replace(private, readers=tuple(r for r in private.readers if r != transfer_id))


def after_failure(kind: Kind, before: DiskStatus, in_place: bool) -> DiskStatus:
    """What a disk is when finishing an upload into it failed. A file is replaced whole or not at all; a LUN is
    overwritten in place."""
    if in_place and kind not in UNTOUCHED:
        return DiskStatus.ILLEGAL
    return before
