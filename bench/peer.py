"""How a bare server to compare with is run: one process, uvloop, the same TLS, its port on standard output."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import uvicorn
import uvloop


class Announcing(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        print(sockets[0].getsockname()[1], flush=True)


def serve(app: Any) -> None:
    """Until SIGTERM. The settings are those of the gateway."""
    listener = socket.socket()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="none",
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
        ssl_certfile=os.environ["BENCH_CERTIFICATE"],
        ssl_keyfile=os.environ["BENCH_KEY"],
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Announcing(config).serve(sockets=[listener]))
