"""The rule about physical CPUs: whether a host has those that a VM wants, and whether enough are left for all others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from services.scheduler.fleet import Bools, Fleet, Ints
from services.scheduler.policies import resized
from services.scheduler.policies.cpus import Wish, alone, capacity, choose, has_pins, most_vcpus
from services.scheduler.policies.request import Request
from volery.contracts.cpus import GivenCpus, PinningPolicy

NONE = -1


class Shared(NamedTuple):
    """Of each host."""

    cpus: Ints
    """Those that are shared now."""
    spare: Ints
    """How many of them could become one VM's alone."""


def shared(fleet: Fleet) -> Shared:
    """The largest VM that shares them must find as many CPUs as it has vCPUs, and all of them what the over-commit says."""
    cpus, promised = fleet.ints("cpus"), np.maximum(fleet.ints("vcpus_promised"), 1)
    left = cpus - fleet.ints("cpus_exclusive")
    sharing = fleet.ints("vcpus_used") - fleet.ints("vcpus_exclusive")
    needed = np.maximum(fleet.ints("largest_shared"), -(-sharing * cpus // promised))
    return Shared(left, left - needed)


def shared_at(fleet: Fleet, row: int) -> tuple[int, int]:
    """The same of one host."""
    cpus, promised = int(fleet.ints("cpus")[row]), max(int(fleet.ints("vcpus_promised")[row]), 1)
    left = cpus - int(fleet.ints("cpus_exclusive")[row])
    sharing = int(fleet.ints("vcpus_used")[row] - fleet.ints("vcpus_exclusive")[row])
    return left, left - max(int(fleet.ints("largest_shared")[row]), -(-sharing * cpus // promised))


def capacities(fleet: Fleet, wish: Wish) -> Ints:
    """For how many vCPUs of such a VM each host has CPUs that nobody else uses."""
    return fleet.of_cpus((wish.policy, wish.threads), lambda host: capacity(host, wish.policy, wish.threads))


def taken(fleet: Fleet, wish: Wish) -> Ints:
    """How many CPUs of each host would be the VM's alone; NONE where it can't have what it wants."""
    if not wish.alone:
        states = fleet.cpu_states.states
        has = (0 if has_pins(state, wish) else NONE for state in states)
        by_state: Ints = np.fromiter(has, np.int64, len(states))
        return by_state[fleet.ints("cpu_state")]
    enough = capacities(fleet, wish) >= wish.vcpus
    if wish.policy is PinningPolicy.DEDICATED:
        return np.where(enough, wish.vcpus, NONE)
    count = wish.vcpus * fleet.ints("threads")
    for row in np.flatnonzero(enough & (count == 0)).tolist():  # hosts whose cores differ
        count[row] = alone(fleet.cpus_of(row), wish)
    return np.where(enough, count, NONE)


def given(fleet: Fleet, request: Request, row: int) -> GivenCpus | None:
    """The CPUs that a VM gets on a host that fits; None for one that shares."""
    return None if request.wish is None else choose(fleet.cpus_of(row), request.wish)


def has_cpus(fleet: Fleet, request: Request) -> Bools:
    wish, alone = request.wish, fleet.ints("cpus_exclusive")
    mask: Bools
    if wish is None:
        mask = (alone == 0) | (request.need.vcpus <= fleet.ints("cpus") - alone)
    elif wish.resized:
        mask = resized.suits(fleet, request)
    elif wish.alone:
        wanted = taken(fleet, wish)
        mask = (wanted != NONE) & (wanted <= shared(fleet).spare)
    else:
        mask = taken(fleet, wish) != NONE
    return mask


def lacks_cpus(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, vm, host, wish = fleet.names[row], request.vm, fleet.cpus_of(row), request.wish
    left, spare = shared_at(fleet, row)
    if wish is None:
        return (
            f"{name} has {left} CPUs left that VMs share, {vm} has {request.need.vcpus} vCPUs",
            f"give {vm} at most {left} vCPUs, or move VMs away from {name} that have CPUs alone",
        )
    if wish.resized:
        return resized.unsuited(fleet, request, row)
    if not host.cores:
        return (
            f"{name} has not said how its CPUs are built",
            f"let {name} report its CPUs: its agent is of an older release, or its libvirt doesn't say",
        )
    if wish.policy is PinningPolicy.MANUAL:
        return _lacks_pins(fleet, request, row, wish)
    figures = (
        f"of {len(host.every)} CPUs of {name} {len(host.exclusive)} are others' alone and VMs are pinned to "
        f"{len(host.pinned - host.exclusive)}"
    )
    if capacity(host, wish.policy, wish.threads) < wish.vcpus:
        wanted = (
            f"{wish.vcpus} CPUs" if wish.policy is PinningPolicy.DEDICATED else f"{wish.vcpus} whole cores"
        )
        threads = f", {wish.threads} threads of each core" if wish.threads > 1 else ""
        return f"{figures}, {vm} wants {wanted} of its own{threads}", _fewer(fleet, request, row, spare)
    needed = left - spare
    return (
        f"{figures}, and the VMs that share the others need {needed} of them: {max(left - needed, 0)} can be given away, "
        f"{vm} wants {alone(host, wish)}",
        _fewer(fleet, request, row, spare),
    )


def _lacks_pins(fleet: Fleet, request: Request, row: int, wish: Wish) -> tuple[str, str]:
    name, host = fleet.names[row], fleet.cpus_of(row)
    wanted = frozenset[int]().union(*wish.pins)
    if missing := sorted(wanted - host.every):
        return f"{name} has no CPU {_list(missing)}", f"pin {request.vm} to CPUs that {name} has"
    others = sorted(wanted & host.exclusive)
    return (
        f"CPU {_list(others)} of {name} is another VM's alone",
        f"pin {request.vm} to others, or move away who has them",
    )


def _list(cpus: list[int]) -> str:
    return ", ".join(map(str, cpus))


def _fewer(fleet: Fleet, request: Request, row: int, spare: int) -> str:
    most = 0 if request.wish is None else most_vcpus(fleet.cpus_of(row), request.wish, spare)
    away = f"move VMs away from {fleet.names[row]}"
    return f"give {request.vm} at most {most} vCPUs, or {away}" if most else away


def fitting_vcpus(fleet: Fleet, request: Request) -> Ints:
    """The most vCPUs with which the VM would find its CPUs on each host; 0 for none."""
    wish, room = request.wish, shared(fleet)
    if wish is None:
        return np.maximum(room.cpus, 0)
    if not wish.alone:
        return np.zeros(len(fleet), np.int64)
    each = np.ones(len(fleet), np.int64) if wish.policy is PinningPolicy.DEDICATED else fleet.ints("threads")
    most = np.minimum(np.minimum(capacities(fleet, wish), wish.vcpus), room.spare // np.maximum(each, 1))
    for row in np.flatnonzero(each == 0).tolist():
        most[row] = most_vcpus(fleet.cpus_of(row), wish, int(room.spare[row]))
    return np.maximum(most, 0)


def sharing_too_much(fleet: Fleet, request: Request) -> tuple[Bools, Ints]:
    """Hosts that could give the VM its CPUs if fewer vCPUs shared the rest, and by how many."""
    wish = request.wish
    if wish is None or not wish.alone:
        return np.zeros(len(fleet), np.bool_), np.zeros(len(fleet), np.int64)
    wanted, cpus = taken(fleet, wish), np.maximum(fleet.ints("cpus"), 1)
    left = shared(fleet).cpus - wanted
    sharing = fleet.ints("vcpus_used") - fleet.ints("vcpus_exclusive")
    more = sharing - fleet.ints("vcpus_promised") * np.maximum(left, 0) // cpus
    possible = (wanted != NONE) & (left >= np.maximum(fleet.ints("largest_shared"), 0)) & (more > 0)
    return possible, more
