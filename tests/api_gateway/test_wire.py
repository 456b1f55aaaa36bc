"""What is written past ASGI arrives as ASGI's own would, and only while the client takes it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn

from api_gateway.wire import Wire, wire_of

PART = b"x" * 65_536
MOST_PARTS = 1000
"""More than two sockets hold."""


class Answer:
    """An application whose answer goes on until `over`."""

    def __init__(self) -> None:
        self.before: Wire | None = None
        self.wire: asyncio.Future[Wire | None] = asyncio.get_running_loop().create_future()
        self.over = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.before = wire_of(send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first,", "more_body": True})
        self.wire.set_result(wire_of(send))
        await self.over.wait()
        await send({"type": "http.response.body", "body": b"last", "more_body": False})


@asynccontextmanager
async def serving(app: Answer) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http="httptools", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            app.over.set()
            server.should_exit = server.force_exit = True
            await task


async def test_parts_come_in_their_order() -> None:
    app = Answer()
    async with serving(app) as url, httpx.AsyncClient() as client, client.stream("GET", url) as answer:
        wire = await app.wire
        assert app.before is None, "its answer had not begun"
        assert wire is not None
        assert wire.takes()
        wire.write(b"second,")
        wire.write(b"third,")
        app.over.set()
        assert b"".join([part async for part in answer.aiter_bytes()]) == b"first,second,third,last"
        assert not wire.takes(), "it has ended"


async def test_a_client_that_does_not_read_is_not_written_to() -> None:
    app = Answer()
    async with serving(app) as url, httpx.AsyncClient() as client, client.stream("GET", url) as answer:
        wire = await app.wire
        assert wire is not None
        parts = 0
        while wire.takes():
            wire.write(PART)
            parts += 1
            assert parts < MOST_PARTS
        read = asyncio.create_task(answer.aread())
        while not wire.takes():
            await asyncio.sleep(0)
        app.over.set()
        assert len(await read) == len(b"first,last") + parts * len(PART)


async def test_something_else_than_uvicorn_has_no_wire() -> None:
    async def send(message: Any) -> None:
        raise AssertionError

    assert wire_of(send) is None
