"""Highly available VMs that crash: inventory is asked once per crash, with back-off, and not for ever."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec
from msgspec.structs import replace

from tests.ha.world import Inventory, becomes, ha, hearts, host, hurried, until, vm
from tests.support.runtime import running
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED
from volery.contracts.liveness import LIST_RESTARTS, VmRestart
from volery.contracts.operation import ListQuery
from volery.contracts.vm import VM_CHANGED, HighAvailability, Vm, VmStatus
from volery.runtime.bus import Bus
from volery.runtime.programs import Settings


def down(up: Vm, **fields: Any) -> Vm:
    made = {"revision": up.revision + 1, "status": VmStatus.DOWN, "status_reason": "crashed", "host_id": ""}
    return replace(up, **(made | fields))


async def restarts(bus: Bus) -> list[VmRestart]:
    page = await bus.ask(LIST_RESTARTS, ListQuery())
    return [msgspec.json.decode(item, type=VmRestart) for item in page.items]


async def test_a_crash_is_answered_at_once_and_once(configured: Settings) -> None:
    """With two replicas, of which one leads."""
    owner, h1 = Inventory(), host("h1")
    async with running(
        hurried(
            configured,
            VOLERY_HA_RESTART_LONGEST_DELAY_SECONDS="20",
            VOLERY_HA_RESTART_FIRST_DELAY_SECONDS="20",
        ),
        owner.service(),
        ha(),
        ha(),
    ) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1):
            await becomes(bus, h1.id, "up")
            up = vm(host_id=h1.id, epoch=7)
            await owner.says(VM_CHANGED, up)
            crash = down(up)
            await owner.says(VM_CHANGED, crash)

            async def asked() -> bool:
                return bool(owner.asked)

            await until(asked, 2)
            ask, request_id, _ = owner.asked[0]
            assert (ask.vm_id, ask.epoch, ask.reason) == (up.id, 7, "crashed")
            assert request_id
            await owner.says(VM_CHANGED, replace(crash, revision=3, tags=("again",)))

            async def recorded() -> VmRestart | None:
                found = await restarts(bus)
                return found[0] if found and found[0].last_operation_id else None

            record = await until(recorded)
            assert record.attempts == 1
            assert "VM web crashed (crashed); restart 1 was asked for" in record.message
            await asyncio.sleep(1.5)  # a second look finds the same crash, and asks no more
            assert len(owner.asked) == 1


async def test_what_was_asked_for_or_is_not_highly_available_stays_down(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1):
            await becomes(bus, h1.id, "up")
            stopped, plain, lost = (vm(host_id=h1.id, name=n) for n in ("stopped", "plain", "lost"))
            plain = replace(plain, high_availability=HighAvailability())
            await owner.says(VM_CHANGED, stopped, plain, lost)
            await owner.says(VM_CHANGED, down(stopped, desired="down", status_reason="user"), down(plain))
            await owner.says(VM_CHANGED, replace(lost, revision=2, status=VmStatus.UNKNOWN))
            last = vm(host_id=h1.id, name="last")
            await owner.says(VM_CHANGED, down(last))

            async def asked() -> bool:
                return bool(owner.asked)

            await until(asked)
            assert [ask.vm_id for ask, _, _ in owner.asked] == [last.id]


async def test_repeated_crashes_are_answered_slower_and_in_the_end_no_more(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1):
            await becomes(bus, h1.id, "up")
            current = vm(host_id=h1.id)
            for number in range(5):
                current = down(replace(current, epoch=number + 1))
                await owner.says(VM_CHANGED, current)
                if number == 4:
                    break

                async def asked(count: int = number + 1) -> bool:
                    return len(owner.asked) >= count

                await until(asked)
                current = replace(current, revision=current.revision + 1, status=VmStatus.UP, host_id=h1.id)
                await owner.says(VM_CHANGED, current)

            async def gave_up() -> VmRestart | None:
                return next((r for r in await restarts(bus) if r.gave_up), None)

            record = await until(gave_up)
            assert "it is left down" in record.message
            times = [at for _, _, at in owner.asked]
            gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
            assert len(times) == 4
            assert gaps[0] >= 0.25
            assert gaps[1] >= 0.55
            assert len({request_id for _, request_id, _ in owner.asked}) == 4


async def test_a_host_that_fell_silent_after_the_crash_is_waited_for(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1) as (heart,):
            up = vm(host_id=h1.id)
            await owner.says(VM_CHANGED, up)
            await becomes(bus, h1.id, "up")
            heart.stop()
            await becomes(bus, h1.id, "non_responsive")
            await owner.says(VM_CHANGED, down(up))

            async def recorded() -> bool:
                return bool(await restarts(bus))

            await until(recorded)
            assert owner.asked == []
            heart.start()

            async def asked() -> bool:
                return bool(owner.asked)

            await until(asked)


async def test_an_unknown_outcome_is_asked_again_under_the_same_id(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    owner.refusal = Refused(Kind.UNAVAILABLE, "not now")
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1):
            await becomes(bus, h1.id, "up")
            await owner.says(VM_CHANGED, down(vm(host_id=h1.id)))

            async def asked_thrice() -> bool:
                return len(owner.asked) >= 3

            await until(asked_thrice)
            owner.refusal = None

            async def done() -> bool:
                found = await restarts(bus)
                return bool(found and found[0].last_operation_id)

            await until(done)
            assert len({request_id for _, request_id, _ in owner.asked}) == 1
            assert (await restarts(bus))[0].attempts == 1


async def test_a_crash_while_ha_was_away_is_found_in_the_list(configured: Settings) -> None:
    owner, h1 = Inventory(), host("h1")
    crash = down(vm(host_id=h1.id))
    owner.knows(h1, crash)
    async with running(hurried(configured), owner.service(), ha()) as bus, hearts(bus.client, h1):

        async def asked() -> bool:
            return bool(owner.asked)

        await until(asked)
        assert owner.asked[0][0].vm_id == crash.id


def crashes_of(*priorities: int, host_id: str) -> list[Vm]:
    """One of each importance, named after it."""
    return [
        down(vm(host_id=host_id, name=str(p), high_availability=HighAvailability(enabled=True, priority=p)))
        for p in priorities
    ]


async def test_the_more_important_vm_is_asked_for_first_and_the_others_once_it_has_a_host(
    configured: Settings,
) -> None:
    owner, h1 = Inventory(end=asyncio.Event()), host("h1")
    minor, important, usual = crashes_of(10, 90, 50, host_id=h1.id)
    owner.knows(h1, minor, important, usual)
    async with running(hurried(configured), owner.service(), ha()) as bus, hearts(bus.client, h1):

        async def asked(*vms: Vm) -> bool:
            return [ask.vm_id for ask, _, _ in owner.asked] == [v.id for v in vms]

        async def told(waiting: Vm, first: Vm) -> bool:
            found = [r.message for r in await restarts(bus) if r.vm_id == waiting.id]
            return any(
                f"it waits until VM {first.name}, which is more important, has a host" in m for m in found
            )

        await until(lambda: told(minor, important))
        assert await asked(important)
        starting = replace(important, revision=9, status=VmStatus.WAIT_FOR_LAUNCH, host_id=h1.id)
        await owner.says(VM_CHANGED, starting)
        await until(lambda: told(minor, usual))
        assert await asked(important, usual)
        assert owner.end is not None
        owner.end.set()
        await until(lambda: asked(important, usual, minor))


async def test_a_vm_waits_no_longer_than_said_for_a_more_important_one(configured: Settings) -> None:
    owner, h1 = Inventory(end=asyncio.Event()), host("h1")
    owner.knows(h1, *crashes_of(90, 50, host_id=h1.id))
    patience = hurried(configured, VOLERY_HA_PRIORITY_WAIT_SECONDS="1.5")
    async with running(patience, owner.service(), ha()) as bus, hearts(bus.client, h1):

        async def both_asked() -> bool:
            return len(owner.asked) == 2

        await until(both_asked)
        first, second = (at for _, _, at in owner.asked)
        assert second - first >= 1.4


async def test_a_vm_whose_host_died_is_restarted_elsewhere_at_once(configured: Settings) -> None:
    """Whatever it crashed for before."""
    slow = {
        "VOLERY_HA_RESTART_FIRST_DELAY_SECONDS": "60",
        "VOLERY_HA_RESTART_LONGEST_DELAY_SECONDS": "60",
    }
    owner, h1 = Inventory(), host("h1")
    async with running(hurried(configured, **slow), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, h1)
        async with hearts(bus.client, h1):
            await becomes(bus, h1.id, "up")
            up = vm(host_id=h1.id, epoch=3)
            await owner.says(VM_CHANGED, up, down(up))

            async def asked(count: int = 1) -> bool:
                return len(owner.asked) >= count

            await until(asked)
            again = replace(up, revision=3, epoch=4)
            await owner.says(VM_CHANGED, again, down(again, status_reason="host_died"))
            await until(lambda: asked(2))
            first, second = (ask for ask, _, _ in owner.asked)
            assert (first.preferred_host_id, first.avoided_host_ids) == (h1.id, ())
            assert (second.preferred_host_id, second.avoided_host_ids) == ("", (h1.id,))
            assert second.reason == "host_died"
