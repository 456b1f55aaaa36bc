"""What the agent must not forget: orders and their results, cancels, epochs, and the facts not yet committed.

One SQLite file under the state directory. Its id is the host's *generation*: facts are numbered and orders are
addressed under it, so that a lost or restored journal is noticed by everybody.

**Orders.** An accepted order is on the disk before it is acknowledged; its result and the fact that tells it are
written in one transaction. The envelope goes when the order ends (it may hold a storage password); id, outcome
and result stay until the owner committed the fact, and then for a day, so that a repeat gets the first answer.
The highest epoch, sequence and order id of every object stay for ever.

**Facts.** Each owner has its own numbers. States carry a key: a newer state of the same key takes the older one
out of the spool, number and all. That is no gap, and the owner can tell: every fact is published with the number
of the fact that is now before it (`after_seq`), so "I have committed at least `after_seq`" means that nothing
between was anything but superseded. A fact that was dropped because the spool was full does leave a gap:
`after_seq` never goes below the highest dropped number until a full report bridges it. A report that an owner
asked for begins a new base, `after_seq` 0: unfinished business (results, events) is numbered again before it,
states before it are forgotten, since the report says them all.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from host_agent.database import Database
from host_agent.rules import CLOSES, Known, judge
from volery.contracts.agent import (
    NO_RESULT,
    CommittedWord,
    JournalOrder,
    OrderAck,
    OrderEnvelope,
    OrderFinished,
    OrderState,
    Outcome,
)
from volery.contracts.base import Fact, encode
from volery.contracts.errors import Kind, Problem

REMEMBER_SECONDS = 86_400.0
"""How long the id of a finished and committed order is kept with its answer."""
REMEMBER_CANCELS_SECONDS = 7 * 86_400.0

SCHEMA = """
create table if not exists meta (name text primary key, value text not null) without rowid;
create table if not exists boots (boot_id text primary key, ordinal integer not null) without rowid;
create table if not exists orders (
    order_id text primary key, owner text not null, kind text not null, object_id text not null,
    epoch integer not null, order_seq integer not null, state text not null,
    envelope blob, trace text, boot_id text not null, accepted_ms integer not null,
    outcome text, problem blob, result blob,
    fact_seq integer, committed_at real) without rowid;
create index if not exists orders_unfinished on orders (state) where state = 'accepted';
create index if not exists orders_committed on orders (committed_at) where committed_at is not null;
create table if not exists cancels (order_id text primary key, at real not null) without rowid;
create table if not exists objects (
    owner text not null, object_id text not null, epoch integer not null, order_seq integer not null,
    order_id text not null, closed_epoch integer not null default 0,
    primary key (owner, object_id)) without rowid;
create table if not exists fencing (owner text primary key, token integer not null) without rowid;
create table if not exists owners (
    owner text primary key, head integer not null default 0, committed integer not null default 0,
    dropped integer not null default 0, base integer not null default 0,
    gap integer not null default 0, bytes integer not null default 0) without rowid;
create table if not exists facts (
    id integer primary key, owner text not null, seq integer not null, subject text not null,
    class text not null, key text, body blob not null);
create unique index if not exists facts_in_order on facts (owner, seq);
create unique index if not exists facts_by_key on facts (owner, key) where key is not null;
create index if not exists facts_to_drop on facts (class, id);
create trigger if not exists facts_grow after insert on facts begin
    update owners set bytes = bytes + length(new.body) where owner = new.owner; end;
create trigger if not exists facts_shrink after delete on facts begin
    update owners set bytes = bytes - length(old.body) where owner = old.owner; end;
"""


class FactClass(StrEnum):
    """What may happen to a fact when a newer one comes, or the spool is full."""

    STATE = "state"
    EVENT = "event"
    """Kept, but dropped before a result when the spool is full."""
    RESULT = "result"
    """Never coalesced, never dropped."""
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Spooled:
    """A fact on the disk, ready to be published: `body` is stamped with its numbers."""

    owner: str
    seq: int
    after_seq: int
    subject: str
    body: bytes


@dataclass(frozen=True, slots=True)
class JournaledOrder:
    """An accepted order that has not ended."""

    envelope: OrderEnvelope
    trace: str
    """Its `traceparent`, or ""."""
    boot_id: str
    accepted_ms: int
    """On the host's boot clock."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A number kept for a report that is being put together: what happens meanwhile comes after it."""

    owner: str
    seq: int
    gap: bool
    renumbered: tuple[Spooled, ...] = ()


@dataclass(frozen=True, slots=True)
class Intake:
    """What became of an order that came: the answer, and whether it must be run now."""

    ack: OrderAck
    fresh: bool


