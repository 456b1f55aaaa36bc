"""Of what claims hold only that is read again which may have changed: nothing of it may be missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from services.scheduler import capacity_store
from services.scheduler.state import Scheduler
from services.scheduler.store import Pool
from tests.scheduler.fleets import GIB, cluster, host, hosts_known, inventory, scheduler
from tests.support.runtime import running
from volery.contracts.cluster import CLUSTER_CHANGED
from volery.contracts.host import HOST_CHANGED
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings

GIVE = "update host_capacity set memory_used_bytes = memory_used_bytes + 1 where id = $1"
CUT_OFF = """select count(pg_terminate_backend(pid)) from pg_locks
             where not granted and database = (select oid from pg_database where datname = current_database())"""


@asynccontextmanager
async def some_hosts(configured: Settings, count: int) -> AsyncIterator[tuple[Scheduler, list[str]]]:
    """A scheduler that has read all of them; whatever it reads afterwards by itself is no more than a test asks for."""
    owner, c = inventory(), cluster()
    opened: list[Scheduler] = []
    hosts = [host(c.id, name=f"h{n}", memory_bytes=32 * GIB, cpus=8) for n in range(count)]
    async with running(configured, owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, count)
        yield opened[0], [each.id for each in hosts]


async def changed(pool: Pool, since: int, *besides: str) -> tuple[set[str], int]:
    found = await capacity_store.used(pool, since, besides)
    return {row[0] for row in found.hosts}, found.as_of


@asynccontextmanager
async def connected(database: DatabaseConfig) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await asyncpg.connect(
        database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
    )
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def other(
    configured: Settings, database: DatabaseConfig
) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    async with connected(database) as connection:
        yield connection


@pytest.fixture
async def third(
    configured: Settings, database: DatabaseConfig
) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    async with connected(database) as connection:
        yield connection


async def test_only_what_changed_since_is_read(
    configured: Settings, other: asyncpg.Connection[asyncpg.Record]
) -> None:
    async with some_hosts(configured, 4) as (mine, ids):
        pool = mine.core.pool
        everything, as_of = await changed(pool, 0)
        assert everything == set(ids)
        assert (await changed(pool, as_of))[0] == set()
        await other.execute(GIVE, ids[2])
        found, later = await changed(pool, as_of)
        assert found == {ids[2]}
        assert later > as_of
        assert (await changed(pool, later, ids[0]))[0] == {ids[0]}


async def test_who_commits_after_a_reading_that_it_began_before_is_in_the_next(
    configured: Settings,
    other: asyncpg.Connection[asyncpg.Record],
) -> None:
    """Its transaction is older than others that this reading has seen."""
    async with some_hosts(configured, 4) as (mine, ids):
        pool = mine.core.pool
        _, as_of = await changed(pool, 0)
        slow = other.transaction()
        await slow.start()
        await other.execute(GIVE, ids[0])
        await pool.execute(GIVE, ids[1])
        found, as_of = await changed(pool, as_of)
        assert found == {ids[1]}
        await slow.commit()
        found, _ = await changed(pool, as_of)
        assert ids[0] in found


async def test_who_commits_while_younger_ones_are_under_way_is_in_the_next(
    configured: Settings,
    other: asyncpg.Connection[asyncpg.Record],
    third: asyncpg.Connection[asyncpg.Record],
) -> None:
    """Numbers that transactions under way have are given away, though no reading has seen one of them."""
    async with some_hosts(configured, 3) as (mine, ids):
        pool = mine.core.pool
        slow, younger = other.transaction(), third.transaction()
        await slow.start()
        await other.execute(GIVE, ids[0])
        await younger.start()
        for _ in range(3):  # each has a number of its own
            async with third.transaction():
                await third.execute(GIVE, ids[1])
        _, as_of = await changed(pool, 0)
        await slow.commit()
        found, as_of = await changed(pool, as_of)
        assert found == {ids[0]}
        await younger.commit()
        assert ids[1] in (await changed(pool, as_of))[0]


async def test_what_was_guessed_is_read_again_also_when_its_reading_failed(
    configured: Settings, other: asyncpg.Connection[asyncpg.Record]
) -> None:
    async with some_hosts(configured, 2) as (mine, ids):
        fleet, row = mine.fleet, mine.fleet.rows[ids[0]]
        await mine.read_used()
        fleet.use(ids[0], GIB, 1, 1)
        async with other.transaction():
            await other.execute("lock table host_capacity in access exclusive mode")
            reading = asyncio.create_task(mine.read_used())
            while not await other.fetchval(CUT_OFF):
                assert not reading.done()
            with pytest.raises((asyncpg.PostgresError, OSError)):
                await reading
        assert fleet.ints("memory_used")[row] == GIB
        await mine.read_used()
        assert fleet.ints("memory_used")[row] == 0, "it never was"


async def test_what_was_only_guessed_here_is_read_again(
    configured: Settings,
    other: asyncpg.Connection[asyncpg.Record],
) -> None:
    async with some_hosts(configured, 3) as (mine, ids):
        fleet, row = mine.fleet, mine.fleet.rows[ids[0]]
        for guess in (
            lambda: fleet.use(ids[0], GIB, 1, 1),
            lambda: fleet.book(ids[0], GIB, 1, 1, 0, 0, 0),
        ):
            await mine.read_used()
            guess()
            assert fleet.ints("memory_used")[row] == GIB
            if fleet._booked:
                await mine.read_used()
                assert fleet.ints("memory_used")[row] == GIB, "what is about to be committed counts"
                fleet.booked(ids[0], GIB, 1, 1, 0, 0, 0, committed=True)
            await mine.read_used()
            assert fleet.ints("memory_used")[row] == 0, "it never was"
