"""Promises where they bind: a start or move that would break one is not committed, and restarts go to their refuges.

What was checked is guarded by the cluster's count of promises (promise_store): of two that race one loses, reads again and
is checked again. Restarts are counted, never refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, nullcontext

from msgspec.structs import replace

from services.scheduler import cell_store, saving_store
from services.scheduler import promise_store as store
from services.scheduler.cells import needs_of
from services.scheduler.fleet import STATUSES, UP, Fleet
from services.scheduler.model import memory_taken
from services.scheduler.pages import PAGES, PAGES_USED, Pages, pages_taken
from services.scheduler.policies import planned, promise
from services.scheduler.policies.affinity import ClusterRules
from services.scheduler.policies.losses import Loss
from services.scheduler.policies.promise import Admission, Guest, World
from services.scheduler.policies.saving import PROVEN_DAYS, automatic
from services.scheduler.state import Scheduler
from volery.contracts.scheduling import HostVerdict, Place, Placement, Purpose, Verdict
from volery.runtime.clock import monotonic
from volery.runtime.tables import Change

HOSTS_TRIED = 5
"""The best hosts that are tried before a start is refused since it would break a promise."""
RULE = "admission"

Decide = Callable[[Place], Placement]


@asynccontextmanager
async def turn(scheduler: Scheduler, cluster_id: str) -> AsyncIterator[None]:
    """Alone in this process with a cluster whose promise is enforced; others don't wait."""
    enforces = scheduler.policy(cluster_id).enforces
    async with scheduler.turn(f"promise/{cluster_id}") if enforces else nullcontext():
        yield


async def world_of(scheduler: Scheduler, cluster_id: str, *, fresh: bool = False) -> tuple[World, int]:
    """A cluster to try things on, with the changes that are about to be made, and the count that it is true under."""
    count = await store.count(scheduler.core.pool, cluster_id)
    kept = scheduler.guests.get(cluster_id)
    if fresh or kept is None or kept[0] != count:
        found = await store.guests(scheduler.core.pool, cluster_id, scheduler.config)
        kept = scheduler.guests[cluster_id] = count, found
    figures = await store.figures(scheduler.core.pool, cluster_id)
    fleet = scheduler.fleet.part(cluster_id)
    for host in figures:
        _set(fleet, *host)
    fleet.used_cells(await cell_store.used(scheduler.core.pool))
    world = World(
        fleet=fleet,
        policy=scheduler.policy(cluster_id),
        config=scheduler.config,
        rules=scheduler.rules.get(cluster_id) or ClusterRules(),
        guests=dict(kept[1]),
        now=monotonic(),
    )
    for change in await store.holds(scheduler.core.pool, cluster_id):
        planned.change(world, change)
    for host_id in set(await _hidden(scheduler, cluster_id)) & fleet.rows.keys():
        fleet.ints("status")[fleet.rows[host_id]] = UP  # also one that its owner was let empty a moment ago
    return world, count


async def _hidden(scheduler: Scheduler, cluster_id: str) -> list[str]:
    """Hosts that sleep, will be woken when a VM has no place, and were seen to wake lately: they count as if they were up."""
    if not automatic(scheduler.fleet.recipe(scheduler.policy(cluster_id))):
        return []
    asleep = await saving_store.sleepers(scheduler.core.pool, cluster_id, PROVEN_DAYS)
    return [each.id for each in asleep if each.proven]


def _set(
    fleet: Fleet,
    host_id: str,
    status: str,
    memory: int,
    vcpus: int,
    held: int,
    held_vcpus: int,
    pages: Pages,
    held_pages: Pages,
) -> None:
    """What the tables say of a host."""
    if (row := fleet.rows.get(host_id)) is None:
        return
    fleet.ints("status")[row] = STATUSES.index(status) if status in STATUSES else -1
    fleet.ints("memory_limit")[row], fleet.ints("vcpus_limit")[row] = memory, vcpus
    fleet.ints("memory_used")[row], fleet.ints("vcpus_used")[row] = held, held_vcpus
    for names, counts in ((PAGES, pages), (PAGES_USED, held_pages)):
        for name, count in zip(names, counts, strict=True):
            fleet.ints(name)[row] = count


async def with_refuge(scheduler: Scheduler, ask: Place) -> Place:
    """A restart goes where the promise was made for: whoever comes first takes nobody's place."""
    named = ask.target_host_id or ask.preferred_host_id
    if ask.purpose is not Purpose.RESTART or named or not scheduler.policy(ask.need.cluster_id).promises:
        return ask
    return replace(ask, preferred_host_id=await store.refuge(scheduler.core.pool, ask.need.vm_id))


async def admitted(
    scheduler: Scheduler,
    ask: Place,
    placement: Placement,
    decide: Decide,
    guards: Sequence[Change] = (),
    *,
    fresh: bool = False,
) -> tuple[Placement, list[Change]]:
    """The placement, on another host if need be, and what is committed with it. Without a host when every host that
    was tried would break the promise. `guards` are those of affinity groups."""
    cluster_id, policy = ask.need.cluster_id, scheduler.policy(ask.need.cluster_id)
    if not placement.host_id or not policy.promises:
        return placement, list(guards)
    if not policy.enforces or ask.purpose is Purpose.RESTART:
        return placement, [*guards, store.raise_count([cluster_id]), store.keep_needs([ask.need])]
    world, count = await world_of(scheduler, cluster_id, fresh=fresh)
    leaving = _is_leaving(scheduler, ask, world)
    if ask.purpose is Purpose.START:
        world.guests.pop(ask.need.vm_id, None)  # what it held before is given back
    if about_to_leave := _about_to_leave(scheduler, world):
        ask = replace(ask, excluded_host_ids=(*ask.excluded_host_ids, *about_to_leave))
        placement = decide(ask)
    promise.begin(world)
    tried: dict[str, Admission] = {}
    first, failures = placement, world.policy.reserve_host_failures
    while placement.host_id and placement.host_id not in tried and len(tried) < HOSTS_TRIED:
        admission = promise.admit(world, _guest(scheduler, ask, placement), failures)
        if not admission.broken or leaving:
            changes = _changes(scheduler, ask, placement, admission, count, world)
            return placement, [*guards, store.next_count(cluster_id, count), *changes]
        tried[placement.host_id] = admission
        placement = decide(replace(ask, avoided_host_ids=(*ask.avoided_host_ids, *tried)))
    return (_refused(world, ask, first, tried) if tried else placement), []


