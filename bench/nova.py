"""Deciding beside Nova's own filters and weighers, both in process: the same hosts, the same requests, the choices compared.

Nova's weights are shares of the spread among the hosts that pass, ours are shares of what a host can take. On hosts of one
size both order them alike when Nova's multipliers carry the spread, which a few hosts at the ends of every scale pin. So
the host that we choose must be worth as much to Nova as its own choice.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from bench.peers.environments import environment, pinned
from bench.rows import Line, percentile
from bench.world import World
from services.scheduler.config import SchedulerConfig
from services.scheduler.figures import HostFigures, Measured
from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy, limits
from services.scheduler.policies.affinity import ClusterRules, Group
from services.scheduler.policies.bound import FREE, Bound, Seat, resolve
from services.scheduler.policies.decision import decide
from services.scheduler.policies.recipe import Recipe
from services.scheduler.policies.request import request
from volery.contracts.affinity_group import AffinityRule
from volery.contracts.scheduling import Need, Place
from volery.contracts.scheduling_policy import SchedulingPolicy

HOSTS, ROUNDS, SEED, GOAL = 5_000, 15, 4, 2_000.0
OURS_EACH = 20
"""A decision of ours is timed so many times; their median counts against one of Nova's."""
GIB = 1024**3
MEMORY, CPUS = 256 * GIB, 64
LEAST_USED, MOST_USED = 0.1, 0.6
MOST_LOAD, MOST_GUESTS = 0.8, 60
FACTORS = {
    "cpu_even": 2.0,
    "memory_even": 1.0,
    "guests_even": 1.0,
    "affinity_vms_wish": 1.0,
    "affinity_hosts_wish": 1.0,
}
CONFIG = SchedulerConfig()
POLICY = ClusterPolicy("c", "Default", cpu_model="Westmere", machine="x86_64")
LIMIT = limits(MEMORY, CPUS, POLICY, CONFIG)
MEMBERS = tuple(f"00000000-0000-0000-0001-{n:012}" for n in range(40))
"""VMs of the one affinity group, each on a host of its own."""
HOME = len(MEMBERS) - 1
"""The host of the last of them, where also VMs that must be with it may run."""
LOADS = 10_000
"""Nova's metrics are whole numbers."""
EQUAL = 1e-6
SCRIPT = Path(__file__).parent / "peers" / "nova_decides.py"


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    used: float
    load: float
    guests: int
    model: str = "Westmere"
    machine: str = "x86_64"
    up: bool = True
    members: tuple[str, ...] = ()

    @property
    def memory_used(self) -> int:
        return int(LIMIT.memory_bytes * self.used) >> 20 << 20


@dataclass(frozen=True, slots=True)
class Asked:
    memory: int
    vcpus: int
    rule: AffinityRule


def made(count: int, dice: random.Random) -> list[Host]:
    """The first three are at the ends of the scales, and no rule excludes them."""
    ends = [(LEAST_USED, MOST_LOAD, MOST_GUESTS), (MOST_USED, 0.0, MOST_GUESTS), (MOST_USED, MOST_LOAD, 0)]
    hosts = [Host(f"host{n:05}", *end) for n, end in enumerate(ends)]
    for number in range(len(hosts), count):
        hosts.append(
            Host(
                name=f"host{number:05}",
                used=dice.uniform(LEAST_USED, MOST_USED),
                load=round(dice.uniform(0, MOST_LOAD), 4),
                guests=dice.randint(0, MOST_GUESTS),
                model="Nehalem" if dice.random() < 0.1 and number != HOME else "Westmere",
                machine="aarch64" if dice.random() < 0.05 and number != HOME else "x86_64",
                up=dice.random() >= 0.02 or number == HOME,
                members=(MEMBERS[number],) if number < len(MEMBERS) else (),
            )
        )
    return hosts


def asks(count: int, dice: random.Random) -> list[Asked]:
    """Every third keeps apart from the group's VMs, every tenth goes to where one of them is."""
    rules = [AffinityRule.NEGATIVE if n % 3 == 1 else AffinityRule.POSITIVE if n % 10 == 5 else AffinityRule.DISABLED
             for n in range(count)]  # fmt: skip
    return [Asked(dice.choice((1, 2, 4, 8, 16)) * GIB, dice.choice((1, 2, 4, 8)), rule) for rule in rules]


# Ours


def fleet_of(hosts: list[Host]) -> Fleet:
    fleet = Fleet()
    fleet.clusters[POLICY.id] = POLICY
    for host in hosts:
        fleet.put(
            HostFigures(
                id=host.name, name=host.name, cluster_id=POLICY.id, status="up" if host.up else "maintenance", cpus=CPUS,
                memory_bytes=MEMORY, memory_limit_bytes=LIMIT.memory_bytes, memory_used_bytes=host.memory_used,
                vcpus_limit=LIMIT.vcpus, vcpus_used=0, guests=host.guests, cpu_models=frozenset({host.model}),
                machines=frozenset({host.machine}),
            )
        )  # fmt: skip
        fleet.sample(host.name, Measured(host.load * 100))
    return fleet


