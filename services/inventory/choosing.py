"""A host for a VM, asked of the scheduler: once more, when what would let the VM in may be on its way there."""

from __future__ import annotations

import asyncio

from services.inventory.desk import Inventory
from volery.contracts.scheduling import PLACE, Place, Placement, Purpose
from volery.runtime.clock import monotonic
from volery.runtime.orders import SILENT_SECONDS
from volery.runtime.run import Run

NEWS_SECONDS = 0.25
"""What this service or another has said just before is known to the scheduler by then."""
EARLY_SECONDS = 0.1
"""A timer may be a moment early, and whoever was never heard would just not count as silent."""


async def choose_host(inv: Inventory, run: Run, step: str, ask: Place) -> Placement:
    """The second answer is as final as the first would have been: each is kept under an id of the step's own."""
    placed = await inv.core.bus.ask(PLACE, ask, run.caller_for(step))
    if placed.host_id or not placed.hopeful:
        return placed
    await asyncio.sleep(NEWS_SECONDS)
    return await inv.core.bus.ask(PLACE, ask, run.caller_for(f"{step}-again"))


async def silent_hosts(inv: Inventory, purpose: Purpose, cluster_id: str) -> tuple[str, ...]:
    """Hosts that no order would reach now. What is brought back by itself isn't sent there: after a blackout ha hasn't
    said yet which of them are silent, and a missing one would keep the VM until its deadline."""
    if purpose is not Purpose.RESTART:
        return ()
    beats = inv.core.beats
    await asyncio.sleep(max(0.0, beats.since + SILENT_SECONDS + EARLY_SECONDS - monotonic()))
    ids = await inv.store.host_ids_in_cluster(cluster_id)
    return tuple(host_id for host_id in ids if beats.silent_seconds(host_id) >= SILENT_SECONDS)
