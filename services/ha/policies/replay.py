"""The judgements of a host again, from its announced history alone: each says what it was judged by. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from services.ha.config import HaConfig
from services.ha.policies.evidence import (
    Confirmed,
    Held,
    Judgement,
    Kind,
    Lease,
    Observations,
    Reading,
    Sign,
    judge,
)
from services.ha.policies.kdump import Dump
from services.ha.policies.peers import Peer
from services.ha.policies.soft_fencing import Tried
from volery.contracts.fencing import PowerState
from volery.contracts.liveness import Evidence, HostLiveness, LivenessState
from volery.contracts.peers import Reach

NOTES = (Kind.NEW_BOOT, Kind.REPORT, Kind.SILENCE)
"""Evidence for people: what follows from the rest."""
EXPIRED_AND_PASSED = "expired, watchdog passed"


def evidence_of(seen: Observations, judged_at: datetime, reason: str = "") -> tuple[Evidence, ...]:
    """What was judged by, dated; `seen` has its times in seconds before the judgement (negative). `reason` is the NATS
    server's word about a disconnect."""
    found: list[Evidence] = []

    def note(kind: Kind, at: float | None, **said: Any) -> None:
        if at is not None:
            found.append(Evidence(kind=kind, at=judged_at + timedelta(seconds=at), **said))

    signs = {
        Kind.BEAT: seen.beat,
        Kind.FORMER_BEAT: seen.former_beat,
        Kind.STRANGER_BEAT: seen.stranger_beat,
    }
    for kind, sign in signs.items():
        if sign is not None:
            note(kind, sign.at, boot_id=sign.boot_id)
    note(Kind.LISTENING, seen.listening_since)
    note(Kind.CONNECTED, seen.connected_at)
    note(Kind.DISCONNECTED, seen.disconnected_at, details=reason)
    for kind, reading in {Kind.BMC_OFF_FIRST: seen.off_first, Kind.BMC: seen.reading}.items():
        if reading is not None:
            note(
                kind,
                reading.at,
                details=reading.words,
                power=str(reading.state),
                trusted=reading.trusted,
                by=reading.by,
            )
    if seen.person is not None:
        note(Kind.PERSON, seen.person.at, boot_id=seen.person.boot_id, by=seen.person.by)
    if seen.lease is not None:
        whole = seen.lease.expired and seen.lease.watchdog_passed
        words = EXPIRED_AND_PASSED if whole else ""
        note(Kind.LEASE, seen.lease.at, boot_id=seen.lease.boot_id, details=words)
    if seen.soft is not None:
        worked = str(Reach.ANSWERS if seen.soft.worked else Reach.NOTHING)
        note(Kind.SOFT_FENCE, seen.soft.at, details=seen.soft.words, reached=worked)
    if (dump := seen.dump) is not None:
        for kind, moment in {Kind.KDUMP_FIRST: dump.first_at, Kind.KDUMP: dump.at}.items():
            note(kind, moment, trusted=dump.trusted, by=dump.address)
    for peer in seen.peers:
        note(Kind.PEER, peer.at, details=peer.words, by=peer.name, reached=str(peer.reach))
    if seen.proof is not None:
        note(Kind.PROOF, seen.proof.at, boot_id=seen.proof.boot_id)
    return tuple(found)


def observed(before: HostLiveness | None, after: HostLiveness) -> Observations:
    """What led from the one to the other; times in seconds before the judgement."""
    judged_at = after.judged_at
    assert judged_at is not None
    newest = {e.kind: e for e in after.evidence}

    def at(kind: Kind) -> float | None:
        found = newest.get(kind)
        return None if found is None else (found.at - judged_at).total_seconds()

    def sign(kind: Kind) -> Sign | None:
        when = at(kind)
        return None if when is None else Sign(when, newest[kind].boot_id)

    def reading(kind: Kind) -> Reading | None:
        when, said = at(kind), newest.get(kind)
        if when is None or said is None:
            return None
        return Reading(when, PowerState(said.power), said.trusted, said.by, said.details)

    listening = at(Kind.LISTENING)
    return Observations(
        state=before.state if before is not None else LivenessState.UNKNOWN,
        boot_id=before.boot_id if before is not None else "",
        listening_since=0.0 if listening is None else listening,
        beat=sign(Kind.BEAT),
        former_beat=sign(Kind.FORMER_BEAT),
        stranger_beat=sign(Kind.STRANGER_BEAT),
        connected_at=at(Kind.CONNECTED),
        disconnected_at=at(Kind.DISCONNECTED),
        off_first=reading(Kind.BMC_OFF_FIRST),
        reading=reading(Kind.BMC),
        person=_person(newest, at(Kind.PERSON)),
        lease=_lease(newest, at(Kind.LEASE)),
        proof=_held(before, at(Kind.PROOF)),
        soft=_tried(newest, at(Kind.SOFT_FENCE)),
        dump=_dump(newest, at(Kind.KDUMP_FIRST), at(Kind.KDUMP)),
        peers=tuple(_peer(e, judged_at) for e in after.evidence if e.kind == Kind.PEER),
    )


def _tried(newest: dict[str, Evidence], at: float | None) -> Tried | None:
    if at is None:
        return None
    said = newest[Kind.SOFT_FENCE]
    return Tried(at, said.reached == Reach.ANSWERS, said.details)


def _dump(newest: dict[str, Evidence], first_at: float | None, at: float | None) -> Dump | None:
    if first_at is None or at is None:
        return None
    said = newest[Kind.KDUMP]
    return Dump(first_at, at, said.trusted, said.by)


def _peer(said: Evidence, judged_at: datetime) -> Peer:
    return Peer((said.at - judged_at).total_seconds(), said.by, Reach(said.reached), said.details)


def _person(newest: dict[str, Evidence], at: float | None) -> Confirmed | None:
    return None if at is None else Confirmed(at, newest[Kind.PERSON].boot_id, newest[Kind.PERSON].by)


def _lease(newest: dict[str, Evidence], at: float | None) -> Lease | None:
    if at is None:
        return None
    whole = newest[Kind.LEASE].details == EXPIRED_AND_PASSED
    return Lease(at, newest[Kind.LEASE].boot_id, expired=whole, watchdog_passed=whole)


def _held(before: HostLiveness | None, at: float | None) -> Held | None:
    if before is None or before.proof is None or at is None:
        return None
    return Held(at, before.proof.boot_id, before.proof.kind, before.proof.details)


def with_notes(
    old: Iterable[Evidence], judged_by: Sequence[Evidence], *notes: Evidence
) -> tuple[Evidence, ...]:
    """What is shown: exactly what was judged by, and the newest note of each kind."""
    kept = {e.kind: e for e in old if e.kind in NOTES} | {e.kind: e for e in notes}
    return tuple(sorted([*judged_by, *kept.values()], key=lambda e: e.at))


def replay(history: Sequence[HostLiveness], config: HaConfig) -> list[Judgement]:
    """One judgement per announcement that was one, in order: the same as were announced."""
    found: list[Judgement] = []
    before: HostLiveness | None = None
    for after in history:
        if after.judged_at is not None and (before is None or after.judged_at != before.judged_at):
            found.append(judge(observed(before, after), config, 0.0))
        before = after
    return found
