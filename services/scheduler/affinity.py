"""Affinity groups as a placement meets them: what they ask of it, and guards that keep that true until it is committed.

Replicas race. What a placement read of its groups is only a hint until the statement that writes its claim has checked
two counters: the cluster's count of changed groups, and for each group whose members' places mattered its count of
placements. Whoever loses reads again. In one process placements of the same groups come one after the other, so that
they don't make each other lose.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from services.scheduler import affinity_store as store
from services.scheduler import plan_store, seats
from services.scheduler.policies.affinity import Around, ClusterRules
from services.scheduler.policies.bound import FREE, Bound, Seat, resolve
from services.scheduler.state import Scheduler
from volery.contracts.scheduling import Need, RoomFor
from volery.runtime.tables import Change


def _around(scheduler: Scheduler, need: Need) -> Around | None:
    rules = scheduler.rules.get(need.cluster_id)
    return rules.around(need.vm_id) if rules is not None else None


@asynccontextmanager
async def turn(scheduler: Scheduler, need: Need) -> AsyncIterator[None]:
    """Alone in this process with the groups whose members' places matter."""
    around = _around(scheduler, need)
    async with AsyncExitStack() as stack:
        for group_id in around.seats if around is not None else ():
            await stack.enter_async_context(scheduler.turn(group_id))
        yield


async def bind(scheduler: Scheduler, need: Need) -> tuple[Bound, list[Change]]:
    """What affinity groups ask of a VM's placement, and the guards that its claim is committed with."""
    rules = scheduler.rules.get(need.cluster_id)
    if rules is None:
        return FREE, [store.no_groups(need.cluster_id)]
    guards = [store.same_groups(need.cluster_id, rules.revision)]
    around = rules.around(need.vm_id)
    if around is None:
        return FREE, guards
    # Counted first: who gets a claim after that makes the guard fail.
    counted = await store.placements(scheduler.core.pool, around.seats) if around.seats else {}
    found = await _seats(scheduler, around.others)
    found |= await _coming(scheduler, around, found)
    guards += [store.next_placement(group_id, counted.get(group_id, -1)) for group_id in around.seats]
    return resolve(around, rules, found), guards


async def _seats(
    scheduler: Scheduler, vm_ids: Collection[str], without: Collection[str] = ()
) -> dict[str, Seat]:
    if not vm_ids:
        return {}
    vms = await store.seen_vms(scheduler.core.pool, vm_ids)
    claims = await store.claims_of_all(scheduler.core.pool, vm_ids)
    return seats.seats(vm_ids, claims, vms, scheduler.config, without)


async def _coming(scheduler: Scheduler, around: Around, found: Mapping[str, Seat]) -> dict[str, Seat]:
    """VMs of its union that an active plan takes to the same host as this one: they count as there, since one of them has to
    be the first to move."""
    if len(around.union) < 2:
        return {}
    planned = await plan_store.targets(scheduler.core.pool, around.union)
    own = planned.get(around.vm_id)
    if own is None:
        return {}
    mates = [v for v in around.union - {around.vm_id} if v in found and planned.get(v) == own]
    return {v: replace(found[v], host_ids=frozenset({own[1]})) for v in mates if found[v].host_ids}


async def bind_each(scheduler: Scheduler, asks: Sequence[RoomFor]) -> list[Bound]:
    """The same for many VMs, each by itself, that claim nothing. Who is on an excluded host doesn't count: it is asked
    what would be if that host died."""
    found: list[tuple[Around, ClusterRules] | None] = []
    for ask in asks:
        around = _around(scheduler, ask.need)
        found.append(None if around is None else (around, scheduler.rules[ask.need.cluster_id]))
    vm_ids = {vm_id for each in found if each is not None for vm_id in each[0].others}
    if not vm_ids:
        return [FREE if each is None else resolve(*each, {}) for each in found]
    vms = await store.seen_vms(scheduler.core.pool, vm_ids)
    claims = await store.claims_of_all(scheduler.core.pool, vm_ids)
    bounds = []
    for ask, each in zip(asks, found, strict=True):
        if each is None:
            bounds.append(FREE)
            continue
        wanted = each[0].others
        own = [claim for claim in claims if claim.vm_id in wanted]
        left_out = ask.excluded_host_ids
        bounds.append(resolve(*each, seats.seats(wanted, own, vms, scheduler.config, left_out)))
    return bounds
