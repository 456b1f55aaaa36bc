"""Placing: choose a host for a VM and claim its capacity there, or say for every host why not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import replace

from services.scheduler import affinity, cell_claims, choice, granting, model, promising, store
from services.scheduler.state import Scheduler
from volery.contracts.base import encode
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
        return (await promising.admitted(scheduler, ask, again(ask), again))[0]
    if not granting.goes_alone(scheduler, ask.need):
        with suppress(granting.OneByOne):
            return await scheduler.rounds.ask(granting.placing(scheduler, ask, caller))
    return await _by_itself(scheduler, ask, caller)


async def _by_itself(scheduler: Scheduler, ask: Place, caller: Caller) -> Placement:
    """Not in a round: see `granting.OneByOne`."""
    claims = await store.claims_of(scheduler.core.pool, ask.need.vm_id)
    if (first := await choice.first_answer(scheduler, ask, claims)) is not None:
        return first
    await _make_way(scheduler, ask, claims)
    ask = await promising.with_refuge(scheduler, ask)
    waited = False
    for _ in range(TRIES):
        try:
            async with affinity.turn(scheduler, ask.need), promising.turn(scheduler, ask.need.cluster_id):
                placement = await _try(scheduler, ask, caller, refuses=waited)
            if placement is not None:
                return placement
            waited = True
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


async def _try(scheduler: Scheduler, ask: Place, caller: Caller, *, refuses: bool) -> Placement | None:
    """None when no host fits and that isn't to be said yet. Raises Stale when it lost its place to another."""
    bound, guards = await affinity.bind(scheduler, ask.need)
    again = partial(choice.choose, scheduler, bound=bound)
    placement, guards = await promising.admitted(scheduler, ask, again(ask), again, guards, fresh=refuses)
    if not placement.host_id and not refuses:
        return None
    return await _commit(scheduler, ask, placement, guards, caller)


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


async def _commit(
    scheduler: Scheduler, ask: Place, placement: Placement, guards: Sequence[Change], caller: Caller
) -> Placement:
    """Write claim and decision. Raises Stale when the capacity went to somebody else, or what `guards` guard did."""
    decision_id = new_id()
    placement = replace(placement, decision_id=decision_id, claimed=bool(placement.host_id))
    changes: list[Change] = []
    if placement.host_id:
        claim = choice.claim_of(scheduler, ask, placement.host_id)
        changes = [
            *guards,
            store.take_capacity(claim),
            *cell_claims.take(claim),
            store.CLAIMS.insert(claim, store.ClaimPrivate(decision_id=decision_id)),
        ]
    await scheduler.core.commit(
        *changes,
        store.keep_decision(encode(placement), choice.in_short(placement)),
        caller=caller,
        answer=placement,
    )
    if placement.host_id:
        scheduler.took(claim)
    return placement


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
