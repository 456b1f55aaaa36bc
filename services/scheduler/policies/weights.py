"""Weights: each gives every host a score from 0 (worst) to 1 (best); the highest sum of factor × score wins.

Which weights count, and how much, is a row of POLICIES, named after the cluster's balance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.scheduler.fleet import Fleet, Floats
from services.scheduler.policies import bound
from services.scheduler.policies.request import Request
from volery.contracts.cluster import Balance

Score = Callable[[Fleet, Request], Floats]


@dataclass(frozen=True, slots=True)
class Weight:
    name: str
    factor: float
    score: Score


def expected_load(fleet: Fleet, request: Request) -> Floats:
    """CPU load per host, 1 = every thread busy, with this VM and those placed since the last sample added at
    the assumed load of a vCPU."""
    added = (fleet.ints("fresh_vcpus") + request.need.vcpus) * request.vcpu_load
    return fleet.floats("cpu_percent") / 100 + added / np.maximum(fleet.ints("cpus"), 1)


def memory_share(fleet: Fleet, request: Request) -> Floats:
    """Share of the memory that may be promised which would be taken."""
    share: Floats = (fleet.ints("memory_used") + request.memory) / np.maximum(fleet.ints("memory_limit"), 1)
    return share


def cpu_even(fleet: Fleet, request: Request) -> Floats:
    """The less loaded, the better."""
    return 1 - np.clip(expected_load(fleet, request), 0, 1)


def memory_even(fleet: Fleet, request: Request) -> Floats:
    """The more memory is left, the better."""
    return 1 - np.clip(memory_share(fleet, request), 0, 1)


def cpu_saving(fleet: Fleet, request: Request) -> Floats:
    """The busier, the better, but not beyond the high utilisation."""
    load = expected_load(fleet, request)
    return np.where(load <= request.high_utilization, np.clip(load, 0, 1), 0.0)


def memory_saving(fleet: Fleet, request: Request) -> Floats:
    """The fuller, the better."""
    return np.clip(memory_share(fleet, request), 0, 1)


def _few(fleet: Fleet, request: Request, column: str) -> Floats:
    """1 where none is, 0 where as many are as on any host of the cluster."""
    count = fleet.ints(column)
    most = int(count[fleet.in_cluster(request.need.cluster_id)].max(initial=0))
    score: Floats = 1 - np.clip(count / max(most, 1), 0, 1)
    return score


def guests_even(fleet: Fleet, request: Request) -> Floats:
    """The fewer VMs, the better."""
    return _few(fleet, request, "guests")


def ha_spread(fleet: Fleet, request: Request) -> Floats:
    """In a cluster that reserves room for dead hosts, the fewer highly available VMs die together, the better."""
    if request.need.high_availability and request.policy.reserve_host_failures:
        return _few(fleet, request, "ha_guests")
    return np.zeros(len(fleet))


def preferred(fleet: Fleet, request: Request) -> Floats:
    return fleet.among(request.need.preferred_host_ids).astype(np.float64)


def wished(fleet: Fleet, request: Request) -> Floats:
    """The one host that this placement asks for, if it fits."""
    wanted = request.place.preferred_host_id
    return fleet.among((wanted,) if wanted else ()).astype(np.float64)


def avoided(fleet: Fleet, request: Request) -> Floats:
    """Hosts that this placement would rather not have: the only score below 0, so that the others' figures stay."""
    return -fleet.among(request.place.avoided_host_ids).astype(np.float64)


PREFERRED = Weight("preferred_hosts", 99.0, preferred)
"""oVirt's factor: outweighs everything else together."""
WISHED = Weight("wished_host", 300.0, wished)
"""Outweighs the VM's own preferences: it is asked for once, for a reason of now."""
AVOIDED = Weight("avoided_hosts", 1000.0, avoided)
"""Outweighs all others together: an avoided host is taken only when no other fits."""
GROUPS = (
    Weight("affinity_vms_wish", 1.0, bound.vm_wishes),
    Weight("affinity_hosts_wish", 20.0, bound.host_wishes),
    Weight("affinity_room", 50.0, bound.room_for_all),
)
"""Affinity groups' wishes with oVirt's factors; and that all VMs that must be together find room, which outweighs them."""
HA_RESERVATION = Weight("ha_reservation", 1.0, ha_spread)
ASKED = (PREFERRED, WISHED, AVOIDED, HA_RESERVATION, *GROUPS)
EVEN = (Weight("cpu_even", 2.0, cpu_even), Weight("memory_even", 1.0, memory_even), *ASKED)
SAVING = (Weight("cpu_saving", 2.0, cpu_saving), Weight("memory_saving", 1.0, memory_saving), *ASKED)
EVEN_GUESTS = (Weight("guests_even", 2.0, guests_even), *ASKED)

POLICIES: dict[str, tuple[Weight, ...]] = {
    Balance.NONE: EVEN,
    Balance.EVENLY_DISTRIBUTED: EVEN,
    Balance.POWER_SAVING: SAVING,
    Balance.VM_EVENLY_DISTRIBUTED: EVEN_GUESTS,
    Balance.CLUSTER_MAINTENANCE: EVEN,
}
