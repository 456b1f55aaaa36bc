"""Packing: how full a cluster is when the largest flavour is refused for the first time, after VMs have come and gone.

Ours go through the service: a placement and a release on the bus for each VM that comes or goes, under the built-in policy
`packing`. The heuristics beside it decide in process, over the same hosts, the same VMs in the same order, with the same
room: what a VM takes and what a host may promise say the product's own formulas.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bench.claims_world import GIB, HOST_COLUMNS, Size, overcommitted, scheduler_alone
from bench.rows import Line
from bench.world import World
from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import Bools, Floats, Ints
from services.scheduler.model import ClusterPolicy, limits, memory_taken
from services.scheduler.policies.recipe import PACKING
from volery.contracts.cluster import GetById
from volery.contracts.errors import Refused
from volery.contracts.ids import new_id
from volery.contracts.scheduling import PLACE, RELEASE_CLAIM, ClaimKey, Need, Place
from volery.contracts.scheduling_policy import (
    GET_SCHEDULING_POLICY,
    GIVE_SCHEDULING_POLICY,
    GiveSchedulingPolicy,
)
from volery.runtime.bus import Bus, Caller, open_bus

if TYPE_CHECKING:
    from bench.claims_world import Connection

SEEDS, HOSTS = 20, 24
LEVEL, TURNOVER = 0.7, 5
"""VMs come and go at this share of the capacity until so many times as many have gone as there are."""
SHAPES = ((256, 32), (256, 64), (512, 64), (512, 96), (384, 32), (1024, 128))
"""Hosts: GiB and threads."""
VCPUS_PER_THREAD = 2.0
FLAVOURS = (
    (4, 2, 0.2), (8, 4, 0.2), (16, 4, 0.15), (16, 8, 0.15), (32, 8, 0.1), (32, 16, 0.1), (48, 12, 0.06), (64, 16, 0.04),
)  # fmt: skip
"""GiB, vCPUs, share of the VMs that come; the last one is the largest."""
WEIGHTS = [share for *_, share in FLAVOURS]
LARGEST = len(FLAVOURS) - 1
AT_ONCE = 8
"""Seeds that go through the service at the same time, each in a cluster of its own."""
GOAL_MOST_FREE, GOAL_BEST = 1.07, 1.0
CONFIG = SchedulerConfig()
SETTINGS = {"VOLERY_SCHEDULER_CLAIM_SECONDS": "86400"}
"""Nobody confirms what the load claims."""


CLUSTER_IDS = [new_id() for _ in range(SEEDS)]


def policy(seed: int) -> ClusterPolicy:
    return ClusterPolicy(CLUSTER_IDS[seed], f"seed{seed}", cpu_overcommit_ratio=VCPUS_PER_THREAD)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The hosts of one seed in the order of their ids, and what is taken of them. Bytes and vCPUs."""

    ids: list[str]
    shapes: list[tuple[int, int]]
    memory: Ints
    vcpus: Ints
    memory_used: Ints
    vcpus_used: Ints

    @staticmethod
    def of(seed: int) -> Cluster:
        dice = random.Random(seed)
        shapes = [dice.choice(SHAPES) for _ in range(HOSTS)]
        allowed = [limits(gib * GIB, threads, policy(seed), CONFIG) for gib, threads in shapes]
        memory = np.array([each.memory_bytes for each in allowed])
        vcpus = np.array([each.vcpus for each in allowed])
        ids = sorted(new_id() for _ in shapes)
        return Cluster(ids, shapes, memory, vcpus, np.zeros_like(memory), np.zeros_like(vcpus))

    @property
    def used(self) -> float:
        """Mean of the shares of memory and of vCPUs."""
        return (
            float(self.memory_used.sum() / self.memory.sum() + self.vcpus_used.sum() / self.vcpus.sum()) / 2
        )

    def take(self, host: int, flavour: int, times: int = 1) -> None:
        memory, vcpus = taken(flavour)
        self.memory_used[host] += times * memory
        self.vcpus_used[host] += times * vcpus


def taken(flavour: int) -> tuple[int, int]:
    gib, vcpus, _ = FLAVOURS[flavour]
    return memory_taken(gib * GIB, CONFIG), vcpus


@dataclass(frozen=True, slots=True)
class Vm:
    id: str
    flavour: int
    host: int


class Placer(Protocol):
    async def place(self, cluster: Cluster, vm_id: str, flavour: int) -> int | None:
        """The row of a host, or None when no host can take it."""

    async def release(self, vm: Vm) -> None: ...


# The heuristics

