"""Filters: each says of every host at once whether it could take the VM, and of one host why not.

A filter is one row of FILTERS: its name, a mask over the fleet, and the sentence for a host it excludes with the
smallest change that would let it pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.scheduler.fleet import UP, Bools, Fleet
from services.scheduler.policies import assigned, backing, bound, numa, pinned, resized, strain
from services.scheduler.policies.request import Request, size
from volery.contracts.host import HostStatus

Mask = Callable[[Fleet, Request], Bools]
Explain = Callable[[Fleet, Request, int], tuple[str, str]]
"""(fleet, request, row) → the reason, the smallest change."""


@dataclass(frozen=True, slots=True)
class Filter:
    name: str
    mask: Mask
    explain: Explain


def in_cluster(fleet: Fleet, request: Request) -> Bools:
    return fleet.in_cluster(request.need.cluster_id)


def not_in_cluster(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    wanted = request.policy.name or request.need.cluster_id
    return (
        f"{fleet.names[row]} belongs to another cluster than {request.vm}, whose cluster is {wanted}",
        f"choose a host of cluster {wanted}",
    )


def is_target(fleet: Fleet, request: Request) -> Bools:
    target = request.place.target_host_id
    return fleet.among((target,)) if target else fleet.everyone


def not_target(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    target = request.place.target_host_id
    at = fleet.rows.get(target)
    name = fleet.names[at] if at is not None else target
    return f"only {name} was asked for", "ask for no host in particular"


def is_up(fleet: Fleet, request: Request) -> Bools:
    mask: Bools = fleet.ints("status") == UP
    return mask


def not_up(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, status = fleet.names[row], fleet.status_of(row)
    change = f"activate {name}" if "maintenance" in status else f"bring {name} up"
    if status == HostStatus.NON_OPERATIONAL:
        change = f"mend what {name} lacks: its reasons and problems say what that is"
    return f"{name} is {status}, not up", change


def is_allowed(fleet: Fleet, request: Request) -> Bools:
    pinned = request.need.host_ids
    return fleet.among(pinned) if pinned else fleet.everyone


def not_allowed(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, count = fleet.names[row], len(request.need.host_ids)
    return (
        f"{request.vm} is pinned to {count} other host{'s' if count > 1 else ''}",
        f"add {name} to the hosts that {request.vm} is pinned to",
    )


def is_not_excluded(fleet: Fleet, request: Request) -> Bools:
    excluded = request.place.excluded_host_ids
    return ~fleet.among(excluded) if excluded else fleet.everyone


def is_excluded(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name = fleet.names[row]
    return f"{name} is left out: {request.excluded_because}", "try again later without leaving it out"


def has_threads(fleet: Fleet, request: Request) -> Bools:
    if resized.is_resized(request):
        return fleet.everyone  # it gets a part of what the host has
    return fleet.with_threads(request.need.vcpus)


def too_few_threads(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, cpus = fleet.names[row], int(fleet.ints("cpus")[row])
    return (
        f"{request.vm} has {request.need.vcpus} vCPUs, {name} has {cpus} CPU threads",
        f"give {request.vm} at most {cpus} vCPUs" if cpus else f"let {name} report its capabilities",
    )


def has_vcpus(fleet: Fleet, request: Request) -> Bools:
    if request.wish is not None and request.wish.alone:
        return fleet.everyone  # it takes nothing of what is promised several times
    mask: Bools = fleet.ints("vcpus_used") + resized.vcpus(fleet, request) <= fleet.ints("vcpus_limit")
    return mask


def too_many_vcpus(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, wanted = fleet.names[row], resized.vcpus_at(fleet, request, row)
    used, limit = int(fleet.ints("vcpus_used")[row]), int(fleet.ints("vcpus_limit")[row])
    alone = int(fleet.ints("vcpus_exclusive")[row])
    cpus = max(pinned.shared_at(fleet, row)[0], 1)
    ratio = math.ceil((used - alone + wanted) / cpus * 10) / 10
    return (
        f"{used} of the {limit} vCPUs that {name} may promise are taken, {request.vm} needs {wanted}",
        f"stop VMs with {used + wanted - limit} vCPUs on {name}, or raise the cluster's CPU over-commit to {ratio:g}",
    )


def has_memory(fleet: Fleet, request: Request) -> Bools:
    return fleet.ints("memory_used") + request.memory <= fleet.ints("memory_limit")


def too_little_memory(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name = fleet.names[row]
    used, limit = int(fleet.ints("memory_used")[row]), int(fleet.ints("memory_limit")[row])
    physical = max(int(fleet.ints("memory_bytes")[row]), 1)
    short = used + request.memory - limit
    percent = math.ceil((used + request.memory + request.reserve) * 100 / physical)
    return (
        f"{name} has {size(max(limit - used, 0))} left of {size(limit)}, {request.vm} needs "
        f"{size(request.memory)} ({size(request.overhead)} of it overhead)",
        f"free {size(short)} on {name}, or raise the cluster's memory over-commit from "
        f"{request.policy.memory_overcommit_percent} to {percent} %",
    )


def has_networks(fleet: Fleet, request: Request) -> Bools:
    masks = [fleet.with_network(network_id) for network_id in request.need.network_ids]
    return np.logical_and.reduce(masks) if masks else fleet.everyone


def lacks_networks(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    missing = [n for n in request.need.network_ids if not fleet.with_network(n)[row]]
    names = ", ".join(fleet.networks[n].name if n in fleet.networks else n for n in missing)
    host = fleet.names[row]
    return f"network {names} is not ready on {host}", f"attach network {names} to {host}, or repair it there"


def reaches_storage(fleet: Fleet, request: Request) -> Bools:
    hosts = request.need.storage_host_ids
    return fleet.everyone if hosts is None else fleet.among(hosts)


def lacks_storage(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name = fleet.names[row]
    return (
        f"{name} does not reach the storage of all disks of {request.vm}",
        f"connect {name} to the storage domains of its disks, or move the disks",
    )


def has_model(fleet: Fleet, request: Request) -> Bools:
    return fleet.with_model(request.cpu_model) if request.cpu_model else fleet.everyone


def lacks_model(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name = fleet.names[row]
    return (
        f"{name} can't give the CPU model {request.cpu_model}",
        f"choose one of the {len(fleet.models_of(row))} CPU models that {name} can give",
    )


def has_machine(fleet: Fleet, request: Request) -> Bools:
    return fleet.with_machine(request.machine) if request.machine else fleet.everyone


def lacks_machine(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name = fleet.names[row]
    return (
        f"{name} has no machine type {request.machine}",
        f"choose one of the {len(fleet.machines_of(row))} machine types of {name}, or update its QEMU",
    )


FILTERS: tuple[Filter, ...] = (
    Filter("cluster", in_cluster, not_in_cluster),
    Filter("target", is_target, not_target),
    Filter("host_state", is_up, not_up),
    Filter("pinned", is_allowed, not_allowed),
    Filter("excluded", is_not_excluded, is_excluded),
    Filter("cpu", has_threads, too_few_threads),
    Filter("cpu_overcommit", has_vcpus, too_many_vcpus),
    Filter("cpu_pinning", pinned.has_cpus, pinned.lacks_cpus),
    Filter("memory", has_memory, too_little_memory),
    Filter("huge_pages", backing.has_pages, backing.too_few_pages),
    Filter("numa", numa.fits, numa.unfit),
    Filter("host_devices", assigned.has_devices, assigned.lacks_devices),
    Filter("network", has_networks, lacks_networks),
    Filter("storage", reaches_storage, lacks_storage),
    Filter("cpu_model", has_model, lacks_model),
    Filter("machine", has_machine, lacks_machine),
    Filter("affinity_vms", bound.suits_vms, bound.unsuited_vms),
    Filter("affinity_hosts", bound.suits_hosts, bound.unsuited_hosts),
    Filter("cluster_maintenance", strain.cluster_takes_starts, strain.cluster_is_maintained),
    Filter("cpu_overload", strain.is_not_overloaded, strain.is_overloaded),
    Filter("swap", strain.is_not_swapping, strain.is_swapping),
)
