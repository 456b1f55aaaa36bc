"""Hearing hosts over and over: no journal that a host has left is ever believed again, whatever the stream still has."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from tests.support.runtime import open_bus
from tests.support.scripted_agent import ScriptedAgent, Spool, scripted
from volery.contracts.agent import (
    DOMAIN_EVENT_HAPPENED,
    HOST_REPORTED,
    DomainEventHappened,
    HostReported,
)
from volery.contracts.ids import new_id
from volery.runtime.bus import Bus
from volery.runtime.database import migrate, open_pool
from volery.runtime.hear import HOST_STREAM, HostHearing, make_host_stream, table_of
from volery.runtime.programs import Settings
from volery.runtime.tables import Change
from volery.runtime.tasks import end


@dataclass
class Listener:
    """One service that hears a host: what it took for true, in that order."""

    hearing: HostHearing
    admitted: list[str] = field(default_factory=list)
    """The journal of every report, each once in a row."""
    heard: list[str] = field(default_factory=list)
    """Other facts' names."""
    contradictions: list[str] = field(default_factory=list)
    """Hosts that were told more than the tables know, each as often as that was noticed."""

    async def reported(self, fact: HostReported) -> Sequence[Change]:
        if self.admitted[-1:] != [fact.generation]:
            self.admitted.append(fact.generation)
        return ()

    async def happened(self, fact: DomainEventHappened) -> Sequence[Change]:
        self.heard.append(fact.event)
        return ()

    async def contradicted(self, host_id: str, reason: str) -> None:
        self.contradictions.append(host_id)

    @property
    def generation(self) -> str:
        return next((at.generation for at in self.hearing.positions.values()), "")


@dataclass
class Hall:
    """The bus and the database, and a listener that can be ended and begun anew."""

    bus: Bus
    settings: Settings
    admitted: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Listener]:
        async with open_pool(self.settings.database, "inventory") as pool:
            hearing = HostHearing(self.bus, pool, "inventory", {}, HOST_REPORTED)
            listener = Listener(hearing, self.admitted, self.heard, self.contradictions)
            hearing.contradicted = listener.contradicted
            facts = [(HOST_REPORTED, listener.reported), (DOMAIN_EVENT_HAPPENED, listener.happened)]
            hearing.handlers = table_of(facts)
            task = asyncio.create_task(hearing.run())
            try:
                yield listener
            finally:
                await end([task])


@asynccontextmanager
async def hall(configured: Settings) -> AsyncIterator[Hall]:
    await migrate(configured.database, "inventory")
    async with open_bus(configured.bus, "inventory") as bus:
        await make_host_stream(bus, 1)
        yield Hall(bus, configured)


async def until_current(listener: Listener, agent: ScriptedAgent) -> None:
    """Until what the agent says now is heard."""
    async with asyncio.timeout(20):
        while listener.generation != agent.generation or agent.spools.get("inventory", Spool()).waiting:
            await asyncio.sleep(0.01)


async def test_what_the_stream_still_holds_of_a_former_journal_is_not_believed(configured: Settings) -> None:
    async with hall(configured) as at:
        async with scripted(ScriptedAgent(configured.bus.servers, owners=("inventory",))) as agent:
            async with at.listening() as listener:
                await until_current(listener, agent)
                first = agent.generation
                await agent.kill()
                agent.lose_journal()
                await agent.start()
                await until_current(listener, agent)
            assert at.admitted == [first, agent.generation]
            async with at.listening() as listener:  # reads the stream anew
                await agent.report("inventory")
                await until_current(listener, agent)
            assert at.admitted == [first, agent.generation]


async def test_an_agent_with_an_old_copy_of_its_journal_makes_a_new_one(configured: Settings) -> None:
    async with hall(configured) as at:
        async with scripted(ScriptedAgent(configured.bus.servers, owners=("inventory",))) as agent:
            async with at.listening() as listener:
                await until_current(listener, agent)
                backup = agent.generation
                await agent.kill()
                agent.lose_journal()
                await agent.start()
                await until_current(listener, agent)
                second = agent.generation
                await agent.kill()
                agent.lose_journal()
                agent.generation = backup
                await agent.start()
                async with asyncio.timeout(20):
                    while agent.generation == backup:
                        await asyncio.sleep(0.01)
                await until_current(listener, agent)
            assert at.admitted == [backup, second, agent.generation]


