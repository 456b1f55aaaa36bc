"""Weights: each gives every host a score from 0 (worst) to 1 (best).

Which of them count, how much, and whether scores or ranks are summed, says the scheduling policy (recipe.py). The highest
sum wins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from services.scheduler.fleet import Bools, Fleet, Floats, Ints
from services.scheduler.policies import bound, compact, numa, resized
from services.scheduler.policies.request import Request
from volery.contracts.scheduling_policy import Selector

Score = Callable[[Fleet, Request], Floats]


def expected_load(fleet: Fleet, request: Request) -> Floats:
    """CPU load per host, 1 = every thread busy, with this VM and those placed since the last sample added at
    the assumed load of a vCPU."""
    added = (fleet.ints("fresh_vcpus") + resized.vcpus(fleet, request)) * request.vcpu_load
    return fleet.floats("cpu_percent") / 100 + added / np.maximum(fleet.ints("cpus"), 1)


def memory_share(fleet: Fleet, request: Request) -> Floats:
    """Share of the memory that may be promised which would be taken."""
    share: Floats = (fleet.ints("memory_used") + request.memory) / np.maximum(fleet.ints("memory_limit"), 1)
    return share


def cpu_even(fleet: Fleet, request: Request) -> Floats:
    """The less loaded, the better; a host that would have promised too many vCPUs is the worst."""
    score = 1 - np.clip(expected_load(fleet, request), 0, 1)
    if not request.vcpu_ratio:
        return score
    promised = fleet.ints("vcpus_used") + resized.vcpus(fleet, request)
    return np.where(promised >= request.vcpu_ratio * fleet.ints("cpus"), 0.0, score)


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


def fragmentation(fleet: Fleet, request: Request) -> Floats:
    """The less room that is whole is lost, the better. Whole is what has memory and vCPUs in the proportions of the cluster:
    a host has as much of it as of the scarcer of the two, measured by what a host of the cluster has on average."""
    own = fleet.in_cluster(request.need.cluster_id)
    memory, memory_wanted = _room(fleet, own, "memory", request.memory)
    vcpus, vcpus_wanted = _room(fleet, own, "vcpus", resized.vcpus(fleet, request))
    lost = np.minimum(memory, vcpus) - np.minimum(memory - memory_wanted, vcpus - vcpus_wanted)
    score: Floats = 1 - np.clip(lost / np.maximum(memory_wanted, vcpus_wanted), 0, 1)
    return score


def _room(fleet: Fleet, own: Bools, what: str, wanted: Ints | int) -> tuple[Floats, Floats | float]:
    """What each host has left, and what is wanted, in hosts of the cluster's average."""
    limit = fleet.ints(f"{what}_limit")
    average = max(int(limit[own].sum()) / max(int(own.sum()), 1), 1.0)
    left: Floats = (limit - fleet.ints(f"{what}_used")) / average
    return left, wanted / average


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
        return _few(fleet, request, "ha_guests") / request.scale_down
    return fleet.nothing


def _on(fleet: Fleet, host_ids: Collection[str]) -> Floats:
    """1 for these, 0 for the others."""
    return fleet.among(host_ids).astype(np.float64) if host_ids else fleet.nothing


def preferred(fleet: Fleet, request: Request) -> Floats:
    return _on(fleet, request.need.preferred_host_ids)


def wished(fleet: Fleet, request: Request) -> Floats:
    """The one host that this placement asks for, if it fits."""
    wanted = request.place.preferred_host_id
    return _on(fleet, (wanted,) if wanted else ())


def avoided(fleet: Fleet, request: Request) -> Floats:
    """Hosts that this placement would rather not have: the only score below 0, so that the others' figures stay."""
    host_ids = request.place.avoided_host_ids
    return -_on(fleet, host_ids) if host_ids else fleet.nothing


WEIGHTS: Mapping[str, Score] = {
    "cpu_even": cpu_even,
    "memory_even": memory_even,
    "cpu_saving": cpu_saving,
    "memory_saving": memory_saving,
    "guests_even": guests_even,
    "fragmentation": fragmentation,
    "preferred_hosts": preferred,
    "ha_reservation": ha_spread,
    "affinity_vms_wish": bound.vm_wishes,
    "affinity_hosts_wish": bound.host_wishes,
    "affinity_room": bound.room_for_all,
    "numa_match": numa.match,
    "cpus_together": compact.in_few_cells,
}
WISHED, AVOIDED = 300.0, 1000.0
"""What a placement itself asks for counts under every policy: a wish outweighs all of its weights together, since it is
asked for once, for a reason of now; and an avoided host is taken only when no other fits. These factors, or more where the
policy's own come to more."""


def weigh(fleet: Fleet, request: Request, fits: Bools) -> dict[str, Floats]:
    """Weight → its share of each host's sum. Ranks are among the hosts that fit; those of others say nothing."""
    recipe = request.recipe
    ranked = recipe.selector is Selector.RANK
    shares = {}
    for name, factor in recipe.weights:
        score = WEIGHTS[name](fleet, request)
        shares[name] = factor * ranks(score, fits) if ranked else _times(fleet, factor, score)
    most = sum(factor for _, factor in recipe.weights)
    wish = max(WISHED, most + 1)
    unit = max(int(fits.sum()), 1) if ranked else 1
    shares["wished_host"] = _times(fleet, unit * wish, wished(fleet, request))
    shares["avoided_hosts"] = _times(fleet, unit * max(AVOIDED, most + wish + 1), avoided(fleet, request))
    return shares


def _times(fleet: Fleet, factor: float, score: Floats) -> Floats:
    return score if score is fleet.nothing else factor * score


def ranks(score: Floats, fits: Bools) -> Floats:
    """The best of n hosts has rank n − 1, the next n − 2; equals, within rounding, share the better one (oVirt's)."""
    exact = np.rint(score * 1e9)
    ordered = np.sort(-exact[fits])
    better = np.searchsorted(ordered, -exact, side="left")
    found: Floats = np.where(fits, len(ordered) - 1.0 - better, 0.0)
    return found
