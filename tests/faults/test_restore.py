"""After a restore of an older PostgreSQL nothing is started, moved or deleted until every host has reported."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from services.inventory.service import service as inventory
from services.scheduler.service import service as scheduler
from services.storage.service import service as storage
from tests.support.libvirt_host import LibvirtHost
from tests.support.plane import (
    Plane,
    default_cluster,
    ended,
    enrolled_agent,
    plane_servers,
    running_plane,
    succeeded,
    until_host,
)
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.health import GET_HEALTH, AskHealth, Health
from volery.contracts.host import HostStatus
from volery.contracts.operation import OperationState
from volery.contracts.vm import CREATE_VM, GET_VM, START_VM, STOP_VM, CreateVm, StartVm, StopVm, VmStatus
from volery.runtime.bus import Bus
from volery.runtime.permissions import OWNERS
from volery.setup import servers
from volery.setup.database import bootstrap_database

pytestmark = pytest.mark.timeout(240)
MEMORY = 32 * 1024 * 1024


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        yield made


@pytest.fixture
def machine() -> Iterator[LibvirtHost]:
    with tempfile.TemporaryDirectory(prefix="volery-restore-", dir="/tmp") as base:
        host = LibvirtHost(Path(base) / "h")
        host.path.mkdir()
        host.start()
        yield host
        host.stop()


async def copy_database(plane: Plane, source: str, target: str) -> None:
    connection = await asyncpg.connect(plane.postgres.dsn)
    try:
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = any($1::text[])",
            [source, target],
        )
        await connection.execute(f'drop database if exists "{target}" with (force)')
        await connection.execute(f'create database "{target}" template "{source}"')
    finally:
        await connection.close()
    if target == "volery":
        await bootstrap_database(plane.postgres.dsn, OWNERS, servers.service_passwords(plane.home))


async def health(bus: Bus) -> Health:
    return await bus.ask(GET_HEALTH[Owner.INVENTORY], AskHealth())


async def test_an_older_database_waits_for_the_hosts(plane: Plane, machine: LibvirtHost) -> None:
    agent = None
    programs = (inventory, scheduler, storage)
    try:
        async with running_plane(plane, *programs) as bus:
            cluster = await default_cluster(bus)
            agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI=machine.uri)
            agent.start()
            await until_host(bus, agent.host.id, HostStatus.UP)
            made = await bus.ask(CREATE_VM, CreateVm(name="vm", cluster_id=cluster.id, memory_bytes=MEMORY))
            await succeeded(bus, made)
            vm_id = made.object_id
        await copy_database(plane, "volery", "backup")
        async with running_plane(plane, *programs) as bus:
            for _ in range(2):
                await succeeded(bus, await bus.ask(START_VM, StartVm(id=vm_id)))
                await succeeded(bus, await bus.ask(STOP_VM, StopVm(id=vm_id, force=True)))
            await succeeded(bus, await bus.ask(START_VM, StartVm(id=vm_id)))
            before = await bus.ask(GET_VM, GetById(id=vm_id))
            assert (before.status, before.epoch) == (VmStatus.UP, 3)
        agent.kill()
        (qemu,) = machine.processes("qemu")
        await copy_database(plane, "backup", "volery")
        async with running_plane(plane, *programs) as bus:
            assert (await bus.ask(GET_VM, GetById(id=vm_id))).status is VmStatus.DOWN
            async with asyncio.timeout(20):
                while not (await health(bus)).quarantine:
                    await asyncio.sleep(0.05)
            assert (await health(bus)).waits_for_hosts == (agent.host.id,)
            with pytest.raises(Refused) as refused:
                await bus.ask(START_VM, StartVm(id=vm_id))
            assert refused.value.kind is Kind.UNAVAILABLE
            assert "quarantine" in refused.value.message
            agent.start()
            async with asyncio.timeout(40):
                while (await health(bus)).quarantine:
                    await asyncio.sleep(0.1)
            vm = await bus.ask(GET_VM, GetById(id=vm_id))
            assert (vm.status, vm.host_id, vm.epoch) == (VmStatus.UP, agent.host.id, 3)
            assert machine.processes("qemu") == [qemu], "it was neither restarted nor touched"
            stopped = await ended(bus, await bus.ask(STOP_VM, StopVm(id=vm_id, force=True)))
            assert stopped.state is OperationState.SUCCEEDED, stopped.problem
            await succeeded(bus, await bus.ask(START_VM, StartVm(id=vm_id)))
            assert (await bus.ask(GET_VM, GetById(id=vm_id))).epoch > 4, "above all that the host has seen"
    except BaseException:
        if agent is not None:
            print(agent.log()[-6000:])
        raise
    finally:
        if agent is not None:
            agent.stop()
