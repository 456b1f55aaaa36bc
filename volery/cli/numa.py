"""NUMA nodes on the command line: VCPUS:MEMORY[:CELLS[:MODE]], e.g. 0-3:4GiB:0 or 4-7:4GiB:0,1:interleave."""

from __future__ import annotations

from collections.abc import Sequence

from volery.cli import output
from volery.contracts.domain import NumaMode, NumaNode

NONE = "none"


def nodes(texts: Sequence[str]) -> tuple[NumaNode, ...]:
    """`none` is no nodes. Raises ValueError with what is wrong."""
    return () if list(texts) == [NONE] else tuple(node(text) for text in texts)


def node(text: str) -> NumaNode:
    parts = text.split(":")
    if not 2 <= len(parts) <= 4:
        raise ValueError(f"{text!r} is no NUMA node like 0-3:4GiB, 0-3:4GiB:0 or 4-7:4GiB:0,1:interleave")
    cells = numbers(parts[2]) if len(parts) > 2 else ()
    mode = (
        NumaMode(parts[3]) if len(parts) > 3 else NumaMode.INTERLEAVE if len(cells) > 1 else NumaMode.STRICT
    )
    memory = output.read_size(parts[1])
    return NumaNode(memory_bytes=memory, vcpus=numbers(parts[0]), host_cells=cells, mode=mode)


def numbers(text: str) -> tuple[int, ...]:
    """`0-2,5` → 0, 1, 2, 5."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)
