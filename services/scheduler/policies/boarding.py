"""From the fleet and its VMs to the board that plans are made on. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from services.scheduler.cells import needs_of
from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import UP, Bools, Fleet
from services.scheduler.model import ClusterPolicy, memory_taken
from services.scheduler.pages import pages_taken
from services.scheduler.policies.affinity import ClusterRules
from services.scheduler.policies.board import Board, Guest, Place
from services.scheduler.policies.bound import FREE, Bound, resolve
from services.scheduler.policies.filters import FILTERS
from services.scheduler.policies.outline import outline
from services.scheduler.policies.request import request
from volery.contracts import scheduling
from volery.contracts.cpus import PinningPolicy
from volery.contracts.scheduling import Need, Purpose

MOVED_ON = frozenset({"target", "excluded", "cpu_overcommit", "memory", "huge_pages", "affinity_vms"})
"""Filters that the board applies itself, since they change with each move."""


PINNED_NODES = (
    "its NUMA nodes are pinned to cells of its host: move it by itself, which looks at the cells of the other"
)


RESIZED = "it is resized to its host: move it by itself, to one that is built the same, or stop it and start it elsewhere"


@dataclass(frozen=True, slots=True)
class Standing:
    """A VM that holds capacity on one host, and what it asks of a host."""

    need: Need
    host_id: str
    load: float | None = None
    """CPUs' worth of work; None: nobody has measured it yet."""
    priority: int = 0
    kept: str = ""


def board_of(
    fleet: Fleet,
    policy: ClusterPolicy,
    standing: Sequence[Standing],
    rules: ClusterRules,
    config: SchedulerConfig,
    *,
    now: float = 0.0,
    closed: Collection[str] = (),
) -> Board:
    """`closed`: hosts that get no VM, though they are up."""
    rows = sorted(np.flatnonzero(fleet.in_cluster(policy.id)).tolist(), key=lambda row: fleet.ids[row])
    here = {fleet.ids[row] for row in rows}
    ours = [each for each in standing if each.host_id in here]
    places = [_place(fleet, row, closed) for row in rows]
    guests = [_guest(each, _vcpus(fleet, each), config) for each in ours]
    allowed = np.zeros((len(guests), len(places)), np.bool_)
    known: dict[object, Bools] = {}
    for number, each in enumerate(ours):
        around = rules.around(each.need.vm_id)
        bound = FREE if around is None else Bound(hosts=resolve(around, rules, {}).hosts)
        # VMs that ask the same of a host, whatever they are called and however much memory they have, share an answer.
        key = (
            replace(each.need, vm_id="", name="", memory_bytes=1, hugepage_kib=0, preferred_host_ids=()),
            bound.hosts,
        )
        if key not in known:
            known[key] = _suits(fleet, policy, each.need, config, bound, now)[rows]
        allowed[number] = known[key]
    return Board(places, guests, allowed, rules)


def _suits(
    fleet: Fleet, policy: ClusterPolicy, need: Need, config: SchedulerConfig, bound: Bound, now: float
) -> Bools:
    asked = request(
        scheduling.Place(need=need, epoch=0, purpose=Purpose.MIGRATE),
        policy,
        config,
        bound,
        recipe=fleet.recipe(policy),
        now=now,
    )
    masks = [f.mask(fleet, asked) for f in FILTERS if f.name not in MOVED_ON and asked.follows(f.name)]
    mask: Bools = np.logical_and.reduce(masks)
    return mask


def _place(fleet: Fleet, row: int, closed: Collection[str]) -> Place:
    cpus = int(fleet.ints("cpus")[row])
    return Place(
        id=fleet.ids[row],
        name=fleet.names[row],
        memory_limit=int(fleet.ints("memory_limit")[row]),
        memory_used=int(fleet.ints("memory_used")[row]),
        vcpus_limit=int(fleet.ints("vcpus_limit")[row]),
        vcpus_used=int(fleet.ints("vcpus_used")[row]),
        cpus=cpus,
        load=float(fleet.floats("cpu_percent")[row]) / 100 * cpus,
        open=int(fleet.ints("status")[row]) == UP and fleet.ids[row] not in closed,
        pages_left=fleet.pages_left(row),
    )


def _vcpus(fleet: Fleet, each: Standing) -> int:
    """What it has where it is."""
    if each.need.cpu_pinning.policy is not PinningPolicy.RESIZE_AND_PIN:
        return each.need.vcpus
    return (
        each.need.shape.vcpus
        if each.need.shape is not None
        else outline(fleet.cpus_of(fleet.rows[each.host_id]).cores).vcpus
    )


def _stays(need: Need) -> str:
    """Why plans leave it where it is."""
    if need.cpu_pinning.policy is PinningPolicy.RESIZE_AND_PIN:
        return RESIZED
    return PINNED_NODES if needs_of(need.numa_nodes, need.hugepage_kib) else ""


def _guest(each: Standing, vcpus: int, config: SchedulerConfig) -> Guest:
    need, assumed = each.need, config.vcpu_load_percent / 100 * vcpus
    return Guest(
        id=need.vm_id,
        name=need.name or need.vm_id,
        host_id=each.host_id,
        memory=memory_taken(need.memory_bytes, config, need.hugepage_kib),
        vcpus=vcpus,
        load=assumed if each.load is None else each.load,
        high_availability=need.high_availability,
        priority=each.priority,
        kept=each.kept or _stays(need),
        pages=pages_taken(need.memory_bytes, need.hugepage_kib),
    )
