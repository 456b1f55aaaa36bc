"""Whoever follows with its cursor sees every revision of every object once, in order, whatever happens between."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from api_gateway.config import GatewayConfig
from tests.api_gateway.scripted import Script, running_gateway, scripted_services
from tests.api_gateway.sse_client import Ended, Follower
from tests.runtime.toy import BUMP_TOY, CREATE_TOY, Bump, CreateToy, Toy, toy_service
from tests.support.runtime import running
from volery.contracts.base import Owner
from volery.runtime.bus import Bus
from volery.runtime.programs import Settings
from volery.runtime.relay import rebuild_stream

SMALL_RING = GatewayConfig(
    listen="127.0.0.1:0", ring_events=40, ring_preload_events=20, heartbeat_seconds=0.5, shutdown_seconds=2
)


@asynccontextmanager
async def toys(configured: Settings, script: Script) -> AsyncIterator[Bus]:
    """The toy service for its facts, the scripted inventory for its tokens."""
    async with running(configured, toy_service()) as bus, scripted_services(configured.bus.servers, script):
        yield bus


@asynccontextmanager
async def client(port: int, bearer: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {bearer}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1", headers=headers) as http:
        yield http


async def follow_until(
    follower: Follower, seen: list[dict], count: int, choose: random.Random | None
) -> None:
    """Collect events until there are `count`; with `choose`, hang up at random moments and come back."""
    while len(seen) < count:
        leave_after = choose.randint(1, 40) if choose else 10**9
        try:
            async for received in follower.events():
                if received is not None:
                    seen.append(received.event)
                    leave_after -= 1
                if len(seen) >= count or leave_after <= 0:
                    break
        except (Ended, httpx.TransportError):
            await asyncio.sleep(0.01)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 503:
                raise
            await asyncio.sleep(0.05)


def check(seen: list[dict], toys: list[Toy], bumps: int) -> None:
    for toy in toys:
        revisions = [e["data"]["revision"] for e in seen if e["data"]["id"] == toy.id]
        assert revisions == list(range(1, bumps + 2))
    assert len({e["id"] for e in seen}) == len(seen)


async def bump_all(bus: Bus, made: list[Toy], bumps: int) -> None:
    for _ in range(bumps):
        await asyncio.gather(*(bus.ask(BUMP_TOY, Bump(id=toy.id)) for toy in made))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_random_reconnects_see_every_revision_once_and_in_order(
    configured: Settings, seed: int
) -> None:
    script = Script()
    async with (
        toys(configured, script) as bus,
        running_gateway(configured.bus.servers, SMALL_RING) as gateway,
    ):
        async with client(gateway.port, script.token()) as http:
            followers = [Follower(http) for _ in range(4)]
            for follower in followers:
                async for _ in follower.events():
                    break  # each has its first cursor now
            made = [await bus.ask(CREATE_TOY, CreateToy(name=f"t{i}")) for i in range(5)]
            seen: list[list[dict]] = [[] for _ in followers]
            bumps = 60
            async with asyncio.TaskGroup() as group:
                group.create_task(bump_all(bus, made, bumps))
                for number, (follower, found) in enumerate(zip(followers, seen, strict=True)):
                    choose = random.Random(seed * 100 + number) if number else None
                    group.create_task(follow_until(follower, found, 5 * (bumps + 1), choose))
            for found in seen:
                check(found, made, bumps)


async def test_also_while_the_stream_is_deleted_and_made_anew(configured: Settings) -> None:
    script = Script()
    async with (
        toys(configured, script) as bus,
        running_gateway(configured.bus.servers, SMALL_RING) as gateway,
    ):
        async with client(gateway.port, script.token()) as http:
            follower, other = Follower(http), Follower(http)
            for one in (follower, other):
                async for _ in one.events():
                    break
            made = [await bus.ask(CREATE_TOY, CreateToy(name=f"t{i}")) for i in range(3)]
            seen: list[dict] = []
            seen_by_other: list[dict] = []
            bumps = 40

            async def work() -> None:
                await bump_all(bus, made, bumps // 2)
                await rebuild_stream(Bus(bus.client, "ha"), Owner.HA)
                await bump_all(bus, made, bumps // 2)

            async with asyncio.TaskGroup() as group:
                group.create_task(work())
                group.create_task(follow_until(follower, seen, 3 * (bumps + 1), random.Random(5)))
                group.create_task(follow_until(other, seen_by_other, 3 * (bumps + 1), None))
            check(seen, made, bumps)
            check(seen_by_other, made, bumps)


async def test_a_restarted_gateway_goes_on_where_the_cursor_is(configured: Settings) -> None:
    script = Script()
    async with toys(configured, script) as bus:
        seen: list[dict] = []
        async with running_gateway(configured.bus.servers, SMALL_RING) as gateway:
            async with client(gateway.port, script.token()) as http:
                follower = Follower(http)
                async for _ in follower.events():
                    break
                toy = await bus.ask(CREATE_TOY, CreateToy(name="t"))
                await follow_until(follower, seen, 1, None)
        for _ in range(70):  # more than the next gateway preloads
            await bus.ask(BUMP_TOY, Bump(id=toy.id))
        async with running_gateway(configured.bus.servers, SMALL_RING) as gateway:
            async with client(gateway.port, script.token()) as http:
                follower.http = http
                await follow_until(follower, seen, 71, None)
                check(seen, [toy], 70)


async def test_a_cursor_of_another_history_is_gone(configured: Settings) -> None:
    script = Script()
    async with (
        toys(configured, script) as bus,
        running_gateway(configured.bus.servers, SMALL_RING) as gateway,
    ):
        await bus.ask(CREATE_TOY, CreateToy(name="t"))
        async with client(gateway.port, script.token()) as http:
            follower = Follower(http)
            seen: list[dict] = []
            await follow_until(follower, seen, 0, None)
            async for _ in follower.events():
                if follower.cursor.split(".")[4] != "h0":
                    break
            digits = follower.cursor[18:24]
            assert digits != "000000"
            other = follower.cursor.replace(digits, "abcdef")
            answer = await http.get("/events", params={"after": other})
            assert answer.status_code == 410
            assert answer.json()["type"] == "https://volery.dev/problems/gone"
            answer = await http.get("/events", params={"after": "nonsense"})
            assert answer.status_code == 400
