"""Looks at the host's networks all the time, and has them reported when something about them changed: a cable that was
pulled, a device that somebody removed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from host_agent import network
from host_agent.action import Host
from volery.contracts.agent import BridgeReport
from volery.contracts.errors import Refused

log = logging.getLogger(__name__)


async def watch(host: Host, changed: Callable[[], None]) -> None:
    """For as long as the agent lives."""
    before: tuple[BridgeReport, ...] | None = None
    while True:
        await asyncio.sleep(host.config.network_check_seconds)
        try:
            now = await network.report(host)
        except Refused as refused:
            log.info("the host's networks can't be looked at: %s", refused.message)
            continue
        if before is not None and now != before:
            changed()
        before = now
