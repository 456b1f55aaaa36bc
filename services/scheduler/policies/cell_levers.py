"""Levers of the rule about NUMA cells; what a lever is says levers.py."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from services.scheduler.cells import CELLS, CELLS_USED
from services.scheduler.fleet import Bools, Fleet, Ints
from services.scheduler.model import MIB
from services.scheduler.pages import SIZES
from services.scheduler.policies import backing, numa, resized
from services.scheduler.policies.levers import LEAST_MEMORY, NEVER, Lever, shrink_memory, vm_memory
from services.scheduler.policies.page_levers import shrink
from services.scheduler.policies.request import Request
from volery.contracts.scheduling import Change, ChangeKind

RULE = "numa"


class Lack(NamedTuple):
    """Of one kind of memory of a cell."""

    cell: int
    number: int
    wanted: int
    hosts: Bools
    """Of which it is wanted."""
    lacking: Ints
    """By how much each of them has too little."""


def _lacks(fleet: Fleet, request: Request) -> list[Lack]:
    return [
        Lack(
            need.cell,
            number,
            wanted,
            hosts,
            np.where(hosts, wanted - numa.left(fleet, number)[:, need.cell], 0),
        )
        for cells, hosts in resized.by_cells(fleet, request)
        for need in cells
        for number, wanted in enumerate(need.taken)
        if wanted
    ]


def _has_cpus(fleet: Fleet, request: Request) -> Bools:
    mask = fleet.everyone.copy()
    for cells, hosts in resized.by_cells(fleet, request):
        for need in cells:
            mask &= numa.has_cpus(fleet, need) | ~hosts
    return mask


def _to_free(fleet: Fleet, request: Request) -> Ints:
    """Of one cell, where nothing else of any cell is missing: what is short in several is no one amount."""
    amount = np.zeros(len(fleet), np.int64)
    short = np.zeros(len(fleet), np.int64)
    possible = _has_cpus(fleet, request)
    for cell, number, wanted, hosts, lacking in _lacks(fleet, request):
        short += lacking > 0
        amount = np.maximum(amount, lacking)
        possible &= (fleet.ints(CELLS[number])[:, cell] >= wanted) | ~hosts
    return np.where(possible & (short == 1), amount, NEVER)


def free_cell(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    cell, number = next((lack.cell, lack.number) for lack in _lacks(fleet, request) if lack.lacking[row] > 0)
    name, used = fleet.names[row], int(fleet.ints(CELLS_USED[number])[row, cell])
    return Change(
        rules=(), kind=ChangeKind.HOST, object_kind="host", object_id=fleet.ids[row], object_name=name,
        field=f"cells[{cell}].{CELLS_USED[number].removeprefix('cell_')}", current=used, wanted=used - amount, amount=amount,
        unit="pages" if number else "bytes",
        sentence=f"move or stop VMs whose nodes hold {numa.told(number, amount)} of NUMA cell {cell} of {name}",
    )  # fmt: skip


def _can_unpin(fleet: Fleet, request: Request) -> Ints:
    """Nodes that follow its host are where that host's cells are."""
    return np.full(len(fleet), NEVER if resized.is_resized(request) else 1, np.int64)


def unpin(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    return Change(
        rules=(), kind=ChangeKind.VM, object_kind="vm", object_id=request.need.vm_id, object_name=request.need.name,
        field="numa_nodes", wanted="unpinned", sentence=f"let the NUMA nodes of {request.vm} be in any cell",
    )  # fmt: skip


def _most(fleet: Fleet, request: Request, number: int, unit: int) -> Ints:
    """Of how many units the memory of a VM can be that is shared out among the cells of its host; 0 where none would do. Of m
    units the cell number i of n gets at most s where m <= s * n + i."""
    most = np.zeros(len(fleet), np.int64)
    if not resized.is_resized(request) or request.need.shape is not None:
        return most
    has_cpus = _has_cpus(fleet, request)
    for cells, hosts in resized.by_cells(fleet, request):
        free = np.stack([numa.left(fleet, number)[:, each.cell] for each in cells], axis=1) // unit
        found = (free * len(cells) + np.arange(len(cells))).min(axis=1)
        most = np.where(hosts & has_cpus & (found >= len(cells)), found, most)
    return most


def _too_much(fleet: Fleet, request: Request) -> Ints:
    """Whole MiB by which the VM is too large."""
    most = _most(fleet, request, 0, MIB) * MIB
    possible = (most >= LEAST_MEMORY) & (not request.need.hugepage_kib)
    return np.where(possible, -((most - request.need.memory_bytes) // MIB), NEVER)


def _pages_too_many(fleet: Fleet, request: Request) -> Ints:
    """As many huge pages."""
    if not request.need.hugepage_kib:
        return np.full(len(fleet), NEVER, np.int64)
    number = backing.number_of(request)
    most = _most(fleet, request, 1 + number, 1)
    return np.where(most * SIZES[number] >= LEAST_MEMORY, request.pages[number] - most, NEVER)


def _scale(request: Request) -> int:
    return max((max(need.taken) for need in request.cells), default=max(request.need.memory_bytes, 1))


CELL_LEVERS: tuple[Lever, ...] = (
    Lever(RULE, ChangeKind.HOST, "cells", _to_free, free_cell, _scale),
    Lever(RULE, ChangeKind.VM, "numa_nodes", _can_unpin, unpin),
    Lever(RULE, ChangeKind.VM, "memory_bytes", _too_much, shrink_memory, vm_memory),
    Lever(RULE, ChangeKind.VM, "memory in pages", _pages_too_many, shrink, lambda r: max(*r.pages, 1)),
)
