"""The board of a cluster as it is now: claims, what inventory says of its VMs, the fleet and the last samples."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from msgspec.structs import replace

from services.scheduler import plan_store as sql
from services.scheduler.fleet import UP
from services.scheduler.policies.affinity import ClusterRules
from services.scheduler.policies.board import Board
from services.scheduler.policies.boarding import Standing, board_of
from services.scheduler.state import Scheduler
from volery.contracts.host import HostStatus
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeed, VmNeeds
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic

ASKED_TOGETHER = 200
SELF = Caller("service:scheduler")


async def look(scheduler: Scheduler, cluster_id: str, closed: Collection[str] = ()) -> Board:
    """Of VMs that move, start or end only what they take is on it. `closed` hosts get no VMs; those of them that are being
    cleared for maintenance are left. Raises Refused when inventory doesn't answer."""
    await scheduler.read_used()
    fleet = scheduler.fleet
    rows = np.flatnonzero(fleet.in_cluster(cluster_id)).tolist()
    up = {fleet.ids[row]: int(fleet.ints("status")[row]) == UP for row in rows}
    held = await sql.standing(scheduler.core.pool, sorted(up))
    found = []
    for told in await _needs(scheduler, sorted(held)):
        vm_id, host_id = told.need.vm_id, held[told.need.vm_id]
        if told.host_id == host_id and told.need.cluster_id == cluster_id:
            load = scheduler.loads.get(host_id, {}).get(vm_id)
            left = up[host_id] or (host_id in closed and is_cleared(scheduler, host_id))
            kept = told.kept or ("" if left else "its host is not up")
            found.append(Standing(told.need, host_id, load, told.priority, kept))
    rules = scheduler.rules.get(cluster_id) or ClusterRules()
    policy = scheduler.policy(cluster_id)
    return board_of(fleet, policy, found, rules, scheduler.config, now=monotonic(), closed=closed)


def is_cleared(scheduler: Scheduler, host_id: str) -> bool:
    """Whether its VMs leave it for its maintenance."""
    return _status(scheduler, host_id) == HostStatus.PREPARING_FOR_MAINTENANCE


def leaves(scheduler: Scheduler, host_id: str) -> bool:
    """Whether somebody takes it out of use, or has."""
    return _status(scheduler, host_id) in (HostStatus.PREPARING_FOR_MAINTENANCE, HostStatus.MAINTENANCE)


def _status(scheduler: Scheduler, host_id: str) -> str:
    row = scheduler.fleet.rows.get(host_id)
    return "" if row is None else scheduler.fleet.status_of(row)


async def _needs(scheduler: Scheduler, vm_ids: list[str]) -> list[VmNeed]:
    found: list[VmNeed] = []
    for start in range(0, len(vm_ids), ASKED_TOGETHER):
        some = tuple(vm_ids[start : start + ASKED_TOGETHER])
        told = (await scheduler.core.bus.ask(DESCRIBE_NEEDS, VmNeeds(vm_ids=some), SELF)).vms
        found += [replace(vm, kept=vm.kept or ("" if vm.settled else "it is busy")) for vm in told]
    return found
