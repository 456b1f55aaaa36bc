"""Carrying out a plan: inventory is asked for each migration, wave after wave, as long as things are as they were meant.

Before a wave it is looked again: is each VM where the plan has it, is there room, do affinity groups still let it, is the
rest of a balance still of use, and is every host of the cluster that was up still up. What a plan has begun it asks for
under the same request id after a crash, so nothing moves twice. When it stops, what has moved stays where it is.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from msgspec.structs import replace

from services.scheduler import boards, plans, saving
from services.scheduler import plan_store as sql
from services.scheduler.plan_store import PLANS
from services.scheduler.policies.planning import useless_now, wrong_now
from services.scheduler.state import Scheduler
from volery.contracts.base import Owner
from volery.contracts.errors import Refused, conflict
from volery.contracts.operation import ENDED, GET_OPERATION, GetOperation, Operation
from volery.contracts.plan import LEAVING, Plan, PlanKind, PlanState, PlanStep, PlanStepState
from volery.contracts.vm import MIGRATE_VM, MigrateVm
from volery.runtime.bus import LOST
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Stale

part = Part()

ASK_SECONDS = 2.0
"""How often a migration is asked about whose end nobody has told."""


@part.runs("plan.carry_out", deadline_seconds=plans.PLAN_SECONDS)
async def carry_out(scheduler: Scheduler, run: Run) -> None:
    plan_id = run.operation.object_id
    run.undo("plan", lambda: _stop(scheduler, run, plan_id))
    plan = (await PLANS.get(scheduler.core.pool, plan_id)).public
    up = await run.step("hosts", "Looking at the hosts", lambda: _up(scheduler, plan), list[str])
    for wave in range(max((step.wave for step in plan.steps), default=-1) + 1):
        run.checkpoint()
        plan = (await PLANS.get(scheduler.core.pool, plan_id)).public
        numbers = [n for n, step in enumerate(plan.steps) if step.wave == wave]
        await _recheck(scheduler, plan, wave, up)
        ended = await asyncio.gather(
            *(_go(scheduler, run, plan_id, number) for number in numbers), return_exceptions=True
        )
        run.checkpoint()  # whoever cancelled the plan may have stopped its moves, too
        for problem in ended:
            if isinstance(problem, BaseException):
                raise problem
    if plan.kind is PlanKind.SAVING:
        await saving.finish(scheduler, run, plan, _ended)
    await plans.end(scheduler, plan_id, PlanState.SUCCEEDED, "")


async def _stop(scheduler: Scheduler, run: Run, plan_id: str) -> None:
    problem, cancelled = run.row.private.failed, run.row.private.cancelled
    state = PlanState.CANCELLED if cancelled else PlanState.STOPPED
    await plans.end(scheduler, plan_id, state, problem.message if problem is not None else "")


async def _up(scheduler: Scheduler, plan: Plan) -> list[str]:
    return sorted(_hosts_up(scheduler, plan.cluster_id))


def _hosts_up(scheduler: Scheduler, cluster_id: str) -> set[str]:
    fleet = scheduler.fleet
    own = fleet.in_cluster(cluster_id)
    return {fleet.ids[row] for row in range(len(fleet)) if own[row] and fleet.status_of(row) == "up"}


async def _recheck(scheduler: Scheduler, plan: Plan, wave: int, up: list[str]) -> None:
    """Raises Refused(conflict) when what isn't begun yet had better not be."""
    rest = [step for step in plan.steps if step.wave >= wave and step.state is PlanStepState.PLANNED]
    if not rest:
        return
    if plan.state is not PlanState.RUNNING:
        raise conflict(plan.reason or f"the plan has {plan.state}")
    cleared = {host_id for host_id in plan.host_ids if boards.is_cleared(scheduler, host_id)}
    if lost := set(up) - _hosts_up(scheduler, plan.cluster_id) - cleared:
        names = [
            scheduler.fleet.names[scheduler.fleet.rows[h]] if h in scheduler.fleet.rows else h for h in lost
        ]
        leaving = all(boards.leaves(scheduler, host_id) for host_id in lost)
        raise conflict(
            f"host {min(names)} is no longer up, and what becomes of its VMs goes before any plan",
            **({"rule": LEAVING} if leaving else {}),
        )
    board = await boards.look(scheduler, plan.cluster_id, closed=plan.host_ids)
    now = [step for step in rest if step.wave == wave]
    if why := wrong_now(board, now):
        raise conflict(f"things are no longer as they were planned: {why}")
    if useless_now(board, plans.wanted_of(scheduler, plan), rest):
        raise conflict("the rest of the plan would no longer make the cluster more even")


async def _go(scheduler: Scheduler, run: Run, plan_id: str, number: int) -> None:
    """One step to its end. Raises Refused with its reason."""
    step = (await PLANS.get(scheduler.core.pool, plan_id)).public.steps[number]
    if step.state is PlanStepState.DONE:
        return
    title = f"Moving {step.vm_name} to {step.target_host_name}"
    await _note(scheduler, plan_id, number, PlanStepState.MOVING, guard=sql.still_holds(plan_id, step.vm_id))
    try:
        await run.step(f"move-{number}", title, lambda: _move(scheduler, run, step, number))
    except Refused as refused:
        if not refused.details.get(LOST):
            await _note(scheduler, plan_id, number, PlanStepState.FAILED, refused.message)
        raise
    await _note(scheduler, plan_id, number, PlanStepState.DONE)


async def _move(scheduler: Scheduler, run: Run, step: PlanStep, number: int) -> None:
    ended = scheduler.moving.setdefault(step.vm_id, asyncio.Event())
    try:
        question = MigrateVm(id=step.vm_id, host_id=step.target_host_id)
        begun = await scheduler.core.bus.ask(MIGRATE_VM, question, run.caller_for(f"move-{number}"))
        operation = await _ended(scheduler, begun.id, ended)
    finally:
        scheduler.moving.pop(step.vm_id, None)
    if operation.problem is not None:
        problem = operation.problem
        details = {name: value for name, value in problem.details.items() if name != LOST}
        raise Refused(problem.kind, problem.message, **details)


async def _ended(scheduler: Scheduler, operation_id: str, event: asyncio.Event) -> Operation:
    """The migration, once it has ended; an inventory that is away for a while is asked again."""
    while True:
        event.clear()
        with suppress(Refused):
            question = GetOperation(id=operation_id)
            operation = await scheduler.core.bus.ask(GET_OPERATION[Owner.INVENTORY], question)
            if operation.state in ENDED:
                return operation
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), ASK_SECONDS)


async def _note(
    scheduler: Scheduler,
    plan_id: str,
    number: int,
    state: PlanStepState,
    message: str = "",
    guard: Change | None = None,
) -> None:
    """In the plan, how far the step is. With a guard: raises Refused(conflict) when it holds no more."""
    while True:
        row = await PLANS.get(scheduler.core.pool, plan_id)
        plan = row.public
        if plan.steps[number].state is state:
            return
        steps = list(plan.steps)
        steps[number] = replace(steps[number], state=state, message=message)
        if guard is not None and plan.state is not PlanState.RUNNING:
            raise conflict(plan.reason or f"the plan has {plan.state}")
        try:
            guards = () if guard is None else (guard,)
            await scheduler.core.commit(PLANS.update(row, replace(plan, steps=tuple(steps))), *guards)
        except Stale:
            continue
        return
