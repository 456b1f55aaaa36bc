"""A VM counts as running with its disks from the moment it is told where they are, however late the facts are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from services.storage import projection
from services.storage.service import make_service
from tests.storage.scripted_host import GIB, MIB
from tests.storage.scripted_storage import Site, site
from tests.support.service_process import captured
from volery.contracts.base import Owner
from volery.contracts.errors import Refused
from volery.contracts.storage import (
    ACT_ON_STORAGE_DOMAIN,
    ATTACH_DISK_TO,
    COPY_DISK,
    CREATE_TRANSFER,
    DETACH_DISK_FROM,
    PREPARE_DISKS,
    RESIZE_DISK,
    ActOnStorageDomain,
    AttachDiskTo,
    CopyDisk,
    CreateTransfer,
    DetachDiskFrom,
    Disk,
    PrepareDisks,
    ResizeDisk,
)
from volery.contracts.vm import VM_CHANGED, Vm, VmStatus
from volery.contracts.volume_orders import TransferDirection
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


@asynccontextmanager
async def scene(configured: Settings, **options: Any) -> AsyncIterator[tuple[Site, Disk, Vm]]:
    """A disk of a VM that is down, as storage has heard."""
    async with site(configured, hosts=1, **options) as at:
        disk = await at.new_disk(await at.new_domain())
        vm = await at.world.vm(at.center, "v")
        await at.bus.ask(ATTACH_DISK_TO, AttachDiskTo(disk_id=disk.id, vm_id=vm.id))
        await heard(configured, vm)
        yield at, disk, vm


async def heard(configured: Settings, vm: Vm) -> None:
    """Until storage has."""
    sql = "select 1 from vm where id = $1 and status = $2 and epoch = $3"
    async with open_direct(configured.database, Owner.STORAGE) as connection, asyncio.timeout(15):
        while not await connection.fetchval(sql, vm.id, str(vm.status), vm.epoch):
            await asyncio.sleep(0.02)


async def is_now(configured: Settings, at: Site, vm: Vm, status: VmStatus, epoch: int) -> None:
    now = replace(vm, status=status, epoch=epoch)
    await at.world.put(VM_CHANGED, now)
    await heard(configured, now)


def prepare(at: Site, disk: Disk, vm: Vm, epoch: int) -> Awaitable[Any]:
    ask = PrepareDisks(vm_id=vm.id, host_id=at.rows[0].id, disk_ids=(disk.id,), epoch=epoch)
    return at.bus.ask(PREPARE_DISKS, ask)


def copy(at: Site, disk: Disk) -> Awaitable[Any]:
    return at.bus.ask(COPY_DISK, CopyDisk(id=disk.id, name="c"))


def transfer(at: Site, disk: Disk, direction: TransferDirection) -> Awaitable[Any]:
    size = MIB if direction is TransferDirection.UPLOAD else 0
    return at.bus.ask(CREATE_TRANSFER, CreateTransfer(disk_id=disk.id, direction=direction, size_bytes=size))


def maintain(at: Site, disk: Disk) -> Awaitable[Any]:
    return at.bus.ask(ACT_ON_STORAGE_DOMAIN, ActOnStorageDomain(id=disk.storage_domain_id, action="maintain"))


TOUCHES: dict[str, Callable[[Site, Disk], Awaitable[Any]]] = {
    "copy": copy,
    "upload": lambda at, disk: transfer(at, disk, TransferDirection.UPLOAD),
    "download": lambda at, disk: transfer(at, disk, TransferDirection.DOWNLOAD),
    "maintain": maintain,
}


@pytest.mark.parametrize("touch", TOUCHES)
async def test_nobody_touches_a_disk_whose_vm_is_about_to_run(configured: Settings, touch: str) -> None:
    async with scene(configured) as (at, disk, vm):
        await prepare(at, disk, vm, 1)
        for status, epoch in ((None, 0), (VmStatus.DOWN, 0), (VmStatus.UP, 1)):
            if status is not None:  # late, or in time
                await is_now(configured, at, replace(vm, name=f"v{epoch}"), status, epoch)
            with pytest.raises(Refused, match=r"(runs|starts) with it|running VMs v"):
                await TOUCHES[touch](at, disk)
        await is_now(configured, at, vm, VmStatus.DOWN, 1)
        await TOUCHES[touch](at, disk)


async def test_a_disk_whose_vm_is_about_to_run_grows_in_it(configured: Settings) -> None:
    async with scene(configured) as (at, disk, vm):
        await prepare(at, disk, vm, 1)
        await at.done(await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=2 * GIB)))
        assert [asked.vm_id for asked in at.world.resized] == [vm.id]
        assert not at.hosts[0].agent.begun("volume.resize")


async def test_a_start_that_has_ended_leaves_no_note(configured: Settings) -> None:
    """Asked late, or once more; or the VM has lost the disk."""
    async with scene(configured) as (at, disk, vm):
        await is_now(configured, at, vm, VmStatus.DOWN, 3)
        for epoch in (0, 2, 3, 3):
            await prepare(at, disk, vm, epoch)
        await at.done(await copy(at, disk))
        await prepare(at, disk, vm, 4)
        await prepare(at, disk, vm, 2)
        with pytest.raises(Refused, match=r"(runs|starts) with it"):
            await copy(at, disk)
        await at.bus.ask(DETACH_DISK_FROM, DetachDiskFrom(disk_id=disk.id, vm_id=vm.id))
        await at.bus.ask(ATTACH_DISK_TO, AttachDiskTo(disk_id=disk.id, vm_id=vm.id))
        await at.done(await copy(at, disk))


@pytest.mark.parametrize("first", ["prepare", "upload"])
async def test_of_a_start_and_a_writer_at_once_one_is_refused(configured: Settings, first: str) -> None:
    """Both have found the disk free, and wait to write that they have it."""
    async with scene(configured) as (at, disk, vm), open_direct(configured.database, Owner.STORAGE) as other:
        asks = {
            "prepare": lambda: prepare(at, disk, vm, 1),
            "upload": lambda: transfer(at, disk, TransferDirection.UPLOAD),
        }
        order = [first, *(asks.keys() - {first})]
        tasks = []
        async with other.transaction():
            await other.execute("select 1 from disk where id = $1 for update", disk.id)
            for number, name in enumerate(order, 1):
                tasks.append(asyncio.ensure_future(asks[name]()))

                async def waits(number: int = number) -> bool:
                    sql = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
                    return int(await other.fetchval(sql)) >= number

                await at.until(waits)
        done = dict(zip(order, await asyncio.gather(*tasks, return_exceptions=True), strict=True))
        assert len([answer for answer in done.values() if isinstance(answer, Refused)]) == 1, done


async def test_what_a_restored_inventory_has_forgotten_is_forgotten(configured: Settings) -> None:
    """No fact will ever say that an epoch has ended which was given after the backup; a later one is kept."""
    found: list[Any] = []
    async with scene(configured, service=captured(make_service(), found)) as (at, disk, vm):
        await prepare(at, disk, vm, 5)
        await projection.list_again(found[0], "FACTS_INVENTORY")
        await at.done(await copy(at, disk))
        await prepare(at, disk, vm, 6)
        at.world.objects[vm.id] = replace(vm, status=VmStatus.WAIT_FOR_LAUNCH, epoch=6)
        await projection.list_again(found[0], "FACTS_INVENTORY")
        with pytest.raises(Refused, match=r"(runs|starts) with it"):
            await copy(at, disk)


async def test_what_no_fact_says_is_asked_for(configured: Settings) -> None:
    """It was lost, or heard by a former release that knows no epochs. An older answer changes nothing."""
    found: list[Any] = []
    async with scene(configured, service=captured(make_service(), found)) as (at, disk, vm):
        await prepare(at, disk, vm, 5)
        at.world.objects[vm.id] = replace(vm, status=VmStatus.UP, epoch=5)
        await projection.settle_begun(found[0])
        with pytest.raises(Refused, match=r"(runs|starts) with it"):
            await copy(at, disk)
        await is_now(configured, at, vm, VmStatus.DOWN, 5)
        older = found[0].store.catch_up(replace(vm, status=VmStatus.UP, epoch=5))
        await found[0].core.commit(older)  # the fact was heard between the question and this
        await at.done(await copy(at, disk))
        await prepare(at, disk, vm, 6)
        at.world.objects[vm.id] = replace(vm, status=VmStatus.DOWN, epoch=6)
        await projection.settle_begun(found[0])
        await at.done(await copy(at, disk))
        await prepare(at, disk, vm, 9)  # which inventory doesn't know
        await projection.settle_begun(found[0])
        await at.done(await copy(at, disk))
        await prepare(at, disk, vm, 10)
        del at.world.objects[vm.id]
        await projection.settle_begun(found[0])
        await at.done(await copy(at, disk))
