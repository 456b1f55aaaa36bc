"""A running scheduler: its fleet is read before the first question, and followed until it closes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.scheduler.granting import rounds_of
from services.scheduler.state import Scheduler
from volery.contracts.metrics import METRICS_SUBJECT
from volery.runtime.connection import settle
from volery.runtime.core import Core


@asynccontextmanager
async def open_scheduler(core: Core) -> AsyncIterator[Scheduler]:
    """The fleet is complete when this yields, so that the first question gets a right answer."""
    scheduler = Scheduler(core)
    scheduler.rounds = rounds_of(scheduler)
    await scheduler.reload()
    await core.bus.client.subscribe(METRICS_SUBJECT.format(host_id="*"), cb=scheduler.hear_sample)
    await settle(core.bus.client)
    following = asyncio.create_task(scheduler.follow())
    try:
        yield scheduler
    finally:
        await scheduler.rounds.close()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
