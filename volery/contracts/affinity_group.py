"""Affinity groups: which VMs run together or apart, and on which hosts."""

from __future__ import annotations

from enum import StrEnum

from msgspec import UNSET, UnsetType

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.operation import ListQuery, Page


class AffinityRule(StrEnum):
    """Of VMs to one another, or of VMs to hosts."""

    POSITIVE = "positive"
    """All on one host; or only on the group's hosts."""
    NEGATIVE = "negative"
    """Each on another host; or on none of the group's hosts."""
    DISABLED = "disabled"


class AffinityGroup(Entity):
    """VMs and hosts of one cluster, and how they belong together (oVirt's affinity group). An enforcing rule is kept by
    every start and migration; one that isn't is a wish."""

    name: str
    cluster_id: str
    description: str = ""
    priority: float = 1.0
    """Which wish counts more where not all can be kept; 0 to 1000, higher first."""
    vm_rule: AffinityRule = AffinityRule.DISABLED
    vm_enforcing: bool = True
    host_rule: AffinityRule = AffinityRule.DISABLED
    host_enforcing: bool = True
    vm_ids: tuple[str, ...] = ()
    host_ids: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    """A sentence for each way in which running VMs break its rules now, since they ran before it or it is a wish."""
    warnings: tuple[str, ...] = ()
    """What will keep some of its VMs from running at the same time."""


class CreateAffinityGroup(Message):
    name: str
    cluster_id: str
    description: str = ""
    priority: float = 1.0
    vm_rule: AffinityRule = AffinityRule.DISABLED
    vm_enforcing: bool = True
    host_rule: AffinityRule = AffinityRule.DISABLED
    host_enforcing: bool = True
    vm_ids: tuple[str, ...] = ()
    host_ids: tuple[str, ...] = ()


class UpdateAffinityGroup(Message):
    """Unset fields stay."""

    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    priority: float | UnsetType = UNSET
    vm_rule: AffinityRule | UnsetType = UNSET
    vm_enforcing: bool | UnsetType = UNSET
    host_rule: AffinityRule | UnsetType = UNSET
    host_enforcing: bool | UnsetType = UNSET
    vm_ids: tuple[str, ...] | UnsetType = UNSET
    host_ids: tuple[str, ...] | UnsetType = UNSET


CREATE_AFFINITY_GROUP = Call(
    "scheduler.affinity_group.create", CreateAffinityGroup, AffinityGroup, mutates=True, timeout_seconds=20
)
UPDATE_AFFINITY_GROUP = Call(
    "scheduler.affinity_group.update", UpdateAffinityGroup, AffinityGroup, mutates=True, timeout_seconds=20
)
DELETE_AFFINITY_GROUP = Call("scheduler.affinity_group.delete", DeleteById, Done, mutates=True)
GET_AFFINITY_GROUP = Call("scheduler.affinity_group.get", GetById, AffinityGroup)
LIST_AFFINITY_GROUPS = Call("scheduler.affinity_group.list", ListQuery, Page)
"""Also filters by `vm_id` and `host_id`: groups that name it."""

AFFINITY_GROUP_CHANGED = Fact("fact.scheduler.affinity_group.{id}.changed", AffinityGroup)
AFFINITY_GROUP_DELETED = Fact("fact.scheduler.affinity_group.{id}.deleted", AffinityGroup)
