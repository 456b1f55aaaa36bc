"""Finding room: whether VMs would fit somewhere, many at a time, without claiming anything."""

from __future__ import annotations

import asyncio

from services.scheduler import affinity, model
from services.scheduler.policies.decision import room
from services.scheduler.policies.request import request
from services.scheduler.state import Scheduler
from volery.contracts.errors import invalid
from volery.contracts.scheduling import FIND_ROOM, FindRoom, Place, Purpose, Room, Rooms
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic
from volery.runtime.service import Part

part = Part()

MOST = 200
TOGETHER = 20
"""VMs that are looked at before others get their turn: a placement never waits for long."""


@part.answers(FIND_ROOM)
async def find_room(scheduler: Scheduler, ask: FindRoom, caller: Caller) -> Rooms:
    """Raises Refused(invalid) for too many questions, and for a need that no host could ever be asked."""
    if len(ask.asks) > MOST:
        raise invalid(f"room is found for at most {MOST} VMs at a time, not {len(ask.asks)}", field="asks")
    found: list[Room] = []
    bounds = await affinity.bind_each(scheduler, ask.asks)
    for number, (each, bound) in enumerate(zip(ask.asks, bounds, strict=True)):
        place = Place(
            need=each.need,
            epoch=0,
            purpose=Purpose.RESTART,
            excluded_host_ids=each.excluded_host_ids,
            dry_run=True,
        )
        model.check(place)
        policy = scheduler.policy(each.need.cluster_id)
        recipe = scheduler.fleet.recipe(policy)
        asked = request(place, policy, scheduler.config, bound, recipe=recipe, now=monotonic())
        found.append(room(scheduler.fleet, asked))
        if number % TOGETHER == TOGETHER - 1:
            await asyncio.sleep(0)
    return Rooms(rooms=tuple(found))
