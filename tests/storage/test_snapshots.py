"""Chains of volumes, and snapshots of disks: all or none, whatever dies."""

from __future__ import annotations

import asyncio
from pathlib import PurePath
from typing import Any

import pytest
from msgspec.structs import replace

from tests.storage.scripted_host import GIB
from tests.storage.scripted_storage import Site, site, storage_process
from tests.storage.test_faults import insist_ended
from volery.contracts.base import Owner
from volery.contracts.cluster import DeleteById
from volery.contracts.domain import ChainSource, FileSource, ImageFormat
from volery.contracts.domain_orders import NOT_SWITCHED
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import CANCEL_OPERATION, CancelOperation, Operation
from volery.contracts.storage import (
    ATTACH_DISK_TO,
    COPY_DISK,
    CREATE_TRANSFER,
    DELETE_DISK,
    PREPARE_DISKS,
    RESIZE_DISK,
    UPDATE_DISK,
    AttachDiskTo,
    ContentType,
    CopyDisk,
    CreateTransfer,
    Disk,
    DiskStatus,
    DomainKind,
    PrepareDisks,
    ResizeDisk,
    UpdateDisk,
)
from volery.contracts.vm import VmStatus
from volery.contracts.volume_orders import (
    COPY_VOLUME,
    DELETE_VOLUME,
    MAKE_OVERLAY,
    TransferDirection,
)
from volery.contracts.volumes import (
    SNAPSHOT_DISKS,
    SnapshotDisks,
    VolumeState,
)
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


async def snapshot(at: Site, *disks: Disk, snapshot_id: str = "") -> Operation:
    ask = SnapshotDisks(snapshot_id=snapshot_id or new_id(), disk_ids=tuple(disk.id for disk in disks))
    return await at.bus.ask(SNAPSHOT_DISKS, ask)


def files(at: Site, disk: Disk) -> list[str]:
    """Names of the files of this disk's volumes, in their order."""
    return [f"{volume.id}.{volume.format}" for volume in disk.volumes]


def there(at: Site) -> set[str]:
    return {PurePath(path).name for path in at.shelf.volumes}


async def rows(configured: Settings) -> list[tuple[str, str, str]]:
    """(volume, the one below it, state)"""
    async with open_direct(configured.database, Owner.STORAGE) as connection:
        found = await connection.fetch("select id, parent_id, state from volume order by id")
    return [(row["id"], row["parent_id"], row["state"]) for row in found]


async def same_everywhere(at: Site, configured: Settings, *disks: Disk) -> None:
    """Rows, documents and files say the same, and nothing is left over."""
    now = [await at.disk(disk.id) for disk in disks]
    assert {(v.id, v.parent_id, str(v.state)) for disk in now for v in disk.volumes} == set(
        await rows(configured)
    )
    assert there(at) == {name for disk in now for name in files(at, disk)}
    assert all(disk.busy_with == "" for disk in now)


async def prepared(at: Site, disk: Disk, vm_id: str = "") -> FileSource:
    vm_id = vm_id or new_id()
    if not disk.uses:
        await at.bus.ask(ATTACH_DISK_TO, AttachDiskTo(disk_id=disk.id, vm_id=vm_id))
    ask = PrepareDisks(vm_id=vm_id, host_id=at.rows[0].id, disk_ids=(disk.id,))
    source = (await at.bus.ask(PREPARE_DISKS, ask)).disks[0].source
    assert isinstance(source, FileSource)
    return source


