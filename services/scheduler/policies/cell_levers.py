"""Levers of the rule about NUMA cells; what a lever is says levers.py."""

from __future__ import annotations

import numpy as np

from services.scheduler.cells import CELLS, CELLS_USED
from services.scheduler.fleet import Fleet, Ints
from services.scheduler.policies import numa
from services.scheduler.policies.levers import NEVER, Lever
from services.scheduler.policies.request import Request
from volery.contracts.scheduling import Change, ChangeKind

RULE = "numa"


def _lacks(fleet: Fleet, request: Request) -> list[tuple[int, int, int, Ints]]:
    """Cell, kind of memory, how much of it is wanted, and how much each host lacks."""
    return [
        (need.cell, number, wanted, wanted - numa.left(fleet, number)[:, need.cell])
        for need in request.cells
        for number, wanted in enumerate(need.taken)
        if wanted
    ]


def _to_free(fleet: Fleet, request: Request) -> Ints:
    """Of one cell, where nothing else of any cell is missing: what is short in several is no one amount."""
    amount = np.zeros(len(fleet), np.int64)
    short = np.zeros(len(fleet), np.int64)
    possible = np.logical_and.reduce([numa.has_cpus(fleet, need) for need in request.cells])
    for cell, number, wanted, lacking in _lacks(fleet, request):
        short += lacking > 0
        amount = np.maximum(amount, lacking)
        possible &= fleet.ints(CELLS[number])[:, cell] >= wanted
    return np.where(possible & (short == 1), amount, NEVER)


def free_cell(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    cell, number = next((c, n) for c, n, _, lacking in _lacks(fleet, request) if lacking[row] > 0)
    name, used = fleet.names[row], int(fleet.ints(CELLS_USED[number])[row, cell])
    return Change(
        rules=(), kind=ChangeKind.HOST, object_kind="host", object_id=fleet.ids[row], object_name=name,
        field=f"cells[{cell}].{CELLS_USED[number].removeprefix('cell_')}", current=used, wanted=used - amount, amount=amount,
        unit="pages" if number else "bytes",
        sentence=f"move or stop VMs whose nodes hold {numa.told(number, amount)} of NUMA cell {cell} of {name}",
    )  # fmt: skip


def _once(fleet: Fleet, request: Request) -> Ints:
    return np.ones(len(fleet), np.int64)


def unpin(fleet: Fleet, request: Request, row: int, amount: int) -> Change:
    return Change(
        rules=(), kind=ChangeKind.VM, object_kind="vm", object_id=request.need.vm_id, object_name=request.need.name,
        field="numa_nodes", wanted="unpinned", sentence=f"let the NUMA nodes of {request.vm} be in any cell",
    )  # fmt: skip


def _scale(request: Request) -> int:
    return max(max(need.taken) for need in request.cells)


CELL_LEVERS: tuple[Lever, ...] = (
    Lever(RULE, ChangeKind.HOST, "cells", _to_free, free_cell, _scale),
    Lever(RULE, ChangeKind.VM, "numa_nodes", _once, unpin),
)
