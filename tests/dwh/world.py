"""Samples of hosts and their VMs, and a dwh whose clock the test turns."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg

from services.dwh.service import service as declared
from services.dwh.state import Dwh
from volery.contracts.base import encode, fill
from volery.contracts.metrics import METRICS_SUBJECT, DiskSample, HostSample, NicSample, VmSample
from volery.runtime.bus import Bus
from volery.runtime.config import DatabaseConfig
from volery.runtime.service import Service

HOST = "01920000-0000-7000-8000-000000000001"
NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


def dwh(opened: list[Dwh] | None = None) -> Service:
    """The real service; what it opened is added to `opened`."""

    async def remember(made: Dwh) -> None:
        if opened is not None:
            opened.append(made)

    return dataclasses.replace(declared, on_follow=remember)


def sample(at: datetime, *, received: int = 0, read: int = 0, cpu: float = 50.0, **fields: Any) -> HostSample:
    """One host with one VM, one disk, one NIC."""
    vm = VmSample(
        vm_id="vm",
        cpu_percent=cpu * 2,
        memory_used_bytes=100,
        memory_bytes=200,
        disks=(DiskSample(disk_id="disk", read_bytes=read, allocated_bytes=1000),),
        nics=(NicSample(nic_id="nic", received_bytes=received),),
    )
    made = {
        "host_id": HOST,
        "boot_id": "b",
        "at": at,
        "cpu_percent": cpu,
        "memory_used_bytes": 10,
        "memory_bytes": 20,
        "received_bytes": received,
        "vms": (vm,),
    }
    return HostSample(**(made | fields))


async def publish(bus: Bus, made: HostSample) -> None:
    await bus.client.publish(fill(METRICS_SUBJECT, made), encode(made))


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while True:
        value = await condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def connected(database: DatabaseConfig) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(
        database.dsn, user="dwh", password="secret", server_settings={"search_path": "dwh"}
    )
    try:
        yield connection
    finally:
        await connection.close()
