"""Reading through the whole path: one VM against the bare chain, all VMs against a list from memory."""

from __future__ import annotations

import asyncio
import statistics
import time

import msgspec

from bench.load import Http, connect, median_ms, rate, request
from bench.rows import Line, at_least, below, in_turn
from bench.world import VMS_SEEDED, Installation, World

CLIENTS = 16
SECONDS = 1.0
TIMES = 300


class Listed(msgspec.Struct):
    items: msgspec.Raw
    next: str = ""


async def connections(there: Installation, url: str, count: int) -> list[Http]:
    return list(await asyncio.gather(*(connect(url, there.tls) for _ in range(count))))


async def get_one(world: World) -> list[Line]:
    """GET of one VM by 16 clients and by one: gateway, bus, inventory, PostgreSQL and back."""
    there = await world.installation()
    vms = await world.vms()
    bus, database = there.bus, there.database()
    environ = {
        "VOLERY_BUS_SERVERS": bus.servers,
        "VOLERY_BUS_CREDENTIALS_DIR": bus.credentials_dir,
        "VOLERY_BUS_CA_FILE": bus.ca_file,
        "VOLERY_DATABASE_DSN": database.dsn,
        "VOLERY_DATABASE_PASSWORDS_DIR": database.passwords_dir,
    }
    our_gets = [request("GET", f"/api/v1/vms/{vm.id}", there.token) for vm in vms[:500]]
    bare_gets = [request("GET", f"/vms/{vm.id}") for vm in vms[:500]]
    with there.peer("bench.bare_chain", **environ) as bare_url:
        mine = await connections(there, there.url, CLIENTS)
        bares = await connections(there, bare_url, 1)
        await bares[0].ask(bare_gets[0])
        bares += await connections(there, bare_url, CLIENTS - 1)
        turn = iter(range(10**9))

        async def get(number: int) -> None:
            await mine[number % CLIENTS].ask(our_gets[next(turn) % 500])

        async def bare(number: int) -> None:
            await bares[number % CLIENTS].ask(bare_gets[next(turn) % 500])

        async def ours() -> float:
            return await rate(get, CLIENTS, SECONDS)

        async def theirs() -> float:
            return await rate(bare, CLIENTS, SECONDS)

        async def alone(number: int) -> None:
            await mine[0].ask(our_gets[number])

        async def bare_alone(number: int) -> None:
            await bares[0].ask(bare_gets[number])

        async def our_p50() -> float:
            return await median_ms(alone, TIMES)

        async def their_p50() -> float:
            return await median_ms(bare_alone, TIMES)

        pairs = await in_turn(ours, theirs)
        single = await in_turn(our_p50, their_p50)
        for http in (*mine, *bares):
            http.close()
    note = f"p50 of the bare chain at one client: {single.medians[1]:.2f} ms"
    return [
        at_least(f"GET of one VM, {CLIENTS} clients", pairs, 0.7, "GET/s", "theirs: the bare chain"),
        below("GET of one VM, one client, p50", single.medians[0], 2.0, "ms", note),
    ]


async def walk(world: World) -> list[Line]:
    """All 10,000 VMs in pages of 1,000, by one client, against FastAPI's list from memory in one answer."""
    there = await world.installation()
    await world.vms()
    mine = await connect(there.url, there.tls)

    async def pages() -> bytes:
        """The whole list, as the peer must answer it."""
        found, after = [], ""
        while True:
            query = f"limit=1000&page={after}" if after else "limit=1000"
            body = await mine.ask(request("GET", f"/api/v1/vms?{query}", there.token))
            page = msgspec.json.decode(body, type=Listed)
            found.append(bytes(page.items)[1:-1])
            if not page.next:
                return b"[" + b",".join(found) + b"]"
            after = page.next

    documents = there.home.run / "vms.json"
    documents.write_bytes(await pages())
    with there.peer("bench.fastapi_list", BENCH_DOCUMENTS=str(documents)) as url:
        peer = await connect(url, there.tls)
        whole = request("GET", "/vms")

        async def ours() -> float:
            started = time.perf_counter()
            for _ in range(3):
                await pages()
            return 3 * VMS_SEEDED / (time.perf_counter() - started)

        async def theirs() -> float:
            started = time.perf_counter()
            for _ in range(3):
                msgspec.json.decode(await peer.ask(whole), type=msgspec.Raw)
            return 3 * VMS_SEEDED / (time.perf_counter() - started)

        pairs = await in_turn(ours, theirs)
        peer.close()
    hundred = request("GET", "/api/v1/vms?limit=100", there.token)

    async def page(_number: int) -> None:
        await mine.ask(hundred)

    small = statistics.median([await median_ms(page, 60) for _ in range(5)])
    mine.close()
    return [
        at_least(
            "walk over 10,000 VMs in pages of 1,000",
            pairs,
            1.0,
            "VMs/s",
            "theirs: FastAPI + pydantic, from memory",
        ),
        below("page of 100 VMs, p50", small, 5.0, "ms"),
    ]
