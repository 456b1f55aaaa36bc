"""A host for a VM, asked of the scheduler: once more, when what would let the VM in may be on its way there."""

from __future__ import annotations

import asyncio

from services.inventory.desk import Inventory
from volery.contracts.scheduling import PLACE, Place, Placement
from volery.runtime.run import Run

NEWS_SECONDS = 0.25
"""What this service or another has said just before is known to the scheduler by then."""


async def choose_host(inv: Inventory, run: Run, step: str, ask: Place) -> Placement:
    """The second answer is as final as the first would have been: each is kept under an id of the step's own."""
    placed = await inv.core.bus.ask(PLACE, ask, run.caller_for(step))
    if placed.host_id or not placed.hopeful:
        return placed
    await asyncio.sleep(NEWS_SECONDS)
    return await inv.core.bus.ask(PLACE, ask, run.caller_for(f"{step}-again"))
