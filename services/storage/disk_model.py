"""What a disk may be and what may be done with it. Pure: no bus, no database, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace as replace_row
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from services.storage.domain_model import BACKENDS, NOT_RUNNING
from services.storage.store import DiskPrivate, VmRow
from volery.contracts import together
from volery.contracts.base import Owner
from volery.contracts.domain import ImageFormat
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.naming import checked_description, checked_id, checked_name, checked_tags
from volery.contracts.storage import (
    ContentType,
    CreateDisk,
    Disk,
    DiskStatus,
    DiskUse,
    DomainKind,
    StorageDomain,
    UpdateDisk,
)
from volery.contracts.together import By, Held, Holder, Thing, Work
from volery.contracts.volumes import VolumeState
from volery.runtime.tables import Row

SECTOR_BYTES = 512
SHA256 = frozenset("0123456789abcdef")
MAX_URL = 2048


def checked(ask: CreateDisk, max_bytes: int) -> CreateDisk:
    """The request in its normal form, as far as it can be checked by itself. Raises Refused(invalid)."""
    ask = replace(
        ask,
        name=checked_name("disk", ask.name),
        description=checked_description(ask.description),
        tags=checked_tags(ask.tags),
        sha256=checked_sha256(ask.sha256),
    )
    checked_id("storage domain", ask.storage_domain_id)
    for noun, value in (("disk", ask.id), ("VM", ask.attach_to), ("disk", ask.copy_of)):
        if value:
            checked_id(noun, value)
    if ask.copy_of and ask.import_url:
        raise invalid("a disk is a copy of another one or imported from a URL, not both", field="import_url")
    if ask.sha256 and not ask.import_url:
        raise invalid("a checksum is only checked together with import_url", field="sha256")
    if ask.import_url:
        checked_url(ask.import_url)
    if ask.size_bytes or not (ask.copy_of or ask.import_url):
        checked_size(ask.size_bytes, max_bytes)
    if ask.content is ContentType.ISO:
        ask = replace(ask, format=ImageFormat.RAW, read_only=True, shareable=False, preallocate=False)
    return ask


def fitted(ask: CreateDisk, domain: StorageDomain) -> CreateDisk:
    """The request as this kind of storage can have it. Raises Refused(invalid)."""
    if not BACKENDS[domain.kind].GROWS:
        if not ask.size_bytes:
            raise invalid(
                f"storage domain {domain.name} gives whole LUNs: say the size of the disk, so that one can be chosen",
                field="size_bytes",
            )
        ask = replace(ask, format=ImageFormat.RAW, preallocate=True)
    refuse_shared_qcow2(ask.shareable, ask.format)
    return ask


def checked_size(size_bytes: int, max_bytes: int) -> None:
    """Raises Refused(invalid) unless it is a whole number of sectors, more than none and no more than allowed."""
    if size_bytes <= 0:
        raise invalid(f"a disk of {size_bytes} bytes can't be: give a size above zero", field="size_bytes")
    if size_bytes % SECTOR_BYTES:
        near = -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
        raise invalid(
            f"a disk has whole sectors of {SECTOR_BYTES} bytes: {size_bytes} isn't such a size, {near} is",
            field="size_bytes",
        )
    if size_bytes > max_bytes:
        raise invalid(
            f"a disk of {size_bytes} bytes is too large: at most {max_bytes} bytes are allowed",
            field="size_bytes",
            max_bytes=max_bytes,
        )


def checked_sha256(text: str) -> str:
    lower = text.lower()
    if lower and (len(lower) != 64 or not SHA256.issuperset(lower)):
        raise invalid("a SHA-256 checksum has 64 hexadecimal digits", field="sha256")
    return lower


def checked_url(url: str) -> None:
    """Raises Refused(invalid) for what isn't an http or https URL, or carries a password, which would be logged."""
    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or 0 < parts.port < 65536
        host, secret = parts.hostname, parts.password or parts.username
    except ValueError:
        raise invalid(f"{url[:200]!r} isn't a URL", field="import_url") from None
    if parts.scheme not in ("http", "https") or not host or not port_is_right:
        raise invalid("images are imported from http:// or https:// URLs", field="import_url")
    if len(url) > MAX_URL or not url.isprintable() or " " in url:
        raise invalid(f"a URL has at most {MAX_URL} printable characters and no blanks", field="import_url")
    if secret:
        raise invalid("a URL to import from can't carry a user or password", field="import_url")


def refuse_shared_qcow2(shareable: bool, format: ImageFormat) -> None:
    if shareable and format is ImageFormat.QCOW2:
        raise invalid(
            "a shareable disk must be raw: two VMs that write one qcow2 file destroy it; choose format raw",
            rule="shareable_raw",
        )


