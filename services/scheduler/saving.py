"""Plans that save power: which host is emptied and switched off, which sleeping one is woken, and how that ends.

The scheduler switches nothing itself: the last step of such a plan asks inventory, which makes sure that nothing runs on the
host, and ha, which knows its BMC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace as with_fields
from typing import TypeVar

from services.scheduler import boards, promises
from services.scheduler import plan_store as plan_sql
from services.scheduler import saving_store as sql
from services.scheduler.policies.balance import Thresholds
from services.scheduler.policies.balancing import Aims
from services.scheduler.policies.planning import Draft, Wanted, draft
from services.scheduler.policies.saving import PROVEN_DAYS, Limits, Sleeper, reserve, save
from services.scheduler.state import Scheduler
from volery.contracts.base import Call, Message
from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.host import SAVE_POWER, WAKE_HOST, SavePower, WakeHost
from volery.contracts.operation import Operation
from volery.contracts.plan import MakePlan, Plan, PlanKind
from volery.contracts.power import LIST_POWER_MANAGEMENT, Identity, PowerManagement
from volery.contracts.promise import PlannedChange
from volery.runtime.bus import LOST
from volery.runtime.listing import pages
from volery.runtime.run import Run

ADMISSIONS = 5
"""Hosts that are tried before it is said that the cluster's promise lets none sleep."""

Q = TypeVar("Q", bound=Message)
Ended = Callable[[Scheduler, str, asyncio.Event], Awaitable[Operation]]


async def check(scheduler: Scheduler, ask: MakePlan) -> None:
    """Raises Refused when what is named isn't asleep."""
    if not ask.wake_host_ids:
        return
    if ask.host_ids:
        raise invalid(
            "a plan wakes hosts or switches one off, not both: name one kind", field="wake_host_ids"
        )
    asleep = await sql.sleeping(scheduler.core.pool, ask.wake_host_ids)
    if awake := sorted(set(ask.wake_host_ids) - set(asleep)):
        raise conflict(f"host {_name(scheduler, awake[0])} doesn't sleep", host_id=awake[0])


def _name(scheduler: Scheduler, host_id: str) -> str:
    fleet = scheduler.fleet
    return fleet.names[fleet.rows[host_id]] if host_id in fleet.rows else host_id


async def drafted(scheduler: Scheduler, ask: MakePlan) -> Draft:
    """Raises Refused when ha or inventory don't answer."""
    if ask.wake_host_ids:
        names = ", ".join(_name(scheduler, host_id) for host_id in ask.wake_host_ids)
        return Draft(wake_host_ids=ask.wake_host_ids, said=f"wakes {names}")
    able = await wakeable(scheduler, ask.cluster_id)
    if ask.host_ids and (unable := sorted(set(ask.host_ids) - able)):
        raise conflict(
            f"host {_name(scheduler, unable[0])} has no power management that passed its test, so nobody could wake it",
            host_id=unable[0],
        )
    board = await boards.look(scheduler, ask.cluster_id)
    wanted = wanted_of(scheduler, ask.cluster_id, tuple(sorted(set(ask.host_ids) or able)))
    first = ""
    for _ in range(ADMISSIONS):
        made = draft(board, wanted)
        why = await _breaks(scheduler, ask.cluster_id, made)
        if not why and (made.host_ids or not first):
            return made
        if not made.host_ids:
            break
        first = first or why
        left = tuple(host_id for host_id in wanted.host_ids if host_id not in made.host_ids)
        wanted = with_fields(wanted, host_ids=left)
    return Draft(said=f"switches nothing off: {first}")


def wanted_of(scheduler: Scheduler, cluster_id: str, host_ids: tuple[str, ...]) -> Wanted:
    return Wanted(PlanKind.SAVING, Aims(), host_ids=host_ids, limits=limits(scheduler, cluster_id))


