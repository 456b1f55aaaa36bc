"""Every SQL statement of dwh."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from importlib.resources import files
from typing import Any, NamedTuple, TypeAlias

import asyncpg

from services.dwh.model import SAMPLED, STEP, Sampled, partition_end, partition_of
from services.dwh.sampler import Minute
from volery.contracts.history import Interval
from volery.runtime.tables import Change, text_columns

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

BATCH = 5000
"""Rows per insert: a few megabytes of arguments."""
PARTITIONED = (Interval.MINUTE, Interval.HOUR)
SLOW_SECONDS = 300.0
"""For the few statements that go through a whole hour or month."""

LOST = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)
"""What trouble with the database looks like; samples are kept in memory meanwhile."""


def table(noun: str, interval: Interval) -> str:
    return f"{noun}_{interval}"


# Configuration versions.


class VersionRow(NamedTuple):
    """One revision of an object."""

    noun: str
    id: str
    revision: int
    at: datetime
    deleted: bool
    doc: str


_SAID = """(select v.noun, v.id, v.revision::bigint, v.at::timestamptz, v.deleted::bool, v.doc, v.former::bigint,
                  v.later::bigint, v.later_at::timestamptz
           from unnest({0}::text[], {1}::text[], {2}::text[], {3}::text[], {4}::text[], {5}::text[], {6}::text[], {7}::text[],
                       {8}::text[]) as v(noun, id, revision, at, deleted, doc, former, later, later_at)) n"""


def versions_said(rows: Sequence[VersionRow]) -> list[Change]:
    """These revisions, between their neighbours, whichever of them are there already. A repeat changes nothing.

    Two changes of one statement see nothing of each other, so each row is told its neighbours among the others.
    """
    if not rows:
        return []
    close = Change(
        f"""update config_version c set valid_to = greatest(c.valid_from, n.at) from {_SAID}
            where c.noun = n.noun and c.id = n.id and (c.valid_to is null or c.valid_to > n.at)
              and c.revision >= n.former
              and c.revision = (select max(o.revision) from config_version o
                                where o.noun = n.noun and o.id = n.id and o.revision < n.revision)""",
        _beside(rows),
        guarded=False,
    )
    insert = Change(
        f"""insert into config_version (noun, id, revision, valid_from, valid_to, deleted, doc)
            select n.noun, n.id, n.revision, n.at,
                   coalesce((select greatest(o.valid_from, n.at) from config_version o
                             where o.noun = n.noun and o.id = n.id and o.revision > n.revision
                               and (n.later is null or o.revision < n.later)
                             order by o.revision limit 1), n.later_at), n.deleted, n.doc
            from {_SAID} on conflict do nothing""",
        _beside(rows),
        guarded=False,
    )
    return [close, insert]


def _beside(rows: Sequence[VersionRow]) -> tuple[list[str | None], ...]:
    """The rows' columns, and of each the revision before and the one behind it among them (-1 and null: there is none)."""
    ordered = sorted({row[:3]: row for row in rows}.values(), key=lambda row: row[:3])
    before, after = [None, *ordered[:-1]], [*ordered[1:], None]
    return text_columns(
        (
            *row,
            former.revision if former and former[:2] == row[:2] else -1,
            *((later.revision, max(later.at, row.at)) if later and later[:2] == row[:2] else (None, None)),
        )
        for former, row, later in zip(before, ordered, after, strict=True)
    )


async def current(pool: Pool, noun: str) -> dict[str, int]:
    """Objects that exist as far as is known, with their newest revision."""
    records = await pool.fetch(
        "select id, revision from config_version where noun = $1 and valid_to is null and not deleted", noun
    )
    return {r["id"]: r["revision"] for r in records}


def ended(noun: str, object_id: str, revision: int) -> list[Change]:
    """It was not in a complete list of its owner: deleted, in a time whose facts were lost."""
    close = Change(
        """update config_version set valid_to = now()
           where noun = {0} and id = {1} and revision = {2} and valid_to is null and not deleted
           returning noun, id, revision, doc""",
        (noun, object_id, revision),
        guarded=False,
    )
    tombstone = Change(
        """insert into config_version (noun, id, revision, valid_from, deleted, doc)
           select noun, id, revision + 1, now(), true, doc from {prev} on conflict do nothing""",
        (),
        guarded=False,
    )
    return [close, tombstone]


async def versions(
    pool: Pool, noun: str, object_id: str, at: datetime | None, after: tuple[str, int] | None, limit: int
) -> list[asyncpg.Record]:
    conditions, arguments = ["noun = $1"], [noun]

    def slot(value: Any) -> str:
        arguments.append(value)
        return f"${len(arguments)}"

    if object_id:
        conditions.append(f"id = {slot(object_id)}")
    if at is not None:
        moment = slot(at)
        conditions.append(
            f"not deleted and valid_from <= {moment} and (valid_to is null or valid_to > {moment})"
        )
    if after is not None:
        conditions.append(f"(id, revision) > ({slot(after[0])}, {slot(after[1])})")
    return await pool.fetch(
        f"""select noun, id, revision, valid_from, valid_to, deleted, doc from config_version
            where {" and ".join(conditions)} order by id, revision limit {limit}""",
        *arguments,
    )


