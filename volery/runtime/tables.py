"""Objects in PostgreSQL, and the one way to change them: every change and its facts in a single statement.

A table of objects has `id, revision, doc, private` and typed columns copied from the public document for
filters. `doc` is the public JSON, so that reads pass the owner's bytes through; `private` is what only the
owner may see. Compare-and-set on `revision` guards each write: if one guard of a statement fails, the whole
statement does (a statement with two guards would otherwise be half applied).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Any, Generic, TypeVar

import asyncpg
import msgspec

from volery.contracts.base import Entity, Fact, Message, encode
from volery.contracts.errors import Kind, Refused
from volery.runtime.clock import utc_now

T = TypeVar("T", bound=Entity)
S = TypeVar("S", bound=Message)
STATEMENTS_KEPT = 256
ENTITY_COLUMNS = ("id", "revision", "doc", "private")


class Stale(Exception):
    """Somebody else changed a row first, or it is gone: read again, decide again."""


class Taken(Exception):
    """A constraint that looks at other rows (unique, exclusion, reference) refused the write: `constraint` is its
    name in the schema."""

    def __init__(self, constraint: str) -> None:
        super().__init__(constraint)
        self.constraint = constraint


class Nothing(Message):
    """The private part of a noun that has none."""


@dataclass(frozen=True, slots=True)
class Row(Generic[T, S]):
    """An object as its owner holds it."""

    public: T
    private: S

    @property
    def id(self) -> str:
        return self.public.id


class Change(msgspec.Struct, frozen=True):
    """One guarded write, with the facts that it makes true. Commit it with `commit`.

    `sql` uses {0}, {1}, … for its own arguments, {prev} for the rows that the change before it returned, and
    must return exactly one row when its guard holds.
    """

    sql: str
    arguments: tuple[Any, ...]
    facts: tuple[tuple[str, bytes], ...] = ()
    guarded: bool = True
    """False: it may touch any number of rows."""
    each_of: int | None = None
    """The argument, an array, of which each element must have returned a row; its guard holds only then."""
    then: Callable[[], None] | None = None
    """Called once it is committed."""
    document: Any = None
    """The public object as it will be."""

    def and_then(self, act: Callable[[], None]) -> Change:
        """The same, with what is to be called once it is committed."""
        return msgspec.structs.replace(self, then=act)


@dataclass(frozen=True, slots=True)
class Statements:
    """A table's writes. Each returns one row when its guard holds."""

    insert: str
    update: str
    update_both: str
    """The private part, too."""
    delete: str


def _statements(table: str, columns: tuple[str, ...]) -> Statements:
    names = (*ENTITY_COLUMNS, *columns)
    slots = ", ".join(f"{{{i}}}" for i in range(len(names)))
    return Statements(
        insert=f"insert into {table} ({', '.join(names)}) values ({slots}) returning 1",
        update=_update(table, ("revision", "doc", *columns)),
        update_both=_update(table, ("revision", "doc", *columns, "private")),
        delete=f"delete from {table} where id = {{0}} and revision = {{1}} returning 1",
    )


def _update(table: str, columns: tuple[str, ...]) -> str:
    pairs = ", ".join(f"{name} = {{{i}}}" for i, name in enumerate(columns, 2))
    return f"update {table} set {pairs} where id = {{0}} and revision = {{1}} returning 1"


