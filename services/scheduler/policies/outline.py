"""What a host gives a VM that is resized to it: all of its cores but the first of each socket. Pure.

The VM is built as its host is: as many sockets, each with a core less, as many threads a core, and a NUMA node for each cell
that it has cores of. QEMU has one number of cores for all sockets and one of threads for all cores, so a host whose sockets
or cores differ can't be followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from msgspec.structs import replace

from services.scheduler.pages import KIB
from volery.contracts.cpus import CpuCore
from volery.contracts.domain import MOST_CELLS, NumaNode
from volery.contracts.resizing import VmShape

MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Outline:
    cores: tuple[CpuCore, ...] = ()
    """Those that the VM gets, socket by socket."""
    sockets: int = 0
    threads: int = 0
    cells: tuple[int, ...] = ()
    """NUMA cells of these cores, where the host has several."""
    why_not: str = ""
    """What is in the way, said of the host; then it gives no cores."""

    @property
    def vcpus(self) -> int:
        return len(self.cores) * self.threads

    @property
    def pins(self) -> tuple[tuple[int, ...], ...]:
        return tuple((cpu,) for core in self.cores for cpu in core.cpus)


@cache
def outline(cores: tuple[CpuCore, ...]) -> Outline:
    """Of a host with these cores."""
    sockets: dict[int, list[CpuCore]] = {}
    for core in sorted(cores, key=lambda core: (core.socket, core.cpus)):
        sockets.setdefault(core.socket, []).append(core)
    why_not = _why_not(cores, sockets)
    if why_not:
        return Outline(why_not=why_not)
    given = tuple(core for socket in sockets.values() for core in socket[1:])
    several = len({core.cell for core in cores}) > 1
    cells = tuple(sorted({core.cell for core in given})) if several else ()
    return Outline(given, len(sockets), len(given[0].cpus), cells)


def _why_not(cores: tuple[CpuCore, ...], sockets: dict[int, list[CpuCore]]) -> str:
    if not cores:
        return "has not said how its CPUs are built"
    if len({len(core.cpus) for core in cores}) > 1:
        return "has cores with different numbers of threads"
    sizes = {len(socket) for socket in sockets.values()}
    if min(sizes) < 2:
        return "has one core in a socket, and that is left to the host"
    if len(sizes) > 1:
        return "has sockets with different numbers of cores"
    if max(core.cell for core in cores) >= MOST_CELLS:
        return f"has more than {MOST_CELLS} NUMA cells"
    return ""


def divides(found: Outline, memory_bytes: int, hugepage_kib: int) -> bool:
    """Whether each node of a VM with this memory has some."""
    return all(shares(found, memory_bytes, hugepage_kib))


def shape(found: Outline, memory_bytes: int, hugepage_kib: int) -> VmShape:
    """Of a VM with this memory, which `divides`."""
    return VmShape(
        vcpus=found.vcpus,
        sockets=found.sockets,
        cores=len(found.cores) // found.sockets,
        threads=found.threads,
        numa_nodes=_nodes(found, memory_bytes, hugepage_kib),
    )


def bare(found: VmShape) -> VmShape:
    """Without its memory, which says nothing of how a host is built."""
    return replace(found, numa_nodes=tuple(replace(node, memory_bytes=0) for node in found.numa_nodes))


def _nodes(found: Outline, memory_bytes: int, hugepage_kib: int) -> tuple[NumaNode, ...]:
    """Each bound to its cell, with an equal share of the memory in whole units; what is over goes to the first ones."""
    vcpus: dict[int, list[int]] = {cell: [] for cell in found.cells}
    cells = [core.cell for core in found.cores for _ in core.cpus]
    for vcpu, cell in enumerate(cells if found.cells else ()):
        vcpus[cell].append(vcpu)
    return tuple(
        NumaNode(memory_bytes=share, vcpus=tuple(vcpus[cell]), host_cells=(cell,))
        for cell, share in zip(found.cells, shares(found, memory_bytes, hugepage_kib), strict=True)
    )


def shares(found: Outline, memory_bytes: int, hugepage_kib: int) -> list[int]:
    """Bytes for each of the cells."""
    if not found.cells:
        return []
    unit, count = _unit(hugepage_kib), len(found.cells)
    each, over = divmod(memory_bytes // unit, count)
    made = [(each + (number < over)) * unit for number in range(count)]
    made[0] += memory_bytes % unit
    return made


def _unit(hugepage_kib: int) -> int:
    return max(hugepage_kib * KIB, MIB)
