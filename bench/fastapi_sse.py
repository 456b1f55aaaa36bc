"""A peer: a plain FastAPI application that sends what is posted to every SSE client, from memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from bench.peer import serve

app = FastAPI()
clients: set[asyncio.Queue[str]] = set()
number = 0


@app.get("/events")
async def events() -> StreamingResponse:
    queue: asyncio.Queue[str] = asyncio.Queue()
    clients.add(queue)

    async def told() -> AsyncIterator[str]:
        try:
            yield ": begins\n\n"
            while True:
                yield await queue.get()
        finally:
            clients.discard(queue)

    return StreamingResponse(told(), media_type="text/event-stream")


@app.post("/publish")
async def publish(asked: Request) -> dict[str, int]:
    global number
    number += 1
    event = f"id: {number}\nevent: changed\ndata: {(await asked.body()).decode()}\n\n"
    for queue in clients:
        queue.put_nowait(event)
    return {"clients": len(clients)}


if __name__ == "__main__":
    serve(app)
