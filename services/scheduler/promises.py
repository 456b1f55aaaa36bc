"""Promises as they are looked at: the leader's audit, which announces what can't be refused, what owners ask before they
change something, and what if hosts were lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from services.scheduler import promise_store as store
from services.scheduler.cells import CELL_CPUS, CELLS, CELLS_USED
from services.scheduler.model import Audit
from services.scheduler.pages import PAGES, PAGES_USED
from services.scheduler.policies import planned, promise
from services.scheduler.policies.losses import Loss
from services.scheduler.policies.promise import Guest, World
from services.scheduler.promise_store import PROMISES
from services.scheduler.promising import homeless, keep, turn, world_of
from services.scheduler.state import Scheduler
from volery.contracts.base import Done
from volery.contracts.cluster import AdmissionControl, GetById
from volery.contracts.errors import Kind, Refused, conflict, invalid, not_found
from volery.contracts.operation import ListQuery
from volery.contracts.promise import (
    ADMIT_CHANGE,
    GET_PROMISE,
    LIST_PROMISES,
    LOSE_HOSTS,
    ClusterPromise,
    HostLoss,
    LoseHosts,
    PlannedChange,
)
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeeds
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Row, Stale

log = logging.getLogger(__name__)

part = Part()

LOOK_SECONDS = 1.0
NEEDS_SECONDS = 5.0
FORGET_SECONDS = 600.0
OLD_SECONDS = 60.0
"""Needs that were told so long ago are asked for again: storage may have changed."""
TOGETHER = 200
"""VMs that are asked about at a time."""
SHARE = 10.0
"""A promise is looked at again after so many times as long as looking at it took."""
NAMED_LOSSES = 10
TRIES = 20


# What if


@part.answers(LOSE_HOSTS)
async def lose_hosts(scheduler: Scheduler, ask: LoseHosts, caller: Caller) -> HostLoss:
    """Raises Refused(not_found) for a cluster nobody spoke of, Refused(invalid) for hosts that aren't the cluster's."""
    if ask.id not in scheduler.fleet.clusters:
        raise not_found("cluster", ask.id)
    await tell_needs(scheduler, [ask.id])
    world, _ = await world_of(scheduler, ask.id, fresh=True)
    strangers = [h for h in ask.host_ids if h not in world.fleet.rows]
    if strangers or not ask.host_ids:
        said = f"host {strangers[0]} isn't one of" if strangers else "no host was named of"
        raise invalid(f"{said} cluster {world.policy.name}; name hosts of this cluster", field="host_ids")
    vms = {vm_id: guest.need.name for vm_id, guest in world.guests.items()}
    at = {vm_id: guest.host_id for vm_id, guest in world.guests.items()}
    promise.begin(world)
    return planned.told(world.fleet, promise.lose(world, ask.host_ids), at, vms, all_vms=True)


# Before an owner changes something


@part.answers(ADMIT_CHANGE)
async def admit_change(scheduler: Scheduler, ask: PlannedChange, caller: Caller) -> Done:
    """Raises Refused(conflict) when VMs that have a place after every loss wouldn't have one any more."""
    after = planned.policy_after(scheduler.policy(ask.cluster_id), ask)
    if not after.enforces:
        return Done()
    for _ in range(TRIES):
        try:
            async with turn(scheduler, ask.cluster_id):
                return await _admit(scheduler, ask, caller)
        except Stale:
            await scheduler.read_used()
            await scheduler.read_rules(ask.cluster_id)
    raise Refused(
        Kind.EXHAUSTED, f"the cluster changed {TRIES} times while {ask.what} was checked; try again"
    )


async def _admit(scheduler: Scheduler, ask: PlannedChange, caller: Caller) -> Done:
    await tell_needs(scheduler, [ask.cluster_id])
    world, count = await world_of(scheduler, ask.cluster_id, fresh=True)
    planned.change(world, ask)
    broken = homeless((await everything(world))[0])
    if broken and scheduler.policy(ask.cluster_id).enforces:
        before, _ = await world_of(scheduler, ask.cluster_id)
        without = {each.vm_id for loss in (await everything(before))[0] for each in loss.homeless}
        broken = homeless(broken, without)
    if broken:
        message = planned.refusal(world, ask.what, broken)
        losses = [planned.told(world.fleet, loss, {}, {}, all_vms=False) for loss in broken[:NAMED_LOSSES]]
        raise conflict(f"{message}. What would help: {planned.ADVICE}", rule="admission", losses=losses)
    if not ask.dry_run:
        await scheduler.core.commit(
            store.next_count(ask.cluster_id, count), store.hold(ask), caller=caller, answer=Done()
        )
    return Done()


