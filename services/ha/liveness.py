"""The liveness of hosts: what was observed weighed four times a second, changes kept with all they were judged by."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from datetime import datetime, timedelta
from typing import Any

import msgspec
from msgspec.structs import replace

from services.ha import kdump, listening, power, soft_fencing, store
from services.ha.listening import TICK_SECONDS, can_ask
from services.ha.policies.evidence import (
    DEAD,
    SENTENCES,
    UNKNOWN,
    UP,
    Held,
    Judgement,
    Kind,
    Observations,
    is_storm,
    judge,
)
from services.ha.policies.peers import doors_of, reached, sentence
from services.ha.policies.replay import evidence_of, with_notes
from services.ha.state import Ha
from services.ha.watch import HostFacts, Watch
from volery.contracts.cluster import GetById
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, Host
from volery.contracts.ids import new_id
from volery.contracts.liveness import (
    GET_LIVENESS,
    LIST_LIVENESS,
    Evidence,
    HostLiveness,
    LivenessState,
    Proof,
    ProofKind,
)
from volery.contracts.operation import ListQuery
from volery.contracts.peers import Reach
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.hear_owners import Said, newest
from volery.runtime.pages import plain_page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

log = logging.getLogger(__name__)

part = Part()

CONCLUDED_TOGETHER = 50
"""Judgements that are written in one statement: a rack falls silent in one moment."""
FORMER_PROOFS = 16
"""How many earlier deaths a host's liveness tells of."""
SUSPICIOUS = (LivenessState.CONNECTING, LivenessState.NON_RESPONSIVE)


@dataclass(frozen=True, slots=True)
class Judged:
    """What was concluded of a host, and of what."""

    host_id: str
    watch: Watch
    seen: Observations
    judgement: Judgement


@part.hears_together(HOST_CHANGED)
async def hosts_changed(ha: Ha, said: Sequence[Said]) -> list[Change]:
    hosts: list[Host] = newest(said)
    rows = await store.liveness_of(ha.core.pool, [host.id for host in hosts])
    return [change for host in hosts for change in _changed(ha, host, rows.get(host.id))]


async def host_changed(ha: Ha, host: Host) -> list[Change]:
    return _changed(ha, host, await store.LIVENESS.find(ha.core.pool, host.id))


def _changed(ha: Ha, host: Host, row: Row[HostLiveness, store.LivenessPrivate] | None) -> list[Change]:
    """A host to watch, or its new name, or the journal that inventory admitted."""
    facts = _facts(host)
    saw = store.saw_host(facts).and_then(lambda: ha.learn(facts))
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
            boot_id=host.boot_id,
        )
        inserted = store.LIVENESS.insert(liveness, private)
        return [inserted.and_then(lambda: _watch(ha, liveness, private)), saw]
    boot_id = row.public.boot_id or host.boot_id
    public = replace(row.public, host_name=host.name, cluster_id=host.cluster_id, boot_id=boot_id)
    if host.agent_generation != row.private.admitted_generation:
        report = Evidence(
            kind=Kind.REPORT, at=utc_now(), details=f"its agent's journal {host.agent_generation}"
        )
        kept = [e for e in public.evidence if e.kind != Kind.REPORT]
        public = replace(public, evidence=(*kept, report))
    if public == row.public and private == row.private:
        return [saw]
    updated = store.LIVENESS.update(row, public, private)
    return [updated.and_then(lambda: _watch(ha, public, private)), saw]


def _facts(host: Host) -> HostFacts:
    return HostFacts(
        id=host.id,
        revision=host.revision,
        name=host.name,
        cluster_id=host.cluster_id,
        status=str(host.status),
        hardware_uuid=(host.capabilities.dmi_uuid or host.capabilities.hardware_uuid).lower(),
        boot_id=host.boot_id,
        fence_agents=host.capabilities.fence_agents,
        doors=doors_of(host.capabilities),
    )