def _about_to_leave(scheduler: Scheduler, world: World) -> tuple[str, ...]:
    """Hosts that their owner was let empty, and hasn't said so yet."""
    return tuple(
        host_id
        for row, host_id in enumerate(world.fleet.ids)
        if int(world.fleet.ints("status")[row]) == promise.LEAVING
        and host_id in scheduler.fleet.rows
        and int(scheduler.fleet.ints("status")[scheduler.fleet.rows[host_id]]) == UP
    )


def _is_leaving(scheduler: Scheduler, ask: Place, world: World) -> bool:
    """Where it is it can't stay: whether it may go was decided with what empties its host."""
    guest = world.guests.get(ask.need.vm_id)
    if ask.purpose is not Purpose.MIGRATE or guest is None:
        return False
    row = world.fleet.rows.get(guest.host_id)
    return row is None or int(world.fleet.ints("status")[row]) != UP


def _guest(scheduler: Scheduler, ask: Place, placement: Placement) -> Guest:
    """What it runs with binds it as long as it runs: brought back, it takes the shape of any host."""
    need, shape = replace(ask.need, shape=None), placement.shape
    memory = memory_taken(need.memory_bytes, scheduler.config, need.hugepage_kib)
    pages = pages_taken(need.memory_bytes, need.hugepage_kib)
    cells = needs_of(need.numa_nodes if shape is None else shape.numa_nodes, need.hugepage_kib)
    vcpus = need.vcpus if shape is None else shape.vcpus
    return Guest(need, placement.host_id, memory, vcpus, pages=pages, cells=cells)


def _changes(
    scheduler: Scheduler, ask: Place, placement: Placement, admission: Admission, count: int, world: World
) -> list[Change]:
    """What a VM takes and where others go from now on. A VM of a host that is lost already keeps the place that was found
    for it."""
    cluster_id, guest = ask.need.cluster_id, _guest(scheduler, ask, placement)
    known = scheduler.guests[cluster_id][1]
    refuges = {
        vm_id: (guest.host_id if vm_id == guest.vm_id else known[vm_id].host_id, host_id)
        for vm_id, host_id in admission.refuges.items()
        if vm_id == guest.vm_id or known[vm_id].host_id == world.guests[vm_id].host_id
    }

    def committed() -> None:
        if scheduler.guests.get(cluster_id, (-1, {}))[0] == count:
            known[guest.vm_id] = guest
            keep(known, refuges)
            scheduler.guests[cluster_id] = count + 1, known

    own = refuges.get(guest.vm_id)
    told = store.keep_needs([ask.need]) if own is None else store.keep_need(ask.need, *own)
    others = {vm_id: found for vm_id, found in refuges.items() if vm_id != guest.vm_id}
    return [told.and_then(committed), store.keep_refuges(others)]


def keep(known: dict[str, Guest], refuges: dict[str, tuple[str, str]]) -> None:
    """In this replica's memory."""
    for vm_id, (lost, host_id) in refuges.items():
        old = known[vm_id]
        known[vm_id] = dataclasses.replace(old, lost_host_id=lost, refuge=host_id)


def _refused(world: World, ask: Place, first: Placement, tried: dict[str, Admission]) -> Placement:
    """Of every host that was tried it is said what its loss, or another's, would do."""
    name = ask.need.name or ask.need.vm_id
    losses = next(iter(tried.values())).broken
    doing = "moving" if ask.purpose is Purpose.MIGRATE else "starting"
    where = (
        f"any of the {len(tried)} best hosts"
        if len(tried) > 1
        else planned.names(world.fleet, list(tried))[0]
    )
    return replace(
        first,
        host_id="",
        hosts=tuple(_verdict(world, host, tried) for host in first.hosts),
        fitting=0,
        excluded_by=first.excluded_by | {RULE: len(tried)},
        message=f"{planned.refusal(world, f'{doing} VM {name} on {where}', losses)}. {_advice()}",
    )


def _advice() -> str:
    return planned.ADVICE[0].upper() + planned.ADVICE[1:]


def _verdict(world: World, host: HostVerdict, tried: dict[str, Admission]) -> HostVerdict:
    if host.host_id not in tried:
        return host
    why = "; ".join(planned.breach(world.fleet, loss) for loss in tried[host.host_id].broken)
    verdict = Verdict(rule=RULE, passed=False, message=why, change=planned.ADVICE)
    return HostVerdict(host_id=host.host_id, name=host.name, verdicts=(verdict,))


def homeless(losses: Sequence[Loss], but: Collection[str] = ()) -> tuple[Loss, ...]:
    """Those that leave VMs without a place, without these VMs."""
    found = []
    for loss in losses:
        left = tuple(each for each in loss.homeless if each.vm_id not in but)
        if left:
            found.append(Loss(loss.hosts, loss.places, left))
    return tuple(found)
