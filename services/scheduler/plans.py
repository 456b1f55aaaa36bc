"""Plans as people and the scheduler itself ask for them: computed, shown, begun, listed, cancelled; and the arbiter.

The arbiter is the table plan_hold: a VM or host is held by one active plan. A plan that goes before another (hosts are
emptied before affinity is mended before hosts are balanced) stops it and takes what it held. ha and the maintenance of a
host aren't plans and go before all: a plan stops when a host of its cluster is no longer up.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from msgspec.structs import replace

from services.scheduler import boards, saving
from services.scheduler import plan_store as sql
from services.scheduler.fleet import UP
from services.scheduler.plan_store import PLANS
from services.scheduler.policies.balance import BALANCES, Thresholds, nothing
from services.scheduler.policies.balancing import AIMS, Aims
from services.scheduler.policies.planning import Draft, Wanted, draft
from services.scheduler.policies.recipe import Recipe
from services.scheduler.policies.units import OVERLOAD_MINUTES
from services.scheduler.state import Scheduler
from services.scheduler.store import GROUPS
from volery.contracts.cluster import GET_CLUSTER, GetById
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.host import HostStatus
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery, Operation
from volery.contracts.plan import (
    CANCEL_PLAN,
    GET_PLAN,
    LIST_PLANS,
    MAKE_PLAN,
    MakePlan,
    Plan,
    PlanKind,
    PlanState,
)
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Nothing, Stale, Taken

log = logging.getLogger(__name__)

part = Part()

PLAN_SECONDS = 4 * 3600.0
LOOK_SECONDS = 5.0
FORGET_SECONDS = 3600.0
MOST_MOVES = 10_000
JOINING = 5
"""How often one that joins others tries that again when it meets one that was quicker."""
HELD = "held"
"""The rule of a plan that is refused since another has what it needs."""
GOES_BEFORE = frozenset(
    {HostStatus.CONNECTING, HostStatus.NON_RESPONSIVE, HostStatus.PREPARING_FOR_MAINTENANCE}
)
"""While a host of a cluster is one of these, ha or a maintenance needs room there, and the scheduler begins no plan by
itself."""


@part.answers(MAKE_PLAN)
async def make(scheduler: Scheduler, ask: MakePlan, caller: Caller) -> Operation:
    """Raises Refused(invalid) for a question that makes no sense, conflict when a plan that goes before it is under way."""
    await _check(scheduler, ask, caller)
    for _ in range(JOINING if ask.joins else 0):
        try:
            return await _begun(scheduler, ask, caller)
        except Refused as refused:
            if refused.details.get("rule") != HELD:
                raise
        # Made at the same time, perhaps of a host of which it isn't heard yet that it leaves, too.
        await scheduler.hear_more()
    return await _begun(scheduler, ask, caller)


async def _begun(scheduler: Scheduler, ask: MakePlan, caller: Caller) -> Operation:
    joined = await _joined(scheduler, ask) if ask.joins else []
    ask = _with_hosts_of(scheduler, ask, joined)
    made = await _drafted(scheduler, ask)
    plan = _plan(ask, made, caller)
    op, begun = scheduler.core.operations.begin(
        "plan.carry_out",
        object_kind="plan",
        object_id=plan.id,
        object_name=f"{plan.kind} of {scheduler.policy(plan.cluster_id).name or plan.cluster_id}",
        caller=caller,
        deadline_seconds=PLAN_SECONDS,
    )
    if ask.dry_run:
        return replace(op, id="", result={"plan": replace(plan, id="")})
    plan = replace(plan, operation_id=op.id)
    for other in joined:
        reason = f"plan {plan.id} goes on with it, which empties more hosts"
        await end(scheduler, other.id, PlanState.STOPPED, reason, continued_by=plan.id)
    await _stop_lower(scheduler, plan)
    try:
        changes = (PLANS.insert(plan, Nothing()), sql.take(plan), begun)
        await scheduler.core.commit(*changes, caller=caller, answer=op)
    except Taken as taken:
        if taken.constraint != sql.HELD:
            raise
        raise await _held(scheduler, plan) from None
    return op


async def _check(scheduler: Scheduler, ask: MakePlan, caller: Caller) -> None:
    checks.object_id(ask.cluster_id, "cluster")
    if ask.cluster_id not in scheduler.fleet.clusters:
        await scheduler.core.bus.ask(GET_CLUSTER, GetById(id=ask.cluster_id), Caller(caller.principal))
        raise Refused(
            Kind.UNAVAILABLE,
            f"the scheduler has not heard of cluster {ask.cluster_id} yet; try again shortly",
        )
    checks.between(ask.most_moves, 0, MOST_MOVES, "most_moves", "moves")
    policy = scheduler.policy(ask.cluster_id)
    if ask.kind is PlanKind.BALANCE and _aims(scheduler.fleet.recipe(policy)) is None:
        raise conflict(
            f"the scheduling policy of cluster {policy.name} balances nothing: give the cluster a policy with a balance, "
            f"e.g. evenly_distributed"
        )
    _check_hosts(scheduler, ask, policy.name)
    if ask.joins and ask.kind is not PlanKind.EVACUATION:
        raise invalid(f"only evacuations are joined, not plans of the kind {ask.kind}", field="joins")
    if ask.kind is PlanKind.UPGRADE and not ask.dry_run:
        raise invalid(
            "an upgrade is only shown as a plan (dry_run); the cluster's own upgrade carries it out, one host after the other",
            field="kind",
        )
    if ask.kind is PlanKind.SAVING:
        await saving.check(scheduler, ask)


HOSTS_OF = {
    "host_ids": (PlanKind.EVACUATION, PlanKind.UPGRADE, PlanKind.SAVING),
    "avoided_host_ids": (PlanKind.EVACUATION,),
    "wake_host_ids": (PlanKind.SAVING,),
}
"""Which kinds of plans name hosts, and where."""


def _check_hosts(scheduler: Scheduler, ask: MakePlan, cluster: str) -> None:
    if ask.kind in (PlanKind.EVACUATION, PlanKind.UPGRADE) and not ask.host_ids:
        raise invalid(f"an {ask.kind} names the hosts that it empties", field="host_ids")
    own = scheduler.fleet.in_cluster(ask.cluster_id)
    for field, kinds in HOSTS_OF.items():
        host_ids = getattr(ask, field)
        if host_ids and ask.kind not in kinds:
            raise invalid(f"{field} are named for {' or '.join(kinds)} only, not for {ask.kind}", field=field)
        for host_id in host_ids:
            row = scheduler.fleet.rows.get(host_id)
            if row is None or not own[row]:
                raise invalid(f"host {host_id} is none of cluster {cluster}'s", field=field)


def _aims(recipe: Recipe) -> Aims | None:
    return AIMS.get(recipe.balance)


def wanted_of(scheduler: Scheduler, plan: MakePlan | Plan) -> Wanted:
    policy = scheduler.policy(plan.cluster_id)
    aims = _aims(scheduler.fleet.recipe(policy)) or Aims()
    wanted = Wanted(plan.kind, aims, policy.reserve_host_failures > 0, plan.host_ids)
    if isinstance(plan, MakePlan):
        return dataclasses.replace(wanted, avoided=plan.avoided_host_ids, most=plan.most_moves)
    return wanted


async def _drafted(scheduler: Scheduler, ask: MakePlan) -> Draft:
    if ask.kind is PlanKind.SAVING:
        return await saving.drafted(scheduler, ask)
    closed = ask.host_ids if ask.kind is PlanKind.EVACUATION else ()
    return draft(await boards.look(scheduler, ask.cluster_id, closed=closed), wanted_of(scheduler, ask))


def _plan(ask: MakePlan, made: Draft, caller: Caller) -> Plan:
    now = utc_now()
    return Plan(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        cluster_id=ask.cluster_id,
        kind=ask.kind,
        message=made.message,
        steps=made.steps,
        unplaced=made.unplaced,
        broken_groups=made.broken_groups,
        before=round(made.before, 6),
        after=round(made.after, 6),
        host_ids=made.host_ids if ask.kind in (PlanKind.SAVING, PlanKind.UPGRADE) else ask.host_ids,
        wake_host_ids=made.wake_host_ids,
        principal=caller.principal,
    )


# The arbiter


async def _joined(scheduler: Scheduler, ask: MakePlan) -> list[Plan]:
    """Evacuations under way whose hosts all go into maintenance, or have gone. Nobody is asked whether one of a host that stays
    in use should go on as part of another."""
    plans = [row.public for row in await sql.running(scheduler.core.pool, ask.cluster_id)]
    return [
        plan
        for plan in plans
        if plan.kind is PlanKind.EVACUATION and all(boards.leaves(scheduler, h) for h in plan.host_ids)
    ]


def _with_hosts_of(scheduler: Scheduler, ask: MakePlan, joined: Iterable[Plan]) -> MakePlan:
    more = [h for plan in joined for h in plan.host_ids if boards.is_cleared(scheduler, h)]
    return replace(ask, host_ids=tuple(dict.fromkeys((*ask.host_ids, *more))))


async def _stop_lower(scheduler: Scheduler, plan: Plan) -> None:
    """Plans that this one goes before let go of everything, if nothing that it needs is held by one it doesn't."""
    way = await sql.in_the_way(scheduler.core.pool, plan)
    if any(hold.rank <= sql.RANKS[plan.kind] for hold in way):
        return
    for plan_id in sorted({hold.plan_id for hold in way}):
        await end(
            scheduler,
            plan_id,
            PlanState.STOPPED,
            f"a plan of a kind that goes before it ({plan.kind}) needs its hosts",
        )