Score = Callable[[Floats, Floats, float, float, random.Random], Floats]
"""(memory left, vCPUs left, memory wanted, vCPUs wanted) as shares of the cluster's largest host; the highest is taken."""

HEURISTICS: Mapping[str, Score] = {
    "most free memory": lambda memory, vcpus, m, v, dice: memory,
    "first fit": lambda memory, vcpus, m, v, dice: -np.arange(len(memory), dtype=np.float64),
    "best fit": lambda memory, vcpus, m, v, dice: -(memory - m) - (vcpus - v),
    "dot product": lambda memory, vcpus, m, v, dice: memory * m + vcpus * v,
    "dot product of directions": lambda memory, vcpus, m, v, dice: (
        (memory * m + vcpus * v) / np.maximum(np.hypot(memory, vcpus), 1e-9)
    ),
    "random": lambda memory, vcpus, m, v, dice: np.array([dice.random() for _ in memory]),
}
"""Most free memory is what Nova's RAM weigher does; the dot product is Tetris's, beside it as a cosine."""
MOST_FREE = "most free memory"


@dataclass(frozen=True, slots=True)
class Heuristic:
    score: Score
    dice: random.Random

    async def place(self, cluster: Cluster, vm_id: str, flavour: int) -> int | None:
        wanted, vcpus_wanted = taken(flavour)
        memory, vcpus = cluster.memory - cluster.memory_used, cluster.vcpus - cluster.vcpus_used
        fits: Bools = (memory >= wanted) & (vcpus >= vcpus_wanted)
        if not fits.any():
            return None
        most, most_vcpus = float(cluster.memory.max()), float(cluster.vcpus.max())
        score = self.score(
            memory / most, vcpus / most_vcpus, wanted / most, vcpus_wanted / most_vcpus, self.dice
        )
        return int(np.where(fits, score, -np.inf).argmax())

    async def release(self, vm: Vm) -> None:
        """The cluster counts."""


# Ours


@dataclass(frozen=True, slots=True)
class Service:
    """The scheduler, asked on the bus."""

    bus: Bus
    cluster_id: str

    async def place(self, cluster: Cluster, vm_id: str, flavour: int) -> int | None:
        gib, vcpus, _ = FLAVOURS[flavour]
        need = Need(vm_id=vm_id, cluster_id=self.cluster_id, memory_bytes=gib * GIB, vcpus=vcpus)
        answer = await self.bus.ask(PLACE, Place(need=need, epoch=1, operation_id=new_id()), _caller())
        return cluster.ids.index(answer.host_id) if answer.claimed else None

    async def release(self, vm: Vm) -> None:
        await self.bus.ask(RELEASE_CLAIM, ClaimKey(vm_id=vm.id, epoch=1), _caller())


def _caller() -> Caller:
    return Caller("service:inventory", new_id(), "bench")


async def filled(connection: Connection) -> list[str]:
    """Each seed's hosts in a cluster of its own."""
    for seed in range(SEEDS):
        await connection.execute(
            """insert into cluster (id, revision, name, cpu_model, machine, memory_overcommit_percent, cpu_overcommit_ratio,
                   balance) values ($1, 1, $2, '', '', 100, $3, 'none')""",
            policy(seed).id, policy(seed).name, VCPUS_PER_THREAD,
        )  # fmt: skip
        await connection.copy_records_to_table(
            "host_capacity", records=list(_rows(seed)), columns=HOST_COLUMNS
        )
    return []


CLUSTERS = {seed: Cluster.of(seed) for seed in range(SEEDS)}
"""As they are in the beginning, with the ids of their hosts."""


def _rows(seed: int) -> list[tuple[object, ...]]:
    cluster = CLUSTERS[seed]
    return [
        (
            cluster.ids[n], 1, f"seed{seed}host{n}", policy(seed).id, "up", threads, gib * GIB, [], [],
            int(cluster.memory[n]), int(cluster.vcpus[n]),
        )
        for n, (gib, threads) in enumerate(cluster.shapes)
    ]  # fmt: skip


# One seed


@dataclass(frozen=True, slots=True)
class Packed:
    used: float
    early: int
    """VMs refused while others came and went."""