@part.hears(HOST_DELETED)
async def host_deleted(ha: Ha, host: Host) -> list[Change]:
    return await host_gone(ha, host.id)


async def host_gone(ha: Ha, host_id: str) -> list[Change]:
    ended = await store.host_ends(ha.core.pool, host_id, lambda: ha.forget(host_id))
    return [*ended, *await soft_fencing.host_gone(ha, host_id)]


def _watch(ha: Ha, liveness: HostLiveness, private: store.LivenessPrivate) -> None:
    watch = ha.watch(liveness.id)
    watch.known, watch.state, watch.boot_id = True, liveness.state, liveness.boot_id
    watch.generation = private.admitted_generation


async def begin(ha: Ha) -> None:
    """Leadership begins: take up what was concluded before. Silence counts as this replica has heard it: it has listened
    since it was opened."""
    now = ha.leading_since = monotonic()
    ha.storm_since = None
    ha.ordered_off.clear()
    ha.lease_watches.clear()
    for facts in await store.hosts(ha.core.pool):
        ha.learn(facts)
    for row in await store.LIVENESS.where(ha.core.pool):
        _watch(ha, row.public, row.private)
        watch, proof = ha.watch(row.id), row.public.proof
        watch.admit()
        # Whatever is heard from now on is newer than what a former leader concluded.
        watch.proof = None if proof is None else Held(now, proof.boot_id, proof.kind, proof.details)
        watch.person = watch.lease = None
        watch.distrust_power()


@part.every(TICK_SECONDS)
async def tick(ha: Ha) -> None:
    if not listening.goes_on(ha):
        return
    now = monotonic()
    calm, watches = _uncertain(ha, now)
    seen = [watch.seen(ha.listening_since, now) for _, watch in watches]
    judged = [judge(each, ha.config, 0.0) for each in seen]
    for (_, watch), judgement in zip(watches, judged, strict=True):
        watch.suspected = judgement.state in (*SUSPICIOUS, DEAD)
    held = await _holds(ha, [watch.state for _, watch in watches], [j.state for j in judged], calm, now)
    differing: list[Judged] = []
    for (host_id, watch), each, judgement in zip(watches, seen, judged, strict=True):
        if held and judgement.state in SUSPICIOUS:
            continue
        news = judgement.state in SUSPICIOUS and _news(each) != watch.announced
        if news or _differs(watch, judgement):
            differing.append(Judged(host_id, watch, each, judgement))
    for at in range(0, len(differing), CONCLUDED_TOGETHER):
        await conclude_together(ha, differing[at : at + CONCLUDED_TOGETHER])


def _uncertain(ha: Ha, now: float) -> tuple[int, list[tuple[str, Watch]]]:
    """How many hosts are up beyond doubt; and the others, which are judged."""
    found: list[tuple[str, Watch]] = []
    calm, since, seconds = 0, ha.listening_since, ha.config.suspect_seconds
    for host_id, watch in ha.watches.items():
        if not watch.known:
            continue
        if watch.calm(since, now, seconds):
            calm += 1
            watch.suspected = False
        else:
            found.append((host_id, watch))
    return calm, found


def _differs(watch: Watch, judgement: Judgement) -> bool:
    return (
        judgement.state is not watch.state
        or judgement.boot_id != watch.boot_id
        or _is_new(watch, judgement)
        or judgement.voided
    )


def _news(seen: Observations) -> tuple[frozenset[tuple[str, Reach]], str, str]:
    """What is worth telling beside a judgement when it differs."""
    soft = seen.soft.words if seen.soft is not None else ""
    return reached(seen.peers), soft, seen.dump.address if seen.dump is not None else ""


def _is_new(watch: Watch, judgement: Judgement) -> bool:
    """Whether it found another proof than it had."""
    old, new = watch.proof, judgement.proof
    return new is not None and (old is None or (old.boot_id, old.kind) != (new.boot_id, new.kind))