async def end(
    scheduler: Scheduler, plan_id: str, state: PlanState, reason: str, *, continued_by: str = ""
) -> None:
    """The plan has ended and holds nothing more; one that ended before stays as it is."""
    while True:
        row = await PLANS.find(scheduler.core.pool, plan_id)
        if row is None or row.public.state is not PlanState.RUNNING:
            return
        new = replace(row.public, state=state, reason=reason, ended_at=utc_now(), continued_by=continued_by)
        with suppress(Stale):
            await scheduler.core.commit(PLANS.update(row, new), sql.let_go([plan_id]))
            log.info("plan %s (%s) %s%s", plan_id, new.kind, state, f": {reason}" if reason else "")
            return


async def _held(scheduler: Scheduler, plan: Plan) -> Refused:
    way = await sql.in_the_way(scheduler.core.pool, plan)
    if not way:
        return conflict("another plan held some of these hosts or VMs a moment ago; try again", rule=HELD)
    first = way[0]
    return conflict(
        f"{first.noun} {first.object_id} is part of plan {first.plan_id}, which is under way and goes before this one or is "
        "of its kind; wait for it, or cancel it",
        rule=HELD,
        plan_id=first.plan_id,
    )


@part.answers(GET_PLAN)
async def get(scheduler: Scheduler, ask: GetById, caller: Caller) -> Any:
    return await PLANS.raw(scheduler.core.pool, ask.id)


