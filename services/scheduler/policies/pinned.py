"""The rule about physical CPUs: whether a host has those that a VM wants, and whether enough are left for all others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from services.scheduler.fleet import Bools, Fleet, Ints
from services.scheduler.policies.cpus import Wish, choose, most_vcpus
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


def taken(fleet: Fleet, wish: Wish) -> Ints:
    """How many CPUs of each host would be the VM's alone; NONE where it can't have what it wants."""
    answers = (choose(state, wish) for state in fleet.cpu_states)
    counts = np.fromiter(
        (NONE if given is None else len(given.exclusive) for given in answers),
        np.int64,
        len(fleet.cpu_states),
    )
    found: Ints = counts[fleet.ints("cpu_state")]
    return found


def given(fleet: Fleet, request: Request, row: int) -> GivenCpus | None:
    """The CPUs that a VM gets on a host that fits; None for one that shares."""
    return None if request.wish is None else choose(fleet.cpus_of(row), request.wish)


def has_cpus(fleet: Fleet, request: Request) -> Bools:
    wish, alone = request.wish, fleet.ints("cpus_exclusive")
    mask: Bools
    if wish is None:
        mask = (alone == 0) | (request.need.vcpus <= fleet.ints("cpus") - alone)
    elif wish.alone:
        wanted = taken(fleet, wish)
        mask = (wanted != NONE) & (wanted <= shared(fleet).spare)
    else:
        mask = taken(fleet, wish) != NONE
    return mask


def lacks_cpus(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, vm, host, wish = fleet.names[row], request.vm, fleet.cpus_of(row), request.wish
    left = int(shared(fleet).cpus[row])
    if wish is None:
        return (
            f"{name} has {left} CPUs left that VMs share, {vm} has {request.need.vcpus} vCPUs",
            f"give {vm} at most {left} vCPUs, or move VMs away from {name} that have CPUs alone",
        )
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
    if choose(host, wish) is None:
        wanted = (
            f"{wish.vcpus} CPUs" if wish.policy is PinningPolicy.DEDICATED else f"{wish.vcpus} whole cores"
        )
        threads = f", {wish.threads} threads of each core" if wish.threads > 1 else ""
        return f"{figures}, {vm} wants {wanted} of its own{threads}", _fewer(fleet, request, row, wish)
    needed = left - int(shared(fleet).spare[row])
    return (
        f"{figures}, and the VMs that share the others need {needed} of them: {max(left - needed, 0)} can be given away, "
        f"{vm} wants {int(taken(fleet, wish)[row])}",
        _fewer(fleet, request, row, wish),
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


def _fewer(fleet: Fleet, request: Request, row: int, wish: Wish) -> str:
    most = most_vcpus(fleet.cpus_of(row), wish, int(shared(fleet).spare[row]))
    away = f"move VMs away from {fleet.names[row]}"
    return f"give {request.vm} at most {most} vCPUs, or {away}" if most else away


def fitting_vcpus(fleet: Fleet, request: Request) -> Ints:
    """The most vCPUs with which the VM would find its CPUs on each host; 0 for none."""
    wish, room = request.wish, shared(fleet)
    if wish is None:
        return np.maximum(room.cpus, 0)
    if not wish.alone:
        return np.zeros(len(fleet), np.int64)
    states = fleet.ints("cpu_state").tolist()
    most = (
        most_vcpus(fleet.cpu_states[state], wish, spare)
        for state, spare in zip(states, room.spare.tolist(), strict=True)
    )
    return np.fromiter(most, np.int64, len(fleet))


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
