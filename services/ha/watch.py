"""One host as it was heard: beats, presence on the bus, its BMC's words; in memory, on one monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import replace as with_fields

from services.ha.policies.evidence import (
    UNKNOWN,
    UP,
    Confirmed,
    Held,
    Lease,
    Observations,
    Reading,
    Sign,
)
from services.ha.policies.kdump import Dump
from services.ha.policies.peers import Peer
from services.ha.policies.soft_fencing import Tried
from volery.contracts.fencing import PowerState
from volery.contracts.liveness import LivenessState
from volery.contracts.metrics import Beat
from volery.contracts.peers import Door, Reach


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What inventory says of a host, as far as ha needs it."""

    id: str
    revision: int
    name: str = ""
    cluster_id: str = ""
    status: str = ""
    hardware_uuid: str = ""
    boot_id: str = ""
    fence_agents: tuple[str, ...] = ()
    """Those that it can run against other hosts' BMCs."""
    doors: tuple[Door, ...] = ()
    """Where other hosts reach it; not kept: known once inventory was listed."""


@dataclass(slots=True)
class Watch:
    """Times are on the monotonic clock."""

    known: bool = False
    """Whether it is a host of inventory's; others are heard, but not judged."""
    facts: HostFacts = HostFacts("", 0)
    state: LivenessState = UNKNOWN
    suspected: bool = False
    """By its silence, also while judgement is held, and while and after its death is concluded."""
    generation: str = ""
    """The journal that inventory admitted; "" is any."""
    boot_id: str = ""
    beat: Beat | None = None
    beat_at: float | None = None
    boot_heard_at: float | None = None
    """When the boot that beats now was first heard."""
    former: Sign | None = None
    stranger: Sign | None = None
    connected_at: float | None = None
    disconnected_at: float | None = None
    disconnect_reason: str = ""
    off_first: Reading | None = None
    reading: Reading | None = None
    person: Confirmed | None = None
    lease: Lease | None = None
    proof: Held | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    """By host: what it found when it tried this one, since the last beat."""
    tried_next: float = 0.0
    """When peers are asked again."""
    soft: Tried | None = None
    """What came of restarting its agent over SSH, since the last beat."""
    soft_begun: float | None = None
    soft_running: bool = False
    dump: Dump | None = None
    """What its crash kernel said, since the last beat."""
    announced: tuple[frozenset[tuple[str, Reach]], str, str] = (frozenset(), "", "")
    """How far each peer got, what came of soft fencing, and from where a dump is told, as was last written."""

    def seen(self, listening_since: float, now: float, confirmed: Confirmed | None = None) -> Observations:
        """Everything in seconds before now, to the microsecond: as evidence is dated, so that judging it again later
        gives the same. `confirmed` is what a person says in this moment."""

        def ago(at: float) -> float:
            return -round(now - at, 6)

        def maybe(at: float | None) -> float | None:
            return None if at is None else ago(at)

        def sign(found: Sign | None) -> Sign | None:
            return None if found is None else Sign(ago(found.at), found.boot_id)

        def reading(found: Reading | None) -> Reading | None:
            return (
                None
                if found is None
                else Reading(ago(found.at), found.state, found.trusted, found.by, found.words)
            )

        beat, person, lease, proof = self.beat, confirmed or self.person, self.lease, self.proof
        return Observations(
            state=self.state,
            boot_id=self.boot_id,
            listening_since=ago(listening_since),
            beat=Sign(ago(self.beat_at), beat.boot_id)
            if beat is not None and self.beat_at is not None
            else None,
            former_beat=sign(self.former),
            stranger_beat=sign(self.stranger),
            connected_at=maybe(self.connected_at),
            disconnected_at=maybe(self.disconnected_at),
            off_first=reading(self.off_first),
            reading=reading(self.reading),
            person=Confirmed(ago(person.at), person.boot_id, person.by) if person is not None else None,
            lease=Lease(ago(lease.at), lease.boot_id, lease.expired, lease.watchdog_passed)
            if lease is not None
            else None,
            proof=Held(ago(proof.at), proof.boot_id, proof.kind, proof.details)
            if proof is not None
            else None,
            dump=with_fields(self.dump, first_at=ago(self.dump.first_at), at=ago(self.dump.at))
            if self.dump is not None
            else None,
            soft=with_fields(self.soft, at=ago(self.soft.at)) if self.soft is not None else None,
            peers=tuple(with_fields(peer, at=ago(peer.at)) for _, peer in sorted(self.peers.items())),
        )

    def calm(self, listening_since: float, now: float, suspect_seconds: float) -> bool:
        """Whether it is up and beats, and nothing else was observed of which something could be concluded: then `judge`
        says what is known already. Four times a second this is asked of ten thousand hosts."""
        beat, at = self.beat, self.beat_at
        if self.state is not UP or beat is None or at is None or beat.boot_id != self.boot_id:
            return False
        if now - max(at, listening_since) >= suspect_seconds:
            return False
        if self.off_first is not None or self.dump is not None:
            return False
        words = (self.person, self.lease)
        if any(said is not None and said.at >= at for said in words):
            return False
        if self.disconnected_at is not None and self.disconnected_at >= at:
            return False
        return self.proof is None or not self._contradicts(self.proof)

    def _contradicts(self, proof: Held) -> bool:
        """Whether the boot that is proven to have ended is heard still."""
        signs = (self.former, self.stranger)
        return proof.boot_id == self.boot_id or any(
            sign is not None and sign.boot_id == proof.boot_id and sign.at >= proof.at for sign in signs
        )

    def hear(self, beat: Beat, now: float) -> None:
        """A beat that doesn't come after the last one of its journal is a late copy, no sign of life."""
        if self.generation not in ("", beat.generation):
            self.stranger = Sign(now, beat.boot_id)
            return
        last = self.beat
        if last is not None and last.generation == beat.generation and beat.beat_seq <= last.beat_seq:
            return
        if last is not None and self.beat_at is not None and last.boot_id != beat.boot_id:
            self.former = Sign(self.beat_at, last.boot_id)
        if last is None or last.boot_id != beat.boot_id:
            self.boot_heard_at = now
        self.beat, self.beat_at = beat, now
        self.off_first = None
        self.peers.clear()
        self.soft = self.dump = None

    def admit(self) -> None:
        """Of what was heard while every journal was believed, only the admitted one's beats are the host's own."""
        beat, at = self.beat, self.beat_at
        if beat is not None and at is not None and self.generation not in ("", beat.generation):
            self.stranger, self.beat, self.beat_at = Sign(at, beat.boot_id), None, None

    def hear_power(self, reading: Reading, listening_since: float) -> None:
        """A BMC's word. Off counts from the first reading after the last sign of life, in an unbroken row; a reading
        that failed breaks nothing and proves nothing."""
        self.reading = reading
        first = self.off_first
        if reading.state is PowerState.ON:
            self.off_first = None
        elif reading.state is PowerState.OFF and (
            first is None or not first.trusted or first.at <= self.last_sign(listening_since)
        ):
            self.off_first = reading

    def hear_peer(self, peer_id: str, peer: Peer) -> None:
        """What was found before the last beat says nothing any more."""
        if self.beat_at is None or peer.at > self.beat_at:
            self.peers[peer_id] = peer

    def forget_peers(self, before: float) -> None:
        """Words of hosts that have not said any since."""
        for peer_id in [peer_id for peer_id, peer in self.peers.items() if peer.at < before]:
            del self.peers[peer_id]

    def distrust_power(self) -> None:
        """Its BMC is another one now, or lied: nothing that it said counts."""
        self.off_first = self.reading = None

    def leaving_age(self, now: float) -> float | None:
        """Since its agent last said that the host is being shut down; None when it said something else since."""
        beat, at = self.beat, self.beat_at
        return now - at if beat is not None and at is not None and beat.leaving else None

    def last_sign(self, listening_since: float) -> float:
        """When it was last heard of at all; what nobody could have heard counts as heard."""
        signs = [s.at for s in (self.former, self.stranger) if s is not None]
        times = [at for at in (self.beat_at, self.connected_at) if at is not None]
        return max([*signs, *times, listening_since])
