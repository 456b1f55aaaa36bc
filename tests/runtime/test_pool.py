"""A connection that is given back can be used by the next, whatever the one before did with it."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from volery.runtime.config import DatabaseConfig
from volery.runtime.database import AWAY, open_pool

CALLERS = 40
BACKEND = "select pg_backend_pid()"


async def test_a_connection_goes_back_at_once(database: DatabaseConfig) -> None:
    """Without a task for it: before anything else gets a turn."""
    async with open_pool(database, "inventory") as pool:
        connection = await pool.acquire()
        release = pool.release(connection)
        with pytest.raises(StopIteration):
            release.send(None)
        assert pool.get_idle_size() == pool.get_size() == 1
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            await connection.execute("select 1")
        await pool.release(connection)  # a second time is no error
        assert await pool.fetchval("select 1") == 1


async def test_many_callers_take_turns(database: DatabaseConfig) -> None:
    async with open_pool(database, "inventory") as pool:
        found = await asyncio.gather(*(pool.fetchval(BACKEND) for _ in range(CALLERS)))
        assert len(set(found)) <= database.pool_max
        assert pool.get_idle_size() == pool.get_size() <= database.pool_max


async def test_a_transaction_that_was_left_open_is_rolled_back(database: DatabaseConfig) -> None:
    async with open_pool(database, "inventory") as pool:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
        async with pool.acquire() as connection:
            await connection.execute("create table left_open (id int)")
            await connection.execute("begin; insert into left_open values (1)")
        assert await pool.fetchval("select count(*) from left_open") == 0
        assert told


async def test_a_statement_that_was_cancelled_leaves_its_connection_usable(database: DatabaseConfig) -> None:
    async with open_pool(database, "inventory") as pool:
        for _ in range(5):
            async with pool.acquire() as other:
                asked = asyncio.create_task(pool.execute("select pg_sleep(60)"))
                sleeping = "select exists(select 1 from pg_stat_activity where query = 'select pg_sleep(60)')"
                while not await other.fetchval(sleeping):
                    await asyncio.sleep(0)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert await asyncio.gather(*(pool.fetchval("select 7") for _ in range(4))) == [7] * 4


async def test_a_connection_that_the_server_ended_is_replaced(database: DatabaseConfig) -> None:
    async with open_pool(database, "inventory") as pool:
        async with pool.acquire() as one:
            ended = await one.fetchval(BACKEND)
            await pool.execute("select pg_terminate_backend($1)", ended)
            while await _backend(one):
                continue
        while not all(found := await asyncio.gather(*(_backend(pool) for _ in range(4)))):
            continue
        assert ended not in found


async def _backend(where: Any) -> int | None:
    try:
        return int(await where.fetchval(BACKEND))
    except AWAY:
        return None


async def test_who_listened_is_forgotten(database: DatabaseConfig) -> None:
    async with open_pool(database, "inventory") as pool:
        heard: list[object] = []
        with pytest.warns(asyncpg.InterfaceWarning, match="active"):
            async with pool.acquire() as connection:
                await connection.add_listener("bell", lambda *said: heard.append(said))
        await pool.execute("notify bell")
        assert await pool.fetchval("select 1") == 1
        assert not heard
