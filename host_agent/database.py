"""One SQLite file, used by one thread of its own: writes that wait together share one transaction and one fsync."""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

BATCH_LIMIT = 256
"""Writes that share one commit: bounds how long the first one waits for the last."""


@dataclass(slots=True)
class _Work:
    run: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    result: Any = None
    error: BaseException | None = None


class Database:
    """`await do(work)` runs `work(connection)` in the thread and returns after it is on the disk.

    Works run in the order in which `do` was called, each in its own savepoint: one that raises leaves nothing
    behind and disturbs no other. Raises what the work raised, or sqlite3.Error when the disk refused the commit.
    `after_commit(results)` is called on the event loop, in commit order, before the waiters go on.
    """

    def __init__(self, path: Path, schema: str) -> None:
        self.path = path
        self.after_commit: Callable[[list[Any]], None] | None = None
        self._works: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._connection = self._open(schema)
        self._thread = threading.Thread(target=self._serve, name=f"sqlite-{path.name}", daemon=True)
        self._thread.start()

    def _open(self, schema: str) -> sqlite3.Connection:
        """A connection for the thread; the file is readable by its owner alone, since orders may hold secrets."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self.path.chmod(0o600)
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        # First, since it only counts in a file that is still empty.
        connection.execute("pragma auto_vacuum = incremental")
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        connection.execute("pragma foreign_keys = on")
        # Overwrites what is deleted: an order's body may name a storage password.
        connection.execute("pragma secure_delete = on")
        connection.executescript(schema)
        connection.execute("pragma incremental_vacuum").fetchall()
        return connection

    async def do(self, run: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        work = _Work(run, loop.create_future(), loop)
        self._works.put(work)
        # A waiter that is cancelled doesn't take back what may already be on the disk.
        result: T = await asyncio.shield(work.future)
        return result

    async def close(self) -> None:
        """After every work that was asked for is done. Closing twice is harmless."""
        self._works.put(None)
        await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        closing = False
        while not closing:
            batch: list[_Work] = []
            work = self._works.get()
            while work is not None:
                batch.append(work)
                if len(batch) >= BATCH_LIMIT or self._works.empty():
                    break
                work = self._works.get()
            closing = work is None
            if batch:
                self._commit(batch)
                batch[0].loop.call_soon_threadsafe(self._tell, batch)
        self._connection.close()

    def _commit(self, batch: list[_Work]) -> None:
        try:
            self._connection.execute("begin immediate")
            for work in batch:
                self._run(work)
            self._connection.execute("commit")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("rollback")
            for work in batch:
                work.error = work.error or error

    def _run(self, work: _Work) -> None:
        self._connection.execute("savepoint work")
        try:
            work.result = work.run(self._connection)
        except BaseException as error:
            # Not swallowed: the waiter gets it, and the thread lives on for the others.
            work.error = error
            self._connection.execute("rollback to work")
        self._connection.execute("release work")

    def _tell(self, batch: list[_Work]) -> None:
        if self.after_commit is not None:
            self.after_commit([work.result for work in batch if work.error is None])
        for work in batch:
            if work.future.cancelled():
                continue
            if work.error is not None:
                work.future.set_exception(work.error)
            else:
                work.future.set_result(work.result)
