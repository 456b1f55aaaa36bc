"""A relay whose answers get lost again and again: it goes on as soon as they come."""

from __future__ import annotations

import asyncio

import asyncpg
import nats.js.errors
import pytest
from nats.js.api import StreamConfig
from nats.js.client import JetStreamContext

from tests.support.runtime import open_bus
from volery.contracts.base import Owner
from volery.runtime.bus import Bus
from volery.runtime.database import migrate, open_direct
from volery.runtime.programs import Settings
from volery.runtime.relay import BATCH, PENDING, Log, Relay, stream_name
from volery.runtime.tasks import end

OWNER = Owner.HA
INTERRUPTIONS = PENDING // BATCH + 1
SILENT = StreamConfig(name=stream_name(OWNER), subjects=[f"fact.{OWNER}.>"], no_ack=True)


async def facts_wait(connection: asyncpg.Connection[asyncpg.Record], count: int) -> None:
    await connection.execute(
        """insert into outbox (subject, body)
           select 'fact.ha.toy.' || n || '.changed', convert_to(',"data":{}}', 'UTF8')
           from generate_series(1, $1::int) n""",
        count,
    )


async def never(_: str, __: int) -> None:
    raise AssertionError("nothing was restored")


async def until_at(bus: Bus, position: int) -> None:
    js = bus.client.jetstream(timeout=30)
    async with asyncio.timeout(60):
        while await _last(js) != position:
            await asyncio.sleep(0.02)


async def _last(js: JetStreamContext) -> int:
    """-1 while there is no stream: one that isn't the relay's own is deleted and made anew."""
    try:
        return int((await js.stream_info(stream_name(OWNER))).state.last_seq)
    except nats.js.errors.NotFoundError:
        return -1


async def test_answers_that_get_lost_do_not_stop_it(configured: Settings) -> None:
    """The stream takes what is published and says nothing, for more batches than the client waits for."""
    await migrate(configured.database, OWNER)
    async with open_direct(configured.database, OWNER) as connection, open_bus(configured.bus, OWNER) as bus:
        js = bus.client.jetstream(timeout=30)
        await js.add_stream(SILENT)
        relay = Relay(bus, Log(OWNER, connection), 1, asyncio.Event(), never, answer_seconds=0.05)
        for _ in range(INTERRUPTIONS):
            await facts_wait(connection, BATCH)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(30):
                    await relay._publish(await relay.facts.move())
        await until_at(bus, INTERRUPTIONS * BATCH)
        assert relay.js.publish_async_pending() == 0
        await js.update_stream(SILENT.evolve(no_ack=False))
        await facts_wait(connection, 1)
        relay.answer_seconds = 30.0
        task = asyncio.create_task(relay.run())
        try:
            await until_at(bus, INTERRUPTIONS * BATCH + 1)
        finally:
            await end([task])
