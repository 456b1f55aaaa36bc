"""NUMA cells as rules: whether a host's cells have room for the nodes that are pinned to them, and which hosts' cells suit
a VM's other nodes.

What is left of a cell is what claims of pinned nodes leave of it. The memory of other VMs may be in any cell; nobody knows.
"""

from __future__ import annotations

import numpy as np

from services.scheduler.cells import CELL_CPUS, CELLS, CELLS_USED, WORDS, CellNeed, taken_by
from services.scheduler.fleet import Bools, Fleet, Floats, Ints
from services.scheduler.policies import resized
from services.scheduler.policies.request import Request, size
from volery.contracts.domain import MOST_CELLS, NumaNode


def fits(fleet: Fleet, request: Request) -> Bools:
    mask = np.ones(len(fleet), np.bool_)
    for cells, hosts in resized.by_cells(fleet, request):
        for need in cells:
            mask &= has_cpus(fleet, need) | ~hosts
            for number, wanted in enumerate(need.taken):
                if wanted:
                    mask &= (left(fleet, number)[:, need.cell] >= wanted) | ~hosts
    return mask


def has_cpus(fleet: Fleet, need: CellNeed) -> Bools:
    """A cell has CPUs or memory, or there is none."""
    cpus = fleet.ints(CELL_CPUS)[:, need.cell]
    mask: Bools = cpus >= need.cpus
    return mask


def left(fleet: Fleet, number: int) -> Ints:
    """Of each cell of each host what no claim holds: of memory (0), or of huge pages of a size."""
    rest: Ints = fleet.ints(CELLS[number]) - fleet.ints(CELLS_USED[number])
    return rest


def told(number: int, count: int) -> str:
    return f"{size(count)} of memory" if number == 0 else f"{count} {WORDS[number]}"


def unfit(fleet: Fleet, request: Request, row: int) -> tuple[str, str]:
    """What of the first cell that doesn't fit."""
    name = fleet.names[row]
    for need in resized.cells_at(fleet, request, row):
        cell, cpus = f"NUMA cell {need.cell} of {name}", int(fleet.ints(CELL_CPUS)[row, need.cell])
        if not any(int(fleet.ints(column)[row, need.cell]) for column in (CELL_CPUS, *CELLS)):
            return (
                f"{name} has no NUMA cell {need.cell}",
                f"pin the node of {request.vm} to a cell that it has",
            )
        if cpus < need.cpus:
            return (
                f"{cell} has {cpus} CPUs, a node of {request.vm} that is pinned to it has {need.cpus} vCPUs",
                f"give the node at most {cpus} vCPUs",
            )
        for number, wanted in enumerate(need.taken):
            rest = int(left(fleet, number)[row, need.cell])
            if wanted and rest < wanted:
                return (
                    f"nodes pinned to {cell} leave {told(number, max(rest, 0))}, {request.vm} needs {told(number, wanted)} there",
                    f"free {told(number, wanted - rest)} there, or pin the node of {request.vm} to another cell",
                )
    return "", ""


def match(fleet: Fleet, request: Request) -> Floats:
    """The share of the VM's nodes that have a cell for themselves: the one that they are pinned to, or any."""
    nodes = request.need.numa_nodes
    if not nodes:
        return fleet.nothing
    found: Floats = np.sum([_has_cell(fleet, request, node) for node in nodes], axis=0) / len(nodes)
    return found


def _has_cell(fleet: Fleet, request: Request, node: NumaNode) -> Bools:
    mask = np.ones((len(fleet), MOST_CELLS), np.bool_)
    mask &= fleet.ints(CELL_CPUS) >= len(node.vcpus)
    for number, wanted in enumerate(taken_by(node.memory_bytes, request.need.hugepage_kib)):
        if wanted:
            mask &= left(fleet, number) >= wanted
    among = list(node.host_cells) or list(range(MOST_CELLS))
    having: Bools = np.asarray(mask[:, among].any(axis=1), np.bool_)
    return having
