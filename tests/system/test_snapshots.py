"""Snapshots of a VM that runs in a real QEMU, through all services; what its disks hold is compared."""

from __future__ import annotations

from pathlib import Path

import msgspec

from services.inventory.service import service as inventory
from services.scheduler.service import service as scheduler
from services.storage.service import service as storage
from tests.storage.test_real_host import made_domain
from tests.support.agent_host import qemu_io
from tests.support.libvirt_host import LibvirtHost
from tests.support.plane import (
    Plane,
    default_cluster,
    enrolled_agent,
    running_plane,
    succeeded,
    until_host,
)
from tests.system.test_thin_thread import machine, plane, status
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.domain import ImageFormat
from volery.contracts.host import HostStatus
from volery.contracts.operation import ListQuery
from volery.contracts.snapshot import (
    CREATE_SNAPSHOT,
    DELETE_SNAPSHOT,
    LIST_SNAPSHOTS,
    REVERT_TO_SNAPSHOT,
    CreateSnapshot,
    RevertToSnapshot,
    Snapshot,
)
from volery.contracts.storage import (
    ACT_ON_STORAGE_DOMAIN,
    GET_DISK,
    ActOnStorageDomain,
    Disk,
    DiskStatus,
)
from volery.contracts.vm import (
    CREATE_VM,
    GET_VM,
    START_VM,
    STOP_VM,
    CreateVm,
    NewDisk,
    StartVm,
    StopVm,
    VmStatus,
)
from volery.runtime.bus import Bus

__all__ = ["machine", "plane"]
MIB = 1024**2


async def snapshots(bus: Bus) -> list[Snapshot]:
    found = await bus.ask(LIST_SNAPSHOTS, ListQuery())
    return [msgspec.json.decode(item, type=Snapshot) for item in found.items]


async def test_a_running_vm_goes_on_and_comes_back_on_its_chain(
    plane: Plane, machine: LibvirtHost, tmp_path: Path
) -> None:
    path = tmp_path / "domain"
    path.mkdir()
    tmp_path.chmod(0o755)
    async with running_plane(plane, inventory, scheduler, storage) as bus:
        cluster = await default_cluster(bus)
        agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI=machine.uri)
        agent.start()
        try:
            host = await until_host(bus, agent.host.id, HostStatus.UP)
            domain = (await made_domain(bus, host.data_center_id, path)).id
            disks = tuple(
                NewDisk(storage_domain_id=domain, size_bytes=16 * MIB, format=format)
                for format in ImageFormat
            )
            ask = CreateVm(name="db", cluster_id=cluster.id, memory_bytes=64 * MIB, disks=disks)
            vm_id = (await succeeded(bus, await bus.ask(CREATE_VM, ask))).object_id
            ids = [disk.disk_id for disk in (await bus.ask(GET_VM, GetById(id=vm_id))).disks]

            async def disk(disk_id: str) -> Disk:
                return await bus.ask(GET_DISK, GetById(id=disk_id))

            async def leaf(disk_id: str) -> tuple[Path, str]:
                now = await disk(disk_id)
                volume = next(v for v in now.volumes if v.id == now.leaf_id)
                return path / domain / "disks" / f"{volume.id}.{volume.format}", str(volume.format)

            async def io(command: str) -> None:
                for disk_id in ids:
                    file, format = await leaf(disk_id)
                    qemu_io(file, command, format=format)

            async def snapshot(name: str) -> None:
                await succeeded(bus, await bus.ask(CREATE_SNAPSHOT, CreateSnapshot(vm_id=vm_id, name=name)))

            async def start() -> None:
                await succeeded(bus, await bus.ask(START_VM, StartVm(id=vm_id)))
                await status(bus, vm_id, VmStatus.UP)

            async def stop() -> None:
                await succeeded(bus, await bus.ask(STOP_VM, StopVm(id=vm_id, force=True)))
                await status(bus, vm_id, VmStatus.DOWN)

            await io("write -P 1 0 1M")
            await start()
            await snapshot("first")
            await snapshot("second")
            for disk_id in ids:
                file, _ = await leaf(disk_id)
                assert file.name in machine.run("virsh", "-c", machine.uri, "domblklist", vm_id)
                assert (await disk(disk_id)).depth == 3
            await stop()
            await io("read -P 1 0 1M")
            await io("write -P 2 0 1M")
            await start()  # on a chain of three, told by storage
            look = ActOnStorageDomain(id=domain, action="refresh")
            await succeeded(bus, await bus.ask(ACT_ON_STORAGE_DOMAIN, look))
            for disk_id in ids:  # its host said what QEMU has open
                assert ((await disk(disk_id)).status, (await disk(disk_id)).chain_problem) == (
                    DiskStatus.OK,
                    "",
                )
            await stop()
            first, second = sorted(await snapshots(bus), key=lambda one: one.name)
            await succeeded(bus, await bus.ask(REVERT_TO_SNAPSHOT, RevertToSnapshot(id=second.id)))
            await io("read -P 1 0 1M")
            await io("write -P 3 1M 1M")
            for one in (first, second):
                await succeeded(bus, await bus.ask(DELETE_SNAPSHOT, DeleteById(id=one.id)))
            await io("read -P 1 0 1M")
            await io("read -P 3 1M 1M")
            assert [(await disk(disk_id)).depth for disk_id in ids] == [1, 1]
            await start()
            await stop()
        except BaseException:  # whatever it was, the agent says more
            print(agent.log())
            raise
        finally:
            agent.stop()
