"""VMs that fit nowhere: it is no attempt, they say so, and they are tried again when there is room, not before."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from tests.ha.places import GIB, Place, place
from tests.ha.test_restarts import down, restarts
from tests.ha.world import until
from volery.contracts.agent import HostCapabilities
from volery.contracts.cluster import CLUSTER_CHANGED, Cluster
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HostStatus
from volery.contracts.vm import VM_CHANGED, Vm
from volery.runtime.programs import Settings

NO_ROOM = Refused(Kind.EXHAUSTED, "no host has 6 GiB free")


async def asked(at: Place, count: int) -> None:
    async def so_often() -> bool:
        return len(at.owner.asked) >= count

    await until(so_often)


async def died_and_fits_nowhere(at: Place, memory_bytes: int = 6 * GIB) -> Vm:
    """Its host is gone, and the other one is too small."""
    at.owner.ends_with = NO_ROOM
    await at.says_host(0, status=HostStatus.MAINTENANCE)
    web = await at.says_vm(at.web, memory_bytes=memory_bytes, epoch=3)
    dead = down(web, status_reason="host_died")
    await at.owner.says(VM_CHANGED, dead)
    await asked(at, 1)
    failed = replace(dead, revision=dead.revision + 1, epoch=4)
    await at.owner.says(VM_CHANGED, failed)

    async def waits() -> bool:
        found = await restarts(at.bus)
        return bool(found) and "fits nowhere" in found[0].message and found[0].attempts == 0

    await until(waits)
    assert NO_ROOM.message in (await restarts(at.bus))[0].message
    return failed


async def small(at: Place) -> HostCapabilities:
    capabilities = replace(at.hosts[1].capabilities, memory_bytes=4 * GIB)
    await at.says_host(1, capabilities=capabilities)
    return capabilities


async def until_asked_about(at: Place, times: int) -> None:
    """Whether there is room was asked so often again."""
    before = at.owner.asked_about

    async def more() -> bool:
        return at.owner.asked_about >= before + times

    await until(more)


async def test_it_is_tried_again_when_a_host_has_room_and_not_when_it_only_changed(
    configured: Settings, tmp_path: Path
) -> None:
    async with place(configured, tmp_path) as at:
        capabilities = await small(at)
        await died_and_fits_nowhere(at)
        await at.says_host(1, tags=("still small",))
        await until_asked_about(at, 3)
        assert len(at.owner.asked) == 1
        at.owner.ends_with = None
        await at.says_host(1, capabilities=replace(capabilities, memory_bytes=16 * GIB))
        await asked(at, 2)
        ask = at.owner.asked[-1][0]
        assert (ask.vm_id, ask.epoch) == (at.web.id, 4)


async def test_more_over_commit_or_a_smaller_vm_make_room_too(configured: Settings, tmp_path: Path) -> None:
    async with place(configured, tmp_path) as at:
        await small(at)
        failed = await died_and_fits_nowhere(at)
        cluster = next(c for c in at.owner.objects.values() if isinstance(c, Cluster))
        await at.owner.says(CLUSTER_CHANGED, replace(cluster, revision=2, memory_overcommit_percent=400))
        await asked(at, 2)
        await at.owner.says(CLUSTER_CHANGED, replace(cluster, revision=3))
        failed = await at.says_vm(failed, epoch=5)
        await until_asked_about(at, 3)
        await at.says_vm(failed, memory_bytes=GIB)
        await asked(at, 3)


async def test_room_that_it_could_not_be_started_in_is_not_tried_over_and_over(
    configured: Settings, tmp_path: Path
) -> None:
    """A host that fits and can't run it: the restart ends as exhausted, and the room is still there."""
    async with place(configured, tmp_path) as at:
        await small(at)
        failed = await died_and_fits_nowhere(at)
        await at.says_host(1, capabilities=replace(at.hosts[1].capabilities, memory_bytes=16 * GIB))
        await asked(at, 2)
        await at.says_vm(failed, epoch=5)
        await at.says_host(1, tags=("changed",))
        await until_asked_about(at, 4)
        assert len(at.owner.asked) == 2
