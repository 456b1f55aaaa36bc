"""Storage domains, disks, and the transfer of images. Statuses after oVirt's."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from msgspec import UNSET, UnsetType

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.domain import DomainDisk, DomainLease, ImageFormat
from volery.contracts.leases import (
    DEFAULT_IO_TIMEOUT_SECONDS,
    HostLeaseReadings,
    LockspaceReport,
    Watchdog,
)
from volery.contracts.operation import ListQuery, Operation, Page
from volery.contracts.together import Work
from volery.contracts.volume_orders import DiscoveredTarget, TransferDirection
from volery.contracts.volumes import Volume


class DomainKind(StrEnum):
    DIRECTORY = "directory"
    """A directory: local to one host, or shared and mounted at the same path on all."""
    ISCSI = "iscsi"
    """A target whose LUNs QEMU reaches itself; one disk takes one LUN."""


class DomainStatus(StrEnum):
    UNATTACHED = "unattached"
    ACTIVATING = "activating"
    ACTIVE = "active"
    INACTIVE = "inactive"
    """Attached, but no host reaches it."""
    MAINTENANCE = "maintenance"


class Lun(Message):
    lun: int
    size_bytes: int
    disk_id: str = ""
    """The disk that has it."""
    withheld: str = ""
    """Why no disk gets it though none has it: somebody has it open, or there is something on it. Both "": free."""


class StorageDomain(Entity):
    name: str
    kind: DomainKind
    data_center_id: str = ""
    """"" until attached."""
    status: DomainStatus = DomainStatus.UNATTACHED
    description: str = ""
    tags: tuple[str, ...] = ()
    path: str = ""
    """Directory."""
    host_id: str = ""
    """The one host of a local directory; "" is shared."""
    portal: str = ""
    iqn: str = ""
    chap_user: str = ""
    luns: tuple[Lun, ...] = ()
    capacity_bytes: int = 0
    available_bytes: int = 0
    committed_bytes: int = 0
    """What its disks may grow to."""
    host_ids: tuple[str, ...] = ()
    """Hosts that reach it now."""
    unreachable: dict[str, str] = {}
    """Host → why it doesn't."""
    lost: dict[str, str] = {}
    """Host → why it has not reached it for a while, though another host of its cluster does: it is non-operational until it
    has reached it again for a while."""
    strangers: tuple[str, ...] = ()
    """Found there, explained by no disk of ours; never deleted. LUNs as `lun 7`; `luns` says why."""
    busy_with: str = ""
    leases: bool = False
    """VMs can have a lease here: its hosts join a lockspace (sanlock), those that can."""
    lease_io_timeout_seconds: int = DEFAULT_IO_TIMEOUT_SECONDS
    """sanlock's io_timeout: what a host held is free for others 8 of these + 60 s after its last renewal."""
    reset_hosts: bool = False
    """The watchdog resets a host that can't renew its lease here, with all its VMs: then its expired lease proves that
    the host is dead."""
    lease_host_ids: tuple[str, ...] = ()
    """Hosts that have joined the lockspace, so that VMs can hold their lease there."""
    lease_problems: dict[str, str] = {}
    """Host → why it has not joined."""


class CreateStorageDomain(Message):
    name: str
    kind: DomainKind
    data_center_id: str = ""
    """Attach and activate it at once."""
    description: str = ""
    tags: tuple[str, ...] = ()
    path: str = ""
    host_id: str = ""
    portal: str = ""
    iqn: str = ""
    chap_user: str = ""
    chap_password: str = ""
    leases: bool | UnsetType = UNSET
    """Unsaid: a directory that no host has for itself holds them if it is attached at once, and at least two of the data
    center's hosts are up and all of these can hold leases."""
    lease_io_timeout_seconds: int = DEFAULT_IO_TIMEOUT_SECONDS
    reset_hosts: bool = False


class UpdateStorageDomain(Message):
    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET
    leases: bool | UnsetType = UNSET
    """Not off while a VM has its lease there."""
    lease_io_timeout_seconds: int | UnsetType = UNSET
    """Only while leases are off."""
    reset_hosts: bool | UnsetType = UNSET


