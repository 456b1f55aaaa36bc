"""What the whole control plane holds in memory, at rest and with a fleet of scripted hosts."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path

from bench.fleet import HOSTS, VMS, fleet, run_vms
from bench.rows import Line, below
from bench.world import World, installed
from lab.plane import make_cluster

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


async def under_load(world: World) -> list[Line]:
    """100 hosts with 1,000 VMs that were created and started through REST, for a minute, or ten with --full."""
    seconds = 600.0 if world.full else 60.0
    with ExitStack() as stack:
        there = await asyncio.to_thread(stack.enter_context, installed())
        cluster = await asyncio.to_thread(make_cluster, there.client)
        most = 0.0
        async with fleet(there, cluster.id) as hosts:
            await run_vms(there, cluster.id, hosts)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                await asyncio.sleep(1.0)
                most = max(most, held_mb(there.process)[0])
        rss, pss = held_mb(there.process)
        await asyncio.to_thread(stack.close)
    ran = f"{seconds / 60:.0f} min"
    note = f"highest RSS seen; at the end RSS {rss:.0f}, PSS {pss:.0f} MB"
    return [below(f"memory with {HOSTS} hosts and {VMS:,} VMs, {ran} (RSS)", most, 350, "MB", note)]
