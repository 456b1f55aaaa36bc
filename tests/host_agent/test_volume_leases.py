"""What writes a volume holds its lease: real programs under a real sanlock daemon."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from host_agent import leased, volumes
from host_agent.leased import NoLease
from host_agent.sanlock import SanlockFailed
from tests.host_agent.test_leases import another_machine
from tests.support.agent_host import running
from tests.support.lockspace import Joined, holding
from volery.contracts.domain import DomainLease, FileSource, ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.leases import dead_seconds
from volery.contracts.volume_orders import CopyVolume, CreateVolume, DeleteVolume, ResizeVolume
from volery.runtime.clock import monotonic

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


@asynccontextmanager
async def agent_that_writes(
    world: Joined, lease: DomainLease, path: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with the agent's code, in the middle of writing the volume."""
    words = (world.host.config.state_dir, msgspec.json.encode(lease).decode(), path, "on")
    program = (sys.executable, "-m", "tests.support.writing_program")
    agent = await asyncio.create_subprocess_exec(*program, *words, stdout=asyncio.subprocess.PIPE)
    assert agent.stdout is not None
    try:
        async with asyncio.timeout(60):
            assert await agent.stdout.readline() == b"begun\n"
        yield agent
    finally:
        if agent.returncode is None:
            agent.kill()
        await agent.communicate()


async def test_a_killed_agents_volume_is_the_next_writers_as_soon_as_its_tool_has_ended(
    world: Joined, tmp_path: Path
) -> None:
    """Nobody waits until a lease has expired, and nobody writes before: not on this host, and not on another one."""
    await world.join()
    disk_id, source, lease = volume(world, ImageFormat.RAW)
    await volumes.create(world.host, creating(disk_id, source, lease), running())
    content = Path(source.path)
    grow = ResizeVolume(disk_id=disk_id, source=source, size_bytes=8 * MIB, lease=lease)
    async with (
        another_machine(world, 8, tmp_path / "another"),
        agent_that_writes(world, lease, source.path) as agent,
    ):
        there = {"SANLOCK_RUN_DIR": str(tmp_path / "another")}
        agent.send_signal(signal.SIGSTOP)  # its tool goes on
        with pytest.raises(SanlockFailed):
            await leased.run(lease, ["true"], timeout_seconds=60, environment=there)
        with pytest.raises(Refused, match="still being worked on by a former order"):
            await volumes.resize(world.host, grow, running())
        before = content.read_bytes()[:8]
        async with asyncio.timeout(30):
            while content.read_bytes()[:8] == before:
                await asyncio.sleep(0.01)

        killed = monotonic()
        agent.kill()
        await agent.wait()
        assert (await volumes.resize(world.host, grow, running())).size_bytes == 8 * MIB
        left = content.read_bytes()
        assert len(left) == 8 * MIB
        assert await leased.run(lease, ["echo", "mine"], timeout_seconds=60, environment=there) == b"mine\n"
        assert monotonic() - killed < dead_seconds(1)
        assert content.read_bytes() == left
