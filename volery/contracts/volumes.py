"""Volumes: the files, or the LUN, that a disk's content is in, one above the other; and snapshots of disks.

What is written to a disk goes into its uppermost volume, its leaf; what isn't there is read from the one below. A volume
with another one above it never changes any more: it is the disk as it was at some time.
"""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Call, Message
from volery.contracts.domain import ImageFormat
from volery.contracts.operation import Operation


class VolumeState(StrEnum):
    NEW = "new"
    """It is being made; nothing reads it yet."""
    OK = "ok"
    MERGING = "merging"
    """What it has is being put into the one below it, which will then be in its place. Until then all is read as before, but
    the one below may hold some of it already: by itself it is what the disk never was."""
    REMOVING = "removing"
    """Nothing reads it any more; it is removed as soon as its host can."""


IN_CHAIN = frozenset({VolumeState.OK, VolumeState.MERGING})


class Volume(Message):
    id: str
    """Its file is `{id}.{format}`."""
    parent_id: str = ""
    """The one below; "" is none."""
    state: VolumeState = VolumeState.OK
    format: ImageFormat = ImageFormat.QCOW2
    size_bytes: int = 0
    """Virtual size when it was made, or grown while it was the leaf."""
    used_bytes: int = 0
    """As hosts report it."""
    snapshot_id: str = ""
    """The snapshot that it belongs to: it is the disk as it was then."""
    made_by: str = ""
    """The operation; "" is the one that made the disk."""
    host_id: str = ""
    """Which made it, and removes it."""


class SnapshotDisks(Message):
    """A new volume above each of these disks, for all of them or none: what they hold now belongs to the snapshot.

    Refused while another VM than `vm_id` runs with one of them.
    """

    snapshot_id: str
    """Chosen by who asks; a disk's volumes say it."""
    disk_ids: tuple[str, ...]
    name: str = ""
    """How people know what it is for."""
    vm_id: str = ""
    """May run with them, and then goes on in the new volumes, in all of them at one point in time."""


class ForgetSnapshot(Message):
    """The disks stay as they are, and what they were at the snapshot is gone: of each, the volume above is merged into it.

    Refused(not_found) when no disk has a volume of the snapshot; refused while a VM runs with one of them.
    """

    snapshot_id: str
    name: str = ""


class RevertDisks(Message):
    """The disks are what they were at the snapshot again; what was written since is gone. All of them or none.

    Refused with rule `newer` while there are newer snapshots of one of them.
    """

    snapshot_id: str
    name: str = ""


SNAPSHOT_DISKS = Call("storage.snapshot.create", SnapshotDisks, Operation, mutates=True)
FORGET_SNAPSHOT = Call("storage.snapshot.forget", ForgetSnapshot, Operation, mutates=True)
REVERT_DISKS = Call("storage.snapshot.revert", RevertDisks, Operation, mutates=True)
