"""Placing: choose a host for a VM and claim its capacity there, or say for every host why not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from services.scheduler import affinity, cpu_store, licence_store, model, promising, store
from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import Fleet
from services.scheduler.policies.bound import Bound
from services.scheduler.policies.cpus import footprint
from services.scheduler.policies.decision import NAMED_HOSTS, decide, explain, mend, sentence
from services.scheduler.policies.pinned import given
from services.scheduler.policies.request import Request, request
from services.scheduler.state import Scheduler
from volery.contracts.cpus import GivenCpus, PinningPolicy
from volery.contracts.errors import Kind, Refused, conflict, not_found
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import (
    GET_DECISION,
    LIST_DECISIONS,
    PLACE,
    Claim,
    GetDecision,
    PastDecision,
    Place,
    Placement,
    Purpose,
)
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale, Taken

part = Part()

Claims = Sequence[Row[Claim, store.ClaimPrivate]]

TRIES = 50
"""Claims lost to others in a row before a placement gives up: each means that somebody else got one."""


@part.answers(PLACE)
async def place(scheduler: Scheduler, ask: Place, caller: Caller) -> Placement:
    """Raises Refused(invalid) for an impossible need; that no host fits is an answer, not a refusal."""
    model.check(ask)
    if ask.dry_run:
        bound, _ = await affinity.bind(scheduler, ask.need)
        again = partial(_decided, scheduler, bound=bound)
        plan = again(ask)
        if not plan.host_id and await _saw_who_left(scheduler, ask):
            plan = again(ask)
        return (await promising.admitted(scheduler, ask, plan, again))[0]
    claims = await store.claims_of(scheduler.core.pool, ask.need.vm_id)
    if (first := await _first_answer(scheduler, ask, claims)) is not None:
        return first
    await _make_way(scheduler, ask, claims)
    ask = await promising.with_refuge(scheduler, ask)
    waited = False
    for _ in range(TRIES):
        try:
            async with _turns(scheduler, ask):
                placement = await _try(scheduler, ask, caller, refuses=waited)
            if placement is not None:
                return placement
            waited = True
            await _hear_more(scheduler, ask)
        except Stale:
            await scheduler.read_used()
            await scheduler.read_rules(ask.need.cluster_id)
        except Taken as taken:
            if taken.constraint != store.CLAIM_TAKEN:
                raise
            claims = await store.claims_of(scheduler.core.pool, ask.need.vm_id)
            if (first := await _first_answer(scheduler, ask, claims)) is not None:
                return first
    raise Refused(
        Kind.EXHAUSTED,
        f"VM {ask.need.name or ask.need.vm_id} lost its place to others {TRIES} times; try again shortly",
    )


@asynccontextmanager
async def _turns(scheduler: Scheduler, ask: Place) -> AsyncIterator[None]:
    """In one process they come one after the other: those that depend on each other's places, and those that would choose
    the same CPUs."""
    async with AsyncExitStack() as turns:
        if ask.need.cpu_pinning.policy is not PinningPolicy.NONE:
            await turns.enter_async_context(scheduler.turn(f"cpus {ask.need.cluster_id}"))
        await turns.enter_async_context(affinity.turn(scheduler, ask.need))
        await turns.enter_async_context(promising.turn(scheduler, ask.need.cluster_id))
        yield


async def _try(scheduler: Scheduler, ask: Place, caller: Caller, *, refuses: bool) -> Placement | None:
    """None when no host fits and that isn't to be said yet. Raises Stale when it lost its place to another."""
    bound, guards = await affinity.bind(scheduler, ask.need)
    again = partial(_decided, scheduler, bound=bound)
    placement, guards = await promising.admitted(scheduler, ask, again(ask), again, guards, fresh=refuses)
    if not placement.host_id and not refuses:
        return None
    return await _commit(scheduler, ask, placement, guards, caller)


