"""Load: callers in a closed loop, and an HTTP client that costs little, so that the servers are what is measured."""

from __future__ import annotations

import asyncio
import ssl
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

Act = Callable[[int], Awaitable[object]]
"""One call by the caller with this number."""


async def rate(act: Act, callers: int, seconds: float) -> float:
    """Calls per second of so many callers, each of which asks again once it has its answer."""
    done = 0
    until = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            await act(number)
            done += 1

    started = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    return done / (time.perf_counter() - started)


async def median_ms(act: Act, times: int, pause_seconds: float = 0.0) -> float:
    """Median duration of one call after another, in milliseconds."""
    taken = []
    for number in range(times):
        started = time.perf_counter()
        await act(number)
        taken.append((time.perf_counter() - started) * 1000)
        if pause_seconds:
            await asyncio.sleep(pause_seconds)
    return statistics.median(taken)


@dataclass
class Answer:
    status: int
    body: bytes


class Http(asyncio.Protocol):
    """One kept connection; one request at a time. Answers with a body must carry Content-Length."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.received = bytearray()
        self.waiting: asyncio.Future[Answer] | None = None
        self.body_at = self.wanted = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.wanted:
            end = self.received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.received[:end]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            self.body_at, self.wanted = end + 4, end + 4 + length
        if len(self.received) >= self.wanted and self.waiting is not None:
            status = int(self.received[9:12])
            answer = Answer(status, bytes(self.received[self.body_at : self.wanted]))
            self.received.clear()
            self.wanted = 0
            self.waiting.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(exc or ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes, expected: int = 200) -> bytes:
        """The body. `expected` 0: any status that isn't an error. Raises RuntimeError for another status."""
        assert self.transport is not None
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        answer = await self.waiting
        if answer.status != expected and (expected or answer.status >= 400):
            raise RuntimeError(f"{request.split(b' HTTP', 1)[0]!r}: {answer.status} {answer.body[:500]!r}")
        return answer.body

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


async def connect(url: str, tls: ssl.SSLContext | None) -> Http:
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, made = await loop.create_connection(
        Http, parts.hostname or "", parts.port or 0, ssl=tls, server_hostname="localhost" if tls else None
    )
    return made


def request(method: str, path: str, token: str = "", body: bytes | None = None, **headers: str) -> bytes:
    """The bytes of a request, made once."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Accept: application/json"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")
