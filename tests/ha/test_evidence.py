"""What silence means, and what proves death: tables, and properties over any history of one host."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from services.ha.config import HaConfig
from services.ha.liveness import FORMER_PROOFS, former
from services.ha.policies.evidence import (
    Confirmed,
    Held,
    Judgement,
    Lease,
    Observations,
    Reading,
    Sign,
    is_storm,
    judge,
)
from services.ha.policies.kdump import Dump, Source, heard
from services.ha.policies.peers import Peer
from services.ha.policies.replay import evidence_of, replay
from services.ha.watch import Watch
from volery.contracts.fencing import PowerState
from volery.contracts.liveness import HostLiveness, LivenessState, Proof, ProofKind
from volery.contracts.metrics import Beat
from volery.contracts.peers import Reach

UP, CONNECTING, DEAD = LivenessState.UP, LivenessState.CONNECTING, LivenessState.DEAD
NON_RESPONSIVE, UNKNOWN = LivenessState.NON_RESPONSIVE, LivenessState.UNKNOWN
ON, OFF = PowerState.ON, PowerState.OFF
CONFIG = HaConfig()
NOW = 1000.0
B1, B2 = "boot-1", "boot-2"
AT = datetime(2026, 11, 29, tzinfo=UTC)


def seen(
    state: LivenessState, beat: float | None = None, listening: float = 0, **more: object
) -> Observations:
    made = Observations(state, B1, listening, beat=Sign(beat, B1) if beat is not None else None)
    return dataclasses.replace(made, **more)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        # Beats
        (seen(UNKNOWN, NOW - 0.4), UP),
        (seen(CONNECTING, NOW - 0.4), UP),
        (seen(NON_RESPONSIVE, NOW - 0.4), UP),
        # Silence
        (seen(UP, NOW - 2.9), UP),
        (seen(UP, NOW - 3.1), CONNECTING),
        (seen(CONNECTING, NOW - 9.9), CONNECTING),
        (seen(UP, NOW - 10.1), NON_RESPONSIVE),
        (seen(NON_RESPONSIVE, NOW - 100), NON_RESPONSIVE),
        (seen(UNKNOWN), UNKNOWN),
        # The NATS server said that the agent left
        (seen(UP, NOW - 1.2, disconnected_at=NOW - 1.1), CONNECTING),
        (seen(UP, NOW - 0.9, disconnected_at=NOW - 0.8), UP),
        (seen(UP, NOW - 1.0, disconnected_at=NOW - 1.1), UP),
        (seen(NON_RESPONSIVE, NOW - 5, disconnected_at=NOW - 4.9), NON_RESPONSIVE),
        # ha has only just begun to listen, or was cut off
        (seen(UP, None, NOW + 2), UP),
        (seen(CONNECTING, None, NOW - 1), CONNECTING),
        (seen(UP, None, NOW - 3.1), CONNECTING),
        (seen(UP, None, NOW - 10.1), NON_RESPONSIVE),
        (seen(UP, NOW - 60, NOW - 1), UP),
        (seen(UP, NOW - 60, NOW - 0.9, disconnected_at=NOW - 50), UP),
        (seen(UP, NOW - 60, NOW - 1.1, disconnected_at=NOW - 50), CONNECTING),
        (seen(NON_RESPONSIVE, NOW - 60, NOW - 1), NON_RESPONSIVE),
        # Another journal beats under its name: not silent, not up
        (seen(UP, NOW - 20, stranger_beat=Sign(NOW - 0.4, B1)), CONNECTING),
        (seen(NON_RESPONSIVE, NOW - 20, stranger_beat=Sign(NOW - 0.4, B1)), CONNECTING),
        (seen(UP, NOW - 20, stranger_beat=Sign(NOW - 15, B1)), NON_RESPONSIVE),
    ],
)
def test_what_silence_means(observed: Observations, expected: LivenessState) -> None:
    found = judge(observed, CONFIG, NOW)
    assert found.state is expected
    assert found.proof is None


def off(at: float, *, trusted: bool = True, state: PowerState = OFF) -> Reading:
    return Reading(NOW + at, state, trusted, "host h2")


def silent(beat: float = -60, **more: Any) -> Observations:
    return dataclasses.replace(seen(NON_RESPONSIVE, NOW + beat), **more)


def dump(first: float, last: float, *, trusted: bool = True) -> Dump:
    return Dump(NOW + first, NOW + last, trusted, "10.0.8.7")


HELD = Held(NOW - 5, B1, ProofKind.BMC_OFF)


@pytest.mark.parametrize(
    ("observed", "kind", "boot", "state"),
    [
        # The BMC says off
        (silent(off_first=off(-3), reading=off(-1)), ProofKind.BMC_OFF, B1, DEAD),
        (silent(off_first=off(-2), reading=off(-0.001)), None, "", NON_RESPONSIVE),
        (silent(off_first=off(-1), reading=off(-1)), None, "", NON_RESPONSIVE),
        (silent(off_first=off(-3, trusted=False), reading=off(-1)), None, "", NON_RESPONSIVE),
        (silent(off_first=off(-3), reading=off(-1, trusted=False)), None, "", NON_RESPONSIVE),
        (silent(off_first=off(-3), reading=off(-1, state=ON)), None, "", NON_RESPONSIVE),
        (silent(off_first=off(-3), reading=off(-1, state=PowerState.UNKNOWN)), None, "", NON_RESPONSIVE),
        (silent(-4, off_first=off(-3), reading=off(-0.5)), ProofKind.BMC_OFF, B1, DEAD),
        (silent(-2, off_first=off(-3), reading=off(-0.5)), None, "", UP),
        (silent(off_first=off(-3), reading=off(-1), connected_at=NOW - 2), None, "", NON_RESPONSIVE),
        (silent(off_first=off(-3), reading=off(-1), listening_since=NOW - 2), None, "", NON_RESPONSIVE),
        (silent(off_first=off(-3), reading=off(-1), stranger_beat=Sign(NOW - 2, B2)), None, "", CONNECTING),
        (silent(off_first=off(-3), reading=off(-1), boot_id=""), None, "", NON_RESPONSIVE),
        # Another boot beats
        (seen(UP, beat=None, boot_id=B1, former_beat=Sign(NOW - 5, B1)), None, "", NON_RESPONSIVE),
        (dataclasses.replace(seen(UP, NOW - 0.1), boot_id="boot-0"), ProofKind.NEW_BOOT, "boot-0", UP),
        (
            dataclasses.replace(
                seen(UP, NOW - 0.1), boot_id="boot-0", former_beat=Sign(NOW - 0.6, "boot-0")
            ),
            None,
            "",
            UP,
        ),
        *(  # of a boot that beats as well nothing could be heard yet
            (dataclasses.replace(seen(UP, NOW - 0.1, NOW - since), boot_id="boot-0"), None, "", UP)
            for since in (-2, 0.2, 1.4)
        ),
        # A person
        (silent(person=Confirmed(NOW - 1, B1, "user:ann")), ProofKind.PERSON, B1, DEAD),
        (silent(person=Confirmed(NOW - 1, B2, "user:ann")), None, "", NON_RESPONSIVE),
        (silent(-0.5, person=Confirmed(NOW - 1, B1, "user:ann")), None, "", UP),
        # A lease
        (silent(lease=Lease(NOW - 1, B1, True, True)), ProofKind.LEASE_EXPIRED, B1, DEAD),
        (silent(lease=Lease(NOW - 1, B1, True, False)), None, "", NON_RESPONSIVE),
        (silent(lease=Lease(NOW - 1, B1, False, True)), None, "", NON_RESPONSIVE),
        (silent(-0.5, lease=Lease(NOW - 1, B1, True, True)), None, "", UP),
        # A dump that is told twice, by a network that no guest can send by
        (silent(dump=dump(-9, -1)), ProofKind.KDUMP, B1, DEAD),
        (silent(dump=dump(-3, -1.001)), None, "", NON_RESPONSIVE),
        (silent(dump=dump(-9, -1, trusted=False)), None, "", NON_RESPONSIVE),
        (silent(-9.5, dump=dump(-9, -1)), ProofKind.KDUMP, B1, DEAD),
        (silent(-8, dump=dump(-9, -1)), None, "", NON_RESPONSIVE),
        (silent(dump=dump(-9, -1), connected_at=NOW - 5), None, "", NON_RESPONSIVE),
        (silent(dump=dump(-9, -1), listening_since=NOW - 5), None, "", NON_RESPONSIVE),
        (silent(dump=dump(-9, -1), boot_id=""), None, "", NON_RESPONSIVE),
        (silent(-1, proof=Held(NOW - 5, B1, ProofKind.KDUMP), state=DEAD), None, "", UP),
        # What was proven stays so until it shows signs of life
        (silent(proof=HELD, state=DEAD), ProofKind.BMC_OFF, B1, DEAD),
        (silent(proof=HELD, state=DEAD, connected_at=NOW - 0.1), ProofKind.BMC_OFF, B1, DEAD),
        (silent(proof=HELD, state=DEAD, reading=off(-1, state=ON)), ProofKind.BMC_OFF, B1, DEAD),
        (silent(proof=HELD, state=DEAD, stranger_beat=Sign(NOW - 1, B2)), ProofKind.BMC_OFF, B1, DEAD),
        (silent(proof=HELD, state=DEAD, stranger_beat=Sign(NOW - 1, B1)), None, "", CONNECTING),
        (silent(-0.2, proof=HELD, state=DEAD), None, "", UP),
        # It came back under another boot: the proof of the former one stays
        (seen(DEAD, beat=None, proof=HELD, former_beat=None) , ProofKind.BMC_OFF, B1, DEAD),
        (
            Observations(DEAD, B1, 0, beat=Sign(NOW - 0.1, B2), former_beat=Sign(NOW - 60, B1), proof=HELD),
            ProofKind.BMC_OFF,
            B1,
            UP,
        ),
        # … and the next death is about the next boot
        (
            Observations(
                NON_RESPONSIVE,
                B2,
                0,
                beat=Sign(NOW - 60, B2),
                proof=Held(NOW - 500, B1, ProofKind.BMC_OFF),
                off_first=off(-3),
                reading=off(-1),
            ),
            ProofKind.BMC_OFF,
            B2,
            DEAD,
        ),
    ],
)  # fmt: skip
def test_what_proves_death(
    observed: Observations, kind: ProofKind | None, boot: str, state: LivenessState
) -> None:
    found = judge(observed, CONFIG, NOW)
    assert found.state is state
    assert (found.proof.kind if found.proof else None) is kind
    assert (found.proof.boot_id if found.proof else "") == boot


def test_two_machines_under_one_name_prove_nothing() -> None:
    """Both beat, now the one, now the other: neither has ended."""
    watch = Watch(known=True, state=UP, boot_id=B1)
    now = 100.0
    for seq in range(1, 40):
        now += 0.25
        boot = B1 if seq % 2 else B2
        watch.hear(Beat(host_id="h", generation="j", boot_id=boot, beat_seq=seq, clock_ms=0), now)
        found = judge(watch.seen(0.0, now), CONFIG, 0.0)
        assert found.proof is None
        assert found.boot_id == B1


moments = st.none() | st.floats(0, NOW)
boots = st.sampled_from([B1, B2])
signs = st.none() | st.builds(Sign, st.floats(0, NOW), boots)
readings = st.none() | st.builds(
    Reading, st.floats(NOW - 30, NOW), st.sampled_from(list(PowerState)), st.booleans()
)
observations = st.builds(
    Observations,
    state=st.sampled_from(list(LivenessState)),
    boot_id=st.sampled_from(["", B1, B2]),
    listening_since=st.floats(0, NOW + 5),
    beat=signs,
    former_beat=signs,
    stranger_beat=signs,
    connected_at=moments,
    disconnected_at=moments,
    off_first=readings,
    reading=readings,
    person=st.none() | st.builds(Confirmed, st.floats(NOW - 30, NOW), boots),
    dump=st.none() | st.builds(Dump, st.floats(NOW - 30, NOW), st.floats(NOW - 30, NOW), st.booleans()),
    lease=st.none() | st.builds(Lease, st.floats(NOW - 30, NOW), boots, st.booleans(), st.booleans()),
    proof=st.none() | st.builds(Held, st.floats(NOW - 30, NOW), boots, st.sampled_from(list(ProofKind))),
)


@given(observations)
def test_nobody_is_given_up_without_having_been_listened_to(observed: Observations) -> None:
    found = judge(observed, CONFIG, NOW)
    beat = observed.beat.at if observed.beat is not None else None
    listened = NOW - max(beat or 0, observed.listening_since)
    if found.state is NON_RESPONSIVE and observed.state not in (NON_RESPONSIVE, DEAD):
        assert listened >= CONFIG.silence_seconds
    if found.state is CONNECTING and observed.state is UP:
        assert listened >= CONFIG.disconnect_seconds
    if found.state is UP and observed.state is not UP:
        assert beat is not None
        assert NOW - beat < CONFIG.suspect_seconds
    if found.state is UNKNOWN:
        assert observed.state is UNKNOWN


@given(observations)
def test_no_death_without_proof_and_none_against_a_sign_of_life(observed: Observations) -> None:
    found = judge(observed, CONFIG, NOW)
    if found.state is DEAD:
        assert found.proof is not None
        assert found.proof.boot_id == found.boot_id
    proof = found.proof
    if proof is None:
        return
    assert proof.boot_id
    for sign in (observed.beat, observed.stranger_beat, observed.former_beat):
        if sign is not None and sign.boot_id == proof.boot_id and proof.kind is not ProofKind.NEW_BOOT:
            assert sign.at <= proof.at
    if proof.kind is ProofKind.BMC_OFF and proof != observed.proof:
        first, last = observed.off_first, observed.reading
        assert first is not None
        assert last is not None
        assert first.trusted
        assert last.trusted
        assert last.at - first.at >= 2
        assert first.at > observed.listening_since
    if proof.kind is ProofKind.KDUMP and proof != observed.proof:
        told = observed.dump
        assert told is not None
        assert told.trusted
        assert told.at - told.first_at >= 2
        assert told.first_at > observed.listening_since


def summary(found: Judgement) -> tuple[LivenessState, ProofKind | None, str]:
    proof = found.proof
    return found.state, proof.kind if proof else None, proof.boot_id if proof else ""


class History:
    """What ha would announce about one host, while it hears whatever happens."""

    def __init__(self) -> None:
        self.watch = Watch(known=True)
        self.now, self.seq, self.listening = 50.0, 0, 40.0
        wall = datetime(2026, 11, 29, tzinfo=UTC)
        self.start = wall
        self.said = [HostLiveness(id="h", revision=1, created_at=wall, updated_at=wall)]
        self.judged: list[tuple[LivenessState, ProofKind | None, str]] = []

    def beat(self, boot: str, generation: str = "j") -> None:
        self.seq += 1
        self.watch.hear(
            Beat(host_id="h", generation=generation, boot_id=boot, beat_seq=self.seq, clock_ms=0), self.now
        )

    def tick(self) -> None:
        """As `liveness.tick` and `conclude` do."""
        watch = self.watch
        seen_now = watch.seen(self.listening, self.now)
        found = judge(seen_now, CONFIG, 0.0)
        old, proof = watch.proof, found.proof
        is_new = proof is not None and (old is None or (old.boot_id, old.kind) != (proof.boot_id, proof.kind))
        if (found.state, found.boot_id) == (watch.state, watch.boot_id) and not is_new and not found.voided:
            return
        assert not watch.calm(self.listening, self.now, CONFIG.suspect_seconds)
        at = self.start + timedelta(seconds=self.now)
        before = self.said[-1]
        told = before.proof
        if proof is None:
            told = None
        elif is_new:
            told = Proof(id="p", kind=proof.kind, at=at, boot_id=proof.boot_id, details=proof.details)
            watch.proof = dataclasses.replace(proof, at=self.now + proof.at)
        watch.proof = None if proof is None else watch.proof
        watch.state, watch.boot_id = found.state, found.boot_id
        self.judged.append(summary(found))
        self.said.append(
            replace(
                before,
                revision=before.revision + 1,
                state=found.state,
                boot_id=found.boot_id,
                proof=told,
                judged_at=at,
                evidence=evidence_of(seen_now, at),
            )
        )


steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "beat1",
                "beat2",
                "stranger",
                "left",
                "came",
                "off",
                "on",
                "doubtful",
                "person",
                "deaf",
                "lease",
                "tried",
                "dumps",
            ]
        ),
        st.floats(0.01, 20.0),
    ),
    max_size=60,
)


@given(steps)
@example([("beat1", 1.0), ("off", 4.0), ("off", 3.0), ("beat2", 9.0), ("beat2", 0.5), ("beat1", 0.5)])
def test_every_judgement_follows_from_what_was_announced(happened: list[tuple[str, float]]) -> None:
    """Also the words of a name change between judgements say nothing new."""
    history = History()
    watch = history.watch
    for what, pause in happened:
        history.now += round(pause, 3)
        reading = {"off": OFF, "on": ON, "doubtful": OFF}.get(what)
        if what in ("beat1", "beat2"):
            history.beat(B1 if what == "beat1" else B2)
        elif what == "stranger":
            watch.stranger = Sign(history.now, B1)
        elif what == "left":
            watch.disconnected_at = history.now
        elif what == "came":
            watch.connected_at, watch.disconnected_at = history.now, None
        elif reading is not None:
            watch.hear_power(Reading(history.now, reading, what != "doubtful"), history.listening)
        elif what == "person":
            watch.person = Confirmed(history.now, watch.boot_id, "user:ann")
        elif what == "lease":
            watch.lease = Lease(history.now, watch.boot_id, expired=True, watchdog_passed=True)
        elif what == "dumps":
            source, since = Source("h", True), watch.last_sign(history.listening)
            watch.dump = heard(watch.dump, history.now, "10.0.8.7", source, since, CONFIG)
        elif what == "tried":
            watch.hear_peer("p", Peer(history.now, "host p", Reach.ANSWERS))
        else:
            history.listening = history.now + 2
        history.tick()
        last = history.said[-1]
        history.said.append(replace(last, revision=last.revision + 1, fencing="its BMC says on"))
    again = replay(history.said, CONFIG)
    assert [summary(j) for j in again] == history.judged


def test_most_hosts_silent_at_once_is_a_storm() -> None:
    up5 = [UP] * 5
    assert is_storm(up5, [CONNECTING] * 3 + [UP] * 2)
    assert not is_storm(up5, [CONNECTING] * 2 + [UP] * 3)
    assert not is_storm([UP] * 2, [CONNECTING] * 2)
    assert not is_storm([NON_RESPONSIVE] * 5, [NON_RESPONSIVE] * 5)
    assert not is_storm(up5, [DEAD] * 5)
    assert is_storm([UP] * 3, [CONNECTING] * 3, calm=2)
    assert not is_storm([UP] * 3, [CONNECTING] * 3, calm=3)


def test_who_beats_and_of_whom_nothing_else_is_known_needs_no_judgement() -> None:
    history = History()
    watch = history.watch
    history.beat(B1)
    history.tick()
    assert watch.calm(history.listening, history.now + 2.9, CONFIG.suspect_seconds)
    assert not watch.calm(history.listening, history.now + 3.1, CONFIG.suspect_seconds)
    watch.disconnected_at = history.now + 0.1
    assert not watch.calm(history.listening, history.now + 0.2, CONFIG.suspect_seconds)
    history.now += 0.5
    history.beat(B1)
    assert watch.calm(history.listening, history.now, CONFIG.suspect_seconds)
    history.now += 0.5
    history.beat(B2)
    assert not watch.calm(history.listening, history.now, CONFIG.suspect_seconds)


def test_a_host_tells_of_a_few_earlier_deaths() -> None:
    def proof(boot_id: str) -> Proof:
        return Proof(id=boot_id, kind=ProofKind.NEW_BOOT, at=AT, boot_id=boot_id)

    assert former((), None, proof("a")) == ()
    assert former((), proof("a"), proof("a")) == ()
    assert former((proof("a"),), proof("b"), None) == (proof("a"),)
    kept: tuple[Proof, ...] = ()
    for number in range(FORMER_PROOFS + 3):
        kept = former(kept, proof(f"{number}"), proof(f"{number + 1}"))
    assert [each.boot_id for each in kept] == [str(n) for n in range(3, FORMER_PROOFS + 3)]
