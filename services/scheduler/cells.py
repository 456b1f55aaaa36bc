"""NUMA cells of hosts: what a VM whose nodes are pinned to them takes of each. Pure.

A strict node takes all of its memory from one cell, an interleaved one an equal share from each of its cells. A preferred
one, like a node that isn't pinned, takes what is there from anywhere: nothing is held for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.scheduler.pages import KIB, pages_of, pages_taken
from volery.contracts.agent import HostCapabilities
from volery.contracts.domain import MOST_CELLS, NumaMode, NumaNode
from volery.contracts.scheduling import CellClaim

ORDINARY_PAGE = 4 * KIB


class Taken(NamedTuple):
    """Of one cell: ordinary memory in bytes, and huge pages."""

    memory_bytes: int = 0
    pages_2m: int = 0
    pages_1g: int = 0


NOTHING = Taken()
CELL_CPUS = "cell_cpus"
CELLS = tuple(f"cell_{name}" for name in Taken._fields)
CELLS_USED = tuple(f"{name}_used" for name in CELLS)
"""Columns of the fleet, one figure per cell: how much there is, and how much claims hold."""
WORDS = ("memory", "huge pages of 2 MiB", "huge pages of 1 GiB")


class CellNeed(NamedTuple):
    """What a VM asks of one cell."""

    cell: int
    taken: Taken
    cpus: int = 0
    """vCPUs of the largest node that is there alone."""


@dataclass(frozen=True, slots=True)
class CellFigures:
    """One cell of a host, as the tables have it."""

    cell: int
    cpus: int
    limit: Taken
    used: Taken = NOTHING


def taken_by(memory_bytes: int, hugepage_kib: int) -> Taken:
    """By so much memory of a VM that is backed by pages of this size."""
    pages = pages_taken(memory_bytes, hugepage_kib)
    return Taken(0 if hugepage_kib else memory_bytes, *pages)


def needs_of(nodes: Iterable[NumaNode], hugepage_kib: int) -> tuple[CellNeed, ...]:
    """By cell, in their order."""
    found: dict[int, CellNeed] = {}
    for node in nodes:
        if not node.host_cells or node.mode is NumaMode.PREFERRED:
            continue
        count = len(node.host_cells)
        share = -(-node.memory_bytes // count)
        share = -(-share // ORDINARY_PAGE) * ORDINARY_PAGE if count > 1 else share
        cpus = len(node.vcpus) if node.mode is NumaMode.STRICT else 0
        for cell in node.host_cells:
            had = found.get(cell, CellNeed(cell, NOTHING))
            both = Taken(*(map(sum, zip(had.taken, taken_by(share, hugepage_kib), strict=True))))
            found[cell] = CellNeed(cell, both, max(had.cpus, cpus))
    return tuple(found[cell] for cell in sorted(found))


def claims_of(needs: Iterable[CellNeed]) -> tuple[CellClaim, ...]:
    return tuple(
        CellClaim(
            cell=need.cell,
            memory_bytes=need.taken.memory_bytes,
            pages_2m=need.taken.pages_2m,
            pages_1g=need.taken.pages_1g,
        )
        for need in needs
    )


def needs_from(claims: Iterable[CellClaim]) -> tuple[CellNeed, ...]:
    return tuple(CellNeed(c.cell, Taken(c.memory_bytes, c.pages_2m, c.pages_1g)) for c in claims)


def cells_of(capabilities: HostCapabilities) -> tuple[CellFigures, ...]:
    """As a host reports them. A host with more than MOST_CELLS has only the first to pin to."""
    found: list[CellFigures] = []
    for cell in capabilities.numa:
        if 0 <= cell.cell < MOST_CELLS:
            pages = pages_of((cell,))
            memory = max(cell.memory_bytes - pages.memory_bytes, 0)
            found.append(CellFigures(cell.cell, len(cell.cpus), Taken(memory, *pages)))
    return tuple(found)


def shared(needs: Sequence[CellNeed], others: Sequence[CellNeed]) -> bool:
    """Whether two VMs ask anything of the same cell."""
    return bool({need.cell for need in needs} & {need.cell for need in others})
