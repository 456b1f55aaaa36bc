"""The gateway as a program: its connection, its feed, its server with TLS that renews itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from api_gateway.app import GatewayApp
from api_gateway.config import GatewayConfig
from api_gateway.desk import Desk, make_desk
from api_gateway.routes import SOCKETS, TABLE
from volery.runtime import telemetry
from volery.runtime.bus import open_bus
from volery.runtime.config import read
from volery.runtime.programs import Settings
from volery.runtime.tasks import end

log = logging.getLogger(__name__)

NAME = "gateway"
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75


class Server(uvicorn.Server):
    """uvicorn inside a process that handles its own signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """Run it with `volery.runtime.programs.run`, alone or beside the services."""

    name = NAME
    config = GatewayConfig

    def __init__(self, given: GatewayConfig | None = None) -> None:
        """`given` settings stand for those of the environment."""
        self.given = given
        self.port = 0
        """The port that was bound, once it is `ready`."""
        self.ready = asyncio.Event()
        self.desk: Desk | None = None

    async def main(self, settings: Settings, stop: asyncio.Event) -> None:
        """Until `stop`. Raises ConfigError, OSError when it can't listen."""
        telemetry.service_name.set(NAME)
        config = self.given or read("VOLERY_GATEWAY_", GatewayConfig)
        traced = settings.telemetry.read_sample_ratio if settings.telemetry.otlp_endpoint else 0.0
        async with open_bus(settings.bus, NAME) as bus:
            desk = self.desk = make_desk(config, bus, traced)
            following = asyncio.create_task(desk.feed.run(config.heartbeat_seconds))
            try:
                await self._serve(config, desk, stop, following)
            finally:
                await end([following])

    async def _serve(
        self, config: GatewayConfig, desk: Desk, stop: asyncio.Event, following: asyncio.Task[None]
    ) -> None:
        listener = bind(config)
        self.port = listener.getsockname()[1]
        server = Server(uvicorn_config(config, make_app(desk)))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        renewing = asyncio.create_task(_reload(server.config, config))
        stopping = asyncio.create_task(stop.wait())
        try:
            # The socket listens already: whoever connects before uvicorn accepts waits in its backlog.
            if config.port_file:
                _write(Path(config.port_file), f"{self.port}\n")
            self.ready.set()
            log.info("the gateway listens on %s", listener.getsockname())
            await asyncio.wait([serving, stopping, following], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.ready.clear()
            renewing.cancel()
            stopping.cancel()
            desk.feed.close()
            server.should_exit = True
            await asyncio.wait({serving}, timeout=config.shutdown_seconds + 5)
            listener.close()
        for task in (serving, following):
            if task.done():
                task.result()


def make_app(desk: Desk) -> GatewayApp:
    return GatewayApp(desk, TABLE, SOCKETS)


def bind(config: GatewayConfig) -> socket.socket:
    """A listening socket. A peer that takes no bytes for long is cut by the kernel, whatever it is sent."""
    host, port = config.address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.stuck_client_seconds * 1000))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(
            f"can't listen on {config.listen} ({error.strerror}): another program has it; choose another address "
            "with VOLERY_GATEWAY_LISTEN"
        ) from None
    listener.setblocking(False)
    return listener


def uvicorn_config(config: GatewayConfig, app: GatewayApp) -> uvicorn.Config:
    found = uvicorn.Config(
        app,
        http="httptools",
        ws="websockets-sansio",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        ws_max_size=1024 * 1024,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(config.shutdown_seconds),
        ssl_certfile=config.certificate or None,
        ssl_keyfile=config.key or None,
    )
    found.load()
    return found


async def _reload(server: uvicorn.Config, config: GatewayConfig) -> None:
    """Take up a renewed certificate: connections made from then on get it."""
    context: ssl.SSLContext | None = server.ssl
    if context is None:
        return
    loaded = _changed_at(config)
    while True:
        await asyncio.sleep(config.certificate_check_seconds)
        try:
            now = _changed_at(config)
            if now != loaded:
                context.load_cert_chain(config.certificate, config.key)
                loaded = now
                log.info("the gateway's certificate was renewed")
        except (OSError, ssl.SSLError) as error:  # between the two files' renewal: the next look gets both
            log.warning("the gateway's certificate can't be loaded: %s", error)


def _changed_at(config: GatewayConfig) -> tuple[int, int]:
    return os.stat(config.certificate).st_mtime_ns, os.stat(config.key).st_mtime_ns


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.replace(path)


gateway = Gateway()
