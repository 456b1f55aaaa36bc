"""Start groups: which VMs are brought back before which others."""

from __future__ import annotations

from enum import StrEnum

from msgspec import UNSET, UnsetType

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.operation import ListQuery, Page


class WaitFor(StrEnum):
    """What later groups wait for, of every VM of this one that is being brought back."""

    RUNS = "runs"
    """Its QEMU runs."""
    GUEST_AGENT = "guest_agent"
    """Its guest agent answers."""
    TIME = "time"
    """`wait_seconds` have passed."""


class StartGroup(Entity):
    """VMs that ha brings back before those of later groups. What people start waits for nobody."""

    name: str
    cluster_id: str
    vm_ids: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    """Groups that come before it."""
    wait_for: WaitFor = WaitFor.RUNS
    wait_seconds: float = 600.0
    """Later groups wait for this one no longer; 0 to 600."""


class CreateStartGroup(Message):
    name: str
    cluster_id: str
    vm_ids: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    wait_for: WaitFor = WaitFor.RUNS
    wait_seconds: float = 600.0


class UpdateStartGroup(Message):
    """Unset fields stay."""

    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    vm_ids: tuple[str, ...] | UnsetType = UNSET
    after: tuple[str, ...] | UnsetType = UNSET
    wait_for: WaitFor | UnsetType = UNSET
    wait_seconds: float | UnsetType = UNSET


CREATE_START_GROUP = Call("ha.start_group.create", CreateStartGroup, StartGroup, mutates=True)
UPDATE_START_GROUP = Call("ha.start_group.update", UpdateStartGroup, StartGroup, mutates=True)
DELETE_START_GROUP = Call("ha.start_group.delete", DeleteById, Done, mutates=True)
GET_START_GROUP = Call("ha.start_group.get", GetById, StartGroup)
LIST_START_GROUPS = Call("ha.start_group.list", ListQuery, Page)

START_GROUP_CHANGED = Fact("fact.ha.start_group.{id}.changed", StartGroup)
START_GROUP_DELETED = Fact("fact.ha.start_group.{id}.deleted", StartGroup)
