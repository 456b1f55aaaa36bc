"""What writes a volume holds its lease: real programs under a real sanlock daemon."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from host_agent import volumes
from host_agent.leased import NoLease
from tests.support.agent_host import running
from tests.support.lockspace import Joined, holding
from volery.contracts.domain import DomainLease, FileSource, ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import CopyVolume, CreateVolume, DeleteVolume, ResizeVolume

MIB = 1 << 20


def volume(world: Joined, format: ImageFormat = ImageFormat.QCOW2) -> tuple[str, FileSource, DomainLease]:
    """A disk that is to be, its place, and its lease, which nobody has made yet."""
    disk_id = new_id()
    path = world.directory.parent / "disks" / f"{disk_id}.{format}"
    lease = DomainLease(lockspace=world.domain_id, key=disk_id, path=str(world.directory / disk_id))
    return disk_id, FileSource(path=str(path), format=format), lease


def creating(disk_id: str, source: FileSource, lease: DomainLease) -> CreateVolume:
    return CreateVolume(disk_id=disk_id, source=source, size_bytes=4 * MIB, lease=lease)


async def test_a_volume_is_made_grown_copied_and_removed_under_its_lease(world: Joined) -> None:
    await world.join()
    disk_id, source, lease = volume(world)
    made = await volumes.create(world.host, creating(disk_id, source, lease), running())
    assert made.size_bytes == 4 * MIB
    assert Path(lease.path).exists()
    grow = ResizeVolume(disk_id=disk_id, source=source, size_bytes=8 * MIB, lease=lease)
    assert (await volumes.resize(world.host, grow, running())).size_bytes == 8 * MIB
    other_id, target, other = volume(world, ImageFormat.RAW)
    copy = CopyVolume(disk_id=other_id, source=source, target=target, size_bytes=8 * MIB, lease=other)
    assert (await volumes.copy(world.host, copy, running())).size_bytes == 8 * MIB
    await volumes.delete(world.host, DeleteVolume(disk_id=disk_id, source=source, lease=lease), running())
    assert not Path(source.path).exists()
    assert await world.held() == []


async def test_what_somebody_holds_is_written_by_nobody_else(world: Joined) -> None:
    await world.join()
    disk_id, source, lease = volume(world)
    await volumes.create(world.host, creating(disk_id, source, lease), running())
    before = hashlib.sha256(Path(source.path).read_bytes()).digest()
    async with holding(world, lease):
        for act, order in (
            (volumes.resize, ResizeVolume(disk_id=disk_id, source=source, size_bytes=8 * MIB, lease=lease)),
            (volumes.delete, DeleteVolume(disk_id=disk_id, source=source, lease=lease)),
        ):
            with pytest.raises(NoLease, match=f"volume {disk_id} can't be written by this host") as refused:
                await act(world.host, order, running())  # type: ignore[operator]  # each with its own order
            assert refused.value.kind is Kind.CONFLICT
    assert hashlib.sha256(Path(source.path).read_bytes()).digest() == before


async def test_a_host_that_has_not_joined_writes_nothing_that_has_a_lease(world: Joined) -> None:
    disk_id, source, lease = volume(world)
    with pytest.raises(Refused, match="has not joined the lockspace"):
        await volumes.create(world.host, creating(disk_id, source, lease), running())
    assert not Path(source.path).exists()
    assert list((world.directory.parent / "staging").iterdir()) == []
