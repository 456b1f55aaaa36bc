"""A host's disk under its agent's journal: SQLite in memory that outlives the agent and the host's reboot.

The real `Database` with its thread in place of: works that wait together share one transaction, and what was not
committed when the agent died never happened.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from host_agent.database import Database

T = TypeVar("T")
COMMIT_SECONDS = 0.002


class Disk:
    """Files of one host."""

    def __init__(self) -> None:
        self.files: dict[Path, sqlite3.Connection] = {}
        self.connected: dict[str, str] = {}
        """The agent's `storage.json`: storage domain → path."""
        self.full = False
        """Nothing can be written."""

    def open(self, path: Path, schema: str) -> MemoryDatabase:
        connection = self.files.get(path)
        if connection is None:
            connection = sqlite3.connect(":memory:", isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.executescript(schema)
            self.files[path] = connection
        if connection.in_transaction:
            connection.execute("rollback")
        return MemoryDatabase(connection, self)

    def lose(self) -> None:
        """A new disk."""
        self.files.clear()
        self.connected.clear()


class MemoryDatabase(Database):
    def __init__(self, connection: sqlite3.Connection, disk: Disk) -> None:
        self.after_commit: Callable[[list[Any]], None] | None = None
        self._connection = connection
        self._disk = disk
        self._works_waiting: list[tuple[Callable[[sqlite3.Connection], Any], asyncio.Future[Any]]] = []

    async def do(self, run: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._works_waiting.append((run, future))
        if len(self._works_waiting) == 1:
            loop.call_later(COMMIT_SECONDS, self._flush)
        result: T = await asyncio.shield(future)
        return result

    async def close(self) -> None:
        if self._works_waiting:
            await asyncio.sleep(2 * COMMIT_SECONDS)

    def _flush(self) -> None:
        works, self._works_waiting = self._works_waiting, []
        outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
        self._connection.execute("begin immediate")
        for run, future in works:
            outcomes.append((future, *self._one(run)))
        if self._disk.full:
            self._connection.execute("rollback")
            full = sqlite3.OperationalError("database or disk is full")
            outcomes = [(future, None, full) for future, _, _ in outcomes]
        else:
            self._connection.execute("commit")
        if self.after_commit is not None:
            self.after_commit([result for _, result, error in outcomes if error is None])
        for future, result, error in outcomes:
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _one(self, run: Callable[[sqlite3.Connection], Any]) -> tuple[Any, BaseException | None]:
        self._connection.execute("savepoint work")
        result, problem = None, None
        try:
            result = run(self._connection)
        except Exception as error:  # the waiter gets it, as from the thread
            problem = error
            self._connection.execute("rollback to work")
        self._connection.execute("release work")
        return result, problem