class AttachStorageDomain(Message):
    id: str
    data_center_id: str
    if_revision: int = 0


class ActOnStorageDomain(Message):
    """activate, maintain, detach, refresh"""

    id: str
    action: str
    if_revision: int = 0


class DeleteStorageDomain(Message):
    """Only an unattached domain without disks; `destroy` forgets one in maintenance together with its disks and leaves
    the storage alone: for a storage that is lost."""

    id: str
    if_revision: int = 0
    destroy: bool = False


class DiscoverTargets(Message):
    """What an iSCSI portal offers, as seen from a host ("" is any that is up)."""

    portal: str
    host_id: str = ""
    chap_user: str = ""
    chap_password: str = ""


class Targets(Message):
    targets: tuple[DiscoveredTarget, ...] = ()


class DiskStatus(StrEnum):
    LOCKED = "locked"
    """An operation is making or changing it."""
    OK = "ok"
    ILLEGAL = "illegal"
    """Its content can't be trusted: an upload or copy failed half-way. Upload into it again, or delete it."""
    MISSING = "missing"
    """The storage says that it is gone."""


class ContentType(StrEnum):
    DATA = "data"
    ISO = "iso"


class DiskUse(Message):
    vm_id: str
    read_only: bool = False


class Disk(Entity):
    name: str
    storage_domain_id: str
    data_center_id: str = ""
    status: DiskStatus = DiskStatus.LOCKED
    description: str = ""
    tags: tuple[str, ...] = ()
    content: ContentType = ContentType.DATA
    format: ImageFormat = ImageFormat.QCOW2
    size_bytes: int = 0
    """Virtual size."""
    used_bytes: int = 0
    preallocated: bool = False
    shareable: bool = False
    read_only: bool = False
    wipe_after_delete: bool = False
    lun: int = -1
    uses: tuple[DiskUse, ...] = ()
    """VMs it is attached to; one at most unless shareable."""
    sha256: str = ""
    """Of the last upload or import, as it came."""
    busy_with: str = ""
    volumes: tuple[Volume, ...] = ()
    """From its base to its leaf, which is written; then those that are being made or removed."""
    leaf_id: str = ""
    depth: int = 1
    """How many volumes are above each other."""
    chain_problem: str = ""
    """How its files differ from that. Such a disk is illegal: nothing opens it until they were put right."""


class CreateDisk(Message):
    name: str
    storage_domain_id: str
    size_bytes: int = 0
    """0 only with copy_of or import_url: the source's size."""
    description: str = ""
    tags: tuple[str, ...] = ()
    content: ContentType = ContentType.DATA
    format: ImageFormat = ImageFormat.QCOW2
    preallocate: bool = False
    shareable: bool = False
    read_only: bool = False
    wipe_after_delete: bool = False
    copy_of: str = ""
    import_url: str = ""
    sha256: str = ""
    """Expected, with import_url."""
    lun: int = -1
    """This LUN of an iSCSI domain; -1 is the smallest free one that is large enough."""
    overwrite: bool = False
    """With `lun`: destroy what is on it, though no disk explains it. Never while somebody has it open."""
    id: str = ""
    """Chosen by a service that must name it beforehand; people leave it empty."""
    attach_to: str = ""
    """Internal: the VM that it is made for."""
    dry_run: bool = False


class UpdateDisk(Message):
    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET
    shareable: bool | UnsetType = UNSET
    read_only: bool | UnsetType = UNSET
    wipe_after_delete: bool | UnsetType = UNSET


class ResizeDisk(Message):
    """Only grows. Online when a VM runs with it."""

    id: str
    size_bytes: int
    if_revision: int = 0


class CopyDisk(Message):
    id: str
    name: str
    storage_domain_id: str = ""
    format: ImageFormat | None = None


class Transfer(Entity):
    """An upload into or download from a disk, through `/api/v1/transfers/{id}/data`."""

    disk_id: str
    direction: TransferDirection
    state: str = "opening"
    """opening, ready, finishing, succeeded, failed, cancelled"""
    size_bytes: int = 0
    received_bytes: int = 0
    format: ImageFormat = ImageFormat.RAW
    sha256: str = ""
    problem: str = ""
    host_id: str = ""
    expires_at: datetime | None = None
    operation_id: str = ""