async def test_disks_go_on_in_new_volumes_and_say_so(configured: Settings) -> None:
    async with site(configured) as at:
        domain = await at.new_domain()
        one, two = (
            await at.new_disk(domain, "one"),
            await at.new_disk(domain, "two", format=ImageFormat.RAW),
        )
        assert (one.depth, one.leaf_id, [v.id for v in one.volumes]) == (1, one.id, [one.id])
        snapshot_id = new_id()
        await at.done(await snapshot(at, one, two, snapshot_id=snapshot_id))
        for before in (one, two):
            disk = await at.disk(before.id)
            base, leaf = disk.volumes
            assert (disk.status, disk.busy_with, disk.depth, disk.leaf_id) == (DiskStatus.OK, "", 2, leaf.id)
            assert (base.id, base.format, base.snapshot_id) == (before.id, before.format, snapshot_id)
            assert (leaf.parent_id, leaf.format, leaf.snapshot_id) == (base.id, ImageFormat.QCOW2, "")
            assert leaf.state is VolumeState.OK
        await same_everywhere(at, configured, one, two)
        source = await prepared(at, two)
        disk = await at.disk(two.id)
        assert isinstance(source, ChainSource)
        assert PurePath(source.path).name == files(at, disk)[1]
        assert [(PurePath(f.path).name, f.format) for f in source.backing] == [
            (f"{two.id}.raw", ImageFormat.RAW)
        ]
        for _ in range(2):
            await at.done(await snapshot(at, one))
        assert (await at.disk(one.id)).depth == 4
        await same_everywhere(at, configured, one, two)
        with pytest.raises(Refused, match="already"):
            await snapshot(at, one, snapshot_id=snapshot_id)
        assert (await at.domain(domain.id)).strangers == ()


async def test_everything_that_is_done_with_a_disk_knows_its_volumes(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain, agent = await at.new_domain(), at.hosts[0].agent
        disk = await at.new_disk(domain)
        await at.done(await snapshot(at, disk))
        disk = await at.disk(disk.id)
        await at.done(await at.bus.ask(COPY_DISK, CopyDisk(id=disk.id, name="copy")))
        assert isinstance(agent.begun(COPY_VOLUME.kind)[0].source, ChainSource)

        await at.done(await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=2 * GIB)))
        disk = await at.disk(disk.id)
        assert [v.size_bytes for v in disk.volumes] == [GIB, 2 * GIB]
        base, leaf = files(at, disk)
        path = f"/srv/data/{domain.id}/disks/{leaf}"
        at.shelf.volumes[path] = replace(at.shelf.volumes[path], used_bytes=GIB)
        await at.hosts[0].agent.report("storage")

        async def measured() -> bool:
            return (await at.disk(disk.id)).volumes[1].used_bytes == GIB

        await at.until(measured)
        assert (await at.disk(disk.id)).used_bytes > GIB

        upload = CreateTransfer(disk_id=disk.id, direction=TransferDirection.UPLOAD, size_bytes=512)
        with pytest.raises(Refused, match="1 snapshots"):
            await at.bus.ask(CREATE_TRANSFER, upload)

        await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id)))
        deleted = [order.volume_id for order in agent.begun(DELETE_VOLUME.kind)]
        assert deleted == [disk.leaf_id, disk.id]
        assert there(at).isdisjoint({base, leaf})
        assert all(disk.id not in (row[0], row[1]) for row in await rows(configured))


