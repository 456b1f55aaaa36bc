"""Hosts heard on a real bus: silence, return, reboot, ha's own absence, and disconnects told by NATS."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.ha.world import Heart, Inventory, becomes, ha, hearts, host, hurried, until
from tests.support.nats_realm import Server, enrol, open_user
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, HOST_DELETED
from volery.contracts.liveness import GET_LIVENESS, LIST_LIVENESS, LIVENESS_CHANGED, HostLiveness
from volery.contracts.operation import ListQuery
from volery.runtime.bus import Bus
from volery.runtime.config import BusConfig, DatabaseConfig, TelemetryConfig
from volery.runtime.identity import Realm
from volery.runtime.programs import Settings


async def kinds(bus: Bus, host_id: str) -> dict[str, str]:
    found = await bus.ask(GET_LIVENESS, GetById(id=host_id))
    return {e.kind: e.details for e in found.evidence}


async def test_a_host_is_up_suspected_given_up_and_up_again(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        assert (await becomes(bus, h1.id, "unknown")).host_name == "h1"
        async with hearts(bus.client, h1) as (heart,):
            up = await becomes(bus, h1.id, "up")
            assert up.boot_id == "boot-1"
            assert up.last_beat_at is not None
            heart.stop()
            stopped = time.monotonic()
            await becomes(bus, h1.id, "connecting")
            assert time.monotonic() - stopped > 0.4
            silent = await becomes(bus, h1.id, "non_responsive")
            assert time.monotonic() - stopped > 1.3
            assert "no beat for" in (await kinds(bus, h1.id))["silence"]
            assert silent.since is not None
            heart.start()
            await becomes(bus, h1.id, "up")
            page = await bus.ask(LIST_LIVENESS, ListQuery(filter={"state": "up"}))
            assert len(page.items) == 1


async def test_changes_are_announced_in_order_as_facts(configured: Settings) -> None:
    heard: list[str] = []
    owner, h1 = Inventory(), host("h1")

    async def note(_: Speaker, payload: HostLiveness) -> None:
        if not heard or heard[-1] != payload.state:
            heard.append(str(payload.state))

    listener = Speaker(Owner.STORAGE).service()
    listener.parts[0].hears(LIVENESS_CHANGED)(note)
    async with running(hurried(configured), owner.service(), ha(), listener) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1) as (heart,):
            await becomes(bus, h1.id, "up")
            heart.stop()
            await becomes(bus, h1.id, "non_responsive")

            async def all_heard() -> bool:
                return heard == ["unknown", "up", "connecting", "non_responsive"]

            await until(all_heard)


async def test_a_new_boot_is_evidence(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1) as (heart,):
            await becomes(bus, h1.id, "up")
            heart.boot_id = "boot-2"

            async def booted() -> bool:
                return (await bus.ask(GET_LIVENESS, GetById(id=h1.id))).boot_id == "boot-2"

            await until(booted)
            assert (await kinds(bus, h1.id))["new_boot"] == "boot boot-2, before boot-1"


async def test_beats_of_an_agent_that_was_not_admitted_do_not_bring_a_host_up(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1", agent_generation="journal-1")
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1) as (heart,):
            await becomes(bus, h1.id, "up")
            heart.generation = "journal-2"
            await becomes(bus, h1.id, "connecting")
            until_given_up = asyncio.create_task(becomes(bus, h1.id, "non_responsive", 2.5))
            with pytest.raises(AssertionError):
                await until_given_up
            assert "not admitted" in (await kinds(bus, h1.id))["silence"]
            await owner.says(HOST_CHANGED, replace(h1, revision=2, agent_generation="journal-2"))
            await becomes(bus, h1.id, "up")
            assert "journal-2" in (await kinds(bus, h1.id))["report"]


async def test_late_copies_of_beats_are_no_sign_of_life(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1) as (heart,):
            await becomes(bus, h1.id, "up")
            heart.stop()
            echo = Heart(bus.client, h1.id)

            async def same_again() -> None:
                while True:
                    echo.seq = 0
                    await echo.beat()
                    await asyncio.sleep(0.1)

            copies = asyncio.create_task(same_again())
            await becomes(bus, h1.id, "non_responsive")
            copies.cancel()


async def test_ha_that_was_away_gives_nobody_up_at_once(configured: Settings) -> None:
    """Its first conclusions come after it listened for as long as a silence must last."""
    owner, h1, h2 = Inventory(), host("h1"), host("h2")
    async with (
        running(hurried(configured), owner.service()) as bus,
        hearts(bus.client, h1, h2) as (one, _two),
    ):
        async with running(hurried(configured), ha()):
            await owner.says(HOST_CHANGED, h1, h2)
            await becomes(bus, h1.id, "up")
            await becomes(bus, h2.id, "up")
        one.stop()
        await asyncio.sleep(2.0)  # longer than the limit, with nobody listening
        async with running(hurried(configured), ha()):
            began = time.monotonic()
            assert (await bus.ask(GET_LIVENESS, GetById(id=h1.id))).state == "up"
            await becomes(bus, h1.id, "non_responsive")
            assert time.monotonic() - began > 1.5
            assert (await bus.ask(GET_LIVENESS, GetById(id=h2.id))).state == "up"


async def test_when_most_hosts_fall_silent_at_once_judgement_waits(configured: Settings) -> None:
    owner, hosts = Inventory(), [host(f"h{n}") for n in range(4)]
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, *hosts)
        async with hearts(bus.client, *hosts) as beating:
            for h in hosts:
                await becomes(bus, h.id, "up")
            for heart in beating[:3]:
                heart.stop()
            stopped = time.monotonic()
            await becomes(bus, hosts[0].id, "non_responsive")
            assert time.monotonic() - stopped > 2.4
            assert (await bus.ask(GET_LIVENESS, GetById(id=hosts[3].id))).state == "up"


async def test_a_short_trouble_of_all_hosts_is_no_verdict(configured: Settings) -> None:
    owner, hosts = Inventory(), [host(f"h{n}") for n in range(4)]
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, *hosts)
        async with hearts(bus.client, *hosts) as beating:
            for h in hosts:
                await becomes(bus, h.id, "up")
            before = {h.id: (await bus.ask(GET_LIVENESS, GetById(id=h.id))).revision for h in hosts}
            for heart in beating:
                heart.stop()
            await asyncio.sleep(1.7)  # beyond the limit, within the hold
            for heart in beating:
                heart.start()
            await asyncio.sleep(1.0)
            after = {h.id: (await bus.ask(GET_LIVENESS, GetById(id=h.id))).revision for h in hosts}
            assert after == before


async def test_a_deleted_host_is_forgotten(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1):
            await becomes(bus, h1.id, "up")
            await owner.says(HOST_DELETED, replace(h1, revision=2))

            async def gone() -> bool:
                try:
                    await bus.ask(GET_LIVENESS, GetById(id=h1.id))
                except Refused as refused:
                    return refused.kind is Kind.NOT_FOUND
                return False

            await until(gone)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    """A NATS server with identities, which tells the system account who comes and goes."""
    server = Server(tmp_path / "nats", Realm.create(tmp_path / "bus"))
    server.write_config()
    server.start()
    yield server
    server.stop()


async def test_the_servers_word_that_an_agent_left_is_heard_before_its_silence(
    guarded: Server, database: DatabaseConfig, tmp_path: Path
) -> None:
    bus_config = BusConfig(
        servers=guarded.url,
        credentials_dir=str(guarded.realm.creds_path("ha").parent),
        require_sync_always=False,
    )
    slow = {"VOLERY_HA_SUSPECT_SECONDS": "6", "VOLERY_HA_SILENCE_SECONDS": "20"}
    slow |= {"VOLERY_HA_DISCONNECT_SECONDS": "0.3"}
    settings = hurried(Settings(bus_config, database, TelemetryConfig(log_level="WARNING")), **slow)
    host_id, creds, _ = enrol(guarded.realm, tmp_path)
    owner, h1 = Inventory(), host("h1", id=host_id)
    async with running(settings, owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        agent = await open_user(guarded, creds, host_id)
        async with hearts(agent.nc, h1) as (heart,):
            await becomes(bus, host_id, "up")
            heart.stop()
            await agent.nc.close()
            left = time.monotonic()
            await becomes(bus, host_id, "connecting")
            assert time.monotonic() - left < 3
            assert (await kinds(bus, host_id))["disconnected"] == "Client Closed"
            again = await open_user(guarded, creds, host_id)
            back = Heart(again.nc, host_id, seq=100)
            back.start()
            await becomes(bus, host_id, "up")
            assert "connected" in await kinds(bus, host_id)
            back.stop()
            await again.nc.close()
