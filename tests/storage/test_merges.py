"""Snapshots that go, and are gone back to: the disk is whole all the time."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import PurePath
from typing import Any

import pytest

from tests.storage.scripted_host import GIB
from tests.storage.scripted_storage import Site, site, storage_process
from tests.storage.test_faults import insist_ended
from tests.storage.test_snapshots import (
    nth,
    prepared,
    same_everywhere,
    snapshot,
)
from tests.support.bell import Bell
from tests.support.runtime import running
from volery.contracts.domain import ChainSource, FileSource
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.liveness import LIVENESS_CHANGED, LivenessState
from volery.contracts.operation import Operation
from volery.contracts.storage import (
    RESIZE_DISK,
    Disk,
    DiskStatus,
    ResizeDisk,
)
from volery.contracts.volume_orders import (
    DELETE_VOLUME,
    MAKE_OVERLAY,
    MERGE_VOLUME,
)
from volery.contracts.volumes import (
    FORGET_SNAPSHOT,
    IN_CHAIN,
    REVERT_DISKS,
    ForgetSnapshot,
    RevertDisks,
    VolumeState,
)
from volery.runtime.programs import Settings


async def forget(at: Site, snapshot_id: str) -> Operation:
    return await at.bus.ask(FORGET_SNAPSHOT, ForgetSnapshot(snapshot_id=snapshot_id))


async def revert(at: Site, snapshot_id: str) -> Operation:
    return await at.bus.ask(REVERT_DISKS, RevertDisks(snapshot_id=snapshot_id))


async def line(at: Site, disk: Disk) -> list[tuple[str, str]]:
    """(volume, snapshot) of the chain, from the base on; by the storage's headers, too."""
    now = await at.disk(disk.id)
    chain = [v for v in now.volumes if v.state in IN_CHAIN]
    by_name = {PurePath(path).name: volume.backing for path, volume in at.shelf.volumes.items()}
    below = ["", *(f"{v.id}.{v.format}" for v in chain[:-1])]
    assert [by_name[f"{v.id}.{v.format}"] for v in chain] == below
    return [(v.id, v.snapshot_id) for v in chain]


async def test_snapshots_go_from_the_middle_and_from_the_end(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disk, other = await at.new_disk(domain), await at.new_disk(domain, "other")
        first, second, third = new_id(), new_id(), new_id()
        await at.done(await snapshot(at, disk, other, snapshot_id=first))
        await at.done(await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=2 * GIB)))
        for snapshot_id in (second, third):
            await at.done(await snapshot(at, disk, snapshot_id=snapshot_id))
        before = [volume_id for volume_id, _ in await line(at, disk)]

        await at.done(await forget(at, first))
        assert await line(at, disk) == [(before[0], second), (before[2], third), (before[3], "")]
        assert (await at.disk(other.id)).depth == 1
        assert (await at.disk(disk.id)).volumes[0].size_bytes == 2 * GIB
        await same_everywhere(at, configured, disk, other)
        with pytest.raises(Refused) as refused:
            await forget(at, first)
        assert refused.value.kind is Kind.NOT_FOUND

        await at.done(await forget(at, third))
        assert await line(at, disk) == [(before[0], second), (before[2], "")]
        await at.done(await forget(at, second))
        assert await line(at, disk) == [(disk.id, "")]
        assert type(await prepared(at, disk)) is FileSource
        await same_everywhere(at, configured, disk, other)


