"""A host as executor: whom it obeys, what it refuses, and that what it was told in confidence stays with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from host_agent.agent import Agent
from host_agent.capabilities import dmi_uuid
from host_agent.clock import BootClock
from host_agent.config import AgentConfig
from host_agent.fencing import Executor
from host_agent.journal import Journal
from host_agent.rules import BOOT_SHIFT
from lab.bmc import make_certificate
from tests.host_agent.test_agent_identity import enrolled, running
from tests.support import machines, nats_realm, toy_agent
from tests.support.machines import LOGIN, Machine
from tests.support.toy_host import HOST_ID
from volery.contracts.agent import SIGNATURE_HEADER
from volery.contracts.base import encode, fill
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import (
    POWER_SUBJECT,
    AskPower,
    FenceDevice,
    PowerAction,
    PowerAnswer,
    PowerState,
)
from volery.contracts.metrics import Beat
from volery.fencing import rules
from volery.fencing.asks import SLACK_SECONDS, ask_host
from volery.fencing.confirm import confirm_off
from volery.runtime.identity import Realm
from volery.runtime.orders import Beats
from volery.runtime.permissions import permissions_of
from volery.runtime.signing import Key, Signer, Verifier, parse_creds

BOOT = "boot-of-the-executor"
SECRET = LOGIN[1]


@dataclass
class Scripted:
    """Runs nothing: notes what it was asked, and answers when it is let go."""

    asked: list[str] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(
        self, action: PowerAction, device: FenceDevice, secrets: Mapping[str, str], *, ask_id: str
    ) -> PowerAnswer:
        self.asked.append(ask_id)
        self.begun.set()
        async with asyncio.timeout(20):
            await self.go.wait()
        return PowerAnswer(ask_id=ask_id, action=action, state=PowerState.OFF, exit_code=0)


@dataclass
class World:
    executor: Executor
    script: Scripted
    journal: Journal
    clock: BootClock
    ha: Signer
    now: list[int]

    def ask(self, **changes: Any) -> AskPower:
        fields: dict[str, Any] = {
            "host_id": HOST_ID,
            "ask_id": "ask-1",
            "target_host_id": "target-1",
            "target_boot_id": "boot-of-the-target",
            "action": PowerAction.OFF,
            "device": FenceDevice(agent="fence_redfish", address="10.0.0.1", username="admin"),
            "secrets": {"password": SECRET},
            "beat_seq": self.clock.beat(),
            "ttl_ms": 2000,
            "fencing_token": 5,
        }
        return AskPower(**(fields | changes))

    async def hears(self, ask: AskPower, signer: Signer | None = None) -> PowerAnswer:
        subject, body = fill(POWER_SUBJECT, ask), encode(ask)
        signature = (signer or self.ha).sign(subject, body)
        return await self.executor.hear(subject, body, {SIGNATURE_HEADER: signature})

    async def refuses(self, ask: AskPower, kind: Kind, sentence: str, signer: Signer | None = None) -> None:
        with pytest.raises(Refused, match=sentence) as refused:
            await self.hears(ask, signer)
        assert refused.value.kind is kind
        assert SECRET not in repr(refused.value.problem())


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    journal = await Journal.open(tmp_path / "journal.sqlite", BOOT)
    now = [100_000]
    clock = BootClock(BOOT, journal.boot_ordinal, lambda: now[0])
    ha, inventory = Signer(Key.new("user").seed), Signer(Key.new("user").seed)
    verifier = Verifier({"ha": ha.public_key, "inventory": inventory.public_key})
    script = Scripted()
    executor = Executor(HOST_ID, journal, verifier, clock, script.run, at_once=2)
    yield World(executor, script, journal, clock, ha, now)
    await journal.close()


async def test_it_does_what_ha_signed(world: World) -> None:
    world.script.go.set()
    answer = await world.hears(world.ask())
    assert (answer.ask_id, answer.state) == ("ask-1", PowerState.OFF)
    assert await world.hears(world.ask()) == answer, "a repeat gets the first answer"
    assert world.script.asked == ["ask-1"]


async def test_nobody_else_is_obeyed(world: World) -> None:
    inventory = Signer(Key.new("user").seed)
    world.executor.trust(Verifier({"ha": world.ha.public_key, "inventory": inventory.public_key}))
    await world.refuses(world.ask(), Kind.FORBIDDEN, "not signed by ha", inventory)
    await world.refuses(world.ask(), Kind.FORBIDDEN, "not signed by ha", Signer(Key.new("user").seed))
    subject, body = fill(POWER_SUBJECT, world.ask()), encode(world.ask())
    for headers in (
        None,
        {},
        {SIGNATURE_HEADER: "x"},
        {SIGNATURE_HEADER: world.ha.sign("host.b.power", body)},
    ):
        with pytest.raises(Refused, match="not signed by ha"):
            await world.executor.hear(subject, body, headers)
    await world.refuses(world.ask(host_id="another"), Kind.INVALID, "for another executor, host another")
    with pytest.raises(Refused, match="no question about power") as refused:
        await world.executor.hear(subject, body.replace(b'"ttl_ms":2000', b'"ttl_ms":"2"'), {})
    assert SECRET not in refused.value.message
    assert world.script.asked == []


async def test_it_never_switches_itself(world: World) -> None:
    await world.refuses(world.ask(target_host_id=HOST_ID), Kind.CONFLICT, "doesn't judge its own death")
    await world.refuses(world.ask(target_boot_id=BOOT), Kind.CONFLICT, "doesn't judge its own death")
    assert world.script.asked == []


async def test_what_is_old_is_not_done(world: World) -> None:
    ask = world.ask()
    world.now[0] += 2001
    await world.refuses(ask, Kind.STALE, "is 2001 ms old .* good for 2000 ms")
    await world.refuses(world.ask(beat_seq=world.clock.beat() + 1), Kind.STALE, "has not sent")
    former = world.clock.beat() - (1 << BOOT_SHIFT)
    await world.refuses(world.ask(beat_seq=former), Kind.STALE, "another boot of this host")
    assert world.script.asked == []


async def test_a_former_leader_is_refused_also_after_a_restart(world: World, tmp_path: Path) -> None:
    world.script.go.set()
    await world.hears(world.ask(fencing_token=7))
    await world.refuses(world.ask(ask_id="b", fencing_token=6), Kind.STALE, "former leader of ha")
    await world.hears(world.ask(ask_id="c", fencing_token=7))
    await world.journal.close()
    again = await Journal.open(tmp_path / "journal.sqlite", BOOT)
    assert await again.see_token("ha", 6) == 7
    assert await again.see_token("inventory", 1) == 1
    await again.close()
    assert world.script.asked == ["ask-1", "c"]


async def test_one_at_a_time_per_target_and_few_at_once(world: World) -> None:
    first = asyncio.create_task(world.hears(world.ask()))
    await world.script.begun.wait()
    await world.refuses(world.ask(ask_id="b"), Kind.CONFLICT, "asking that BMC already")
    same = asyncio.create_task(world.hears(world.ask()))
    world.script.begun.clear()
    second = asyncio.create_task(world.hears(world.ask(ask_id="c", target_host_id="target-2")))
    await world.script.begun.wait()
    third = world.ask(ask_id="d", target_host_id="target-3")
    await world.refuses(third, Kind.EXHAUSTED, "runs 2 fence agents already")
    world.script.go.set()
    assert await first == await same
    await second
    await world.hears(third)
    assert world.script.asked == ["ask-1", "c", "d"]


async def test_whoever_stops_waiting_stops_nothing(world: World) -> None:
    """The target stays taken until the agent has ended."""
    first = asyncio.create_task(world.hears(world.ask()))
    await world.script.begun.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await world.refuses(world.ask(ask_id="b"), Kind.CONFLICT, "asking that BMC already")
    world.script.go.set()
    assert (await world.hears(world.ask())).state is PowerState.OFF
    await world.hears(world.ask(ask_id="b"))
    assert world.script.asked == ["ask-1", "b"]


def test_there_is_time_to_answer() -> None:
    """The server lets an agent answer only for so long."""
    assert permissions_of("agent").answers_within_seconds > rules.MAX_SECONDS + SLACK_SECONDS


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4C4C4544-0042-3510-8052-B4C04F4E3732\n", "4c4c4544-0042-3510-8052-b4c04f4e3732"),
        ("03000200-0400-0500-0006-000700080009\n", ""),
        ("Not Settable\n", ""),
        (None, ""),
    ],
)
def test_the_machines_own_uuid(tmp_path: Path, text: str | None, found: str) -> None:
    path = tmp_path / "product_uuid"
    if text is not None:
        path.write_text(text)
    assert dmi_uuid(path) == found


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    make_certificate(tmp_path / "bmc.pem")
    with machines.redfish(tmp_path, tmp_path / "bmc.pem") as one:
        one.chassis.power_on()
        yield one


async def test_ha_has_a_real_agent_switch_a_machine_over_the_bus(
    tmp_path: Path, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """With the bus's own permissions, the real fence_redfish, and nothing of the password in any log."""
    caplog.set_level(logging.DEBUG)
    realm = Realm.create(tmp_path / "realm")
    server = nats_realm.Server(tmp_path / "nats", realm)
    server.write_config()
    server.start()
    try:
        user = await nats_realm.open_user(server, realm.creds_path("ha"), "ha")
        beats, heard = Beats(), asyncio.Event()
        beats.listeners.append(lambda _beat, _now: heard.set())
        await beats.listen(user.nc)
        _, key = parse_creds(realm.creds_path("ha").read_text())
        signer = Signer(key.seed)
        settings = AgentConfig(
            state_dir=str(tmp_path / "state"), libvirt_uri="test:///default", beat_seconds=0.05
        )
        agent = Agent(settings, enrolled(realm, tmp_path / "state", server.url), toy_agent.PARTS)
        async with running(agent):
            async with asyncio.timeout(30):
                await heard.wait()
            newest: list[Beat] = [beats.newest[HOST_ID][0]]
            count = iter(range(100))

            def ask(action: PowerAction) -> AskPower:
                newest.append(beats.newest[HOST_ID][0])
                return AskPower(
                    host_id=HOST_ID,
                    ask_id=f"ask-{next(count)}",
                    target_host_id="target",
                    target_boot_id="boot",
                    action=action,
                    device=machine.device,
                    secrets=machine.secrets,
                    beat_seq=newest[-1].beat_seq,
                    ttl_ms=10_000,
                    fencing_token=1,
                )

            async def act(action: PowerAction) -> PowerAnswer:
                return await ask_host(user.nc, signer.sign, ask(action))

            while (status := await heard_or_none(act)) is None:
                await asyncio.sleep(0.02)  # it beats before it listens
            assert status.state is PowerState.ON
            assert (await act(PowerAction.IDENTITY)).identity == machine.chassis.uuid
            confirmed = await confirm_off(act)
            assert confirmed.off
            assert machine.chassis.switched[-1] == "off"
            typo = replace(machine.device, options={"ssl_insecur": "1"})
            wrong = replace(ask(PowerAction.STATUS), device=typo)
            with pytest.raises(Refused, match="did you mean ssl_insecure") as refused:
                await ask_host(user.nc, signer.sign, wrong)
            assert refused.value.kind is Kind.INVALID
            itself = replace(ask(PowerAction.OFF), target_host_id=HOST_ID)
            with pytest.raises(Refused, match="itself"):
                await ask_host(user.nc, signer.sign, itself)
        assert user.errors == []
        with pytest.raises(Refused, match="hears no questions now") as refused:
            await ask_host(user.nc, signer.sign, ask(PowerAction.OFF))
        assert refused.value.kind is Kind.UNAVAILABLE
        await user.nc.close()
    finally:
        server.stop()
    logs = [tmp_path / "nats" / "log", *(tmp_path / "state").rglob("*")]
    kept = b"".join(path.read_bytes() for path in logs if path.is_file())
    assert SECRET not in caplog.text
    assert "power off for host target" in caplog.text
    assert SECRET.encode() not in kept
    assert "Permissions Violation" not in (tmp_path / "nats" / "log").read_text()


