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
from tests.support.agent_host import IscsiTarget, iscsi_target
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
from volery.contracts.storage import (
    CREATE_DISK,
    CREATE_STORAGE_DOMAIN,
    GET_DISK,
    GET_STORAGE_DOMAIN,
    CreateDisk,
    CreateStorageDomain,
    Disk,
    DomainKind,
)
from volery.contracts.vm import (
    CREATE_VM,
    DELETE_VM,
    GET_VM,
    START_VM,
    STOP_VM,
    CreateVm,
    DeleteVm,
    NewDisk,
    StartVm,
    StopVm,
    VmStatus,
)
from volery.runtime.bus import Bus
from volery.runtime.permissions import OWNERS
from volery.setup import servers
from volery.setup.database import bootstrap_database

pytestmark = pytest.mark.timeout(240)
MIB = 1024 * 1024
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
            ask = CreateVm(name="idle", cluster_id=cluster.id, memory_bytes=MEMORY)
            idle_id = (await succeeded(bus, await bus.ask(CREATE_VM, ask))).object_id
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
            async with asyncio.timeout(20):
                while not (await health(bus)).quarantine:
                    await asyncio.sleep(0.05)
            assert (await health(bus)).waits_for_hosts == (agent.host.id,)
            with pytest.raises(Refused) as refused:
                await bus.ask(START_VM, StartVm(id=idle_id))
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


async def quarantined(bus: Bus) -> bool:
    return bool((await bus.ask(GET_HEALTH[Owner.STORAGE], AskHealth())).quarantine)


async def made_disk(bus: Bus, san: str, name: str, **fields: object) -> Disk:
    ask = CreateDisk(name=name, storage_domain_id=san, **{"size_bytes": 16 * MIB} | fields)  # type: ignore[arg-type]
    op = await succeeded(bus, await bus.ask(CREATE_DISK, ask))
    return await bus.ask(GET_DISK, GetById(id=op.object_id))


async def withheld(bus: Bus, san: str) -> dict[int, str]:
    found = await bus.ask(GET_STORAGE_DOMAIN, GetById(id=san))
    return {lun.lun: lun.withheld for lun in found.luns if lun.withheld}


async def vm_with(bus: Bus, cluster_id: str, name: str, disk_id: str) -> str:
    disks = (NewDisk(disk_id=disk_id),)
    ask = CreateVm(name=name, cluster_id=cluster_id, memory_bytes=MEMORY, disks=disks)
    return (await succeeded(bus, await bus.ask(CREATE_VM, ask))).object_id


async def test_a_lun_that_the_database_forgot_stays_its_disks(
    plane: Plane, machine: LibvirtHost, tmp_path: Path
) -> None:
    """One LUN runs with a disk made after the backup though the database has another disk on it, one was given to a
    disk that nobody runs, and one holds what only a look at it tells."""
    agent = None
    programs = (inventory, scheduler, storage)
    with iscsi_target(tmp_path, address=machine.cable()) as target:
        backing = [target.add_lun(number, 16 * MIB, thin=True) for number in (1, 2, 3, 4)]
        try:
            async with running_plane(plane, *programs) as bus:
                cluster = await default_cluster(bus)
                agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI=machine.uri)
                agent.start()
                host = await until_host(bus, agent.host.id, HostStatus.UP)
                san = await made_san(bus, host.data_center_id, target)
                old = await made_disk(bus, san, "old")
                vm_id = await vm_with(bus, cluster.id, "old", old.id)
            await copy_database(plane, "volery", "backup")
            async with running_plane(plane, *programs) as bus:
                await until_host(bus, agent.host.id, HostStatus.UP)
                await succeeded(bus, await bus.ask(DELETE_VM, DeleteVm(id=vm_id)))
                new = await made_disk(bus, san, "new")
                idle = await made_disk(bus, san, "idle")
                assert (old.lun, new.lun, idle.lun) == (1, 1, 2)
                other = await vm_with(bus, cluster.id, "new", new.id)
                await succeeded(bus, await bus.ask(START_VM, StartVm(id=other)))
            agent.kill()
            for lun, content in ((1, b"new"), (3, b"somebody's")):
                with backing[lun - 1].open("r+b") as file:
                    file.write(content)
            qemu = machine.qemu(other)
            await copy_database(plane, "backup", "volery")
            async with running_plane(plane, *programs) as bus:
                async with asyncio.timeout(20):
                    while not await quarantined(bus):
                        await asyncio.sleep(0.05)
                with pytest.raises(Refused, match="quarantine"):
                    await made_disk(bus, san, "x")
                agent.start()
                async with asyncio.timeout(60):
                    while await quarantined(bus) or (await health(bus)).quarantine:
                        await asyncio.sleep(0.1)
                    await until_host(bus, agent.host.id, HostStatus.UP)
                    while set(found := await withheld(bus, san)) != {1, 2}:
                        await asyncio.sleep(0.1)
                assert f"VM {other}" in found[1]
                assert idle.id in found[2]
                free = await made_disk(bus, san, "free")
                assert free.lun == 4, "3 has something on it"
                async with asyncio.timeout(30):
                    while set(await withheld(bus, san)) != {1, 2, 3}:
                        await asyncio.sleep(0.1)
                with pytest.raises(Refused, match="no free LUN") as refused:
                    await made_disk(bus, san, "none")
                assert "is not given away" in refused.value.message
                with pytest.raises(Refused, match="has a disk already"):
                    await made_disk(bus, san, "none", lun=1, overwrite=True)
                # What was said in the lost time, such as that this VM was deleted, was not heard.
                attached = await bus.ask(GET_DISK, GetById(id=old.id))
                assert [use.vm_id for use in attached.uses] == [vm_id]
                start = await ended(bus, await bus.ask(START_VM, StartVm(id=vm_id)))
                assert start.problem is not None
                assert "may not use LUN 1" in start.problem.message
                await succeeded(bus, await bus.ask(DELETE_VM, DeleteVm(id=vm_id)))
                assert backing[0].read_bytes().startswith(b"new")
                with pytest.raises(Refused, match=f"VM {other}"):
                    await made_disk(bus, san, "none", lun=1, overwrite=True)
                assert machine.qemu(other) == qemu
                taken = await made_disk(bus, san, "taken", lun=2, overwrite=True)
                assert taken.lun == 2
                assert backing[2].read_bytes().startswith(b"somebody's")
        except BaseException:
            if agent is not None:
                print(agent.log()[-6000:])
            raise
        finally:
            if agent is not None:
                agent.stop()


async def made_san(bus: Bus, data_center_id: str, target: IscsiTarget) -> str:
    ask = CreateStorageDomain(
        name="san",
        kind=DomainKind.ISCSI,
        data_center_id=data_center_id,
        portal=target.portal,
        iqn=target.iqn,
    )
    async with asyncio.timeout(20):
        while True:
            try:
                return (await succeeded(bus, await bus.ask(CREATE_STORAGE_DOMAIN, ask))).object_id
            except Refused:  # storage has not heard yet that the host is up
                await asyncio.sleep(0.05)
