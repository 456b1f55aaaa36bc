"""Before a cluster that promises to survive the loss of hosts is changed: the scheduler is asked whether the promise would
still hold, and its refusal passed on. What it has let pass counts there as made, until it hears of it."""

from __future__ import annotations

from services.inventory.desk import Inventory
from services.inventory.specs import disk_ids, need
from services.inventory.store import CLUSTERS
from volery.contracts.cluster import AdmissionControl, Cluster
from volery.contracts.host import Host, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.promise import ADMIT_CHANGE, PlannedChange
from volery.contracts.storage import REACH_DISKS, DiskReach, ReachDisks
from volery.contracts.vm import Vm, VmStatus
from volery.runtime.bus import Caller

AT_REST = frozenset({VmStatus.DOWN, VmStatus.SUSPENDED, VmStatus.IMAGE_LOCKED})
"""A VM that holds no capacity is checked when it starts."""


def enforces(cluster: Cluster) -> bool:
    return cluster.reserve_host_failures > 0 and cluster.admission_control is AdmissionControl.ENFORCE


def _asks_for_more(old: Cluster, new: Cluster) -> bool:
    """Less room, more hosts that may be lost, or that it binds from now on."""
    return (
        not enforces(old)
        or new.memory_overcommit_percent < old.memory_overcommit_percent
        or new.cpu_overcommit_ratio < old.cpu_overcommit_ratio
        or new.reserve_host_failures > old.reserve_host_failures
    )


async def of_cluster(inv: Inventory, old: Cluster, new: Cluster, caller: Caller) -> None:
    """Raises Refused(conflict) when an edit would break the promise that the cluster then makes."""
    if not enforces(new) or not _asks_for_more(old, new):
        return
    begins = not enforces(old)
    planned = PlannedChange(
        cluster_id=new.id,
        what=f"{'enforcing the promise of' if begins else 'changing'} cluster {new.name}",
        memory_overcommit_percent=new.memory_overcommit_percent,
        cpu_overcommit_ratio=new.cpu_overcommit_ratio,
        reserve_host_failures=new.reserve_host_failures,
        admission_control=new.admission_control,
    )
    await _ask(inv, planned, caller)


async def of_leaving(inv: Inventory, host: Host, caller: Caller, *, stops_vms: bool, dry_run: bool) -> None:
    """Raises Refused(conflict) when the cluster's promise wouldn't survive that this host goes into maintenance. A host
    that isn't up holds nothing up any more."""
    cluster = (await CLUSTERS.get(inv.core.pool, host.cluster_id)).public
    if not enforces(cluster) or host.status is not HostStatus.UP:
        return
    planned = PlannedChange(
        cluster_id=cluster.id,
        what=f"putting host {host.name} into maintenance",
        leaving_host_ids=(host.id,),
        stops_vms=stops_vms,
        dry_run=dry_run,
    )
    await _ask(inv, planned, caller)


async def of_vm(inv: Inventory, new: Vm, caller: Caller, *more_disks: str) -> None:
    """Raises Refused(conflict) when a running VM as it will be, with disks that it will get, would break the promise of its
    cluster."""
    cluster = (await CLUSTERS.get(inv.core.pool, new.cluster_id)).public
    if not enforces(cluster) or new.status in AT_REST:
        return
    disks, reach = (*disk_ids(new), *more_disks), DiskReach(any_host=True)
    if disks:
        reach = await inv.core.bus.ask(REACH_DISKS, ReachDisks(disk_ids=disks), Caller(caller.principal))
    planned = PlannedChange(
        cluster_id=cluster.id, what=f"changing VM {new.name}", vms=(need(new, cluster, reach),)
    )
    await _ask(inv, planned, caller)


async def _ask(inv: Inventory, planned: PlannedChange, caller: Caller) -> None:
    await inv.core.bus.ask(ADMIT_CHANGE, planned, Caller(caller.principal, new_id()))
