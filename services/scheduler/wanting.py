"""A VM found no place, or several found none together: a sleeping host that would take them is noted, where the leader is to
wake such hosts.

Whether it reaches the VM's storage and networks is known once it is up; a disk that one host only reaches is taken to be that
host's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.scheduler import affinity
from services.scheduler import saving_store as sql
from services.scheduler.fleet import STATUSES
from services.scheduler.policies import resized, together
from services.scheduler.policies.filters import FILTERS
from services.scheduler.policies.request import request
from services.scheduler.policies.saving import automatic
from services.scheduler.state import Scheduler
from volery.contracts.host import HostStatus
from volery.contracts.scheduling import Place
from volery.runtime.clock import monotonic, utc_now

NOT_YET = frozenset({"host_state", "storage", "network"})
"""Filters that a sleeping host fails as it is off: it was connected before it slept, and will be again."""
MAINTENANCE = STATUSES.index(HostStatus.MAINTENANCE)


def note(scheduler: Scheduler, *asks: Place) -> None:
    """Of VMs that go to one host together, or of one. In the background: their answer doesn't wait for it."""
    recipe = scheduler.fleet.recipe(scheduler.policy(asks[0].need.cluster_id))
    if automatic(recipe) and not any(ask.dry_run or ask.target_host_id or _is_local(ask) for ask in asks):
        scheduler.core.operations.spawn(_want(scheduler, asks))


def _is_local(ask: Place) -> bool:
    reach = ask.need.storage_host_ids
    return reach is not None and len(reach) <= 1


async def _want(scheduler: Scheduler, asks: Sequence[Place]) -> None:
    cluster_id = asks[0].need.cluster_id
    hosts = scheduler.fleet.part(cluster_id)
    resting = [host_id for row, host_id in enumerate(hosts.ids) if hosts.ints("status")[row] == MAINTENANCE]
    asleep = await sql.sleeping(scheduler.core.pool, resting)
    if not asleep:
        return
    policy = scheduler.policy(cluster_id)
    fits, memory, vcpus = hosts.everyone, hosts.ints("memory_used"), hosts.ints("vcpus_used")
    for ask in asks:
        bound, _ = await affinity.bind(scheduler, ask.need)
        asked = request(ask, policy, scheduler.config, bound, recipe=hosts.recipe(policy), now=monotonic())
        masks = [f.mask(hosts, asked) for f in FILTERS if f.name not in NOT_YET and asked.follows(f.name)]
        fits = np.logical_and.reduce([fits, *masks])
        memory, vcpus = memory + asked.memory, vcpus + resized.vcpus(hosts, asked)
    if len(asks) > 1:
        fits = fits & (memory <= hosts.ints("memory_limit")) & (vcpus <= hosts.ints("vcpus_limit"))
    if wanted := [host_id for host_id in asleep if fits[hosts.rows[host_id]]]:
        name = together.names([ask.need.name or ask.need.vm_id for ask in asks])
        await scheduler.core.commit(sql.want(wanted[0], cluster_id, name, utc_now()))
