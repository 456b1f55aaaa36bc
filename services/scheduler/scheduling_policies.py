"""Scheduling policies as a resource: made, copied, changed, deleted, given to clusters; the built-in ones are there."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from msgspec import UNSET
from msgspec.structs import asdict, replace

from services.scheduler import policy_store as sql
from services.scheduler.policies import drafts
from services.scheduler.policies.balance import loads
from services.scheduler.policies.recipe import BUILT_IN, BY_BALANCE
from services.scheduler.policies.units import MANDATORY, UNITS
from services.scheduler.policy_store import POLICIES, Given, PolicyRow
from services.scheduler.state import Scheduler
from volery.contracts.base import Done
from volery.contracts.cluster import GET_CLUSTER, Balance, DeleteById, GetById
from volery.contracts.errors import Kind, Refused, conflict
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling_policy import (
    CREATE_SCHEDULING_POLICY,
    DELETE_SCHEDULING_POLICY,
    GET_CLUSTER_BALANCE,
    GET_CLUSTERS_POLICY,
    GET_SCHEDULING_POLICY,
    GIVE_SCHEDULING_POLICY,
    LIST_POLICY_UNITS,
    LIST_SCHEDULING_POLICIES,
    UPDATE_SCHEDULING_POLICY,
    ClusterBalance,
    CreateSchedulingPolicy,
    GiveSchedulingPolicy,
    ListPolicyUnits,
    PolicyUnits,
    SchedulingPolicy,
    UpdateSchedulingPolicy,
)
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Stale, Taken

log = logging.getLogger(__name__)

part = Part()

TIDY_SECONDS = 5.0
FIELDS = tuple(name for name in UpdateSchedulingPolicy.__struct_fields__ if name not in ("id", "if_revision"))


def _said(ask: CreateSchedulingPolicy | UpdateSchedulingPolicy) -> dict[str, Any]:
    return {name: value for name in FIELDS if (value := getattr(ask, name)) is not UNSET}


@part.answers(CREATE_SCHEDULING_POLICY)
async def create(scheduler: Scheduler, ask: CreateSchedulingPolicy, caller: Caller) -> SchedulingPolicy:
    """Raises Refused(invalid) for a mistake in it, conflict for a name that is taken."""
    pattern = BY_BALANCE[Balance.EVENLY_DISTRIBUTED]
    if ask.copy_of:
        pattern = (await POLICIES.get(scheduler.core.pool, ask.copy_of)).public
    now = utc_now()
    fields = asdict(replace(pattern, built_in=False, cluster_ids=(), description="")) | _said(ask)
    made = SchedulingPolicy(
        **(fields | {"id": new_id(), "revision": 1, "created_at": now, "updated_at": now})
    )
    drafts.check(made)
    await _commit(scheduler, made, POLICIES.insert(made, Nothing()), caller=caller, answer=made)
    return made


@part.answers(UPDATE_SCHEDULING_POLICY)
async def update(scheduler: Scheduler, ask: UpdateSchedulingPolicy, caller: Caller) -> Any:
    """The next placement in its clusters goes by it. Raises Refused as `create`, and stale when it has another revision
    than `if_revision`."""
    while True:
        row = await POLICIES.get(scheduler.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "scheduling policy")
        drafts.check_changeable(row.public, "changed")
        new = replace(_of_this_release(row.public), **_said(ask))
        drafts.check(new)
        change = POLICIES.update(row, new)
        changes = [change, sql.decide_again(new.cluster_ids)]
        try:
            await _commit(scheduler, new, *changes, caller=caller, answer=change.document)
        except Stale:
            continue
        for cluster_id in new.cluster_ids:
            await scheduler.read_rules(cluster_id)
        return change.document


def _of_this_release(policy: SchedulingPolicy) -> SchedulingPolicy:
    """Filters that no policy can leave out since it was written are in it."""
    return replace(policy, filters=tuple(dict.fromkeys((*policy.filters, *MANDATORY))))


async def _commit(
    scheduler: Scheduler, policy: SchedulingPolicy, *changes: Change, caller: Caller, answer: Any
) -> None:
    try:
        await scheduler.core.commit(*changes, caller=caller, answer=answer)
    except Taken as taken:
        if taken.constraint != sql.POLICY_NAME:
            raise
        raise conflict(
            f"there is a scheduling policy named {policy.name!r} already; choose another name",
            name=policy.name,
        ) from None


@part.answers(DELETE_SCHEDULING_POLICY)
async def delete(scheduler: Scheduler, ask: DeleteById, caller: Caller) -> Done:
    """Raises Refused(conflict) while clusters have it; they are named."""
    pool = scheduler.core.pool
    while True:
        row = await POLICIES.get(pool, ask.id)
        checks.revision(row.public, ask.if_revision, "scheduling policy")
        drafts.check_changeable(row.public, "deleted")
        if names := await sql.cluster_names(pool, row.public.cluster_ids):
            raise conflict(
                f"scheduling policy {row.public.name} is in use by cluster{'s' if len(names) > 1 else ''} "
                f"{', '.join(names)}: give them another one, or none, first",
                cluster_ids=list(row.public.cluster_ids),
            )
        try:
            # Giving it to a cluster changes its revision, so that whoever comes second reads again.
            await scheduler.core.commit(POLICIES.delete(row), caller=caller, answer=Done())
        except Stale:
            continue
        return Done()


@part.answers(GET_SCHEDULING_POLICY)
async def get(scheduler: Scheduler, ask: GetById, caller: Caller) -> Any:
    return await POLICIES.raw(scheduler.core.pool, ask.id)


@part.answers(LIST_SCHEDULING_POLICIES)
async def list_policies(scheduler: Scheduler, ask: ListQuery, caller: Caller) -> Any:
    return await page(scheduler.core.pool, POLICIES, ask)


@part.answers(LIST_POLICY_UNITS)
async def list_units(scheduler: Scheduler, ask: ListPolicyUnits, caller: Caller) -> PolicyUnits:
    return PolicyUnits(units=UNITS)


@part.answers(GET_CLUSTERS_POLICY)
async def of_cluster(scheduler: Scheduler, ask: GetById, caller: Caller) -> Any:
    cluster = await _cluster(scheduler, ask.id, caller)
    return await POLICIES.raw(scheduler.core.pool, cluster.policy_id or _by_balance(cluster))


@part.answers(GET_CLUSTER_BALANCE)
async def balance_of(scheduler: Scheduler, ask: GetById, caller: Caller) -> ClusterBalance:
    """By the samples that this replica has heard."""
    cluster = await _cluster(scheduler, ask.id, caller)
    recipe = scheduler.fleet.recipe(scheduler.policy(cluster.id))
    found = loads(scheduler.fleet, cluster.id, recipe, scheduler.config, monotonic())
    return ClusterBalance(
        cluster_id=cluster.id,
        policy_id=recipe.id,
        policy_name=recipe.name,
        policy_revision=recipe.revision,
        balance=recipe.balance,
        hosts=tuple(found),
    )


@part.answers(GIVE_SCHEDULING_POLICY)
async def give(scheduler: Scheduler, ask: GiveSchedulingPolicy, caller: Caller) -> Any:
    """Takes the place of the one that it had. The next placement goes by it."""
    pool = scheduler.core.pool
    while True:
        cluster = await _cluster(scheduler, ask.cluster_id, caller)
        holds = await POLICIES.get(pool, ask.policy_id or _by_balance(cluster))
        if ask.policy_id == cluster.policy_id:
            await scheduler.core.commit(caller=caller, answer=holds.public)
            return holds.public
        changes = [sql.give(cluster, ask.policy_id)]
        answer: Any = holds.public
        if ask.policy_id:
            changes.append(sql.with_cluster(holds, cluster.id))
            answer = changes[-1].document
        if cluster.policy_id and (old := await POLICIES.find(pool, cluster.policy_id)) is not None:
            changes.append(sql.without_clusters(old, (cluster.id,)))
            answer = changes[-1].document if old.id == holds.id else answer
        try:
            await scheduler.core.commit(*changes, caller=caller, answer=answer)
        except Stale:
            continue
        await scheduler.read_rules(cluster.id)
        return answer


def _by_balance(cluster: Given) -> str:
    return (BY_BALANCE.get(cluster.balance) or BY_BALANCE[Balance.NONE]).id


async def _cluster(scheduler: Scheduler, cluster_id: str, caller: Caller) -> Given:
    """As the scheduler knows it. Raises Refused for one that doesn't exist."""
    checks.object_id(cluster_id, "cluster")
    found = await sql.given(scheduler.core.pool, cluster_id)
    if found is None:
        await scheduler.core.bus.ask(GET_CLUSTER, GetById(id=cluster_id), Caller(caller.principal))
        raise Refused(
            Kind.UNAVAILABLE, f"the scheduler has not heard of cluster {cluster_id} yet; try again shortly"
        )
    return found


