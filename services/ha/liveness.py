"""The liveness of hosts: beats and disconnects weighed four times a second, changes kept with their evidence."""

from __future__ import annotations

import logging
from dataclasses import replace as with_fields
from datetime import datetime, timedelta
from typing import Any

import msgspec
from msgspec.structs import replace

from services.ha import store
from services.ha.policies.evidence import SENTENCES, UNKNOWN, UP, Kind, is_storm, judge
from services.ha.state import Ha, Watch, can_ask
from volery.contracts.cluster import GetById
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, Host
from volery.contracts.liveness import (
    GET_LIVENESS,
    LIST_LIVENESS,
    Evidence,
    HostLiveness,
    LivenessState,
)
from volery.contracts.operation import ListQuery
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import plain_page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Stale

log = logging.getLogger(__name__)

part = Part()

TICK_SECONDS = 0.25
STALL_SECONDS = 1.0
"""A tick that comes this late: the process was stopped or starved, and beats still wait in the socket."""


@part.hears(HOST_CHANGED)
async def host_changed(ha: Ha, host: Host) -> list[Change]:
    """A host to watch, or its new name, or the journal that inventory admitted."""
    row = await store.LIVENESS.find(ha.core.pool, host.id)
    private = store.LivenessPrivate(admitted_generation=host.agent_generation)
    if row is None:
        now = utc_now()
        liveness = HostLiveness(
            id=host.id,
            revision=1,
            created_at=now,
            updated_at=now,
            host_name=host.name,
            cluster_id=host.cluster_id,
        )
        inserted = store.LIVENESS.insert(liveness, private)
        return [with_fields(inserted, then=lambda: _watch(ha, liveness, private))]
    public = replace(row.public, host_name=host.name, cluster_id=host.cluster_id)
    if host.agent_generation != row.private.admitted_generation:
        report = Evidence(
            kind=Kind.REPORT, at=utc_now(), details=f"its agent's journal {host.agent_generation}"
        )
        public = replace(public, evidence=_with(public.evidence, report))
    if public == row.public and private == row.private:
        return []
    updated = store.LIVENESS.update(row, public, private)
    return [with_fields(updated, then=lambda: _watch(ha, public, private))]


@part.hears(HOST_DELETED)
async def host_deleted(ha: Ha, host: Host) -> list[Change]:
    row = await store.LIVENESS.find(ha.core.pool, host.id)
    if row is None:
        return []
    return [with_fields(store.LIVENESS.delete(row), then=lambda: _forget(ha, host.id))]


def _watch(ha: Ha, liveness: HostLiveness, private: store.LivenessPrivate) -> None:
    watch = ha.watch(liveness.id)
    watch.known, watch.state, watch.boot_id = True, liveness.state, liveness.boot_id
    watch.generation = private.admitted_generation


def _forget(ha: Ha, host_id: str) -> None:
    ha.watches.pop(host_id, None)


async def begin(ha: Ha) -> None:
    """Leadership begins: take up what was concluded before, and hold it until there was time to listen."""
    for row in await store.LIVENESS.where(ha.core.pool):
        _watch(ha, row.public, row.private)
    _listen_anew(ha)


def _listen_anew(ha: Ha) -> None:
    now = ha.clock()
    ha.listening_since, ha.ticked_at, ha.storm_since = now + ha.config.settle_seconds, now, None


@part.every(TICK_SECONDS)
async def tick(ha: Ha) -> None:
    if not await _listens(ha):
        return
    now = ha.clock()
    watches = [(host_id, watch) for host_id, watch in ha.watches.items() if watch.known]
    after = [judge(watch.seen(), ha.listening_since, now, ha.config) for _, watch in watches]
    if await _holds(ha, [watch.state for _, watch in watches], after, now):
        after = [state if state in (UP, UNKNOWN) else watch.state
                 for (_, watch), state in zip(watches, after, strict=True)]  # fmt: skip
    for (host_id, watch), state in zip(watches, after, strict=True):
        if state is not watch.state or _booted(watch):
            await _conclude(ha, host_id, watch, state, now)


async def _listens(ha: Ha) -> bool:
    """Whether nothing was missed since the last tick; if something was, listening begins anew."""
    now, client = ha.clock(), ha.core.bus.client
    stalled = now - ha.ticked_at > STALL_SECONDS
    ha.ticked_at = now
    reconnects = client.stats["reconnects"]
    interrupted = not client.is_connected or reconnects != ha.reconnects
    ha.reconnects = reconnects
    if stalled or interrupted:
        _listen_anew(ha)
    return client.is_connected and not stalled


