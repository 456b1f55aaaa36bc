"""A cluster as it will be after a change that somebody plans, and what is said of losses that it wouldn't survive. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy, limits
from services.scheduler.policies.losses import Homeless, Loss
from services.scheduler.policies.promise import LEAVING, World
from volery.contracts.promise import HostLoss, LostVm, PlannedChange

NAMED = 3
"""VMs or hosts that a sentence names."""


def policy_after(policy: ClusterPolicy, planned: PlannedChange) -> ClusterPolicy:
    asked = {
        "memory_overcommit_percent": planned.memory_overcommit_percent,
        "cpu_overcommit_ratio": planned.cpu_overcommit_ratio,
        "reserve_host_failures": planned.reserve_host_failures,
        "admission_control": planned.admission_control,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(policy, **given)


def change(world: World, planned: PlannedChange) -> None:
    """Make the change in the world. What leaves is only marked: `promise.begin` moves it."""
    policy = policy_after(world.policy, planned)
    promised = ("memory_overcommit_percent", "cpu_overcommit_ratio")
    if any(getattr(policy, name) != getattr(world.policy, name) for name in promised):
        _limit(world, policy)
    world.policy = policy
    status = world.fleet.ints("status")
    for host_id in planned.leaving_host_ids:
        if host_id in world.fleet.rows:
            status[world.fleet.rows[host_id]] = LEAVING
    if planned.stops_vms:
        world.stops |= frozenset(planned.leaving_host_ids)
    for need in planned.vms:
        guest = world.guests.get(need.vm_id)
        if guest is not None:
            world.guests[need.vm_id] = replace(guest, need=need)
    world.changed()


def _limit(world: World, policy: ClusterPolicy) -> None:
    fleet = world.fleet
    for row in range(len(fleet)):
        memory, cpus = int(fleet.ints("memory_bytes")[row]), int(fleet.ints("cpus")[row])
        allowed = limits(memory, cpus, policy, world.config)
        fleet.ints("memory_limit")[row] = allowed.memory_bytes
        fleet.ints("vcpus_limit")[row] = allowed.vcpus


def names(fleet: Fleet, host_ids: Sequence[str]) -> tuple[str, ...]:
    return tuple(fleet.names[fleet.rows[h]] if h in fleet.rows else h for h in host_ids)


def told(
    fleet: Fleet, loss: Loss, from_hosts: dict[str, str], vms: dict[str, str], *, all_vms: bool
) -> HostLoss:
    """A loss as it is said. `from_hosts`: VM → where it is now; `vms`: VM → its name."""
    homeless = [
        LostVm(vm_id=h.vm_id, name=h.name, from_host_id=h.from_host_id, message=h.message)
        for h in loss.homeless
    ]
    placed = [
        LostVm(
            vm_id=vm_id,
            name=vms.get(vm_id, vm_id),
            from_host_id=from_hosts.get(vm_id, ""),
            host_id=host_id,
            host_name=names(fleet, [host_id])[0],
        )
        for vm_id, host_id in sorted(loss.places.items())
    ]
    return HostLoss(
        host_ids=loss.hosts,
        host_names=names(fleet, loss.hosts),
        survived=not loss.homeless,
        vms=(*homeless, *(placed if all_vms else ())),
    )


def breach(fleet: Fleet, loss: Loss) -> str:
    """Which loss, and which VM would have no place."""
    if not loss.hosts:
        return f"{_vms(loss.homeless)} {_have(loss)} no place now"
    return f"if {' and '.join(names(fleet, loss.hosts))} were lost, {_vms(loss.homeless)} would have no place"


def _have(loss: Loss) -> str:
    return "has" if len(loss.homeless) == 1 else "have"


def _vms(homeless: Sequence[Homeless]) -> str:
    named = ", ".join(each.name for each in homeless[:NAMED])
    more = len(homeless) - NAMED
    return f"VM{'s' if len(homeless) > 1 else ''} {named}" + (f" and {more} more" if more > 0 else "")


def promised(policy: ClusterPolicy) -> str:
    count = policy.reserve_host_failures
    return f"Cluster {policy.name or policy.id} promises to survive the loss of {count} host{'s' if count > 1 else ''}"


def refusal(world: World, what: str, losses: Sequence[Loss]) -> str:
    """Why something isn't done: the loss that it wouldn't survive, the VM without a place and the reason."""
    worst = max(losses, key=lambda loss: len(loss.homeless))
    more = f" (and {len(losses) - 1} other losses)" if len(losses) > 1 else ""
    return (
        f"{what} would break a promise. {promised(world.policy)}, but {breach(world.fleet, worst)}{more}. "
        f"{worst.homeless[0].message}"
    )


ADVICE = (
    "free room on the other hosts, activate or add one, or set the cluster's reserve_host_failures lower or its "
    "admission_control to warn"
)