# Kept in step


async def keep_built_in(scheduler: Scheduler) -> None:
    """The built-in policies are there, as this release has them. An administrator's policy of such a name, made under a
    release that hadn't it, keeps the name."""
    for policy in BUILT_IN.values():
        row = await POLICIES.find(scheduler.core.pool, policy.id)
        with suppress(Stale, Taken):
            if row is None:
                await scheduler.core.commit(POLICIES.insert(policy, Nothing()))
            elif (meant := _meant(row, policy)) != row.public:
                await scheduler.core.commit(POLICIES.update(row, meant))


def _meant(row: PolicyRow, policy: SchedulingPolicy) -> SchedulingPolicy:
    """This release's definition, with what the row counts."""
    was = row.public
    return replace(
        policy,
        revision=was.revision,
        created_at=was.created_at,
        updated_at=was.updated_at,
        cluster_ids=was.cluster_ids,
    )


@part.every(TIDY_SECONDS)
async def tidy(scheduler: Scheduler) -> None:
    """The built-in ones are there; a cluster that is gone leaves its policy."""
    await keep_built_in(scheduler)
    # The policies first: who is given one after that isn't in what was read, or makes the write stale.
    rows = await sql.in_use(scheduler.core.pool)
    given = await sql.all_given(scheduler.core.pool) if rows else {}
    for row in rows:
        gone = [each for each in row.public.cluster_ids if given.get(each) != row.id]
        if gone:
            with suppress(Stale):
                await scheduler.core.commit(sql.without_clusters(row, gone))
                log.info("scheduling policy %s is no longer that of clusters %s", row.public.name, gone)
