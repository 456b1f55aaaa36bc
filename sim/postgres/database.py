"""The database: its owners' schemas, who is connected, and what can befall it."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, cast

import asyncpg
from sqlglot import exp

from sim.postgres import parse
from sim.postgres.connection import Connection
from sim.postgres.ddl import Schema
from sim.postgres.errors import Blocked, Unsupported
from sim.postgres.plan import Plan, compile_statement
from sim.postgres.pool import Pool
from sim.postgres.record import Record, record_type, records
from sim.postgres.tables import Values
from sim.postgres.transactions import Command, Transaction
from volery.runtime import clock as clocks
from volery.runtime.database import apply_migrations

MOST_ANSWERS = 100
"""That are kept of one statement."""


class Answer(NamedTuple):
    records: list[Record]
    tag: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was committed: schema → table → rows and the identity's counter."""

    contents: dict[str, dict[str, tuple[tuple[Values, ...], int]]]


@dataclass(slots=True)
class _Known:
    """A compiled statement, and what it answered since its tables last changed: programs ask much again and again."""

    plan: Plan
    kind: type[Record]
    stamp: int = -1
    """The versions of its tables, added up: none of them ever goes back."""
    answers: dict[Any, Answer] = field(default_factory=dict)

    def recall(self, args: tuple[Any, ...]) -> Answer | None:
        stamp = 0
        for table in self.plan.tables:
            stamp += table.version
        if self.stamp != stamp:
            return None
        try:
            return self.answers.get(args)
        except TypeError:  # an array is a list
            return self.answers.get(_hashable(args))

    def remember(self, args: Any, answer: Answer) -> None:
        stamp = sum([table.version for table in self.plan.tables])
        if self.stamp != stamp or len(self.answers) >= MOST_ANSWERS:
            self.answers.clear()
            self.stamp = stamp
        self.answers[args] = answer


@dataclass(slots=True)
class _Plans:
    """Of one schema, as long as it doesn't change."""

    version: int
    known: dict[str, _Known]


