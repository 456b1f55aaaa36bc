"""An agent with toy actions as a process of its own: `python -m tests.support.toy_agent`, to be killed at will."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from host_agent import enrolment
from host_agent.action import Host
from host_agent.agent import Agent, Parts
from host_agent.config import AgentConfig
from host_agent.reports import Senses
from tests.support.toy_host import TOYS
from volery.contracts.agent import BridgeReport, HostCapabilities, LunClaim, OpenLun, StorageDomainReport
from volery.contracts.metrics import HostSample
from volery.runtime import config, telemetry


async def describe(_host: Host) -> HostCapabilities:
    return HostCapabilities(hostname="toy")


async def nothing_stored(_host: Host) -> tuple[StorageDomainReport, ...]:
    return ()


async def no_networks(_host: Host) -> tuple[BridgeReport, ...]:
    return ()


async def nothing_open(_host: Host) -> tuple[OpenLun, ...]:
    return ()


async def nothing_claimed(_host: Host) -> tuple[LunClaim, ...]:
    return ()


async def sample(host: Host) -> HostSample:
    return HostSample(host_id=host.host_id, boot_id="", at=datetime.now(UTC))


PARTS = Parts(
    actions=TOYS,
    senses=Senses(describe, nothing_stored, no_networks, nothing_open, nothing_claimed),
    sample=sample,
)


async def main() -> int:
    settings = config.read("VOLERY_AGENT_", AgentConfig)
    identity = enrolment.load(Path(settings.state_dir))
    assert identity is not None
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return await Agent(settings, identity, PARTS).run(stop)


if __name__ == "__main__":
    telemetry.configure("toy", config.TelemetryConfig())
    os._exit(uvloop.run(main()))
