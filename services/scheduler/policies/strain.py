"""Rules about what a host or its cluster can bear now: load, swapping, a cluster in maintenance."""

from __future__ import annotations

import numpy as np

from services.scheduler.fleet import IDLE, Bools, Fleet, Floats, Ints
from services.scheduler.policies.request import Request, size
from volery.contracts.cluster import Balance
from volery.contracts.scheduling import Purpose


def busy_seconds(fleet: Fleet, request: Request) -> Floats:
    """How long each sample of the host has been at the high utilisation or above."""
    since = fleet.floats("busy_since")
    return np.where(since == IDLE, 0.0, request.now - since)


def is_not_overloaded(fleet: Fleet, request: Request) -> Bools:
    if not request.overload_seconds or request.place.purpose is Purpose.RESTART:
        return fleet.everyone
    mask: Bools = busy_seconds(fleet, request) < request.overload_seconds
    return mask


def is_overloaded(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, load = fleet.names[row], float(fleet.floats("cpu_percent")[row])
    seconds = float(busy_seconds(fleet, request)[row])
    return (
        f"the CPUs of {name} have been {request.high_utilization:.0%} busy or more for {seconds:.0f} s (now {load:.0f} %)",
        f"move VMs away from {name}, or wait until it is less busy",
    )


def swap_excess(fleet: Fleet, request: Request) -> Ints:
    """Bytes swapped out beyond what is allowed; 0 or less is no excess."""
    allowed = (fleet.ints("memory_bytes") * request.swap_percent / 100).astype(np.int64)
    excess: Ints = fleet.ints("swapped") - allowed
    return excess


def is_not_swapping(fleet: Fleet, request: Request) -> Bools:
    if not fleet.ints("swapped").any():
        return fleet.everyone
    mask: Bools = swap_excess(fleet, request) <= 0
    return mask


def is_swapping(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, excess = fleet.names[row], int(swap_excess(fleet, request)[row])
    swapped = int(fleet.ints("swapped")[row])
    return (
        f"{name} has swapped out {size(swapped)} more than it has memory for",
        f"move VMs away from {name}, or end what else uses its memory, until {size(excess)} more are free",
    )


def cluster_takes_starts(fleet: Fleet, request: Request) -> Bools:
    """A filter that only policies have which close their clusters."""
    starts = request.place.purpose is Purpose.START and not request.need.high_availability
    return ~fleet.everyone if starts else fleet.everyone


def cluster_is_maintained(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    return (
        f"{request.cluster} is in maintenance: only highly available VMs are started in it",
        f"give {request.cluster} another {'scheduling policy' if request.policy.policy_id else 'balance'}, e.g. "
        f"{Balance.EVENLY_DISTRIBUTED}",
    )
