"""Repeated questions about claims: the first answer, and nothing is done twice, also when their claim is gone by now."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from tests.scheduler.fleets import GIB, capacities, cluster, host, hosts_known, inventory, placing, scheduler
from tests.scheduler.test_cpus import machine
from tests.scheduler.test_placing import claims
from tests.support.runtime import running
from volery.contracts.agent import HostCapabilities
from volery.contracts.base import Done
from volery.contracts.cluster import CLUSTER_CHANGED
from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED
from volery.contracts.scheduling import CONFIRM_CLAIM, PLACE, RELEASE_CLAIM, ClaimKey
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings

WAYS = pytest.mark.parametrize(
    "policy", [PinningPolicy.NONE, PinningPolicy.DEDICATED], ids=["in a round", "by itself"]
)


def asking(request_id: str, question: str = "x") -> Caller:
    """`question` stands for the hash of it."""
    return Caller("service:inventory", request_id, question)


@asynccontextmanager
async def fleet(configured: Settings) -> AsyncIterator[tuple[Bus, str]]:
    """Two hosts with CPUs enough to give some away, and their cluster."""
    owner, c = inventory(), cluster()
    capabilities = HostCapabilities(memory_bytes=64 * GIB, cpus=8, machines=("q35",), cores=machine(1, 8, 1))
    hosts = [host(c.id, name=f"h{n}", capabilities=capabilities) for n in range(2)]
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, 2)
        yield bus, c.id


@WAYS
async def test_a_placement_whose_claim_was_given_back_is_not_made_again(
    configured: Settings, policy: PinningPolicy
) -> None:
    """A late twin of the question comes together with others, whom it costs nothing."""
    async with fleet(configured) as (bus, cluster_id):
        ask = placing(cluster_id, cpu_pinning=CpuPinning(policy=policy))
        first = await bus.ask(PLACE, ask, asking("first"))
        assert first.claimed
        await bus.ask(RELEASE_CLAIM, ClaimKey(vm_id=ask.need.vm_id, epoch=1), asking("back"))
        others = [placing(cluster_id) for _ in range(6)]
        placed = await asyncio.gather(
            bus.ask(PLACE, ask, asking("first")),
            *(bus.ask(PLACE, other, asking(other.need.vm_id)) for other in others),
        )
        assert placed[0] == first
        assert all(each.claimed for each in placed)
        assert {c.vm_id for c in await claims(bus)} == {other.need.vm_id for other in others}
        assert sum(c.vcpus_used for c in (await capacities(bus)).values()) == 6


@WAYS
async def test_a_word_that_comes_twice_does_nothing_the_second_time(
    configured: Settings, policy: PinningPolicy
) -> None:
    async with fleet(configured) as (bus, cluster_id):
        ask = placing(cluster_id, cpu_pinning=CpuPinning(policy=policy))
        key = ClaimKey(vm_id=ask.need.vm_id, epoch=1)
        await bus.ask(PLACE, ask, asking("first"))
        await bus.ask(CONFIRM_CLAIM, key, asking("runs"))
        await bus.ask(RELEASE_CLAIM, key, asking("back"))
        assert await bus.ask(CONFIRM_CLAIM, key, asking("runs")) == Done(), "as it was answered, not as it is"
        await bus.ask(PLACE, ask, asking("second"))
        assert await bus.ask(RELEASE_CLAIM, key, asking("back")) == Done()
        assert [(c.vm_id, c.epoch) for c in await claims(bus)] == [(ask.need.vm_id, 1)]


@WAYS
async def test_an_id_that_was_used_for_another_question_is_refused_and_nothing_is_claimed(
    configured: Settings, policy: PinningPolicy
) -> None:
    async with fleet(configured) as (bus, cluster_id):
        ask = placing(cluster_id, cpu_pinning=CpuPinning(policy=policy))
        await bus.ask(PLACE, ask, asking("first"))
        other = replace(placing(cluster_id), need=replace(ask.need, vm_id=placing(cluster_id).need.vm_id))
        with pytest.raises(Refused) as refused:
            await bus.ask(PLACE, other, asking("first", "y"))
        assert refused.value.kind is Kind.MISMATCH
        assert [c.vm_id for c in await claims(bus)] == [ask.need.vm_id]