_raw_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_envelope = msgspec.json.Decoder(OrderEnvelope)
_problem = msgspec.json.Decoder(Problem)


def progress_key(order_id: str) -> str:
    """Under which the newest progress of an order is spooled; its result takes it away."""
    return f"progress:{order_id}"


def stamp(body: bytes, generation: str, seq: int, after_seq: int) -> bytes:
    """The fact with its numbers filled in, which are settled only when it is published."""
    fields = _raw_object.decode(body)
    numbers = {"generation": generation, "seq": seq, "after_seq": after_seq}
    fields |= {name: msgspec.Raw(encode(value)) for name, value in numbers.items()}
    return encode(fields)


def _ack(row: sqlite3.Row) -> OrderAck:
    return OrderAck(
        order_id=row["order_id"],
        state=OrderState(row["state"]),
        problem=_problem.decode(row["problem"]) if row["problem"] is not None else None,
        outcome=Outcome(row["outcome"]) if row["outcome"] is not None else None,
        result=NO_RESULT if row["result"] is None else msgspec.Raw(row["result"]),
    )


class Journal:
    """Every method that changes something returns after it is on the disk."""

    def __init__(
        self, database: Database, boot_id: str, spool_max_bytes: int, max_waiting_orders: int
    ) -> None:
        self._database = database
        self._spool_max_bytes = spool_max_bytes
        self._max_waiting_orders = max_waiting_orders
        self.boot_id = boot_id
        self.generation = ""
        self.boot_ordinal = 0

    @classmethod
    async def open(
        cls,
        path: Path,
        boot_id: str,
        spool_max_bytes: int = 256 * 1024 * 1024,
        max_waiting_orders: int = 2000,
    ) -> Journal:
        """Opens or makes it. Raises sqlite3.Error for a file that is damaged."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        journal = cls(Database(path, SCHEMA), boot_id, spool_max_bytes, max_waiting_orders)
        await journal._database.do(journal._begin)
        return journal

    async def close(self) -> None:
        await self._database.close()

    def on_spooled(self, tell: Callable[[list[Spooled | Reservation]], None]) -> None:
        """`tell` is called on the event loop with what reached the disk, in the order of its numbers."""

        def after_commit(results: list[Any]) -> None:
            if spooled := [result for result in results if isinstance(result, Spooled | Reservation)]:
                tell(spooled)

        self._database.after_commit = after_commit

    def _begin(self, db: sqlite3.Connection) -> None:
        db.execute(
            "insert into meta (name, value) values ('generation', ?) on conflict do nothing",
            (str(uuid.uuid4()),),
        )
        (self.generation,) = db.execute("select value from meta where name = 'generation'").fetchone()
        sql = """insert into boots (boot_id, ordinal) select ?, coalesce(max(ordinal), 0) + 1 from boots
                 where true on conflict do nothing"""
        db.execute(sql, (self.boot_id,))
        sql = "select ordinal from boots where boot_id = ?"
        (self.boot_ordinal,) = db.execute(sql, (self.boot_id,)).fetchone()
        _prune(db)

    # Orders

    async def accept(
        self, order: OrderEnvelope, raw: bytes, trace: str, now_ms: int, problem: Problem | None
    ) -> Intake:
        """Takes an order in, once: a repeat gets the first answer, also when it is late.

        `problem` is what already speaks against it (too old); it counts only if the order is new.
        """
        return await self._database.do(lambda db: self._accept(db, order, raw, trace, now_ms, problem))

    def _accept(
        self,
        db: sqlite3.Connection,
        order: OrderEnvelope,
        raw: bytes,
        trace: str,
        now_ms: int,
        problem: Problem | None,
    ) -> Intake:
        sql = "select order_id, state, problem, outcome, result from orders where order_id = ? and owner = ?"
        if (row := db.execute(sql, (order.order_id, order.owner)).fetchone()) is not None:
            return Intake(_ack(row), fresh=False)
        problem = problem or self._overload(db) or judge(order, _known(db, order))
        if problem is not None:
            refused = OrderAck(order_id=order.order_id, state=OrderState.REFUSED, problem=problem)
            return Intake(refused, fresh=False)
        self._insert(db, order, OrderState.ACCEPTED, raw, trace, now_ms)
        sql = """insert into objects (owner, object_id, epoch, order_seq, order_id) values (?, ?, ?, ?, ?)
                 on conflict (owner, object_id) do update set
                 epoch = excluded.epoch, order_seq = excluded.order_seq, order_id = excluded.order_id"""
        db.execute(sql, (order.owner, order.object_id, order.epoch, order.order_seq, order.order_id))
        sql = """insert into fencing (owner, token) values (?, ?)
                 on conflict (owner) do update set token = max(token, excluded.token)"""
        db.execute(sql, (order.owner, order.fencing_token))
        return Intake(OrderAck(order_id=order.order_id, state=OrderState.ACCEPTED), fresh=True)

    def _overload(self, db: sqlite3.Connection) -> Problem | None:
        waiting = db.execute("select count(*) from orders where state = 'accepted'").fetchone()[0]
        if waiting < self._max_waiting_orders and _spool_bytes(db) <= self._spool_max_bytes:
            return None
        return Problem(
            kind=Kind.EXHAUSTED,
            message=f"the host has {waiting} orders to do and {_spool_bytes(db)} bytes of results that nobody"
            " committed: send the order again when some have ended",
            details={"waiting": waiting},
        )

    def _insert(
        self,
        db: sqlite3.Connection,
        order: OrderEnvelope,
        state: OrderState,
        raw: bytes | None,
        trace: str,
        now_ms: int,
        problem: Problem | None = None,
    ) -> None:
        sql = """insert into orders (order_id, owner, kind, object_id, epoch, order_seq, state, envelope, trace,
                 boot_id, accepted_ms, problem, committed_at) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
        subject = (order.order_id, order.owner, order.kind, order.object_id, order.epoch, order.order_seq)
        refused_at = None if problem is None else time.time()
        said = None if problem is None else encode(problem)
        db.execute(sql, (*subject, state, raw, trace, self.boot_id, now_ms, said, refused_at))

    async def refuse(self, order: OrderEnvelope, problem: Problem, now_ms: int) -> OrderAck:
        """Refuses an order for good: no later copy is obeyed, though the agent may have learnt its kind by then."""

        def work(db: sqlite3.Connection) -> OrderAck:
            sql = "select order_id, state, problem, outcome, result from orders where order_id = ? and owner = ?"
            if (row := db.execute(sql, (order.order_id, order.owner)).fetchone()) is not None:
                return _ack(row)
            self._insert(db, order, OrderState.REFUSED, None, "", now_ms, problem)
            return OrderAck(order_id=order.order_id, state=OrderState.REFUSED, problem=problem)

        return await self._database.do(work)

    async def finish(
        self,
        order: OrderEnvelope,
        fact: Fact[OrderFinished],
        finished: OrderFinished,
    ) -> Spooled:
        """The result of an order and the fact that tells it, in one transaction."""

        def work(db: sqlite3.Connection) -> Spooled:
            spooled = self._spool(
                db, order.owner, fact.subject_for(finished), FactClass.RESULT, None, encode(finished)
            )
            sql = """update orders set state = 'finished', outcome = ?, problem = ?, result = ?, envelope = null,
                     fact_seq = ? where order_id = ?"""
            problem = None if finished.problem is None else encode(finished.problem)
            db.execute(sql, (finished.outcome, problem, bytes(finished.result), spooled.seq, order.order_id))
            sql = "delete from facts where owner = ? and key = ?"
            db.execute(sql, (order.owner, progress_key(order.order_id)))
            if order.kind in CLOSES and finished.outcome is Outcome.SUCCEEDED:
                sql = """update objects set closed_epoch = max(closed_epoch, ?)
                         where owner = ? and object_id = ?"""
                db.execute(sql, (order.epoch, order.owner, order.object_id))
            return spooled

        return await self._database.do(work)

    async def cancel(self, order_id: str) -> OrderAck:
        """Journals the cancel; how far the order is. `unknown`: it will be refused should it come."""

        def work(db: sqlite3.Connection) -> OrderAck:
            sql = "select order_id, state, problem, outcome, result from orders where order_id = ?"
            if (row := db.execute(sql, (order_id,)).fetchone()) is not None:
                return _ack(row)
            sql = "insert into cancels (order_id, at) values (?, ?) on conflict do nothing"
            db.execute(sql, (order_id, time.time()))
            return OrderAck(order_id=order_id, state=OrderState.UNKNOWN)

        return await self._database.do(work)

    async def unfinished(self) -> list[JournaledOrder]:
        """What a former run of the agent accepted and didn't end, in the order in which it came."""

        def work(db: sqlite3.Connection) -> list[JournaledOrder]:
            sql = """select envelope, trace, boot_id, accepted_ms from orders where state = 'accepted'
                     order by object_id, order_seq"""
            return [
                JournaledOrder(_envelope.decode(row[0]), row[1], row[2], row[3]) for row in db.execute(sql)
            ]

        return await self._database.do(work)

    async def orders_of(self, owner: str) -> tuple[JournalOrder, ...]:
        """The owner's orders that it has not seen the end of."""

        def work(db: sqlite3.Connection) -> tuple[JournalOrder, ...]:
            sql = """select order_id, state, outcome from orders
                     where owner = ? and committed_at is null order by order_id"""
            return tuple(
                JournalOrder(
                    order_id=row[0],
                    owner=owner,
                    state=OrderState(row[1]),
                    outcome=None if row[2] is None else Outcome(row[2]),
                )
                for row in db.execute(sql, (owner,))
            )

        return await self._database.do(work)

    async def learn(self, owner: str, seen: Iterable[tuple[str, int, int]]) -> None:
        """Raises what is known of objects to what their domains' metadata say: (object id, epoch, order_seq)."""
        rows = [(owner, object_id, epoch, order_seq) for object_id, epoch, order_seq in seen]

        def work(db: sqlite3.Connection) -> None:
            sql = """insert into objects (owner, object_id, epoch, order_seq, order_id) values (?, ?, ?, ?, '')
                     on conflict (owner, object_id) do update set
                     epoch = max(epoch, excluded.epoch), order_seq = max(order_seq, excluded.order_seq)
                     where excluded.epoch > epoch or excluded.order_seq > order_seq"""
            db.executemany(sql, rows)

        if rows:
            await self._database.do(work)

    # Facts

    async def put(
        self, owner: str, subject: str, body: bytes, fact_class: FactClass, key: str | None = None
    ) -> Spooled:
        """Spools a fact. A state takes the place of the older one with its key."""
        return await self._database.do(lambda db: self._spool(db, owner, subject, fact_class, key, body))

    def _spool(
        self,
        db: sqlite3.Connection,
        owner: str,
        subject: str,
        fact_class: FactClass,
        key: str | None,
        body: bytes,
        seq: int = 0,
    ) -> Spooled:
        if key is not None:
            db.execute("delete from facts where owner = ? and key = ?", (owner, key))
        seq = seq or _next_seq(db, owner)
        sql = "insert into facts (owner, seq, subject, class, key, body) values (?, ?, ?, ?, ?, ?)"
        db.execute(sql, (owner, seq, subject, fact_class, key, body))
        self._make_room(db)
        return self._spooled(db, owner, seq, subject, body)

    def _spooled(self, db: sqlite3.Connection, owner: str, seq: int, subject: str, body: bytes) -> Spooled:
        sql = """select max(committed, coalesce((select max(seq) from facts where owner = o.owner and seq < ?), 0),
                 case when dropped < ? then dropped else 0 end) as after_seq, base from owners o where owner = ?"""
        after_seq, base = db.execute(sql, (seq, seq, owner)).fetchone()
        if seq == base:
            after_seq = 0
        return Spooled(owner, seq, after_seq, subject, stamp(body, self.generation, seq, after_seq))

    def _make_room(self, db: sqlite3.Connection) -> None:
        """The oldest states go first, then events; results never: too many of them stop new orders instead."""
        excess = _spool_bytes(db) - self._spool_max_bytes
        if excess <= 0:
            return
        for classes in ((FactClass.STATE, FactClass.REPORT), (FactClass.EVENT,)):
            sql = f"""select id, owner, seq, length(body) from facts
                      where class in ({", ".join("?" * len(classes))}) order by id"""
            for row in db.execute(sql, classes).fetchall():
                if excess <= 0:
                    return
                db.execute("delete from facts where id = ?", (row[0],))
                sql = "update owners set dropped = max(dropped, ?), gap = 1 where owner = ?"
                db.execute(sql, (row[2], row[1]))
                excess -= row[3]

    async def pending(self, owner: str, after: int, limit: int) -> list[Spooled]:
        """The owner's uncommitted facts with numbers above `after`, oldest first."""

        def work(db: sqlite3.Connection) -> list[Spooled]:
            sql = "select seq, subject, body from facts where owner = ? and seq > ? order by seq limit ?"
            return [
                self._spooled(db, owner, row[0], row[1], row[2])
                for row in db.execute(sql, (owner, after, limit)).fetchall()
            ]

        return await self._database.do(work)

    async def positions(self) -> dict[str, tuple[int, int, bool]]:
        """Per owner: the highest number given, the highest committed, whether facts were dropped."""

        def work(db: sqlite3.Connection) -> dict[str, tuple[int, int, bool]]:
            rows = db.execute("select owner, head, committed, gap from owners")
            return {row[0]: (row[1], row[2], bool(row[3])) for row in rows}

        return await self._database.do(work)

    async def trim(self, word: CommittedWord) -> bool:
        """Forgets what the owner has committed. False: it has committed more than this journal ever said."""

        def work(db: sqlite3.Connection) -> bool:
            row = db.execute("select head, committed from owners where owner = ?", (word.owner,)).fetchone()
            head, committed = row or (0, 0)
            if word.seq > head:
                return False
            if word.seq <= committed:
                return True
            db.execute("delete from facts where owner = ? and seq <= ?", (word.owner, word.seq))
            db.execute("update owners set committed = ? where owner = ?", (word.seq, word.owner))
            sql = """update orders set committed_at = ?
                     where owner = ? and fact_seq <= ? and committed_at is null"""
            db.execute(sql, (time.time(), word.owner, word.seq))
            _prune(db)
            return True

        if word.generation != self.generation:
            return True
        return await self._database.do(work)

    async def renew_generation(self) -> str:
        """A new identity for a journal that turned out to be an old copy of itself."""

        def work(db: sqlite3.Connection) -> str:
            generation = str(uuid.uuid4())
            db.execute("update meta set value = ? where name = 'generation'", (generation,))
            db.execute("update owners set committed = 0, gap = 1")
            self.generation = generation
            return generation

        return await self._database.do(work)

    async def begin_report(self, owner: str, rebase: bool) -> Reservation:
        """Keeps a number for a report, before anything is looked at. With `rebase`, or after facts were dropped,
        what the owner has not committed is numbered again just before it."""
        return await self._database.do(lambda db: self._begin_report(db, owner, rebase))

    def _begin_report(self, db: sqlite3.Connection, owner: str, rebase: bool) -> Reservation:
        db.execute("insert into owners (owner) values (?) on conflict do nothing", (owner,))
        sql = "select head, gap from owners where owner = ?"
        head, gap = db.execute(sql, (owner,)).fetchone()
        if not rebase and not gap:
            return Reservation(owner, _next_seq(db, owner), gap=False)
        db.execute("delete from facts where owner = ? and class in ('state', 'report')", (owner,))
        sql = "update owners set dropped = 0, gap = 0, base = ? where owner = ?"
        db.execute(sql, (head + 1, owner))
        sql = "select id, seq, subject, body from facts where owner = ? order by seq"
        renumbered = []
        for row in db.execute(sql, (owner,)).fetchall():
            seq = _next_seq(db, owner)
            db.execute("update facts set seq = ? where id = ?", (seq, row[0]))
            sql = "update orders set fact_seq = ? where owner = ? and fact_seq = ?"
            db.execute(sql, (seq, owner, row[1]))
            renumbered.append((seq, row[2], row[3]))
        spooled = tuple(self._spooled(db, owner, *fact) for fact in renumbered)
        return Reservation(owner, _next_seq(db, owner), bool(gap), spooled)

    async def put_report(self, reservation: Reservation, subject: str, body: bytes) -> Spooled:
        """The report under its number. States before it are forgotten: it says them all."""

        def work(db: sqlite3.Connection) -> Spooled:
            owner, seq = reservation.owner, reservation.seq
            db.execute("delete from facts where owner = ? and seq < ? and class = 'state'", (owner, seq))
            return self._spool(db, owner, subject, FactClass.REPORT, "report", body, seq)

        return await self._database.do(work)