@part.answers(LIST_PLANS)
async def list_plans(scheduler: Scheduler, ask: ListQuery, caller: Caller) -> Any:
    return await page(scheduler.core.pool, PLANS, ask)


@part.answers(CANCEL_PLAN)
async def cancel(scheduler: Scheduler, ask: GetById, caller: Caller) -> Any:
    """Raises Refused(conflict) for one that has ended."""
    plan = (await PLANS.get(scheduler.core.pool, ask.id)).public
    if plan.state is not PlanState.RUNNING:
        raise conflict(f"plan {plan.id} has already {plan.state}; there is nothing to cancel")
    return await scheduler.core.operations.cancel(plan.operation_id)


# By itself


@part.every(LOOK_SECONDS)
async def look(scheduler: Scheduler) -> None:
    """Broken affinity groups first, then hosts with too much."""
    seconds, clusters = scheduler.config.plan_seconds, scheduler.fleet.clusters
    await in_turn(scheduler, clusters, seconds, scheduler.planned_at, _mend, "no plan for cluster %s now: %s")


async def in_turn(
    scheduler: Scheduler,
    cluster_ids: Iterable[str],
    seconds: float,
    looked_at: dict[str, float],
    act: Callable[[Scheduler, str], Awaitable[None]],
    refused_as: str,
) -> None:
    """Acts on each cluster once in so many seconds; 0: never. `looked_at`: cluster → when it last was. What stands against it
    is logged as is said: cluster, reason."""
    now = monotonic()
    if not seconds or scheduler.core.quarantine.holds:
        return
    for cluster_id in sorted(cluster_ids):
        if now - looked_at.get(cluster_id, -seconds) < seconds:
            continue
        looked_at[cluster_id] = now
        try:
            await act(scheduler, cluster_id)
        except Refused as refused:
            log.info(refused_as, cluster_id, refused.message)


