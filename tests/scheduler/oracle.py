"""The scheduler's rules once more, slow and obvious: one host at a time, in plain Python, from the same documents and
formulas as `services/scheduler/policies`, but without them. What the two say must be the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations, product

from services.scheduler.cells import CellFigures
from services.scheduler.config import SchedulerConfig
from services.scheduler.figures import HostFigures, NetworkReach
from services.scheduler.model import ClusterPolicy
from services.scheduler.policies import devices as d
from services.scheduler.policies.affinity import Group
from services.scheduler.policies.bound import Seat
from services.scheduler.policies.cpus import FREE, Held, read_cores
from tests.scheduler.oracle_parts import (
    amount,
    cant_be_resized,
    gives_devices,
    lacks_cpus,
    resized,
    resized_shares,
    shared_limit,
    vcpus,
)
from volery.contracts.host_devices import HostDevice
from volery.contracts.scheduling import Need, Place
from volery.contracts.scheduling_policy import SchedulingPolicy

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
    given: SchedulingPolicy | None = None
    """What an administrator gave the cluster; None is the built-in policy of its balance."""
    groups: tuple[Group, ...] = ()
    seats: Mapping[str, Seat] = field(default_factory=dict)
    """Where the other VMs of the groups are."""
    cells: Mapping[str, Sequence[CellFigures]] = field(default_factory=dict)
    """Host → its NUMA cells."""
    held: Mapping[str, Held] = field(default_factory=dict)
    """Host → its CPUs that VMs hold."""
    devices: Mapping[str, tuple[tuple[HostDevice, ...], d.Held]] = field(default_factory=dict)
    """Host → its devices, and which VMs hold."""


LEFT_OUT = ("cpu", "cpu_overload", "swap", "cluster_maintenance")
"""Filters that a policy may do without."""
COMMON = {
    "preferred_hosts": 99, "ha_reservation": 1, "affinity_vms_wish": 1, "affinity_hosts_wish": 20, "affinity_room": 50,
    "numa_match": 5, "cpus_together": 4,
}  # fmt: skip
FACTORS = {
    "none": {"cpu_even": 2, "memory_even": 1},
    "evenly_distributed": {"cpu_even": 2, "memory_even": 1},
    "power_saving": {"cpu_saving": 2, "memory_saving": 1},
    "vm_evenly_distributed": {"guests_even": 2},
    "cluster_maintenance": {"cpu_even": 2, "memory_even": 1},
}


def filters(world: World) -> set[str]:
    """Of those that may be left out, the ones that count."""
    if world.given is not None:
        return set(world.given.filters) & set(LEFT_OUT)
    closed = {"cluster_maintenance"} if world.policy.balance == "cluster_maintenance" else set()
    return {"cpu", "cpu_overload", "swap"} | closed


def factors(world: World) -> dict[str, float]:
    return world.given.weights if world.given is not None else FACTORS[world.policy.balance] | COMMON


def ranked(world: World) -> bool:
    return world.given is not None and world.given.selector == "rank"


def figure(world: World, name: str, otherwise: float) -> float:
    """A parameter of the policy, or what the settings say."""
    return otherwise if world.given is None else world.given.parameters.get(name, otherwise)


# Affinity groups


def closure(groups: Sequence[Group], vms: Collection[str]) -> dict[tuple[str, str], bool]:
    """Who is with whom, by Warshall."""
    one = {
        (v, w): v == w or any(g.vm_enforcing and g.vm_rule == "positive" and {v, w} <= g.vms for g in groups)
        for v, w in product(vms, repeat=2)
    }
    for mid, v, w in product(vms, repeat=3):
        one[v, w] = one[v, w] or (one[v, mid] and one[mid, w])
    return one


def allowed(groups: Sequence[Group], seats: Mapping[str, Seat], vm: str, host: str) -> tuple[bool, bool]:
    """Whether groups let a VM run on a host, by where other VMs are and by the groups' hosts, as one would say it."""
    vms = sorted({vm, *seats, *(v for g in groups for v in g.vms)})
    with_ = closure(groups, vms)
    others = [v for v in vms if v != vm and v in seats]
    mates = [seats[v].host_ids for v in others if with_[vm, v] and seats[v].host_ids]
    suits = not mates or (all(len(m) == 1 for m in mates) and any(host in m for m in mates))
    for rival in (v for v in others if host in seats[v].host_ids):
        for g in groups:
            if g.vm_enforcing and g.vm_rule == "negative":
                pairs = permutations(g.vms, 2)
                suits = suits and not any(with_[vm, v] and with_[rival, w] for v, w in pairs)
    bound = True
    for g in groups:
        if g.host_enforcing and any(with_[vm, v] for v in g.vms):
            bound = bound and (g.host_rule != "positive" or host in g.hosts)
            bound = bound and (g.host_rule != "negative" or host not in g.hosts)
    return suits, bound