async def packed(seed: int, placer: Placer, *, level: float = LEVEL, turnover: float = TURNOVER) -> Packed:
    """VMs come to the level, then go and come by chance until enough have gone, then come until the largest is refused."""
    dice, at = random.Random(1000 + seed), CLUSTERS[seed]
    cluster = Cluster(
        at.ids, at.shapes, at.memory, at.vcpus, np.zeros_like(at.memory), np.zeros_like(at.vcpus)
    )
    vms: list[Vm] = []
    gone = early = 0

    async def comes() -> int | None:
        """The flavour that was refused."""
        [flavour] = dice.choices(range(len(FLAVOURS)), WEIGHTS)
        vm_id = new_id()
        host = await placer.place(cluster, vm_id, flavour)
        if host is None:
            return flavour
        cluster.take(host, flavour)
        vms.append(Vm(vm_id, flavour, host))
        return None

    while cluster.used < level or gone < turnover * len(vms):
        if cluster.used < level:
            early += await comes() is not None
            continue
        vm = vms.pop(dice.randrange(len(vms)))
        await placer.release(vm)
        cluster.take(vm.host, vm.flavour, -1)
        gone += 1
    while await comes() != LARGEST:
        continue
    assert (cluster.memory_used <= cluster.memory).all()
    assert (cluster.vcpus_used <= cluster.vcpus).all()
    return Packed(cluster.used, early)


async def by_heuristics(seeds: int) -> dict[str, list[Packed]]:
    return {
        name: [await packed(seed, Heuristic(score, random.Random(seed))) for seed in range(seeds)]
        for name, score in HEURISTICS.items()
    }


async def _is_there(bus: Bus) -> None:
    """The scheduler writes its built-in policies down once it has begun."""
    async with asyncio.timeout(60):
        while True:
            try:
                await bus.ask(
                    GET_SCHEDULING_POLICY, GetById(id=PACKING.id), Caller("admin", new_id(), "bench")
                )
                return
            except Refused:
                await asyncio.sleep(0.2)


async def through_the_service(
    seeds: int, *, level: float = LEVEL, turnover: float = TURNOVER
) -> tuple[list[Packed], int]:
    """And how many hosts are promised more than they have."""
    turn = asyncio.Semaphore(AT_ONCE)
    async with (
        scheduler_alone(Size(0, 0, []), filled=filled, settings=SETTINGS) as alone,
        open_bus(alone.bus, "gateway") as asking,
        open_bus(alone.bus, "inventory") as bus,
    ):
        await _is_there(asking)

        async def one(seed: int) -> Packed:
            async with turn:
                given = GiveSchedulingPolicy(cluster_id=policy(seed).id, policy_id=PACKING.id)
                await asking.ask(GIVE_SCHEDULING_POLICY, given, Caller("admin", new_id(), "bench"))
                found = await packed(seed, Service(bus, policy(seed).id), level=level, turnover=turnover)
                print(f"  seed {seed}: {found.used:.4f}", file=sys.stderr, flush=True)
                return found

        found = await asyncio.gather(*(one(seed) for seed in range(seeds)))
        return list(found), len(await overcommitted(alone))


def compared(ours: Sequence[Packed], theirs: Mapping[str, Sequence[Packed]], over: int) -> list[Line]:
    """By the means of all seeds; the best heuristic is the one with the highest mean."""
    means = {name: statistics.mean(each.used for each in found) for name, found in theirs.items()}
    mine = statistics.mean(each.used for each in ours)
    best = max((name for name in means if name != MOST_FREE), key=means.__getitem__)
    of_each = [o.used / max(theirs[n][k].used for n in means) for k, o in enumerate(ours)]
    note = (
        f"{len(ours)} seeds, {HOSTS} hosts of {len(SHAPES)} shapes and {len(FLAVOURS)} flavours each, {TURNOVER} x turnover at {LEVEL:.0%}; "
        f"through the service with the built-in policy {PACKING.name}; the others decide in process. Means: "
        + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        + f". Beside whichever is best for each seed: {statistics.mean(of_each):.3f}. VMs refused before the last filling: ours "
        f"{sum(each.early for each in ours)}. Hosts promised more than they have: {over}"
    )
    return [
        _line("most free memory", mine, means[MOST_FREE], GOAL_MOST_FREE, over, note),
        _line("the best of the other heuristics", mine, means[best], GOAL_BEST, over, f"theirs: {best}"),
    ]


def _line(name: str, ours: float, theirs: float, goal: float, over: int, note: str) -> Line:
    return Line(
        name=f"capacity used at the first refusal of the largest flavour, beside {name}", ours=ours, theirs=theirs,
        unit="of the capacity", ratio=ours / theirs, goal=f">= {goal:g} x", met=ours / theirs >= goal and not over, note=note,
    )  # fmt: skip


async def packing(world: World, seeds: int = SEEDS) -> list[Line]:
    ours, over = await through_the_service(seeds)
    return compared(ours, await by_heuristics(seeds), over)
