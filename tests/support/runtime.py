"""Real NATS and PostgreSQL for tests, and services running in this process against them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from volery.contracts.base import Owner
from volery.runtime.bus import Bus, open_bus
from volery.runtime.config import BusConfig, DatabaseConfig, TelemetryConfig
from volery.runtime.programs import Program, Settings, run_programs
from volery.runtime.service import Service
from volery.setup.database import bootstrap_database
from volery.setup.embedded import Embedded

OWNERS = [str(owner) for owner in Owner]
TEMPLATE = "volery_template"


@dataclass(frozen=True)
class Databases:
    """One PostgreSQL for the session; a fresh database per test, cloned from a template with every schema."""

    server: Embedded

    def config(self, name: str) -> DatabaseConfig:
        return DatabaseConfig(
            dsn=f"postgresql:///{name}?host={self.server.socket_directory}",
            passwords_dir=str(self.passwords),
            pool_max=4,
        )

    @property
    def passwords(self):  # type: ignore[no-untyped-def]
        return self.server.log.parent / "passwords"

    async def make_template(self) -> None:
        self.passwords.mkdir(exist_ok=True)
        passwords = dict.fromkeys(OWNERS, "secret")
        for owner, password in passwords.items():
            (self.passwords / f"{owner}.password").write_text(password)
        await bootstrap_database(self.server.dsn, OWNERS, passwords, database=TEMPLATE, connection_limit=60)

    async def fresh(self) -> DatabaseConfig:
        name = f"t{secrets.token_hex(6)}"
        connection = await asyncpg.connect(self.server.dsn)
        try:
            await connection.execute(f'create database "{name}" template "{TEMPLATE}"')
            await connection.execute(f'grant connect on database "{name}" to {", ".join(OWNERS)}')
        finally:
            await connection.close()
        return self.config(name)

    async def drop(self, config: DatabaseConfig) -> None:
        name = config.dsn.split("///")[1].split("?")[0]
        connection = await asyncpg.connect(self.server.dsn)
        try:
            await connection.execute(f'drop database if exists "{name}" with (force)')
        finally:
            await connection.close()


def settings(nats_url: str, database: DatabaseConfig) -> Settings:
    return Settings(
        BusConfig(servers=nats_url, require_sync_always=False), database, TelemetryConfig(log_level="WARNING")
    )


@asynccontextmanager
async def running(configured: Settings, *programs: Program) -> AsyncIterator[Bus]:
    """Run programs in this process until the block ends; gives a bus for asking them."""
    stop = asyncio.Event()
    task = asyncio.create_task(run_programs(programs, configured, stop))
    try:
        async with open_bus(configured.bus, "gateway") as bus:
            for program in programs:
                if isinstance(program, Service):
                    while not program.ready:
                        if task.done():
                            await task
                        await asyncio.sleep(0.01)
            yield bus
    finally:
        stop.set()
        done, _ = await asyncio.wait([task], timeout=20)
        if not done:
            for each in asyncio.all_tasks():
                each.print_stack()
            raise AssertionError("the programs do not end")
        await task
