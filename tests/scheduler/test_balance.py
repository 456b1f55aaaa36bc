"""Balances in columns, held against the same formulas host by host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.figures import HostFigures
from services.scheduler.model import ClusterPolicy
from services.scheduler.policies.balance import BALANCES, loads
from services.scheduler.policies.recipe import BY_BALANCE, Recipe
from services.scheduler.policies.units import BY_KIND
from tests.scheduler.oracle import World
from tests.scheduler.test_policies import figures
from tests.scheduler.worlds import CONFIG, GIB, MIB, fleet_of, subsets, worlds
from volery.contracts.cluster import Balance
from volery.contracts.scheduling_policy import UnitKind

VALUES: dict[str, list[float]] = {
    "HighUtilization": [50, 80, 99],
    "LowUtilization": [0, 20, 49],
    "CpuOverCommitDurationMinutes": [0, 1, 2],
    "MaxFreeMemoryForOverUtilized": [0, 512, 4096],
    "MinFreeMemoryForUnderUtilized": [0, 512, 4096],
    "HighVmCount": [1, 3, 10],
    "MigrationThreshold": [2, 3, 5],
}


@st.composite
def balances(draw: st.DrawFn) -> Recipe:
    chosen = draw(subsets(list(VALUES)))
    return Recipe.of(
        msgspec.structs.replace(
            BY_BALANCE[Balance.NONE],
            id="own",
            balance=draw(st.sampled_from(list(BALANCES))),
            parameters={name: draw(st.sampled_from(VALUES[name])) for name in chosen},
        )
    )


def load(world: World, host: HostFigures, ups: list[HostFigures], recipe: Recipe) -> str:
    """As one would say it."""
    high = recipe.parameters.get("HighUtilization", 80)
    minutes = recipe.parameters.get("CpuOverCommitDurationMinutes", CONFIG.overload_seconds / 60)
    since, cpu = world.busy_since.get(host.id), world.cpu_percent.get(host.id, 0.0)
    left = max(host.memory_limit_bytes - host.memory_used_bytes, 0)
    if recipe.balance == "even_guest_distribution":
        threshold = recipe.parameters.get("MigrationThreshold", 5)
        count = recipe.parameters.get("HighVmCount", 10)
        most, least = max(h.guests for h in ups), min(h.guests for h in ups)
        if host.guests >= count and host.guests - least >= threshold:
            return "too_much"
        return "has_room" if most >= count and most - host.guests >= threshold else "even"
    if recipe.balance == "none":
        return "even"
    if recipe.balance == "even_overall_distribution":
        by_use, by_guests = (
            load(world, host, ups, replace(recipe, balance=balance))
            for balance in ("even_distribution", "even_guest_distribution")
        )
        return "too_much" if by_guests == "too_much" else by_use
    busy = since is not None and world.now - since >= 60 * minutes
    if busy or (left < MIB * recipe.parameters.get("MaxFreeMemoryForOverUtilized", 0) and host.guests > 1):
        return "too_much"
    little = recipe.balance == "power_saving" and cpu < recipe.parameters.get("LowUtilization", 20)
    if little:
        return "little" if host.guests else "even"
    wanted = recipe.parameters.get("MinFreeMemoryForUnderUtilized", 0)
    enough = not wanted or left > MIB * wanted
    return "has_room" if since is None and cpu < min(0.8 * high, high - 10) and enough else "even"


@settings(max_examples=200, deadline=None)
@given(worlds(), balances())
def test_the_columns_say_of_each_host_what_one_would_say(world: World, recipe: Recipe) -> None:
    ups = [h for h in world.hosts if h.cluster_id == "a" and h.status == "up"]
    found = {each.host_id: str(each.load) for each in loads(fleet_of(world), "a", recipe, CONFIG, world.now)}
    assert found == {h.id: load(world, h, ups, recipe) for h in ups}


def test_every_balance_is_a_unit() -> None:
    assert list(BALANCES) == list(BY_KIND[UnitKind.BALANCE])


@pytest.mark.parametrize(
    ("balance", "hosts", "cpu", "expected"),
    [
        (Balance.EVENLY_DISTRIBUTED, {"a1": {}, "a2": {"guests": 3}}, {"a2": 81.0}, ["has_room", "too_much"]),
        (Balance.POWER_SAVING, {"a1": {"guests": 1}, "a2": {}}, {"a1": 5.0, "a2": 40.0}, ["little", "has_room"]),
        (Balance.VM_EVENLY_DISTRIBUTED, {"a1": {"guests": 12}, "a2": {"guests": 7}}, {}, ["too_much", "has_room"]),
        (Balance.VM_EVENLY_DISTRIBUTED, {"a1": {"guests": 12}, "a2": {"guests": 8}}, {}, ["even", "even"]),
        (Balance.NONE, {"a1": {"guests": 90}, "a2": {}}, {"a1": 99.0}, ["even", "even"]),
    ],
)  # fmt: skip
def test_what_built_in_balances_say(
    balance: Balance, hosts: dict[str, dict[str, Any]], cpu: dict[str, float], expected: list[str]
) -> None:
    busy = {host_id: 1.0 for host_id, percent in cpu.items() if percent >= 80}
    made = tuple(figures(host_id, **fields) for host_id, fields in hosts.items())
    world = World(made, ClusterPolicy("a"), (), cpu, {}, busy)
    found = loads(fleet_of(world), "a", Recipe.of(BY_BALANCE[balance]), CONFIG, world.now)
    assert [str(each.load) for each in found] == expected
    assert f"{float(GIB * 16 - 256 * MIB) / GIB:.1f} GiB of memory left" in found[0].message
