"""Whether the death of its host would bring a highly available VM back elsewhere, and what stands against it."""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Call, Entity, Fact, Message
from volery.contracts.cluster import GetById
from volery.contracts.operation import ListQuery, Page
from volery.contracts.scheduling import Need


class ReasonCode(StrEnum):
    """Why a VM is not protected."""

    SAME_HOST = "same_host"
    """It was asked for: restarted on its own host only."""
    LOCAL_DISK = "local_disk"
    """A disk is in a local directory of one host."""
    PINNED = "pinned"
    """It may run on no other host."""
    NO_PROOF = "no_proof"
    """Its host's death can't be proven while it is silent, so nothing would be restarted without a person."""
    FENCING_PAUSED = "fencing_paused"
    NO_OTHER_HOST = "no_other_host"
    """The cluster has no other host, or none that is up."""
    CAPACITY = "capacity"
    NETWORK = "network"
    STORAGE = "storage"
    """A disk can't be used now, or other hosts don't reach it."""
    CPU_MODEL = "cpu_model"
    MACHINE = "machine"
    AFFINITY = "affinity"
    """Its affinity groups leave it no other host."""
    HOST_DEVICES = "host_devices"
    """No other host has the devices that it asks for, or has them free."""


class ProtectionReason(Message):
    code: ReasonCode
    message: str
    change: str
    """The smallest change that mends it."""


class VmProtection(Entity):
    """Of a VM that is highly available; `id` is the VM's. Of one that doesn't run, it is said whether it would be
    protected wherever it is started."""

    vm_id: str
    vm_name: str = ""
    cluster_id: str = ""
    host_id: str = ""
    """Where it runs; "" nowhere."""
    protected: bool = False
    reasons: tuple[ProtectionReason, ...] = ()
    """Why not; empty when it is."""


class ClusterReserve(Entity):
    """Whether a cluster that asks for it (`reserve_host_failures`) has room for the highly available VMs of hosts that
    die; `id` is the cluster's. Memory and vCPUs are counted, not where a VM may run."""

    cluster_id: str
    cluster_name: str = ""
    host_failures: int = 0
    """So many hosts should be able to die at once."""
    kept: bool = True
    message: str = ""
    """Which hosts could not, and for which VM there would be no room; "" when it is kept."""
    change: str = ""
    """The smallest change that mends it."""


class VmNeeds(Message):
    """ha to inventory: what these VMs ask of a host. At most 200 at a time."""

    vm_ids: tuple[str, ...]


class VmNeed(Message):
    """One VM as it is now. A VM that doesn't exist any more is left out of the answer."""

    need: Need
    host_id: str = ""
    """Where it runs; "" nowhere."""
    highly_available: bool = False
    same_host: bool = False
    """It is to be restarted on its own host only."""
    settled: bool = True
    """False: it starts, moves, ends or is being brought back."""
    local_host_id: str = ""
    """The one host whose local directory holds a disk of it."""
    unready: tuple[str, ...] = ()
    """Why disks of it can't be used now."""
    kept: str = ""
    """Why it can't be migrated now; "" when it can."""
    priority: int = 0
    """Of its high availability."""


class VmNeedsAnswer(Message):
    vms: tuple[VmNeed, ...] = ()


DESCRIBE_NEEDS = Call("inventory.vm.needs", VmNeeds, VmNeedsAnswer, timeout_seconds=20)
GET_PROTECTION = Call("ha.protection.get", GetById, VmProtection)
LIST_PROTECTION = Call("ha.protection.list", ListQuery, Page)

GET_RESERVE = Call("ha.reserve.get", GetById, ClusterReserve)
LIST_RESERVES = Call("ha.reserve.list", ListQuery, Page)

RESERVE_CHANGED = Fact("fact.ha.reserve.{id}.changed", ClusterReserve)
RESERVE_DELETED = Fact("fact.ha.reserve.{id}.deleted", ClusterReserve)
PROTECTION_CHANGED = Fact("fact.ha.protection.{id}.changed", VmProtection)
PROTECTION_DELETED = Fact("fact.ha.protection.{id}.deleted", VmProtection)