async def _holds(ha: Ha, before: list[LivenessState], after: list[LivenessState], now: float) -> bool:
    """Whether judgement is suspended since most hosts fell silent at once."""
    if not is_storm(before, after):
        ha.storm_since = None
        return False
    if ha.storm_since is None:
        ha.storm_since = now
        log.warning("most hosts fell silent at once; they are judged in %g s", ha.config.storm_hold_seconds)
        if not await can_ask(ha.core.bus.client, 1.0):
            _listen_anew(ha)
            return True
    return now - ha.storm_since < ha.config.storm_hold_seconds


def _booted(watch: Watch) -> bool:
    return watch.beat is not None and watch.beat.boot_id != watch.boot_id


async def _conclude(ha: Ha, host_id: str, watch: Watch, state: LivenessState, now: float) -> None:
    """Write a new state, or a new boot, with the evidence."""
    row = await store.LIVENESS.find(ha.core.pool, host_id)
    if row is None:
        return
    old, at = row.public, utc_now()
    new = replace(
        old,
        state=state,
        since=at if state is not old.state else old.since,
        boot_id=watch.beat.boot_id if watch.beat is not None else old.boot_id,
        last_beat_at=_when(watch.beat_at, now, at) or old.last_beat_at,
        evidence=_with(old.evidence, *_evidence(watch, old, state, now, at)),
    )
    try:
        await ha.core.commit(store.LIVENESS.update(row, new))
    except Stale:
        return
    watch.state, watch.boot_id = new.state, new.boot_id
    level = logging.INFO if state is UP else logging.WARNING
    log.log(level, "host %s is %s, was %s: %s", old.host_name, state, old.state, _sentence(watch, state, now))


def _sentence(watch: Watch, state: LivenessState, now: float) -> str:
    return SENTENCES[state].format(silence=now - watch.beat_at if watch.beat_at is not None else now)


def _evidence(
    watch: Watch, old: HostLiveness, state: LivenessState, now: float, at: datetime
) -> list[Evidence]:
    found = [
        _dated(Kind.BEAT, watch.beat_at, now, at, _beat_details(watch)),
        _dated(Kind.DISCONNECTED, watch.disconnected_at, now, at, watch.disconnect_reason),
        _dated(Kind.CONNECTED, watch.connected_at, now, at, ""),
    ]
    if state not in (UP, UNKNOWN):
        found.append(Evidence(kind=Kind.SILENCE, at=at, details=_silence(watch, now)))
    if old.boot_id and watch.beat is not None and watch.beat.boot_id != old.boot_id:
        details = f"boot {watch.beat.boot_id}, before {old.boot_id}"
        found.append(Evidence(kind=Kind.NEW_BOOT, at=at, details=details))
    return [evidence for evidence in found if evidence is not None]


def _silence(watch: Watch, now: float) -> str:
    if watch.stranger_beat_at is not None:
        return "beats come from an agent whose journal inventory has not admitted"
    return (
        f"no beat for {now - watch.beat_at:.1f} s" if watch.beat_at is not None else "no beat since ha began"
    )


def _beat_details(watch: Watch) -> str:
    return f"number {watch.beat.beat_seq}, boot {watch.beat.boot_id}" if watch.beat is not None else ""


def _dated(kind: Kind, at: float | None, now: float, wall: datetime, details: str) -> Evidence | None:
    when = _when(at, now, wall)
    return None if when is None else Evidence(kind=kind, at=when, details=details)


def _when(at: float | None, now: float, wall: datetime) -> datetime | None:
    return None if at is None else wall - timedelta(seconds=now - at)


def _with(evidence: tuple[Evidence, ...], *new: Evidence) -> tuple[Evidence, ...]:
    """The newest of each kind."""
    newest = {e.kind: e for e in evidence} | {e.kind: e for e in new}
    return tuple(sorted(newest.values(), key=lambda e: e.at))


@part.answers(GET_LIVENESS)
async def get_liveness(ha: Ha, ask: GetById, caller: Caller) -> HostLiveness:
    return _as_heard(ha, (await store.LIVENESS.get(ha.core.pool, ask.id)).public)


@part.answers(LIST_LIVENESS)
async def list_liveness(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    raw = await plain_page(ha.core.pool, store.LIVENESS, ask)
    if ask.fields:
        return raw
    answer = msgspec.json.decode(raw, type=_Page)
    return {"items": [_as_heard(ha, item) for item in answer.items], "next": answer.next}


class _Page(msgspec.Struct):
    items: list[HostLiveness]
    next: str


def _as_heard(ha: Ha, liveness: HostLiveness) -> HostLiveness:
    """With the newest beat, which is heard by every replica and written only with a change of state."""
    watch = ha.watches.get(liveness.id)
    if watch is None or watch.beat_at is None:
        return liveness
    at = _when(watch.beat_at, ha.clock(), utc_now())
    beat = Evidence(kind=Kind.BEAT, at=at or liveness.updated_at, details=_beat_details(watch))
    return replace(liveness, last_beat_at=at, evidence=_with(liveness.evidence, beat))
