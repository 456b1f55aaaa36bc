"""Placing: choose a host for a VM and claim its capacity there, or say for every host why not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import replace

from services.scheduler import (
    affinity,
    cell_claims,
    choice,
    cpu_store,
    decision_store,
    device_claims,
    granting,
    licence_store,
    model,
    promising,
    store,
    wanting,
)
from services.scheduler.policies.cpus import Wish, footprint
from services.scheduler.state import Scheduler
from volery.contracts.base import encode
from volery.contracts.cpus import PinningPolicy
from volery.contracts.errors import Kind, Refused, not_found
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import (
    GET_DECISION,
    LIST_DECISIONS,
    PLACE,
    Claim,
    GetDecision,
    Place,
    Placement,
    Purpose,
)
from volery.runtime.bus import Caller
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale, Taken

part = Part()

Claims = Sequence[Row[Claim, store.ClaimPrivate]]

TRIES = 50
"""Claims lost to others in a row before a placement gives up: each means that somebody else got one."""


@part.answers(PLACE)
async def place(scheduler: Scheduler, ask: Place, caller: Caller) -> Any:
    """Raises Refused(invalid) for an impossible need; that no host fits is an answer, not a refusal."""
    model.check(ask)
    if ask.dry_run:
        bound, _ = await affinity.bind(scheduler, ask.need)
        again = partial(choice.choose, scheduler, bound=bound)
        plan = again(ask)
        if not plan.host_id and await _saw_who_left(scheduler, ask):
            plan = again(ask)
        return (await promising.admitted(scheduler, ask, plan, again))[0]
    if not granting.goes_alone(scheduler, ask.need):
        with suppress(granting.OneByOne):
            return await scheduler.rounds.ask(granting.placing(scheduler, ask, caller))
    return await by_itself(scheduler, ask, caller)


async def by_itself(scheduler: Scheduler, ask: Place, caller: Caller) -> Placement:
    """Not in a round: see `granting.OneByOne`."""
    claims = await store.claims_of(scheduler.core.pool, ask.need.vm_id)
    if (first := await choice.first_answer(scheduler, ask, claims)) is not None:
        return first
    await _make_way(scheduler, ask, claims)
    ask = await promising.with_refuge(scheduler, ask)
    waited = False
    for _ in range(TRIES):
        try:
            async with _turns(scheduler, ask):
                placement = await _try(scheduler, ask, caller, refuses=waited)
            if placement is not None:
                if not placement.host_id:
                    wanting.note(scheduler, ask)
                return placement
            waited = True
            await _saw_who_left(scheduler, ask)
            await scheduler.hear_more()
        except Stale:
            await scheduler.read_used()
            await scheduler.read_rules(ask.need.cluster_id)
        except Taken as taken:
            if taken.constraint != store.CLAIM_TAKEN:
                raise
            claims = await store.claims_of(scheduler.core.pool, ask.need.vm_id)
            if (first := await choice.first_answer(scheduler, ask, claims)) is not None:
                return first
    raise Refused(
        Kind.EXHAUSTED,
        f"VM {ask.need.name or ask.need.vm_id} lost its place to others {TRIES} times; try again shortly",
    )


@asynccontextmanager
async def _turns(scheduler: Scheduler, ask: Place) -> AsyncIterator[None]:
    """In one process they come one after the other: those that depend on each other's places, and those that would choose
    the same CPUs or devices."""
    async with AsyncExitStack() as turns:
        if ask.need.host_devices:
            await turns.enter_async_context(scheduler.turn(f"devices {ask.need.cluster_id}"))
        if ask.need.cpu_pinning.policy is not PinningPolicy.NONE:
            await turns.enter_async_context(scheduler.turn(f"cpus {ask.need.cluster_id}"))
        await turns.enter_async_context(affinity.turn(scheduler, ask.need))
        await turns.enter_async_context(promising.turn(scheduler, ask.need.cluster_id))
        yield


async def _try(scheduler: Scheduler, ask: Place, caller: Caller, *, refuses: bool) -> Placement | None:
    """None when no host fits and that isn't to be said yet. Raises Stale when it lost its place to another."""
    bound, guards = await affinity.bind(scheduler, ask.need)
    again = partial(choice.choose, scheduler, bound=bound)
    placement, guards = await promising.admitted(scheduler, ask, again(ask), again, guards, fresh=refuses)
    if not placement.host_id and not refuses:
        return None
    return await _commit(scheduler, ask, placement, guards, caller)


async def _saw_who_left(scheduler: Scheduler, ask: Place) -> bool:
    """Looks whether CPUs could become one VM's alone since larger VMs that shared them left, for a VM that wants some; and
    whose devices are free by now."""
    wish = Wish.of(ask.need.cpu_pinning, ask.need.vcpus, ask.need.threads)
    if wish is None or not wish.alone:
        if ask.need.host_devices:
            await scheduler.read_used()
        return bool(ask.need.host_devices)
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
    if any(row.public.devices for row in claims):
        await scheduler.read_used()


async def _commit(
    scheduler: Scheduler, ask: Place, placement: Placement, guards: Sequence[Change], caller: Caller
) -> Placement:
    """Write claim and decision. Raises Stale when the capacity went to somebody else, or what `guards` guard did."""
    decision_id = new_id()
    placement = replace(placement, decision_id=decision_id, claimed=bool(placement.host_id))
    changes: list[Change] = []
    if placement.host_id:
        claim = choice.claim_of(scheduler, ask, placement)
        changes = [
            *guards,
            cpu_store.take_cpus(claim) if claim.cpu_pinning else store.take_capacity(claim),
            *cell_claims.take(claim),
            *device_claims.take(claim, ask.need.name),
            store.CLAIMS.insert(claim, store.ClaimPrivate(decision_id=decision_id)),
            *_use(scheduler, ask, placement, claim),
        ]
    await scheduler.core.commit(
        *changes,
        decision_store.keep_decision(encode(placement), choice.in_short(placement)),
        caller=caller,
        answer=placement,
    )
    if placement.host_id:
        scheduler.took(claim)
        if claim.devices:
            held = scheduler.fleet.devices.held(claim.host_id)
            if held.uses == claim.devices_revision:
                more = held.with_more(claim.devices, claim.vm_id, ask.need.name)
                scheduler.fleet.devices.hold(claim.host_id, more)
    return placement


def _use(scheduler: Scheduler, ask: Place, placement: Placement, claim: Claim) -> list[Change]:
    """For the licence report."""
    if claim.cpus is None:
        return []
    host = scheduler.fleet.cpus_of(scheduler.fleet.rows[claim.host_id])
    cores, sockets = footprint(host, claim.cpus)
    name = placement.hosts[0].name
    return [licence_store.begin_use(claim, ask.need.name, name, cores, sockets)]


@part.answers(GET_DECISION)
async def get_decision(scheduler: Scheduler, ask: GetDecision, caller: Caller) -> Any:
    body = await decision_store.decision(scheduler.core.pool, ask.id)
    if body is None:
        raise not_found("decision", ask.id)
    return msgspec.Raw(body)


@part.answers(LIST_DECISIONS)
async def list_decisions(scheduler: Scheduler, ask: ListQuery, caller: Caller) -> Any:
    newest_first = ask if ask.order_by else replace(ask, order_by="-id")
    return await decision_store.decisions(scheduler.core.pool, newest_first)
