"""A rack that falls silent in one moment: judged in a few commits, and who was judged meanwhile holds up nobody."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from services.ha.executors import in_cluster
from services.ha.liveness import Judged, conclude_together
from services.ha.policies.evidence import judge
from services.ha.state import Ha
from services.ha.watch import HostFacts
from tests.ha.world import Inventory, becomes, ha, hearts, host, hurried
from tests.support.runtime import running
from tests.support.service_process import captured
from volery.contracts.host import HOST_CHANGED
from volery.contracts.ids import new_id
from volery.contracts.liveness import LivenessState
from volery.runtime.clock import monotonic
from volery.runtime.programs import Settings

MANY = 30


async def test_many_that_fall_silent_at_once_are_a_few_commits(configured: Settings) -> None:
    """What is written in one statement is judged at one moment."""
    owner, hosts = Inventory(), [host(f"h{n:02d}") for n in range(3 * MANY)]
    async with running(hurried(configured), owner.service(), ha()) as bus:
        await owner.says(HOST_CHANGED, *hosts)
        async with hearts(bus.client, *hosts) as beating:
            for h in hosts:
                await becomes(bus, h.id, "up", 60)
            for heart in beating[:MANY]:
                heart.stop()
            silent = [await becomes(bus, h.id, "non_responsive", 60) for h in hosts[:MANY]]
    assert len({judged.judged_at for judged in silent}) <= MANY / 3


async def test_one_whose_row_was_written_meanwhile_or_is_gone_holds_up_nobody(configured: Settings) -> None:
    owner, hosts = Inventory(), [host(f"h{n}") for n in range(4)]
    found: list[Ha] = []
    async with running(hurried(configured), owner.service(), captured(ha(), found)) as bus:
        await owner.says(HOST_CHANGED, *hosts)
        for h in hosts:
            await becomes(bus, h.id, "unknown")
        made, now = found[0], monotonic()
        await made.core.pool.execute("delete from liveness where id = $1", hosts[0].id)
        writing = asyncio.create_task(
            made.core.pool.execute(
                "update liveness set revision = revision + 1, doc = doc, private = private where id = $1",
                hosts[1].id,
            )
        )
        silent = dataclasses.replace(
            judge(made.watch(hosts[1].id).seen(made.listening_since, now), made.config, 0.0),
            state=LivenessState.NON_RESPONSIVE,
        )
        await conclude_together(made, [_judged(made, h.id, silent) for h in hosts])
        await writing
        states = {
            row["id"]: row["state"] for row in await made.core.pool.fetch("select id, state from liveness")
        }
    assert states.keys() == {h.id for h in hosts[1:]}
    assert {states[h.id] for h in hosts[2:]} == {"non_responsive"}


def _judged(made: Ha, host_id: str, judgement: Any) -> Judged:
    watch = made.watch(host_id)
    return Judged(host_id, watch, watch.seen(made.listening_since, monotonic()), judgement)


def test_hosts_are_found_in_the_cluster_that_they_were_last_said_to_be_in() -> None:
    """Also when what was said before comes late."""
    made = Ha(None, None, None, lambda subject, body: "")  # type: ignore[arg-type]
    one, other = new_id(), new_id()
    for host_id in (one, other):
        made.learn(HostFacts(host_id, 1, cluster_id="a"))
        made.watch(host_id).known = True
    made.learn(HostFacts(other, 3, cluster_id="b"))
    made.learn(HostFacts(other, 2, cluster_id="a"))
    assert [w.facts.id for w in in_cluster(made, "a")] == [one]
    assert [w.facts.id for w in in_cluster(made, "b")] == [other]
    made.forget(other)
    assert in_cluster(made, "b") == in_cluster(made, "c") == []
    assert not made.clusters["b"]
