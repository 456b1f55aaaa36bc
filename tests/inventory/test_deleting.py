"""A deletion that was begun goes on until it is done: nothing comes back with half of its disks."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.inventory.service import service as inventory
from services.storage.service import service as storage
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
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HostStatus
from volery.contracts.operation import OperationState
from volery.contracts.storage import CREATE_STORAGE_DOMAIN, CreateStorageDomain, DomainKind
from volery.contracts.vm import CREATE_VM, DELETE_VM, GET_VM, CreateVm, DeleteVm, NewDisk, VmStatus
from volery.runtime.bus import Bus

MIB = 1024 * 1024


@pytest.fixture
def plane() -> Iterator[Plane]:
    with plane_servers() as made:
        yield made


async def made_domain(bus: Bus, data_center_id: str, path: Path) -> str:
    ask = CreateStorageDomain(
        name="d", kind=DomainKind.DIRECTORY, data_center_id=data_center_id, path=str(path)
    )
    async with asyncio.timeout(20):
        while True:
            try:
                operation = await bus.ask(CREATE_STORAGE_DOMAIN, ask)
                break
            except Refused:  # storage has not heard yet that the host is up
                await asyncio.sleep(0.05)
    return (await succeeded(bus, operation)).object_id


async def test_a_vm_whose_disk_could_not_go_is_deleted_on(plane: Plane, tmp_path: Path) -> None:
    async with running_plane(plane, inventory, storage) as bus:
        cluster = await default_cluster(bus)
        agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI="test:///default")
        agent.start()
        try:
            await until_host(bus, agent.host.id, HostStatus.UP)
            domain_id = await made_domain(bus, cluster.data_center_id, tmp_path)
            ask = CreateVm(
                name="vm",
                cluster_id=cluster.id,
                memory_bytes=32 * MIB,
                disks=(NewDisk(storage_domain_id=domain_id, size_bytes=MIB),),
            )
            made = await succeeded(bus, await bus.ask(CREATE_VM, ask))
            (volume,) = (tmp_path / domain_id / "disks").iterdir()
            with volume.open("r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX, 1, 100)  # as QEMU does with an image that it has open
                failed = await ended(bus, await bus.ask(DELETE_VM, DeleteVm(id=made.object_id)))
            assert failed.state is OperationState.FAILED
            vm = await bus.ask(GET_VM, GetById(id=made.object_id))
            assert vm.status is VmStatus.DELETING, "its disk is its own no more"
            await succeeded(bus, await bus.ask(DELETE_VM, DeleteVm(id=made.object_id)))
            with pytest.raises(Refused) as gone:
                await bus.ask(GET_VM, GetById(id=made.object_id))
            assert gone.value.kind is Kind.NOT_FOUND
            assert not volume.exists()
        finally:
            agent.stop()
