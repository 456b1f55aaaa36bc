"""Orders end with the boot that had them, by proof; those of no boot wait for one, or for their operation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from tests.support.bell import Bell
from tests.support.runtime import running
from tests.support.scripted_agent import ScriptedAgent, scripted
from volery.contracts.agent import HOST_REPORTED, INVENTORY_ORDER_FINISHED, HostReported, Outcome
from volery.contracts.base import Done, Message, Order
from volery.contracts.errors import Refused
from volery.contracts.ids import new_id
from volery.contracts.liveness import (
    LivenessState,
)
from volery.runtime.database import migrate, open_pool
from volery.runtime.deaths import Deaths, host_died
from volery.runtime.hear import HostHearing, make_host_stream, table_of
from volery.runtime.orders import Beats, Orders, Result
from volery.runtime.programs import Settings
from volery.runtime.tables import Change, commit
from volery.runtime.tasks import end

SECONDS = 40.0


class Work(Message):
    name: str = ""


WORK = Order("toy.work", Work, Done)


@dataclass
class Party:
    """Orders, beats, a host's facts and deaths, as a service has them together."""

    orders: Orders
    deaths: Deaths
    ha: Bell
    written: list[str] = field(default_factory=list)
    """What was done with a death before orders ended."""

    async def give(self, host_id: str, name: str, operation_id: str = "op") -> str:
        order_id = new_id()
        given = self.orders.give(
            WORK,
            Work(name=name),
            order_id=order_id,
            host_id=host_id,
            object_id=name,
            operation_id=operation_id,
        )
        await commit(self.orders.pool, given)
        return order_id

    async def dies(self, agent: ScriptedAgent) -> str:
        """Proven, and said. The agent is away."""
        await agent.kill()
        said = self.ha.holds(agent.host_id, agent.boot_id, LivenessState.DEAD, agent.boot_id)
        await self.deaths.heard(said)
        return agent.boot_id

    async def boots(self, agent: ScriptedAgent) -> None:
        former, agent.boot_id = agent.boot_id, new_id()
        await agent.start()
        said = self.ha.holds(agent.host_id, agent.boot_id, LivenessState.UP, former)
        await self.deaths.heard(said)

    async def until_down(self, agent: ScriptedAgent) -> None:
        """Until all that follows from its death was done."""
        async with asyncio.timeout(SECONDS):
            while agent.host_id not in self.deaths.down:
                await asyncio.sleep(0.01)

    async def end_of(self, order_id: str) -> Result:
        async with asyncio.timeout(SECONDS):
            return await self.orders.result(order_id)


@asynccontextmanager
async def owner_of(configured: Settings) -> AsyncIterator[Party]:
    await migrate(configured.database, "inventory")
    ha = Bell()
    async with running(configured, ha.service()) as bus, open_pool(configured.database, "inventory") as pool:
        await make_host_stream(bus, 1)
        beats = Beats()
        await beats.listen(bus.client)
        hearing = HostHearing(bus, pool, "inventory", {}, HOST_REPORTED)
        deaths = Deaths(bus, pool)
        orders = Orders("inventory", pool, bus.client, hearing, beats, lambda subject, body: "", deaths)
        made = Party(orders, deaths, ha)

        async def reported(_: HostReported) -> list[Change]:
            return []

        async def first() -> None:
            open_ones = await pool.fetchval("select count(*) from host_order where state <> 'finished'")
            made.written.append(f"{len(deaths.ended)} deaths, {open_ones} open")

        hearing.handlers = table_of(
            [(HOST_REPORTED, reported), (INVENTORY_ORDER_FINISHED, orders.on_finished)]
        )
        deaths.first, deaths.then = first, orders.end_with_their_hosts
        works = [asyncio.create_task(hearing.run()), asyncio.create_task(deaths.run())]
        try:
            yield made
        finally:
            await end(works)


