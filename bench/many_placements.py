"""Placements in calls of a hundred VMs beside the same VMs asked for one by one, in a fleet of a thousand hosts."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from bench.claims_world import CLUSTER, GIB, GROUP_SIZE, Size, overcommitted, scheduler_alone
from bench.placements import IN_FLIGHT
from bench.rows import Line, at_least, below, in_turn
from bench.world import World
from volery.contracts.ids import new_id
from volery.contracts.scheduling import PLACE, PLACE_MANY, Need, Place, PlaceMany
from volery.runtime.bus import Bus, Caller, open_bus

HOSTS, VMS = 1_000, 20_000
CALL, CALLS = 100, 8
HARD = 4
"""Of so many groups that the world makes, the first keeps its VMs on one host."""


@dataclass
class Load:
    """The same VMs again and again, each time under the next epoch, which gives back the claims of the one before."""

    bus: Bus
    vm_ids: Sequence[str]
    epochs: count[int]

    def asks(self) -> list[Place]:
        epoch = next(self.epochs)
        return [
            Place(
                need=Need(vm_id=vm_id, cluster_id=CLUSTER, name=f"load{n}", memory_bytes=2 * GIB, vcpus=2),
                epoch=epoch,
                operation_id=new_id(),
            )
            for n, vm_id in enumerate(self.vm_ids)
        ]

    async def in_calls(self) -> float:
        """VMs a second, one call after the other."""
        asks, began = self.asks(), time.perf_counter()
        for at in range(0, len(asks), CALL):
            question = PlaceMany(places=tuple(asks[at : at + CALL]))
            answer = await self.bus.ask(PLACE_MANY, question, _caller())
            assert all(placement.claimed for placement in answer.placements)
        return len(asks) / (time.perf_counter() - began)

    async def one_by_one(self) -> float:
        """The same, so many in flight."""
        asks, gate = self.asks(), asyncio.Semaphore(IN_FLIGHT)

        async def place(ask: Place) -> None:
            async with gate:
                assert (await self.bus.ask(PLACE, ask, _caller())).claimed

        began = time.perf_counter()
        await asyncio.gather(*map(place, asks))
        return len(asks) / (time.perf_counter() - began)


def _caller() -> Caller:
    return Caller("service:inventory", new_id(), "bench")


async def many(world: World) -> list[Line]:
    grouped = [new_id() for _ in range(CALL * CALLS * HARD)]
    groups = [grouped[at : at + GROUP_SIZE] for at in range(0, len(grouped), GROUP_SIZE)]
    kept = [vm_id for group in groups[::HARD] for vm_id in group]
    lines = []
    async with scheduler_alone(Size(HOSTS, VMS, grouped)) as alone, open_bus(alone.bus, "inventory") as bus:
        for what, vm_ids in (
            ("VMs of no group", [new_id() for _ in range(CALL * CALLS)]),
            (f"hard groups of {GROUP_SIZE} VMs, each on one host", kept),
        ):
            load = Load(bus, vm_ids, count(1))
            pairs = await in_turn(load.in_calls, load.one_by_one)
            print(f"  {what}: {pairs.medians[0]:,.0f} against {pairs.medians[1]:,.0f}/s", file=sys.stderr)
            name = f"placements in calls of {CALL} beside one by one: {what}"
            note = f"theirs: one by one, {IN_FLIGHT} in flight; ours: one call at a time. {HOSTS:,} hosts, {VMS:,} VMs, one scheduler"
            lines.append(at_least(name, pairs, 1.0, "placements/s", note))
        over = await overcommitted(alone)
    return [*lines, below("hosts promised more than they have, after calls of many", len(over), 0, "hosts")]
