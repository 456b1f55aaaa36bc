"""Claims after they were made: confirmed when the VM runs, given back when it ended; and what hosts have left."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from services.scheduler import capacity_store, store
from services.scheduler.granting import Asked, OneByOne
from services.scheduler.shortage import shortage
from services.scheduler.state import Scheduler
from volery.contracts.base import Done
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import (
    CONFIRM_CLAIM,
    LIST_CAPACITY,
    LIST_CLAIMS,
    RELEASE_CLAIM,
    RELEASE_VM_CLAIMS,
    ClaimKey,
    ReleaseVm,
)
from volery.runtime.bus import Caller
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Stale

part = Part()

DONE = Done()


@part.answers(CONFIRM_CLAIM)
async def confirm(scheduler: Scheduler, ask: ClaimKey, caller: Caller) -> Any:
    """Raises Refused(not_found) for a claim that was given back meanwhile."""
    return await scheduler.rounds.ask(Asked(vm_id=ask.vm_id, caller=caller, confirm=ask.epoch))


@part.answers(RELEASE_CLAIM)
async def release(scheduler: Scheduler, ask: ClaimKey, caller: Caller) -> Any:
    return await _release(
        scheduler, Asked(vm_id=ask.vm_id, caller=caller, epochs=frozenset({ask.epoch})), caller
    )


@part.answers(RELEASE_VM_CLAIMS)
async def release_vm(scheduler: Scheduler, ask: ReleaseVm, caller: Caller) -> Any:
    asked = Asked(vm_id=ask.vm_id, caller=caller, epochs=frozenset(ask.keep_epochs), keep=True)
    return await _release(scheduler, asked, caller)


async def _release(scheduler: Scheduler, asked: Asked, caller: Caller) -> Any:
    try:
        return await scheduler.rounds.ask(asked)
    except OneByOne:
        await _by_itself(scheduler, asked)
        await scheduler.core.commit(caller=caller, answer=DONE)
        return DONE


async def _by_itself(scheduler: Scheduler, asked: Asked) -> None:
    """One claim after the other: two of one host can't be given back in one statement."""
    while rows := [
        r for r in await store.claims_of(scheduler.core.pool, asked.vm_id) if asked.releases(r.public)
    ]:
        try:
            await scheduler.core.commit(*store.release(rows[0]))
        except Stale:
            continue
        scheduler.gave_back(rows[0].public)


@part.answers(LIST_CLAIMS)
async def list_claims(scheduler: Scheduler, ask: ListQuery, caller: Caller) -> Any:
    return await page(scheduler.core.pool, store.CLAIMS, ask)


@part.answers(LIST_CAPACITY)
async def list_capacity(scheduler: Scheduler, ask: ListQuery, caller: Caller) -> dict[str, Any]:
    items, following = await capacity_store.page_of_hosts(scheduler.core.pool, ask)
    load = scheduler.fleet.floats("cpu_percent")
    shown = []
    for host in items:
        row = scheduler.fleet.rows.get(host.host_id)
        measured = round(float(load[row]), 1) if row is not None else 0.0
        shown.append(replace(host, cpu_percent=measured, problem=shortage(host)))
    return {"items": shown, "next": following}
