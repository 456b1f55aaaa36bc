"""Clusters whose policy says so have hosts switched off that aren't needed, and on again: by the scheduler's leader.

It acts on a fresh view only: inventory was listed since it leads, every host that is up was heard of lately, none is silent,
and no other plan is under way. After one direction the other waits for a pause, but for a VM that found no place: that wakes
a host at once.
"""

from __future__ import annotations

import logging

import numpy as np

from services.scheduler import boards, plans, saving
from services.scheduler import plan_store as plan_sql
from services.scheduler import saving_store as sql
from services.scheduler.fleet import UP, Bools
from services.scheduler.policies.balance import BALANCES, Thresholds
from services.scheduler.policies.saving import Woken, automatic, reserve, wake
from services.scheduler.policies.units import OVERLOAD_MINUTES
from services.scheduler.state import Scheduler
from volery.contracts.base import Owner
from volery.contracts.plan import MakePlan, PlanKind, PlanState
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.relay import stream_name
from volery.runtime.service import Part

log = logging.getLogger(__name__)

part = Part()

LOOK_SECONDS = 1.0
FORGET_SECONDS = 30.0
WANTED_SECONDS = 60.0


@part.every(LOOK_SECONDS)
async def look(scheduler: Scheduler) -> None:
    seconds, clusters = scheduler.config.saving_seconds, scheduler.fleet.clusters
    saving_power = [c for c in clusters if automatic(scheduler.fleet.recipe(scheduler.policy(c)))]
    words = "no power is saved in cluster %s now: %s"
    await plans.in_turn(scheduler, saving_power, seconds, scheduler.rested_at, _rest, words)


async def _rest(scheduler: Scheduler, cluster_id: str) -> None:
    if not _is_fresh(scheduler, cluster_id) or not await plans.may(scheduler, cluster_id, PlanKind.SAVING):
        return
    woken = await _woken(scheduler, cluster_id)
    if woken.host_id:
        log.info("a host of cluster %s is woken: %s", cluster_id, woken.reason)
        await _make(
            scheduler, MakePlan(cluster_id=cluster_id, kind=PlanKind.SAVING, wake_host_ids=(woken.host_id,))
        )
        return
    idle = _idle(scheduler, cluster_id)
    if not idle or await _paused(scheduler, cluster_id):
        return
    able = await saving.wakeable(scheduler, cluster_id)
    ask = MakePlan(cluster_id=cluster_id, kind=PlanKind.SAVING, host_ids=tuple(sorted(set(idle) & able)))
    if ask.host_ids and (found := (await saving.drafted(scheduler, ask)).host_ids):
        await _make(scheduler, MakePlan(cluster_id=cluster_id, kind=PlanKind.SAVING, host_ids=found))


async def _make(scheduler: Scheduler, ask: MakePlan) -> None:
    # Under an id of its own: whoever else is asked to at the same time meets it in the arbiter.
    await plans.make(scheduler, ask, boards.SELF)


def _up(scheduler: Scheduler, cluster_id: str) -> Bools:
    among: Bools = scheduler.fleet.in_cluster(cluster_id) & (scheduler.fleet.ints("status") == UP)
    return among


def _is_fresh(scheduler: Scheduler, cluster_id: str) -> bool:
    """Whether inventory was listed, and every host that is up was heard of by this process a short while ago."""
    if stream_name(Owner.INVENTORY) not in scheduler.listed:
        return False
    now, fleet = monotonic(), scheduler.fleet
    up = np.flatnonzero(_up(scheduler, cluster_id)).tolist()
    return all(
        scheduler.idle.heard(fleet.ids[row], now) <= scheduler.config.saving_heard_seconds for row in up
    )


def _idle(scheduler: Scheduler, cluster_id: str) -> list[str]:
    """Hosts that have done little for as long as the policy says."""
    fleet, now = scheduler.fleet, monotonic()
    recipe = fleet.recipe(scheduler.policy(cluster_id))
    seconds = Thresholds.of(recipe, scheduler.config).seconds
    if OVERLOAD_MINUTES not in recipe.parameters:
        seconds = max(seconds, scheduler.config.plan_after_seconds)
    up = np.flatnonzero(_up(scheduler, cluster_id)).tolist()
    return [fleet.ids[row] for row in up if scheduler.idle.lasts(fleet.ids[row], now) >= seconds]


async def _paused(scheduler: Scheduler, cluster_id: str) -> bool:
    """Whether the last time that a host was switched off or on was a short while ago."""
    last = await plan_sql.newest_of(scheduler.core.pool, cluster_id, PlanKind.SAVING)
    if last is None or last.public.ended_at is None:
        return False
    age = (utc_now() - last.public.ended_at).total_seconds()
    return age < scheduler.config.saving_pause_seconds


async def _woken(scheduler: Scheduler, cluster_id: str) -> Woken:
    asleep = await saving.sleepers(scheduler, cluster_id)
    if not asleep:
        return Woken()
    fleet, recipe = scheduler.fleet, scheduler.fleet.recipe(scheduler.policy(cluster_id))
    up = _up(scheduler, cluster_id)
    spare = int((up & (fleet.ints("memory_used") == 0) & (fleet.ints("vcpus_used") == 0)).sum())
    cut = BALANCES["even_distribution"](fleet, up, Thresholds.of(recipe, scheduler.config), monotonic())
    over = next((fleet.names[row] for row in np.flatnonzero(cut.over)), "")
    found = wake(asleep, spare=spare, kept=reserve(recipe), over="" if cut.room.any() else over)
    if any(each.wanted_by for each in asleep):
        return Woken() if await _failed_lately(scheduler, cluster_id) else found
    return Woken() if await _paused(scheduler, cluster_id) else found


async def _failed_lately(scheduler: Scheduler, cluster_id: str) -> bool:
    last = await plan_sql.newest_of(scheduler.core.pool, cluster_id, PlanKind.SAVING)
    failed = last is not None and last.public.state is PlanState.STOPPED and bool(last.public.wake_host_ids)
    return failed and await _paused(scheduler, cluster_id)


@part.every(FORGET_SECONDS)
async def forget(scheduler: Scheduler) -> None:
    await sql.forget_wanted(scheduler.core.pool, WANTED_SECONDS)
