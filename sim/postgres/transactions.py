"""Transactions: what they hold, how they are undone, and who waits for whom.

Statements run one after the other, each in one piece. A transaction of several statements holds the rows that it wrote
or locked until it ends; whoever needs one meanwhile is `Blocked`, its statement is undone, and it begins again afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import asyncpg

from sim.postgres.errors import Blocked, postgres
from sim.postgres.tables import Index, Row, Table, Values

_Undo = tuple[Row, "Transaction | None", Values | None, Values | None, int]


@dataclass(eq=False, slots=True)
class Transaction:
    """Also stands for a session, which holds its advisory locks until the connection ends."""

    now: datetime
    failed: bool = False
    """A statement of it failed: it can only be rolled back."""
    undo: list[_Undo] = field(default_factory=list)
    touched: dict[Row, list[Values]] = field(default_factory=dict)
    """Every row that it locked, with every version that it made."""
    savepoints: list[int] = field(default_factory=list)
    """Marks, the innermost last."""
    shared: dict[Row, None] = field(default_factory=dict)
    told: dict[tuple[str, str], None] = field(default_factory=dict)
    """Notifications for when it commits."""
    on_rollback: list[Callable[[], object]] = field(default_factory=list)
    """What takes back changes of the schema."""
    waits_for: Transaction | None = None
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    def mark(self) -> int:
        return len(self.undo)

    def undo_to(self, mark: int) -> None:
        while len(self.undo) > mark:
            row, writer, ahead, prior, command = self.undo.pop()
            row.writer, row.next, row.prior, row.command = writer, ahead, prior, command

    def _release(self) -> None:
        for row in self.shared:
            if row.sharers is not None:
                row.sharers.pop(self, None)
                row.sharers = row.sharers or None
        self.shared.clear()
        self.touched.clear()
        self.undo.clear()
        self._wake()

    def _wake(self) -> None:
        waiting, self.waiters = self.waiters, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    def fail(self) -> None:
        """A statement failed: what was done since the last savepoint is undone at once, and nothing more will be."""
        self.failed = True
        if self.savepoints:
            self.back_to(self.savepoints[-1])
        else:
            self.rollback()

    def back_to(self, savepoint: int) -> None:
        self.undo_to(savepoint)
        self._wake()

    def commit(self) -> None:
        for row, versions in self.touched.items():
            if row.writer is self:
                old, row.data = row.data, row.next
                row.writer = row.next = row.prior = None
                if old is not row.data:
                    row.table.version += 1
                    if old is not None:
                        versions.append(old)
            row.table.settle(row, versions)
        self._release()

    def rollback(self) -> None:
        self.undo_to(0)
        for row, versions in self.touched.items():
            row.table.settle(row, versions)
        self.told.clear()
        while self.on_rollback:
            self.on_rollback.pop()()
        self._release()

    def wait_for(self, holder: Transaction) -> asyncio.Future[None]:
        """Done when `holder` ends; then, too, call `waited`. Raises DeadlockDetectedError when it waits for this one."""
        at: Transaction | None = holder
        while at is not None:
            if at is self:
                raise postgres(asyncpg.DeadlockDetectedError, "deadlock detected")
            at = at.waits_for
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        holder.waiters.append(ended)
        self.waits_for = holder
        return ended

    def waited(self) -> None:
        self.waits_for = None


class Command:
    """One execution of one statement: what it sees, and what it has done."""

    __slots__ = ("checks", "memo", "number", "service", "session", "tx")

    def __init__(self, tx: Transaction, number: int, session: Any, service: Any) -> None:
        self.tx = tx
        self.number = number
        self.session = session
        """The transaction that stands for the connection, which holds its advisory locks."""
        self.service = service
        """The database: advisory locks and random numbers."""
        self.memo: dict[int, Any] = {}
        """What needs to be found out once per statement: CTEs, subqueries that depend on nothing."""
        self.checks: list[Callable[[], None]] = []
        """What must hold once all of it is done."""

    def see(self, row: Row) -> Values | None:
        """The row as it was when the statement began."""
        if row.writer is not self.tx:
            return row.data
        return row.prior if row.command == self.number else row.next

    def changed(self, row: Row) -> bool:
        """Whether this very statement has written it already."""
        return row.writer is self.tx and row.command == self.number

    def lock(self, row: Row, *, key_only: bool = False) -> None:
        """Nobody else writes this row until the transaction ends. Raises Blocked."""
        if row.writer is not None and row.writer is not self.tx:
            raise Blocked(row.writer)
        for holder, all_of_it in (row.sharers or {}).items():
            if holder is not self.tx and (all_of_it or not key_only):
                raise Blocked(holder)

    def own(self, row: Row) -> None:
        """Lock for update."""
        self.lock(row)
        if row.writer is None:
            self.tx.undo.append((row, row.writer, row.next, row.prior, row.command))
            row.writer, row.next, row.prior = self.tx, row.data, row.data
            row.command = 0
            self.tx.touched.setdefault(row, [])

    def share(self, row: Row, *, all_of_it: bool) -> None:
        if row.writer is not None and row.writer is not self.tx:
            raise Blocked(row.writer)
        if row.sharers is None:
            row.sharers = {}
        row.sharers[self.tx] = all_of_it or row.sharers.get(self.tx, False)
        self.tx.shared[row] = None

    def write(self, row: Row, values: Values | None) -> None:
        """Give the row its next version; None deletes it. Raises Blocked."""
        tx = self.tx
        if row.writer is not tx or row.sharers is not None:
            before = row.next if row.writer is tx else row.data
            self.lock(row, key_only=values is not None and not _moved(row.table, before, values))
        tx.undo.append((row, row.writer, row.next, row.prior, row.command))
        seen = row.next if row.writer is tx else row.data
        if not (row.writer is tx and row.command == self.number):
            row.prior = seen
        row.writer, row.next, row.command = tx, values, self.number
        versions = tx.touched.get(row)
        if versions is None:
            versions = tx.touched[row] = []
        if values is not None:
            versions.append(values)
            self._index(row, seen, values)

    def _index(self, row: Row, old: Values | None, new: Values) -> None:
        for index in row.table.indexes:
            if old is None or index.key(old) != index.key(new):
                index.add(row, new)

    def insert(self, table: Table, values: Values) -> Row:
        row = Row(table)
        table.rows[row] = None
        self.write(row, values)
        return row

    def conflicting(self, index: Index, values: Values, itself: Row | None = None) -> Row | None:
        """Another row with these values in a unique index. Raises Blocked when that isn't certain yet."""
        if index.has_null(values) or (index.where is not None and index.where(values) is not True):
            return None
        key = index.key(values)
        for row in index.of(key):
            if row is itself:
                continue
            if row.writer is None or row.writer is self.tx:
                if _holds(index, row.newest(self.tx), key):
                    return row
            elif row.next is row.data and _holds(index, row.data, key):
                return row  # it is only locked
            elif _holds(index, row.data, key) or _holds(index, row.next, key):
                raise Blocked(row.writer)
        return None


def _holds(index: Index, values: Values | None, key: Any) -> bool:
    if values is None or index.key(values) != key:
        return False
    return index.where is None or index.where(values) is True


def _moved(table: Table, old: Values | None, new: Values) -> bool:
    """Whether the key by which others name this row changed."""
    if old is None:
        return False
    return any(
        index.unique and index.where is None and index.key(old) != index.key(new) for index in table.indexes
    )
