"""Hosts, clusters, VMs and placements for tests of the scheduler, with defaults that fit."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from services.scheduler.config import SchedulerConfig
from services.scheduler.service import service as declared
from services.scheduler.state import Scheduler
from tests.support.speaker import Speaker
from volery.contracts.agent import HostCapabilities
from volery.contracts.base import Owner
from volery.contracts.cluster import LIST_CLUSTERS, Cluster
from volery.contracts.host import LIST_HOSTS, Host, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.network import LIST_NETWORKS, Network
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import LIST_CAPACITY, PLACE, HostCapacity, Need, Place
from volery.contracts.vm import LIST_VMS, Vm, VmStatus
from volery.runtime.bus import Bus
from volery.runtime.service import Service

GIB = 1024**3
MIB = 1024**2
NOW = datetime.now(UTC)
CONFIG = SchedulerConfig()
OVERHEAD = CONFIG.guest_overhead_mib * MIB
RESERVE = CONFIG.host_reserve_mib * MIB


def scheduler(opened: list[Scheduler] | None = None) -> Service:
    """A replica of the real service; each call makes one more. What it opened is added to `opened`."""

    async def remember(made: Scheduler) -> None:
        if opened is not None:
            opened.append(made)

    return dataclasses.replace(declared, on_follow=remember, concurrency=256)


def inventory() -> Speaker:
    return Speaker(Owner.INVENTORY, [(LIST_CLUSTERS, Cluster), (LIST_HOSTS, Host), (LIST_VMS, Vm)])


def network_owner() -> Speaker:
    return Speaker(Owner.NETWORK, [(LIST_NETWORKS, Network)])


def cluster(**fields: Any) -> Cluster:
    made = {"id": new_id(), "revision": 1, "created_at": NOW, "updated_at": NOW, "data_center_id": "dc"}
    return Cluster(**(made | {"name": "Default"} | fields))


def host(cluster_id: str, *, memory_bytes: int = 16 * GIB, cpus: int = 8, **fields: Any) -> Host:
    capabilities = HostCapabilities(memory_bytes=memory_bytes, cpus=cpus, machines=("q35",))
    made = {
        "id": new_id(),
        "revision": 1,
        "created_at": NOW,
        "updated_at": NOW,
        "name": f"host{len(fields)}",
        "cluster_id": cluster_id,
        "data_center_id": "dc",
        "status": HostStatus.UP,
        "capabilities": capabilities,
    }
    return Host(**(made | fields))


def network(name: str = "lan", **fields: Any) -> Network:
    made = {"id": new_id(), "revision": 1, "created_at": NOW, "updated_at": NOW, "data_center_id": "dc"}
    return Network(**(made | {"name": name, "kind": NetworkKind.BRIDGE} | fields))


def vm(cluster_id: str, **fields: Any) -> Vm:
    made = {
        "id": new_id(),
        "revision": 1,
        "created_at": NOW,
        "updated_at": NOW,
        "name": "web",
        "cluster_id": cluster_id,
        "data_center_id": "dc",
        "status": VmStatus.UP,
        "memory_bytes": GIB,
    }
    return Vm(**(made | fields))


def placing(cluster_id: str, *, epoch: int = 1, place: dict[str, Any] | None = None, **need: Any) -> Place:
    wanted = {"vm_id": new_id(), "cluster_id": cluster_id, "memory_bytes": GIB, "vcpus": 1, "name": "web"}
    return Place(need=Need(**(wanted | need)), epoch=epoch, **(place or {}))


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 10.0) -> Any:
    """The first true value of a condition that no event announces. Fails after the deadline."""
    end = time.monotonic() + seconds
    while True:
        value = await condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        await asyncio.sleep(0.02)


async def capacities(bus: Bus) -> dict[str, HostCapacity]:
    page = await bus.ask(LIST_CAPACITY, ListQuery(limit=1000))
    found = [msgspec.json.decode(item, type=HostCapacity) for item in page.items]
    return {c.host_id: c for c in found}


async def hosts_known(bus: Bus, count: int) -> dict[str, HostCapacity]:
    """Waits until the tables have so many hosts, and every replica that answers has them in its fleet."""

    async def enough() -> dict[str, HostCapacity] | None:
        found = await capacities(bus)
        if len(found) != count:
            return None
        cluster_id = next(iter(found.values())).cluster_id
        ask = placing(cluster_id, place={"dry_run": True})
        answers = [await bus.ask(PLACE, ask) for _ in range(8)]
        everywhere = all(len(a.hosts) == min(count, CONFIG.explained_hosts) for a in answers)
        return found if everywhere else None

    return await until(enough)
