"""Two sessions whose statements interleave as a script says, on the real PostgreSQL and on the simulation's.

A step either has its outcome or waits for the other session; nobody looks at a clock to tell which: PostgreSQL is asked
whom it makes wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.sim.twins import Outcome, outcome

Statement = tuple[str, tuple[Any, ...]]
"""Text and arguments; `begin`, `commit`, `rollback` are transactions' ends."""


@dataclass(slots=True)
class Session:
    connection: Any
    blocked: Callable[[], Awaitable[bool]]
    block: Any = None
    pending: asyncio.Task[Outcome] | None = None

    async def start(self, statement: Statement) -> None:
        self.pending = asyncio.create_task(outcome(self._step(*statement)))

    async def _step(self, text: str, args: tuple[Any, ...]) -> Any:
        if text == "begin":
            self.block = self.connection.transaction()
            return await self.block.start()
        if text in ("commit", "rollback"):
            block, self.block = self.block, None
            return await (block.commit() if text == "commit" else block.rollback())
        return await self.connection.fetch(text, *args)

    async def settled(self) -> Any:
        """The outcome of what is pending, "waits", or None when nothing is."""
        if self.pending is None:
            return None
        while not self.pending.done():
            if await self.blocked():
                return "waits"
        done, self.pending = self.pending, None
        return done.result().comparable(ordered=False)

    async def end(self) -> None:
        """Nothing pending, nothing open."""
        if self.pending is not None:
            await self.pending
            self.pending = None
        if self.block is not None:
            await self._step("rollback", ())


@dataclass(slots=True)
class World:
    """One database with its two sessions."""

    sessions: list[Session]
    seen: list[Any] = field(default_factory=list)

    async def play(self, steps: Sequence[tuple[int, Statement]]) -> list[Any]:
        """What each step came to. A session that waits skips nothing: its next steps come once it is free."""
        queues: list[list[Statement]] = [[], []]
        self.seen = []
        for actor, statement in steps:
            queues[actor].append(statement)
            await self._advance(queues)
        while any(queues):
            await self._advance(queues)
        for session in self.sessions:
            await session.end()
        return self.seen

    async def _advance(self, queues: list[list[Statement]]) -> None:
        for actor, session in enumerate(self.sessions):
            if session.pending is None and queues[actor]:
                statement = queues[actor].pop(0)
                await session.start(statement)
                self.seen.append((actor, statement[0], await session.settled()))
                await self._others(actor)

    async def _others(self, actor: int) -> None:
        """Whoever waited may go on now."""
        for number, session in enumerate(self.sessions):
            if number != actor and session.pending is not None:
                self.seen.append((number, "later", await session.settled()))


def real_session(connection: Any, watcher: Any) -> Session:
    pid = connection.get_server_pid()

    async def blocked() -> bool:
        """By a session: autovacuum may hold a table for a moment, too."""
        by = """select count(*) from pg_stat_activity
                where pid = any(pg_blocking_pids($1)) and backend_type = 'client backend'"""
        return bool(await watcher.fetchval(by, pid))

    return Session(connection, blocked)


def simulated_session(connection: Any) -> Session:
    async def blocked() -> bool:
        await asyncio.sleep(0)
        return bool(connection.is_waiting())

    return Session(connection, blocked)


__all__ = ["Session", "Statement", "World", "real_session", "simulated_session"]
