"""VMs that fit nowhere: whether there is room for them again. Whatever may have made room wakes; whether it did is asked
of the scheduler, so that nothing is started in vain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from msgspec.structs import replace

from services.ha import watched_vms
from services.ha.state import Ha
from volery.contracts.base import Entity
from volery.contracts.cluster import CLUSTER_CHANGED
from volery.contracts.errors import Refused
from volery.contracts.host import HOST_CHANGED
from volery.contracts.network import NETWORK_CHANGED
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeed, VmNeeds
from volery.contracts.scheduling import CLAIM_DELETED, FIND_ROOM, FindRoom, RoomFor
from volery.contracts.storage import STORAGE_DOMAIN_CHANGED
from volery.contracts.vm import VM_CHANGED
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic
from volery.runtime.hear_owners import Said
from volery.runtime.service import Part
from volery.runtime.tables import Change

log = logging.getLogger(__name__)

part = Part()

KEY = "restarts"
EXHAUSTED_SECONDS = 60.0
"""What fits nowhere is tried again after this in any case."""
HEARD_SECONDS = 5.0
"""So long after room may have come it is asked for: the scheduler may hear of it a moment later than ha."""
ASK_SECONDS = 0.5
"""Between two questions."""
ANSWER_SECONDS = 2.0
"""Other restarts wait for this answer no longer."""
MOST = 200


def may_have_come(ha: Ha) -> None:
    """Something changed that may have made room."""
    ha.capacity_at = monotonic()
    if ha.exhausted:
        ha.core.wake(KEY)


def fits_nowhere(ha: Ha, vm_id: str) -> bool:
    """Whether no host could take it, and nobody has said since that one can."""
    at = ha.exhausted.get(vm_id)
    if at is None:
        return False
    if monotonic() - at < EXHAUSTED_SECONDS:
        return True
    del ha.exhausted[vm_id]
    return False


async def look(ha: Ha) -> None:
    """Whoever fits again fits nowhere no more."""
    now = monotonic()
    if not ha.exhausted or now - ha.capacity_at > HEARD_SECONDS or now - ha.room_asked_at < ASK_SECONDS:
        return
    ha.room_asked_at = now
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            found = await _fitting(ha, tuple(sorted(ha.exhausted)[:MOST]))
    except (Refused, TimeoutError) as error:
        log.info("whether there is room again can't be asked yet: %s", error)
        return
    for vm_id, fits in found.items():
        _take(ha, vm_id, fits, now)


def _take(ha: Ha, vm_id: str, fits: bool, now: float) -> None:
    """Room that it was tried in, in vain, and that is still there (its host can't start it) is no news."""
    if not fits:
        ha.room_found.pop(vm_id, None)
    elif now - ha.room_found.get(vm_id, float("-inf")) > EXHAUSTED_SECONDS:
        ha.room_found[vm_id] = now
        ha.exhausted.pop(vm_id, None)


async def _fitting(ha: Ha, vm_ids: tuple[str, ...]) -> dict[str, bool]:
    """VM → whether some host could take it now, each by itself."""
    bus, caller = ha.core.bus, Caller("service:ha")
    told = (await bus.ask(DESCRIBE_NEEDS, VmNeeds(vm_ids=vm_ids), caller)).vms
    asks = tuple([await _ask_for(ha, vm) for vm in told])
    if not asks:
        return {}
    rooms = (await bus.ask(FIND_ROOM, FindRoom(asks=asks), caller)).rooms
    return {room.vm_id: room.fitting > 0 for room in rooms}


async def _ask_for(ha: Ha, vm: VmNeed) -> RoomFor:
    """One that is restarted on its own host only needs room there."""
    watched = await watched_vms.find(ha.core.pool, vm.need.vm_id) if vm.same_host else None
    if watched is None or not watched.host_id:
        return RoomFor(need=vm.need)
    return RoomFor(need=replace(vm.need, host_ids=(watched.host_id,)))


@part.hears(CLAIM_DELETED)
@part.hears(CLUSTER_CHANGED)
@part.hears(STORAGE_DOMAIN_CHANGED)
@part.hears(NETWORK_CHANGED)
async def something_changed(ha: Ha, _: Entity) -> list[Change]:
    may_have_come(ha)
    return []


@part.hears_together(HOST_CHANGED)
async def hosts_changed(ha: Ha, _: Sequence[Said]) -> list[Change]:
    may_have_come(ha)
    return []


@part.hears_together(VM_CHANGED)
async def vms_changed(ha: Ha, said: Sequence[Said]) -> list[Change]:
    """One that fits nowhere may ask for less now."""
    if any(vm.id in ha.exhausted and not vm.busy_with for _, vm in said):
        may_have_come(ha)
    return []