async def _holds(
    ha: Ha, before: list[LivenessState], after: list[LivenessState], calm: int, now: float
) -> bool:
    """Whether judgement is suspended since most hosts fell silent at once; `calm` more are up and stay so."""
    if not is_storm(before, after, calm):
        ha.storm_since = None
        return False
    if ha.storm_since is None:
        ha.storm_since = now
        log.warning("most hosts fell silent at once; they are judged in %g s", ha.config.storm_hold_seconds)
        if not await can_ask(listening.heard_on(ha), 1.0):
            listening.anew(ha)
            return True
    return now - ha.storm_since < ha.config.storm_hold_seconds


async def conclude_together(ha: Ha, found: Sequence[Judged]) -> None:
    """Write judgements in one statement. What somebody else wrote to meanwhile, and what voids a proof, is written by
    itself."""
    rows = await store.liveness_of(ha.core.pool, [each.host_id for each in found])
    several = [
        (each, rows[each.host_id])
        for each in found
        if each.host_id in rows
        and not each.judgement.voided
        and _still_proven(ha, each.watch, each.judgement)
    ]
    at, now = utc_now(), monotonic()
    changes = [_change(row, each.watch, each.seen, each.judgement, at) for each, row in several]
    try:
        await ha.core.commit(*changes)
    except Stale:
        several = []
    for (each, row), change in zip(several, changes, strict=False):
        _written(row.public, change.document, each, now)
    alone = {each.host_id for each in found} - {each.host_id for each, _ in several}
    for each in found:
        if each.host_id in alone:
            await conclude(ha, each.host_id, each.watch, each.seen, each.judgement)


async def conclude(
    ha: Ha,
    host_id: str,
    watch: Watch,
    seen: Observations,
    judgement: Judgement,
    *more: Change,
    caller: Caller | None = None,
) -> HostLiveness | None:
    """Write a judgement, with everything that it was made of. None when somebody else wrote first."""
    row = await store.LIVENESS.find(ha.core.pool, host_id)
    if row is None:
        return None
    now = monotonic()
    change = _change(row, watch, seen, judgement, utc_now())
    lied = await _lied(ha, row.public, judgement)
    if not _still_proven(ha, watch, judgement):
        return None
    try:
        await ha.core.commit(change, *lied, *more, caller=caller, answer=change.document)
    except Stale:
        return None
    _written(row.public, change.document, Judged(host_id, watch, seen, judgement), now)
    if lied:
        watch.distrust_power()
    written: HostLiveness = change.document
    return written


def _change(
    row: Row[HostLiveness, store.LivenessPrivate],
    watch: Watch,
    seen: Observations,
    judgement: Judgement,
    at: datetime,
) -> Change:
    old, state = row.public, judgement.state
    last_beat_at = at + timedelta(seconds=seen.beat.at) if seen.beat is not None else old.last_beat_at
    proof = _proof(watch, old, judgement, at)
    new = replace(
        old,
        state=state,
        since=at if state is not old.state else old.since,
        boot_id=judgement.boot_id,
        last_beat_at=last_beat_at,
        judged_at=at,
        evidence=with_notes(
            old.evidence,
            evidence_of(seen, at, watch.disconnect_reason),
            *_notes(watch, old, seen, judgement, at),
        ),
        proof=proof,
        former=old.former if judgement.voided else former(old.former, old.proof, proof),
        fencing="" if state is UP else old.fencing,
    )
    return store.LIVENESS.update(row, new)


def _written(old: HostLiveness, new: HostLiveness, judged: Judged, now: float) -> None:
    """What is known of a host after a judgement, made at `now`, was written."""
    watch, found = judged.watch, judged.judgement.proof
    watch.state, watch.boot_id, watch.announced = new.state, new.boot_id, _news(judged.seen)
    if found is not None and _is_new(watch, judged.judgement):
        watch.proof = with_fields(found, at=now + found.at)
    elif found is None:
        watch.proof = None
    _say(old, new, judged.judgement, judged.seen)