async def test_disks_go_back_to_the_newest_snapshot_only(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disk, other = await at.new_disk(domain), await at.new_disk(domain, "other")
        first, second = new_id(), new_id()
        await at.done(await snapshot(at, disk, snapshot_id=first))
        await at.done(await snapshot(at, disk, other, snapshot_id=second))
        await at.done(await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=2 * GIB)))
        with pytest.raises(Refused, match="newer snapshots") as refused:
            await revert(at, first)
        assert refused.value.details["rule"] == "newer"
        before = [await line(at, one) for one in (disk, other)]
        await at.done(await revert(at, second))
        for one, was in zip((disk, other), before, strict=True):
            now = await line(at, one)
            assert now[:-1] == was[:-1]
            assert now[-1] != was[-1]
        assert (await at.disk(disk.id)).size_bytes == GIB
        await same_everywhere(at, configured, disk, other)

        failing = Refused(Kind.EXHAUSTED, "the storage is full")
        at.hosts[0].refusing[MAKE_OVERLAY.kind] = failing
        before = [await line(at, one) for one in (disk, other)]
        assert "full" in await at.refused(await revert(at, second))
        assert [await line(at, one) for one in (disk, other)] == before
        await same_everywhere(at, configured, disk, other)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_merge_that_is_cut_short_goes_on_and_the_disk_is_whole_all_the_time(
    configured: Settings, fails: bool
) -> None:
    async with storage_process(configured) as storage, site(configured, hosts=1, outside=True) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain)
        snapshot_id = new_id()
        await at.done(await snapshot(at, disk, snapshot_id=snapshot_id))
        reached, go_on = asyncio.Event(), asyncio.Event()
        host = at.hosts[0]
        order, act = host.agent.orders[MERGE_VOLUME.kind]

        async def at_work(question: Any) -> Any:
            reached.set()
            await go_on.wait()
            if fails:
                raise Refused(Kind.EXHAUSTED, "the storage is full")
            return await act(question)

        host.agent.orders[MERGE_VOLUME.kind] = (order, at_work)
        op = await forget(at, snapshot_id)
        await reached.wait()
        await storage.kill()
        go_on.set()
        await storage.start()
        ended = await insist_ended(at, op)
        now = await at.disk(disk.id)
        if not fails:
            assert (ended.state, now.depth) == ("succeeded", 1)
            await same_everywhere(at, configured, disk)
            return
        assert (ended.state, now.depth, now.status) == ("failed", 2, DiskStatus.OK)
        assert [v.state for v in now.volumes] == [VolumeState.OK, VolumeState.MERGING]
        source = await prepared(at, disk)
        assert isinstance(source, ChainSource)
        assert source.backing[0].merging is False
        with pytest.raises(Refused, match="delete the snapshot again"):
            await revert(at, snapshot_id)
        host.agent.orders[MERGE_VOLUME.kind] = (order, act)
        await at.done(await forget(at, snapshot_id))
        await same_everywhere(at, configured, disk)
        assert (await at.disk(disk.id)).depth == 1


async def test_a_merge_goes_on_by_another_host_when_its_own_has_died(configured: Settings) -> None:
    ha = Bell()
    async with running(configured, ha.service()), site(configured) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain)
        snapshot_id = new_id()
        await at.done(await snapshot(at, disk, snapshot_id=snapshot_id))
        reached = asyncio.Event()
        kept = {}
        for host in at.hosts:
            order, act = kept[host.agent.host_id] = host.agent.orders[MERGE_VOLUME.kind]

            async def at_work(question: Any, act: Any = act) -> Any:
                if not reached.is_set():
                    reached.set()
                    await asyncio.Event().wait()
                return await act(question)

            host.agent.orders[MERGE_VOLUME.kind] = (order, at_work)
        op = await forget(at, snapshot_id)
        await reached.wait()
        writer = next(host.agent for host in at.hosts if host.agent.begun(MERGE_VOLUME.kind))
        await writer.kill()
        said = ha.holds(writer.host_id, writer.boot_id, LivenessState.DEAD, writer.boot_id)
        await ha.says(LIVENESS_CHANGED, said)
        await at.done(op)
        assert (await at.disk(disk.id)).depth == 1
        await same_everywhere(at, configured, disk)


async def test_the_volume_of_a_host_that_died_is_removed_by_another(configured: Settings) -> None:
    ha = Bell()
    async with running(configured, ha.service()), site(configured) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain)
        reached, never = asyncio.Event(), asyncio.Event()

        async def at_work() -> None:
            reached.set()
            await never.wait()

        nth(at, 1, at_work)
        op = await snapshot(at, disk)
        await reached.wait()
        writer_id = (await at.disk(disk.id)).volumes[1].host_id
        writer = next(host.agent for host in at.hosts if host.agent.host_id == writer_id)
        await writer.kill()
        said = ha.holds(writer.host_id, writer.boot_id, LivenessState.DEAD, writer.boot_id)
        await ha.says(LIVENESS_CHANGED, said)
        assert (await at.ended(op)).state == "failed"
        await same_everywhere(at, configured, disk)
        (other,) = (host.agent for host in at.hosts if host.agent is not writer)
        assert len(other.begun(DELETE_VOLUME.kind)) == 1


async def test_what_can_not_be_removed_now_is_removed_later_and_harms_nobody(configured: Settings) -> None:
    configured = dataclasses.replace(configured, environ={"VOLERY_STORAGE_DISCARD_SECONDS": "0.3"})
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain)

        async def fails() -> None:
            raise Refused(Kind.EXHAUSTED, "the storage is full")

        nth(at, 1, fails)
        held = at.hosts[0].held[DELETE_VOLUME.kind] = asyncio.Event()
        assert "full" in await at.refused(await snapshot(at, disk))
        now = await at.disk(disk.id)
        assert (now.status, now.busy_with, now.depth) == (DiskStatus.OK, "", 1)
        assert [v.state for v in now.volumes] == [VolumeState.OK, VolumeState.REMOVING]
        assert type(await prepared(at, disk)) is FileSource
        held.set()

        async def clean() -> bool:
            return len((await at.disk(disk.id)).volumes) == 1

        await at.until(clean)
        await same_everywhere(at, configured, disk)
