"""What storage may order a host to do with storage domains, volumes and image transfers."""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.agent import StorageDomainReport
from volery.contracts.base import Done, Message, Order
from volery.contracts.domain import (
    ChainSource,
    DomainLease,
    FileSource,
    ImageFormat,
    IscsiSource,
    VolumeSource,
)


class DirectoryLocation(Message, tag="directory"):
    """A directory that the administrator mounted (or that is local to one host)."""

    path: str


class IscsiLocation(Message, tag="iscsi"):
    portal: str
    iqn: str
    chap_user: str = ""
    chap_password: str = ""


StorageLocation = DirectoryLocation | IscsiLocation


class ConnectStorage(Message):
    """Make the storage usable on this host and say what is there. Writes the domain's marker file when `initialise`."""

    domain_id: str
    location: StorageLocation
    initialise: bool = False
    known: tuple[str, ...] = ()
    """Paths or LUN numbers that disks of ours explain; anything else found is a stranger."""


class DisconnectStorage(Message):
    domain_id: str
    remove: bool = False
    """Also remove the directory domain's own directory with its marker, unless there is a volume or a stranger in it."""
    path: str = ""
    """With `remove`: the domain's path, for a host on which connecting failed half-way."""


class DiscoverIscsi(Message):
    portal: str
    chap_user: str = ""
    chap_password: str = ""


class DiscoveredLun(Message):
    lun: int
    size_bytes: int
    product: str = ""


class DiscoveredTarget(Message):
    iqn: str
    portal: str
    luns: tuple[DiscoveredLun, ...] = ()
    problem: str = ""
    """Why its LUNs could not be listed, e.g. CHAP refused."""


class IscsiTargets(Message):
    targets: tuple[DiscoveredTarget, ...] = ()


class ClaimLun(Message):
    """Prove that a LUN may become this disk's: nobody on the host has it open, and it reads as zeros from end to end.

    Refused(conflict) with rule `lun_open`, `lun_content`, or `lun_claimed` when the host knows of a later claim.
    `overwrite` makes it blank instead of looking.
    """

    disk_id: str
    source: IscsiSource
    size_bytes: int
    claim: int
    """Counts the disks that this LUN was given to, in its owner's database."""
    overwrite: bool = False


class CreateVolume(Message):
    """`disk_id` names what is locked and leased, here and below; `volume_id` the file, "" where it has the disk's id."""

    disk_id: str
    source: VolumeSource
    size_bytes: int
    preallocate: bool = False
    check_bytes: int = 0
    lease: DomainLease | None = None
    """Held by every program that writes; made if it isn't there. None: the domain holds none, or the host has not joined."""


class ResizeVolume(Message):
    disk_id: str
    source: VolumeSource
    size_bytes: int
    lease: DomainLease | None = None
    volume_id: str = ""


class DeleteVolume(Message):
    """A volume that isn't there is a success. `wipe` overwrites its blocks with zeros first.

    A LUN always ends up blank: without `wipe` its blocks are given back to the target (unmap) where that means zeros.
    """

    disk_id: str
    source: VolumeSource
    wipe: bool = False
    lease: DomainLease | None = None
    volume_id: str = ""


class MakeOverlay(Message):
    """An empty volume above another one, from which everything is read that wasn't written since.

    Refused(conflict) with rule `chain` when the files below aren't above each other as the source says.
    """

    disk_id: str
    volume_id: str
    source: ChainSource
    size_bytes: int
    live: bool = False
    """A VM of this host writes the volume below, and goes on in the new one later."""
    lease: DomainLease | None = None


class MergeVolume(Message):
    """What a volume has is put into the one below it, and what is above it is put above that one. Both then hold the same,
    and the volume isn't needed any more. May be repeated.

    Refused(conflict) with rule `chain` when the files aren't above each other as said.
    """

    disk_id: str
    source: ChainSource
    above: FileSource | None = None
    """The volume above it, if there is one."""
    lease: DomainLease | None = None


class CopyVolume(Message):
    """qemu-img convert, in a child process that ends with the agent's order."""

    disk_id: str
    source: VolumeSource
    target: VolumeSource
    size_bytes: int
    lease: DomainLease | None = None


class ImportVolume(Message):
    """Download an image over http(s) and convert it into the volume."""

    disk_id: str
    url: str
    target: VolumeSource
    max_bytes: int
    sha256: str = ""
    lease: DomainLease | None = None


class InspectVolume(Message):
    """Detect format and sizes, check the image: refused with a backing file, an external data file or an absurd size."""

    disk_id: str
    source: VolumeSource
    max_bytes: int = 0


class VolumeInfo(Message):
    size_bytes: int
    used_bytes: int
    format: ImageFormat
    sha256: str = ""


class TransferDirection(StrEnum):
    UPLOAD = "upload"
    DOWNLOAD = "download"


class OpenTransfer(Message):
    """Admit ranged PUT or GET requests under this ticket on the agent's data server.

    Uploads land in a staging file beside the volume; FINISH_TRANSFER checks and converts them.
    """

    transfer_id: str
    disk_id: str
    ticket: str
    direction: TransferDirection
    source: VolumeSource
    size_bytes: int
    """Upload: how many bytes will come. Download: 0."""
    format: ImageFormat = ImageFormat.RAW
    """Download: the format to be sent."""
    expires_seconds: float = 86400.0


class TransferOpened(Message):
    data_address: str
    size_bytes: int
    received_bytes: int = 0
    """Where an interrupted upload goes on."""


class FinishTransfer(Message):
    """Checks size, checksum and image, converts an upload into the volume, and forgets the ticket."""

    transfer_id: str
    disk_id: str
    target: VolumeSource
    max_bytes: int
    sha256: str = ""
    cancel: bool = False
    """Only clean up."""
    lease: DomainLease | None = None


CONNECT_STORAGE = Order("storage.connect", ConnectStorage, StorageDomainReport)
DISCONNECT_STORAGE = Order("storage.disconnect", DisconnectStorage, Done)
DISCOVER_ISCSI = Order("storage.discover_iscsi", DiscoverIscsi, IscsiTargets)
CLAIM_LUN = Order("volume.claim_lun", ClaimLun, VolumeInfo, deadline_seconds=86400)
CREATE_VOLUME = Order("volume.create", CreateVolume, VolumeInfo, deadline_seconds=3600)
RESIZE_VOLUME = Order("volume.resize", ResizeVolume, VolumeInfo)
MAKE_OVERLAY = Order("volume.overlay", MakeOverlay, VolumeInfo)
MERGE_VOLUME = Order("volume.merge", MergeVolume, VolumeInfo, deadline_seconds=86400)
DELETE_VOLUME = Order("volume.delete", DeleteVolume, Done, deadline_seconds=86400)
COPY_VOLUME = Order("volume.copy", CopyVolume, VolumeInfo, deadline_seconds=86400)
IMPORT_VOLUME = Order("volume.import", ImportVolume, VolumeInfo, deadline_seconds=86400)
INSPECT_VOLUME = Order("volume.inspect", InspectVolume, VolumeInfo)
OPEN_TRANSFER = Order("transfer.open", OpenTransfer, TransferOpened, deadline_seconds=86400)
FINISH_TRANSFER = Order("transfer.finish", FinishTransfer, VolumeInfo, deadline_seconds=86400)