async def everything(world: World) -> tuple[list[Loss], bool]:
    """What was lost already, then every loss that is tried, and whether these are all that matter. Others get their turn
    in between."""
    found = [promise.begin(world)]
    tried, exhaustive = promise.sets(world, world.policy.reserve_host_failures)
    for hosts in tried:
        found.append(promise.lose(world, hosts))
        await asyncio.sleep(0)
    return found, exhaustive


# The audit


@part.every(LOOK_SECONDS)
async def look(scheduler: Scheduler) -> None:
    """Every promise that something may have changed: what was found is written when it is another, and so announced."""
    policies = {c.id: c for c in scheduler.fleet.clusters.values() if c.promises}
    rows = {row.id: row for row in await PROMISES.where(scheduler.core.pool)}
    for cluster_id in sorted(rows.keys() - policies.keys()):
        await _write(scheduler, PROMISES.delete(rows[cluster_id]))
        scheduler.audits.pop(cluster_id, None)
    for cluster_id in sorted(policies):
        audit = scheduler.audits.setdefault(cluster_id, Audit())
        if monotonic() < audit.next_at:
            continue
        began = monotonic()
        await _look(scheduler, cluster_id, audit, rows.get(cluster_id))
        audit.next_at = monotonic() + SHARE * (monotonic() - began)


async def _look(
    scheduler: Scheduler, cluster_id: str, audit: Audit, row: Row[ClusterPromise, Nothing] | None
) -> None:
    seen = _seen(scheduler, cluster_id)
    if audit.seen == hash((seen, await store.count(scheduler.core.pool, cluster_id))) and row is not None:
        return
    world, count = await world_of(scheduler, cluster_id, fresh=True)
    at = {vm_id: guest.host_id for vm_id, guest in world.guests.items()}
    before = dict(world.guests)
    losses, exhaustive = await everything(world)
    refuges = _refuges(before, at, losses)
    if refuges and not await _keep(scheduler, cluster_id, count, refuges):
        return
    change = _change(world, losses, exhaustive, row)
    if change is not None and not await _write(scheduler, change):
        return
    audit.seen = hash((seen, count + bool(refuges)))


def _seen(scheduler: Scheduler, cluster_id: str) -> int:
    """A hash of what a promise depends on beside what its count counts."""
    fleet, policy, rules = scheduler.fleet, scheduler.policy(cluster_id), scheduler.rules.get(cluster_id)
    mine = fleet.in_cluster(cluster_id)
    names = (
        "status",
        "cpus",
        "memory_limit",
        "memory_used",
        "vcpus_limit",
        "vcpus_used",
        "guests",
        "swapped",
        *PAGES,
        *PAGES_USED,
        CELL_CPUS,
        *CELLS,
        *CELLS_USED,
    )
    columns = tuple(fleet.ints(name)[mine].tobytes() for name in names)
    networks = frozenset((n.id, n.host_ids) for n in fleet.networks.values())
    recipe = fleet.recipe(policy).revision
    return hash((policy, rules.revision if rules else -1, columns, networks, recipe))


def _refuges(
    before: dict[str, Guest], at: dict[str, str], losses: Sequence[Loss]
) -> dict[str, tuple[str, str]]:
    """Of VMs whose refuge is another than the one that was kept; the first that is said counts: of hosts that are lost
    already, then of each one alone."""
    found: dict[str, tuple[str, str]] = {}
    for loss in [*losses[:1]] + [loss for loss in losses[1:] if len(loss.hosts) == 1]:
        for vm_id, host_id in loss.places.items():
            found.setdefault(vm_id, (at[vm_id], host_id))
        for each in loss.homeless:
            found.setdefault(each.vm_id, (at[each.vm_id], ""))
    return {v: r for v, r in found.items() if (before[v].lost_host_id, before[v].refuge) != r}


