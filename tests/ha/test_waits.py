"""VMs that wait for room go before less important ones: they are tried first, once, and then hold nobody up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from services.ha.policies.restart_order import waits_for_trial
from tests.ha.places import GIB, Place, place
from tests.ha.test_restart_order import watched
from tests.ha.test_restarts import down, restarts
from tests.ha.test_rooms import NO_ROOM, asked, small, until_asked_about
from tests.ha.world import until, vm
from volery.contracts.host import HostStatus
from volery.contracts.vm import VM_CHANGED, HighAvailability, Vm, VmStatus
from volery.runtime.orders import SILENT_SECONDS
from volery.runtime.programs import Settings


def of_importance(priority: int, host_id: str) -> Vm:
    available = HighAvailability(enabled=True, priority=priority)
    return vm(host_id=host_id, name=f"of {priority}", memory_bytes=6 * GIB, high_availability=available)


async def dies(at: Place, one: Vm) -> Vm:
    """With the first host, which is on its way out."""
    dead = down(one, status_reason="host_died")
    await at.owner.says(VM_CHANGED, one, dead)
    return dead


async def failed(at: Place, dead: Vm, count: int) -> Vm:
    """It was asked for as the count-th, and its restart has failed: as inventory says it, under its next epoch."""
    await asked(at, count)
    assert at.owner.asked[count - 1][0].vm_id == dead.id

    async def waits() -> bool:
        found = [r for r in await restarts(at.bus) if r.vm_id == dead.id]
        return bool(found) and "fits nowhere" in found[0].message

    failed = await at.says_vm(dead, epoch=dead.epoch + 1)
    await until(waits)
    return failed


async def tried_in_vain(at: Place) -> Vm:
    """An important VM that fitted nowhere, was tried when a host grew, and could not be started there: it waits, and the
    room that it was tried in is no news."""
    at.owner.ends_with = NO_ROOM
    await at.says_host(0, status=HostStatus.MAINTENANCE)
    capabilities = await small(at)
    important = await failed(at, await dies(at, of_importance(90, at.hosts[0].id)), 1)
    await at.says_host(1, capabilities=replace(capabilities, memory_bytes=16 * GIB))
    important = await failed(at, important, 2)
    await at.says_host(1, tags=("its storage is back",))
    await until_asked_about(at, 3)
    assert len(at.owner.asked) == 2
    return important


async def is_told(at: Place, waiting: Vm, words: str) -> None:
    async def told() -> bool:
        return any(r.vm_id == waiting.id and words in r.message for r in await restarts(at.bus))

    await until(told)


async def test_whoever_waits_for_room_is_tried_before_a_less_important_vm_is_started(
    configured: Settings, tmp_path: Path
) -> None:
    async with place(configured, tmp_path) as at:
        important = await tried_in_vain(at)
        at.owner.ends_with = None
        minor = await dies(at, of_importance(10, at.hosts[0].id))
        await asked(at, 3)
        assert at.owner.asked[-1][0].vm_id == important.id
        await is_told(at, minor, f"it waits until VM {important.name}, which is more important, has a host")
        await at.says_vm(important, status=VmStatus.WAIT_FOR_LAUNCH, host_id=at.hosts[1].id)
        await asked(at, 4)
        assert at.owner.asked[-1][0].vm_id == minor.id


async def test_one_that_is_refused_again_holds_nobody_up(configured: Settings, tmp_path: Path) -> None:
    """Several less important ones that came meanwhile wait for one trial of it, whatever changes after that."""
    async with place(configured, tmp_path) as at:
        important = await tried_in_vain(at)
        trial, next_one = asyncio.Event(), asyncio.Event()
        at.owner.end = trial
        less = [await dies(at, of_importance(priority, at.hosts[0].id)) for priority in (50, 10)]
        for each in less:
            await is_told(
                at, each, f"it waits until VM {important.name}, which is more important, has a host"
            )
        at.owner.end = next_one
        trial.set()
        important = await failed(at, important, 3)
        await asked(at, 4)
        await at.says_host(1, tags=("changed meanwhile",))
        await until_asked_about(at, 3)
        next_one.set()
        await failed(at, less[0], 4)
        await failed(at, less[1], 5)


async def test_one_that_would_not_fit_is_not_tried_for_others(configured: Settings, tmp_path: Path) -> None:
    async with place(configured, tmp_path) as at:
        at.owner.ends_with = NO_ROOM
        await at.says_host(0, status=HostStatus.MAINTENANCE)
        await small(at)
        important = await failed(at, await dies(at, of_importance(90, at.hosts[0].id)), 1)
        await at.says_host(1, tags=("still small",))
        minor = await dies(at, of_importance(10, at.hosts[0].id))
        await failed(at, minor, 2)
        assert [ask.vm_id for ask, _, _ in at.owner.asked] == [important.id, minor.id]


async def test_a_host_that_does_not_beat_is_no_room_until_it_does(
    configured: Settings, tmp_path: Path
) -> None:
    """Inventory starts nothing there, so what the scheduler says of it would be tried in vain, and its return be no news."""
    async with place(configured, tmp_path) as at:
        at.owner.ends_with = NO_ROOM
        await at.says_host(0, status=HostStatus.MAINTENANCE)
        at.hearts[1].stop()
        await asyncio.sleep(SILENT_SECONDS + 0.2)
        await failed(at, await dies(at, of_importance(90, at.hosts[0].id)), 1)
        await at.says_host(0, tags=("changed",))
        await until_asked_about(at, 2)
        assert len(at.owner.asked) == 1
        at.hearts[1].start()
        await asked(at, 2)


@pytest.mark.parametrize(
    ("priority", "waited", "waits"),
    [(90, 0.0, True), (90, 599.0, True), (90, 600.0, False), (50, 0.0, False), (10, 0.0, False)],
)
def test_only_a_more_important_one_is_let_go_first_and_not_for_ever(
    priority: int, waited: float, waits: bool
) -> None:
    other = watched(id="w", name="db", priority=priority)
    assert bool(waits_for_trial(watched(), other, waited, 600.0)) is waits