def worker(url: str, gate: asyncio.Event | None = None) -> ScriptedAgent:
    async def work(ask: Work) -> Done:
        if gate is not None:
            await gate.wait()
        return Done()

    agent = ScriptedAgent(url, owners=("inventory",))
    agent.does(WORK, work)
    return agent


async def until_begun(agent: ScriptedAgent, count: int = 1) -> None:
    async with asyncio.timeout(SECONDS):
        while len(agent.begun(WORK.kind)) < count:
            await asyncio.sleep(0.01)


async def test_what_a_boot_had_ends_with_it_after_what_ran_there(configured: Settings) -> None:
    async with (
        owner_of(configured) as owner,
        scripted(worker(configured.bus.servers, asyncio.Event())) as agent,
    ):
        waiting = asyncio.create_task(owner.end_of(await owner.give(agent.host_id, "a")))
        await until_begun(agent)
        await owner.dies(agent)
        result = await waiting
        assert result.outcome is Outcome.HOST_DIED
        with pytest.raises(Refused, match=r"host h1 died \(bmc_off at .*before it said how toy.work") as died:
            result.answer(WORK)
        assert host_died(died.value)
        assert owner.written[0] == "1 deaths, 1 open"


async def test_an_operation_s_order_that_nobody_can_have_ends_unsent(configured: Settings) -> None:
    async with owner_of(configured) as owner, scripted(worker(configured.bus.servers)) as agent:
        await owner.end_of(await owner.give(agent.host_id, "first"))
        await owner.dies(agent)
        assert (await owner.end_of(await owner.give(agent.host_id, "b"))).outcome is Outcome.HOST_DIED


async def test_an_order_of_no_operation_waits_for_the_next_boot(configured: Settings) -> None:
    async with owner_of(configured) as owner, scripted(worker(configured.bus.servers)) as agent:
        await owner.end_of(await owner.give(agent.host_id, "first"))
        await owner.dies(agent)
        await owner.until_down(agent)
        waiting = asyncio.create_task(owner.end_of(await owner.give(agent.host_id, "c", operation_id="")))
        await owner.boots(agent)
        assert (await waiting).outcome is Outcome.SUCCEEDED
        assert [ask.name for ask in agent.begun(WORK.kind)] == ["first", "c"]


async def test_an_order_that_a_later_boot_has_is_not_ended_by_the_former_s_death(
    configured: Settings,
) -> None:
    gate = asyncio.Event()
    async with owner_of(configured) as owner, scripted(worker(configured.bus.servers, gate)) as agent:
        agent.deaf = True  # it is sent to the first boot, and gets lost
        waiting = asyncio.create_task(owner.end_of(await owner.give(agent.host_id, "d")))
        async with asyncio.timeout(SECONDS):
            while not agent.unheard:
                await asyncio.sleep(0.01)
        await agent.kill()
        former, agent.boot_id, agent.deaf = agent.boot_id, new_id(), False
        await agent.start()
        await until_begun(agent)
        said = owner.ha.holds(agent.host_id, agent.boot_id, LivenessState.UP, former)
        await owner.deaths.heard(said)
        async with asyncio.timeout(SECONDS):
            while not owner.written:
                await asyncio.sleep(0.01)
        gate.set()
        assert (await waiting).outcome is Outcome.SUCCEEDED


async def test_a_death_that_nobody_heard_before_the_next_one_ends_what_it_had(configured: Settings) -> None:
    """The service was away for two deaths."""
    async with (
        owner_of(configured) as owner,
        scripted(worker(configured.bus.servers, asyncio.Event())) as agent,
    ):
        waiting = asyncio.create_task(owner.end_of(await owner.give(agent.host_id, "a")))
        await until_begun(agent)
        await agent.kill()
        second, third = new_id(), new_id()
        said = owner.ha.holds(agent.host_id, third, LivenessState.CONNECTING, second, agent.boot_id)
        await owner.deaths.heard(said)
        assert (await waiting).outcome is Outcome.HOST_DIED
        assert set(owner.deaths.ended) == {(agent.host_id, agent.boot_id), (agent.host_id, second)}


