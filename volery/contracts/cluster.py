"""Data centers and clusters: what hosts and VMs belong to, and the policies they share."""

from __future__ import annotations

from enum import StrEnum

from msgspec import UNSET, UnsetType

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.operation import ListQuery, Operation, Page


class GetById(Message):
    """Which one."""

    id: str


class DeleteById(Message):
    """Which one; `if_revision` 0 is any (If-Match)."""

    id: str
    if_revision: int = 0


class DataCenter(Entity):
    name: str
    description: str = ""
    local: bool = False
    """One host, whose storage nobody else reaches."""
    tags: tuple[str, ...] = ()


class CreateDataCenter(Message):
    name: str
    description: str = ""
    local: bool = False
    tags: tuple[str, ...] = ()


class UpdateDataCenter(Message):
    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET


class Balance(StrEnum):
    """The built-in scheduling policy of a cluster that wasn't given one (oVirt's). The scheduler's `scheduling_policy` has
    more of them; none is added here, since the previous release couldn't read a cluster with it."""

    NONE = "none"
    EVENLY_DISTRIBUTED = "evenly_distributed"
    POWER_SAVING = "power_saving"
    VM_EVENLY_DISTRIBUTED = "vm_evenly_distributed"
    """As many VMs on each host, whatever they use."""
    CLUSTER_MAINTENANCE = "cluster_maintenance"
    """Only highly available VMs are started; what runs goes on, and is weighed as evenly distributed."""


class AdmissionControl(StrEnum):
    """What is done for the promise that a cluster survives the loss of `reserve_host_failures` hosts."""

    OFF = "off"
    """It is a goal: counted, not placed; ha says whether it is met."""
    WARN = "warn"
    """It is checked by placing, and announced when it doesn't hold."""
    ENFORCE = "enforce"
    """What would break it is refused, too; restarts never are."""


class Cluster(Entity):
    name: str
    data_center_id: str
    description: str = ""
    cpu_model: str = ""
    """The libvirt CPU model that every guest gets; "" is the host's own."""
    machine: str = "q35"
    memory_overcommit_percent: int = 100
    cpu_overcommit_ratio: float = 10.0
    """vCPUs per physical CPU thread that may be promised."""
    balance: Balance = Balance.EVENLY_DISTRIBUTED
    migration_bandwidth_mib_per_second: int = 0
    tags: tuple[str, ...] = ()
    reserve_host_failures: int = 0
    """So many hosts should be able to die with room left for their highly available VMs; 0 to 16. What is done for it is
    said by `admission_control`."""
    admission_control: AdmissionControl = AdmissionControl.OFF
    busy_with: str = ""
    """The operation that upgrades its hosts, one after the other. Meanwhile nothing is balanced there."""


class CreateCluster(Message):
    name: str
    data_center_id: str
    description: str = ""
    cpu_model: str = ""
    machine: str = "q35"
    memory_overcommit_percent: int = 100
    cpu_overcommit_ratio: float = 10.0
    balance: Balance = Balance.EVENLY_DISTRIBUTED
    migration_bandwidth_mib_per_second: int = 0
    tags: tuple[str, ...] = ()
    reserve_host_failures: int = 0
    admission_control: AdmissionControl = AdmissionControl.OFF


class UpdateCluster(Message):
    id: str
    if_revision: int = 0
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    cpu_model: str | UnsetType = UNSET
    machine: str | UnsetType = UNSET
    memory_overcommit_percent: int | UnsetType = UNSET
    cpu_overcommit_ratio: float | UnsetType = UNSET
    balance: Balance | UnsetType = UNSET
    migration_bandwidth_mib_per_second: int | UnsetType = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET
    reserve_host_failures: int | UnsetType = UNSET
    admission_control: AdmissionControl | UnsetType = UNSET


class UpgradeCluster(Message):
    """Empty the cluster's hosts one after the other, and wait at each until somebody has upgraded and activated it. VMs go to
    hosts whose turn has been, as far as they have room, so that most move once.

    The order is planned as a whole before anything begins: a VM that would have no place is named, and nothing begins. The
    result says which hosts are `done` and which is `waiting_for` its upgrade; that of a dry run has the `plan`."""

    id: str
    if_revision: int = 0
    host_ids: tuple[str, ...] = ()
    """Only these; empty: all of them."""
    reason: str = ""
    stop_vms: bool = False
    """Shut VMs down that can't move."""
    dry_run: bool = False


CREATE_DATA_CENTER = Call("inventory.data_center.create", CreateDataCenter, DataCenter, mutates=True)
UPDATE_DATA_CENTER = Call("inventory.data_center.update", UpdateDataCenter, DataCenter, mutates=True)
DELETE_DATA_CENTER = Call("inventory.data_center.delete", DeleteById, Done, mutates=True)
GET_DATA_CENTER = Call("inventory.data_center.get", GetById, DataCenter)
LIST_DATA_CENTERS = Call("inventory.data_center.list", ListQuery, Page)
DATA_CENTER_CHANGED = Fact("fact.inventory.data_center.{id}.changed", DataCenter)
DATA_CENTER_DELETED = Fact("fact.inventory.data_center.{id}.deleted", DataCenter)

CREATE_CLUSTER = Call("inventory.cluster.create", CreateCluster, Cluster, mutates=True)
UPDATE_CLUSTER = Call("inventory.cluster.update", UpdateCluster, Cluster, mutates=True)
DELETE_CLUSTER = Call("inventory.cluster.delete", DeleteById, Done, mutates=True)
UPGRADE_CLUSTER = Call(
    "inventory.cluster.upgrade", UpgradeCluster, Operation, mutates=True, timeout_seconds=60
)
GET_CLUSTER = Call("inventory.cluster.get", GetById, Cluster)
LIST_CLUSTERS = Call("inventory.cluster.list", ListQuery, Page)
CLUSTER_CHANGED = Fact("fact.inventory.cluster.{id}.changed", Cluster)
CLUSTER_DELETED = Fact("fact.inventory.cluster.{id}.deleted", Cluster)