class Database:
    """`latency` gives the seconds of one way between client and server, `clock` the server's time."""

    def __init__(
        self,
        seed: int = 0,
        *,
        clock: Callable[[], datetime] = clocks.utc_now,
        latency: Callable[[], float] | None = None,
    ) -> None:
        self.clock = clock
        self.latency = latency or (lambda: 0.0)
        self.random = random.Random(seed)
        self.schemas: dict[str, Schema] = {}
        self.sessions: dict[Connection, None] = {}
        self.up = True
        self._plans: dict[str, _Plans] = {}
        self._commands = 0
        self._pids = 0
        self._advisory: dict[int, tuple[Transaction, int]] = {}

    # Connecting

    @asynccontextmanager
    async def pool(self, owner: str, max_size: int = 8) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
        """As volery.runtime.database.open_pool. Raises OSError while the database is away."""
        made = Pool(lambda: self._connection(owner), max_size)
        made.give_back(await made.take())
        try:
            yield cast("asyncpg.Pool[asyncpg.Record]", made)
        finally:
            await made.close()

    @asynccontextmanager
    async def connect(self, owner: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """As volery.runtime.database.open_direct."""
        connection = self._connection(owner)
        try:
            yield cast("asyncpg.Connection[asyncpg.Record]", connection)
        finally:
            await connection.close()

    async def migrate(self, owner: str) -> None:
        """As volery.runtime.database.migrate, whose statements it runs."""
        async with self.connect(owner) as connection:
            await apply_migrations(connection, owner)

    def _connection(self, owner: str) -> Connection:
        if not self.up:
            raise ConnectionRefusedError(111, "the simulated PostgreSQL is away")
        self._pids += 1
        connection = Connection(self, self.schema(owner), self._pids)
        self.sessions[connection] = None
        return connection

    def schema(self, owner: str) -> Schema:
        return self.schemas.setdefault(str(owner), Schema(str(owner)))

    def forget(self, connection: Connection) -> None:
        """A connection has ended: its session's locks are free."""
        self.sessions.pop(connection, None)
        for key, (holder, _) in list(self._advisory.items()):
            if holder is connection.session:
                del self._advisory[key]

    # Running

    def next_command(self) -> int:
        self._commands += 1
        return self._commands

    def run(
        self, connection: Connection, tx: Transaction, text: str, args: tuple[Any, ...], *, script: bool
    ) -> Answer:
        """Carry out a statement, or a script of them, in one piece. Raises Blocked, Unsupported, asyncpg's errors."""
        plan = self._plan(connection.schema, text)
        if plan is not None:
            return self._execute(connection, tx, plan, args)
        nodes = parse.statements(text)
        if len(nodes) > 1 and not script:
            raise asyncpg.PostgresSyntaxError("cannot insert multiple commands into a prepared statement")
        answer = Answer([], "")
        for node in nodes:
            answer = self._statement(connection, tx, node, text, args)
        return answer

    def _statement(
        self, connection: Connection, tx: Transaction, node: parse.Statement, text: str, args: tuple[Any, ...]
    ) -> Answer:
        try:
            if isinstance(node, exp.Set):
                return self._set(connection, node)
            tag = connection.schema.define(node, tx)
            if tag is not None:
                return Answer([], tag)
            assert isinstance(node, exp.Expr)
            plan = compile_statement(node, connection.schema.tables, connection.schema.views)
        except Unsupported as error:
            raise Unsupported(error.what, text) from None
        kept = _Known(plan, record_type(plan.columns))
        if len(parse.statements(text)) == 1:
            self._plans[connection.schema.name].known[text] = kept
        return self._execute(connection, tx, kept, args)

    def recall(self, schema: Schema, text: str, args: tuple[Any, ...]) -> Answer | None:
        """What a statement that is a transaction of its own must answer, if nothing changed since it was last asked."""
        kept = self._plan(schema, text)
        if kept is None or not kept.plan.steady:
            return None
        return kept.recall(args)

    def _plan(self, schema: Schema, text: str) -> _Known | None:
        plans = self._plans.get(schema.name)
        if plans is None or plans.version != schema.version:
            plans = self._plans[schema.name] = _Plans(schema.version, {})
        return plans.known.get(text)

    def plan(self, owner: str, text: str) -> Plan:
        """A query or writing statement compiled, without running it. Raises Unsupported, asyncpg's errors."""
        (node,) = parse.statements(text)
        assert isinstance(node, exp.Expr)
        try:
            return compile_statement(node, self.schema(owner).tables, self.schema(owner).views)
        except Unsupported as error:
            raise Unsupported(error.what, text) from None

    def _execute(
        self, connection: Connection, tx: Transaction, kept: _Known, args: tuple[Any, ...]
    ) -> Answer:
        plan, alone = kept.plan, not tx.touched
        rows, tag = plan.execute(connection.command(tx), plan.arguments(args))
        answer = Answer(records(kept.kind, rows), tag)
        if plan.steady and alone and not tx.touched and not kept.kind.arrays:
            kept.remember(_hashable(args), answer)
        return answer

    def _set(self, connection: Connection, node: exp.Set) -> Answer:
        (item,) = node.expressions
        setting = item.this
        if not isinstance(setting, exp.EQ) or parse.name(setting.this) != "lock_timeout":
            raise Unsupported("this setting")
        text = str(setting.expression.this)
        if not text.endswith("s") or not text[:-1].isdigit():
            raise Unsupported("this lock_timeout")
        connection.lock_timeout = float(text[:-1]) or None
        return Answer([], "SET")

    def tell(self, tx: Transaction, pid: int) -> None:
        """Deliver what a committed transaction notified."""
        if not tx.told:
            return
        loop = asyncio.get_running_loop()
        for channel, payload in tx.told:
            for connection in self.sessions:
                for callback, context in connection.listeners.get(channel, {}).items():
                    loop.call_soon(callback, connection, pid, channel, payload, context=context)

    # What functions ask of it

    def uuid(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def advisory_lock(self, command: Command, key: int) -> None:
        holder, times = self._advisory.get(key, (command.session, 0))
        if holder is not command.session:
            raise Blocked(holder)
        self._advisory[key] = (holder, times + 1)

    def holds_lock(self, connection: object) -> bool:
        """Whether this session holds an advisory lock."""
        session = getattr(connection, "session", None)
        return any(holder is session for holder, _ in self._advisory.values())

    def try_advisory_lock(self, command: Command, key: int) -> bool:
        if self._advisory.get(key, (command.session, 0))[0] is not command.session:
            return False
        self.advisory_lock(command, key)
        return True

    def advisory_unlock(self, command: Command, key: int) -> bool:
        if key not in self._advisory or self._advisory[key][0] is not command.session:
            return False
        _, times = self._advisory[key]
        if times > 1:
            self._advisory[key] = (command.session, times - 1)
        else:
            del self._advisory[key]
            command.session.commit()  # wakes who waits for the session; those that want another lock wait again
        return True

    # What befalls it

    def kill(self, owner: str | None = None) -> int:
        """End the connections of one owner, or all: what they had open is rolled back. How many there were."""
        dying = [each for each in self.sessions if owner in (None, each.schema.name)]
        for connection in dying:
            connection.die()
        return len(dying)

    def crash(self) -> None:
        """Everything dies at once and the server is there again: what was committed survived."""
        self.kill()

    def stop(self) -> None:
        """Away until `start`."""
        self.up = False
        self.kill()

    def start(self) -> None:
        self.up = True

    def snapshot(self) -> Snapshot:
        """What is committed, as a backup has it."""
        return Snapshot(
            {
                schema.name: {
                    table.name: (tuple(row.data for row in table.rows if row.data is not None), table.counter)
                    for table in schema.tables.values()
                }
                for schema in self.schemas.values()
            }
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Everything that happened since is gone, and nobody is connected any more."""
        self.kill()
        for schema in self.schemas.values():
            backup = snapshot.contents.get(schema.name, {})
            for name, table in list(schema.tables.items()):
                rows, counter = backup.get(name, ((), 0))
                if rows and len(rows[0]) != len(table.columns):
                    raise Unsupported(f"a backup from before {schema.name}.{name} got its columns")
                table.replace(rows, counter)

    def reset(self, snapshot: Snapshot, seed: int) -> None:
        """As new, with this content: for the next run of a simulation, which keeps the compiled statements."""
        self.sessions.clear()  # of a run that has ended
        self.restore(snapshot)
        self.random.seed(seed)
        self.up = True
        self._commands = self._pids = 0
        self._advisory.clear()

    def rows(self, owner: str, table: str) -> list[dict[str, Any]]:
        """What is committed in a table, for tests."""
        found = self.schema(owner).tables[table]
        names = [column.name for column in found.columns]
        return [dict(zip(names, row.data, strict=True)) for row in found.rows if row.data is not None]


def _hashable(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([tuple(each) if isinstance(each, list) else each for each in args])