async def test_a_boot_that_lives_on_is_given_orders_again(configured: Settings) -> None:
    """The proof was wrong, and voided: what was done by it is done, and nothing more."""
    async with owner_of(configured) as owner, scripted(worker(configured.bus.servers)) as agent:
        await owner.end_of(await owner.give(agent.host_id, "first"))
        said = owner.ha.holds(agent.host_id, agent.boot_id, LivenessState.DEAD, agent.boot_id)
        await owner.deaths.heard(said)
        await owner.until_down(agent)
        assert (await owner.end_of(await owner.give(agent.host_id, "e"))).outcome is Outcome.HOST_DIED
        await owner.deaths.heard(owner.ha.holds(agent.host_id, agent.boot_id, LivenessState.UP))
        async with asyncio.timeout(SECONDS):
            while owner.deaths.ended:
                await asyncio.sleep(0.01)
        assert (await owner.end_of(await owner.give(agent.host_id, "f"))).outcome is Outcome.SUCCEEDED
        assert await owner.orders.pool.fetchval("select count(*) from host_death") == 0


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_dies_every_order_ends_and_none_is_carried_out_after_its_end(
    configured: Settings, seed: int
) -> None:
    choose = random.Random(seed)
    async with owner_of(configured) as owner, scripted(worker(configured.bus.servers)) as agent:
        waiting: dict[str, asyncio.Task[Result]] = {}
        alive = True
        for number in range(30):
            match choose.choice(("give", "give", "give", "die", "boot", "wait")):
                case "give":
                    order_id = await owner.give(agent.host_id, f"o{number}", choose.choice(("", "op")))
                    waiting[order_id] = asyncio.create_task(owner.end_of(order_id))
                case "die" if alive:
                    await owner.dies(agent)
                    alive = False
                case "boot" if not alive:
                    await _end_what_a_former_boot_had(agent)
                    await owner.boots(agent)
                    alive = True
                case _:
                    await asyncio.sleep(choose.random() * 0.1)
        if not alive:
            await _end_what_a_former_boot_had(agent)
            await owner.boots(agent)
        results = {order_id: await task for order_id, task in waiting.items()}
        known = set(agent.journal)
        for order_id, result in results.items():
            assert result.outcome in (Outcome.SUCCEEDED, Outcome.FAILED, Outcome.HOST_DIED)
            if result.outcome is Outcome.SUCCEEDED:
                assert agent.journal[order_id].outcome is Outcome.SUCCEEDED
        await owner.end_of(await owner.give(agent.host_id, "last"))
        assert len(set(agent.journal) - known) == 1  # nothing that had ended came after its end


async def _end_what_a_former_boot_had(agent: ScriptedAgent) -> None:
    for entry in list(agent.journal.values()):
        if entry.outcome is None:
            await agent.fail_after_reboot(entry)


async def test_ha_is_asked_again_only_where_a_death_may_follow(configured: Settings) -> None:
    """Ten thousand hosts that come up are no reason to ask about each."""
    async with owner_of(configured) as owner:
        hosts = [new_id() for _ in range(5)]
        for host_id in hosts:
            for state in (LivenessState.UP, LivenessState.CONNECTING, LivenessState.UP):
                await owner.deaths.heard(owner.ha.holds(host_id, "boot", state))
        died = owner.ha.holds(hosts[0], "boot", LivenessState.DEAD, "boot")
        await owner.deaths.heard(died)
        async with asyncio.timeout(SECONDS):
            while not owner.deaths.has_ended(hosts[0], "boot"):
                await asyncio.sleep(0.01)
        await owner.deaths.heard(owner.ha.holds(hosts[0], "boot", LivenessState.UP))
        async with asyncio.timeout(SECONDS):
            while owner.deaths.has_ended(hosts[0], "boot"):
                await asyncio.sleep(0.01)
        assert set(owner.ha.asked) == {hosts[0]}
