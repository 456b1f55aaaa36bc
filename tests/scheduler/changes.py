"""Changes that a remedy proposes, carried out on a world for tests: all of them, or one unit less."""

from __future__ import annotations

from dataclasses import replace as with_
from typing import Any

from msgspec.structs import replace

from services.scheduler.figures import HostFigures
from services.scheduler.model import limits
from services.scheduler.policies.affinity import Group
from tests.scheduler.oracle import World
from tests.scheduler.worlds import CONFIG, GIB, MIB
from volery.contracts.host_devices import AskedDevice
from volery.contracts.scheduling import Change, Place


def of_host(world: World, host_id: str, **fields: Any) -> World:
    return with_(world, hosts=tuple(with_(h, **fields) if h.id == host_id else h for h in world.hosts))


def of_cluster(world: World, **fields: Any) -> World:
    """Every host of the cluster has its limits anew."""
    policy = with_(world.policy, **fields)

    def limited(host: HostFigures) -> HostFigures:
        new = limits(host.memory_bytes, host.cpus, policy, CONFIG)
        return with_(host, memory_limit_bytes=new.memory_bytes, vcpus_limit=new.vcpus)

    hosts = tuple(limited(h) if h.cluster_id == policy.id else h for h in world.hosts)
    return with_(world, hosts=hosts, policy=policy)


def applied(world: World, place: Place, change: Change, less: int = 0) -> tuple[World, Place]:
    """The world and the question after a change, or after one that is `less` units smaller; by one unit where there is
    nothing to count is not at all."""
    need, to = place.need, change.wanted
    if less and not isinstance(to, int | float):
        return world, place
    match change.object_kind, change.field:
        case "host", "status":
            return of_host(world, change.object_id, status=to), place
        case "host", ("memory_used_bytes" | "vcpus_used") as field:
            return of_host(world, change.object_id, **{field: to + less}), place
        case "host", "cpu_percent":
            busy = {h: since for h, since in world.busy_since.items() if h != change.object_id}
            return with_(world, busy_since=busy), place
        case "host", "swapped_bytes":
            return with_(world, swapped=world.swapped | {change.object_id: to + less}), place
        case "cluster", "balance":
            return of_cluster(world, balance=to), place
        case "affinity_group", field:
            groups = tuple(
                loosened(g, field, change) if g.id == change.object_id else g for g in world.groups
            )
            return with_(world, groups=groups), place
        case "scheduling_policy", "filters":
            assert world.given is not None
            kept = tuple(f for f in world.given.filters if f != change.current)
            return with_(world, given=replace(world.given, filters=kept)), place
        case "cluster", "memory_overcommit_percent":
            return of_cluster(world, memory_overcommit_percent=to - less), place
        case "cluster", "cpu_overcommit_ratio":
            return of_cluster(world, cpu_overcommit_ratio=round(to * 10 - less) / 10), place
        case "host", ("pages_2m_used" | "pages_1g_used") as field:
            return of_host(world, change.object_id, **{field: to + less}), place
        case "host", ("pages_2m" | "pages_1g") as field:
            return with_more_pages(world, change.object_id, field, to - less), place
        case "vm", "memory_bytes" if change.unit == "pages":
            size = need.hugepage_kib * 1024
            assert to % size == 0, "only whole pages"
            return world, replace(place, need=replace(need, memory_bytes=to + less * size))
        case "host", field if field.startswith("cells["):
            return of_cell(world, change.object_id, field, to + less), place
        case "vm", "numa_nodes":
            assert to == "unpinned"
            free = tuple(replace(node, host_cells=()) for node in need.numa_nodes)
            return world, replace(place, need=replace(need, numa_nodes=free))
        case "vm", "hugepage_kib":
            assert to == 0 or need.memory_bytes % (to * 1024) == 0
            return world, place if less else replace(place, need=replace(need, hugepage_kib=to))
        case "vm", "host_devices":
            wanted = to.split(", ") if to else []
            kept = tuple(replace(ask, count=n) for ask in need.host_devices for n in _left(ask, wanted))
            assert sum(a.count for a in need.host_devices) - sum(a.count for a in kept) == change.amount
            return world, replace(place, need=replace(need, host_devices=kept))
        case "vm", "memory_bytes":
            return world, replace(place, need=replace(need, memory_bytes=to + less * MIB))
        case "vm", ("vcpus" | "cpu_model" | "machine") as field:
            return world, replace(place, need=replace(need, **{field: to + less if less else to}))
        case "vm", "affinity.host_ids":
            return world, replace(place, need=replace(need, host_ids=(*need.host_ids, to)))
        case "vm", "nics":
            kept = tuple(n for n in need.network_ids if n != change.current)
            return world, replace(place, need=replace(need, network_ids=kept))
        case "network", "ready_host_ids":
            networks = tuple(
                with_(n, host_ids=n.host_ids | {to}) if n.id == change.object_id else n
                for n in world.networks
            )
            return with_(world, networks=networks), place
        case "disks", "storage_host_ids":
            return world, replace(place, need=replace(need, storage_host_ids=(*need.storage_host_ids, to)))
        case "placement", "target_host_id":
            return world, replace(place, target_host_id=to)
        case "placement", "excluded_host_ids":
            return world, replace(
                place, excluded_host_ids=tuple(h for h in place.excluded_host_ids if h != change.current)
            )
    raise AssertionError(f"a change that nobody can make: {change}")


def _left(ask: AskedDevice, wanted: list[str]) -> list[int]:
    """How many of it are still asked for, if any."""
    return [n for n in range(ask.count, 0, -1) if replace(ask, count=n).text in wanted]


def of_cell(world: World, host_id: str, field: str, used: int) -> World:
    """`cells[0].memory_used`, with another figure."""
    number, name = field.removeprefix("cells[").split("].")
    changed = tuple(
        with_(c, used=c.used._replace(**{name.removesuffix("_used"): used})) if c.cell == int(number) else c
        for c in world.cells[host_id]
    )
    return with_(world, cells={**world.cells, host_id: changed})


def with_more_pages(world: World, host_id: str, field: str, count: int) -> World:
    """More huge pages of one size on a host: what they take, its ordinary memory has no more."""
    host = next(h for h in world.hosts if h.id == host_id)
    size = {"pages_2m": 2 * MIB, "pages_1g": GIB}[field]
    memory = host.memory_bytes - (count - getattr(host, field)) * size
    assert memory >= 0
    limit = limits(memory, host.cpus, world.policy, CONFIG).memory_bytes
    return of_host(world, host_id, **{field: count, "memory_bytes": memory, "memory_limit_bytes": limit})


def loosened(group: Group, field: str, change: Change) -> Group:
    match field:
        case "vm_ids":
            assert change.current in group.vms
            return with_(group, vms=group.vms - {change.current})
        case "vm_enforcing":
            assert (change.current, change.wanted) == ("true", "false")
            return with_(group, vm_enforcing=False)
        case "host_ids":
            assert change.current or change.wanted
            return with_(group, hosts=(group.hosts - {change.current}) | ({change.wanted} - {""}))
    raise AssertionError(f"a field that no group has: {field}")