def broken_wishes(world: World, vm: str, host: str, *, about_vms: bool) -> list[float]:
    """The priorities of the wishes of a VM's own groups that a host breaks, the highest first."""
    said = []
    for g in world.groups:
        rule, enforcing = (g.vm_rule, g.vm_enforcing) if about_vms else (g.host_rule, g.host_enforcing)
        if vm not in g.vms or enforcing or rule == "disabled":
            continue
        at = g.hosts
        if about_vms:
            at = frozenset(h for v in g.vms - {vm} if v in world.seats for h in world.seats[v].host_ids)
        if (at or not about_vms) and (host in at) is not (rule == "positive"):
            said.append(g.priority)
    return sorted(said, reverse=True)


def wish(world: World, vm: str, host: str, *, about_vms: bool) -> float:
    """1 for hosts that break least, 0 for those that break most, compared like words; of all hosts of the fleet."""
    words = {h.id: broken_wishes(world, vm, h.id, about_vms=about_vms) for h in world.hosts}
    steps = sorted({tuple(word) for word in words.values()})
    if not any(_wishes(world, vm, about_vms=about_vms)):
        return 0.0
    return 1 - steps.index(tuple(words[host])) / max(len(steps) - 1, 1)


def _wishes(world: World, vm: str, *, about_vms: bool) -> list[bool]:
    """Whether each group of the VM wishes for anything."""
    found = []
    for g in world.groups:
        rule, enforcing = (g.vm_rule, g.vm_enforcing) if about_vms else (g.host_rule, g.host_enforcing)
        seated = any(world.seats[v].host_ids for v in g.vms - {vm} if v in world.seats)
        found.append(vm in g.vms and not enforcing and rule != "disabled" and (seated or not about_vms))
    return found


def followers(world: World, vm: str) -> list[Seat]:
    """VMs that must be with it and are nowhere; none once one of them is somewhere."""
    with_ = closure(world.groups, sorted({vm, *world.seats, *(v for g in world.groups for v in g.vms)}))
    mates = [seat for v, seat in world.seats.items() if v != vm and with_[vm, v]]
    return [] if any(mate.host_ids for mate in mates) else mates


# Rules


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
    if vcpus(world, need, host) > host.cpus:
        refused.add("cpu")
    alone = need.cpu_pinning.policy in ("dedicated", "isolate_threads")
    if not alone and shared_limit(world, host) - host.vcpus_used < vcpus(world, need, host):
        refused.add("cpu_overcommit")
    if lacks_cpus(world, need, host):
        refused.add("cpu_pinning")
    if host.memory_limit_bytes - host.memory_used_bytes < taken(place, config):
        refused.add("memory")
    if need.hugepage_kib:
        left = {
            2048: host.pages_2m - host.pages_2m_used,
            1048576: host.pages_1g - host.pages_1g_used,
        }[need.hugepage_kib]
        if left * need.hugepage_kib * 1024 < need.memory_bytes:
            refused.add("huge_pages")
    if short_cells(world, need, host):
        refused.add("numa")
    if not gives_devices(world, need, host):
        refused.add("host_devices")
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
    if place.purpose == "start" and not need.high_availability:
        refused.add("cluster_maintenance")
    busy = world.busy_since.get(host.id)
    limit = 60 * figure(world, "CpuOverCommitDurationMinutes", config.overload_seconds / 60)
    if limit and place.purpose != "restart" and busy is not None and world.now - busy >= limit:
        refused.add("cpu_overload")
    may_swap = figure(world, "MaximumAllowedSwapUsage", config.swap_percent)
    if world.swapped.get(host.id, 0) > int(host.memory_bytes * may_swap / 100):
        refused.add("swap")
    if machine and host.machines and machine not in host.machines:
        refused.add("machine")
    suits_vms, suits_hosts = allowed(world.groups, world.seats, need.vm_id, host.id)
    if not suits_vms:
        refused.add("affinity_vms")
    if not suits_hosts:
        refused.add("affinity_hosts")
    return refused - (set(LEFT_OUT) - filters(world))


