"""The promise that a cluster survives the loss of so many hosts: whether it holds, and what would break it."""

from __future__ import annotations

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import AdmissionControl, GetById
from volery.contracts.operation import ListQuery, Page
from volery.contracts.scheduling import Need


class LostVm(Message):
    """A protected VM of a host that is lost, and where it would go."""

    vm_id: str
    name: str = ""
    from_host_id: str = ""
    host_id: str = ""
    """Where it would be brought back; "" nowhere."""
    host_name: str = ""
    message: str = ""
    """Why it has no place, and what would help."""


class HostLoss(Message):
    """What becomes of protected VMs when these hosts are lost together."""

    host_ids: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()
    survived: bool = True
    """Every protected VM of theirs would have a place."""
    vms: tuple[LostVm, ...] = ()
    """Those without a place first. In a cluster's promise only these."""


class ClusterPromise(Entity):
    """Whether a cluster would survive the loss of so many hosts, checked by placing every protected VM of theirs on what
    is left; `id` is the cluster's. Clusters whose `admission_control` isn't off have one."""

    cluster_id: str
    cluster_name: str = ""
    host_failures: int = 0
    admission_control: AdmissionControl = AdmissionControl.WARN
    kept: bool = True
    message: str = ""
    """Which hosts could not be lost, and which VM would have no place; "" when it is kept."""
    change: str = ""
    """What would mend it."""
    exhaustive: bool = True
    """Every set of so many hosts was tried; False: those that a search found to be the worst."""
    sets_tried: int = 0
    breaking: tuple[HostLoss, ...] = ()
    """Sets of hosts whose loss it doesn't survive, the worst first, no more than ten."""
    unprotected_vm_ids: tuple[str, ...] = ()
    """VMs that would have no place after one of the losses that were tried."""


class LoseHosts(Message):
    """What if these hosts of the cluster were lost now, together?"""

    id: str
    """The cluster's."""
    host_ids: tuple[str, ...] = ()


class PlannedChange(Message):
    """inventory to the scheduler, before it changes something of a cluster. The answer holds for a few seconds: what is
    decided meanwhile counts the change as made. Raises Refused(conflict) for what would break an enforced promise."""

    cluster_id: str
    what: str = ""
    """As a sentence begins: "putting host h1 into maintenance"."""
    leaving_host_ids: tuple[str, ...] = ()
    stops_vms: bool = False
    """The VMs of leaving hosts are stopped, not moved."""
    vms: tuple[Need, ...] = ()
    """Running VMs as they will be."""
    memory_overcommit_percent: int | None = None
    cpu_overcommit_ratio: float | None = None
    reserve_host_failures: int | None = None
    admission_control: AdmissionControl | None = None
    dry_run: bool = False


GET_PROMISE = Call("scheduler.promise.get", GetById, ClusterPromise)
LIST_PROMISES = Call("scheduler.promise.list", ListQuery, Page)
LOSE_HOSTS = Call("scheduler.promise.lose", LoseHosts, HostLoss, timeout_seconds=20)
ADMIT_CHANGE = Call("scheduler.promise.admit", PlannedChange, Done, mutates=True, timeout_seconds=20)

PROMISE_CHANGED = Fact("fact.scheduler.promise.{id}.changed", ClusterPromise)
PROMISE_DELETED = Fact("fact.scheduler.promise.{id}.deleted", ClusterPromise)
