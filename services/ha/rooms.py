"""VMs that fit nowhere: whether there is room for them again. Whatever may have made room wakes; whether it did is asked
of the scheduler, so that nothing is started in vain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from msgspec.structs import replace

from services.ha import waits, watched_vms
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
from volery.runtime.orders import SILENT_SECONDS
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
    if ha.waits:
        ha.core.wake(KEY)


async def look(ha: Ha, vm_ids: Sequence[str]) -> None:
    """Of VMs that ended, the most important first: whoever fits again waits no more, and neither do those that others let go
    first, unless they would not fit."""
    if not ha.waits:
        return
    silent = frozenset(h for h in ha.watches if ha.core.beats.silent_seconds(h) >= SILENT_SECONDS)
    if ha.silent - silent:
        may_have_come(ha)
    ha.silent, now = silent, monotonic()
    called = waits.called(ha, vm_ids)
    asked = called[:MOST]
    if now - ha.capacity_at <= HEARD_SECONDS and now - ha.room_asked_at >= ASK_SECONDS:
        ha.room_asked_at = now
        asked = list(dict.fromkeys((*called, *waits.for_room(ha, vm_ids))))[:MOST]
    if not asked:
        return
    found: dict[str, bool] = {}
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            found = await _fitting(ha, tuple(asked))
    except (Refused, TimeoutError) as error:
        log.info("whether there is room again can't be asked yet: %s", error)
    for vm_id in called[:MOST]:
        _try(ha, vm_id, found.pop(vm_id, True), now)
    for vm_id, fits in found.items():
        _take(ha, vm_id, fits, now)


def _try(ha: Ha, vm_id: str, fits: bool, now: float) -> None:
    """One for which others wait is tried in room that it was tried in before, too, and where nobody could say."""
    if fits:
        ha.room_found[vm_id] = now
        waits.end(ha, vm_id)
    else:
        ha.room_found.pop(vm_id, None)
        waits.refused_again(ha, vm_id)


def _take(ha: Ha, vm_id: str, fits: bool, now: float) -> None:
    """Room that it was tried in, in vain, and that is still there (its host can't start it) is no news."""
    if not fits:
        ha.room_found.pop(vm_id, None)
    elif now - ha.room_found.get(vm_id, float("-inf")) > EXHAUSTED_SECONDS:
        ha.room_found[vm_id] = now
        waits.end(ha, vm_id)


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
    """One that is restarted on its own host only needs room there. Silent hosts of its cluster are no room."""
    silent = tuple(sorted(ha.clusters[vm.need.cluster_id].keys() & ha.silent))
    watched = await watched_vms.find(ha.core.pool, vm.need.vm_id) if vm.same_host else None
    if watched is None or not watched.host_id:
        return RoomFor(need=vm.need, excluded_host_ids=silent)
    return RoomFor(need=replace(vm.need, host_ids=(watched.host_id,)), excluded_host_ids=silent)


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
    if any(vm.id in ha.waits and not vm.busy_with for _, vm in said):
        may_have_come(ha)
    return []
