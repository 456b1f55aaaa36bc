"""A host's connection to the bus that costs little: ten thousand of them are in one process.

nats-py needs 41 kB and 44 µs of a processor per beat and connection; the protocol is text, and a simulated agent needs
five of its verbs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from volery.runtime.signing import Key

CONNECT_SECONDS = 60.0
"""Thousands of handshakes wait for two processors."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A message, as nats-py's own has it."""

    wire: HostWire
    subject: str
    data: bytes
    reply: str

    async def respond(self, data: bytes) -> None:
        await self.wire.publish(self.reply, data)


Callback = Callable[[Heard], Awaitable[None]]


class HostWire(asyncio.Protocol):
    """TLS before the first word, signed in as one host. It ends with its connection."""

    def __init__(self, name: str, jwt: str, key: Key) -> None:
        self.name, self.jwt, self.key = name, jwt, key
        self.transport: asyncio.Transport | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting: list[asyncio.Future[None]] = []
        self.callbacks: dict[int, Callback] = {}
        self.rest = b""
        self.lost = ""
        """Why it ended, once it has."""
        self.tasks: set[asyncio.Task[None]] = set()

    async def publish(self, subject: str, data: bytes) -> None:
        """Raises ConnectionError when it is lost."""
        if self.lost or self.transport is None:
            raise ConnectionError(f"{self.name}: {self.lost or 'not connected'}")
        self.transport.write(b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(data), data))

    async def subscribe(self, subject: str, cb: Callback) -> None:
        number = len(self.callbacks) + 1
        self.callbacks[number] = cb
        assert self.transport is not None
        self.transport.write(f"SUB {subject} {number}\r\n".encode())

    async def flush(self) -> None:
        """Until the server has handled all that was said before."""
        assert self.transport is not None
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(pong)
        self.transport.write(b"PING\r\n")
        await pong

    def cut(self) -> None:
        """As a host that loses its power: nothing more is said, and nobody says goodbye."""
        if self.transport is not None:
            self.transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = self.lost or str(exc or "the connection was closed")
        for future in (self.ready, *self.waiting):
            if not future.done():
                future.set_exception(ConnectionError(f"{self.name}: {self.lost}"))
                future.exception()  # somebody may have stopped waiting

    def data_received(self, data: bytes) -> None:
        said = self.rest + data if self.rest else data
        at = 0
        while (end := said.find(b"\r\n", at)) >= 0:
            line = said[at:end]
            if line.startswith(b"MSG "):
                after = end + 2 + int(line.rsplit(b" ", 1)[1])
                if len(said) < after + 2:
                    break
                self._hear(line.decode().split(" "), said[end + 2 : after])
                at = after + 2
            else:
                self._word(line)
                at = end + 2
        self.rest = said[at:]

    def _word(self, line: bytes) -> None:
        assert self.transport is not None
        if line == b"PING":
            self.transport.write(b"PONG\r\n")
        elif line == b"PONG":
            if self.waiting:
                self.waiting.pop(0).set_result(None)
            elif not self.ready.done():
                self.ready.set_result(None)
        elif line.startswith(b"INFO ") and not self.ready.done():
            self._sign_in(json.loads(line[5:])["nonce"])
        elif line.startswith(b"-ERR"):
            self.lost = line.decode()
            self.transport.abort()

    def _sign_in(self, nonce: str) -> None:
        signature = base64.urlsafe_b64encode(self.key.sign(nonce.encode())).rstrip(b"=").decode()
        asked = {
            "verbose": False,
            "pedantic": False,
            "lang": "volery-fleet",
            "version": "1",
            "protocol": 1,
            "name": self.name,
            "jwt": self.jwt,
            "sig": signature,
        }
        assert self.transport is not None
        self.transport.write(b"CONNECT " + json.dumps(asked).encode() + b"\r\nPING\r\n")

    def _hear(self, words: list[str], data: bytes) -> None:
        reply = words[3] if len(words) == 5 else ""
        callback = self.callbacks[int(words[2])]
        task = asyncio.ensure_future(_said(callback(Heard(self, words[1], data, reply))))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def _said(answer: Awaitable[None]) -> None:
    await answer


async def connect(url: str, tls: ssl.SSLContext, name: str, jwt: str, key: Key) -> HostWire:
    """Raises OSError or TimeoutError."""
    at = urlsplit(url)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_SECONDS):
        _, wire = await loop.create_connection(
            lambda: HostWire(name, jwt, key),
            at.hostname or "",
            at.port or 4222,
            ssl=tls,
            server_hostname=at.hostname,
            ssl_handshake_timeout=CONNECT_SECONDS,
        )
        await wire.ready
    return wire