def _still_proven(ha: Ha, watch: Watch, judgement: Judgement) -> bool:
    """A beat may have come since it was judged, while the database was asked. Who confirms has looked at it."""
    found = judgement.proof
    if found is None or found.kind is ProofKind.PERSON or not _is_new(watch, judgement):
        return True
    return judge(watch.seen(ha.listening_since, monotonic()), ha.config, 0.0).proof is not None


async def _lied(ha: Ha, old: HostLiveness, judgement: Judgement) -> list[Change]:
    """The end of trust in a BMC that said off, or in a network that told of a dump, while the host lived."""
    lies = {ProofKind.BMC_OFF: power.lied, ProofKind.KDUMP: kdump.lied}
    lied = lies.get(old.proof.kind) if judgement.voided and old.proof is not None else None
    row = await store.POWER.find(ha.core.pool, old.id) if lied is not None else None
    return [] if lied is None or row is None else [lied(row)]


def _proof(watch: Watch, old: HostLiveness, judgement: Judgement, at: datetime) -> Proof | None:
    found = judgement.proof
    if found is None:
        return None
    if old.proof is not None and not _is_new(watch, judgement):
        return old.proof
    return Proof(
        id=new_id(),
        kind=found.kind,
        at=at + timedelta(seconds=found.at),
        boot_id=found.boot_id,
        details=found.details,
    )


def former(kept: tuple[Proof, ...], old: Proof | None, new: Proof | None) -> tuple[Proof, ...]:
    """The proofs before the newest, one a boot."""
    if old is None or new is None or old.boot_id == new.boot_id:
        return kept
    return (*kept, old)[-FORMER_PROOFS:]


def _say(old: HostLiveness, new: HostLiveness, judgement: Judgement, seen: Observations) -> None:
    name, proof = old.host_name, new.proof
    if judgement.voided:
        log.error("host %s was believed dead (%s) and shows signs of life", name, old.proof)
    if proof is not None and proof != old.proof:
        log.warning("host %s: boot %s has ended: %s", name, proof.boot_id, proof.details)
    if new.state is old.state and proof == old.proof:
        log.warning("host %s: %s", name, sentence(seen.peers))
        return
    silence = -seen.beat.at if seen.beat is not None else -seen.listening_since
    words = SENTENCES[new.state].format(silence=silence, proof=proof.details if proof else "")
    level = logging.INFO if new.state is UP else logging.WARNING
    log.log(level, "host %s is %s, was %s: %s", name, new.state, old.state, words)


def _notes(
    watch: Watch, old: HostLiveness, seen: Observations, judgement: Judgement, at: datetime
) -> list[Evidence]:
    """What follows, for people."""
    found: list[Evidence] = []
    if judgement.state not in (UP, UNKNOWN, DEAD):
        found.append(Evidence(kind=Kind.SILENCE, at=at, details=_silence(watch, seen)))
    if judgement.voided and old.proof is not None:
        details = f"boot {old.proof.boot_id} lives, against the proof: {old.proof.details}"
        found.append(Evidence(kind=Kind.NEW_BOOT, at=at, details=details))
    elif old.boot_id and judgement.boot_id != old.boot_id:
        details = f"boot {judgement.boot_id}, before {old.boot_id}"
        found.append(Evidence(kind=Kind.NEW_BOOT, at=at, details=details))
    return found


def _silence(watch: Watch, seen: Observations) -> str:
    if seen.stranger_beat is not None and (seen.beat is None or seen.stranger_beat.at > seen.beat.at):
        return "beats come from an agent whose journal inventory has not admitted"
    if watch.disconnected_at is not None and watch.disconnect_reason:
        left = f"; the NATS server said that its agent left: {watch.disconnect_reason}"
    else:
        left = ""
    return (
        f"no beat for {-seen.beat.at:.1f} s" if seen.beat is not None else "no beat since ha began"
    ) + left


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
    return replace(liveness, last_beat_at=utc_now() - timedelta(seconds=monotonic() - watch.beat_at))
