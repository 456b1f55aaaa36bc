"""Plans: VMs that move for the good of their cluster, computed as a whole and carried out step by step."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from volery.contracts.base import Call, Entity, Fact, Message
from volery.contracts.cluster import GetById
from volery.contracts.operation import ListQuery, Operation, Page

LEAVING = "leaving"
"""The rule of a plan that stopped since other hosts of its cluster go into maintenance."""


class PlanKind(StrEnum):
    """What it is for. One of an earlier row takes hosts and VMs from one of a later row."""

    EVACUATION = "evacuation"
    """Hosts are emptied."""
    AFFINITY = "affinity"
    """Broken affinity groups are mended."""
    BALANCE = "balance"
    """Hosts become alike in what the cluster's scheduling policy balances."""
    SAVING = "saving"
    """A host is emptied and switched off to save power, or a sleeping one is woken."""
    UPGRADE = "upgrade"
    """Hosts are emptied one after the other, each being back before the next. Only shown, and holds nothing: the upgrade of the
    cluster carries it out, host by host."""


class PlanState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    """Before its end, with the reason; what has moved stays where it is."""
    CANCELLED = "cancelled"


class PlanStepState(StrEnum):
    PLANNED = "planned"
    MOVING = "moving"
    DONE = "done"
    FAILED = "failed"


class PlanStep(Message):
    """One VM moves. Steps of one wave run together, the next wave begins when they have ended."""

    vm_id: str
    vm_name: str
    source_host_id: str
    source_host_name: str
    target_host_id: str
    target_host_name: str
    wave: int = 0
    state: PlanStepState = PlanStepState.PLANNED
    message: str = ""
    """Why it failed."""
    turn: int = 0
    """Of an upgrade: which of `host_ids` is emptied then, 0 the first."""


class Unplaced(Message):
    """A VM that the plan would move and has no place for."""

    vm_id: str
    vm_name: str
    reason: str


class Plan(Entity):
    cluster_id: str
    kind: PlanKind
    state: PlanState = PlanState.RUNNING
    message: str = ""
    """What it does, for a person."""
    reason: str = ""
    """Why it was stopped or cancelled."""
    steps: tuple[PlanStep, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    broken_groups: tuple[str, ...] = ()
    """Names of affinity groups that it can't mend."""
    before: float = 0.0
    """Of a balance: the sum over hosts of squared deviations from their fair share, as shares of what each can take; of
    affinity: how many of the broken rules' VMs are where they must or should not be. 0 is perfect."""
    after: float = 0.0
    host_ids: tuple[str, ...] = ()
    """Hosts that it empties; of an upgrade in the order of their turns; of a saving, the one that is switched off then."""
    wake_host_ids: tuple[str, ...] = ()
    """Of a saving: hosts that it wakes."""
    continued_by: str = ""
    """The plan that goes on with it, if it was ended for that."""
    principal: str = ""
    """Who asked for it; the scheduler itself is `service:scheduler`."""
    operation_id: str = ""
    """The operation that carries it out."""
    ended_at: datetime | None = None


class MakePlan(Message):
    """Compute a plan and carry it out; with `dry_run` only show it, in the operation's result."""

    cluster_id: str
    kind: PlanKind = PlanKind.BALANCE
    host_ids: tuple[str, ...] = ()
    """Of an evacuation or an upgrade: the hosts to be emptied. Of a saving: the only hosts of which one may be switched off; any,
    if none is named."""
    avoided_host_ids: tuple[str, ...] = ()
    """Of an evacuation: hosts to which a VM goes only if no other takes it."""
    joins: bool = False
    """Of an evacuation: those of the cluster that are under way for hosts which go into maintenance are ended, and this one goes
    on with them."""
    wake_host_ids: tuple[str, ...] = ()
    """Of a saving: the sleeping hosts that are woken, instead of one being switched off."""
    most_moves: int = 0
    """Not more moves than this; 0: as many as are worth it."""
    dry_run: bool = False


MAKE_PLAN = Call("scheduler.plan.make", MakePlan, Operation, mutates=True, timeout_seconds=30)
GET_PLAN = Call("scheduler.plan.get", GetById, Plan)
LIST_PLANS = Call("scheduler.plan.list", ListQuery, Page)
CANCEL_PLAN = Call("scheduler.plan.cancel", GetById, Operation, mutates=True)
"""What is on its way arrives; nothing more begins."""

PLAN_CHANGED = Fact("fact.scheduler.plan.{id}.changed", Plan)
PLAN_DELETED = Fact("fact.scheduler.plan.{id}.deleted", Plan)