async def forget_versions(pool: Pool, days: int) -> None:
    await pool.execute(
        """delete from config_version
           where valid_to < now() - make_interval(days => $1)
              or deleted and valid_to is null and valid_from < now() - make_interval(days => $1)""",
        days,
        timeout=SLOW_SECONDS,
    )


# Gaps.


async def notice_gap(pool: Pool, stream: str) -> None:
    await pool.execute(
        """with forgotten as (delete from listed where stream = $1)
           insert into gap (stream) values ($1) on conflict do nothing""",
        stream,
    )


async def listed(pool: Pool) -> set[str]:
    return {r["stream"] for r in await pool.fetch("select stream from listed")}


async def was_listed(pool: Pool, stream: str) -> None:
    await pool.execute("insert into listed (stream) values ($1) on conflict do nothing", stream)


async def gaps(pool: Pool) -> list[asyncpg.Record]:
    return await pool.fetch("select stream, noticed_at from gap order by noticed_at, stream")


async def forget_gaps(pool: Pool, days: int) -> None:
    await pool.execute("delete from gap where noticed_at < now() - make_interval(days => $1)", days)


# Samples.


async def make_partitions(pool: Pool, moments: Sequence[datetime], made: set[str]) -> None:
    """Room for rows of these moments. `made` remembers what was made."""
    wanted = {
        part.name: (table(noun, interval), part)
        for noun in SAMPLED
        for interval in PARTITIONED
        for part in (partition_of(table(noun, interval), interval, at) for at in moments)
        if part.name not in made
    }
    for name, (parent, part) in wanted.items():
        # A transaction each: making one locks its whole table, and two such locks could wait for a reader that
        # waits for them. "if not exists" alone fails when two make the same one at once.
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock(hashtext('volery-partitions-dwh'))")
            await connection.execute(
                f"""create table if not exists {name} partition of {parent}
                    for values from ('{part.begin:%Y-%m-%d}+00') to ('{part.end:%Y-%m-%d}+00')"""
            )
        made.add(name)


async def drop_partitions(pool: Pool, interval: Interval, before: datetime) -> list[str]:
    """Drop partitions that ended before a moment and whose samples are all aggregated."""
    records = await pool.fetch(
        """select c.relname as name from pg_inherits i join pg_class c on c.oid = i.inhrelid
           where i.inhparent = any($1::regclass[]) order by 1""",
        [table(noun, interval) for noun in SAMPLED],
    )
    oldest = await pool.fetchval("select min(at) from dirty")
    limit = before if oldest is None else min(before, oldest)
    names = [r["name"] for r in records if (end := partition_end(r["name"])) is not None and end <= limit]
    for name in names:
        async with pool.acquire() as connection, connection.transaction():
            # Readers and the writer go on if it can't be had at once; it is tried again next time.
            await connection.execute("set local lock_timeout = '4s'")
            await connection.execute(f"drop table if exists {name}")
    return names


async def forget_days(pool: Pool, days: int) -> None:
    for noun in SAMPLED:
        await pool.execute(
            f"delete from {table(noun, Interval.DAY)} where at < now() - make_interval(days => $1)", days
        )


async def write_minute(pool: Pool, noun: str, rows: Sequence[Minute]) -> None:
    """The rows of one minute, at once. Writing them again changes nothing."""
    kind = SAMPLED[noun]
    columns = ["at", "id", *([kind.belongs_to] if kind.belongs_to else []), *kind.names]
    types = ["timestamptz", "text", *(["text"] if kind.belongs_to else []), *("float8" for _ in kind.names)]
    slots = ", ".join(f"${n}::{t}[]" for n, t in enumerate(types, 1))
    sql = f"insert into {table(noun, Interval.MINUTE)} ({', '.join(columns)}) select * from unnest({slots}) on conflict do nothing"
    async with pool.acquire() as connection, connection.transaction():
        for begin in range(0, len(rows), BATCH):
            batch = rows[begin : begin + BATCH]
            labels = [[row.belongs_to for row in batch]] if kind.belongs_to else []
            values = [[row.values[n] for row in batch] for n in range(len(kind.names))]
            await connection.execute(
                sql, [row.at for row in batch], [row.id for row in batch], *labels, *values
            )
        if rows:
            await _touch(connection, noun, Interval.HOUR, rows[0].at.replace(minute=0))