@dataclass(frozen=True, slots=True)
class Table(Generic[T, S]):
    """A noun's table: how its rows are written, announced and read."""

    name: str
    public: type[T]
    private: type[S]
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column → attribute of the public document it is copied from."""
    changed: Fact[Any] | None = None
    deleted: Fact[Any] | None = None
    noun: str = ""
    """How a person calls it; the table's name if empty."""
    sql: Statements = field(init=False)

    copied: Callable[[T], tuple[Any, ...]] = field(init=False)
    """The attributes that columns are copied from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sql", _statements(self.name, tuple(self.columns)))
        object.__setattr__(self, "copied", _attributes(tuple(self.columns.values())))

    def _copies(self, public: T) -> list[Any]:
        return [value if type(value) in _AS_IT_IS else _plain(value) for value in self.copied(public)]

    def insert(self, public: T, private: S, *facts: tuple[str, bytes]) -> Change:
        """A new object; its first fact is `changed` with revision 1."""
        doc = encode(public)
        values = (
            public.id,
            public.revision,
            doc.decode(),
            encode(private).decode(),
            *self._copies(public),
        )
        told = self._announce(self.changed, public, doc, utc_now())
        return Change(self.sql.insert, values, (*told, *facts), document=public)

    def update(
        self, row: Row[T, S], public: T | None = None, private: S | None = None, *facts: tuple[str, bytes]
    ) -> Change:
        """The next revision of `row`. Every revision is announced, so that readers can count them; `updated_at` moves
        only when the public part changed."""
        now = utc_now()
        changed = public is not None and public != row.public
        new = msgspec.structs.replace(
            public if public is not None else row.public,
            revision=row.public.revision + 1,
            updated_at=now if changed else row.public.updated_at,
        )
        doc = encode(new)
        values = [row.id, row.public.revision, new.revision, doc.decode(), *self._copies(new)]
        sql = self.sql.update
        if private is not None and private is not row.private:
            values.append(encode(private).decode())
            sql = self.sql.update_both
        told = self._announce(self.changed, new, doc, now)
        return Change(sql, tuple(values), (*told, *facts), document=new)

    def delete(self, row: Row[T, S], *facts: tuple[str, bytes]) -> Change:
        """The object ends; `deleted` is its only tombstone and carries the final revision."""
        now = utc_now()
        final = msgspec.structs.replace(row.public, revision=row.public.revision + 1, updated_at=now)
        told = self._announce(self.deleted, final, encode(final), now)
        return Change(self.sql.delete, (row.id, row.public.revision), (*told, *facts), document=final)

    def _announce(
        self, fact: Fact[Any] | None, public: T, doc: bytes, at: datetime
    ) -> tuple[tuple[str, bytes], ...]:
        return () if fact is None else (_event(fact, public, doc, at),)

    def row(self, record: asyncpg.Record) -> Row[T, S]:
        return Row(
            msgspec.json.decode(record["doc"], type=self.public),
            msgspec.json.decode(record["private"], type=self.private),
        )

    async def get(self, pool: asyncpg.Pool[asyncpg.Record], object_id: str) -> Row[T, S]:
        """Raises Refused(not_found)."""
        row = await self.find(pool, object_id)
        if row is None:
            raise not_there(self.noun or self.name, object_id)
        return row

    async def find(self, pool: asyncpg.Pool[asyncpg.Record], object_id: str) -> Row[T, S] | None:
        record = await pool.fetchrow(f"select doc, private from {self.name} where id = $1", object_id)
        return None if record is None else self.row(record)

    async def raw(self, pool: asyncpg.Pool[asyncpg.Record], object_id: str) -> msgspec.Raw:
        """The public document as the bytes that were written. Raises Refused(not_found)."""
        doc = await pool.fetchval(f"select doc from {self.name} where id = $1", object_id)
        if doc is None:
            raise not_there(self.noun or self.name, object_id)
        return msgspec.Raw(doc.encode())

    async def where(
        self, pool: asyncpg.Pool[asyncpg.Record], condition: str = "true", *arguments: Any
    ) -> list[Row[T, S]]:
        """Every row that meets the condition, which is written by the store that calls."""
        records = await pool.fetch(
            f"select doc, private from {self.name} where {condition} order by id", *arguments
        )
        return [self.row(record) for record in records]


def not_there(noun: str, object_id: str) -> Refused:
    return Refused(
        Kind.NOT_FOUND,
        f"there is no {noun} {object_id}: it was deleted or never existed",
        noun=noun,
        id=object_id,
    )


def _attributes(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) < 2:  # attrgetter gives no tuple then
        return lambda public: tuple(getattr(public, name) for name in names)
    return attrgetter(*names)


_AS_IT_IS = frozenset({str, int, bool, float, datetime, type(None)})


def _plain(value: Any) -> Any:
    """A column's value: enums and ids as text, numbers, booleans and times as they are, the rest as JSON."""
    if isinstance(value, str):
        return value
    return encode(value).decode()


def text_columns(rows: Iterable[Sequence[Any]]) -> tuple[list[str | None], ...]:
    """Rows as one array of texts per column, for a statement that unnests and casts them: of other arrays asyncpg asks the
    server on every new connection what they are, which takes it ten milliseconds."""
    return tuple([_text(value) for value in column] for column in zip(*rows, strict=True))


def _text(value: Any) -> str | None:
    match value:
        case None | str():
            return value if value is None else str(value)
        case bool():
            return "true" if value else "false"
        case datetime():
            return value.isoformat()
    return str(value)


def say(fact: Fact[Any], payload: Message) -> tuple[str, bytes]:
    """Subject and CloudEvent of a fact, without the id and sequence that its position will give it."""
    return _event(fact, payload, encode(payload), utc_now())


def _event(fact: Fact[Any], payload: Message, data: bytes, at: datetime) -> tuple[str, bytes]:
    subject = fact.subject_for(payload)
    _, _, noun, object_id, _ = subject.split(".", 4)
    about = f'{noun}/{object_id}","time":'.encode()
    return subject, b"".join((_event_head(fact), about, encode(at), _EVENT_DATA, data, b"}"))


_EVENT_DATA = b',"datacontenttype":"application/json","data":'


