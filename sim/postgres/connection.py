"""A connection: asyncpg's methods as the product uses them, over one session of the database.

Every statement travels there and back, and the connection can die on either way: what was asked may have happened.
"""

from __future__ import annotations

import asyncio
import contextvars
import types
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import asyncpg

from sim.postgres.errors import Blocked, Unsupported, postgres
from sim.postgres.record import Record
from sim.postgres.transactions import Command, Transaction

if TYPE_CHECKING:
    from sim.postgres.database import Answer, Database
    from sim.postgres.ddl import Schema

COMMAND_SECONDS = 60.0
"""As the product's connections have it."""
Listener = Callable[[Any, int, str, object], None]


class Connection:
    def __init__(self, database: Database, schema: Schema, pid: int) -> None:
        self.database = database
        self.schema = schema
        self.pid = pid
        self.session = Transaction(database.clock())
        """Holds the advisory locks."""
        self.transaction_open: Transaction | None = None
        self.lock_timeout: float | None = None
        self.listeners: dict[str, dict[Listener, contextvars.Context]] = {}
        self._ended: dict[Callable[[Any], None], contextvars.Context] = {}
        self._closed = False
        self._busy = False
        self._waiting = False
        self._awaited: asyncio.Future[None] | None = None

    # Statements

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """The last statement's tag; several statements, without arguments, are one transaction."""
        return (await self.ask(query, args, timeout, script=not args)).tag

    async def executemany(
        self, command: str, args: Iterable[tuple[Any, ...]], *, timeout: float | None = None
    ) -> None:
        """All of them or none."""
        with self._operation():
            await self._travel(self.database.latency())
            tx, implicit = self._begin()
            try:
                for each in args:
                    await self._carry_out(tx, command, tuple(each), timeout, script=False)
            except BaseException:  # also cancelled, or its process killed: nothing of it stays
                self._fail(tx, implicit)
                raise
            self._end(tx, implicit)
            await self._travel(self.database.latency())

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Record]:
        return list((await self.ask(query, args, timeout)).records)

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Record | None:
        found = (await self.ask(query, args, timeout)).records
        return found[0] if found else None

    async def fetchval(self, query: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        found = (await self.ask(query, args, timeout)).records
        return found[0][column] if found else None

    async def ask(
        self,
        text: str,
        args: tuple[Any, ...],
        timeout: float | None,
        *,
        script: bool = False,
        seconds: float | None = None,
    ) -> Answer:
        """`seconds`: of the way there, if that was decided. What is known without a way is answered at once."""
        self._enter()
        try:
            if seconds is None:
                seconds = self.database.latency()
                known = None if seconds else self.recall(text, args)
                if known is not None:
                    return known
            await self._travel(seconds)
            if seconds and (known := self.recall(text, args)) is not None:
                await self._return()
                return known
            tx, implicit = self._begin()
            try:
                answer = await self._carry_out(tx, text, args, timeout, script=script)
            except BaseException:  # also cancelled, or its process killed: nothing of it stays
                self._fail(tx, implicit)
                raise
            self._end(tx, implicit)
            await self._return()
            return answer
        finally:
            self._busy = False

    def recall(self, text: str, args: tuple[Any, ...]) -> Answer | None:
        return None if self.transaction_open else self.database.recall(self.schema, text, args)

    @contextmanager
    def _operation(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            self._busy = False

    def _enter(self) -> None:
        if self._closed:
            raise asyncpg.InterfaceError("connection is closed")
        if self._busy:
            raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
        self._busy = True

    def _begin(self) -> tuple[Transaction, bool]:
        """The transaction that a statement belongs to, and whether it is its own."""
        if self.transaction_open is None:
            return Transaction(self.database.clock()), True
        if self.transaction_open.failed:
            raise postgres(
                asyncpg.InFailedSQLTransactionError,
                "current transaction is aborted, commands ignored until end of transaction block",
            )
        return self.transaction_open, False

    def _fail(self, tx: Transaction, implicit: bool) -> None:
        if implicit or self._closed:
            tx.rollback()
        else:
            tx.fail()

    def _end(self, tx: Transaction, implicit: bool) -> None:
        if implicit:
            tx.commit()
            self.database.tell(tx, self.pid)

    async def _carry_out(
        self, tx: Transaction, text: str, args: tuple[Any, ...], timeout: float | None, *, script: bool
    ) -> Answer:
        """Run it; when somebody is in the way, undo it, wait for their end and run it again."""
        while True:
            mark = tx.mark()
            try:
                return self.database.run(self, tx, text, args, script=script)
            except Blocked as blocked:
                tx.undo_to(mark)
                await self._wait(tx, blocked.holder, timeout)
            except BaseException:  # whatever ended it, a statement is whole or nothing
                tx.undo_to(mark)
                raise

    async def _wait(self, tx: Transaction, holder: Transaction, timeout: float | None) -> None:
        seconds = COMMAND_SECONDS if timeout is None else timeout
        ended = self._awaited = tx.wait_for(holder)
        self._waiting = True
        try:
            if self.lock_timeout is not None and self.lock_timeout < seconds:
                await self._bounded(ended, self.lock_timeout)
            else:
                async with asyncio.timeout(seconds):
                    await ended
        finally:
            self._awaited = None
            self._waiting = False
            tx.waited()
        self._check_alive()

    async def _bounded(self, ended: asyncio.Future[None], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await ended
        except TimeoutError:
            raise postgres(asyncpg.LockNotAvailableError, "canceling statement due to lock timeout") from None

    async def _travel(self, seconds: float) -> None:
        """The way to the server. Raises ConnectionDoesNotExistError when the connection dies meanwhile."""
        if seconds > 0:
            await self._arrival(seconds)
            return
        await _others_first()
        if self._closed:
            raise _cut()

    async def _return(self) -> None:
        """The way back, on which only an answer that takes its time lets others go first. Raises as `_travel`."""
        seconds = self.database.latency()
        if seconds > 0:
            await self._arrival(seconds)

    async def _arrival(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        arrival: asyncio.Future[None] = loop.create_future()
        self._awaited = arrival
        timer = loop.call_later(seconds, _arrive, arrival)
        try:
            await arrival
        finally:
            self._awaited = None
            timer.cancel()
        self._check_alive()

    def _check_alive(self) -> None:
        """It may have died between the end of a wait and this."""
        if self._closed:
            raise _cut()

    def command(self, tx: Transaction) -> Command:
        return Command(tx, self.database.next_command(), self.session, self.database)

    # Transactions

    def transaction(
        self, *, isolation: str | None = None, readonly: bool = False, deferrable: bool = False
    ) -> Block:
        if isolation not in (None, "read_committed") or readonly or deferrable:
            raise Unsupported(f"transactions that are {isolation or 'readonly or deferrable'}")
        return Block(self)

    def is_in_transaction(self) -> bool:
        return self.transaction_open is not None

    async def control(self, action: Callable[[], None]) -> None:
        """A statement that begins or ends a transaction."""
        with self._operation():
            await self._travel(self.database.latency())
            action()
            await self._travel(self.database.latency())

    # Notifications

    async def add_listener(self, channel: str, callback: Listener) -> None:
        with self._operation():
            await self._travel(self.database.latency())
            self.listeners.setdefault(channel, {})[callback] = contextvars.copy_context()

    async def remove_listener(self, channel: str, callback: Listener) -> None:
        if self._closed:
            return
        with self._operation():
            await self._travel(self.database.latency())
            self.listeners.get(channel, {}).pop(callback, None)

    def add_termination_listener(self, callback: Callable[[Any], None]) -> None:
        self._ended[callback] = contextvars.copy_context()

    def remove_termination_listener(self, callback: Callable[[Any], None]) -> None:
        self._ended.pop(callback, None)

    # Its life

    def is_waiting(self) -> bool:
        """For somebody else's transaction."""
        return self._waiting and self._awaited is not None and not self._awaited.done()

    def is_closed(self) -> bool:
        return self._closed

    def get_server_pid(self) -> int:
        return self.pid

    async def close(self, *, timeout: float | None = None) -> None:
        self.die()

    def terminate(self) -> None:
        self.die()

    async def reset(self, *, timeout: float | None = None) -> None:
        """Before the pool gives it to somebody else."""
        self.listeners.clear()
        self.abort()

    def abort(self) -> None:
        if self.transaction_open is not None:
            self.transaction_open.rollback()
            self.transaction_open = None

    def die(self) -> None:
        """At once: open work is rolled back, locks are free, whoever waits for an answer hears it."""
        if self._closed:
            return
        self._closed = True
        self.abort()
        self.database.forget(self)
        self.session.commit()
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(_cut())
        loop = asyncio.get_running_loop()
        for callback, context in self._ended.items():
            loop.call_soon(callback, self, context=context)


@types.coroutine
def _others_first() -> Generator[None, None, None]:
    """asyncio.sleep(0)."""
    yield


def _cut() -> asyncpg.PostgresError:
    return asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


def _arrive(arrival: asyncio.Future[None]) -> None:
    if not arrival.done():
        arrival.set_result(None)


class Block:
    """A transaction; inside of another one, a savepoint of it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.savepoint: int | None = None

    async def start(self) -> None:
        await self.connection.control(self._start)

    def _start(self) -> None:
        connection = self.connection
        if connection.transaction_open is None:
            connection.transaction_open = Transaction(connection.database.clock())
        elif connection.transaction_open.failed:
            raise postgres(
                asyncpg.InFailedSQLTransactionError,
                "current transaction is aborted, commands ignored until end of transaction block",
            )
        else:
            self.savepoint = connection.transaction_open.mark()
            connection.transaction_open.savepoints.append(self.savepoint)

    async def commit(self) -> None:
        await self.connection.control(self._commit)

    def _commit(self) -> None:
        connection, tx = self.connection, self._tx()
        if self.savepoint is not None:
            if tx.failed:
                raise postgres(
                    asyncpg.InFailedSQLTransactionError,
                    "current transaction is aborted, commands ignored until end of transaction block",
                )
            tx.savepoints.pop()
            return
        connection.transaction_open = None
        if tx.failed:
            tx.rollback()
            return
        tx.commit()
        connection.database.tell(tx, connection.pid)

    async def rollback(self) -> None:
        await self.connection.control(self._rollback)

    def _rollback(self) -> None:
        tx = self._tx()
        if self.savepoint is not None:
            tx.back_to(self.savepoint)
            tx.savepoints.pop()
            tx.failed = False
        else:
            self.connection.abort()

    def _tx(self) -> Transaction:
        if self.connection.transaction_open is None:
            raise asyncpg.InterfaceError("there is no transaction in progress")
        return self.connection.transaction_open

    async def __aenter__(self) -> Block:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await (self.commit() if kind is None else self.rollback())
