"""A pool of connections, as asyncpg's: dead ones are replaced when they are asked for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import asyncpg

from sim.postgres.connection import Connection
from sim.postgres.record import Record

if TYPE_CHECKING:
    from sim.postgres.database import Answer


class Pool:
    def __init__(self, connect: Callable[[], Connection], max_size: int) -> None:
        self._connect = connect
        self._max = max_size
        self._idle: list[Connection] = []
        self._used: dict[Connection, None] = {}
        self._queue: deque[asyncio.Future[None]] = deque()
        self._closing = False

    def acquire(self, *, timeout: float | None = None) -> Acquired:
        return Acquired(self, timeout)

    async def take(self) -> Connection:
        """Raises OSError when the database is away, InterfaceError when the pool is closed."""
        while True:
            if self._closing:
                raise asyncpg.InterfaceError("pool is closing")
            while self._idle:
                connection = self._idle.pop()
                if not connection.is_closed():
                    self._used[connection] = None
                    return connection
            if len(self._used) < self._max:
                connection = self._connect()
                self._used[connection] = None
                return connection
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except BaseException:  # also cancelled: the turn goes to the next one
                if turn.done() and not turn.cancelled():
                    self._next()
                raise

    def _next(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    async def release(self, connection: Connection, *, timeout: float | None = None) -> None:
        self.give_back(connection)

    def give_back(self, connection: Connection) -> None:
        if connection not in self._used:
            return
        del self._used[connection]
        if not connection.is_closed():
            connection.listeners.clear()
            connection.abort()
            self._idle.append(connection)
        self._next()

    async def _ask(
        self, query: str, args: tuple[Any, ...], timeout: float | None, *, script: bool = False
    ) -> Answer:
        seconds = None
        if self._idle and not self._closing:
            connection = self._idle[-1]
            if not connection.is_closed():
                database = connection.database
                seconds = database.latency()
                if not seconds and (known := database.recall(connection.schema, query, args)) is not None:
                    return known
        connection = await self.take()
        try:
            return await connection.ask(query, args, timeout, script=script, seconds=seconds)
        finally:
            self.give_back(connection)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        return (await self._ask(query, args, timeout, script=not args)).tag

    async def executemany(
        self, command: str, args: Iterable[tuple[Any, ...]], *, timeout: float | None = None
    ) -> None:
        connection = await self.take()
        try:
            await connection.executemany(command, args, timeout=timeout)
        finally:
            self.give_back(connection)

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Record]:
        return list((await self._ask(query, args, timeout)).records)

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Record | None:
        found = (await self._ask(query, args, timeout)).records
        return found[0] if found else None

    async def fetchval(self, query: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        found = (await self._ask(query, args, timeout)).records
        return found[0][column] if found else None

    async def close(self) -> None:
        """Waits until every connection was given back."""
        self._closing = True
        while self._used:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            await turn
        self.terminate()

    def terminate(self) -> None:
        self._closing = True
        for connection in [*self._idle, *self._used]:
            connection.die()
        self._idle.clear()
        while self._queue:
            self._next()


class Acquired:
    """`async with` gives the connection back; `await` leaves that to `release`."""

    def __init__(self, pool: Pool, timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._connection: Connection | None = None

    async def _take(self) -> Connection:
        if self._timeout is None:
            return await self._pool.take()
        async with asyncio.timeout(self._timeout):
            return await self._pool.take()

    def __await__(self) -> Generator[Any, None, Connection]:
        return self._take().__await__()

    async def __aenter__(self) -> Connection:
        self._connection = await self._take()
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._pool.give_back(self._connection)