@cache
def _event_head(fact: Fact[Any]) -> bytes:
    return f',"source":"/volery/{fact.owner}","type":"dev.volery.{fact.name}","subject":"'.encode()


_SLOT = re.compile(r"\{(\d+)\}")


def _numbered(base: int, slot: re.Match[str]) -> str:
    return f"${base + int(slot[1]) + 1}"


@lru_cache(maxsize=STATEMENTS_KEPT)
def _single(sql: str, count: int) -> str:
    """For one guarded change with one fact, by far the most frequent: no row, no fact, and nothing to undo."""
    text = _SLOT.sub(partial(_numbered, 0), sql)
    return (
        f"with changed as ({text}) "
        f"insert into outbox (subject, body) select ${count + 1}::text, ${count + 2}::bytea from changed"
    )


@lru_cache(maxsize=STATEMENTS_KEPT)
def _each(sql: str, count: int) -> str:
    """The same for many alike, each of which fails all of them when its guard doesn't hold."""
    text = _SLOT.sub(partial(_numbered, 0), sql)
    return (
        f"with changed as ({text}), told as (insert into outbox (subject, body) "
        f"select ${count + 1}::text, ${count + 2}::bytea from changed) select 1 / count(*) from changed"
    )


def _are_alike(changes: Sequence[Change]) -> bool:
    """Whether all are one statement with other arguments, guarded, with one fact each."""
    sql = changes[0].sql
    return "{prev}" not in sql and all(
        change.sql == sql and change.guarded and change.each_of is None and len(change.facts) == 1
        for change in changes
    )


def compose(changes: Sequence[Change]) -> tuple[str, list[Any]]:
    """One statement for all changes and facts. The facts are written only when every guard held, and a division by
    zero undoes everything when one did not."""
    shapes = tuple((c.sql, len(c.arguments), c.guarded, c.each_of) for c in changes)
    facts = [fact for change in changes for fact in change.facts]
    arguments: list[Any] = [argument for change in changes for argument in change.arguments]
    if facts:
        arguments += [[subject for subject, _ in facts], [body for _, body in facts]]
    return _statement(shapes, bool(facts)), arguments


@lru_cache(maxsize=STATEMENTS_KEPT)
def _statement(shapes: tuple[tuple[str, int, bool, int | None], ...], with_facts: bool) -> str:
    """The text for changes of these (sql, number of arguments, guarded, each_of): a service has few of them."""
    parts: list[str] = []
    guards: list[str] = []
    base = 0
    for number, (text, count, guarded, each_of) in enumerate(shapes):
        sql = _SLOT.sub(partial(_numbered, base), text).replace("{prev}", f"c{number - 1}")
        parts.append(f"c{number} as ({sql})")
        if each_of is not None:
            array = f"${base + each_of + 1}"
            guards.append(
                f"(select case when count(*) = cardinality({array}) then 1 else 0 end from c{number})"
            )
        elif guarded:
            guards.append(f"(select count(*) from c{number})")
        base += count
    wanted = len(guards)
    held = " + ".join(guards) or "0"
    parts.append(f"held as materialized (select {held} as n)")
    if with_facts:
        parts.append(
            f"told as (insert into outbox (subject, body) select f.subject, f.body from held, "
            f"unnest(${base + 1}::text[], ${base + 2}::bytea[]) with ordinality as f(subject, body, n) "
            f"where held.n = {wanted} order by f.n)"
        )
    return f"with {', '.join(parts)} select 1 / (case when n = {wanted} then 1 else 0 end) from held"


async def _write(pool: asyncpg.Pool[asyncpg.Record], changes: Sequence[Change]) -> None:
    first, count = changes[0], len(changes[0].arguments)
    if not _are_alike(changes):
        sql, arguments = compose(changes)
        await pool.fetchval(sql, *arguments)
    elif len(changes) > 1:
        # One round trip and one transaction; a statement of all would be parsed and planned anew for each number of them.
        rows = [(*change.arguments, *change.facts[0]) for change in changes]
        await pool.executemany(_each(first.sql, count), rows)
    elif await pool.execute(_single(first.sql, count), *first.arguments, *first.facts[0]) == "INSERT 0 0":
        raise Stale


async def commit(pool: asyncpg.Pool[asyncpg.Record], changes: Sequence[Change]) -> None:
    """Apply all changes and write their facts, or nothing.

    Raises Stale when a guard failed or another transaction was in the way; Taken for a constraint between rows.
    """
    if not changes:
        return
    try:
        await _write(pool, changes)
    except (asyncpg.DivisionByZeroError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
        raise Stale from None
    except (
        asyncpg.UniqueViolationError,
        asyncpg.ExclusionViolationError,
        asyncpg.ForeignKeyViolationError,
    ) as error:
        raise Taken(error.constraint_name or "") from None
    for change in changes:
        if change.then is not None:
            change.then()
