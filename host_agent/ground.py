"""What an agent stands on: libvirt, the bus, its disk and the machine's clock, or what the simulation puts in their place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from nats.aio.client import Client

from host_agent.clock import boottime_ms, read_boot_id
from host_agent.config import AgentConfig
from host_agent.database import Database
from host_agent.fencing import Run
from host_agent.hypervisor import Hypervisor
from host_agent.peers import Knock, knock
from host_agent.shutdown import is_going_down
from host_agent.solitude import alone
from volery.fencing import running
from volery.runtime.bus_client import BusClient


@dataclass(frozen=True, slots=True)
class Ground:
    hypervisor: Callable[[AgentConfig], Hypervisor] = Hypervisor
    client: Callable[[str], Client] = BusClient
    """(what to do when servers refuse its credentials) → a client that is not connected yet"""
    database: Callable[[Path, str], Database] = Database
    """(file, schema) → the journal's database"""
    alone: Callable[[Path], AbstractAsyncContextManager[None]] = alone
    boot_id: Callable[[Path], str] = read_boot_id
    now_ms: Callable[[], int] = boottime_ms
    fence: Run = running.run
    knock: Knock = knock
    """At another host's door."""
    going_down: Callable[[AgentConfig], Awaitable[bool]] = is_going_down
    """Whether the host is being shut down."""