async def _touch(connection: Any, noun: str, span: Interval, at: datetime) -> None:
    # An update, not "do nothing": it waits for an aggregation that is just taking the mark away.
    await connection.execute(
        """insert into dirty (noun, span, at) values ($1, $2, $3)
           on conflict (noun, span, at) do update set touched = dirty.touched + 1""",
        noun,
        str(span),
        at,
    )


async def dirty(pool: Pool, span: Interval, before: datetime) -> list[tuple[str, datetime]]:
    """What changed since it was aggregated, and has ended; the oldest first."""
    records = await pool.fetch(
        "select noun, at from dirty where span = $1 and at + $2 <= $3 order by at, noun",
        str(span),
        STEP[span],
        before,
    )
    return [(r["noun"], r["at"]) for r in records]


async def aggregate(pool: Pool, noun: str, span: Interval, at: datetime) -> None:
    """An hour from its minutes, or a day from its hours; doing it again gives the same."""
    kind = SAMPLED[noun]
    async with pool.acquire() as connection, connection.transaction():
        # Locked before it is read: samples committed later wait here, and mark it again.
        await connection.fetchval(
            "select 1 from dirty where noun = $1 and span = $2 and at = $3 for update", noun, str(span), at
        )
        await connection.execute(_AGGREGATE[noun, span], at, at + STEP[span], timeout=SLOW_SECONDS)
        await connection.execute(
            "delete from dirty where noun = $1 and span = $2 and at = $3", noun, str(span), at
        )
        if span is Interval.HOUR:
            await _touch(connection, kind.noun, Interval.DAY, at.replace(hour=0))


def _aggregate(kind: Sampled, span: Interval) -> str:
    source = table(kind.noun, Interval.MINUTE if span is Interval.HOUR else Interval.HOUR)
    label = [f"(array_agg({kind.belongs_to} order by at desc))[1]"] if kind.belongs_to else []
    if span is Interval.HOUR:
        values = ["count(*)", *(f"avg({n})" for n in kind.names), *(f"max({n})" for n in kind.names)]
    else:
        weighted = (
            f"sum({n} * minutes) / nullif(sum(minutes) filter (where {n} is not null), 0)" for n in kind.names
        )
        values = ["sum(minutes)", *weighted, *(f"max(max_{n})" for n in kind.names)]
    columns = kind.columns(span)
    news = ", ".join(f"{c} = excluded.{c}" for c in columns if c != "at")
    return f"""insert into {table(kind.noun, span)} (id, {", ".join(columns)})
               select id, $1, {", ".join([*label, *values])} from {source}
               where at >= $1 and at < $2 group by id
               on conflict (id, at) do update set {news}"""


_AGGREGATE = {
    (noun, span): _aggregate(kind, span)
    for noun, kind in SAMPLED.items()
    for span in (Interval.HOUR, Interval.DAY)
}


async def samples(
    pool: Pool,
    kind: Sampled,
    interval: Interval,
    object_id: str,
    since: datetime | None,
    until: datetime | None,
    limit: int,
) -> list[asyncpg.Record]:
    """In the order of time. Without `since` the newest ones, else the first ones from then on."""
    conditions, arguments = ["id = $1"], [object_id]
    for comparison, moment in ((">=", since), ("<", until)):
        if moment is not None:
            arguments.append(moment)  # type: ignore[arg-type]
            conditions.append(f"at {comparison} ${len(arguments)}")
    records = await pool.fetch(
        f"""select {", ".join(kind.columns(interval))} from {table(kind.noun, interval)}
            where {" and ".join(conditions)} order by at {"asc" if since else "desc"} limit {limit}""",
        *arguments,
    )
    return records if since else records[::-1]


async def now(pool: Pool) -> datetime:
    at: datetime = await pool.fetchval("select now()")
    return at


# Views.


_VIEWS = "select viewname from pg_views where schemaname = current_schema()"


async def make_views(pool: Pool) -> None:
    """The views of `sql/views`, made anew when their definition changed. Views that others made are left alone."""
    folder = files("services.dwh") / "sql" / "views"
    texts = [f.read_text() for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith(".sql")]
    wanted = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("select pg_advisory_xact_lock(hashtext('volery-views-dwh'))")
        made = await connection.fetchrow("select hash, names from views")
        if made is not None and made["hash"] == wanted:
            return
        if made is not None and made["names"]:
            await connection.execute(f"drop view if exists {', '.join(made['names'])}")
        others = {r["viewname"] for r in await connection.fetch(_VIEWS)}
        for text in texts:
            await connection.execute(text)
        ours = {r["viewname"] for r in await connection.fetch(_VIEWS)} - others
        await connection.execute("delete from views")
        await connection.execute("insert into views (hash, names) values ($1, $2)", wanted, sorted(ours))


def moments(now: datetime, days: int) -> list[datetime]:
    """Today and the days ahead."""
    return [now + timedelta(days=n) for n in range(days + 1)]
