"""What the agent must not forget: orders and their results, cancels, epochs, and the facts not yet committed.

One SQLite file under the state directory. Its id is the host's *generation*: facts are numbered and orders are
addressed under it, so that a lost or restored journal is noticed by everybody.

An accepted order is on the disk before it is acknowledged; its result and the fact that tells it are written in one
transaction. The envelope goes when the order ends (it may hold a storage password); id, outcome and result stay
until the owner committed the fact, and then for a day, so that a repeat gets the first answer. The highest epoch,
sequence and order id of every object stay for ever. How facts are kept is in `facts`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from host_agent import facts, last_told
from host_agent.database import Database
from host_agent.facts import FactClass, Position, Reservation, Spooled
from host_agent.rules import CLOSES, Known, judge
from volery.contracts.agent import (
    NO_RESULT,
    CommittedWord,
    DomainReport,
    JournalOrder,
    OrderAck,
    OrderEnvelope,
    OrderFinished,
    OrderState,
    Outcome,
)
from volery.contracts.base import Fact, encode
from volery.contracts.errors import Kind, Problem
from volery.contracts.ids import random_id
from volery.runtime.clock import utc_now

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
"""


@dataclass(frozen=True, slots=True)
class JournaledOrder:
    """An accepted order that has not ended."""

    envelope: OrderEnvelope
    trace: str
    """Its `traceparent`, or ""."""
    boot_id: str
    accepted_ms: int
    """On the host's boot clock."""
    cancelled: bool


@dataclass(frozen=True, slots=True)
class Intake:
    """What became of an order that came: the answer, and whether it must be run now."""

    ack: OrderAck
    fresh: bool


_envelope = msgspec.json.Decoder(OrderEnvelope)
_problem = msgspec.json.Decoder(Problem)


def _unix_seconds() -> float:
    return utc_now().timestamp()


def progress_key(order_id: str) -> str:
    """Under which the newest progress of an order is spooled; its result takes it away."""
    return f"progress:{order_id}"


def _ack(row: sqlite3.Row) -> OrderAck:
    return OrderAck(
        order_id=row["order_id"],
        state=OrderState(row["state"]),
        problem=_problem.decode(row["problem"]) if row["problem"] is not None else None,
        outcome=Outcome(row["outcome"]) if row["outcome"] is not None else None,
        result=NO_RESULT if row["result"] is None else msgspec.Raw(row["result"]),
        result_seq=row["fact_seq"] or 0,
    )


