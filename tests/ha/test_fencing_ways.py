"""Several ways to a host's power: whose answer was lost is asked for the status before another is taken."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.ha.bmcs import AGENT, PASSWORD, Bmc
from tests.ha.site import Site, site, uuid
from tests.ha.world import until
from volery.contracts.fencing import PowerAction, PowerState
from volery.contracts.power import (
    NewFenceDevice,
)
from volery.runtime.programs import Settings


async def test_the_second_way_to_its_power_is_not_taken_once_it_beats_again(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path) as at:
        at.executors.bmcs["bmc0b"] = Bmc(uuid(0))
        ways = [
            NewFenceDevice(agent=AGENT, address=address, secrets={"password": PASSWORD}, timeout_seconds=8)
            for address in ("bmc0", "bmc0b")
        ]
        await at.set_power(0, devices=tuple(ways))
        await at.tested(0)
        at.bmc(0).broken.add(PowerAction.OFF)
        fails = at.bmc(0).held[PowerAction.OFF] = asyncio.Event()
        at.hearts[0].stop()

        async def asked() -> bool:
            return at.bmc(0).did(PowerAction.OFF) == 1

        await until(asked, 30)
        at.hearts[0].start()
        await at.becomes(0, "up")
        fails.set()
        record = await at.ended("cancelled")
        assert any("no longer held" in step.words for step in record.steps)
        assert at.executors.bmcs["bmc0b"].did(PowerAction.OFF) == 0


async def two_ways(at: Site) -> tuple[Bmc, Bmc]:
    """To the power of the first host. (A lost answer is waited for 5 s longer than the device may take.)"""
    second = at.executors.bmcs["bmc0b"] = Bmc(uuid(0))
    ways = [
        NewFenceDevice(agent=AGENT, address=address, secrets={"password": PASSWORD}, timeout_seconds=1)
        for address in ("bmc0", "bmc0b")
    ]
    await at.set_power(0, devices=tuple(ways))
    await at.tested(0)
    return at.bmc(0), second


def orders(*bmcs: Bmc) -> list[int]:
    return [bmc.did(PowerAction.OFF) for bmc in bmcs]


async def test_an_order_whose_answer_was_lost_is_looked_after_before_another_way_is_taken(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path) as at:
        first, second = await two_ways(at)
        first.loses = {PowerAction.OFF}
        at.hearts[0].stop()
        await at.becomes(0, "dead")
        assert orders(first, second) == [1, 0]
        actions = [ask.action for ask in first.asked]
        assert actions[actions.index(PowerAction.OFF) + 1] is PowerAction.STATUS


async def test_a_way_that_never_works_is_passed_by_the_next_order_once_it_is_known_to_be_on(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path, VOLERY_HA_OFF_RETRY_SECONDS="0.5") as at:
        first, second = await two_ways(at)
        first.loses, first.obeys = {PowerAction.OFF}, False
        second.held[PowerAction.OFF] = asyncio.Event()
        at.hearts[0].stop()

        async def second_is_told() -> bool:
            return second.did(PowerAction.OFF) == 1

        await until(second_is_told, 30)
        assert orders(first, second) == [1, 1]
        (record,) = await at.records()
        steps = [step.step for step in record.steps]
        assert steps.count("ordered_off") == 2
        assert steps.index("answered_on") < len(steps) - steps[::-1].index("ordered_off") - 1
        first.power = PowerState.OFF
        second.held[PowerAction.OFF].set()
        await at.becomes(0, "dead")


async def test_a_way_that_is_known_to_be_unreachable_after_its_answer_was_lost_is_passed_at_once(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path) as at:
        first, second = await two_ways(at)
        first.loses, first.obeys = {PowerAction.OFF}, False
        at.hearts[0].stop()

        async def told() -> bool:
            return first.did(PowerAction.OFF) == 1

        await until(told, 30)
        first.answers = False

        async def second_is_told() -> bool:
            return second.did(PowerAction.OFF) == 1

        await until(second_is_told, 30)
        first.answers, first.power = True, PowerState.OFF  # both say whose they are, and that it is off
        await at.becomes(0, "dead")
        assert orders(first, second) == [1, 1]
        steps = [step.step for step in (await at.records())[0].steps]
        assert steps.count("ordered_off") == 1
