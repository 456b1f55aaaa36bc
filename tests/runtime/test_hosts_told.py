"""What was committed of a host's facts is told to it: at once when that was long ago, but not with every fact."""

from __future__ import annotations

import asyncio

import msgspec
from nats.aio.msg import Msg

from tests.runtime.test_hosts_journals import hall, say_one, until_confirmed, until_current
from tests.support.scripted_agent import ScriptedAgent, scripted
from volery.contracts.agent import COMMITTED_SUBJECT, CommittedWord
from volery.runtime.clock import monotonic
from volery.runtime.hear import COMMIT_WORD_SECONDS
from volery.runtime.programs import Settings


async def test_facts_that_follow_each_other_are_confirmed_together(configured: Settings) -> None:
    told: list[int] = []

    async def take(message: Msg) -> None:
        told.append(msgspec.json.decode(message.data, type=CommittedWord).seq)

    async with (
        hall(configured) as at,
        scripted(ScriptedAgent(configured.bus.servers, owners=("inventory",))) as agent,
        at.listening() as listener,
    ):
        await until_current(listener, agent)
        await at.bus.client.subscribe(COMMITTED_SUBJECT.format(host_id=agent.host_id), cb=take)
        await at.bus.client.flush()
        began = monotonic()
        for _ in range(50):
            await say_one(agent)
            await asyncio.sleep(0.02)
        await until_confirmed(agent)
        assert told == sorted(set(told)), "each word says more than the one before"
        assert len(told) <= (monotonic() - began) / (COMMIT_WORD_SECONDS * 0.95) + 1
