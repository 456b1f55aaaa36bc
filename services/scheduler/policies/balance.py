"""Balances: which hosts of a cluster have too much, which do so little that they could be emptied, and which have room.

A balance is one row of BALANCES, named as the unit of the scheduling policy. It moves nothing: it says what would be moved
from where to where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import IDLE, UP, Bools, Fleet, Ints
from services.scheduler.model import MIB
from services.scheduler.policies import units
from services.scheduler.policies.recipe import Recipe
from services.scheduler.policies.request import size
from volery.contracts.scheduling_policy import HostLoad, Load


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The figures of a policy, or what the settings and oVirt's defaults say. Loads in %, memory in bytes."""

    high: float
    low: float
    seconds: float
    most_free: int
    least_free: int
    high_count: int
    threshold: int

    @staticmethod
    def of(recipe: Recipe, config: SchedulerConfig) -> Thresholds:
        def figure(name: str) -> float:
            return recipe.parameters.get(name, units.PARAMETERS[name].default)

        return Thresholds(
            high=recipe.parameters.get(units.HIGH_UTILIZATION, config.high_utilization_percent),
            low=figure(units.LOW_UTILIZATION),
            seconds=recipe.parameters.get(units.OVERLOAD_MINUTES, config.overload_seconds / 60) * 60,
            most_free=int(figure(units.MOST_FREE)) * MIB,
            least_free=int(figure(units.LEAST_FREE)) * MIB,
            high_count=int(figure(units.HIGH_VM_COUNT)),
            threshold=int(figure(units.MIGRATION_THRESHOLD)),
        )

    @property
    def roomy(self) -> float:
        """CPU load below which a host has room for others' VMs, so that it isn't busy at once (oVirt's)."""
        return min(0.8 * self.high, self.high - 10)


@dataclass(frozen=True, slots=True)
class Cut:
    """Of the hosts in question (`among`): those with too much, those to be emptied, those with room."""

    over: Bools
    idle: Bools
    room: Bools


Balance = Callable[[Fleet, Bools, Thresholds, float], Cut]
"""(fleet, among, thresholds, now)"""


def memory_left(fleet: Fleet) -> Ints:
    left: Ints = np.maximum(fleet.ints("memory_limit") - fleet.ints("memory_used"), 0)
    return left


def nothing(fleet: Fleet, among: Bools, figures: Thresholds, now: float) -> Cut:
    none = np.zeros(len(fleet), np.bool_)
    return Cut(none, none, none)


def even(fleet: Fleet, among: Bools, figures: Thresholds, now: float) -> Cut:
    since, left = fleet.floats("busy_since"), memory_left(fleet)
    busy = (since != IDLE) & (now - since >= figures.seconds)
    short = (left < figures.most_free) & (fleet.ints("guests") > 1)
    over = among & (busy | short)
    room = among & ~over & (fleet.floats("cpu_percent") < figures.roomy) & (since == IDLE)
    if figures.least_free:
        room &= left > figures.least_free
    return Cut(over, np.zeros(len(fleet), np.bool_), room)


def saving(fleet: Fleet, among: Bools, figures: Thresholds, now: float) -> Cut:
    """A host that does little is emptied into others, so it isn't one with room."""
    cut = even(fleet, among, figures, now)
    little = fleet.floats("cpu_percent") < figures.low
    idle = among & ~cut.over & little & (fleet.ints("guests") > 0)
    return Cut(cut.over, idle, cut.room & ~little)


def even_guests(fleet: Fleet, among: Bools, figures: Thresholds, now: float) -> Cut:
    guests = fleet.ints("guests")
    most, least = guests[among].max(initial=0), guests[among].min(initial=np.iinfo(np.int64).max)
    far = most >= figures.high_count
    over = among & far & (guests >= figures.high_count) & (guests - least >= figures.threshold)
    room = among & far & (most - guests >= figures.threshold)
    return Cut(over, np.zeros(len(fleet), np.bool_), room & ~over)


def even_overall(fleet: Fleet, among: Bools, figures: Thresholds, now: float) -> Cut:
    """Too much of anything is too much; room is what the CPUs and the memory have."""
    use, guests = even(fleet, among, figures, now), even_guests(fleet, among, figures, now)
    over = use.over | guests.over
    return Cut(over, use.idle, use.room & ~over)


BALANCES: Mapping[str, Balance] = {
    "none": nothing,
    "even_distribution": even,
    "power_saving": saving,
    "even_guest_distribution": even_guests,
    "even_overall_distribution": even_overall,
}


def loads(
    fleet: Fleet, cluster_id: str, recipe: Recipe, config: SchedulerConfig, now: float
) -> list[HostLoad]:
    """Of every host of the cluster that is up, in the order of their names."""
    figures = Thresholds.of(recipe, config)
    among = fleet.in_cluster(cluster_id) & (fleet.ints("status") == UP)
    cut = BALANCES.get(recipe.balance, nothing)(fleet, among, figures, now)
    rows = sorted(np.flatnonzero(among).tolist(), key=lambda row: (fleet.names[row], fleet.ids[row]))
    return [_told(fleet, cut, row) for row in rows]


def _told(fleet: Fleet, cut: Cut, row: int) -> HostLoad:
    cases = ((cut.over, Load.TOO_MUCH), (cut.idle, Load.LITTLE), (cut.room, Load.HAS_ROOM))
    load, guests = float(fleet.floats("cpu_percent")[row]), int(fleet.ints("guests")[row])
    left, name = int(memory_left(fleet)[row]), fleet.names[row]
    return HostLoad(
        host_id=fleet.ids[row],
        name=name,
        load=next((load for mask, load in cases if mask[row]), Load.EVEN),
        cpu_percent=round(load, 1),
        memory_left_bytes=left,
        vms=guests,
        message=f"the CPUs of {name} are {load:.0f} % busy, it has {size(left)} of memory left and {guests} VMs",
    )
