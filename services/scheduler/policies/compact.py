"""Compactness as a weight: a VM with CPUs of its own runs best on CPUs of one NUMA cell.

Counted are free CPUs, not cores: which of them it would get says only the choice itself (cpus.py), which prefers one cell as well.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from services.scheduler.fleet import Fleet, Floats
from services.scheduler.policies.cpus import HostCpus
from services.scheduler.policies.request import Request

CELLS = (1, 2)
"""Numbers of cells that are told apart; over more of them it is spread, whatever their number."""


def in_few_cells(fleet: Fleet, request: Request) -> Floats:
    """1 where one cell has as many free CPUs as it has vCPUs, 1/2 where two have, else 0; for a VM with CPUs of its own."""
    wish = request.wish
    if wish is None or not wish.alone:
        return fleet.nothing
    score = np.zeros(len(fleet))
    for number in reversed(CELLS):
        free = fleet.of_cpus(("free of cells", number), partial(most_free, number=number))
        score = np.where(free >= wish.vcpus, 1 / number, score)
    return score


def most_free(host: HostCpus, number: int) -> int:
    """CPUs that one VM could have alone, of the so many cells that have most of them."""
    cells: dict[int, int] = {}
    for core in host.cores:
        cells[core.cell] = cells.get(core.cell, 0) + sum(cpu in host.free for cpu in core.cpus)
    return sum(sorted(cells.values(), reverse=True)[:number])