ANSWER_SQL = (
    "select order_id, owner, state, problem, outcome, result, fact_seq from orders where order_id = ?"
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
        open_database: Callable[[Path, str], Database] = Database,
        host_id: str = "",
    ) -> Journal:
        """Opens or makes it. A journal that another host wrote (this one was enrolled anew) gets a new generation: what
        owners confirmed to that host is no word to this one. Raises sqlite3.Error for a file that is damaged."""
        database = open_database(path, SCHEMA + facts.SCHEMA + last_told.SCHEMA)
        journal = cls(database, boot_id, spool_max_bytes, max_waiting_orders)
        await journal._database.do(lambda db: journal._begin(db, host_id))
        return journal

    async def close(self) -> None:
        await self._database.close()

    def on_spooled(self, tell: Callable[[list[Spooled | Reservation]], None]) -> None:
        """`tell` is called on the event loop with what reached the disk, in the order of its numbers."""

        def after_commit(results: list[Any]) -> None:
            if spooled := [result for result in results if isinstance(result, Spooled | Reservation)]:
                tell(spooled)

        self._database.after_commit = after_commit

    def _begin(self, db: sqlite3.Connection, host_id: str) -> None:
        db.execute(
            "insert into meta (name, value) values ('generation', ?) on conflict do nothing",
            (random_id(),),
        )
        (self.generation,) = db.execute("select value from meta where name = 'generation'").fetchone()
        wrote = db.execute("select value from meta where name = 'host_id'").fetchone()
        if host_id and wrote is not None and wrote[0] != host_id:
            self._renew(db)
        if host_id:
            db.execute("insert or replace into meta (name, value) values ('host_id', ?)", (host_id,))
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
        if (known := _stored(db, order)) is not None:
            return Intake(known, fresh=False)
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
        if waiting < self._max_waiting_orders and facts.total_bytes(db) <= self._spool_max_bytes:
            return None
        return Problem(
            kind=Kind.EXHAUSTED,
            message=f"the host has {waiting} orders to do and {facts.total_bytes(db)} bytes of results that nobody"
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
        refused_at = None if problem is None else _unix_seconds()
        said = None if problem is None else encode(problem)
        db.execute(sql, (*subject, state, raw, trace, self.boot_id, now_ms, said, refused_at))

    async def refuse(self, order: OrderEnvelope, problem: Problem, now_ms: int) -> OrderAck:
        """Refuses an order for good: no later copy is obeyed, though the agent may have learnt its kind by then."""

        def work(db: sqlite3.Connection) -> OrderAck:
            if (known := _stored(db, order)) is not None:
                return known
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
            subject = fact.subject_for(finished)
            spooled = self._spool(db, order.owner, subject, encode(finished), FactClass.RESULT)
            sql = """update orders set state = 'finished', outcome = ?, problem = ?, result = ?, envelope = null,
                     fact_seq = ? where order_id = ?"""
            problem = None if finished.problem is None else encode(finished.problem)
            db.execute(sql, (finished.outcome, problem, bytes(finished.result), spooled.seq, order.order_id))
            facts.remove(db, order.owner, progress_key(order.order_id))
            if order.kind in CLOSES and finished.outcome is Outcome.SUCCEEDED:
                sql = """update objects set closed_epoch = max(closed_epoch, ?)
                         where owner = ? and object_id = ?"""
                db.execute(sql, (order.epoch, order.owner, order.object_id))
            return spooled

        return await self._database.do(work)

    async def see_token(self, owner: str, token: int) -> int:
        """The highest leadership token this host has seen from the owner, this one among them."""

        def work(db: sqlite3.Connection) -> int:
            sql = """insert into fencing (owner, token) values (?, ?)
                     on conflict (owner) do update set token = max(token, excluded.token) returning token"""
            return int(db.execute(sql, (owner, token)).fetchone()[0])

        return await self._database.do(work)

    async def cancel(self, order_id: str) -> OrderAck:
        """Journals the cancel; how far the order is. `unknown`: it will be refused should it come."""

        def work(db: sqlite3.Connection) -> OrderAck:
            row = db.execute(ANSWER_SQL, (order_id,)).fetchone()
            if row is None or row["state"] == OrderState.ACCEPTED:
                sql = "insert into cancels (order_id, at) values (?, ?) on conflict do nothing"
                db.execute(sql, (order_id, _unix_seconds()))
            if row is not None:
                return _ack(row)
            return OrderAck(order_id=order_id, state=OrderState.UNKNOWN)

        return await self._database.do(work)

    async def unfinished(self) -> list[JournaledOrder]:
        """What a former run of the agent accepted and didn't end, in the order in which it came."""

        def work(db: sqlite3.Connection) -> list[JournaledOrder]:
            sql = """select envelope, trace, boot_id, accepted_ms, c.order_id is not null as cancelled
                     from orders o left join cancels c on c.order_id = o.order_id
                     where state = 'accepted' order by object_id, order_seq"""
            return [
                JournaledOrder(_envelope.decode(row[0]), row[1], row[2], row[3], bool(row[4]))
                for row in db.execute(sql)
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

    async def at_work(self, owner: str) -> tuple[str, ...]:
        """Kinds of the owner's orders that have begun and not ended."""

        def work(db: sqlite3.Connection) -> tuple[str, ...]:
            sql = "select kind from orders where owner = ? and state = ? order by order_id"
            return tuple(row[0] for row in db.execute(sql, (owner, OrderState.ACCEPTED)))

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

    async def open_objects(self, owner: str) -> dict[str, int]:
        """Epochs of what may be here: not ended by an order since."""

        def work(db: sqlite3.Connection) -> dict[str, int]:
            sql = "select object_id, epoch from objects where owner = ? and closed_epoch < epoch"
            return dict(db.execute(sql, (owner,)))

        return await self._database.do(work)

    async def remember_domains(self, domains: Collection[DomainReport], *, no_others: bool = False) -> None:
        """What was told of them."""
        write = last_told.remember_only if no_others else last_told.remember
        await self._database.do(lambda db: write(db, domains))

    async def last_told(self) -> dict[str, DomainReport]:
        return await self._database.do(last_told.recall)

    # Facts

    async def put(
        self, owner: str, subject: str, body: bytes, fact_class: FactClass, key: str | None = None
    ) -> Spooled:
        """Spools a fact. A state takes the place of the older one with its key."""
        return await self._database.do(lambda db: self._spool(db, owner, subject, body, fact_class, key))

    def _spool(
        self,
        db: sqlite3.Connection,
        owner: str,
        subject: str,
        body: bytes,
        fact_class: FactClass,
        key: str | None = None,
        seq: int = 0,
    ) -> Spooled:
        seq = facts.put(db, owner, subject, body, fact_class, key, seq)
        facts.make_room(db, self._spool_max_bytes)
        return self._stamped(db, owner, seq, subject, body)

    def _stamped(self, db: sqlite3.Connection, owner: str, seq: int, subject: str, body: bytes) -> Spooled:
        after_seq = facts.after(db, owner, seq)
        stamped = facts.stamp(body, self.generation, seq, after_seq, facts.confirmed(db, owner))
        return Spooled(owner, seq, after_seq, subject, stamped)

    async def pending(
        self, owner: str, above: int, limit: int, limit_bytes: int = 16 * 1024 * 1024
    ) -> list[Spooled]:
        """The owner's uncommitted facts with numbers above this one, oldest first."""

        def work(db: sqlite3.Connection) -> list[Spooled]:
            found = facts.pending(db, owner, above, limit, limit_bytes)
            return [self._stamped(db, owner, *fact) for fact in found]

        return await self._database.do(work)

    async def drop(self, owner: str, seq: int) -> None:
        """Gives up a fact that the bus can't carry; the owner gets a full report instead."""
        await self._database.do(lambda db: facts.drop(db, owner, seq))

    async def positions(self) -> dict[str, Position]:
        return await self._database.do(facts.positions)

    async def trim(self, word: CommittedWord) -> bool:
        """Forgets what the owner has committed. False: it has committed more than this journal ever said."""

        def work(db: sqlite3.Connection) -> bool:
            if word.generation != self.generation:
                return True
            if not facts.trim(db, word.owner, word.seq):
                return False
            sql = """update orders set committed_at = ?
                     where owner = ? and fact_seq <= ? and committed_at is null"""
            db.execute(sql, (_unix_seconds(), word.owner, word.seq))
            _prune(db)
            return True

        return await self._database.do(work)

    async def renew_generation(self) -> str:
        """A new identity for a journal that turned out to be an old copy of itself."""

        return await self._database.do(self._renew)

    def _renew(self, db: sqlite3.Connection) -> str:
        generation = random_id()
        db.execute("update meta set value = ? where name = 'generation'", (generation,))
        facts.begin_anew(db)
        self.generation = generation
        return generation

    async def begin_report(self, owner: str, rebase: bool) -> Reservation:
        """Keeps a number for a report, before anything is looked at. With `rebase`, or after facts were dropped,
        what the owner has not committed is numbered again just before it."""

        def work(db: sqlite3.Connection) -> Reservation:
            reservation, moved = facts.reserve(db, owner, rebase)
            sql = "update orders set fact_seq = ? where owner = ? and fact_seq = ?"
            db.executemany(sql, [(new, owner, old) for old, new in moved])
            return reservation

        return await self._database.do(work)

    async def put_report(self, reservation: Reservation, subject: str, body: bytes) -> Spooled:
        """The report under its number. States before it are forgotten: it says them all."""

        def work(db: sqlite3.Connection) -> Spooled:
            owner, seq = reservation.owner, reservation.seq
            facts.forget_states_before(db, owner, seq)
            return self._spool(db, owner, subject, body, FactClass.REPORT, "report", seq)

        return await self._database.do(work)


def _stored(db: sqlite3.Connection, order: OrderEnvelope) -> OrderAck | None:
    """The first answer to an order that came before; ids are good for one owner only."""
    row = db.execute(ANSWER_SQL, (order.order_id,)).fetchone()
    if row is None or row["owner"] == order.owner:
        return None if row is None else _ack(row)
    message = (
        f"order {order.order_id} is another owner's, not {order.owner}'s: give the order an id of its own"
    )
    problem = Problem(kind=Kind.INVALID, message=message)
    return OrderAck(order_id=order.order_id, state=OrderState.REFUSED, problem=problem)


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
    now = _unix_seconds()
    db.execute("delete from orders where committed_at < ?", (now - REMEMBER_SECONDS,))
    db.execute("delete from cancels where at < ?", (now - REMEMBER_CANCELS_SECONDS,))
