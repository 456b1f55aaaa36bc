"""What is concluded about a host from what was observed. Pure: all times are seconds of one monotonic clock.

Silence is evidence, never proof: without a proof the strongest conclusion is `non_responsive`. Whoever could not
listen has no opinion, so silence, and a BMC's word against it, count only from `listening_since` on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from services.ha.config import HaConfig
from services.ha.policies import kdump
from services.ha.policies.kdump import Dump
from services.ha.policies.peers import Peer
from services.ha.policies.soft_fencing import Tried
from volery.contracts.fencing import PowerState
from volery.contracts.liveness import LivenessState, ProofKind

UP, CONNECTING = LivenessState.UP, LivenessState.CONNECTING
NON_RESPONSIVE, UNKNOWN = LivenessState.NON_RESPONSIVE, LivenessState.UNKNOWN
DEAD = LivenessState.DEAD

STORM_HOSTS = 3
"""With fewer hosts one can't tell a trouble of one's own from theirs."""
OFF_APART_SECONDS = 2.0
"""Two readings of a BMC are two only so far apart: one that lies in the middle of a reset says off once."""
BOOT_APART_SECONDS = 1.5
"""A new boot proves the end of the old one when that has not beaten for three beats: two machines that beat under one
name are two living ones."""


class Kind(StrEnum):
    """Kinds of evidence; the newest of each is kept."""

    BEAT = "beat"
    FORMER_BEAT = "former_beat"
    STRANGER_BEAT = "stranger_beat"
    SILENCE = "silence"
    DISCONNECTED = "disconnected"
    CONNECTED = "connected"
    NEW_BOOT = "new_boot"
    REPORT = "report"
    LISTENING = "listening"
    BMC_OFF_FIRST = "bmc_off_first"
    BMC = "bmc"
    PERSON = "person"
    LEASE = "lease"
    PEER = "peer"
    """One of each peer that tried it."""
    SOFT_FENCE = "soft_fence"
    KDUMP_FIRST = "kdump_first"
    KDUMP = "kdump"
    PROOF = "proof"


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign of life, and of which boot."""

    at: float
    boot_id: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What a host's power management said."""

    at: float
    """When it was asked: what it said was true no earlier."""
    state: PowerState
    trusted: bool
    """Whether the BMC was known to be this host's when it was asked."""
    by: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A person said that this boot has ended."""

    at: float
    boot_id: str
    by: str = ""


@dataclass(frozen=True, slots=True)
class Lease:
    """The host's storage lease, as it was read last."""

    at: float
    boot_id: str
    expired: bool
    watchdog_passed: bool
    """The time of a watchdog that this boot had armed and can't outlive has passed."""


@dataclass(frozen=True, slots=True)
class Held:
    """A proof: this boot has ended."""

    at: float
    boot_id: str
    kind: ProofKind
    details: str = ""


@dataclass(frozen=True, slots=True)
class Observations:
    """What is known about one host."""

    state: LivenessState
    boot_id: str = ""
    """The boot that the state is about."""
    listening_since: float = 0.0
    beat: Sign | None = None
    """The newest beat of the agent that inventory admitted."""
    former_beat: Sign | None = None
    """The newest beat of another boot than that."""
    stranger_beat: Sign | None = None
    """The newest beat of an agent under this host's name whose journal inventory has not admitted."""
    connected_at: float | None = None
    """Its agent connected to the NATS server: a sign of life, but nobody knows of which boot."""
    disconnected_at: float | None = None
    """The NATS server said that the agent left; None once anything was heard since."""
    off_first: Reading | None = None
    """The first of the readings that said off, without another word or a sign of life since."""
    reading: Reading | None = None
    """The newest."""
    person: Confirmed | None = None
    lease: Lease | None = None
    proof: Held | None = None
    """What was concluded before."""
    peers: tuple[Peer, ...] = ()
    """What other hosts found that tried it. Nothing is concluded from it."""
    soft: Tried | None = None
    """What came of restarting its agent over SSH. Nor from this."""
    dump: Dump | None = None
    """Its crash kernel writes a dump."""


@dataclass(frozen=True, slots=True)
class Judgement:
    state: LivenessState
    proof: Held | None = None
    boot_id: str = ""
    """The boot that the state is about."""
    voided: bool = False
    """A sign of life of the boot that was believed dead."""


def judge(seen: Observations, config: HaConfig, now: float) -> Judgement:
    """The state that the evidence supports, the old one where it supports nothing new; and the newest proof."""
    held, voided = seen.proof, _voided(seen)
    if voided:
        held = None
    booted = _new_boot(seen, held, now)
    if booted is not None:
        held = booted
    elif held is None or held.boot_id != seen.boot_id:
        held = _off(seen) or _dumped(seen) or _confirmed(seen) or _expired(seen) or held
    boot = _boot(seen, held)
    if held is not None and held.boot_id == boot:
        return Judgement(DEAD, held, boot, voided)
    return Judgement(_heard(seen, config, now), held, boot, voided)


def _boot(seen: Observations, held: Held | None) -> str:
    """A new boot takes the place of the old one when that is proven to have ended."""
    beat = seen.beat
    if beat is None or beat.boot_id == seen.boot_id:
        return seen.boot_id
    if not seen.boot_id or (held is not None and held.boot_id == seen.boot_id):
        return beat.boot_id
    return seen.boot_id


