"""A host is emptied by a plan of the scheduler's: where each VM goes and in which order, computed as a whole.

The scheduler carries the plan out and holds what it moves, so that no other plan takes the room away, and VMs that must be
together may change their host. Maintenance waits for its end and moves what it left as ever; so also when there is no plan:
the scheduler doesn't answer, or another plan that empties hosts is under way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from services.inventory import host_devices, resizing
from services.inventory.clearing import Clearing, to_clear
from services.inventory.desk import Inventory
from services.inventory.specs import need_of
from services.inventory.store import VMS
from volery.contracts.base import Message
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import Host
from volery.contracts.operation import Operation
from volery.contracts.plan import (
    CANCEL_PLAN,
    GET_PLAN,
    LEAVING,
    MAKE_PLAN,
    MakePlan,
    Plan,
    PlanKind,
    PlanStep,
)
from volery.contracts.scheduling import PLACE, Place, Purpose
from volery.contracts.vm import Vm
from volery.runtime.bus import LOST, Caller
from volery.runtime.run import Run
from volery.runtime.tasks import end

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
MOST_PLANS = 20
"""That a maintenance follows one after the other: each host that leaves as well has a new one made."""
NAMED = 5
"""VMs without a place that a step's title names; the plan names all."""


class Followed(Message):
    """The plan that a maintenance follows; without an id there is none."""

    id: str = ""
    operation_id: str = ""
    title: str = ""
    vms: dict[str, str] = {}
    """Who is to leave: VM → its name."""
    shared: bool = False
    """Other hosts are emptied by it, too."""


async def follow(inv: Inventory, run: Run, clearing: Clearing, host: Host, avoided: Sequence[str]) -> None:
    """VMs leave by a plan, if there is one: to `avoided` hosts only if no other takes them. When another host of the cluster goes
    into maintenance meanwhile one plan is made for both, and followed from then on. Whoever is still there afterwards has no
    place in it, or it was stopped."""
    made = partial(_made, inv, run, host, avoided, "plan")
    followed = await run.step("plan", "Planning where its VMs go", made, Followed)
    for number in range(1, MOST_PLANS):
        if not followed.id:
            return
        moves = "moves" if number == 1 else f"moves-{number}"
        stopped = await _carried_out(inv, run, clearing, followed, moves)
        if stopped is None:
            return
        later = partial(_next, inv, run, host, avoided, followed, stopped, f"plan-{number}")
        vms = followed.vms  # some of them may have left by the next one already
        followed = await run.step(f"plan-{number}", "Looking what goes on with it", later, Followed)
        followed = msgspec.structs.replace(followed, vms=vms | followed.vms)
        await clearing.look(followed.vms)


async def _carried_out(
    inv: Inventory, run: Run, clearing: Clearing, followed: Followed, step: str
) -> Refused | None:
    """With what it was stopped, if it was."""
    stopped = None
    run.undo("plan", lambda: _cancel(inv, run, followed.id))
    try:
        await run.step(step, followed.title, lambda: _ended(inv, run, clearing, followed))
    except Refused as refused:  # what it left is moved without it, if no other goes on
        stopped = refused
    run.undone("plan")
    await clearing.look(followed.vms)
    run.checkpoint()
    return stopped


async def _made(inv: Inventory, run: Run, host: Host, avoided: Sequence[str], step: str) -> Followed:
    if not await to_clear(inv, host.id):
        return Followed()
    question = MakePlan(
        cluster_id=host.cluster_id,
        kind=PlanKind.EVACUATION,
        host_ids=(host.id,),
        avoided_host_ids=tuple(avoided),
        joins=True,
    )
    try:
        begun = await _asked(inv, question, run.caller_for(step))
    except Refused as refused:
        log.info("host %s is emptied without a plan: %s", host.name, refused.message)
        return Followed()
    return await _seen(inv, run, host, await _plan(inv, run, begun.object_id))


async def _next(
    inv: Inventory,
    run: Run,
    host: Host,
    avoided: Sequence[str],
    followed: Followed,
    stopped: Refused,
    step: str,
) -> Followed:
    """The plan that goes on with one that was stopped; one more, if it was stopped since another host leaves."""
    plan = await _plan(inv, run, followed.id)
    if plan.continued_by:
        with suppress(Refused):  # somebody was quicker, and it was not begun
            return await _seen(inv, run, host, await _plan(inv, run, plan.continued_by))
    if plan.continued_by or stopped.details.get("rule") == LEAVING:
        return await _made(inv, run, host, avoided, step)
    return Followed()


async def _plan(inv: Inventory, run: Run, plan_id: str) -> Plan:
    return await inv.core.bus.ask(GET_PLAN, GetById(id=plan_id), run.caller)


async def _seen(inv: Inventory, run: Run, host: Host, plan: Plan) -> Followed:
    return Followed(
        id=plan.id,
        operation_id=plan.operation_id,
        title=title(plan),
        vms={vm.id: vm.name for vm in await to_clear(inv, host.id)},
        shared=len(plan.host_ids) > 1,
    )


async def _asked(inv: Inventory, question: MakePlan, caller: Caller) -> Operation:
    """Once more, under the same id, when nobody knows whether it was begun."""
    try:
        return await inv.core.bus.ask(MAKE_PLAN, question, caller)
    except Refused as refused:
        if refused.kind is not Kind.TIMEOUT or not refused.details.get(LOST):
            raise
    return await inv.core.bus.ask(MAKE_PLAN, question, caller)


def title(plan: Plan) -> str:
    """Who has no place is named before anything moves."""
    named = "; ".join(f"{each.vm_name}: {each.reason}" for each in plan.unplaced[:NAMED])
    more = len(plan.unplaced) - NAMED
    stays = f" ({named}{f'; and {more} more' if more > 0 else ''})" if named else ""
    return f"Following plan {plan.id}: it {plan.message}{stays}"


