"""How long one event takes to the last of a thousand SSE clients, in TLS, from the request that causes it."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from bench.load import Http, connect, request
from bench.rows import Line, at_most, in_turn
from bench.world import World

CLIENTS = 1000
AT_ONCE = 50
"""Handshakes at the same time."""
EVENTS = 5


@dataclass
class Crowd:
    """The clients: who has seen the mark."""

    mark: bytes = b""
    missing: int = 0
    all_seen: asyncio.Future[float] | None = None
    members: list[Listener] = field(default_factory=list)

    def expect(self, mark: bytes) -> asyncio.Future[float]:
        """Ends with the time at which the last one has it."""
        self.mark, self.missing = mark, len(self.members)
        self.all_seen = asyncio.get_running_loop().create_future()
        for member in self.members:
            member.seen = False
        return self.all_seen

    def one_more(self) -> None:
        self.missing -= 1
        if not self.missing and self.all_seen is not None:
            self.all_seen.set_result(time.perf_counter())


class Listener(asyncio.Protocol):
    """One client that follows the stream."""

    def __init__(self, crowd: Crowd, head: bytes) -> None:
        self.crowd, self.head = crowd, head
        self.seen = True
        self.rest = b""
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self.head)

    def data_received(self, data: bytes) -> None:
        if not self.begun.done():
            if not data.startswith(b"HTTP/1.1 200"):
                self.begun.set_exception(ConnectionError(data[:200].decode()))
                return
            self.begun.set_result(None)
        if not self.seen and self.crowd.mark in self.rest + data:
            self.seen = True
            self.crowd.one_more()
        self.rest = data[-64:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.begun.done():
            self.begun.set_exception(exc or ConnectionError("closed before it began"))


@asynccontextmanager
async def crowd(url: str, tls: ssl.SSLContext, head: bytes, clients: int = CLIENTS) -> AsyncIterator[Crowd]:
    found = Crowd()
    loop = asyncio.get_running_loop()
    parts = urlsplit(url)
    turns = asyncio.Semaphore(AT_ONCE)

    async def join() -> None:
        async with turns:
            _, member = await loop.create_connection(
                lambda: Listener(found, head),
                "127.0.0.1",
                parts.port or 0,
                ssl=tls,
                server_hostname="localhost",
            )
            found.members.append(member)
            await member.begun

    try:
        await asyncio.gather(*(join() for _ in range(clients)))
        yield found
    finally:
        for member in found.members:
            if member.transport is not None:
                member.transport.abort()


async def fan_out(world: World) -> list[Line]:
    """Ours: PATCH of a VM's description until the last client has the fact. Theirs: POST of the same text."""
    there = await world.installation()
    vm = (await world.vms())[-1]
    await there.quiet()
    numbers = itertools.count()
    ours_asks = await connect(there.url, there.tls)
    with there.peer("bench.fastapi_sse") as peer_url:
        theirs_asks = await connect(peer_url, there.tls)
        follow = request("GET", "/api/v1/events", there.token)
        async with (
            crowd(there.url, there.tls, follow) as ours_crowd,
            crowd(peer_url, there.tls, request("GET", "/events")) as their_crowd,
        ):

            async def once(everybody: Crowd, http: Http, method: str, path: str) -> float:
                mark = b"mark-%06d-" % next(numbers)
                reached = everybody.expect(mark)
                body = b'{"description":"' + mark + b'"}'
                started = time.perf_counter()
                asked = asyncio.ensure_future(http.ask(request(method, path, there.token, body)))
                async with asyncio.timeout(30):
                    ended = await reached
                    await asked
                return (ended - started) * 1000

            async def ours() -> float:
                times = [
                    await once(ours_crowd, ours_asks, "PATCH", f"/api/v1/vms/{vm.id}") for _ in range(EVENTS)
                ]
                return sorted(times)[EVENTS // 2]

            async def theirs() -> float:
                times = [await once(their_crowd, theirs_asks, "POST", "/publish") for _ in range(EVENTS)]
                return sorted(times)[EVENTS // 2]

            pairs = await in_turn(ours, theirs)
        ours_asks.close()
        theirs_asks.close()
    note = (
        "theirs: plain FastAPI. Ours begins with the PATCH that causes the event, so it includes commit, log and "
        "stream; theirs has the event in memory"
    )
    return [at_most(f"one event to {CLIENTS:,} SSE clients, last client", pairs, 1.0, note=note)]