def edited(disk: Disk, ask: UpdateDisk) -> Disk:
    """The disk after an edit. Raises Refused."""
    given = {
        name: value
        for name in ("name", "description", "tags", "shareable", "read_only", "wipe_after_delete")
        if (value := getattr(ask, name)) is not msgspec.UNSET
    }
    new = replace(disk, **given)
    new = replace(
        new,
        name=checked_name("disk", new.name),
        description=checked_description(new.description),
        tags=checked_tags(new.tags),
    )
    if new.content is ContentType.ISO and (new.shareable or not new.read_only):
        raise invalid(
            f"disk {disk.name} is an ISO image: it is always read-only, and any number of VMs may have it"
        )
    if new.shareable and not disk.shareable:
        refuse_shared_qcow2(True, new.format)
        refuse_layers(disk, "made shareable")
    if disk.shareable and not new.shareable and len(disk.uses) > 1:
        raise conflict(
            f"disk {disk.name} is attached to {len(disk.uses)} VMs and must stay shareable: detach it from all but one",
            vms=[use.vm_id for use in disk.uses],
        )
    if new.read_only != disk.read_only and disk.uses:
        raise conflict(
            f"disk {disk.name} is attached: detach it before it is made read-only or writable",
            vms=[use.vm_id for use in disk.uses],
        )
    return new


def refuse_layers(disk: Disk, action: str) -> None:
    """Raises Refused(conflict) for a disk with volumes above each other, or that is about to have them."""
    if disk.depth > 1:
        raise conflict(
            f"disk {disk.name} can't be {action}: it has {disk.depth - 1} snapshots; delete them first, or copy the disk "
            "and use the copy",
            rule="snapshots",
        )
    if any(volume.state is VolumeState.NEW for volume in disk.volumes):
        raise conflict(
            f"disk {disk.name} can't be {action}: a snapshot of it is being made; wait for that, or cancel it",
            rule="snapshots",
        )


def many_users(disk: Disk) -> bool:
    return disk.shareable or disk.content is ContentType.ISO


def attached(disk: Disk, vm_id: str, read_only: bool, vms: Mapping[str, VmRow]) -> Disk:
    """The disk with this VM among its uses. Raises Refused(conflict) when another VM has it. What holds it is another
    question."""
    if any(use.vm_id == vm_id for use in disk.uses):
        return disk
    if disk.uses and not many_users(disk):
        other = disk.uses[0].vm_id
        name = vms[other].name if other in vms else other
        raise conflict(
            f"disk {disk.name} is already attached to VM {name}: detach it there first, or make it shareable",
            vm_id=other,
        )
    use = DiskUse(vm_id=vm_id, read_only=read_only or disk.read_only or disk.content is ContentType.ISO)
    return replace(disk, uses=(*disk.uses, use))


def refuse_unsound(disk: Disk) -> None:
    """Raises Refused unless the disk's content is whole, as far as nothing is being done to it."""
    if disk.status is DiskStatus.ILLEGAL and disk.chain_problem:
        raise conflict(
            f"disk {disk.name} is illegal: {disk.chain_problem}", status=str(disk.status), rule="chain"
        )
    if disk.status is DiskStatus.ILLEGAL:
        raise conflict(
            f"disk {disk.name} is illegal: an upload or copy into it failed, so its content can't be trusted; "
            "upload into it again, or delete it",
            status=str(disk.status),
        )
    if disk.status is DiskStatus.MISSING:
        raise conflict(
            f"disk {disk.name} is missing: its storage says that the volume is gone; bring the volume back, or delete "
            "the disk",
            status=str(disk.status),
        )


WORK_WITH: Mapping[str, Work] = {
    "wait_for_launch": Work.START,
    "restoring_state": Work.START,
    "powering_down": Work.STOP,
    "saving_state": Work.SUSPEND,
    "suspended": Work.SUSPEND,
    "migrating": Work.MIGRATE,
}
"""Status of a VM that may have its disks open → what is done with it; of any other it runs."""


def at_work(row: Row[Disk, DiskPrivate], work: Work | None) -> list[Holder]:
    """What is done with the disk itself. `work`: what the operation does that it is busy with."""
    disk, private = row.public, row.private
    found = [Holder(By.OPERATION, disk.busy_with, work)] if disk.busy_with else []
    if private.transfer_id and not disk.busy_with:
        found.append(Holder(By.TRANSFER, private.transfer_id, Work.UPLOAD))
    return found + [reader(each) for each in private.readers]