async def heard_or_none(act: Callable[[PowerAction], Awaitable[PowerAnswer]]) -> PowerAnswer | None:
    try:
        return await act(PowerAction.STATUS)
    except Refused as refused:
        if refused.kind is Kind.UNAVAILABLE:
            return None
        raise


async def test_an_executor_that_does_not_answer_leaves_the_outcome_unknown(tmp_path: Path) -> None:
    realm = Realm.create(tmp_path / "realm")
    server = nats_realm.Server(tmp_path / "nats", realm)
    server.write_config()
    server.start()
    try:
        user = await nats_realm.open_user(server, realm.creds_path("ha"), "ha")
        deaf = await nats_realm.open_user(server, enrolled(realm, tmp_path / "state", "").creds_path, HOST_ID)
        await deaf.nc.subscribe(f"host.{HOST_ID}.power")
        await nats_realm.settle(deaf.nc)
        ask = AskPower(
            host_id=HOST_ID,
            ask_id="a",
            target_host_id="t",
            target_boot_id="b",
            action=PowerAction.OFF,
            device=FenceDevice(agent="fence_redfish", address="10.0.0.1", timeout_seconds=1 - SLACK_SECONDS),
            secrets={},
            beat_seq=0,
            ttl_ms=0,
            fencing_token=0,
        )
        with pytest.raises(
            Refused, match=r"within 1 s .*whether it did off is unknown: read the status"
        ) as no:
            await ask_host(user.nc, Signer(Key.new("user").seed).sign, ask)
        assert no.value.kind is Kind.TIMEOUT
        await user.nc.close()
        await deaf.nc.close()
    finally:
        server.stop()
