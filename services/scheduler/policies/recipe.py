"""Recipes: scheduling policies ready to be applied, and the built-in ones. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from services.scheduler.policies.units import BY_KIND, MANDATORY
from volery.contracts.cluster import Balance
from volery.contracts.scheduling_policy import SchedulingPolicy, Selector, UnitKind

_FILTERS, _WEIGHTS = BY_KIND[UnitKind.FILTER], BY_KIND[UnitKind.WEIGHT]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A policy as one decision uses it: only units that this release knows, and always those that can't be left out."""

    id: str
    name: str
    revision: int
    built_in: bool
    filters: frozenset[str]
    weights: tuple[tuple[str, float], ...]
    balance: str
    parameters: Mapping[str, float]
    selector: Selector

    @staticmethod
    def of(policy: SchedulingPolicy) -> Recipe:
        """Of a built-in one this release's own definition counts, not the one that another release wrote."""
        meant = BUILT_IN.get(policy.id, policy)
        return Recipe(
            id=policy.id,
            name=meant.name,
            revision=policy.revision,
            built_in=policy.built_in,
            filters=frozenset(MANDATORY) | (frozenset(meant.filters) & _FILTERS.keys()),
            weights=tuple((name, factor) for name, factor in meant.weights.items() if name in _WEIGHTS),
            balance=meant.balance,
            parameters=meant.parameters,
            selector=meant.selector,
        )


_COMMON = {
    "preferred_hosts": 99.0,
    "ha_reservation": 1.0,
    "affinity_vms_wish": 1.0,
    "affinity_hosts_wish": 20.0,
    "affinity_room": 50.0,
    "numa_match": 5.0,
    "cpus_together": 4.0,
}
"""oVirt's factors. A preferred host outweighs everything else together; that all VMs that must be together find room
outweighs the affinity groups' wishes."""
_EVEN = {"cpu_even": 2.0, "memory_even": 1.0, **_COMMON}
_SAVING = {"cpu_saving": 2.0, "memory_saving": 1.0, **_COMMON}
_EVEN_GUESTS = {"guests_even": 2.0, **_COMMON}
_PACKING = {"fragmentation": 2.0, "memory_saving": 0.2, **_COMMON}
"""What is lost of whole room decides; between hosts that lose about as much, the fuller one."""
_OPEN = tuple(name for name in _FILTERS if name != "cluster_maintenance")
_BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)


def _built_in(
    number: int, name: str, description: str, weights: Mapping[str, float], unit: str, *filters: str
) -> SchedulingPolicy:
    return SchedulingPolicy(
        id=f"00000000-0000-0000-0001-{number:012}",
        revision=1,
        created_at=_BEGINNING,
        updated_at=_BEGINNING,
        name=str(name),
        description=description,
        built_in=True,
        filters=filters or _OPEN,
        weights=dict(weights),
        balance=unit,
    )


BY_BALANCE: dict[str, SchedulingPolicy] = {
    policy.name: policy
    for policy in (
        _built_in(1, Balance.NONE, "Hosts with the most left; nothing is balanced.", _EVEN, "none"),
        _built_in(
            2, Balance.EVENLY_DISTRIBUTED, "Hosts with the most left.", _EVEN, "even_distribution"
        ),
        _built_in(
            3, Balance.POWER_SAVING, "Few hosts, well filled.", _SAVING, "power_saving"
        ),
        _built_in(
            4, Balance.VM_EVENLY_DISTRIBUTED, "As many VMs on each host, whatever they use.", _EVEN_GUESTS,
            "even_guest_distribution",
        ),
        _built_in(
            5, Balance.CLUSTER_MAINTENANCE, "Only highly available VMs are started; what runs goes on.", _EVEN, "none",
            *_FILTERS,
        ),
    )
}  # fmt: skip
"""The built-in policies by the `balance` of a cluster that was given none."""
PACKING = _built_in(
    6, "packing", "Hosts filled without leaving memory where no vCPU is left, or the reverse; nothing is balanced.", _PACKING,
    "none",
)  # fmt: skip
"""No cluster's `balance` names it, since the previous release couldn't read one that did: clusters are given it."""
BUILT_IN = {policy.id: policy for policy in (*BY_BALANCE.values(), PACKING)}
BUILT_IN_RECIPES = {name: Recipe.of(policy) for name, policy in BY_BALANCE.items()}


def by_balance(balance: str) -> Recipe:
    """The built-in policy of a cluster; one that this release doesn't know is none."""
    return BUILT_IN_RECIPES.get(balance, BUILT_IN_RECIPES[Balance.NONE])
