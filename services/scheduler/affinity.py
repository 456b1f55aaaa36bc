"""Affinity groups as a placement meets them: what they ask of it, and guards that keep that true until it is committed.

Replicas race. What a placement read of its groups is only a hint until the statement that writes its claim has checked
two counters: the cluster's count of changed groups, and for each group whose members' places mattered its count of
placements. Whoever loses reads again. In one process placements of the same groups come one after the other, so that
they don't make each other lose.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from services.scheduler import affinity_store as store
from services.scheduler import plan_store, seats
from services.scheduler.affinity_store import ClaimRow
from services.scheduler.model import SeenVm
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


@dataclass
class Surroundings:
    """What the tables say of the VMs that are named beside those that are to be placed. One reading for all of a round,
    which adds what it decides itself."""

    counted: dict[str, int]
    """Group → its placements, counted before the claims were read: who gets one after that makes the guard fail."""
    vms: Mapping[str, SeenVm]
    rows: dict[str, list[ClaimRow]]
    """VM → its claims; also of the VMs that are to be placed."""
    planned: Mapping[str, tuple[str, str]]


async def surroundings(
    scheduler: Scheduler, needs: Sequence[Need], vm_ids: Collection[str] = ()
) -> Surroundings:
    """Of what these VMs need; `vm_ids` are others whose claims matter."""
    found = [around for need in needs if (around := _around(scheduler, need)) is not None]
    pool = scheduler.core.pool
    groups = sorted({group_id for around in found for group_id in around.seats})
    others = {vm_id for around in found for vm_id in around.others}
    together = {vm_id for around in found if len(around.union) > 1 for vm_id in around.union}
    counted = await store.placements(pool, groups) if groups else {}
    rows: dict[str, list[ClaimRow]] = {}
    for row in await store.claim_rows(pool, others | {*vm_ids}) if others or vm_ids else ():
        rows.setdefault(row.public.vm_id, []).append(row)
    return Surroundings(
        counted=counted,
        vms=await store.seen_vms(pool, others) if others else {},
        rows=rows,
        planned=await plan_store.targets(pool, together) if together else {},
    )


def groups_of(scheduler: Scheduler, need: Need) -> tuple[str, ...]:
    """Those whose VMs' places the placement depends on, and is counted in."""
    around = _around(scheduler, need)
    return around.seats if around is not None else ()


def guard(scheduler: Scheduler, cluster_id: str) -> Change:
    """The cluster's groups and its scheduling policy are still those that this replica knows."""
    rules = scheduler.rules.get(cluster_id)
    return store.no_groups(cluster_id) if rules is None else store.same_groups(cluster_id, rules.revision)


async def bind(scheduler: Scheduler, need: Need) -> tuple[Bound, list[Change]]:
    """What affinity groups ask of a VM's placement, and the guards that its claim is committed with."""
    near = await surroundings(scheduler, [need])
    counted = [store.next_placement(g, near.counted.get(g, -1)) for g in groups_of(scheduler, need)]
    return bound_of(scheduler, need, near), [guard(scheduler, need.cluster_id), *counted]


def bound_of(scheduler: Scheduler, need: Need, near: Surroundings) -> Bound:
    around = _around(scheduler, need)
    if around is None:
        return FREE
    claims = [row.public for vm_id in sorted(around.others) for row in near.rows.get(vm_id, ())]
    found = seats.seats(around.others, claims, near.vms, scheduler.config)
    found |= _coming(around, found, near.planned)
    return resolve(around, scheduler.rules[need.cluster_id], found)


def _coming(
    around: Around, found: Mapping[str, Seat], planned: Mapping[str, tuple[str, str]]
) -> dict[str, Seat]:
    """VMs of its union that an active plan takes to the same host as this one: they count as there, since one of them has to
    be the first to move."""
    own = planned.get(around.vm_id)
    if own is None or len(around.union) < 2:
        return {}
    mates = [v for v in sorted(around.union - {around.vm_id}) if v in found and planned.get(v) == own]
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
