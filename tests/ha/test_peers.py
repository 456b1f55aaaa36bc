"""Hosts that try a silent one: their words are kept with every decision, prove nothing, and spare it where that is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from nats.aio.msg import Msg

from services.ha.config import HaConfig
from services.ha.policies.evidence import judge
from services.ha.policies.peers import (
    FRESH_SECONDS,
    PEERS,
    Peer,
    answered,
    choose,
    doors_of,
    found_by,
    sentence,
)
from services.ha.policies.replay import evidence_of, observed
from services.ha.watch import Watch
from tests.ha.site import Site, caller, site
from tests.ha.world import CLUSTER, NOW, until
from volery.contracts.agent import HostCapabilities
from volery.contracts.base import encode
from volery.contracts.errors import Refused, conflict
from volery.contracts.fencing import PowerAction, PowerState
from volery.contracts.liveness import HostLiveness, ProofKind
from volery.contracts.metrics import Beat
from volery.contracts.peers import Door, DoorTried, HostTried, Reach, Speaks, TryHost
from volery.contracts.power import SET_FENCING_POLICY, SetFencingPolicy
from volery.runtime.bus import ERROR_HEADER
from volery.runtime.programs import Settings

NOTHING, TAKEN, ANSWERS = Reach.NOTHING, Reach.TAKEN, Reach.ANSWERS


@pytest.mark.parametrize(
    ("data_address", "uri", "expected"),
    [
        ("10.0.0.7:54322", "", [("agent", "10.0.0.7:54322", Speaks.TLS)]),
        ("127.0.0.1:54322", "qemu:///system", []),
        ("localhost:54322", "qemu+tcp://localhost/system", []),
        ("0.0.0.0:1", "qemu+tls://[::1]/system", []),
        ("", "qemu+tls://h7/system", [("libvirt", "h7:16514", Speaks.TLS)]),
        ("", "qemu+tcp://10.0.0.7:17000/system", [("libvirt", "10.0.0.7:17000", Speaks.LIBVIRT)]),
        ("", "qemu+ssh://root@[fe00::7]/system", [("libvirt", "[fe00::7]:22", Speaks.SSH)]),
        ("", "qemu+libssh://h7/system", []),
        ("", "qemu+tls://h7:no/system", []),
    ],
)
def test_where_a_host_is_tried(data_address: str, uri: str, expected: list[tuple[str, str, Speaks]]) -> None:
    doors = doors_of(HostCapabilities(data_address=data_address, libvirt_uri=uri))
    assert [(d.name, d.address, d.speaks) for d in doors] == expected


def test_who_is_asked_stays_the_same_and_is_spread() -> None:
    hosts = [f"h{n}" for n in range(40)]
    asked = choose("h40", hosts)
    assert len(asked) == PEERS
    assert choose("h40", [h for h in hosts if h != "h0" or h in asked]) == asked
    assert len({h for target in range(40) for h in choose(f"t{target}", hosts)}) > 20
    assert choose("h40", ["h1"]) == ["h1"]


def test_the_farthest_door_counts_and_every_word_is_kept() -> None:
    doors = [
        DoorTried(name="agent", reach=TAKEN, words="refuses connections"),
        DoorTried(name="libvirt", reach=ANSWERS),
    ]
    assert found_by(1.0, "h2", doors) == Peer(
        1.0, "h2", ANSWERS, "agent: refuses connections, libvirt: answers"
    )
    assert found_by(1.0, "h2", []).reach is NOTHING
    assert sentence([found_by(1.0, "host h2", doors[:1])]) == "host h2 tried it: agent: refuses connections"


def test_only_an_answer_that_is_fresh_counts() -> None:
    peers = [Peer(100.0, "a", ANSWERS), Peer(100.0, "b", TAKEN), Peer(71.0, "c", ANSWERS)]
    assert answered(peers, 100.5) == 2
    assert answered(peers, 71.0 + FRESH_SECONDS) == 1


def test_a_beat_makes_what_peers_found_before_it_void() -> None:
    watch = Watch()
    watch.hear_peer("a", Peer(1.0, "a", NOTHING))
    watch.hear(Beat(host_id="h", generation="j", boot_id="b", beat_seq=1, clock_ms=0), 2.0)
    watch.hear_peer("b", Peer(1.5, "b", NOTHING))  # asked before the beat, and answered after it
    assert not watch.peers
    watch.hear_peer("b", Peer(3.0, "b", NOTHING))
    watch.forget_peers(2.9)
    assert list(watch.peers) == ["b"]
    watch.forget_peers(3.1)
    assert not watch.peers


def test_what_peers_found_is_read_again_from_the_history_and_changes_no_judgement() -> None:
    watch = Watch(known=True, boot_id="b")
    for number, reach in enumerate(Reach):
        watch.hear_peer(f"h{number}", Peer(90.0 + number, f"host h{number}", reach, "agent: a word"))
    seen = watch.seen(40.0, 100.0)
    told = HostLiveness(
        id="h", revision=1, created_at=NOW, updated_at=NOW, judged_at=NOW, evidence=evidence_of(seen, NOW)
    )
    assert observed(None, told).peers == seen.peers
    assert len(seen.peers) == 3
    without = dataclasses.replace(seen, peers=())
    assert judge(seen, HaConfig(), 0.0) == judge(without, HaConfig(), 0.0)


@dataclass
class Peers:
    """Hosts that try others, as far as ha hears of them."""

    reach: Reach = NOTHING
    refusal: Refused | None = None
    asked: list[TryHost] = field(default_factory=list)


@asynccontextmanager
async def trying(at: Site) -> AsyncIterator[Peers]:
    made, client = Peers(), at.bus.client

    async def heard(message: Msg) -> None:
        ask = msgspec.json.decode(message.data, type=TryHost)
        made.asked.append(ask)
        if made.refusal is not None:
            body = encode(made.refusal.problem())
            await client.publish(message.reply, body, headers={ERROR_HEADER: made.refusal.kind})
            return
        doors = tuple(DoorTried(name=d.name, reach=made.reach, words=f"{made.reach}!") for d in ask.doors)
        found = HostTried(host_id=ask.host_id, target_host_id=ask.target_host_id, doors=doors)
        await client.publish(message.reply, encode(found))

    subscriptions = [await client.subscribe(f"host.{h.id}.try", cb=heard) for h in at.hosts]
    await client.flush()
    yield made
    for subscription in subscriptions:
        await subscription.unsubscribe()


async def test_peers_that_get_no_answer_are_in_the_evidence_and_in_the_record_of_the_fence(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path) as at, trying(at) as peers:
        at.hearts[0].stop()
        dead = await at.becomes(0, "dead")
        words = [e for e in dead.evidence if e.kind == "peer"]
        assert {(e.by, e.reached, e.details) for e in words} == {
            (f"host h{n}", "nothing", "agent: nothing!") for n in (1, 2)
        }
        assert all(e.at <= dead.judged_at for e in words if dead.judged_at)
        asked = {(a.host_id, a.target_host_id) for a in peers.asked}
        assert asked >= {(at.hosts[n].id, at.hosts[0].id) for n in (1, 2)}
        tried = next(a for a in peers.asked if a.target_host_id == at.hosts[0].id)
        assert tried.doors == (Door(name="agent", address="10.0.0.1:54322", speaks=Speaks.TLS),)
        record = await at.ended("succeeded")
        steps = [s.step for s in record.steps]
        assert steps.index("peers") < steps.index("ordered_off")
        told = next(s.words for s in record.steps if s.step == "peers")
        assert "host h1 tried it: agent: nothing!" in told


async def test_a_host_that_answers_its_peers_is_spared_where_the_policy_says_so(
    configured: Settings, tmp_path: Path
) -> None:
    """And only there; and its BMC's word that it is off proves its death all the same."""
    async with site(configured, tmp_path) as at, trying(at) as peers:
        peers.reach = ANSWERS
        policy = SetFencingPolicy(id=CLUSTER.id, skip_while_peers_answer=True)
        await at.bus.ask(SET_FENCING_POLICY, policy, caller("set"))
        at.hearts[0].stop()
        await at.says(0, "2 of the 2 hosts of its cluster that tried it get an answer, so the machine runs")
        await at.becomes(0, "non_responsive")

        async def asked_for_long() -> bool:
            """Longer than the silence before a fence."""
            return len(peers.asked) >= 2 * 8

        await until(asked_for_long, 30)
        held = await at.liveness(0)
        assert "spares it" in held.fencing
        assert (held.state, held.proof, at.bmc(0).did(PowerAction.OFF)) == ("non_responsive", None, 0)
        assert {e.reached for e in held.evidence if e.kind == "peer"} == {"answers"}
        at.bmc(0).power = PowerState.OFF
        dead = await at.becomes(0, "dead")
        assert dead.proof is not None
        assert dead.proof.kind is ProofKind.BMC_OFF
        assert at.bmc(0).did(PowerAction.OFF) == 0
        # Another one is silent, and no policy spares it.
        await at.bus.ask(SET_FENCING_POLICY, SetFencingPolicy(id=CLUSTER.id), caller("set"))
        at.hearts[0].boot_id = "boot-2"
        at.hearts[0].start()
        await at.becomes(0, "up")
        at.hearts[1].stop()
        await at.becomes(1, "dead")
        assert at.bmc(1).did(PowerAction.OFF) == 1


async def test_what_peers_find_is_announced_when_it_differs(configured: Settings, tmp_path: Path) -> None:
    """Also of a host that nobody can fence, and a peer that doesn't try has no opinion."""
    async with site(configured, tmp_path, powered=False) as at, trying(at) as peers:
        peers.refusal = conflict("not now")
        at.hearts[0].stop()
        silent = await at.becomes(0, "non_responsive")
        assert not [e for e in silent.evidence if e.kind == "peer"]
        peers.refusal = None

        async def reached(reach: Reach) -> HostLiveness | None:
            found = await at.liveness(0)
            return found if {e.reached for e in found.evidence if e.kind == "peer"} == {reach} else None

        first: HostLiveness = await until(lambda: reached(NOTHING), 20)
        peers.reach = TAKEN
        second: HostLiveness = await until(lambda: reached(TAKEN), 20)
        assert (first.state, first.since) == (second.state, second.since)
        assert first.judged_at != second.judged_at
        at.hearts[0].start()
        up = await at.becomes(0, "up")
        assert not [e for e in up.evidence if e.kind == "peer"]