async def _ended(inv: Inventory, run: Run, clearing: Clearing, followed: Followed) -> None:
    """When the maintenance is cancelled its plan is, too, and so are the moves of its host's VMs that are under way; others
    that make way for them arrive. One that empties other hosts, too, is waited for until this one is empty. Raises Refused when
    it was stopped."""
    ending = asyncio.create_task(inv.foreign_operation(followed.operation_id))
    cancelling = asyncio.create_task(run.cancelling.wait())
    told = False
    try:
        while not ending.done():
            waited = [ending] if told else [ending, cancelling]
            await asyncio.wait(waited, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if cancelling.done() and not told:
                told = True
                await _cancel(inv, run, followed.id)
            if told:  # again each time: one may have been begun just before
                await _stop_moves(inv, run, clearing.host_id, followed.vms)
            await clearing.look(followed.vms)
            if followed.shared and not told and not await to_clear(inv, clearing.host_id):
                return
        await ending
    finally:
        await end([ending, cancelling])


async def _stop_moves(inv: Inventory, run: Run, host_id: str, vm_ids: Iterable[str]) -> None:
    """Those that this plan began are this maintenance's caller's. A move that has gone too far to be stopped arrives."""
    for vm_id in vm_ids:
        row = await VMS.find(inv.core.pool, vm_id)
        if row is None or row.public.host_id != host_id or not row.public.busy_with:
            continue
        with suppress(Refused):
            moving = (await inv.core.operations.table.get(inv.core.pool, row.public.busy_with)).public
            if moving.kind == "vm.migrate" and moving.principal == run.operation.principal:
                await inv.core.operations.cancel(moving.id)


async def _cancel(inv: Inventory, run: Run, plan_id: str) -> None:
    """Or the one that goes on with it."""
    while plan_id:
        try:
            await inv.core.bus.ask(CANCEL_PLAN, GetById(id=plan_id), run.caller_for(f"cancel-{plan_id}"))
        except Refused as refused:
            if refused.kind is not Kind.CONFLICT:
                raise
            plan_id = (await _plan(inv, run, plan_id)).continued_by  # else it has just ended by itself
            continue
        return


# Shown before


async def plan_of(inv: Inventory, host: Host, caller: Caller, *, stop_vms: bool = False) -> dict[str, Any]:
    """Where each VM would go, in the order of the plan that would be followed, then who would go nowhere and why. A VM that
    isn't part of it is looked at as if it were the only one."""
    vms = await to_clear(inv, host.id)
    planned = await shown(inv, host, vms, caller) if vms and not stop_vms else {}
    moves = [fate for fate in planned.values() if fate["host_id"]]
    moving = {fate["vm_id"] for fate in moves}
    rest = [
        planned.get(vm.id) or await _fate(inv, vm, caller, stop_vms=stop_vms)
        for vm in vms
        if vm.id not in moving
    ]
    return {
        "vm_ids": [vm.id for vm in vms],
        "vms": [vm.name for vm in vms],
        "plan": [*moves, *rest],
    }


async def _fate(inv: Inventory, vm: Vm, caller: Caller, *, stop_vms: bool) -> dict[str, str]:
    said = {"vm_id": vm.id, "name": vm.name, "host_id": ""}
    if stop_vms:
        return said | {"message": "is shut down"}
    if not vm.migration.allowed:
        return said | {"message": "its migration policy forbids to move it"}
    if why := host_devices.stays(vm, "migrate"):
        return said | {"message": why}
    try:
        need = await need_of(inv, vm, caller, shape=resizing.kept(vm))
    except Refused as refused:
        if refused.kind not in (Kind.CONFLICT, Kind.EXHAUSTED):
            raise
        return said | {"message": refused.message}
    question = Place(
        need=need,
        epoch=vm.epoch + 1,
        purpose=Purpose.MIGRATE,
        excluded_host_ids=(vm.host_id,),
        dry_run=True,
    )
    placed = await inv.core.bus.ask(PLACE, question, Caller(caller.principal))
    return said | {"host_id": placed.host_id, "message": placed.message}


async def shown(inv: Inventory, host: Host, vms: Sequence[Vm], caller: Caller) -> dict[str, dict[str, Any]]:
    """VM → what a plan would do with it, in the order in which they move: VMs of this host and those of others that make
    way; then those that have no place. Nothing when there would be no plan."""
    question = MakePlan(
        cluster_id=host.cluster_id, kind=PlanKind.EVACUATION, host_ids=(host.id,), dry_run=True
    )
    try:
        answer = await inv.core.bus.ask(MAKE_PLAN, question, Caller(caller.principal), again=False)
    except Refused as refused:
        log.info("where each VM of host %s would go is said without a plan: %s", host.name, refused.message)
        return {}
    plan = msgspec.convert(answer.result["plan"], Plan)
    here = {vm.id for vm in vms}
    found = {step.vm_id: _moves(step, here) for step in plan.steps}
    for each in plan.unplaced:
        found[each.vm_id] = _said(each.vm_id, each.vm_name, "", each.reason)
    return found


def _moves(step: PlanStep, here: set[str]) -> dict[str, Any]:
    way = "" if step.vm_id in here else f", to make way, from {step.source_host_name}"
    words = f"moves to {step.target_host_name} in wave {step.wave + 1}{way}"
    return _said(step.vm_id, step.vm_name, step.target_host_id, words)


def _said(vm_id: str, name: str, host_id: str, message: str) -> dict[str, Any]:
    return {"vm_id": vm_id, "name": name, "host_id": host_id, "message": message}
