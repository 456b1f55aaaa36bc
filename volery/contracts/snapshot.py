"""Snapshots of VMs: what its disks were at one point in time, and how it was configured then."""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.domain_orders import SwitchDisks
from volery.contracts.operation import ListQuery, Operation, Page
from volery.contracts.vm import Vm


class SnapshotStatus(StrEnum):
    CREATING = "creating"
    OK = "ok"
    DELETING = "deleting"
    BROKEN = "broken"
    """Its deletion was begun and didn't end: the VM is whole, but can't go back to it. Delete it again."""


class FrozenDisk(Message):
    disk_id: str
    name: str
    size_bytes: int
    volume_id: str = ""
    """What the disk was then, when the snapshot was made. Another one may be in its place since an older snapshot went."""


class Snapshot(Entity):
    name: str
    vm_id: str
    status: SnapshotStatus = SnapshotStatus.CREATING
    description: str = ""
    disks: tuple[FrozenDisk, ...] = ()
    configuration: Vm | None = None
    """The VM as it was then. Reverting changes disks only."""


class CreateSnapshot(Message):
    """Of a VM that runs or is down."""

    vm_id: str
    name: str
    description: str = ""
    disk_ids: tuple[str, ...] = ()
    """None: all of its disks but shareable ones."""


class RevertToSnapshot(Message):
    """The snapshot's disks are what they were then; what was written since is gone. Only the VM's newest snapshot of them."""

    id: str
    if_revision: int = 0


SWITCH_VM_DISKS = Call("inventory.vm.switch_disks", SwitchDisks, Done, mutates=True, timeout_seconds=60)
"""storage asks: a VM goes on in volumes above its own, if it runs. Refused with rule `not_switched` when it surely doesn't;
after any other refusal it may."""
CREATE_SNAPSHOT = Call("inventory.snapshot.create", CreateSnapshot, Operation, mutates=True)
REVERT_TO_SNAPSHOT = Call("inventory.snapshot.revert", RevertToSnapshot, Operation, mutates=True)
DELETE_SNAPSHOT = Call("inventory.snapshot.delete", DeleteById, Operation, mutates=True)
GET_SNAPSHOT = Call("inventory.snapshot.get", GetById, Snapshot)
LIST_SNAPSHOTS = Call("inventory.snapshot.list", ListQuery, Page)
SNAPSHOT_CHANGED = Fact("fact.inventory.snapshot.{id}.changed", Snapshot)
SNAPSHOT_DELETED = Fact("fact.inventory.snapshot.{id}.deleted", Snapshot)
