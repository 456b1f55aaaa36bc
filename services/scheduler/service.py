"""The scheduler's table: what it answers, hears and does by itself."""

from __future__ import annotations

from services.scheduler import (
    affinity_groups,
    claims,
    facts,
    host_devices,
    licences,
    many,
    placing,
    plan_runs,
    plans,
    promises,
    reconcile,
    resting,
    rooms,
    scheduling_policies,
)
from services.scheduler.config import SchedulerConfig
from services.scheduler.opening import open_scheduler
from volery.contracts.base import Owner
from volery.runtime.service import Service

service = Service(
    name=Owner.SCHEDULER,
    open=open_scheduler,
    config=SchedulerConfig,
    parts=[
        placing.part,
        many.part,
        rooms.part,
        promises.part,
        claims.part,
        licences.part,
        host_devices.part,
        affinity_groups.part,
        scheduling_policies.part,
        plans.part,
        plan_runs.part,
        resting.part,
        facts.part,
        reconcile.part,
    ],
    on_gap=facts.facts_were_lost,
    on_lead=facts.leadership_begins,
)
