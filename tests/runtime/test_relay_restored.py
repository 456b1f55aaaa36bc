"""A database that was restored from a backup is noticed by its stream, also when that was done before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from tests.runtime.test_relay_interrupted import facts_wait, until_at
from tests.support.runtime import open_bus
from volery.contracts.base import Owner
from volery.runtime.bus import Bus
from volery.runtime.database import migrate, open_direct
from volery.runtime.programs import Settings
from volery.runtime.relay import Log, Relay
from volery.runtime.tasks import end

OWNER = Owner.HA
Backup = tuple[str, int]


async def backup(connection: asyncpg.Connection[asyncpg.Record]) -> Backup:
    history, position = await connection.fetchrow("select history, position from log_head") or ("", 0)
    return history, position


async def restore(connection: asyncpg.Connection[asyncpg.Record], kept: Backup) -> None:
    """What was said since is forgotten."""
    await connection.execute("delete from log where position > $1", kept[1])
    await connection.execute("update log_head set history = $1, position = $2", *kept)


@asynccontextmanager
async def relayed(bus: Bus, connection: asyncpg.Connection[asyncpg.Record]) -> AsyncIterator[list[int]]:
    """A relay that runs; where the stream stood whenever it found that the database is older."""
    found: list[int] = []

    async def noticed(_: str, position: int) -> None:
        found.append(position)

    relay = Relay(bus, Log(OWNER, connection), 1, asyncio.Event(), noticed)
    running = asyncio.create_task(relay.run())
    try:
        await relay.aligned.wait()
        yield found
    finally:
        await end([running])


async def test_the_same_backup_is_noticed_twice(configured: Settings) -> None:
    await migrate(configured.database, OWNER)
    async with open_direct(configured.database, OWNER) as connection, open_bus(configured.bus, OWNER) as bus:
        await facts_wait(connection, 3)
        async with relayed(bus, connection) as found:
            await until_at(bus, 3)
            assert found == []
        kept = await backup(connection)
        await facts_wait(connection, 4)
        async with relayed(bus, connection) as found:
            await until_at(bus, 7)
            assert found == []
        await restore(connection, kept)
        await facts_wait(connection, 1)
        async with relayed(bus, connection) as found:
            assert found == [7]
            await until_at(bus, 8)
        await restore(connection, kept)
        async with relayed(bus, connection) as found:
            assert found == [8]
        assert (await backup(connection))[1] == 8


async def test_a_stream_that_could_not_be_made_anew_in_time_is_made_anew_without_another_quarantine(
    configured: Settings,
) -> None:
    """The relay ended between the log's new history and the stream's."""
    await migrate(configured.database, OWNER)
    async with open_direct(configured.database, OWNER) as connection, open_bus(configured.bus, OWNER) as bus:
        await facts_wait(connection, 3)
        async with relayed(bus, connection):
            await until_at(bus, 3)
        history = await Log(OWNER, connection).rewrite_history(3)
        await facts_wait(connection, 2)
        async with relayed(bus, connection) as found:
            await until_at(bus, 5)
            assert found == []
        assert (await backup(connection))[0] == history