class CreateTransfer(Message):
    """Upload: `size_bytes` is how many bytes will come. Download: `format` is how they are sent."""

    disk_id: str
    direction: TransferDirection
    size_bytes: int = 0
    format: ImageFormat = ImageFormat.RAW
    sha256: str = ""


class FinishDiskTransfer(Message):
    id: str
    sha256: str = ""


class FindTransferEndpoint(Message):
    """`again` when the host no longer knows the ticket (its agent was restarted): it is admitted once more first."""

    id: str
    again: bool = False


class TransferEndpoint(Message):
    """Where the gateway sends the bytes; clients never see it."""

    ticket: str
    data_address: str
    direction: TransferDirection
    size_bytes: int


# --- what inventory asks on behalf of a VM ---------------------------------------------------------


class AttachDiskTo(Message):
    """Reserve a disk for a VM: refused when another has it. Idempotent per (disk, vm)."""

    disk_id: str
    vm_id: str
    read_only: bool = False


class DetachDiskFrom(Message):
    """A disk that the VM doesn't have is a success."""

    disk_id: str
    vm_id: str


class PrepareDisks(Message):
    """Where these disks are, as seen from this host. Refused when the host doesn't reach one of them.

    From the answer on the VM counts as running with them, until inventory announces that it has ended under this epoch, or
    a later one.
    """

    vm_id: str
    host_id: str
    disk_ids: tuple[str, ...]
    epoch: int = 0
    """Of the placement that they are for; 0 of a former release, for which nothing is noted."""
    work: Work = Work.START
    """What the VM is to open them for."""


class PreparedDisks(Message):
    disks: tuple[DomainDisk, ...]
    """With source, read_only, shareable, shared_storage set; device fields are inventory's."""


class ReachDisks(Message):
    """Which hosts reach all of these disks, and can hold a lease? For placement."""

    disk_ids: tuple[str, ...]
    lease_domain_id: str = ""
    """Where the VM's lease is; "" is none."""


class DiskReach(Message):
    any_host: bool
    """No disk restricts it."""
    host_ids: tuple[str, ...] = ()
    domain_ids: tuple[str, ...] = ()
    unready: dict[str, Any] = {}
    """Disk → why it can't be used now."""
    local_host_id: str = ""
    """The one host whose local directory holds one of them."""
    lease_problem: str = ""
    """Why no host can hold the lease."""


class ReachDisksOfMany(Message):
    """The same for several sets of disks, such as those of several VMs."""

    sets: tuple[tuple[str, ...], ...]


class DiskReaches(Message):
    """In the order of the questions."""

    reaches: tuple[DiskReach, ...] = ()


class PrepareLease(Message):
    """The VM's lease in this domain, made if need be, for a host that is about to run it. Refused unless the host has
    joined the lockspace."""

    storage_domain_id: str
    vm_id: str
    host_id: str


class ReleaseLease(Message):
    """The VM needs its lease there no more: it is removed as soon as a host can. One that isn't there is a success."""

    storage_domain_id: str
    vm_id: str


class ReadHostLeases(Message):
    """Have another host read this host's leases on the storage, now: those that can prove its death."""

    host_id: str
    reader_ids: dict[str, str] = {}
    """Storage domain → who read it before: readings of one reader alone can be compared."""


class HostLeaseSeen(Message):
    """One reading, and what the boot that holds the lease had reported."""

    storage_domain_id: str
    storage_domain_name: str
    boot_id: str
    """That had joined with `joined.generation`."""
    joined: LockspaceReport
    watchdog: Watchdog
    """Of that boot."""
    reader_id: str
    readings: HostLeaseReadings | None = None
    """None: it could not be read, which proves nothing."""
    problem: str = ""
    """Why not."""


class HostLeases(Message):
    leases: tuple[HostLeaseSeen, ...] = ()
    """Empty: no lease of this host could prove anything."""


class FindLeaseProofs(Message):
    """ha to storage: whose death could an expired lease prove?"""


