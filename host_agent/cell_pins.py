"""vCPUs of NUMA nodes run on the CPUs of the cells that their memory is bound to. Pure.

As far as these CPUs are shared: where others have all of a cell's CPUs alone, a vCPU runs on any that are left, since a guest
with slow memory is better than none.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping

from host_agent import pins

Cells = Mapping[int, frozenset[int]]
"""The host's cells and their CPUs; none where there is only one."""


def cells_of(capabilities: ET.Element) -> dict[int, frozenset[int]]:
    found = {
        int(cell.get("id", "0")): frozenset(int(cpu.get("id", "0")) for cpu in cell.findall("cpus/cpu"))
        for cell in capabilities.findall("host/topology/cells/cell")
    }
    return found if len(found) > 1 else {}


def bound(root: ET.Element) -> dict[int, frozenset[int]]:
    """vCPU of the domain → the cells of its node's memory. Not of a node that only prefers one."""
    tuned = {
        node.get("cellid"): pins.read(node.get("nodeset", ""))
        for node in root.findall("numatune/memnode")
        if node.get("mode") != "preferred"
    }
    return {
        vcpu: tuned[node.get("id")]
        for node in root.findall("cpu/numa/cell")
        if node.get("id") in tuned
        for vcpu in pins.read(node.get("cpus", ""))
    }


def near(wanted: Collection[int], cells: Cells, shared: frozenset[int]) -> frozenset[int]:
    """Of the shared CPUs those of these cells, or all where none is."""
    own = frozenset[int]().union(*(cells.get(cell, frozenset()) for cell in wanted))
    return (own & shared) or shared


def put(root: ET.Element, cells: Cells, shared: Collection[int] | None) -> None:
    """After `pins.put`, into a domain that has no CPUs of its own."""
    if not cells:
        return
    free = frozenset[int]().union(*cells.values()) if shared is None else frozenset(shared)
    for vcpu, wanted in sorted(bound(root).items()):
        pins.put_vcpu(root, vcpu, near(wanted, cells, free))
