"""Somebody between clients and a server: passes on, or spoils handshakes and cuts connections, as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

GREETING = (
    b'INFO {"server_id":"X","version":"2.15.1","proto":1,"headers":true,"max_payload":1048576,"nonce":"bm9uY2U",'
    b'"auth_required":true,"tls_required":false}\r\n'
)

Spoil = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Interloper:
    """Listens on `port`. While `storms`, connections meet mischief; `calm` ends it and those that hang."""

    target: int
    choose: random.Random
    port: int = 0
    storms: bool = False
    always: str = ""
    """While it storms, this is done to all; "": anything, by chance."""
    met: list[str] = field(default_factory=list)
    """What was done to each connection, in order."""
    heard: bytearray = field(default_factory=bytearray)
    """What clients said to somebody who greets in clear text."""
    _open: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)
    _thawed: asyncio.Event = field(default_factory=asyncio.Event)

    def storm(self, always: str = "") -> None:
        self.storms, self.always = True, always

    def calm(self) -> None:
        self.storms = False
        self.cut()

    def cut(self, share: float = 1.0) -> None:
        """Ends open connections with a reset: this share of them, by chance."""
        for writer in list(self._open.values()):
            if self.choose.random() <= share:
                writer.transport.abort()

    def freeze(self) -> None:
        """Nothing passes any more on the connections that are open now, and nobody is told."""
        self._thawed.clear()
        self._thawed = asyncio.Event()
        self._thawed.set()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        deeds: dict[str, Spoil] = {
            "passed": self._pass,
            "greeted": self._greet,
            "reset": self._reset,
            "hung": self._hang,
            "cut midway": self._cut_midway,
        }
        deed = self.always or self.choose.choice(list(deeds)) if self.storms else "passed"
        self.met.append(deed)
        try:
            with contextlib.suppress(OSError):
                await deeds[deed](reader, writer)
        finally:
            writer.transport.abort()
            del self._open[task]

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None = None
    ) -> None:
        there_reader, there = await asyncio.open_connection("127.0.0.1", self.target)
        try:
            there_and_back = [
                _pump(reader, there, limit, self._thawed),
                _pump(there_reader, writer, limit, self._thawed),
            ]
            await asyncio.wait(
                [asyncio.ensure_future(way) for way in there_and_back], return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            there.transport.abort()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        while said := await reader.read(65_536):
            self.heard += said
            if said.startswith(b"CONNECT"):
                writer.write(b"PONG\r\n")

    async def _reset(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.choose.uniform(0.0, 0.02))

    async def _hang(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            pass

    async def _cut_midway(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._pass(reader, writer, self.choose.randrange(4_000))


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None, thawed: asyncio.Event
) -> None:
    """Until either side ends, or `limit` bytes went this way."""
    with contextlib.suppress(OSError):
        while said := await reader.read(65_536 if limit is None else min(limit, 65_536) or 1):
            await thawed.wait()
            writer.write(said)
            await writer.drain()
            if limit is not None and (limit := limit - len(said)) <= 0:
                return


@asynccontextmanager
async def between(target: int, seed: int = 0) -> AsyncIterator[Interloper]:
    """In front of a server on this machine."""
    interloper = Interloper(target, random.Random(seed))
    interloper._thawed.set()
    listening = await asyncio.start_server(interloper.take, "127.0.0.1", 0)
    interloper.port = listening.sockets[0].getsockname()[1]
    try:
        yield interloper
    finally:
        listening.close()
        tasks = list(interloper._open)
        interloper.cut()
        if tasks:
            await asyncio.wait(tasks)
