"""Drafts: what an administrator may make a scheduling policy of. Pure; every mistake is refused with what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from services.scheduler.policies.units import BY_KIND, MANDATORY, PARAMETERS
from volery.contracts.errors import conflict, invalid
from volery.contracts.scheduling_policy import PolicyParameter, PolicyUnit, SchedulingPolicy, UnitKind
from volery.runtime import checks

MOST_FACTOR = 1000.0


def check(policy: SchedulingPolicy) -> None:
    """Raises Refused(invalid) for the first mistake."""
    checks.name(policy.name)
    checks.text(policy.description, "description")
    _check_filters(policy)
    for name, factor in policy.weights.items():
        _known(UnitKind.WEIGHT, name, "weights")
        _check_factor(name, factor)
    _known(UnitKind.BALANCE, policy.balance, "balance")
    _check_parameters(policy)


def check_changeable(policy: SchedulingPolicy, what: str) -> None:
    """Raises Refused(conflict) for a built-in one."""
    if policy.built_in:
        raise conflict(
            f"scheduling policy {policy.name} is built in and can't be {what}: make a copy of it (copy_of) and change that",
            policy_id=policy.id,
        )


def _check_filters(policy: SchedulingPolicy) -> None:
    for name in policy.filters:
        _known(UnitKind.FILTER, name, "filters")
    if twice := {name for name in policy.filters if policy.filters.count(name) > 1}:
        raise invalid(
            f"filter {min(twice)} is named twice; name it once", field="filters", filters=sorted(twice)
        )
    missing = [name for name in MANDATORY if name not in policy.filters]
    if missing:
        reasons = "; ".join(f"{name}: {BY_KIND[UnitKind.FILTER][name].mandatory}" for name in missing)
        raise invalid(
            f"scheduling policy {policy.name} leaves out filters that every policy has: add {', '.join(missing)} "
            f"({reasons})",
            field="filters",
            missing=missing,
        )


def _check_factor(name: str, factor: float) -> None:
    if not (math.isfinite(factor) and 0 < factor <= MOST_FACTOR):
        help_ = "; leave the weight out to switch it off" if factor <= 0 else ""
        raise invalid(
            f"the factor of weight {name} is above 0 to {MOST_FACTOR:g}, not {factor:g}{help_}",
            field="weights",
        )


def _check_parameters(policy: SchedulingPolicy) -> None:
    used = {parameter.name for unit in units_of(policy) for parameter in unit.parameters}
    for name, value in policy.parameters.items():
        parameter = PARAMETERS.get(name)
        if parameter is None:
            raise _unknown("parameter", name, PARAMETERS, "parameters")
        _check_value(parameter, value)
        if name not in used:
            raise invalid(
                f"parameter {name} is of no use in scheduling policy {policy.name}: it belongs to {_users(name)}; add one of "
                "these, or leave the parameter out",
                field="parameters",
            )


def _check_value(parameter: PolicyParameter, value: float) -> None:
    unit = f" {parameter.unit}" if parameter.unit else ""
    if not parameter.low <= value <= parameter.high:
        raise invalid(
            f"parameter {parameter.name} is {parameter.low:g} to {parameter.high:g}{unit}, not {value:g}",
            field="parameters",
            parameter=parameter.name,
            low=parameter.low,
            high=parameter.high,
        )
    if parameter.whole and value != int(value):
        raise invalid(
            f"parameter {parameter.name} is a whole number of {parameter.low:g} to {parameter.high:g}{unit}, not {value:g}",
            field="parameters",
            parameter=parameter.name,
        )


def _users(name: str) -> str:
    return " and ".join(
        f"{unit.kind} {unit.name}"
        for units in BY_KIND.values()
        for unit in units.values()
        if any(parameter.name == name for parameter in unit.parameters)
    )


def units_of(policy: SchedulingPolicy) -> Iterable[PolicyUnit]:
    named = (
        (UnitKind.FILTER, policy.filters),
        (UnitKind.WEIGHT, policy.weights),
        (UnitKind.BALANCE, [policy.balance]),
    )
    return [BY_KIND[kind][name] for kind, names in named for name in names if name in BY_KIND[kind]]


def _known(kind: UnitKind, name: str, field: str) -> None:
    if name not in BY_KIND[kind]:
        raise _unknown(kind, name, BY_KIND[kind], field)


def _unknown(
    noun: str, name: str, known: Mapping[str, PolicyParameter | PolicyUnit], field: str
) -> Exception:
    """With the name that comes closest; oVirt's own name of a unit leads to ours."""
    units = [each for each in known.values() if isinstance(each, PolicyUnit) and each.ovirt_name]
    spelt = {each.casefold(): each for each in known} | {u.ovirt_name.casefold(): u.name for u in units}
    near = get_close_matches(name.casefold(), spelt, n=1, cutoff=0.4)
    hint = f"did you mean {spelt[near[0]]}? " if near else ""
    return invalid(
        f"there is no {noun} {name!r}: {hint}There are {', '.join(known)}",
        field=field,
        closest=spelt[near[0]] if near else "",
        known=list(known),
    )