async def say_one(agent: ScriptedAgent) -> None:
    await agent.say("inventory", DOMAIN_EVENT_HAPPENED, vm_id=new_id(), epoch=1, event="x")


async def until_confirmed(agent: ScriptedAgent) -> None:
    async with asyncio.timeout(20):
        while agent.spools["inventory"].confirmed < agent.spools["inventory"].head:
            await asyncio.sleep(0.01)


OLDER = {
    "less of its journal": "update heard_host set seq = seq - 1",
    "another journal": "update heard_host set generation = 'before', seq = 1000",
    "no host": "delete from heard_host",
}


@pytest.mark.parametrize("older", OLDER)
@pytest.mark.parametrize("agents_know", [True, False])
async def test_tables_that_know_less_than_they_confirmed_are_an_older_copy(
    configured: Settings, older: str, agents_know: bool
) -> None:
    """Noticed before the fact has an effect, not again after the host's report, and not by agents of before the field."""
    async with hall(configured) as at:
        async with scripted(ScriptedAgent(configured.bus.servers, owners=("inventory",))) as agent:
            async with at.listening() as listener:
                await until_current(listener, agent)
                for _ in range(2):
                    await say_one(agent)
                await until_confirmed(agent)
            assert at.contradictions == []
            async with open_pool(configured.database, "inventory") as pool:
                await pool.execute(OLDER[older])
            await at.bus.client.jetstream().purge_stream(HOST_STREAM)
            if not agents_know:
                agent.spools["inventory"].confirmed = 0
            async with at.listening():
                await say_one(agent)
                await until_confirmed(agent)
                found = len(at.contradictions)
                assert (found > 0) is agents_know
                await say_one(agent)
                await until_confirmed(agent)
            async with at.listening():  # reads the stream anew
                await say_one(agent)
                await until_confirmed(agent)
            assert len(at.contradictions) == found


async def test_a_journal_that_only_a_lost_database_admitted_is_evidence_once(configured: Settings) -> None:
    """The stream has it for a day yet when its host has already gone over to another one."""
    async with hall(configured) as at:
        async with scripted(ScriptedAgent(configured.bus.servers, owners=("inventory",))) as agent:
            async with at.listening() as listener:
                await until_current(listener, agent)
                await until_confirmed(agent)
                await at.bus.client.jetstream().purge_stream(HOST_STREAM)
                await say_one(agent)
                await until_confirmed(agent)
                await agent.kill()
                agent.lose_journal()
            async with open_pool(configured.database, "inventory") as pool:
                await pool.execute("delete from heard_host")
            await agent.start()
            async with at.listening() as listener:
                await until_current(listener, agent)
            assert at.contradictions
            found = len(at.contradictions)
            async with at.listening():
                await say_one(agent)
                await until_confirmed(agent)
            assert len(at.contradictions) == found


DEEDS = ("say", "say", "say", "lose", "back up", "restore", "listen anew", "report", "repeat")


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_to_journals_none_is_admitted_twice(configured: Settings, seed: int) -> None:
    choose = random.Random(seed)
    said = 0
    async with hall(configured) as at:
        async with scripted(ScriptedAgent(configured.bus.servers, owners=("inventory",))) as agent:
            backups: list[tuple[str, dict[str, Spool]]] = []
            for _ in range(4):
                async with at.listening() as listener:
                    for _ in range(6):
                        match choose.choice(DEEDS):
                            case "say":
                                said += 1
                                event = {"vm_id": new_id(), "epoch": 1, "event": str(said)}
                                await agent.say("inventory", DOMAIN_EVENT_HAPPENED, **event)
                            case "lose":
                                await agent.kill()
                                agent.lose_journal()
                                await agent.start()
                            case "back up":
                                backups.append((agent.generation, copy.deepcopy(agent.spools)))
                            case "restore" if backups:
                                await agent.kill()
                                agent.generation, spools = choose.choice(backups)
                                agent.spools = copy.deepcopy(spools)
                                await agent.start()
                            case "report":
                                await agent.report("inventory")
                            case "repeat":
                                for subject, body in list(agent.spools["inventory"].waiting.values()):
                                    await at.bus.client.publish(subject, body)
                            case "listen anew":
                                break
                    await until_current(listener, agent)
    assert len(set(at.admitted)) == len(at.admitted)
    heard = [int(event) for event in at.heard]
    assert heard == sorted(set(heard))
