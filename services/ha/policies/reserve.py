"""Whether a cluster has room for the highly available VMs of hosts that die together. Pure.

Memory and vCPUs are counted as the scheduler does, VMs packed the largest first onto the host with the most memory left:
not the best packing there is, so that what is said to fit does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import combinations
from math import comb

GIB = 1024**3
MOST_COMBINATIONS = 100
"""More ways to lose hosts than this aren't all tried: then those with the most to bring back."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A highly available VM and what it takes."""

    name: str
    cluster_id: str
    host_id: str
    """Where it runs; "" nowhere."""
    memory_bytes: int | None
    """Overhead included; None: it is on its way."""
    vcpus: int


@dataclass(frozen=True, slots=True)
class HostRoom:
    """What a host that is up may still be promised."""

    id: str
    name: str
    memory_bytes: int
    vcpus: int


@dataclass(frozen=True, slots=True)
class Missing:
    """Hosts that could not die together, and the largest VM of them for which there is no room."""

    hosts: tuple[str, ...]
    vm: str
    memory_bytes: int
    vms: int
    """How many find no room, that one included."""


def missing(hosts: Sequence[HostRoom], vms: Sequence[Standing], failures: int) -> Missing | None:
    """None: whichever so many hosts die, all of their VMs find room."""
    on: dict[str, list[Standing]] = defaultdict(list)
    for vm in vms:
        on[vm.host_id].append(vm)
    for lost in _ways(hosts, on, failures):
        ids = {host.id for host in lost}
        homeless = [vm for host in lost for vm in on[host.id]]
        left = _pack([host for host in hosts if host.id not in ids], homeless) if homeless else []
        if left:
            names = tuple(host.name for host in lost)
            return Missing(names, left[0].name, left[0].memory_bytes or 0, len(left))
    return None


def _ways(
    hosts: Sequence[HostRoom], on: Mapping[str, Sequence[Standing]], failures: int
) -> Iterator[tuple[HostRoom, ...]]:
    """Those who have the most to bring back first."""
    count = min(failures, len(hosts))
    brought = {host.id: sum(vm.memory_bytes or 0 for vm in on.get(host.id, ())) for host in hosts}
    ordered = sorted(hosts, key=lambda h: (-brought[h.id], h.id))
    while comb(len(ordered), count) > MOST_COMBINATIONS and len(ordered) > count:
        ordered.pop()
    return combinations(ordered, count)


def _pack(hosts: Sequence[HostRoom], vms: Sequence[Standing]) -> list[Standing]:
    """VMs that find no room, the largest first."""
    rooms = [(-host.memory_bytes, host.id, host.vcpus) for host in hosts]
    heapify(rooms)
    left = []
    for vm in sorted(vms, key=lambda v: (-(v.memory_bytes or 0), v.name)):
        passed, need = [], vm.memory_bytes or 0
        while rooms and -rooms[0][0] >= need and rooms[0][2] < vm.vcpus:
            passed.append(heappop(rooms))
        if rooms and -rooms[0][0] >= need:
            memory, host_id, vcpus = heappop(rooms)
            passed.append((memory + need, host_id, vcpus - vm.vcpus))
        else:
            left.append(vm)
        for room in passed:
            heappush(rooms, room)
    return left


def sentences(cluster: str, failures: int, found: Missing) -> tuple[str, str]:
    """What is missing, and the smallest change."""
    hosts = " and ".join(found.hosts)
    more = f" and {found.vms - 1} more" if found.vms > 1 else ""
    size = f"{found.memory_bytes / GIB:.1f} GiB"
    return (
        f"cluster {cluster} is to have room for {failures} hosts' highly available VMs, but if {hosts} died, VM "
        f"{found.vm} ({size}){more} would find none",
        f"free memory and vCPUs for {found.vms} VMs on its other hosts, add a host, or reserve for fewer failures",
    )
