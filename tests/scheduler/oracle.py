"""The scheduler's rules once more, slow and obvious: one host at a time, in plain Python, from the same documents and
formulas as `services/scheduler/policies`, but without them. What the two say must be the same."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import HostFigures, NetworkReach
from services.scheduler.model import ClusterPolicy
from volery.contracts.scheduling import Place

MIB = 1024**2


@dataclass(frozen=True)
class World:
    """A fleet as plain data."""

    hosts: tuple[HostFigures, ...]
    policy: ClusterPolicy
    networks: tuple[NetworkReach, ...] = ()
    cpu_percent: dict[str, float] = field(default_factory=dict)
    fresh_vcpus: dict[str, int] = field(default_factory=dict)
    busy_since: dict[str, float] = field(default_factory=dict)
    swapped: dict[str, int] = field(default_factory=dict)
    now: float = 1000.0


def considered(world: World, place: Place) -> list[HostFigures]:
    """The hosts of the VM's cluster, and the one that is asked for."""
    return [h for h in world.hosts if h.cluster_id == place.need.cluster_id or h.id == place.target_host_id]


def refusals(world: World, place: Place, host: HostFigures, config: SchedulerConfig) -> set[str]:
    """The rules that exclude one host, written as one would say them."""
    need, policy = place.need, world.policy
    reach = {n.id: n.host_ids for n in world.networks}
    model, machine = need.cpu_model or policy.cpu_model, need.machine or policy.machine
    refused = set()
    if host.cluster_id != need.cluster_id:
        refused.add("cluster")
    if place.target_host_id and host.id != place.target_host_id:
        refused.add("target")
    if host.status != "up":
        refused.add("host_state")
    if need.host_ids and host.id not in need.host_ids:
        refused.add("pinned")
    if host.id in place.excluded_host_ids:
        refused.add("excluded")
    if need.vcpus > host.cpus:
        refused.add("cpu")
    if host.vcpus_limit - host.vcpus_used < need.vcpus:
        refused.add("cpu_overcommit")
    if host.memory_limit_bytes - host.memory_used_bytes < taken(place, config):
        refused.add("memory")
    if any(host.id not in reach.get(n, ()) for n in need.network_ids):
        refused.add("network")
    if need.storage_host_ids is not None and host.id not in need.storage_host_ids:
        refused.add("storage")
    if (
        model not in ("", "host-passthrough", "host-model")
        and host.cpu_models
        and model not in host.cpu_models
    ):
        refused.add("cpu_model")
    starts = place.purpose == "start" and not need.high_availability
    if policy.balance == "cluster_maintenance" and starts:
        refused.add("cluster_maintenance")
    busy = world.busy_since.get(host.id)
    limit = config.overload_seconds
    if limit and place.purpose != "restart" and busy is not None and world.now - busy >= limit:
        refused.add("cpu_overload")
    if world.swapped.get(host.id, 0) > int(host.memory_bytes * config.swap_percent / 100):
        refused.add("swap")
    if machine and host.machines and machine not in host.machines:
        refused.add("machine")
    return refused


def taken(place: Place, config: SchedulerConfig) -> int:
    """Bytes of memory that the VM takes of its host."""
    return place.need.memory_bytes + config.guest_overhead_mib * MIB


def weights(world: World, place: Place, host: HostFigures, config: SchedulerConfig) -> dict[str, float]:
    """Weight → its share of one host's sum. No affinity group knows these VMs; `test_affinity_rules` is about those."""
    need = place.need
    fresh = world.fresh_vcpus.get(host.id, 0) + need.vcpus
    load = world.cpu_percent.get(host.id, 0.0) / 100
    load += config.vcpu_load_percent / 100 * fresh / max(host.cpus, 1)
    share = (host.memory_used_bytes + taken(place, config)) / max(host.memory_limit_bytes, 1)
    found = {
        "ha_reservation": 0.0,
        "preferred_hosts": 99.0 if host.id in need.preferred_host_ids else 0.0,
        "wished_host": 300.0 if host.id == place.preferred_host_id else 0.0,
        "avoided_hosts": -1000.0 if host.id in place.avoided_host_ids else 0.0,
        **dict.fromkeys(("affinity_vms_wish", "affinity_hosts_wish", "affinity_room"), 0.0),
    }
    if need.high_availability and world.policy.reserve_host_failures:
        most_ha = max((h.ha_guests for h in world.hosts if h.cluster_id == need.cluster_id), default=0)
        found["ha_reservation"] = 1 - min(host.ha_guests / max(most_ha, 1), 1.0)
    if world.policy.balance == "power_saving":
        high = config.high_utilization_percent / 100
        found["cpu_saving"] = 2 * load if load <= high else 0.0
        found["memory_saving"] = min(share, 1.0)
    elif world.policy.balance == "vm_evenly_distributed":
        most = max((h.guests for h in world.hosts if h.cluster_id == need.cluster_id), default=0)
        found["guests_even"] = 2 * (1 - min(host.guests / max(most, 1), 1.0))
    else:
        found["cpu_even"] = 2 * (1 - min(load, 1.0))
        found["memory_even"] = 1 - min(share, 1.0)
    return found


def best(world: World, place: Place, config: SchedulerConfig) -> list[str]:
    """The hosts that fit and whose sums nobody exceeds by more than rounding; the lowest id first."""
    sums = {
        h.id: sum(weights(world, place, h, config).values())
        for h in considered(world, place)
        if not refusals(world, place, h, config)
    }
    return sorted(h for h, total in sums.items() if total > max(sums.values()) - 2e-9)
