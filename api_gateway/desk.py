"""What every handler gets: the bus, the door, the feed, the settings. Nothing is global."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

from api_gateway.auth import Attempts, Door
from api_gateway.config import GatewayConfig
from api_gateway.feed import Event, Feed
from api_gateway.meters import Meters
from volery.contracts.base import Call
from volery.contracts.errors import Kind, Refused
from volery.runtime.bus import Bus, Caller

audit = logging.getLogger("volery.audit")


@dataclass(slots=True)
class Desk:
    config: GatewayConfig
    bus: Bus
    door: Door
    feed: Feed
    attempts: Attempts
    catch_ups: asyncio.Semaphore
    meters: Meters = field(default_factory=Meters)
    trace_reads: float = 0.0
    """Share of reads that are traced."""

    async def ask(self, call: Call[Any, Any], body: bytes, caller: Caller) -> bytes:
        """The answer's bytes. An attempt that isn't answered is made again under the same request id, which gives
        the first answer if the first one arrived after all. Raises Refused."""
        total = max(self.config.call_total_seconds, call.timeout_seconds)
        # A call that is declared slow gets all of its time; asking it twice would only double the work.
        attempt = self.config.call_attempt_seconds if call.timeout_seconds <= 10.0 else call.timeout_seconds
        until = time.monotonic() + total
        while True:
            left = until - time.monotonic()
            try:
                return await self.bus.ask_raw(call.subject, body, caller, min(attempt, max(left, 0.05)))
            except Refused as refused:
                again = refused.kind is Kind.TIMEOUT or (
                    refused.kind is Kind.UNAVAILABLE and refused.message.startswith("nobody answers")
                )
                if not again or (call.mutates and not caller.request_id) or time.monotonic() + 0.1 >= until:
                    raise
                caller = replace(caller, fresh=False)


def make_desk(config: GatewayConfig, bus: Bus, trace_reads: float = 0.0) -> Desk:
    door = Door(bus, config.token_cache_seconds)

    def heard(event: Event) -> None:
        if event.type.startswith(("dev.volery.inventory.token.", "dev.volery.inventory.user.")):
            door.heard(*event.about.split("/", 1))

    feed = Feed(bus.client, config.ring_events, config.ring_bytes, config.ring_preload_events, heard)
    return Desk(
        config=config,
        bus=bus,
        door=door,
        feed=feed,
        attempts=Attempts(config.login_attempts_per_minute),
        catch_ups=asyncio.Semaphore(config.catch_ups),
        trace_reads=trace_reads,
    )
