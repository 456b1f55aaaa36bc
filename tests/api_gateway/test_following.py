"""What a follower of events may ask for: filters, heartbeats, WebSocket; and how the feed treats odd streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from api_gateway.config import GatewayConfig
from tests.api_gateway.facts import HISTORY, facts_of, tell
from tests.api_gateway.scripted import Deployed, Script, deployed
from tests.api_gateway.sse_client import Ended, Follower, Received
from volery.contracts.account import Scope
from volery.contracts.base import Owner
from volery.contracts.ids import new_id
from volery.contracts.vm import GET_VM
from volery.runtime.bus import Caller
from volery.runtime.relay import stream_name
from volery.setup.embedded import Embedded

CONFIG = GatewayConfig(listen="127.0.0.1:0", heartbeat_seconds=0.3, ring_events=30, ring_preload_events=10)


@pytest.fixture
async def gateway(nats: Embedded) -> AsyncIterator[Deployed]:
    async with deployed(nats.url, Script(), CONFIG) as found:
        await facts_of(found.bus, Owner.INVENTORY)
        await facts_of(found.bus, Owner.STORAGE)
        await until(lambda: sum(source.live for source in found.feed.sources) == 2)
        yield found


async def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


async def vm_changed(gateway: Deployed, position: int, vm: str = "v1") -> None:
    await tell(gateway.bus, position, f"fact.inventory.vm.{vm}.changed", {"id": vm, "revision": position})


async def first(follower: Follower, count: int) -> list[Received]:
    found: list[Received] = []
    async with asyncio.timeout(10):
        while True:
            try:
                async for received in follower.events():
                    if received is not None:
                        found.append(received)
                    if len(found) == count:
                        return found
            except Ended:
                continue


@pytest.mark.parametrize(
    ("query", "positions"),
    [
        ({}, [1, 2, 3, 4]),
        ({"types": "inventory.vm.changed"}, [1, 3]),
        ({"types": "dev.volery.inventory.vm.*"}, [1, 2, 3]),
        ({"types": "inventory.vm.deleted,inventory.host.*"}, [2, 4]),
        ({"subject": "vm/v1"}, [1, 2]),
        ({"subject": "vm/*"}, [1, 2, 3]),
        ({"subject": "vm/v1,vm/v2", "types": "inventory.vm.changed"}, [1, 3]),
    ],
)  # fmt: skip
async def test_filters(gateway: Deployed, query: dict[str, str], positions: list[int]) -> None:
    start = Follower(gateway.http)
    async for _ in start.events():
        break
    subjects = ("vm.v1.changed", "vm.v1.deleted", "vm.v2.changed", "host.h1.changed")
    for position, subject in enumerate(subjects, 1):
        await tell(gateway.bus, position, f"fact.inventory.{subject}", {})
    found = await first(Follower(gateway.http, start.cursor, **query), len(positions))
    assert [int(r.event["sequence"]) for r in found] == positions
    assert all(r.event["specversion"] == "1.0" and r.type == r.event["type"] for r in found)


@pytest.mark.parametrize(
    "query", ["types=*.changed", "types=a b", "subject=vm/v1/x", "subject=%2F", "colour=red"]
)
async def test_patterns_that_can_match_nothing_are_refused(gateway: Deployed, query: str) -> None:
    assert (await gateway.get(f"/events?{query}")).status_code == 400


async def test_a_filtered_clients_cursor_moves_on_with_the_heartbeats(gateway: Deployed) -> None:
    follower = Follower(gateway.http, types="storage.*")
    beats = 0
    async for received in follower.events():
        assert received is None
        beats += 1
        if beats == 1:
            await vm_changed(gateway, 1)
        if ".i1." in follower.cursor:
            break
        assert beats < 10
    assert beats > 1


async def test_facts_about_accounts_are_for_administrators(gateway: Deployed) -> None:
    start = Follower(gateway.http)
    async for _ in start.events():
        break
    await tell(gateway.bus, 1, "fact.inventory.user.u1.changed", {})
    await vm_changed(gateway, 2)
    assert [r.event["subject"] for r in await first(Follower(gateway.http, start.cursor), 2)] == [
        "user/u1",
        "vm/v1",
    ]
    headers = {"authorization": f"Bearer {gateway.script.token(Scope.READ)}"}
    async with httpx.AsyncClient(base_url=gateway.http.base_url, headers=headers) as reader:
        assert [r.event["subject"] for r in await first(Follower(reader, start.cursor), 1)] == ["vm/v1"]


async def test_owners_are_merged_and_each_cursor_is_a_place_to_go_on(gateway: Deployed) -> None:
    start = Follower(gateway.http)
    async for _ in start.events():
        break
    for position in range(1, 4):
        await vm_changed(gateway, position)
        await tell(gateway.bus, position, "fact.storage.disk.d1.changed", {"id": "d1", "revision": position})
    everything = await first(Follower(gateway.http, start.cursor), 6)
    for read, received in enumerate(everything, 1):
        if read < 6:
            rest = await first(Follower(gateway.http, received.cursor), 6 - read)
            both = [r.event["id"] for r in everything[:read]] + [r.event["id"] for r in rest]
            assert sorted(both) == sorted(r.event["id"] for r in everything)
    assert everything[-1].cursor.endswith(".i3.s3.w0.h0.c0.d0")


async def test_after_a_rewritten_history_clients_are_told_to_list_again(gateway: Deployed) -> None:
    follower = Follower(gateway.http)
    await vm_changed(gateway, 1)
    following = asyncio.create_task(drain(follower))
    await until(lambda: ".i1." in follower.cursor)
    js = gateway.bus.client.jetstream()
    await js.delete_stream(stream_name(Owner.INVENTORY))
    await facts_of(gateway.bus, Owner.INVENTORY, "fedcba987654")
    await asyncio.wait_for(following, 15)
    answer = await gateway.get("/events", headers={"last-event-id": follower.cursor})
    assert answer.status_code == 410
    assert "restored" in answer.json()["detail"]
    again = Follower(gateway.http)
    async for _ in again.events():
        break
    await tell(gateway.bus, 1, "fact.inventory.vm.v1.changed", {}, "fedcba987654")
    (received,) = await first(again, 1)
    assert received.event["id"].startswith("fedcba987654.")


async def drain(follower: Follower) -> None:
    try:
        async for _ in follower.events():
            pass
    except Ended:
        return


async def test_what_is_beyond_the_retention_is_gone(gateway: Deployed) -> None:
    follower = Follower(gateway.http)
    async for _ in follower.events():
        break
    for position in range(1, 60):
        await vm_changed(gateway, position)
    await until(lambda: gateway.feed.sources[0].position == 59)
    await gateway.bus.client.jetstream().purge_stream(stream_name(Owner.INVENTORY), seq=20)
    answer = await gateway.get("/events", params={"after": follower.cursor})
    assert answer.status_code == 410
    assert "position 20" in answer.json()["detail"]
    later = follower.cursor.replace(".i0.", ".i19.")
    assert len(await first(Follower(gateway.http, later), 40)) == 40


async def test_the_ring_is_bounded_and_a_client_that_lags_behind_it_comes_back(gateway: Deployed) -> None:
    follower = Follower(gateway.http)
    seen: list[int] = []
    async for received in follower.events():
        if received is None and not seen:
            for position in range(1, 200):
                await vm_changed(gateway, position)
            await until(lambda: gateway.feed.sources[0].position == 199)
        if received is not None:
            seen.append(int(received.event["sequence"]))
        if seen and len(seen) > 3:
            break
    assert gateway.feed.next - gateway.feed.first <= 30
    rest = await first(follower, 195)
    assert seen + [int(r.event["sequence"]) for r in rest] == list(range(1, 200))


async def test_a_stream_that_appears_later_is_followed_from_its_beginning(gateway: Deployed) -> None:
    follower = Follower(gateway.http)
    collecting = asyncio.create_task(first(follower, 2))
    await until(lambda: bool(follower.cursor))
    await facts_of(gateway.bus, Owner.HA)
    await tell(gateway.bus, 1, "fact.ha.host.h1.changed", {})
    await vm_changed(gateway, 1)
    found = await collecting
    assert {r.type for r in found} == {"dev.volery.ha.host.changed", "dev.volery.inventory.vm.changed"}
    short = f"{HISTORY[:6]}"
    assert follower.cursor.startswith(short + short + "000000" + short)


# WebSocket


def socket(gateway: Deployed, path: str, **options: object) -> connect:
    url = gateway.url.replace("http", "ws") + "/api/v1" + path
    return connect(url, proxy=None, **options)  # type: ignore[arg-type]


async def messages(one: ClientConnection, count: int) -> list[dict]:
    found: list[dict] = []
    async with asyncio.timeout(10):
        async for message in one:
            decoded = msgspec.json.decode(message)
            if "event" in decoded:
                found.append(decoded)
            if len(found) == count:
                break
    return found


async def test_websocket_follows_with_a_cursor(gateway: Deployed) -> None:
    headers = {"authorization": f"Bearer {gateway.script.token()}"}
    async with socket(gateway, "/events/ws", additional_headers=headers) as one:
        start = msgspec.json.decode(await one.recv())["cursor"]
        for position in range(1, 5):
            await vm_changed(gateway, position)
        found = await messages(one, 4)
        assert [int(m["event"]["sequence"]) for m in found] == [1, 2, 3, 4]
    async with socket(gateway, f"/events/ws?after={found[1]['cursor']}", additional_headers=headers) as one:
        assert [int(m["event"]["sequence"]) for m in await messages(one, 2)] == [3, 4]
    async with socket(gateway, f"/events/ws?after={start}&subject=vm/v1", additional_headers=headers) as one:
        assert len(await messages(one, 4)) == 4


async def test_websocket_takes_the_token_as_a_subprotocol_as_browsers_must(gateway: Deployed) -> None:
    protocols = ["volery.v1", f"bearer.{gateway.script.token()}"]
    async with socket(gateway, "/events/ws", subprotocols=protocols) as one:
        assert one.subprotocol == "volery.v1"
        assert "cursor" in msgspec.json.decode(await one.recv())


@pytest.mark.parametrize(
    ("path", "bearer", "status"),
    [
        ("/events/ws", "", 401),
        ("/events/ws", "vol_x_y", 401),
        ("/events/ws?after=nonsense", "right", 400),
        ("/events/ws?colour=red", "right", 400),
        ("/nothing/ws", "right", 404),
        ("/vms/v1/console", "read", 403),
    ],
)
async def test_a_websocket_is_refused_with_a_problem(
    gateway: Deployed, path: str, bearer: str, status: int
) -> None:
    known = {"right": gateway.script.token(), "read": gateway.script.token(Scope.READ)}
    headers = {"authorization": f"Bearer {known.get(bearer, bearer)}"} if bearer else {}
    with pytest.raises(InvalidStatus) as refused:
        async with socket(gateway, path, additional_headers=headers):
            pass
    assert refused.value.response.status_code == status
    assert msgspec.json.decode(refused.value.response.body)["type"].startswith("https://volery.dev/problems/")


async def endless(one: ClientConnection) -> None:
    while True:
        await one.recv()


async def test_a_stopping_gateway_lets_its_followers_go(nats: Embedded) -> None:
    async with deployed(nats.url, Script(), CONFIG) as gateway:
        following = asyncio.create_task(drain(Follower(gateway.http)))
        headers = {"authorization": f"Bearer {gateway.script.token()}"}
        one = await socket(gateway, "/events/ws", additional_headers=headers)
        await until(lambda: gateway.gateway.desk is not None and gateway.gateway.desk.meters.streams == 2)
        started = asyncio.get_running_loop().time()
        gateway.feed.close()
        await asyncio.wait_for(following, 5)
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(endless(one), 5)
        assert one.close_code == 1012
    assert asyncio.get_running_loop().time() - started < 5


async def test_a_stopping_gateway_tells_whom_it_cuts(nats: Embedded) -> None:
    asked = asyncio.Event()

    async def never(question: Any, caller: Caller) -> None:
        asked.set()
        await asyncio.Event().wait()

    script = Script()
    script.on(GET_VM, never)
    quick = GatewayConfig(listen="127.0.0.1:0", shutdown_seconds=1)
    async with httpx.AsyncClient() as outside:
        async with deployed(nats.url, script, quick) as gateway:
            headers = {"authorization": f"Bearer {script.token()}"}
            asking = asyncio.create_task(outside.get(f"{gateway.url}/api/v1/vms/{new_id()}", headers=headers))
            await asyncio.wait_for(asked.wait(), 5)
        answer = await asking
    assert answer.status_code == 503
    assert "Idempotency-Key" in answer.json()["detail"]
    assert answer.headers["retry-after"] == "2"


async def test_whoever_followed_before_an_owner_had_a_stream_misses_nothing(nats: Embedded) -> None:
    """Its first facts come faster than this gateway looks for the stream, and are more than it loads at a start."""
    count = 3 * CONFIG.ring_preload_events
    async with deployed(nats.url, Script(), CONFIG) as gateway:
        live, back_later = Follower(gateway.http), Follower(gateway.http)
        async for _ in back_later.events():
            break
        waiting = asyncio.create_task(first(live, count))
        await until(lambda: gateway.gateway.desk is not None and gateway.gateway.desk.meters.streams >= 1)
        await facts_of(gateway.bus, Owner.INVENTORY)
        await asyncio.gather(*(vm_changed(gateway, position) for position in range(1, count + 1)))
        for found in (await waiting, await first(back_later, count)):
            assert [int(r.event["sequence"]) for r in found] == list(range(1, count + 1))