async def test_what_can_have_no_snapshot_says_why(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        iqn = "iqn.2026-11.test:disks"
        at.shelf.luns[iqn] = {1: GIB}
        san = await at.new_domain("san", kind=DomainKind.ISCSI, portal="192.0.2.1", iqn=iqn)
        good = await at.new_disk(domain, "good")
        cases = (
            (await at.new_disk(san, "lun"), "whole LUN"),
            (await at.new_disk(domain, "iso", content=ContentType.ISO), "ISO image"),
            (await at.new_disk(domain, "shared", format=ImageFormat.RAW, shareable=True), "shareable"),
        )
        for disk, why in cases:
            with pytest.raises(Refused, match=why):
                await snapshot(at, good, disk)
        raw = await at.new_disk(domain, "raw", format=ImageFormat.RAW)
        await at.done(await snapshot(at, raw))
        with pytest.raises(Refused, match="1 snapshots"):
            await at.bus.ask(UPDATE_DISK, UpdateDisk(id=raw.id, shareable=True))
        with pytest.raises(Refused, match="there is no disk"):
            await at.bus.ask(SNAPSHOT_DISKS, SnapshotDisks(snapshot_id=new_id(), disk_ids=(new_id(),)))
        with pytest.raises(Refused, match="at least one disk"):
            await at.bus.ask(SNAPSHOT_DISKS, SnapshotDisks(snapshot_id=new_id(), disk_ids=()))

        await running_vm(at, good)
        with pytest.raises(Refused, match="stop the VM first") as refused:
            await snapshot(at, good)
        assert refused.value.kind is Kind.CONFLICT
        assert (await at.disk(good.id)).depth == 1


def nth(at: Site, number: int, then: Any) -> None:
    """`then` is awaited before the host carries out the overlay that is asked for as number `number`."""
    count = 0
    for host in at.hosts:
        order, act = host.agent.orders[MAKE_OVERLAY.kind]

        async def counted(question: Any, act: Any = act) -> Any:
            nonlocal count
            count += 1
            if count == number:
                await then()
            return await act(question)

        host.agent.orders[MAKE_OVERLAY.kind] = (order, counted)


async def test_one_that_fails_leaves_all_disks_as_they_were(configured: Settings) -> None:
    async with site(configured) as at:
        domain = await at.new_domain()
        disks = [await at.new_disk(domain, name) for name in ("one", "two", "three")]
        held = asyncio.Event()

        async def full() -> None:
            await held.wait()
            raise Refused(Kind.EXHAUSTED, "the storage is full")

        nth(at, 3, full)
        op = await snapshot(at, *disks)
        for disk in disks:
            with pytest.raises(Refused, match="makes a snapshot of it"):
                await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id))
            now = await at.disk(disk.id)
            assert [v.state for v in now.volumes] == [VolumeState.OK, VolumeState.NEW]
        held.set()
        assert "full" in await at.refused(op)
        await same_everywhere(at, configured, *disks)
        assert [(await at.disk(disk.id)).depth for disk in disks] == [1, 1, 1]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_leader_that_is_killed_leaves_all_or_nothing(
    configured: Settings, number: int, fails: bool
) -> None:
    """While the host makes a volume: the order goes on, and whoever leads next hears how it ended."""
    async with storage_process(configured) as storage, site(configured, hosts=2, outside=True) as at:
        domain = await at.new_domain()
        disks = [await at.new_disk(domain, name) for name in ("one", "two")]
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def at_work() -> None:
            reached.set()
            await go_on.wait()
            if fails:
                raise Refused(Kind.EXHAUSTED, "the storage is full")

        nth(at, number, at_work)
        op = await snapshot(at, *disks)
        await reached.wait()
        await storage.kill()
        go_on.set()
        await storage.start()
        ended = await insist_ended(at, op)
        assert ended.state == ("failed" if fails else "succeeded")
        await same_everywhere(at, configured, *disks)
        depths = [(await at.disk(disk.id)).depth for disk in disks]
        assert depths == ([1, 1] if fails else [2, 2])
        assert at.shelf.crowded == []


