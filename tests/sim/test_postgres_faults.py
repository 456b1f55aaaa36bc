"""What befalls the simulation's database: sessions that die, a server that is away, a backup from before, and time."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from services.scheduler.store import fleet_changes
from sim.loop import SimLoop
from sim.postgres import Database
from volery.runtime.database import AWAY

LOCK = "select pg_advisory_lock(hashtext($1))"
_TABLE = "create table kv (id text primary key, n integer not null default 0, at timestamptz default now())"


@asynccontextmanager
async def with_table(**options: Any) -> AsyncIterator[tuple[Database, Any]]:
    database = Database(**options)
    async with database.pool("ha", 2) as pool:
        await pool.execute(_TABLE)
        yield database, pool


def numbers(database: Database) -> dict[str, int]:
    return {row["id"]: row["n"] for row in database.rows("ha", "kv")}


async def until_waiting(connection: Any) -> None:
    while not connection.is_waiting():
        await asyncio.sleep(0)


async def test_a_killed_session_leaves_nothing_and_frees_what_it_held() -> None:
    async with with_table() as (database, pool), database.connect("ha") as one, database.connect("ha") as two:
        await pool.execute("insert into kv (id) values ('a')")
        await one.execute(LOCK, "leader")
        await one.transaction().start()
        await one.execute("update kv set n = 5 where id = 'a'")
        lock = asyncio.create_task(two.execute(LOCK, "leader"))
        write = asyncio.create_task(pool.execute("update kv set n = n + 1 where id = 'a'"))
        await until_waiting(two)
        one.terminate()
        assert await lock == "SELECT 1"
        assert await write == "UPDATE 1"
        assert numbers(database) == {"a": 1}
        with pytest.raises(AWAY):
            await one.execute("select 1")


@pytest.mark.parametrize(("going", "happened"), [(True, {}), (False, {"a": 0})])
async def test_what_was_asked_of_a_session_that_died_may_have_happened(
    going: bool, happened: dict[str, int]
) -> None:
    """It dies while the statement is on its way there, or the answer on its way back."""
    ways = iter([0.0] * 2 + ([1.0] if going else [0.0, 1.0]) + [0.0] * 9)
    async with with_table(latency=lambda: next(ways)) as (database, pool):
        asked = asyncio.create_task(pool.execute("insert into kv (id) values ('a')"))
        for _ in range(10):
            await asyncio.sleep(0)  # no further than to the way that takes a second
        database.crash()
        with pytest.raises(AWAY):
            await asked
        assert numbers(database) == happened
        assert await pool.fetchval("select count(*) from kv") == len(happened)


async def test_a_cancelled_statement_that_waited_does_nothing() -> None:
    async with with_table() as (database, pool), database.connect("ha") as one:
        await pool.execute("insert into kv (id) values ('a')")
        async with one.transaction():
            await one.execute("select 1 from kv where id = 'a' for update")
            waiting = asyncio.create_task(pool.execute("update kv set n = 9"))
            for _ in range(20):
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(TimeoutError):
                await pool.execute("update kv set n = 8", timeout=0.01)
        assert numbers(database) == {"a": 0}
        assert await pool.execute("update kv set n = n + 1") == "UPDATE 1"


async def in_transaction(connection: Any, *statements: str) -> None:
    async with connection.transaction():
        for statement in statements:
            await connection.execute(statement)


async def test_a_savepoint_undoes_its_own_part_and_a_failure_ends_the_rest() -> None:
    async with with_table() as (database, pool), database.connect("ha") as one:
        async with one.transaction():
            await one.execute("insert into kv (id) values ('a')")
            twice = ("insert into kv (id) values ('b')", "insert into kv (id) values ('a')")
            with pytest.raises(asyncpg.UniqueViolationError):
                await in_transaction(one, *twice)
            await one.execute("insert into kv (id) values ('c')")
        assert numbers(database) == {"a": 0, "c": 0}
        with pytest.raises(asyncpg.UniqueViolationError):
            await one.executemany("insert into kv (id) values ($1)", [("x",), ("y",), ("a",)])
        await one.transaction().start()
        await one.execute("delete from kv")
        with pytest.raises(asyncpg.UndefinedTableError):
            await one.execute("delete from nothing")
        assert await pool.execute("update kv set n = 1 where id = 'a'") == "UPDATE 1"  # its locks are free
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await one.execute("select 1")
        await one.reset()
        assert await one.fetchval("select count(*) from kv") == 2


async def test_a_failed_migration_leaves_no_table() -> None:
    async with with_table() as (database, _), database.connect("ha") as one:
        with pytest.raises(asyncpg.UniqueViolationError):
            await in_transaction(
                one,
                "create table fresh (id text); alter table kv add column more integer",
                "insert into kv (id, more) values ('a', 1), ('a', 2)",
            )
        with pytest.raises(asyncpg.UndefinedTableError):
            await one.execute("select 1 from fresh")
        await one.execute("insert into kv (id) values ('a')")
        assert list((await one.fetchrow("select * from kv") or {}).keys()) == ["id", "n", "at"]


async def test_a_server_that_is_away_refuses_and_comes_back_with_what_was_committed() -> None:
    async with with_table() as (database, pool):
        await pool.execute("insert into kv (id) values ('a')")
        database.stop()
        with pytest.raises(AWAY):
            await pool.fetch("select 1")
        with pytest.raises(AWAY):
            async with database.connect("ha"):
                pass
        database.start()
        assert await pool.fetchval("select id from kv") == "a"


async def test_a_restore_brings_the_older_state_and_new_ids_repeat() -> None:
    database = Database()
    await database.migrate("ha")
    async with database.pool("ha") as pool:
        await pool.execute("insert into outbox (subject, body) values ('a', '')")
        backup = database.snapshot()
        await pool.execute("insert into outbox (subject, body) values ('b', '')")
        await pool.execute("update leader set token = 9")
        await pool.execute("insert into heard values ('s', 'h', 1)")
        database.restore(backup)
        assert [(row["id"], row["subject"]) for row in await pool.fetch("select * from outbox")] == [(1, "a")]
        assert await pool.fetchval("select token from leader") == 0
        assert await pool.fetchval("select count(*) from heard where stream = 's'") == 0
        assert await pool.fetchval("insert into outbox (subject, body) values ('c', '') returning id") == 2


async def test_time_is_the_servers_and_stands_still_in_a_transaction() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    async with with_table(clock=lambda: now) as (database, pool), database.connect("ha") as one:
        async with one.transaction():
            first = await one.fetchval("select now()")
            now += timedelta(hours=1)
            await one.execute("insert into kv (id) values ('a')")
            assert await one.fetchval("select now()") == first
        assert await pool.fetchval("select at < now() - interval '59 minutes' from kv") is True
        assert await pool.fetchval("select at < now() - interval '60 minutes' from kv") is False


async def test_the_fleets_changes_are_told_after_the_commit() -> None:
    database = Database()
    await database.migrate("scheduler")
    change = "insert into network (id, revision, name, ready_host_ids) values ($1, 1, '', '{}')"
    async with database.pool("scheduler") as pool, fleet_changes(pool) as told, pool.acquire() as one:
        async with one.transaction():
            await one.execute(change, "a")
            await one.execute("update network set revision = 2")
            assert told.empty()
        assert await told.get() == "network a"
        block = one.transaction()
        await block.start()
        await one.execute(change, "b")
        await block.rollback()
        await pool.execute("delete from network where id = 'a'")
        assert await told.get() == "network a"
        assert told.empty()
        database.crash()
        assert await told.get() == ""


async def history(seed: int) -> str:
    """Everything that two writers and a reader saw of each other, as a digest."""
    database = Database(seed)
    database.latency = lambda: database.random.choice([0.0, 0.0, 0.001])
    seen: list[Any] = []
    async with database.pool("ha", 3) as pool:
        await pool.execute(_TABLE.replace("default now()", ""))

        async def write(name: str) -> None:
            for i in range(12):
                async with pool.acquire() as connection, connection.transaction():
                    row = await connection.fetchrow(
                        """insert into kv (id, n) values ($1, 1)
                           on conflict (id) do update set n = kv.n + 1 returning *""",
                        f"k{i % 3}",
                    )
                    seen.append((name, tuple(row or ()), await connection.fetch("select id, n from kv")))

        await asyncio.gather(*(write(name) for name in "abc"))
        seen.append(await pool.fetchval("select gen_random_uuid()::text"))
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def test_a_seed_repeats_itself_whatever_python_hashes_like() -> None:
    here = SimLoop().run(history(1))
    text = "from tests.sim.test_postgres_faults import history, SimLoop; print(SimLoop().run(history(1)))"
    there = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert here == there
    assert here != SimLoop().run(history(2))


async def test_what_is_known_is_answered_without_a_way() -> None:
    """Asked again while nothing changed, and a way takes no time: the answer is there at once."""
    async with with_table() as (_, pool):
        await pool.execute("insert into kv (id) values ('a')")
        await pool.fetch("select id from kv")
        asked = pool.fetch("select id from kv")
        with pytest.raises(StopIteration) as answered:
            asked.send(None)
        assert [row["id"] for row in answered.value.value] == ["a"]
        await pool.execute("insert into kv (id) values ('b')")
        assert len(await pool.fetch("select id from kv")) == 2
