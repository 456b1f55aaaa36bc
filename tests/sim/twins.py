"""The real PostgreSQL and the simulation's side by side: every statement goes to both, and both must say the same.

Statements take turns, so that both databases see them in one order, and the simulation's clock stands where the real
server's stood. Meant for `Settings.outside`: services run on the twins without knowing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import asyncpg

from sim.postgres import Database
from volery.runtime import database as real
from volery.runtime.config import DatabaseConfig
from volery.runtime.outside import SERVERS

Act = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a statement came to, in a form that can be compared."""

    answer: Any = None
    error: BaseException | None = None

    def comparable(self, *, ordered: bool) -> Any:
        if self.error is not None:
            if "query argument $" in str(self.error):
                return type(self.error).__name__  # asyncpg's own, in the words of its encoders
            constraint = getattr(self.error, "constraint_name", None)
            return type(self.error).__name__, constraint, str(self.error).split("\n")[0]
        if isinstance(self.answer, list):
            rows = [list(row.items()) for row in self.answer]
            return rows if ordered else sorted(rows, key=repr)
        return list(self.answer.items()) if hasattr(self.answer, "items") else self.answer

    def give(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.answer


async def outcome(act: Awaitable[Any]) -> Outcome:
    try:
        return Outcome(await act)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.DataError) as error:
        return Outcome(error=error)


@dataclass(slots=True)
class Twins:
    """`texts` are the statements that both agreed on so far."""

    config: DatabaseConfig
    simulated: Database = field(init=False)
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    texts: set[str] = field(default_factory=set)
    differences: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.simulated = Database(clock=lambda: self.now)

    def compare(self, text: str, args: tuple[Any, ...], one: Outcome, other: Outcome) -> None:
        ordered = "order by" in text and "with moved" not in text
        left, right = one.comparable(ordered=ordered), other.comparable(ordered=ordered)
        if "age(xmin)" in text and isinstance(left, list):  # to the simulation everything has just changed
            right = [row for row in right if row in left]
        if left != right:
            self.differences.append(f"{text}\nwith {args!r}\n  PostgreSQL: {left!r}\n  simulated:  {right!r}")
        self.texts.add(text)

    # What a service reaches outside of itself

    @asynccontextmanager
    async def open_pool(self, config: DatabaseConfig, owner: str) -> AsyncIterator[Any]:
        async with real.open_pool(config, owner) as pool, self.simulated.pool(owner, config.pool_max) as twin:
            yield TwinPool(self, pool, twin)

    @asynccontextmanager
    async def open_direct(self, config: DatabaseConfig, owner: str) -> AsyncIterator[Any]:
        async with real.open_direct(config, owner) as connection, self.simulated.connect(owner) as twin:
            both = TwinConnection(self, connection, twin)
            try:
                yield both
            finally:
                await both.idle()

    async def migrate(self, config: DatabaseConfig, owner: str) -> None:
        async with self.turn:
            await real.migrate(config, owner)
            await self.simulated.migrate(owner)
            async with real.open_direct(config, owner) as connection, self.simulated.connect(owner) as twin:
                history = await connection.fetchval("select history from log_head")
                await twin.execute("update log_head set history = $1", history)

    def connect(self, *args: Any, **options: Any) -> Any:
        return SERVERS.connect(*args, **options)

    async def same_contents(self, owner: str) -> None:
        """Every row of every table, except when something was migrated."""
        async with real.open_direct(self.config, owner) as connection:
            for table in self.simulated.schema(owner).tables:
                if table == "migration":
                    continue
                rows = [dict(row) for row in await connection.fetch(f"select * from {table}")]
                twin = self.simulated.rows(owner, table)
                assert sorted(rows, key=repr) == sorted(twin, key=repr), f"{owner}.{table} differs"