def _decided(scheduler: Scheduler, ask: Place, bound: Bound) -> Placement:
    policy = scheduler.policy(ask.need.cluster_id)
    recipe = scheduler.fleet.recipe(policy)
    asked = request(ask, policy, scheduler.config, bound, recipe=recipe, now=monotonic())
    return decided(scheduler.fleet, asked, scheduler.config)


def decided(fleet: Fleet, asked: Request, config: SchedulerConfig) -> Placement:
    """The decision and its explanation; nothing is claimed or kept yet."""
    decision = decide(fleet, asked)
    hosts = explain(fleet, asked, decision, _shown(config))
    best, mended = decision.best, mend(fleet, asked, decision)
    return Placement(
        vm_id=asked.need.vm_id,
        epoch=asked.place.epoch,
        host_id=fleet.ids[best] if best is not None else "",
        hosts=hosts,
        message=sentence(fleet, asked, decision, hosts, mended),
        vm_name=asked.need.name,
        purpose=asked.place.purpose,
        considered=int(np.count_nonzero(decision.considered)),
        fitting=decision.fitting,
        excluded_by=decision.excluded_by(),
        remedies=mended,
        cpus=_cpus(fleet, asked, best),
        policy_id=asked.recipe.id,
        policy_name=asked.recipe.name,
        policy_revision=asked.recipe.revision,
        selector=asked.recipe.selector,
    )


def _cpus(fleet: Fleet, asked: Request, row: int | None) -> GivenCpus | None:
    """Those that it gets on the host, under the revision that they were chosen under."""
    found = None if row is None else given(fleet, asked, row)
    if row is None or found is None:
        return None
    return replace(found, revision=fleet.held(fleet.ids[row]).revision)


async def _hear_more(scheduler: Scheduler, ask: Place) -> None:
    """What would make room may be on its way: read all again, and give facts a moment to arrive."""
    await _saw_who_left(scheduler, ask)
    scheduler.changed.clear()
    try:
        async with asyncio.timeout(scheduler.config.refusal_wait_seconds):
            await scheduler.changed.wait()
    except TimeoutError:
        await scheduler.reload()


async def _saw_who_left(scheduler: Scheduler, ask: Place) -> bool:
    """Looks whether CPUs could become one VM's alone since larger VMs that shared them left, for a VM that wants some."""
    if ask.need.cpu_pinning.policy in (PinningPolicy.NONE, PinningPolicy.MANUAL):
        return False
    await cpu_store.lower_largest(scheduler.core.pool, ask.need.cluster_id)
    await scheduler.read_used()
    return True


async def _make_way(scheduler: Scheduler, ask: Place, claims: Claims) -> None:
    """Who starts a VM has made sure that it runs nowhere: what it held before is free, also for itself."""
    if ask.purpose is Purpose.MIGRATE:
        return
    for row in claims:
        try:
            await scheduler.core.commit(*store.release(row))
        except Stale:
            continue
        scheduler.gave_back(row.public)


async def _first_answer(scheduler: Scheduler, ask: Place, claims: Claims) -> Placement | None:
    """The placement that holds the claim of (vm_id, epoch), if there is one.

    Raises Refused(conflict) for a question from the past, and for a claim where this placement may not be.
    """
    newest = max((row.public.epoch for row in claims), default=0)
    if newest > ask.epoch:
        raise conflict(
            f"VM {ask.need.name or ask.need.vm_id} was placed under epoch {newest} meanwhile; a placement under epoch "
            f"{ask.epoch} comes too late",
            epoch=newest,
        )
    row = next((row for row in claims if row.public.epoch == ask.epoch), None)
    if row is None:
        return None
    host_id = row.public.host_id
    if host_id in ask.excluded_host_ids or ask.target_host_id not in ("", host_id):
        raise conflict(
            f"VM {ask.need.name or ask.need.vm_id} holds a claim on host {host_id} under epoch {ask.epoch}, which "
            "this placement leaves out; release it, or place under a higher epoch",
            host_id=host_id,
            claim_id=row.id,
        )
    kept = await store.decision(scheduler.core.pool, row.private.decision_id)
    if kept is None:
        return Placement(
            vm_id=ask.need.vm_id,
            epoch=ask.epoch,
            host_id=host_id,
            claimed=True,
            cpus=row.public.cpus,
            message="placed before; the explanation is no longer kept",
        )
    first = msgspec.json.decode(kept, type=Placement)
    # A decision of the previous release explains every host of its cluster.
    return replace(first, hosts=first.hosts[: _shown(scheduler.config)])


