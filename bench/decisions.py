"""Deciding among ten thousand hosts: one cold decision, and a refusal explained with the smallest changes. In process,
without bus and database: what is measured is the scheduler's own part of a placement."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace as with_

from msgspec.structs import replace

from bench.rows import Line, below, percentile
from bench.world import World
from services.scheduler.choice import Look
from services.scheduler.config import SchedulerConfig
from services.scheduler.figures import HostFigures, Measured, NetworkReach
from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy, limits
from services.scheduler.policies.decision import decide
from services.scheduler.policies.request import request
from volery.contracts.base import encode
from volery.contracts.scheduling import Need, Place

HOSTS, ROUNDS, SEED = 10_000, 300, 4
GIB = 1024**3
MODELS = (frozenset({"Nehalem", "Westmere"}), frozenset({"Nehalem", "Westmere", "Skylake-Server"}))
MACHINES = (frozenset({"q35", "pc"}), frozenset({"q35", "pc", "pc-q35-9.2"}))
CONFIG = SchedulerConfig()
POLICY = ClusterPolicy("c", "Default", cpu_model="Westmere", machine="q35")


def hosts(dice: random.Random) -> Iterator[HostFigures]:
    """One cluster: two generations of hosts, most of them half full, one in fifty not up."""
    for number in range(HOSTS):
        memory, cpus = dice.choice((256, 512, 1024)) * GIB, dice.choice((32, 64, 128))
        limit = limits(memory, cpus, POLICY, CONFIG)
        yield HostFigures(
            id=f"{number:06}",
            name=f"host{number}",
            cluster_id="c",
            status="maintenance" if number % 50 == 0 else "up",
            cpus=cpus,
            memory_bytes=memory,
            memory_limit_bytes=limit.memory_bytes,
            memory_used_bytes=int(limit.memory_bytes * dice.uniform(0.2, 0.95)),
            vcpus_limit=limit.vcpus,
            vcpus_used=int(limit.vcpus * dice.uniform(0.1, 0.7)),
            cpu_models=dice.choice(MODELS),
            machines=dice.choice(MACHINES),
        )


def fleet_of(figures: list[HostFigures], dice: random.Random) -> Fleet:
    fleet = Fleet()
    fleet.clusters[POLICY.id] = POLICY
    for host in figures:
        fleet.put(host)
        fleet.sample(host.id, Measured(dice.uniform(0, 90)))
    for name in ("lan", "backup"):
        reach = frozenset(h.id for h in figures if dice.random() < 0.9)
        fleet.set_network(NetworkReach(name, name, reach))
    return fleet


def need(dice: random.Random, figures: list[HostFigures]) -> Need:
    """A flavour; a third of them with networks and disks that not every host reaches."""
    limited = dice.random() < 0.3
    return Need(
        vm_id="vm",
        cluster_id="c",
        name="web",
        memory_bytes=dice.choice((1, 2, 4, 8, 16, 32)) * GIB,
        vcpus=dice.choice((1, 2, 4, 8, 16)),
        network_ids=("lan", "backup") if limited else (),
        storage_host_ids=tuple(h.id for h in figures[::2]) if limited else None,
    )


async def decisions(world: World) -> list[Line]:
    dice = random.Random(SEED)
    figures = list(hosts(dice))
    fleet = fleet_of(figures, dice)
    cold: list[float] = []
    warm: list[float] = []
    refused: list[float] = []
    sizes: list[int] = []
    for number in range(ROUNDS):
        # A host whose abilities changed, and networks heard of anew: no mask is kept from the decision before.
        fleet.put(with_(figures[0], machines=MACHINES[number % 2]))
        for network in tuple(fleet.networks.values()):
            fleet.set_network(network)
        ask = Place(need=need(dice, figures), epoch=1)
        for times in (cold, warm):
            began = time.perf_counter()
            decide(fleet, request(ask, POLICY, CONFIG)).first(CONFIG.explained_hosts)
            times.append((time.perf_counter() - began) * 1000)
        large = replace(ask, need=replace(ask.need, memory_bytes=2048 * GIB))
        began = time.perf_counter()
        asked = request(large, POLICY, CONFIG)
        told = Look(fleet, asked, decide(fleet, asked)).told(CONFIG.explained_hosts)
        kept = zlib.compress(encode(told), level=1)
        refused.append((time.perf_counter() - began) * 1000)
        sizes.append(len(kept))
    return [
        below(
            "one cold decision among 10,000 hosts, p99", percentile(cold, 99), 5.0, "ms",
            f"median {percentile(cold, 50):.2f} ms; with its masks kept {percentile(warm, 50):.2f} ms",
        ),
        below(
            "a refusal by 10,000 hosts explained, p99", percentile(refused, 99), 100.0, "ms",
            f"median {percentile(refused, 50):.1f} ms, with the smallest changes, encoded and packed into at most "
            f"{max(sizes):,} bytes",
        ),
    ]  # fmt: skip
