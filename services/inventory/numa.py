"""NUMA nodes of a VM: what they may be. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from volery.contracts.domain import MOST_CELLS, NumaMode, NumaNode
from volery.contracts.errors import invalid
from volery.runtime import checks

KIB = 1024
MIB = 1024 * KIB
MOST_NODES = 16


def check(nodes: Sequence[NumaNode], memory_bytes: int, vcpus: int, hugepage_kib: int) -> None:
    """Raises Refused(invalid) unless the nodes share out all of the VM's memory and vCPUs, and each says where it may be."""
    if not nodes:
        return
    checks.between(len(nodes), 1, MOST_NODES, "numa_nodes", "nodes")
    unit = max(hugepage_kib * KIB, MIB)
    for number, node in enumerate(nodes):
        if node.memory_bytes <= 0 or node.memory_bytes % unit:
            raise _wrong(
                f"NUMA node {number} has {node.memory_bytes} bytes of memory; give it a multiple of {unit}"
            )
        if not node.vcpus:
            raise _wrong(f"NUMA node {number} has no vCPUs; give it at least one")
        _check_cells(number, node)
    memory = sum(node.memory_bytes for node in nodes)
    if memory != memory_bytes:
        raise _wrong(
            f"the NUMA nodes have {memory} bytes of memory together and the VM has {memory_bytes}; make them equal"
        )
    numbers = sorted(vcpu for node in nodes for vcpu in node.vcpus)
    if numbers != list(range(vcpus)):
        raise _wrong(
            f"each of the vCPUs 0 to {vcpus - 1} belongs to one NUMA node, and the nodes name "
            f"{', '.join(map(str, numbers))}"
        )


def _check_cells(number: int, node: NumaNode) -> None:
    cells = node.host_cells
    if any(not 0 <= cell < MOST_CELLS for cell in cells) or len(set(cells)) != len(cells):
        raise _wrong(
            f"NUMA node {number} is pinned to the host's cells {', '.join(map(str, cells))}; name cells of 0 to "
            f"{MOST_CELLS - 1}, each once"
        )
    if len(cells) > 1 and node.mode is not NumaMode.INTERLEAVE:
        raise _wrong(
            f"NUMA node {number} is {node.mode} and pinned to {len(cells)} cells; pin it to one, or let it interleave"
        )


def _wrong(message: str) -> Exception:
    return invalid(message, field="numa_nodes")