async def test_one_that_is_cancelled_waits_for_its_host_and_leaves_nothing(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disks = [await at.new_disk(domain, name) for name in ("one", "two")]
        reached, never = asyncio.Event(), asyncio.Event()

        async def at_work() -> None:
            reached.set()
            await never.wait()

        nth(at, 2, at_work)
        op = await snapshot(at, *disks)
        await reached.wait()
        await at.bus.ask(CANCEL_OPERATION[Owner.STORAGE], CancelOperation(id=op.id))
        assert (await at.ended(op)).state == "cancelled"
        await same_everywhere(at, configured, *disks)


async def running_vm(at: Site, *disks: Disk, status: VmStatus = VmStatus.UP) -> str:
    vm = await at.world.vm(at.center, host_id=at.rows[0].id, status=status)
    await at.heard_of(vm)
    for disk in disks:
        await at.bus.ask(ATTACH_DISK_TO, AttachDiskTo(disk_id=disk.id, vm_id=vm.id))
    return vm.id


async def live(at: Site, vm_id: str, *disks: Disk) -> Operation:
    ids = tuple(disk.id for disk in disks)
    return await at.bus.ask(SNAPSHOT_DISKS, SnapshotDisks(snapshot_id=new_id(), disk_ids=ids, vm_id=vm_id))


async def test_a_vm_that_runs_goes_on_in_the_new_volumes_before_they_are_leaves(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disks = [await at.new_disk(domain, name) for name in ("one", "two")]
        vm_id = await running_vm(at, *disks)
        await at.done(await live(at, vm_id, *disks))
        (asked,) = at.world.switched
        assert asked.vm_id == vm_id
        for disk, switched in zip(disks, asked.disks, strict=True):
            now = await at.disk(disk.id)
            assert (now.depth, switched.disk_id) == (2, disk.id)
            assert PurePath(switched.source.path).stem == now.leaf_id
            assert [PurePath(file.path).stem for file in switched.source.backing] == [disk.id]
        assert all(order.live for order in at.hosts[0].agent.begun(MAKE_OVERLAY.kind))
        await same_everywhere(at, configured, *disks)
        with pytest.raises(Refused, match="stop the VM first"):
            await live(at, new_id(), *disks)


@pytest.mark.parametrize(
    ("refused", "depth"),
    [
        (Refused(Kind.CONFLICT, "it is about to move", rule=NOT_SWITCHED), 1),
        (Refused(Kind.UNAVAILABLE, "its host died", outcome="host_died"), 2),
        (Refused(Kind.INTERNAL, "the agent was killed", outcome="outcome_unknown"), 2),
    ],
    ids=["surely_not", "host_died", "unknown"],
)
async def test_volumes_that_a_vm_may_write_are_its_leaves(
    configured: Settings, refused: Refused, depth: int
) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disks = [await at.new_disk(domain, name) for name in ("one", "two")]
        vm_id = await running_vm(at, *disks)
        at.world.switching = refused
        ended = await at.ended(await live(at, vm_id, *disks))
        assert ended.state == ("failed" if depth == 1 else "succeeded")
        assert [(await at.disk(disk.id)).depth for disk in disks] == [depth, depth]
        await same_everywhere(at, configured, *disks)


async def test_a_vm_that_moves_or_starts_has_no_snapshot_made(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        for number, status in enumerate((VmStatus.MIGRATING, VmStatus.SUSPENDED, VmStatus.WAIT_FOR_LAUNCH)):
            disk = await at.new_disk(domain, f"d{number}")
            vm_id = await running_vm(at, disk, status=status)
            with pytest.raises(Refused, match="wait until it is up or down"):
                await live(at, vm_id, disk)
        disk = await at.new_disk(domain, "told")
        vm_id = await running_vm(at, disk)
        where = PrepareDisks(vm_id=vm_id, host_id=at.rows[0].id, disk_ids=(disk.id,), epoch=5)
        await at.bus.ask(PREPARE_DISKS, where)
        with pytest.raises(Refused, match="which is about to run"):
            await live(at, vm_id, disk)


async def test_one_that_is_cancelled_after_the_vm_was_asked_goes_on(configured: Settings) -> None:
    """What QEMU may write is never taken back: with the switch asked for, it is too late."""
    async with storage_process(configured) as storage, site(configured, hosts=1, outside=True) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain)
        vm_id = await running_vm(at, disk)
        asked, go_on = at.world.hold_switch()
        op = await live(at, vm_id, disk)
        await asked.wait()
        await at.bus.ask(CANCEL_OPERATION[Owner.STORAGE], CancelOperation(id=op.id))
        await storage.kill()
        go_on.set()
        await storage.start()
        ended = await insist_ended(at, op)
        assert ended.state == "succeeded"
        assert (await at.disk(disk.id)).depth == 2
        await same_everywhere(at, configured, disk)
