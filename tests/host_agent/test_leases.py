"""Leases by the agent against a real sanlock daemon, without a watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host_agent import children, leased, leases, sanlock, storage
from host_agent.children import ChildFailed
from host_agent.sanlock import SanlockFailed
from tests.support.agent_host import running
from tests.support.lockspace import NAME, Joined, holding
from volery.contracts.domain import DomainLease
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.leases import (
    LEASE_TAKEN,
    CreateLease,
    FreeHostLease,
    HostLeaseReading,
    LockspaceReport,
    ReadHostLease,
    dead_seconds,
    unchanged_seconds,
)
from volery.contracts.volume_orders import DisconnectStorage
from volery.runtime.clock import monotonic


async def test_a_lease_is_made_held_by_a_tool_and_removed(world: Joined) -> None:
    with pytest.raises(Refused, match="has no lockspace"):
        await world.join(initialise=False)
    joined = await world.join()
    assert (joined.host_number, joined.generation, joined.io_timeout_seconds) == (7, 1, 1)
    assert not joined.failing
    assert await world.join(reset_host=True) == LockspaceReport(
        domain_id=world.domain_id, host_number=7, generation=1, io_timeout_seconds=1, reset_host=True
    )
    with pytest.raises(Refused, match="this host is number 7"):
        await world.join(8)
    (told,) = await storage.report(world.host)
    assert told.lockspace is not None
    assert told.lockspace.host_number == 7
    assert told.strangers == ()

    lease = await world.lease()
    assert await leased.run(lease, ["echo", "written"], timeout_seconds=20) == b"written\n"
    with pytest.raises(ChildFailed) as failed:
        await leased.run(lease, ["ls", "/nowhere"], timeout_seconds=20)
    assert "No such file" in failed.value.reason

    async with holding(world, lease) as tool:
        assert await world.held() == [lease.key]
        with pytest.raises(SanlockFailed, match="a process of this host holds it already"):
            await leased.run(lease, ["echo", "never"], timeout_seconds=20)
        with pytest.raises(Refused, match="holds 1 leases"):
            await leases.leave(world.host, world.leaving, running())
        with pytest.raises(SanlockFailed):
            await leases.delete(world.host, world.deleting(lease), running())
        assert Path(lease.path).exists()
        tool.cancel()
    await leases.delete(world.host, world.deleting(lease), running())
    await leases.delete(world.host, world.deleting(lease), running())
    assert sorted(os.listdir(world.directory)) == ["lockspace"]

    await leases.leave(world.host, world.leaving, running())
    await leases.leave(world.host, world.leaving, running())
    with pytest.raises(SanlockFailed, match="has not joined the lockspace"):
        await leased.run(await world.lease(), ["echo", "never"], timeout_seconds=20)


async def test_a_domain_that_is_gone_leaves_no_lease_once_every_host_has_left(world: Joined) -> None:
    await world.join()
    lease = await world.lease()
    root = world.directory.parent
    order = DisconnectStorage(domain_id=world.domain_id, remove=True, path=str(root.parent))
    with pytest.raises(Refused, match=r"1 hosts \(number 7\) have not left"):
        await storage.disconnect(world.host, order, running())
    assert Path(lease.path).exists()
    await leases.leave(world.host, world.leaving, running())
    (world.directory / "notes.txt").touch()
    await storage.disconnect(world.host, order, running())
    assert Path(lease.path).exists(), "somebody else's file is in it"
    (world.directory / "notes.txt").unlink()
    await storage.disconnect(world.host, order, running())
    assert not root.exists()


async def test_a_lease_is_read_while_it_is_renewed_and_a_tool_ends_when_it_is_lost(world: Joined) -> None:
    await world.join()
    order = ReadHostLease(domain_id=world.domain_id, path=world.leaving.path, host_number=7)
    said = await leases.read_host(world.host, order, running())
    assert (said.first.holder, said.first.generation, said.first.io_timeout_seconds) == (NAME, 1, 1)
    assert said.first.answered_seconds <= said.second.asked_seconds
    free = await read(world, 8)
    assert (free.holder, free.timestamp, free.generation) == ("", 0, 0)
    for _ in range(600):  # its daemon renews it every two seconds, and tells nobody
        if unchanged_seconds(said.first, await read(world, 7)) == 0:
            break
        await asyncio.sleep(0.1)
    else:
        pytest.fail("the lease was not renewed")

    async with holding(world, await world.lease()) as tool:
        (world.directory / "lockspace").write_bytes(b"")
        with pytest.raises(ChildFailed) as ended:
            await tool
    assert ended.value.status in (-signal.SIGTERM, -signal.SIGKILL)
    with pytest.raises(Refused):  # it can't be read, so it says nothing
        await read(world, 7)


@contextlib.asynccontextmanager
async def another_machine(
    world: Joined, number: int, directory: Path
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """With a daemon of its own, in the same lockspace."""
    environment = {**os.environ, "SANLOCK_RUN_DIR": str(directory), "SANLOCK_PRIVILEGED": "0"}
    directory.mkdir()
    with (directory / "log").open("wb") as log:
        arguments = ["sanlock", "daemon", "-D", "-w", "0", "-e", "another"]
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
    try:
        what = sanlock.lockspace(world.domain_id, number, world.leaving.path)
        join = ["sanlock", "client", "add_lockspace", "-s", what, "-o", "1"]
        for _ in range(100):  # until the daemon listens
            with contextlib.suppress(ChildFailed):
                await children.run(join, timeout_seconds=30, environment=environment)
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail((directory / "log").read_text())
        yield process
    finally:
        process.kill()
        process.wait()


async def test_what_a_dead_machine_held_is_taken_at_once_when_its_lease_is_freed(
    world: Joined, tmp_path: Path
) -> None:
    await world.join()
    lease = await world.lease()

    def freeing(generation: int, number: int = 8) -> FreeHostLease:
        return FreeHostLease(
            domain_id=world.domain_id,
            path=world.leaving.path,
            host_number=number,
            generation=generation,
        )

    async with another_machine(world, 8, tmp_path / "another") as process:
        environment = {"SANLOCK_RUN_DIR": str(tmp_path / "another")}
        holder = asyncio.create_task(
            leased.run(lease, ["sleep", "60"], timeout_seconds=60, environment=environment)
        )
        async with asyncio.timeout(20):
            while (await sanlock.read_lease(lease.lockspace, lease.key, lease.path)).number("owner_id") != 8:
                await asyncio.sleep(0.05)
        process.kill()
        holder.cancel()
        await asyncio.wait({holder})

    dead = await read(world, 8)
    assert (dead.generation, dead.timestamp > 0) == (1, True)
    for wrong, sentence in (
        (freeing(2), "taken 1 times, not 2"),
        (freeing(0), "taken 1 times, not 0"),
        (freeing(1, number=7), "under another number"),
        (freeing(1, number=0), "under another number"),
    ):
        with pytest.raises(Refused, match=sentence):
            await leases.free_host(world.host, wrong, running())
    assert (await read(world, 8)).timestamp == dead.timestamp

    lock = Path(world.host.config.state_dir) / "locks" / f"lease-{world.domain_id}-8"
    async with children.held(lock, wait_seconds=0, otherwise="it is held"):  # a former attempt that is stuck
        with pytest.raises(Refused, match="an earlier attempt to free") as refused:
            await leases.free_host(world.host, freeing(1), running())
    assert refused.value.kind is Kind.TIMEOUT
    assert (await read(world, 8)).timestamp == dead.timestamp

    for _ in range(2):  # a repeat finds it free
        await leases.free_host(world.host, freeing(1), running())
    free = await read(world, 8)
    assert (free.holder, free.generation, free.timestamp) == ("another", 1, 0)
    began = monotonic()
    assert await leased.run(lease, ["echo", "mine"], timeout_seconds=20) == b"mine\n"
    assert monotonic() - began < 10 < dead_seconds(1)

    async with another_machine(world, 8, tmp_path / "again"):  # its next boot
        now = await read(world, 8)
        with pytest.raises(Refused, match="taken 2 times, not 1") as refused:
            await leases.free_host(world.host, freeing(1), running())
        assert refused.value.details["rule"] == LEASE_TAKEN
        assert (now.generation, now.timestamp > 0) == (2, True)


async def test_only_leases_of_connected_domains_are_touched(world: Joined, tmp_path: Path) -> None:
    key = new_id()
    for path in ("/etc/passwd", str(world.directory / ".." / "disks" / key), str(world.directory / new_id())):
        with pytest.raises(Refused) as refused:
            await leases.create(
                world.host, CreateLease(domain_id=world.domain_id, key=key, path=path), running()
            )
        assert refused.value.kind is Kind.INVALID
    with pytest.raises(Refused, match="give the id of a VM"):
        await leases.create(
            world.host,
            CreateLease(domain_id=world.domain_id, key="lockspace", path=world.leaving.path),
            running(),
        )
    # Something else in a lease's place is never overwritten.
    first, second = await world.lease(), new_id()
    os.link(first.path, world.directory / second)
    with pytest.raises(Refused):
        await leases.create(
            world.host,
            CreateLease(domain_id=world.domain_id, key=second, path=str(world.directory / second)),
            running(),
        )


async def test_a_domain_that_can_hold_no_lease_is_refused(world: Joined) -> None:
    lease = DomainLease(lockspace=world.domain_id, key=new_id(), path="/x")
    await leases.check_lease(None)
    with pytest.raises(Refused, match="this host can't hold the VM's lease"):
        await leases.check_lease(lease)
    with pytest.raises(Refused, match="started without its lease"):
        await leases.check_held(lease)


async def test_without_a_daemon_the_host_says_what_is_missing(tmp_path: Path) -> None:
    environment = {**os.environ, "SANLOCK_RUN_DIR": str(tmp_path)}
    script = (
        "import asyncio; from host_agent import leases; from host_agent.config import AgentConfig;"
        "print(asyncio.run(leases.describe(AgentConfig())).problem)"
    )
    said = await children.run([sys.executable, "-c", script], timeout_seconds=60, environment=environment)
    assert b"sanlock's daemon doesn't answer" in said


async def read(world: Joined, number: int) -> HostLeaseReading:
    order = ReadHostLease(domain_id=world.domain_id, path=world.leaving.path, host_number=number)
    return (await leases.read_host(world.host, order, running())).second
