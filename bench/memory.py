"""What the whole control plane holds in memory, at rest and with a fleet of scripted hosts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench.rows import Line, below
from bench.world import World, installed

IDLE_SECONDS = 10.0


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += [int(found) for found in (task / "children").read_text().split()]
    return [pid, *(member for child in children for member in family(child))]


def held_mb(pid: int) -> tuple[float, float]:
    """(RSS, PSS) in MB of a process with its descendants: PSS shares what they share."""
    sizes = {"Rss:": 0, "Pss:": 0}
    for member in family(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            name, *rest = line.split()
            if name in sizes:
                sizes[name] += int(rest[0])
    return sizes["Rss:"] / 1000, sizes["Pss:"] / 1000


async def idle(world: World) -> list[Line]:
    """A new installation of its own: nothing has run in it yet."""

    def measured() -> tuple[float, float, int]:
        with installed() as there:
            time.sleep(IDLE_SECONDS)
            return *held_mb(there.process), len(family(there.process))

    rss, pss, count = await asyncio.to_thread(measured)
    note = f"PSS {pss:.0f} MB; {count} process{'es' * (count > 1)}, {IDLE_SECONDS:.0f} s after it was ready"
    return [below("memory of the control plane, idle (RSS)", rss, 200, "MB", note)]
