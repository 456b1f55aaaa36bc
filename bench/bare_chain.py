"""A peer: one VM by ASGI route, nats-py request, asyncpg select, answer; no contracts, authentication or tracing."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
from nats.aio.client import Client
from nats.aio.msg import Msg

from bench.peer import serve
from bench.world import plain_pool
from volery.runtime.bus import connect
from volery.runtime.config import BusConfig, DatabaseConfig, read

SUBJECT = "inventory.bench.vm"


class Chain:
    """Both ends in one process, as the embedded control plane has them; connections are made at the first request."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def _open(self) -> Client:
        self._pool = plain_pool(read("VOLERY_DATABASE_", DatabaseConfig), "inventory")
        pool: asyncpg.Pool[asyncpg.Record] = await self._pool.__aenter__()
        config = read("VOLERY_BUS_", BusConfig)
        server = await connect(config, "inventory")

        async def select(message: Msg) -> None:
            doc = await pool.fetchval("select doc from vm where id = $1", message.data.decode())
            await message.respond(doc.encode())

        async def answer(message: Msg) -> None:
            # A callback that awaited the select would answer one request at a time.
            task = asyncio.create_task(select(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        await server.subscribe(SUBJECT, cb=answer)
        await server.flush()
        self.client = await connect(config, "gateway")
        return self.client

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        client = self.client or await self._open()
        asked = scope["path"].rpartition("/")[2].encode()
        # The connection is ours, since nats-py can't begin with TLS; the way to ask is nats-py's own.
        found = await Client._request_new_style(client, SUBJECT, asked, timeout=10)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(found.data)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": found.data})


if __name__ == "__main__":
    serve(Chain())