def recipe() -> Recipe:
    """Filters that no policy can leave out are many more than Nova's five; of weights the same five."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return Recipe.of(
        SchedulingPolicy(id="five", revision=1, created_at=now, updated_at=now, name="five", weights=FACTORS)
    )


def bound(asked: Asked, hosts: list[Host]) -> Bound:
    """Nova's affinity is to the hosts that the group has; ours is to one host, so that such a group is one VM here."""
    if asked.rule is AffinityRule.DISABLED:
        return FREE
    members = MEMBERS if asked.rule is AffinityRule.NEGATIVE else MEMBERS[-1:]
    group = Group(
        "g",
        "G",
        1.0,
        asked.rule,
        True,
        AffinityRule.DISABLED,
        False,
        frozenset({"vm", *members}),
        frozenset(),
    )
    rules = ClusterRules(1, (group,))
    around = rules.around("vm")
    assert around is not None
    seats = {vm: Seat(vm, frozenset({host.name})) for host in hosts for vm in host.members if vm in members}
    return resolve(around, rules, seats)


def ours(fleet: Fleet, asked: Asked, limits_: Bound, by: Recipe) -> tuple[float, str]:
    """(median ms, chosen host)."""
    need = Need(vm_id="vm", cluster_id=POLICY.id, name="vm", memory_bytes=asked.memory, vcpus=asked.vcpus)
    times, chosen = [], ""
    for _ in range(OURS_EACH):
        began = time.perf_counter()
        best = decide(fleet, request(Place(need=need, epoch=1), POLICY, CONFIG, limits_, recipe=by)).best
        times.append((time.perf_counter() - began) * 1000)
        chosen = fleet.ids[best] if best is not None else ""
    return statistics.median(times), chosen


# Theirs


@dataclass(frozen=True, slots=True)
class Nova:
    """Its process, which answers line by line."""

    asks: IO[str]
    answers: IO[str]

    def ask(self, document: Any) -> Any:
        self.asks.write(json.dumps(document) + "\n")
        self.asks.flush()
        return json.loads(self.answers.readline())


@contextmanager
def nova(hosts: list[Host]) -> Iterator[Nova]:
    place = environment("nova")
    process = subprocess.Popen(
        [place / "bin" / "python", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={"PATH": os.environ["PATH"]}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        peer = Nova(process.stdin, process.stdout)
        assert peer.ask(world_of(hosts))["ready"] == len(hosts)
        yield peer
    finally:
        process.stdin.close()
        process.wait(30)


def world_of(hosts: list[Host]) -> dict[str, Any]:
    return {
        "ram": FACTORS["memory_even"] * (1 - LEAST_USED), "cpu": FACTORS["cpu_even"] * MOST_LOAD,
        "instances": -FACTORS["guests_even"],
        "hosts": [
            {
                "name": host.name, "mib": LIMIT.memory_bytes >> 20, "free_mib": (LIMIT.memory_bytes - host.memory_used) >> 20,
                "cpus": CPUS, "vcpus_used": 0, "instances": host.guests, "members": host.members, "model": host.model,
                "arch": host.machine, "disabled": not host.up, "load": round(host.load * LOADS),
            }
            for host in hosts
        ],
    }  # fmt: skip


def question(asked: Asked, hosts: list[Host], chosen: str) -> dict[str, Any]:
    policy = {AffinityRule.NEGATIVE: "anti-affinity", AffinityRule.POSITIVE: "affinity"}.get(asked.rule, "")
    members = {"anti-affinity": MEMBERS, "affinity": MEMBERS[-1:]}.get(policy, ())
    return {
        "mib": asked.memory >> 20, "vcpus": asked.vcpus, "model": "Westmere", "arch": "x86_64", "policy": policy,
        "members": members, "hosts": [h.name for h in hosts if set(h.members) & set(members)], "chosen": chosen,
        "default": True,
    }  # fmt: skip


def beside_nova(count: int = HOSTS, rounds: int = ROUNDS) -> list[Line]:
    dice = random.Random(SEED)
    hosts, by = made(count, dice), recipe()
    fleet = fleet_of(hosts)
    mine, others, default, ratios, wrong = [], [], [], [], 0
    with nova(hosts) as peer:
        for number, asked in enumerate(asks(rounds + 1, dice)):
            ms, chosen = ours(fleet, asked, bound(asked, hosts), by)
            told = peer.ask(question(asked, hosts, chosen))
            wrong += not (chosen == told["best"] or _equal(told))
            if number:  # the first one warms both sides
                mine.append(ms)
                others.append(told["ms"])
                default.append(told["default_ms"])
                ratios.append(told["ms"] / ms)
    ratio = statistics.median(ratios)
    note = (
        f"theirs: nova {pinned('nova', 'nova')}, {rounds} requests in turn; filters ComputeFilter, ComputeCapabilities, "
        f"ImageProperties and both ServerGroup ones against the {len(by.filters)} that our policies can't leave out; weighers RAM, "
        f"Metrics (cpu.percent), NumInstances and both soft ServerGroup ones against {', '.join(FACTORS)}. Of {rounds + 1} choices {wrong} "
        f"were worth less to Nova than its own. With all 13 weighers, Nova's default, it takes {statistics.median(default):.0f} ms. Ours "
        f"p99 {percentile(mine, 99):.3f} ms, each the median of {OURS_EACH}; one core each"
    )
    return [
        Line(
            name=f"a decision beside Nova's filters and weighers, {count:,} hosts", ours=statistics.median(mine),
            theirs=statistics.median(others), unit="ms", ratio=ratio, goal=f">= {GOAL:,.0f} x as fast, the same choice",
            met=ratio >= GOAL and not wrong, note=note,
        )
    ]  # fmt: skip


def _equal(told: dict[str, Any]) -> bool:
    mine, best = told["chosen_weight"], told["weight"]
    return mine is not None and best is not None and abs(mine - best) <= EQUAL


async def decided(world: World) -> list[Line]:
    lines = await asyncio.to_thread(beside_nova)
    print(f"  {lines[0].note}", file=sys.stderr)
    return lines