def limits(scheduler: Scheduler, cluster_id: str) -> Limits:
    policy = scheduler.policy(cluster_id)
    recipe = scheduler.fleet.recipe(policy)
    high = Thresholds.of(recipe, scheduler.config).high / 100
    return Limits(reserve(recipe), high, policy.reserve_host_failures > 0)


async def _breaks(scheduler: Scheduler, cluster_id: str, made: Draft) -> str:
    """Why the cluster's promise wouldn't be kept without the host; "" when it would."""
    if not made.host_ids:
        return ""
    change = PlannedChange(
        cluster_id=cluster_id,
        what=f"switching host {_name(scheduler, made.host_ids[0])} off",
        leaving_host_ids=made.host_ids,
        dry_run=True,
    )
    try:
        await promises.admit_change(scheduler, change, boards.SELF)
    except Refused as refused:
        if refused.kind is not Kind.CONFLICT:
            raise
        return refused.message
    return ""


async def wakeable(scheduler: Scheduler, cluster_id: str) -> set[str]:
    """Hosts of a cluster whose power management would wake them, as far as it was tested. Raises Refused when ha doesn't
    answer."""
    found = set()
    async for some in pages(scheduler.core.bus, LIST_POWER_MANAGEMENT, PowerManagement):
        for power in some:
            tested = power.test_passed and power.identity is Identity.CHECKED
            if power.cluster_id == cluster_id and power.enabled and tested:
                found.add(power.id)
    return found


async def sleepers(scheduler: Scheduler, cluster_id: str) -> list[Sleeper]:
    return await sql.sleepers(scheduler.core.pool, cluster_id, PROVEN_DAYS)


# The last step


async def finish(scheduler: Scheduler, run: Run, plan: Plan, ended: Ended) -> None:
    """Raises Refused with the reason when a host stays up, or asleep."""
    await plan_sql.check_running(scheduler.core.pool, plan.id)
    for host_id in plan.host_ids:
        await _sleeps(scheduler, run, plan, host_id, ended)
    for host_id in plan.wake_host_ids:
        title = f"Waking {_name(scheduler, host_id)}"
        question = WakeHost(id=host_id)
        await _asked(scheduler, run, plan, f"wake-{host_id}", title, WAKE_HOST, question, ended)
        await scheduler.core.commit(sql.want_no_more([host_id]))


async def _sleeps(scheduler: Scheduler, run: Run, plan: Plan, host_id: str, ended: Ended) -> None:
    name = _name(scheduler, host_id)
    title = f"Looking whether {name} is still not needed"
    await run.step("look", title, lambda: _look(scheduler, plan, host_id))
    question = SavePower(id=host_id, reason=f"plan {plan.id}", empty_only=True)
    await _asked(scheduler, run, plan, "sleep", f"Switching {name} off", SAVE_POWER, question, ended)


async def _look(scheduler: Scheduler, plan: Plan, host_id: str) -> None:
    """Raises Refused(conflict) when it isn't empty any more, or needed."""
    board = await boards.look(scheduler, plan.cluster_id)
    row = board.row.get(host_id)
    still = save(board, [] if row is None else [row], limits(scheduler, plan.cluster_id))
    if still.host is None or still.steps:
        why = still.reason or f"VMs have come to {_name(scheduler, host_id)}"
        raise conflict(f"things are no longer as they were planned: {why}")


async def _asked(
    scheduler: Scheduler,
    run: Run,
    plan: Plan,
    step: str,
    title: str,
    call: Call[Q, Operation],
    question: Q,
    ended: Ended,
) -> None:
    """An operation of inventory's to its end. What it has begun goes on when the plan is cancelled."""

    async def ask() -> None:
        begun = await scheduler.core.bus.ask(call, question, run.caller_for(step))
        operation = await ended(scheduler, begun.id, asyncio.Event())
        if operation.problem is not None:
            problem = operation.problem
            details = {name: value for name, value in problem.details.items() if name != LOST}
            raise Refused(problem.kind, problem.message, **details)

    run.checkpoint()
    await plan_sql.check_running(scheduler.core.pool, plan.id)
    await run.step(step, title, ask)
