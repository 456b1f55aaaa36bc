"""Scheduling policies: which filters and weights decide where VMs of a cluster run, and how a choice is made of them."""

from __future__ import annotations

from enum import StrEnum

from msgspec import UNSET, UnsetType

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.operation import ListQuery, Page


class Selector(StrEnum):
    """How weights become one order of the hosts that fit."""

    WEIGHTED_SUM = "weighted_sum"
    """The highest sum of factor × score, each score from 0 to 1: how much better a host is counts."""
    RANK = "rank"
    """The highest sum of factor × rank, as oVirt does it: per weight, the best of n hosts has rank n − 1, the next
    n − 2, and equals share the better one. How much better a host is doesn't count, only that it is."""


class SchedulingPolicy(Entity):
    """How VMs are placed in the clusters that it was given to. Built-in ones can't be changed, but copied."""

    name: str
    description: str = ""
    built_in: bool = False
    filters: tuple[str, ...] = ()
    """Units that exclude hosts; those that can't be left out always apply."""
    weights: dict[str, float] = {}
    """Unit → factor, above 0 to 1000."""
    balance: str = "none"
    """Unit that says which hosts of a cluster have too much and which have room."""
    parameters: dict[str, float] = {}
    """Of its units, named as in oVirt; what isn't here has its default (`GET /scheduling-policy-units`)."""
    selector: Selector = Selector.WEIGHTED_SUM
    cluster_ids: tuple[str, ...] = ()
    """Clusters that it was given to. Every other cluster has the built-in one that its `balance` names."""


class CreateSchedulingPolicy(Message):
    """What isn't set is as in the policy `copy_of`, or as in the built-in evenly_distributed."""

    name: str
    copy_of: str = ""
    """Id of another policy."""
    description: str | UnsetType = UNSET
    filters: tuple[str, ...] | UnsetType = UNSET
    weights: dict[str, float] | UnsetType = UNSET
    balance: str | UnsetType = UNSET
    parameters: dict[str, float] | UnsetType = UNSET
    selector: Selector | UnsetType = UNSET


class UpdateSchedulingPolicy(Message):
    """Unset fields stay; lists and tables that are set replace what there was."""

    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    filters: tuple[str, ...] | UnsetType = UNSET
    weights: dict[str, float] | UnsetType = UNSET
    balance: str | UnsetType = UNSET
    parameters: dict[str, float] | UnsetType = UNSET
    selector: Selector | UnsetType = UNSET


class GiveSchedulingPolicy(Message):
    """The cluster's placements are decided by this policy from now on; "" is the one that its `balance` names."""

    cluster_id: str
    policy_id: str = ""


class UnitKind(StrEnum):
    FILTER = "filter"
    WEIGHT = "weight"
    BALANCE = "balance"


class PolicyParameter(Message):
    """A figure that some units of a policy use."""

    name: str
    low: float
    high: float
    default: float
    """Where a policy doesn't say. Some defaults are settings of the scheduler (VOLERY_SCHEDULER_*)."""
    unit: str = ""
    whole: bool = True
    """Whether it is a whole number."""
    description: str = ""


class PolicyUnit(Message):
    """What policies are made of."""

    name: str
    kind: UnitKind
    description: str
    ovirt_name: str = ""
    """What oVirt calls the unit that does this."""
    mandatory: str = ""
    """Why no policy can do without it; "" for a unit that can be left out."""
    parameters: tuple[PolicyParameter, ...] = ()


class ListPolicyUnits(Message):
    """All of them."""


class PolicyUnits(Message):
    units: tuple[PolicyUnit, ...] = ()


class Load(StrEnum):
    """What a balance says of a host."""

    TOO_MUCH = "too_much"
    """VMs had better move away from it."""
    LITTLE = "little"
    """It does so little that it could be emptied."""
    HAS_ROOM = "has_room"
    """It could take VMs of others."""
    EVEN = "even"
    """Nothing would be moved from it or to it."""


class HostLoad(Message):
    host_id: str
    name: str
    load: Load
    cpu_percent: float = 0.0
    """Of its last sample."""
    memory_left_bytes: int = 0
    vms: int = 0
    message: str = ""


class ClusterBalance(Message):
    """What the balance of a cluster's policy says of its hosts that are up. Nothing is moved for it."""

    cluster_id: str
    policy_id: str
    policy_name: str
    policy_revision: int
    balance: str
    hosts: tuple[HostLoad, ...] = ()


CREATE_SCHEDULING_POLICY = Call(
    "scheduler.scheduling_policy.create", CreateSchedulingPolicy, SchedulingPolicy, mutates=True
)
UPDATE_SCHEDULING_POLICY = Call(
    "scheduler.scheduling_policy.update", UpdateSchedulingPolicy, SchedulingPolicy, mutates=True
)
DELETE_SCHEDULING_POLICY = Call("scheduler.scheduling_policy.delete", DeleteById, Done, mutates=True)
GET_SCHEDULING_POLICY = Call("scheduler.scheduling_policy.get", GetById, SchedulingPolicy)
LIST_SCHEDULING_POLICIES = Call("scheduler.scheduling_policy.list", ListQuery, Page)
GIVE_SCHEDULING_POLICY = Call(
    "scheduler.scheduling_policy.give", GiveSchedulingPolicy, SchedulingPolicy, mutates=True
)
GET_CLUSTERS_POLICY = Call("scheduler.scheduling_policy.of_cluster", GetById, SchedulingPolicy)
"""The policy that holds for the cluster of this id."""
GET_CLUSTER_BALANCE = Call("scheduler.balance.get", GetById, ClusterBalance)
"""How the policy of the cluster of this id sees its hosts now."""
LIST_POLICY_UNITS = Call("scheduler.scheduling_policy.units", ListPolicyUnits, PolicyUnits)
SCHEDULING_POLICY_CHANGED = Fact("fact.scheduler.scheduling_policy.{id}.changed", SchedulingPolicy)
SCHEDULING_POLICY_DELETED = Fact("fact.scheduler.scheduling_policy.{id}.deleted", SchedulingPolicy)
