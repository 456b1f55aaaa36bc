"""The journal's tables of facts: numbered per owner, coalesced by key, bounded in bytes, kept until committed.

States carry a key: a newer state of the same key takes the older one out of the spool, number and all. That is no
gap, and the owner can tell: every fact is published with the number of the fact that is now before it (`after_seq`),
so "I have committed at least `after_seq`" means that nothing between was anything but superseded. A fact that was
dropped because the spool was full does leave a gap: `after_seq` never goes below the highest dropped number until a
full report bridges it. A report that an owner asked for begins a new base, `after_seq` 0: unfinished business
(results, events) is numbered again before it, states before it are forgotten, since the report says them all.

Every function runs inside a transaction of the journal's thread.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from volery.contracts.base import encode

SCHEMA = """
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


MAX_FACT_BYTES = 900 * 1024
"""The bus carries 1 MiB; what is larger is refused where it arises."""
DROPPED_IN_TURN = ((FactClass.STATE, FactClass.REPORT), (FactClass.EVENT,))
"""When the spool is full. Results never: too many of them stop new orders instead."""


@dataclass(frozen=True, slots=True)
class Spooled:
    """A fact on the disk, ready to be published: `body` is stamped with its numbers."""

    owner: str
    seq: int
    after_seq: int
    subject: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Reservation:
    """A number kept for a report that is being put together: what happens meanwhile comes after it."""

    owner: str
    seq: int
    gap: bool


@dataclass(frozen=True, slots=True)
class Position:
    """How far one owner's facts are."""

    head: int
    """The highest number given."""
    committed: int
    gap: bool
    """Facts were dropped, and no report has bridged it."""


_raw_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


def stamp(body: bytes, generation: str, seq: int, after_seq: int, confirmed: int) -> bytes:
    """The fact with its numbers filled in, which are settled only when it is published."""
    fields = _raw_object.decode(body)
    numbers = {"generation": generation, "seq": seq, "after_seq": after_seq, "confirmed": confirmed}
    fields |= {name: msgspec.Raw(encode(value)) for name, value in numbers.items()}
    return encode(fields)


def put(
    db: sqlite3.Connection,
    owner: str,
    subject: str,
    body: bytes,
    fact_class: FactClass,
    key: str | None = None,
    seq: int = 0,
) -> int:
    """Spools a fact and returns its number: the next one, or the one that was reserved."""
    if key is not None:
        remove(db, owner, key)
    seq = seq or _next_seq(db, owner)
    sql = "insert into facts (owner, seq, subject, class, key, body) values (?, ?, ?, ?, ?, ?)"
    db.execute(sql, (owner, seq, subject, fact_class, key, body))
    return seq


def remove(db: sqlite3.Connection, owner: str, key: str) -> None:
    db.execute("delete from facts where owner = ? and key = ?", (owner, key))


def after(db: sqlite3.Connection, owner: str, seq: int) -> int:
    """What an owner must have committed to miss nothing when it commits `seq`."""
    sql = """select max(committed, case when dropped < ? then dropped else 0 end,
             coalesce((select max(seq) from facts where owner = o.owner and seq < ?), 0)), base
             from owners o where owner = ?"""
    after_seq, base = db.execute(sql, (seq, seq, owner)).fetchone()
    return 0 if seq == base else int(after_seq)


def confirmed(db: sqlite3.Connection, owner: str) -> int:
    """The highest number that the owner said it has committed; it outlives the owner's database."""
    return int(db.execute("select committed from owners where owner = ?", (owner,)).fetchone()[0])


def total_bytes(db: sqlite3.Connection) -> int:
    return int(db.execute("select coalesce(sum(bytes), 0) from owners").fetchone()[0])


def make_room(db: sqlite3.Connection, max_bytes: int) -> None:
    """The oldest go first. Whoever is missing one gets a full report."""
    for classes in DROPPED_IN_TURN:
        while (excess := total_bytes(db) - max_bytes) > 0:
            sql = f"""select id, owner, seq, length(body) from facts
                      where class in ({", ".join("?" * len(classes))}) order by id limit 100"""
            found = db.execute(sql, classes).fetchall()
            if not found:
                break
            for row in found:
                if excess <= 0:
                    break
                drop(db, row[1], row[2])
                excess -= row[3]


def drop(db: sqlite3.Connection, owner: str, seq: int) -> None:
    """Loses a fact for good: a gap until the next report."""
    db.execute("delete from facts where owner = ? and seq = ?", (owner, seq))
    db.execute("update owners set dropped = max(dropped, ?), gap = 1 where owner = ?", (seq, owner))


def pending(
    db: sqlite3.Connection, owner: str, above: int, limit: int, limit_bytes: int
) -> list[tuple[int, str, bytes]]:
    """(seq, subject, body) of facts with numbers over `above`, oldest first; always one if there is one."""
    sql = "select seq, subject, body from facts where owner = ? and seq > ? order by seq limit ?"
    found: list[tuple[int, str, bytes]] = []
    size = 0
    for row in db.execute(sql, (owner, above, limit)):
        size += len(row[2])
        if found and size > limit_bytes:
            break
        found.append((row[0], row[1], row[2]))
    return found


def positions(db: sqlite3.Connection) -> dict[str, Position]:
    rows = db.execute("select owner, head, committed, gap from owners")
    return {row[0]: Position(row[1], row[2], bool(row[3])) for row in rows}


def trim(db: sqlite3.Connection, owner: str, seq: int) -> bool:
    """Forgets what was committed. False: more was committed than was ever said."""
    row = db.execute("select head, committed from owners where owner = ?", (owner,)).fetchone()
    head, committed = row or (0, 0)
    if seq > head:
        return False
    if seq > committed:
        db.execute("delete from facts where owner = ? and seq <= ?", (owner, seq))
        db.execute("update owners set committed = ? where owner = ?", (seq, owner))
    return True


def reserve(db: sqlite3.Connection, owner: str, rebase: bool) -> tuple[Reservation, list[tuple[int, int]]]:
    """The number for a report, and (old, new) numbers of what was numbered again before it."""
    db.execute("insert into owners (owner) values (?) on conflict do nothing", (owner,))
    head, gap = db.execute("select head, gap from owners where owner = ?", (owner,)).fetchone()
    if not rebase and not gap:
        return Reservation(owner, _next_seq(db, owner), gap=False), []
    db.execute("delete from facts where owner = ? and class in ('state', 'report')", (owner,))
    db.execute("update owners set dropped = 0, gap = 0, base = ? where owner = ?", (head + 1, owner))
    moved = []
    for row in db.execute("select id, seq from facts where owner = ? order by seq", (owner,)).fetchall():
        moved.append((row[1], _next_seq(db, owner)))
        db.execute("update facts set seq = ? where id = ?", (moved[-1][1], row[0]))
    return Reservation(owner, _next_seq(db, owner), bool(gap)), moved


def forget_states_before(db: sqlite3.Connection, owner: str, seq: int) -> None:
    db.execute("delete from facts where owner = ? and seq < ? and class = 'state'", (owner, seq))


def begin_anew(db: sqlite3.Connection) -> None:
    """Under a new generation nothing is committed, and everybody needs a report."""
    db.execute("update owners set committed = 0, gap = 1")


def _next_seq(db: sqlite3.Connection, owner: str) -> int:
    sql = """insert into owners (owner, head) values (?, 1)
             on conflict (owner) do update set head = head + 1 returning head"""
    return int(db.execute(sql, (owner,)).fetchone()[0])