def _next_seq(db: sqlite3.Connection, owner: str) -> int:
    sql = """insert into owners (owner, head) values (?, 1)
             on conflict (owner) do update set head = head + 1 returning head"""
    return int(db.execute(sql, (owner,)).fetchone()[0])


def _spool_bytes(db: sqlite3.Connection) -> int:
    return int(db.execute("select coalesce(sum(bytes), 0) from owners").fetchone()[0])


def _known(db: sqlite3.Connection, order: OrderEnvelope) -> Known:
    sql = "select epoch, order_seq, order_id, closed_epoch from objects where owner = ? and object_id = ?"
    row = db.execute(sql, (order.owner, order.object_id)).fetchone() or (0, 0, "", 0)
    token = db.execute("select token from fencing where owner = ?", (order.owner,)).fetchone()
    cancelled = db.execute("select 1 from cancels where order_id = ?", (order.order_id,)).fetchone()
    return Known(
        epoch=row[0],
        order_seq=row[1],
        order_id=row[2],
        closed_epoch=row[3],
        fencing_token=token[0] if token else 0,
        cancelled=cancelled is not None,
    )


def _prune(db: sqlite3.Connection) -> None:
    now = time.time()
    db.execute("delete from orders where committed_at < ?", (now - REMEMBER_SECONDS,))
    db.execute("delete from cancels where at < ?", (now - REMEMBER_CANCELS_SECONDS,))