async def _keep(
    scheduler: Scheduler, cluster_id: str, count: int, refuges: dict[str, tuple[str, str]]
) -> bool:
    """False: something changed meanwhile, and it is looked at again. A VM whose needs nobody told has no row yet."""
    if not await _write(scheduler, store.next_count(cluster_id, count), store.keep_refuges(refuges)):
        return False
    known = scheduler.guests.get(cluster_id)
    if known is not None and known[0] == count:
        keep(known[1], refuges)
        scheduler.guests[cluster_id] = count + 1, known[1]
    return True


async def _write(scheduler: Scheduler, *changes: Change) -> bool:
    try:
        await scheduler.core.commit(*changes)
    except Stale:
        return False
    return True


def _change(
    world: World,
    losses: Sequence[Loss],
    exhaustive: bool,
    row: Row[ClusterPromise, Nothing] | None,
) -> Change | None:
    """What is to be written; None when it is written already."""
    now, policy = utc_now(), world.policy
    broken = sorted(homeless(losses), key=lambda loss: (-len(loss.homeless), loss.hosts))
    old = row.public if row is not None else ClusterPromise(
        id=policy.id, revision=1, created_at=now, updated_at=now, cluster_id=policy.id
    )  # fmt: skip
    new = replace(
        old,
        cluster_name=policy.name,
        host_failures=policy.reserve_host_failures,
        admission_control=AdmissionControl(policy.admission_control),
        kept=not broken,
        message=_message(world, broken),
        change=(broken[0].homeless[0].change or planned.ADVICE) if broken else "",
        exhaustive=exhaustive,
        sets_tried=len(losses) - 1,
        breaking=tuple(
            planned.told(world.fleet, each, {}, {}, all_vms=False) for each in broken[:NAMED_LOSSES]
        ),
        unprotected_vm_ids=tuple(sorted({each.vm_id for loss in broken for each in loss.homeless})),
    )
    if row is not None and new == old:
        return None
    if row is None or new.kept != old.kept:
        log.log(
            logging.INFO if new.kept else logging.WARNING, "%s", new.message or f"{planned.promised(policy)}"
        )
    return PROMISES.insert(new, Nothing()) if row is None else PROMISES.update(row, new)


def _message(world: World, broken: Sequence[Loss]) -> str:
    if not broken:
        return ""
    return f"{planned.promised(world.policy)}, but {planned.breach(world.fleet, broken[0])}. {broken[0].homeless[0].message}"


# What VMs would ask of another host


@part.every(NEEDS_SECONDS)
async def ask_needs(scheduler: Scheduler) -> None:
    await tell_needs(scheduler, [c.id for c in scheduler.fleet.clusters.values() if c.promises])


async def tell_needs(scheduler: Scheduler, cluster_ids: Sequence[str]) -> None:
    """Ask inventory about VMs whose needs aren't known, or may have changed. What can't be told now stays as it is."""
    pool, bus = scheduler.core.pool, scheduler.core.bus
    due = await store.unasked(pool, cluster_ids, OLD_SECONDS) if cluster_ids else []
    for start in range(0, len(due), TOGETHER):
        some = tuple(due[start : start + TOGETHER])
        try:
            told = (await bus.ask(DESCRIBE_NEEDS, VmNeeds(vm_ids=some), Caller("service:scheduler"))).vms
        except Refused as refused:
            log.info("what VMs would ask of another host is asked later: %s", refused.message)
            return
        known = await store.needs(pool, some)
        needs = [vm.need for vm in told]
        changed = any(known.get(need.vm_id) != need for need in needs)
        clusters = {need.cluster_id for need in needs}
        await scheduler.core.commit(store.raise_count(clusters, int(changed)), store.keep_needs(needs))


@part.every(FORGET_SECONDS)
async def forget(scheduler: Scheduler) -> None:
    await store.forget(scheduler.core.pool)


@part.answers(GET_PROMISE)
async def get_promise(scheduler: Scheduler, ask: GetById, caller: Caller) -> Any:
    return await PROMISES.raw(scheduler.core.pool, ask.id)


@part.answers(LIST_PROMISES)
async def list_promises(scheduler: Scheduler, ask: ListQuery, caller: Caller) -> Any:
    return await page(scheduler.core.pool, PROMISES, ask)