KINDS = {0: 0, 2048: 1, 1048576: 2}
"""Which of a cell's figures a VM takes, by its huge pages: memory in bytes, or pages."""


def short_cells(world: World, need: Need, host: HostFigures) -> list[int]:
    """Cells that lack CPUs or memory for the nodes that are pinned to them."""
    cells, kind = {c.cell: c for c in world.cells.get(host.id, ())}, KINDS[need.hugepage_kib]
    if need.cpu_pinning.policy == "resize_and_pin":
        return short_of_resized(world, need, host)
    pinned = [n for n in need.numa_nodes if n.host_cells and n.mode != "preferred"]
    found = []
    for cell in sorted({c for node in pinned for c in node.host_cells}):
        nodes = [n for n in pinned if cell in n.host_cells]
        shares = [-(-amount(n.memory_bytes, need.hugepage_kib) // len(n.host_cells)) for n in nodes]
        if not need.hugepage_kib:
            shares = [
                -(-s // 4096) * 4096 if len(n.host_cells) > 1 else s
                for s, n in zip(shares, nodes, strict=True)
            ]
        cpus = max((len(n.vcpus) for n in nodes if n.mode == "strict"), default=0)
        figures = cells.get(cell)
        if figures is None or figures.cpus < cpus or figures.limit[kind] - figures.used[kind] < sum(shares):
            found.append(cell)
    return found


def short_of_resized(world: World, need: Need, host: HostFigures) -> list[int]:
    """Cells that lack CPUs or memory for the nodes of a VM that follows them; none where it can't."""
    found, kind = resized(world, need, host), KINDS[need.hugepage_kib]
    if found is None or not found[1]:
        return []
    if need.shape is not None:
        nodes = {node.host_cells[0]: len(node.vcpus) for node in need.shape.numa_nodes}
        if (need.shape.vcpus, nodes) != found or cant_be_resized(
            dataclasses.replace(world, held={}), need, host
        ):
            return []
    shares = resized_shares(need, len(found[1]))
    if min(shares) <= 0:
        return []
    there = {c.cell: c for c in world.cells.get(host.id, ())}
    return [
        cell
        for cell, share in zip(sorted(found[1]), shares, strict=True)
        if cell not in there
        or there[cell].cpus < found[1][cell]
        or there[cell].limit[kind] - there[cell].used[kind] < math.ceil(share)
    ]


def matching(world: World, need: Need, host: HostFigures) -> float:
    """The share of a VM's nodes of which each would fit alone into a cell: one that it is pinned to, or any."""
    kind, cells = KINDS[need.hugepage_kib], world.cells.get(host.id, ())
    suits = [
        any(
            (not node.host_cells or c.cell in node.host_cells)
            and c.cpus >= len(node.vcpus)
            and c.limit[kind] - c.used[kind] >= amount(node.memory_bytes, need.hugepage_kib)
            for c in cells
        )
        for node in need.numa_nodes
    ]
    return sum(suits) / max(len(suits), 1)


def taken(place: Place, config: SchedulerConfig) -> int:
    """Bytes of memory that the VM takes of its host besides huge pages."""
    ordinary = 0 if place.need.hugepage_kib else place.need.memory_bytes
    return ordinary + config.guest_overhead_mib * MIB


def whole_room_lost(
    world: World, neighbours: Sequence[HostFigures], host: HostFigures, memory: int, vcpus: int
) -> float:
    """How many hosts of the cluster's average fit into what is left, before less after the VM; of the most it could lose."""
    count = max(len(neighbours), 1)
    of_memory = max(sum(h.memory_limit_bytes for h in neighbours) / count, 1)
    of_vcpus = max(sum(shared_limit(world, h) for h in neighbours) / count, 1)
    left_memory = host.memory_limit_bytes - host.memory_used_bytes
    left_vcpus = shared_limit(world, host) - host.vcpus_used
    before = min(left_memory / of_memory, left_vcpus / of_vcpus)
    after = min((left_memory - memory) / of_memory, (left_vcpus - vcpus) / of_vcpus)
    lost = (before - after) / max(memory / of_memory, vcpus / of_vcpus)
    return min(max(lost, 0.0), 1.0)


def free_of_cells(world: World, host: HostFigures, number: int) -> int:
    """The most CPUs that nobody is pinned to or has alone, of any so many cells of a host."""
    held, cores = world.held.get(host.id, FREE), read_cores(host.cores)
    taken = held.exclusive | held.pinned
    free = [(core.cell, cpu) for core in cores for cpu in core.cpus if cpu not in taken]
    cells = {core.cell for core in cores}
    some = combinations(cells, min(number, len(cells)))
    return max((sum(cell in chosen for cell, _ in free) for chosen in some), default=0)


def score(unit: str, world: World, place: Place, host: HostFigures, config: SchedulerConfig) -> float:
    """One weight of one host, from 0 to 1."""
    need = place.need
    fresh = world.fresh_vcpus.get(host.id, 0) + vcpus(world, need, host)
    load = world.cpu_percent.get(host.id, 0.0) / 100
    load += config.vcpu_load_percent / 100 * fresh / max(host.cpus, 1)
    share = (host.memory_used_bytes + taken(place, config)) / max(host.memory_limit_bytes, 1)
    neighbours = [h for h in world.hosts if h.cluster_id == need.cluster_id]
    match unit:
        case "cpu_even":
            ratio = figure(world, "VCpuToPhysicalCpuRatio", 0)
            too_many = ratio and host.vcpus_used + vcpus(world, need, host) >= ratio * host.cpus
            return 0.0 if too_many else 1 - min(load, 1.0)
        case "memory_even":
            return 1 - min(share, 1.0)
        case "cpu_saving":
            high = figure(world, "HighUtilization", config.high_utilization_percent) / 100
            return min(load, 1.0) if load <= high else 0.0
        case "memory_saving":
            return min(share, 1.0)
        case "fragmentation":
            return 1 - whole_room_lost(
                world, neighbours, host, taken(place, config), vcpus(world, need, host)
            )
        case "guests_even":
            most = max((h.guests for h in neighbours), default=0)
            return 1 - min(host.guests / max(most, 1), 1.0)
        case "ha_reservation":
            if not (need.high_availability and world.policy.reserve_host_failures):
                return 0.0
            most = max((h.ha_guests for h in neighbours), default=0)
            return (1 - min(host.ha_guests / max(most, 1), 1.0)) / figure(world, "ScaleDown", 1)
        case "preferred_hosts":
            return float(host.id in need.preferred_host_ids)
        case "affinity_vms_wish":
            return wish(world, need.vm_id, host.id, about_vms=True)
        case "affinity_hosts_wish":
            return wish(world, need.vm_id, host.id, about_vms=False)
        case "cpus_together":
            if need.cpu_pinning.policy not in ("dedicated", "isolate_threads"):
                return 0.0
            return next((1 / n for n in (1, 2) if free_of_cells(world, host, n) >= need.vcpus), 0.0)
        case "numa_match":
            return matching(world, need, host)
        case "affinity_room":
            mates = followers(world, need.vm_id)
            memory = taken(place, config) + sum(mate.memory for mate in mates)
            wanted = vcpus(world, need, host) + sum(mate.vcpus for mate in mates)
            fits = host.memory_used_bytes + memory <= host.memory_limit_bytes
            return float(bool(mates) and fits and host.vcpus_used + wanted <= shared_limit(world, host))
    return 0.0


def weights(world: World, place: Place, host: HostFigures, config: SchedulerConfig) -> dict[str, float]:
    """Weight → its share of one host's sum. By rank: of those that fit, how many are no better, itself not counted."""
    fitting = [h for h in considered(world, place) if not refusals(world, place, h, config)]
    found = {}
    for unit, factor in factors(world).items():
        figures = {h.id: score(unit, world, place, h, config) for h in world.hosts}
        found[unit] = factor * figures[host.id]
        if ranked(world):
            exact = {h: round(figures[h] * 1e9) for h in figures}
            better = sum(exact[h.id] > exact[host.id] for h in fitting)
            found[unit] = factor * (len(fitting) - 1 - better)
    own = sum(factors(world).values())
    wish = max(300.0, own + 1)
    times = max(len(fitting), 1) if ranked(world) else 1
    found["wished_host"] = times * wish if host.id == place.preferred_host_id else 0.0
    found["avoided_hosts"] = (
        -times * max(1000.0, own + wish + 1) if host.id in place.avoided_host_ids else 0.0
    )
    return found


def best(world: World, place: Place, config: SchedulerConfig) -> list[str]:
    """The hosts that fit and whose sums nobody exceeds by more than rounding; the lowest id first."""
    sums = {
        h.id: sum(weights(world, place, h, config).values())
        for h in considered(world, place)
        if not refusals(world, place, h, config)
    }
    return sorted(h for h, total in sums.items() if total > max(sums.values()) - 2e-9)
