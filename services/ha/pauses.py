"""When ha must switch nothing off: pauses with an end; and how things are with fencing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from services.ha import kdump, store
from services.ha.policies.fencing import brake_limit
from services.ha.state import Ha
from services.ha.store import PAUSES
from services.ha.watch import HostFacts
from volery.contracts.base import Done
from volery.contracts.errors import invalid, not_found
from volery.contracts.operation import ListQuery
from volery.contracts.power import (
    GET_FENCING,
    LIST_FENCE_RECORDS,
    LIST_FENCING_PAUSES,
    PAUSE_FENCING,
    RESUME_FENCING,
    AskFencing,
    Brake,
    Fencing,
    FencingPause,
    FencingScope,
    PauseFencing,
    ResumeFencing,
)
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Nothing, Stale, Taken

log = logging.getLogger(__name__)

part = Part()

LONGEST_SECONDS = 7 * 86400.0
LOOK_SECONDS = 1.0


def key_of(scope: FencingScope, object_id: str) -> str:
    return str(scope) if scope is FencingScope.GLOBAL else f"{scope}-{object_id}"


def keys_of(host: HostFacts) -> tuple[str, ...]:
    """The pauses that would hold for this host."""
    return (
        key_of(FencingScope.GLOBAL, ""),
        key_of(FencingScope.CLUSTER, host.cluster_id),
        key_of(FencingScope.HOST, host.id),
    )


async def words(ha: Ha, host: HostFacts) -> str:
    """Until when and why fencing is switched off for this host; "" when it isn't."""
    return words_of(await store.pauses_of(ha.core.pool, host.id, host.cluster_id, utc_now()))


def words_of(found: Sequence[FencingPause]) -> str:
    """Of pauses that hold for one host."""
    if not found:
        return ""
    last = max(found, key=lambda pause: pause.until)
    where = "" if last.scope is FencingScope.GLOBAL else f" for its {last.scope}"
    return f"{where} until {last.until:%Y-%m-%d %H:%M} UTC by {last.paused_by}: {last.reason or 'no reason given'}".strip()


@part.answers(PAUSE_FENCING)
async def pause(ha: Ha, ask: PauseFencing, caller: Caller) -> FencingPause:
    await _check_scope(ha, ask.scope, ask.object_id)
    if not 1.0 <= ask.seconds <= LONGEST_SECONDS:
        raise invalid(
            f"fencing is paused for 1 to {LONGEST_SECONDS:g} s (a week), not {ask.seconds:g}: a pause that nobody ends "
            "must end",
            rule="seconds",
        )
    while True:
        try:
            return await _pause(ha, ask, caller)
        except (Stale, Taken):
            continue


async def _pause(ha: Ha, ask: PauseFencing, caller: Caller) -> FencingPause:
    key, now = key_of(ask.scope, ask.object_id), utc_now()
    row = await PAUSES.find(ha.core.pool, key)
    made = FencingPause(
        id=key,
        revision=1 if row is None else row.public.revision,
        created_at=now if row is None else row.public.created_at,
        updated_at=now,
        scope=ask.scope,
        object_id=ask.object_id,
        until=now + timedelta(seconds=ask.seconds),
        reason=ask.reason,
        paused_by=caller.principal,
    )
    change = PAUSES.insert(made, Nothing()) if row is None else PAUSES.update(row, made)
    await ha.core.commit(change, caller=caller, answer=change.document)
    log.warning("fencing (%s) is paused by %s until %s", key, caller.principal, made.until)
    found: FencingPause = change.document
    return found


async def _check_scope(ha: Ha, scope: FencingScope, object_id: str) -> None:
    if (scope is FencingScope.GLOBAL) != (not object_id):
        raise invalid(
            "name the cluster or the host in `object_id`; with scope global name nothing", rule="object_id"
        )
    if scope is FencingScope.HOST and await store.host(ha.core.pool, object_id) is None:
        raise not_found("host", object_id)
    if scope is FencingScope.CLUSTER and not await store.count_hosts(ha.core.pool, object_id):
        raise not_found("cluster with hosts", object_id)


@part.answers(RESUME_FENCING)
async def resume(ha: Ha, ask: ResumeFencing, caller: Caller) -> Done:
    key = key_of(ask.scope, ask.object_id)
    while True:
        row = await PAUSES.find(ha.core.pool, key)
        if row is None:
            raise not_found("pause of fencing", key)
        try:
            await ha.core.commit(PAUSES.delete(row), caller=caller, answer=Done())
        except Stale:
            continue
        log.warning("fencing (%s) goes on, by %s", key, caller.principal)
        return Done()


@part.every(LOOK_SECONDS)
async def end_what_is_over(ha: Ha) -> None:
    for row in await PAUSES.where(ha.core.pool):
        if row.public.until <= utc_now():
            log.warning("fencing (%s) goes on: the pause is over", row.id)
            await ha.core.commit(PAUSES.delete(row))


@part.answers(LIST_FENCING_PAUSES)
async def list_pauses(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    return await page(ha.core.pool, PAUSES, ask)


@part.answers(LIST_FENCE_RECORDS)
async def list_records(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    return await page(ha.core.pool, store.RECORDS, ask)


@part.answers(GET_FENCING)
async def get_fencing(ha: Ha, ask: AskFencing, caller: Caller) -> Fencing:
    now, pool = utc_now(), ha.core.pool
    since = now - timedelta(seconds=ha.config.brake_window_seconds)
    return Fencing(
        pauses=tuple([row.public for row in await PAUSES.where(pool)]),
        brakes=tuple([await _brake(ha, each, since) for each in await store.braked_clusters(pool, since)]),
        held=tuple(await store.silent_hosts(pool)),
        kdump=kdump.listener(ha),
    )


async def _brake(ha: Ha, cluster_id: str, since: datetime) -> Brake:
    hosts = await store.count_hosts(ha.core.pool, cluster_id)
    return Brake(
        cluster_id=cluster_id,
        hosts=hosts,
        ordered_off=await store.ordered_off(ha.core.pool, cluster_id, since),
        limit=brake_limit(hosts, ha.config),
        window_seconds=ha.config.brake_window_seconds,
    )
