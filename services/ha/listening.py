"""Since when this replica hears everything that hosts say. Every replica listens, so that whoever leads next needs not wait
through a silence that it has heard itself."""

from __future__ import annotations

import asyncio

import nats.errors
from nats.aio.client import Client

from services.ha.state import Ha
from volery.runtime.clock import monotonic

TICK_SECONDS = 0.25
STALL_SECONDS = 1.0
"""A tick that comes this late: the process was stopped or starved, and beats still wait in the socket."""


def heard_on(ha: Ha) -> Client:
    """The connection on which beats come: another service's, where several are one process."""
    return ha.core.beats.client or ha.core.bus.client


def anew(ha: Ha) -> None:
    now = monotonic()
    ha.listening_since, ha.ticked_at, ha.storm_since = now + ha.config.settle_seconds, now, None
    ha.reconnects = heard_on(ha).stats["reconnects"]


def goes_on(ha: Ha) -> bool:
    """Whether nothing was missed since this was last asked; if something was, listening begins anew."""
    now, client = monotonic(), heard_on(ha)
    stalled = now - ha.ticked_at > STALL_SECONDS
    ha.ticked_at = now
    reconnects = client.stats["reconnects"]
    interrupted = not client.is_connected or reconnects != ha.reconnects
    ha.reconnects = reconnects
    if stalled or interrupted:
        anew(ha)
    return client.is_connected and not stalled


async def follow(ha: Ha) -> None:
    """Until cancelled: whether it goes on, on a replica that doesn't lead. The leader asks at each judgement."""
    while True:
        await asyncio.sleep(TICK_SECONDS)
        if not ha.core.operations.leading:
            goes_on(ha)


async def can_ask(client: Client, seconds: float) -> bool:
    """Whether the server answers us."""
    try:
        await client.flush(timeout=max(int(seconds), 1))
    except (nats.errors.Error, TimeoutError):
        return False
    return True