class LeaseProofs(Message):
    domains: dict[str, str] = {}
    """Host → name of the storage domain whose lease could, as things are now: it resets the host, whose watchdog can't be
    outlived, and another host that is up could read it."""


CREATE_STORAGE_DOMAIN = Call("storage.domain.create", CreateStorageDomain, Operation, mutates=True)
UPDATE_STORAGE_DOMAIN = Call("storage.domain.update", UpdateStorageDomain, StorageDomain, mutates=True)
ATTACH_STORAGE_DOMAIN = Call("storage.domain.attach", AttachStorageDomain, Operation, mutates=True)
ACT_ON_STORAGE_DOMAIN = Call("storage.domain.act", ActOnStorageDomain, Operation, mutates=True)
DELETE_STORAGE_DOMAIN = Call("storage.domain.delete", DeleteStorageDomain, Done, mutates=True)
GET_STORAGE_DOMAIN = Call("storage.domain.get", GetById, StorageDomain)
LIST_STORAGE_DOMAINS = Call("storage.domain.list", ListQuery, Page)
DISCOVER_TARGETS = Call("storage.iscsi.discover", DiscoverTargets, Targets, timeout_seconds=30)
STORAGE_DOMAIN_CHANGED = Fact("fact.storage.domain.{id}.changed", StorageDomain)
STORAGE_DOMAIN_DELETED = Fact("fact.storage.domain.{id}.deleted", StorageDomain)

CREATE_DISK = Call("storage.disk.create", CreateDisk, Operation, mutates=True)
UPDATE_DISK = Call("storage.disk.update", UpdateDisk, Disk, mutates=True)
RESIZE_DISK = Call("storage.disk.resize", ResizeDisk, Operation, mutates=True)
COPY_DISK = Call("storage.disk.copy", CopyDisk, Operation, mutates=True)
DELETE_DISK = Call("storage.disk.delete", DeleteById, Operation, mutates=True)
GET_DISK = Call("storage.disk.get", GetById, Disk)
LIST_DISKS = Call("storage.disk.list", ListQuery, Page)
DISK_CHANGED = Fact("fact.storage.disk.{id}.changed", Disk)
DISK_DELETED = Fact("fact.storage.disk.{id}.deleted", Disk)

CREATE_TRANSFER = Call("storage.transfer.create", CreateTransfer, Operation, mutates=True)
FINISH_DISK_TRANSFER = Call("storage.transfer.finish", FinishDiskTransfer, Operation, mutates=True)
CANCEL_TRANSFER = Call("storage.transfer.cancel", GetById, Operation, mutates=True)
GET_TRANSFER = Call("storage.transfer.get", GetById, Transfer)
LIST_TRANSFERS = Call("storage.transfer.list", ListQuery, Page)
FIND_TRANSFER_ENDPOINT = Call(
    "storage.transfer.endpoint", FindTransferEndpoint, TransferEndpoint, timeout_seconds=30
)
TRANSFER_CHANGED = Fact("fact.storage.transfer.{id}.changed", Transfer)
TRANSFER_DELETED = Fact("fact.storage.transfer.{id}.deleted", Transfer)

ATTACH_DISK_TO = Call("storage.disk.attach", AttachDiskTo, Disk, mutates=True)
DETACH_DISK_FROM = Call("storage.disk.detach", DetachDiskFrom, Done, mutates=True)
PREPARE_DISKS = Call("storage.disk.prepare", PrepareDisks, PreparedDisks)
REACH_DISKS = Call("storage.disk.reach", ReachDisks, DiskReach)
REACH_DISKS_OF_MANY = Call("storage.disk.reach_of_many", ReachDisksOfMany, DiskReaches, timeout_seconds=20)

PREPARE_LEASE = Call("storage.lease.prepare", PrepareLease, DomainLease, timeout_seconds=30)
RELEASE_LEASE = Call("storage.lease.release", ReleaseLease, Done, mutates=True)
READ_HOST_LEASES = Call("storage.lease.read_host", ReadHostLeases, HostLeases, timeout_seconds=20)
FIND_LEASE_PROOFS = Call("storage.lease.find_proofs", FindLeaseProofs, LeaseProofs)