def _voided(seen: Observations) -> bool:
    proof = seen.proof
    if proof is None:
        return False
    signs = (seen.beat, seen.former_beat, seen.stranger_beat)
    return any(s is not None and s.boot_id == proof.boot_id and s.at > proof.at for s in signs)


def signs_of_life(seen: Observations) -> list[float]:
    """When anything was heard of it."""
    signs = (seen.beat, seen.former_beat, seen.stranger_beat)
    found = [s.at for s in signs if s is not None]
    return found if seen.connected_at is None else [*found, seen.connected_at]


def _last_sign(seen: Observations) -> float:
    """What nobody could have heard counts as heard."""
    return max([*signs_of_life(seen), seen.listening_since])


def _new_boot(seen: Observations, held: Held | None, now: float) -> Held | None:
    beat, former = seen.beat, seen.former_beat
    if beat is None or not seen.boot_id or beat.boot_id == seen.boot_id:
        return None
    if held is not None and held.boot_id in (seen.boot_id, beat.boot_id):
        return None
    if former is not None and now - former.at < BOOT_APART_SECONDS:
        return None
    if now - seen.listening_since < BOOT_APART_SECONDS:
        return None  # the old boot may beat as well as before, and nobody could hear it
    return Held(beat.at, seen.boot_id, ProofKind.NEW_BOOT, f"its agent beats under boot {beat.boot_id}")


def _off(seen: Observations) -> Held | None:
    first, last = seen.off_first, seen.reading
    if first is None or last is None or not seen.boot_id:
        return None
    if last.state is not PowerState.OFF or not (first.trusted and last.trusted):
        return None
    if first.at <= _last_sign(seen) or last.at - first.at < OFF_APART_SECONDS:
        return None
    details = f"its BMC said off twice, {last.at - first.at:.1f} s apart"
    return Held(last.at, seen.boot_id, ProofKind.BMC_OFF, f"{details}, to {last.by}" if last.by else details)


def _dumped(seen: Observations) -> Held | None:
    """A kernel that writes a dump runs no guests, and was started by the crash of the one that did."""
    dump = seen.dump
    if dump is None or not dump.trusted or not seen.boot_id:
        return None
    if dump.first_at <= _last_sign(seen) or dump.at - dump.first_at < kdump.APART_SECONDS:
        return None
    details = f"it crashed: its crash kernel said twice, {dump.at - dump.first_at:.1f} s apart, that it writes a dump"
    return Held(dump.at, seen.boot_id, ProofKind.KDUMP, f"{details}, from {dump.address}")


def _confirmed(seen: Observations) -> Held | None:
    person = seen.person
    if person is None or not seen.boot_id or person.boot_id != seen.boot_id:
        return None
    if any(at > person.at for at in signs_of_life(seen)):
        return None
    return Held(person.at, seen.boot_id, ProofKind.PERSON, f"confirmed by {person.by}")


def _expired(seen: Observations) -> Held | None:
    lease = seen.lease
    if lease is None or not seen.boot_id or lease.boot_id != seen.boot_id:
        return None
    if not (lease.expired and lease.watchdog_passed) or lease.at <= _last_sign(seen):
        return None
    details = "its lease expired, and the time of its watchdog has passed"
    return Held(lease.at, seen.boot_id, ProofKind.LEASE_EXPIRED, details)


def _heard(seen: Observations, config: HaConfig, now: float) -> LivenessState:
    """By beats and silence alone."""
    beat_at = seen.beat.at if seen.beat is not None else None
    before = NON_RESPONSIVE if seen.state is DEAD else seen.state
    silence = now - max(beat_at if beat_at is not None else seen.listening_since, seen.listening_since)
    if before is UNKNOWN and beat_at is None:
        return UNKNOWN
    stranger = seen.stranger_beat
    alive = stranger is not None and now - stranger.at < config.suspect_seconds
    if silence >= config.silence_seconds:
        return CONNECTING if alive else NON_RESPONSIVE
    if silence >= config.suspect_seconds or _left(seen, config, now):
        # From non-responsive only a beat leads back.
        return before if before is NON_RESPONSIVE and not alive else CONNECTING
    if beat_at is not None and now - beat_at < config.suspect_seconds:
        return UP
    return before


def _left(seen: Observations, config: HaConfig, now: float) -> bool:
    at = seen.disconnected_at
    if at is None or (seen.beat is not None and seen.beat.at > at):
        return False
    # That it came back may have been missed while nobody listened; its beats would not.
    return now - max(at, seen.listening_since) >= config.disconnect_seconds


def is_storm(before: Iterable[LivenessState], after: Iterable[LivenessState], calm: int = 0) -> bool:
    """Whether most of the hosts that were up are believed silent at the same moment; `calm` more were and are up."""
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b in (UP, CONNECTING)]
    silent = sum(a in (CONNECTING, NON_RESPONSIVE) for _, a in pairs)
    return silent >= STORM_HOSTS and silent * 2 > len(pairs) + calm


SENTENCES: dict[LivenessState, str] = {
    UP: "it beats",
    CONNECTING: "no beat for {silence:.1f} s",
    NON_RESPONSIVE: "no beat for {silence:.1f} s; silence is no proof of death",
    UNKNOWN: "never heard of",
    DEAD: "{proof}",
}
