"""What highly available VMs need to be brought back elsewhere: refused when that could never be, and told to ha, which
says of each whether it is protected now."""

from __future__ import annotations

from collections.abc import Sequence

from services.inventory import admission, model
from services.inventory.desk import Inventory
from services.inventory.specs import disk_ids, need
from services.inventory.store import CLUSTERS, DATA_CENTERS
from volery.contracts.cluster import Cluster
from volery.contracts.errors import Refused, invalid
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeed, VmNeeds, VmNeedsAnswer
from volery.contracts.storage import (
    REACH_DISKS,
    REACH_DISKS_OF_MANY,
    DiskReach,
    ReachDisks,
    ReachDisksOfMany,
)
from volery.contracts.vm import Affinity, DesiredState, HighAvailability, RestartWhere, Vm, VmStatus
from volery.runtime.bus import Caller
from volery.runtime.service import Part

part = Part()

MOST = 200
SETTLED = frozenset({VmStatus.UP, VmStatus.POWERING_UP, VmStatus.PAUSED, VmStatus.SUSPENDED})


async def check_restartable(
    inv: Inventory,
    name: str,
    cluster_id: str,
    available: HighAvailability,
    affinity: Affinity,
    disks: Sequence[str],
    caller: Caller,
    local_host_id: str = "",
) -> None:
    """Raises Refused(conflict) when the VM is to be restarted elsewhere and never could be. `local_host_id`: of a disk
    that is still to be made."""
    if not available.enabled or available.where is not RestartWhere.ELSEWHERE:
        return
    cluster = (await CLUSTERS.get(inv.core.pool, cluster_id)).public
    local = (await DATA_CENTERS.get(inv.core.pool, cluster.data_center_id)).public.local
    if not local_host_id and disks:
        question = ReachDisks(disk_ids=tuple(disks))
        reach = await inv.core.bus.ask(REACH_DISKS, question, Caller(caller.principal))
        local_host_id = reach.local_host_id
    model.check_elsewhere(name, affinity.host_ids, local_host_id, local_data_center=local)


async def check_vm_restartable(inv: Inventory, vm: Vm, caller: Caller, *more: str) -> None:
    """The same for a VM as it will be, and disks that it will get."""
    disks = (*disk_ids(vm), *more)
    await check_restartable(inv, vm.name, vm.cluster_id, vm.high_availability, vm.affinity, disks, caller)
    if more:
        await admission.of_vm(inv, vm, caller, *more)


@part.answers(DESCRIBE_NEEDS)
async def describe_needs(inv: Inventory, ask: VmNeeds, caller: Caller) -> VmNeedsAnswer:
    """Raises Refused(invalid) for too many at a time."""
    if len(ask.vm_ids) > MOST:
        raise invalid(f"the needs of at most {MOST} VMs are told at a time, not {len(ask.vm_ids)}")
    vms = [row.public for row in await inv.store.vms_with(ask.vm_ids)]
    clusters = {row.id: row.public for row in await CLUSTERS.where(inv.core.pool)}
    question = ReachDisksOfMany(sets=tuple(disk_ids(vm) for vm in vms))
    reaches = [DiskReach(any_host=True)] * len(vms)
    if any(question.sets):
        answer = await inv.core.bus.ask(REACH_DISKS_OF_MANY, question, Caller(caller.principal))
        reaches = list(answer.reaches)
    return VmNeedsAnswer(
        vms=tuple(_told(vm, clusters[vm.cluster_id], reach) for vm, reach in zip(vms, reaches, strict=True))
    )


def _told(vm: Vm, cluster: Cluster, reach: DiskReach) -> VmNeed:
    down = vm.status is VmStatus.DOWN and vm.desired is DesiredState.DOWN
    runs = vm.status not in (VmStatus.DOWN, VmStatus.SUSPENDED)
    return VmNeed(
        need=need(vm, cluster, reach),
        host_id=vm.host_id if runs else "",
        highly_available=vm.high_availability.enabled,
        same_host=vm.high_availability.where is RestartWhere.SAME_HOST,
        settled=not vm.busy_with and (down or vm.status in SETTLED),
        local_host_id=reach.local_host_id,
        unready=tuple(str(why) for why in reach.unready.values()),
        kept=_kept(vm),
        priority=vm.high_availability.priority,
    )


def _kept(vm: Vm) -> str:
    """Why it can't be migrated now, as a migration would be refused."""
    if not vm.migration.allowed:
        return "its migration policy forbids to move it"
    try:
        model.check_action(vm, "migrate")
    except Refused as refused:
        return refused.message
    return ""