async def _commit(
    scheduler: Scheduler, ask: Place, placement: Placement, guards: Sequence[Change], caller: Caller
) -> Placement:
    """Write claim and decision. Raises Stale when the capacity went to somebody else, or what `guards` guard did."""
    decision_id = new_id()
    placement = replace(placement, decision_id=decision_id, claimed=bool(placement.host_id))
    changes: list[Change] = []
    if placement.host_id:
        claim = _claim(scheduler, ask, placement)
        changes = [
            *guards,
            cpu_store.take_cpus(claim) if claim.cpu_pinning else store.take_capacity(claim),
            store.CLAIMS.insert(claim, store.ClaimPrivate(decision_id=decision_id)),
            *_use(scheduler, ask, placement, claim),
        ]
    await scheduler.core.commit(
        *changes, store.keep_decision(placement, _in_short(placement)), caller=caller, answer=placement
    )
    if placement.host_id:
        scheduler.took(claim)
    return placement


def _use(scheduler: Scheduler, ask: Place, placement: Placement, claim: Claim) -> list[Change]:
    """For the licence report."""
    if claim.cpus is None:
        return []
    host = scheduler.fleet.cpus_of(scheduler.fleet.rows[claim.host_id])
    cores, sockets = footprint(host, claim.cpus)
    name = placement.hosts[0].name
    return [licence_store.begin_use(claim, ask.need.name, name, cores, sockets)]


def _claim(scheduler: Scheduler, ask: Place, placement: Placement) -> Claim:
    now, pinning = utc_now(), ask.need.cpu_pinning.policy
    return Claim(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        vm_id=ask.need.vm_id,
        epoch=ask.epoch,
        host_id=placement.host_id,
        memory_bytes=model.memory_taken(ask.need.memory_bytes, scheduler.config),
        vcpus=ask.need.vcpus,
        state=model.TENTATIVE,
        purpose=ask.purpose,
        high_availability=ask.need.high_availability,
        cpu_pinning="" if pinning is PinningPolicy.NONE else pinning,
        cpus=placement.cpus,
        exclusive_cpus=len(placement.cpus.exclusive) if placement.cpus is not None else 0,
    )


def _in_short(placement: Placement) -> PastDecision:
    now = utc_now()
    return PastDecision(
        id=placement.decision_id,
        revision=1,
        created_at=now,
        updated_at=now,
        vm_id=placement.vm_id,
        vm_name=placement.vm_name,
        epoch=placement.epoch,
        purpose=placement.purpose,
        host_id=placement.host_id,
        host_name=placement.hosts[0].name if placement.host_id else "",
        message=placement.message,
    )


def _shown(config: SchedulerConfig) -> int:
    """Decisions stay small however large the cluster is; but a sentence's hosts are always explained."""
    return max(config.explained_hosts, NAMED_HOSTS)


@part.answers(GET_DECISION)
async def get_decision(scheduler: Scheduler, ask: GetDecision, caller: Caller) -> Any:
    body = await store.decision(scheduler.core.pool, ask.id)
    if body is None:
        raise not_found("decision", ask.id)
    return msgspec.Raw(body)


@part.answers(LIST_DECISIONS)
async def list_decisions(scheduler: Scheduler, ask: ListQuery, caller: Caller) -> Any:
    newest_first = ask if ask.order_by else replace(ask, order_by="-id")
    return await store.decisions(scheduler.core.pool, newest_first)