def reader(reader_id: str) -> Holder:
    """Of the operation that copies the disk, or the download that reads it."""
    if reader_id.startswith(f"{Owner.STORAGE}-"):
        return Holder(By.OPERATION, reader_id, Work.COPY)
    return Holder(By.TRANSFER, reader_id, Work.DOWNLOAD)


def vms_with(disk: Disk, vms: Mapping[str, VmRow]) -> list[Holder]:
    """VMs that may have the disk open, those that write it first."""
    found = [
        Holder(
            By.VM,
            vm.id,
            WORK_WITH.get(vm.status, Work.RUN),
            name=vm.name,
            reading=use.read_only or disk.read_only,
        )
        for use in disk.uses
        if (vm := vms.get(use.vm_id)) is not None and vm.status not in NOT_RUNNING
    ]
    return sorted(found, key=lambda holder: holder.reading)


def refuse(
    work: Work, disk: Disk, holders: Iterable[Holder], *, done: str = "", reading: bool = False
) -> None:
    """Raises Refused unless this may be done with the disk now."""
    together.refuse(work, Thing(Held.DISK, disk.id, disk.name), holders, done=done, reading=reading)


def why_unready(row: Row[Disk, DiskPrivate]) -> str:
    """Why no VM could start with the disk, or ""; of one that only reads it."""
    try:
        refuse_unsound(row.public)
        refuse(Work.START, row.public, at_work(row, None), reading=True)
    except Refused as refused:
        return refused.message
    return ""


def refuse_attached(disk: Disk, vms: Mapping[str, VmRow], action: str) -> None:
    """Raises Refused(conflict) naming the VMs that have the disk."""
    if disk.uses:
        names = ", ".join(vms[u.vm_id].name if u.vm_id in vms else u.vm_id for u in disk.uses[:5])
        raise conflict(
            f"disk {disk.name} can't be {action}: it is attached to VM {names}; detach it first",
            vms=[use.vm_id for use in disk.uses],
        )


ABOUT_TO_RUN = "about_to_run"
"""The status of a VM that was told where its disks are since the last fact about it: it may run by now."""


def with_begun(vms: Mapping[str, VmRow], rows: Iterable[Row[Disk, DiskPrivate]]) -> dict[str, VmRow]:
    """These VMs, of which those run that were told since where their disks are: the facts that say so may be late."""
    now = dict(vms)
    for row in rows:
        for vm_id, epoch in row.private.begun.items():
            vm = now.get(vm_id) or VmRow(id=vm_id, name=vm_id, host_id="", status=ABOUT_TO_RUN)
            if vm.epoch < epoch:
                vm = replace_row(vm, status=ABOUT_TO_RUN)
            now[vm_id] = vm
    return now


def begun(row: Row[Disk, DiskPrivate], vm_id: str, epoch: int) -> DiskPrivate | None:
    """What is to be noted before this VM may run with the disk; None: nothing more. Of an image that nobody writes but
    its upload nothing is."""
    if row.public.content is ContentType.ISO or row.private.begun.get(vm_id, 0) >= epoch:
        return None
    return replace(row.private, begun={**row.private.begun, vm_id: epoch})


def let_go(row: Row[Disk, DiskPrivate], vm_id: str) -> tuple[Disk, DiskPrivate]:
    """The disk, which this VM doesn't have any more."""
    uses = tuple(use for use in row.public.uses if use.vm_id != vm_id)
    left = {other: epoch for other, epoch in row.private.begun.items() if other != vm_id}
    return replace(row.public, uses=uses), replace(row.private, begun=left)


def running_vm(disk: Disk, vms: Mapping[str, VmRow]) -> VmRow | None:
    """A VM that may have the disk open now."""
    known = (vms[use.vm_id] for use in disk.uses if use.vm_id in vms)
    return next((vm for vm in known if vm.status not in NOT_RUNNING), None)


def refuse_shrinking(disk: Disk, size_bytes: int) -> None:
    if size_bytes < disk.size_bytes:
        raise invalid(
            f"disk {disk.name} has {disk.size_bytes} bytes and only grows: {size_bytes} would cut off what is "
            "behind the new end",
            size_bytes=disk.size_bytes,
        )


def refuse_beyond_lun(disk: Disk, domain: StorageDomain, size_bytes: int) -> None:
    if domain.kind is not DomainKind.ISCSI:
        return
    has = next((lun.size_bytes for lun in domain.luns if lun.lun == disk.lun), 0)
    if size_bytes > has:
        raise Refused(
            Kind.EXHAUSTED,
            f"LUN {disk.lun} of {domain.iqn} has {has} bytes, so disk {disk.name} can't grow to {size_bytes}: "
            "make the LUN larger on the target and refresh the domain first",
            rule="lun",
            lun_bytes=has,
        )
