"""Turns of VMs that are brought back: never too many in one place, nobody waits in vain, the most important first."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inventory.config import InventoryConfig
from services.inventory.turns import Spot, Turns, admitted, limits
from tests.inventory.world import found_cluster, inventory_of, surroundings, until
from volery.contracts.domain_orders import RUN_DOMAIN, DomainRunning, RunDomain
from volery.contracts.operation import OperationState
from volery.contracts.vm import RESTART_VM, START_VM, RestartVm, StartVm, VmStatus
from volery.runtime.programs import Settings

MOST = {"host": 2, "storage_domain": 3}
SPOTS = [*(Spot("host", str(n)) for n in range(3)), *(Spot("storage_domain", str(n)) for n in range(2))]
CONFIG = InventoryConfig(restarts_at_once_on_host=2, restarts_at_once_from_storage_domain=3)
spots = st.sets(st.sampled_from(SPOTS), min_size=1).map(sorted)


@settings(max_examples=300, deadline=None)
@given(st.lists(spots, max_size=12), st.lists(spots, max_size=6))
def test_never_too_many_in_one_place_and_nobody_waits_in_vain(
    waiting: list[list[Spot]], running: list[list[Spot]]
) -> None:
    held: Counter[Spot] = Counter()
    for number in admitted(running, {}, MOST):
        held.update(running[number])
    now = admitted(waiting, held, MOST)
    after = held + Counter(spot for number in now for spot in waiting[number])
    assert all(count <= MOST[spot.kind] for spot, count in after.items())
    for number, wanted in enumerate(waiting):
        if number not in now:
            assert any(after[spot] >= MOST[spot.kind] for spot in wanted)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(spots, st.integers(1, 100), st.sampled_from(["ends", "fails", "cancelled"])), max_size=15
    )
)
def test_whatever_comes_and_goes_all_have_their_turn(plan: list[tuple[list[Spot], int, str]]) -> None:
    async def play() -> None:
        turns, now, done = Turns(), Counter[Spot](), 0

        async def one(wanted: list[Spot], priority: int, how: str) -> None:
            nonlocal done
            async with turns.turn(wanted, priority, CONFIG):
                now.update(wanted)
                assert all(count <= MOST[spot.kind] for spot, count in now.items())
                try:
                    await asyncio.sleep(0)
                finally:
                    now.subtract(wanted)
                done += 1
                if how == "fails":
                    raise ValueError

        tasks = [asyncio.create_task(one(*each)) for each in plan]
        await asyncio.sleep(0)
        for task, (_, _, how) in zip(tasks, plan, strict=True):
            if how == "cancelled":
                task.cancel()
        async with asyncio.timeout(5):
            for task in tasks:
                with suppress(ValueError, asyncio.CancelledError):
                    await task
        assert done >= sum(how != "cancelled" for _, _, how in plan)
        assert not turns.held

    asyncio.run(play())


async def test_the_most_important_that_waits_is_next() -> None:
    turns, order = Turns(), list[int]()
    release = asyncio.Event()
    host = [Spot("host", "h")]

    async def one(priority: int) -> None:
        async with turns.turn(host, priority, CONFIG):
            order.append(priority)
            await release.wait()

    async with asyncio.TaskGroup() as group:
        for priority in (1, 2, 50, 99, 70):
            group.create_task(one(priority))
        while len(order) < 2:
            await asyncio.sleep(0)
        release.set()
    assert order == [1, 2, 99, 70, 50]


def test_a_limit_of_none_at_all_is_refused() -> None:
    assert limits(InventoryConfig()) == {"scheduler": 4, "host": 8, "storage_domain": 32}
    with pytest.raises(ValueError, match="nothing would be brought back"):
        InventoryConfig(restarts_at_once_on_host=0)


async def test_a_host_is_given_so_many_restarts_at_a_time_and_what_a_person_starts_goes_past(
    configured: Settings,
) -> None:
    limited = {"VOLERY_INVENTORY_RESTARTS_AT_ONCE_ON_HOST": "2"}
    async with surroundings(dataclasses.replace(configured, environ=limited)) as world:
        async with inventory_of(world):
            await found_cluster(world)
            host = await world.machine("h1")
            vms = [await world.vm(ha=True) for _ in range(4)]
            by_hand = await world.vm(start=False)
            for vm in vms:
                await host.tell(vm.id, "crashed", vm.epoch, "crashed")
                await world.vm_is(vm.id, VmStatus.DOWN)
            running, most, gate = list[str](), 0, asyncio.Event()

            async def run(ask: RunDomain) -> DomainRunning:
                nonlocal most
                running.append(ask.vm_id)
                most = max(most, len(running))
                await gate.wait()
                running.remove(ask.vm_id)
                return await host._run(ask)

            host.agent.does(RUN_DOMAIN, run)
            placed = len(world.scheduler.asked)
            ops = [
                await world.bus.ask(RESTART_VM, RestartVm(vm_id=vm.id, epoch=0, reason="crashed"))
                for vm in vms
            ]

            async def all_placed() -> bool:
                return len(running) == 2 and len(world.scheduler.asked) == placed + 4

            await until(all_placed)
            ops.append(await world.bus.ask(START_VM, StartVm(id=by_hand.id)))

            async def past_them() -> bool:
                return by_hand.id in running

            await until(past_them)
            assert most == 3
            gate.set()
            for op in ops:
                assert (await world.ended(op)).state is OperationState.SUCCEEDED
            assert most == 3