class TwinConnection:
    """One connection of each."""

    def __init__(self, twins: Twins, connection: Any, twin: Any) -> None:
        self.twins, self.real, self.twin = twins, connection, twin
        self.inside = False
        """Of a transaction, which has the turn."""
        self.running: asyncio.Task[Any] | None = None

    async def _both(self, text: str, args: tuple[Any, ...], act: Act) -> Any:
        if "pg_advisory_lock" in text:
            await act(self.real)
            return await act(self.twin)
        if "pg_snapshot_xmin" in text:  # the simulation counts no transactions
            await act(self.twin)
            return await act(self.real)
        if self.inside:
            return await self._compared(text, args, act)
        # Shielded: a service that is stopped must not leave the twins with different answers.
        self.running = asyncio.create_task(self._alone(text, args, act))
        return await asyncio.shield(self.running)

    async def idle(self) -> None:
        """Until what was asked last has its answers."""
        if self.running is not None:
            await asyncio.wait([self.running])

    async def _alone(self, text: str, args: tuple[Any, ...], act: Act) -> Any:
        async with self.twins.turn:
            return await self._compared(text, args, act)

    async def _compared(self, text: str, args: tuple[Any, ...], act: Act) -> Any:
        one = await outcome(self._dated(act))
        other = await outcome(act(self.twin))
        self.twins.compare(text, args, one, other)
        return one.give()

    async def _dated(self, act: Act) -> Any:
        """On the real server, after the simulation's clock was set to its transaction's time."""
        async with self.real.transaction():
            self.twins.now = await self.real.fetchval("select now()")
            return await act(self.real)

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        return await self._both(query, args, lambda c: c.execute(query, *args, **options))

    async def executemany(self, query: str, args: Iterable[Any], **options: Any) -> Any:
        rows = list(args)
        return await self._both(query, tuple(rows), lambda c: c.executemany(query, rows, **options))

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        return await self._both(query, args, lambda c: c.fetch(query, *args, **options))

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        return await self._both(query, args, lambda c: c.fetchrow(query, *args, **options))

    async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
        return await self._both(query, args, lambda c: c.fetchval(query, *args, **options))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        async with self.twins.turn:
            async with self.real.transaction():
                self.twins.now = await self.real.fetchval("select now()")
                async with self.twin.transaction():
                    self.inside = True
                    try:
                        yield
                    finally:
                        self.inside = False

    async def add_listener(self, channel: str, callback: Any) -> None:
        await self.real.add_listener(channel, callback)

    async def remove_listener(self, channel: str, callback: Any) -> None:
        await self.real.remove_listener(channel, callback)

    def add_termination_listener(self, callback: Any) -> None:
        self.real.add_termination_listener(callback)

    def remove_termination_listener(self, callback: Any) -> None:
        self.real.remove_termination_listener(callback)

    def is_closed(self) -> bool:
        return bool(self.real.is_closed())

    async def close(self, *, timeout: float | None = None) -> None:
        await self.real.close(timeout=timeout)
        await self.twin.close()


class TwinPool:
    """Both pools; whoever gets a connection gets one of each."""

    def __init__(self, twins: Twins, pool: Any, twin: Any) -> None:
        self.twins, self.real, self.twin = twins, pool, twin

    def acquire(self) -> AbstractAsyncContextManager[TwinConnection]:
        return self._acquire()

    @asynccontextmanager
    async def _acquire(self) -> AsyncIterator[TwinConnection]:
        async with self.real.acquire() as connection, self.twin.acquire() as twin:
            yield TwinConnection(self.twins, connection, twin)

    def __getattr__(self, name: str) -> Any:
        async def ask(*args: Any, **options: Any) -> Any:
            async def whole() -> Any:
                async with self._acquire() as connection:
                    return await getattr(connection, name)(*args, **options)

            return await asyncio.shield(asyncio.create_task(whole()))

        if name not in ("execute", "executemany", "fetch", "fetchrow", "fetchval"):
            raise AttributeError(name)
        return ask
