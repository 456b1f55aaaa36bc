"""A relay whose answers get lost again and again: it goes on as soon as the bus does."""

from __future__ import annotations

import asyncio

import asyncpg
from msgspec.structs import replace

from tests.support.interloper import Interloper, between
from tests.support.runtime import open_bus
from volery.contracts.base import Owner
from volery.runtime.bus import Bus
from volery.runtime.database import migrate, open_direct
from volery.runtime.programs import Settings
from volery.runtime.relay import BATCH, PENDING, Log, Relay, stream_name
from volery.runtime.tasks import end

OWNER = Owner.HA
INTERRUPTIONS = PENDING // BATCH + 1


async def facts_wait(connection: asyncpg.Connection[asyncpg.Record], count: int) -> None:
    await connection.execute(
        """insert into outbox (subject, body)
           select 'fact.ha.toy.' || n || '.changed', convert_to(',"data":{}}', 'UTF8')
           from generate_series(1, $1::int) n""",
        count,
    )


async def never(_: str) -> None:
    raise AssertionError("nothing was restored")


async def until_at(bus: Bus, position: int) -> None:
    js = bus.client.jetstream()
    async with asyncio.timeout(30):
        while (await js.stream_info(stream_name(OWNER))).state.last_seq != position:
            await asyncio.sleep(0.02)


async def interrupted(relay: Relay, wire: Interloper) -> bool:
    """Whether a whole batch went out whose answers nobody will ever hear."""
    kept = relay.js.publish_async_pending()
    wire.freeze()
    relay.wake.set()
    try:
        async with asyncio.timeout(3):
            while relay.js.publish_async_pending() < kept + BATCH:
                await asyncio.sleep(0)
    except TimeoutError:
        return False  # it asked where its stream stands just then
    finally:
        wire.cut()
    return True


async def test_answers_that_get_lost_do_not_stop_it(configured: Settings) -> None:
    await migrate(configured.database, OWNER)
    port = int(configured.bus.servers.rsplit(":", 1)[1])
    async with (
        between(port) as wire,
        open_direct(configured.database, OWNER) as relays,
        open_direct(configured.database, OWNER) as ours,
        open_bus(configured.bus, "gateway") as watching,
        open_bus(replace(configured.bus, servers=f"nats://127.0.0.1:{wire.port}"), OWNER) as bus,
    ):
        relay = Relay(bus, Log(OWNER, relays), 1, asyncio.Event(), never, answer_seconds=2.0)
        said = lost = 0
        await facts_wait(ours, 1)
        task = asyncio.create_task(relay.run())
        try:
            await until_stands(watching)
            while lost < INTERRUPTIONS:
                await facts_wait(ours, BATCH)
                said += BATCH
                lost += await interrupted(relay, wire)
                await until_at(watching, said + 1)
        finally:
            await end([task])


async def until_stands(bus: Bus) -> None:
    """Until there is a stream."""
    async with asyncio.timeout(30):
        while stream_name(OWNER) not in [s.config.name for s in await bus.client.jetstream().streams_info()]:
            await asyncio.sleep(0.02)
    await until_at(bus, 1)
