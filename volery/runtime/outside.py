"""What a service reaches outside of its process: its database and its bus, or what the simulation puts in their place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import asyncpg
from nats.aio.client import Client

from volery.runtime import bus, database
from volery.runtime.config import BusConfig, DatabaseConfig


class Outside(Protocol):
    """Every method as the function of its name in `database` and `bus`."""

    def open_pool(
        self, config: DatabaseConfig, owner: str
    ) -> AbstractAsyncContextManager[asyncpg.Pool[asyncpg.Record]]: ...

    def open_direct(
        self, config: DatabaseConfig, owner: str
    ) -> AbstractAsyncContextManager[asyncpg.Connection[asyncpg.Record]]: ...

    async def migrate(self, config: DatabaseConfig, owner: str) -> None: ...

    async def connect(
        self,
        config: BusConfig,
        user: str,
        *,
        never_queue: bool = False,
        on_closed: Callable[[], Awaitable[None]] | None = None,
    ) -> Client: ...


class Servers:
    """PostgreSQL and NATS themselves."""

    def open_pool(
        self, config: DatabaseConfig, owner: str
    ) -> AbstractAsyncContextManager[asyncpg.Pool[asyncpg.Record]]:
        return database.open_pool(config, owner)

    def open_direct(
        self, config: DatabaseConfig, owner: str
    ) -> AbstractAsyncContextManager[asyncpg.Connection[asyncpg.Record]]:
        return database.open_direct(config, owner)

    async def migrate(self, config: DatabaseConfig, owner: str) -> None:
        await database.migrate(config, owner)

    async def connect(
        self,
        config: BusConfig,
        user: str,
        *,
        never_queue: bool = False,
        on_closed: Callable[[], Awaitable[None]] | None = None,
    ) -> Client:
        return await bus.connect(config, user, never_queue=never_queue, on_closed=on_closed)


SERVERS: Final[Outside] = Servers()
