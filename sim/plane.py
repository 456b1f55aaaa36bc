"""The control plane: the real services as processes that are started again when they end, on machines in memory."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import dataclasses
import hashlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import asyncpg
import nkeys
from nats.aio.client import Client

from services.ha.service import service as ha
from services.inventory.service import service as inventory
from services.network.service import service as network
from services.scheduler.service import service as scheduler
from services.storage.service import service as storage
from sim.loop import PROCESS, Process
from sim.machines import RESTART_SECONDS, Machine
from sim.nats import MemoryClient
from sim.postgres import Database
from volery.runtime.config import BusConfig, DatabaseConfig, TelemetryConfig
from volery.runtime.programs import Settings
from volery.runtime.service import Service
from volery.runtime.signing import PREFIXES, Key, format_creds

SERVICES: dict[str, Service] = {
    "inventory": inventory,
    "scheduler": scheduler,
    "storage": storage,
    "network": network,
    "ha": ha,
}
POOL_SIZE = 8
SIGNERS = ("inventory", "storage", "network", "ha")


@cache
def keys() -> dict[str, Key]:
    """Everybody's nkey, the same in every run."""
    seeds = {name: hashlib.sha256(f"sim {name}".encode()).digest() for name in (*SIGNERS, "scheduler", "sys")}
    return {name: Key(nkeys.encode_seed(seed, PREFIXES["user"]).decode()) for name, seed in seeds.items()}


@cache
def credentials() -> Path:
    """A directory with everybody's credentials: services sign their orders with them. It goes with the process that made
    it, which has to be the one that all seeds' processes come from."""
    made = tempfile.TemporaryDirectory(prefix="volery-sim-")
    atexit.register(made.cleanup)
    directory = Path(made.name)
    for name, key in keys().items():
        (directory / f"{name}.creds").write_text(format_creds("e30.e30.e30", key.seed))
    return directory


def owner_keys() -> dict[str, str]:
    return {name: keys()[name].public for name in SIGNERS}


@dataclass(eq=False)
class Outside:
    """What services on this machine reach: `volery.runtime.outside.Outside`."""

    machine: Machine
    database: Database
    opened: list[tuple[Process | None, Any]] = field(default_factory=list)
    """The pools and connections of each process."""

    @asynccontextmanager
    async def open_pool(
        self, config: DatabaseConfig, owner: str
    ) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
        async with self.database.pool(str(owner), POOL_SIZE) as pool:
            with self._kept(pool):
                yield pool

    @asynccontextmanager
    async def open_direct(
        self, config: DatabaseConfig, owner: str
    ) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        async with self.database.connect(str(owner)) as connection:
            with self._kept(connection):
                yield connection

    @contextmanager
    def _kept(self, opened: Any) -> Iterator[None]:
        entry = (PROCESS.get(), opened)
        self.opened.append(entry)
        try:
            yield
        finally:
            self.opened.remove(entry)

    async def migrate(self, config: DatabaseConfig, owner: str) -> None:
        await self.database.migrate(str(owner))

    async def connect(
        self,
        config: BusConfig,
        user: str,
        *,
        never_queue: bool = False,
        on_closed: Callable[[], Awaitable[None]] | None = None,
    ) -> Client:
        client = MemoryClient(self.machine.server, self.machine.link)
        options: dict[str, Any] = {"name": user, "inbox_prefix": f"_INBOX.{user}"}
        if never_queue:
            options["pending_size"] = 0
        if on_closed is not None:
            options["closed_cb"] = on_closed
        await client.connect(**options)
        return client

    def process_gone(self, process: Process) -> None:
        """Its sockets are closed: PostgreSQL ends its sessions, and their locks."""
        gone = [entry for entry in self.opened if entry[0] is process]
        self.opened = [entry for entry in self.opened if entry[0] is not process]
        for _, opened in gone:
            opened.terminate()

    def leads(self, process: Process | None) -> bool:
        """Whether a process holds a session lock, and so its service's leadership."""
        return process is not None and any(
            owner is process and self.database.holds_lock(opened) for owner, opened in self.opened
        )


@dataclass(eq=False)
class Replica:
    """One service on one machine, started again whenever it ended."""

    name: str
    service: Service
    machine: Machine
    outside: Outside
    environ: dict[str, str]
    process: Process | None = None
    held_back: bool = False
    """Nobody starts it."""
    failures: list[BaseException] = field(default_factory=list)

    def start(self) -> None:
        if self.held_back or not self.machine.on or (self.process is not None and not self.process.dead):
            return
        self.service = dataclasses.replace(self.service, ready=False)
        self.process = self.machine.start(self.name, self._main, self._ended)

    async def _main(self) -> None:
        settings = Settings(
            BusConfig(servers="nats://sim:4222", credentials_dir=str(credentials())),
            DatabaseConfig(dsn="postgresql:///sim"),
            TelemetryConfig(),
            self.environ,
            self.outside,
        )
        await self.service.main(settings, asyncio.Event())

    def _ended(self, process: Process) -> None:
        if process.failure is not None:
            self.failures.append(process.failure)
        self._again(RESTART_SECONDS)

    def _again(self, seconds: float) -> None:
        self.machine.loop.call_later(seconds, self.start, context=contextvars.Context())

    def kill(self, off_seconds: float = RESTART_SECONDS) -> None:
        if self.process is not None and not self.process.dead:
            self.machine.kill(self.process)
        self._again(off_seconds)

    @property
    def leads(self) -> bool:
        return self.outside.leads(self.process)

    def pause(self) -> None:
        if self.process is not None:
            self.machine.stop(self.process)

    def go_on(self) -> None:
        if self.process is not None:
            self.machine.go_on(self.process)
