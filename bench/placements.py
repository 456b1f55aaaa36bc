"""Durable placements a second: from the request on the bus to the committed claim's answer, in a fleet of full size."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

from bench.claims_world import CLUSTER, GIB, GROUP_SIZE, NETWORKS, Alone, Size, overcommitted, scheduler_alone
from bench.rows import Line, below, percentile
from bench.world import World
from volery.contracts.base import encode
from volery.contracts.ids import new_id
from volery.contracts.metrics import METRICS_SUBJECT, HostSample, VmSample
from volery.contracts.scheduling import PLACE, RELEASE_CLAIM, ClaimKey, Need, Place
from volery.runtime.bus import Bus, Caller, open_bus

SEED = 4
FLAVOURS = [(memory, vcpus) for memory in (1, 2, 3, 4, 6, 8, 12, 16) for vcpus in (1, 2, 3, 4, 5, 6, 8, 10)]
LIMITED, GROUPED, PINNED, REFUSED = 0.30, 0.20, 0.10, 0.05
RACK = 40
"""Hosts that reach a local disk's storage, and one group's hosts that a pinned VM may have a tenth of."""
CLAIMS_PER_RELEASE = 2
IN_FLIGHT = 64
SAMPLE_SECONDS = 15.0
MIX = (
    f"{len(FLAVOURS)} flavours, {LIMITED:.0%} with networks or storage that not every host reaches, {GROUPED:.0%} in affinity "
    f"groups of {GROUP_SIZE} (half enforcing), {PINNED:.0%} pinned, {REFUSED:.0%} refused, one release per "
    f"{CLAIMS_PER_RELEASE} claims, every host's sample each {SAMPLE_SECONDS:g} s, {IN_FLIGHT} in flight"
)
GOAL, P99_MS, SHARE = 2000.0, 100.0, 0.7
WARM_SECONDS, SECONDS = 3.0, 12.0
MOST = 60_000
"""VMs that a run could place."""


@dataclass
class Measured:
    seconds: float = 0.0
    placed: int = 0
    refused: int = 0
    released: int = 0
    taken_ms: list[float] = field(default_factory=list)
    cost_ms: dict[str, float] = field(default_factory=dict)
    """Part → milliseconds of a processor for one placement."""
    over: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.placed / self.seconds


def places(host_ids: list[str], grouped: list[str]) -> Iterator[Place]:
    """The mix. VMs of groups come in the order of their groups, as an administrator starts them."""
    dice = random.Random(SEED)
    mates = iter(grouped)
    for number in range(MOST):
        memory, vcpus = dice.choice(FLAVOURS)
        limited, pinned = dice.random() < LIMITED, dice.random() < PINNED
        by_storage = limited and dice.random() < 0.5
        rack = dice.randrange(0, len(host_ids) - RACK)
        refused = dice.random() < REFUSED
        vm_id = next(mates) if dice.random() < GROUPED else new_id()
        need = Need(
            vm_id=vm_id,
            cluster_id=CLUSTER,
            name=f"load{number}",
            memory_bytes=(4096 if refused else memory) * GIB,
            vcpus=vcpus,
            network_ids=NETWORKS if limited and not by_storage else (),
            storage_host_ids=tuple(host_ids[rack : rack + RACK]) if by_storage else None,
            host_ids=tuple(host_ids[rack : rack + RACK // 10]) if pinned else (),
        )
        yield Place(need=need, epoch=1, operation_id=new_id())


@dataclass
class Load:
    bus: Bus
    asks: Iterator[Place]
    counting: bool = False
    found: Measured = field(default_factory=Measured)
    held: deque[ClaimKey] = field(default_factory=deque)
    claims: int = 0

    async def caller(self, until: float) -> None:
        while time.perf_counter() < until:
            await self.place(next(self.asks))
            if self.claims >= CLAIMS_PER_RELEASE and self.held:
                self.claims -= CLAIMS_PER_RELEASE
                await self.bus.ask(RELEASE_CLAIM, self.held.popleft(), _caller())
                self.found.released += self.counting

    async def place(self, ask: Place) -> None:
        began = time.perf_counter()
        answer = await self.bus.ask(PLACE, ask, _caller())
        if self.counting:
            self.found.taken_ms.append((time.perf_counter() - began) * 1000)
            self.found.placed += 1
            self.found.refused += not answer.claimed
        if answer.claimed:
            self.claims += 1
            self.held.append(ClaimKey(vm_id=ask.need.vm_id, epoch=ask.epoch))


def _caller() -> Caller:
    """As inventory asks: under an id by which a repeat gets the first answer."""
    return Caller("service:inventory", new_id(), "bench")


async def _samples(bus: Bus, host_ids: list[str]) -> None:
    """Every host's sample in turn, at the fleet's rate."""
    now, dice = datetime.now(UTC), random.Random(SEED)
    vms = tuple(VmSample(vm_id=new_id(), cpu_percent=3.0, memory_bytes=GIB) for _ in range(20))
    started = time.perf_counter()
    for sent, host_id in enumerate(cycle(host_ids), 1):
        sample = HostSample(
            host_id=host_id,
            boot_id="b",
            at=now,
            cpu_percent=dice.uniform(0, 60),
            memory_bytes=256 * GIB,
            vms=vms,
        )
        await bus.client.publish(METRICS_SUBJECT.format(host_id=host_id), encode(sample))
        due = started + sent * SAMPLE_SECONDS / len(host_ids)
        if (ahead := due - time.perf_counter()) > 0.01:
            await asyncio.sleep(ahead)


async def _run(alone: Alone, grouped: list[str]) -> Measured:
    async with open_bus(alone.bus, "inventory") as bus:
        load = Load(bus, places(alone.host_ids, grouped))
        sampling = asyncio.create_task(_samples(bus, alone.host_ids))
        try:
            await _callers(load, WARM_SECONDS)
            load.counting, before, began = True, alone.processor_seconds(), time.perf_counter()
            await _callers(load, SECONDS)
            after, found = alone.processor_seconds(), load.found
            found.seconds = time.perf_counter() - began
        finally:
            sampling.cancel()
    found.cost_ms = {part: (after[part] - before[part]) / found.placed * 1000 for part in after}
    found.over = await overcommitted(alone)
    return found


async def _callers(load: Load, seconds: float) -> None:
    until = time.perf_counter() + seconds
    await asyncio.gather(*(load.caller(until) for _ in range(IN_FLIGHT)))


async def measured(hosts: int, vms: int) -> Measured:
    grouped = [new_id() for _ in range(MOST // 4)]
    profile = os.environ.get("BENCH_PROFILE")
    async with scheduler_alone(Size(hosts, vms, grouped), Path(profile) if profile else None) as alone:
        found = await _run(alone, grouped)
    cost = ", ".join(f"{part} {ms:.2f}" for part, ms in found.cost_ms.items())
    print(
        f"  {hosts:,} hosts, {vms:,} VMs: {found.rate:,.0f} placements/s, p50 {percentile(found.taken_ms, 50):.0f} ms, "
        f"p99 {percentile(found.taken_ms, 99):.0f} ms; {found.placed} placed, of which {found.refused} were refused, "
        f"{found.released} released; ms of a processor each: {cost}; over-committed: {len(found.over)}",
        file=sys.stderr,
    )
    return found


async def placements(world: World) -> list[Line]:
    print(f"  {MIX}", file=sys.stderr)
    small = await measured(1_000, 20_000)
    large = await measured(10_000, 200_000)
    cost = ", ".join(f"{part} {ms:.2f}" for part, ms in large.cost_ms.items())
    ratio = large.rate / small.rate
    return [
        Line(
            name="durable placements a second, 10,000 hosts and 200,000 VMs", ours=large.rate, theirs=small.rate,
            unit="placements/s", ratio=ratio, goal=f">= {GOAL:,.0f} and >= {SHARE:g} x", met=large.rate >= GOAL and ratio >= SHARE,
            note=f"theirs: 1,000 hosts and 20,000 VMs. {MIX}. One scheduler; milliseconds of a processor each: {cost}",
        ),
        below("the same, p99", percentile(large.taken_ms, 99), P99_MS, "ms", f"median {percentile(large.taken_ms, 50):.0f} ms"),
        below("hosts promised more than they have, afterwards", len(large.over) + len(small.over), 0, "hosts"),
    ]  # fmt: skip
