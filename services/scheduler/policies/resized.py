"""A VM that is resized to its host: how many vCPUs it has on each, and whether a host can give it what it would run with.

Other rules ask here how many vCPUs a VM has, which is its own number on every host unless it is resized.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from services.scheduler.cells import CellNeed, needs_of
from services.scheduler.fleet import Bools, Fleet, Ints
from services.scheduler.policies.cpus import HostCpus, has_outline
from services.scheduler.policies.outline import bare, divides, outline, shape
from volery.contracts.resizing import VmShape

if TYPE_CHECKING:
    from services.scheduler.policies.request import Request


def is_resized(request: Request) -> bool:
    return request.wish is not None and request.wish.resized


def vcpus(fleet: Fleet, request: Request) -> Ints | int:
    """Of the VM on each host; 0 where it can't be resized."""
    if not is_resized(request):
        return request.need.vcpus
    return fleet.of_cpus(("resized vcpus", 0), lambda host: outline(host.cores).vcpus)


def vcpus_at(fleet: Fleet, request: Request, row: int) -> int:
    return outline(fleet.cpus_of(row).cores).vcpus if is_resized(request) else request.need.vcpus


def shape_at(fleet: Fleet, request: Request, row: int) -> VmShape | None:
    """What it would run with; None for a VM that runs with what is its own, and where it can't be resized."""
    return _shape(request, fleet.cpus_of(row)) if is_resized(request) else None


def _shape(request: Request, host: HostCpus) -> VmShape | None:
    """One that runs keeps its own, whatever memory it is to have when it starts anew."""
    found, need = outline(host.cores), request.need
    if found.why_not:
        return None
    if need.shape is not None:
        return need.shape if bare(need.shape) == shape(found, 0, 0) else None
    if not divides(found, need.memory_bytes, need.hugepage_kib):
        return None
    return shape(found, need.memory_bytes, need.hugepage_kib)


def suits(fleet: Fleet, request: Request) -> Bools:
    """Of a VM that is resized."""
    mask = np.zeros(len(fleet), np.bool_)
    for host, same in _kinds(fleet):
        if _shape(request, host) is not None:
            mask |= same
    mask &= fleet.of_cpus(("resized", 0), has_outline) > 0
    return mask


def _kinds(fleet: Fleet) -> Iterator[tuple[HostCpus, Bools]]:
    """One host of each kind, and those with the same cores, whoever has which of them. A fleet has few kinds."""
    cores = fleet.of_cpus(("cores", 0), lambda host: id(host.cores))  # `read_cores` has one of each
    _, rows, kinds = np.unique(cores, return_index=True, return_inverse=True)
    for number, row in enumerate(rows.tolist()):
        yield fleet.cpus_of(row), kinds == number


def unsuited(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    name, vm, host, need = fleet.names[row], request.vm, fleet.cpus_of(row), request.need
    found = outline(host.cores)
    other = f"pin {vm} otherwise, which has {_vcpus(need.vcpus)} of its own"
    if not host.cores:
        return f"{name} {found.why_not}", f"let {name} report its CPUs, or {other}"
    if found.why_not:
        return f"{vm} can't be resized to {name}, which {found.why_not}", other
    given = f"{name} would give {vm} {_vcpus(found.vcpus)} ({_built(shape(found, 0, 0))})"
    others = sorted(host.exclusive.intersection(cpu for pins in found.pins for cpu in pins))
    if others:
        listed = ", ".join(map(str, others))
        return (
            f"{given}, but CPU {listed} of it is another VM's alone",
            f"move away from {name} who has CPUs alone, or {other}",
        )
    if need.shape is None:
        return (
            f"{given} in {len(found.cells)} NUMA nodes, and its memory can't be divided among so many",
            f"give {vm} memory for {len(found.cells)} nodes, or {other}",
        )
    return (
        f"{given}, and {vm} runs with {_vcpus(need.shape.vcpus)} ({_built(need.shape)}), which can't change while it runs",
        f"move {vm} to a host that is built as its own is, or stop it and start it on {name}",
    )


def _built(found: VmShape) -> str:
    nodes = f", in NUMA cells {_cells(found)}" if found.numa_nodes else ""
    return f"{found.sockets} x {found.cores} x {found.threads}{nodes}"


def _cells(found: VmShape) -> str:
    return ", ".join(str(cell) for node in found.numa_nodes for cell in node.host_cells)


def _vcpus(count: int) -> str:
    return f"{count} vCPU{'s' if count != 1 else ''}"


# NUMA cells


def nodes(fleet: Fleet, request: Request) -> Ints | int:
    """How many NUMA nodes each host would give it."""
    if not is_resized(request):
        return 0
    return fleet.of_cpus(("resized nodes", 0), lambda host: len(outline(host.cores).cells))


def cells_at(fleet: Fleet, request: Request, row: int) -> tuple[CellNeed, ...]:
    """What the VM asks of the host's cells."""
    found = shape_at(fleet, request, row)
    return request.cells if found is None else needs_of(found.numa_nodes, request.need.hugepage_kib)


def by_cells(fleet: Fleet, request: Request) -> Iterator[tuple[tuple[CellNeed, ...], Bools]]:
    """What it asks of the cells of these hosts, wherever that is anything."""
    if not is_resized(request):
        if request.cells:
            yield request.cells, fleet.everyone
        return
    for host, same in _kinds(fleet):
        found = _shape(request, host)
        if found is not None and found.numa_nodes:
            yield needs_of(found.numa_nodes, request.need.hugepage_kib), same


def taken(fleet: Fleet, request: Request, host_id: str) -> tuple[int, tuple[CellNeed, ...]]:
    """vCPUs, and what of NUMA cells, that the VM takes of one host."""
    if not is_resized(request) or host_id not in fleet.rows:
        return request.need.vcpus, request.cells
    row = fleet.rows[host_id]
    return vcpus_at(fleet, request, row), cells_at(fleet, request, row)