async def _mend(scheduler: Scheduler, cluster_id: str) -> None:
    kinds = [
        kind for kind in (PlanKind.AFFINITY, PlanKind.BALANCE) if _calls_for(scheduler, cluster_id, kind)
    ]
    if not kinds or not await may(scheduler, cluster_id):
        return
    for kind in kinds:
        if kind is PlanKind.AFFINITY and not await _is_broken(scheduler, cluster_id):
            continue
        most = scheduler.config.plan_moves if kind is PlanKind.BALANCE else 0
        ask = MakePlan(cluster_id=cluster_id, kind=kind, most_moves=most, dry_run=True)
        if (await _drafted(scheduler, ask)).steps:
            # Under an id of its own: whoever else is asked to at the same time meets it in the arbiter.
            await make(scheduler, replace(ask, dry_run=False), boards.SELF)
            return


def _calls_for(scheduler: Scheduler, cluster_id: str, kind: PlanKind) -> bool:
    """Whether what is in memory gives a reason to look closer."""
    if kind is PlanKind.AFFINITY:
        rules = scheduler.rules.get(cluster_id)
        return rules is not None and bool(rules.groups)
    fleet, policy = scheduler.fleet, scheduler.policy(cluster_id)
    recipe = fleet.recipe(policy)
    if _aims(recipe) is None:
        return False
    figures = Thresholds.of(recipe, scheduler.config)
    if OVERLOAD_MINUTES not in recipe.parameters:
        figures = Thresholds(
            **{n: getattr(figures, n) for n in Thresholds.__slots__}
            | {"seconds": max(figures.seconds, scheduler.config.plan_after_seconds)}
        )
    among = fleet.in_cluster(cluster_id) & (fleet.ints("status") == UP)
    cut = BALANCES.get(recipe.balance, nothing)(fleet, among, figures, monotonic())
    return bool(np.any(cut.over))


async def _is_broken(scheduler: Scheduler, cluster_id: str) -> bool:
    """By the last look at the cluster's groups."""
    return any(
        row.public.broken for row in await GROUPS.where(scheduler.core.pool, "cluster_id = $1", cluster_id)
    )


async def may(scheduler: Scheduler, cluster_id: str, kind: PlanKind | None = None) -> bool:
    """Whether no plan is under way there, nor was one stopped a moment ago, and nothing goes before one, nor is the cluster
    upgraded. `kind`: of this kind only a stopped one keeps others back by its own rules."""
    fleet = scheduler.fleet
    if any(
        fleet.status_of(row) in GOES_BEFORE for row in np.flatnonzero(fleet.in_cluster(cluster_id)).tolist()
    ) or await _is_upgraded(scheduler, cluster_id):
        return False
    last = await sql.newest(scheduler.core.pool, cluster_id)
    if last is None:
        return True
    if last.public.state is PlanState.RUNNING or last.public.ended_at is None:
        return False
    age = (utc_now() - last.public.ended_at).total_seconds()
    return (
        last.public.state is PlanState.SUCCEEDED
        or last.public.kind is kind
        or age > scheduler.config.plan_pause_seconds
    )


async def _is_upgraded(scheduler: Scheduler, cluster_id: str) -> bool:
    """What was moved for the good of the cluster would be moved again at the next host's turn."""
    cluster = await scheduler.core.bus.ask(GET_CLUSTER, GetById(id=cluster_id), boards.SELF)
    return bool(cluster.busy_with)


@part.every(FORGET_SECONDS)
async def forget(scheduler: Scheduler) -> None:
    for row in await sql.forgotten(scheduler.core.pool, scheduler.config.plan_days):
        with suppress(Stale):
            await scheduler.core.commit(PLANS.delete(row))
