"""PostgreSQL as a service sees it: its own role, its own schema, its own pool, migrated under a lock."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import asyncpg

from volery.runtime.config import DatabaseConfig
from volery.runtime.pool import create_pool

log = logging.getLogger(__name__)

CODE_LEVEL = 1
"""Grows when a migration stops working with older code; a schema whose min_code is higher refuses this code."""


AWAY: tuple[type[BaseException], ...] = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.TooManyConnectionsError,
    OSError,
)
"""PostgreSQL is not reachable, or was lost in the middle: what was asked may or may not have happened."""


class SchemaTooNew(Exception):
    """The schema was migrated by newer code that this code can't work with."""


def connect_arguments(config: DatabaseConfig, owner: str) -> dict[str, Any]:
    owner = str(owner)  # asyncpg takes no subclass of str
    arguments: dict[str, Any] = {
        "dsn": config.dsn,
        "user": owner,
        "server_settings": {"search_path": owner, "application_name": f"volery-{owner}", "jit": "off"},
    }
    if config.passwords_dir:
        arguments["password"] = Path(config.passwords_dir, f"{owner}.password").read_text().strip()
    return arguments


@asynccontextmanager
async def open_pool(config: DatabaseConfig, owner: str) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """The service's pool: its role, its schema on the search path."""
    pool = await create_pool(
        min_size=1, max_size=config.pool_max, command_timeout=60, **connect_arguments(config, owner)
    )
    try:
        yield pool
    finally:
        await pool.close()


@asynccontextmanager
async def open_direct(
    config: DatabaseConfig, owner: str
) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """One connection outside the pool, for session locks: leadership lives and dies with it."""
    arguments = connect_arguments(config, owner)
    arguments["server_settings"] |= {
        "tcp_keepalives_idle": "2",
        "tcp_keepalives_interval": "1",
        "tcp_keepalives_count": "3",
    }
    arguments["command_timeout"] = 60
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(**arguments)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


def _migrations(owner: str) -> list[tuple[str, str]]:
    found = []
    for package, prefix in (("volery.runtime", "runtime"), (f"services.{owner}", owner)):
        folder = files(package).joinpath("sql")
        if folder.is_dir():
            found += [
                (f"{prefix}/{file.name}", file.read_text())
                for file in sorted(folder.iterdir(), key=lambda f: f.name)
                if file.name.endswith(".sql")
            ]
    return found


async def migrate(config: DatabaseConfig, owner: str) -> None:
    """Bring the owner's schema to this code, one replica at a time, forward only.

    Raises SchemaTooNew when newer code has left this code behind.
    """
    async with open_direct(config, owner) as connection:
        await apply_migrations(connection, str(owner))


async def apply_migrations(connection: asyncpg.Connection[asyncpg.Record], owner: str) -> None:
    """What `migrate` does, over a connection of the owner. Raises SchemaTooNew."""
    await connection.execute("select pg_advisory_lock(hashtext('volery-migrate-' || $1))", owner)
    await connection.execute("set lock_timeout = '4s'")
    await connection.execute(
        """create table if not exists migration (
               name text primary key, at timestamptz not null default now(), min_code int not null default 1)"""
    )
    done = {r["name"]: r["min_code"] for r in await connection.fetch("select name, min_code from migration")}
    newest = max(done.values(), default=0)
    if newest > CODE_LEVEL:
        raise SchemaTooNew(
            f"schema {owner} needs code level {newest}, this is {CODE_LEVEL}: update this replica"
        )
    for name, sql in _migrations(owner):
        if name in done:
            continue
        async with connection.transaction():
            await connection.execute(sql)
            await connection.execute(
                "insert into migration (name, min_code) values ($1, $2)", name, CODE_LEVEL
            )
        log.info("migrated %s", name)
