"""The SQL of plans: the plans, and which VMs and hosts active ones hold. Two makers of plans meet in the keys of the table
plan_hold: one of them is refused, whatever both have read before."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.scheduler.store import Pool
from volery.contracts.errors import conflict
from volery.contracts.plan import PLAN_CHANGED, PLAN_DELETED, Plan, PlanKind, PlanState
from volery.runtime.tables import Change, Nothing, Row, Table

PlanRow = Row[Plan, Nothing]

PLANS: Table[Plan, Nothing] = Table(
    "plan",
    Plan,
    Nothing,
    columns={"cluster_id": "cluster_id", "kind": "kind", "state": "state", "created_at": "created_at"},
    changed=PLAN_CHANGED,
    deleted=PLAN_DELETED,
)
HELD = "plan_hold_once"
RANKS = {kind: rank for rank, kind in enumerate(PlanKind)}
"""Lower goes before higher."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A VM or host that an active plan holds."""

    noun: str
    object_id: str
    plan_id: str
    rank: int


def holds(plan: Plan) -> list[tuple[str, str, str]]:
    """Noun, object and, of a VM, where the plan takes it."""
    vms = {step.vm_id: step.target_host_id for step in plan.steps}
    hosts = {step.source_host_id for step in plan.steps} | {step.target_host_id for step in plan.steps}
    return [
        *(("vm", vm_id, target) for vm_id, target in sorted(vms.items())),
        *(("host", host_id, "") for host_id in sorted(hosts | set(plan.host_ids) | set(plan.wake_host_ids))),
    ]


def take(plan: Plan) -> Change:
    """Raises Taken(HELD) when committed while another plan holds anything of it."""
    rows = holds(plan)
    return Change(
        """insert into plan_hold (noun, object_id, plan_id, rank, target_host_id)
           select h.noun, h.object_id, {0}, {1}, h.target
           from unnest({2}::text[], {3}::text[], {4}::text[]) as h(noun, object_id, target)""",
        (plan.id, RANKS[plan.kind], *([row[n] for row in rows] for n in range(3))),
        guarded=False,
    )


def let_go(plan_ids: Collection[str]) -> Change:
    """Everything that these plans hold."""
    return Change(
        "delete from plan_hold where plan_id = any({0}::text[])", (sorted(plan_ids),), guarded=False
    )


def still_holds(plan_id: str, vm_id: str) -> Change:
    """Guards a step: no other plan has taken the VM."""
    return Change(
        "select 1 from plan_hold where noun = 'vm' and object_id = {1} and plan_id = {0} for share",
        (plan_id, vm_id),
    )


async def in_the_way(pool: Pool, plan: Plan) -> list[Hold]:
    """What other plans hold of it."""
    wanted = holds(plan)
    records = await pool.fetch(
        """select h.noun, h.object_id, h.plan_id, h.rank from plan_hold h
           join unnest($1::text[], $2::text[]) as w(noun, object_id)
             on w.noun = h.noun and w.object_id = h.object_id
           where h.plan_id <> $3 order by h.noun, h.object_id""",
        [row[0] for row in wanted],
        [row[1] for row in wanted],
        plan.id,
    )
    return [Hold(**dict(r)) for r in records]


async def targets(pool: Pool, vm_ids: Collection[str]) -> dict[str, tuple[str, str]]:
    """VM → the active plan that holds it, and where that takes it."""
    records = await pool.fetch(
        "select object_id, plan_id, target_host_id from plan_hold where noun = 'vm' and object_id = any($1::text[])",
        sorted(vm_ids),
    )
    return {r["object_id"]: (r["plan_id"], r["target_host_id"]) for r in records}


async def running(pool: Pool, cluster_id: str) -> list[PlanRow]:
    return await PLANS.where(pool, "state = 'running' and cluster_id = $1", cluster_id)


async def check_running(pool: Pool, plan_id: str) -> None:
    """Raises Refused(conflict) with the reason when it has ended: another plan may hold its hosts by now."""
    plan = (await PLANS.get(pool, plan_id)).public
    if plan.state is not PlanState.RUNNING:
        raise conflict(plan.reason or f"the plan has {plan.state}", plan_id=plan.id)


async def newest(pool: Pool, cluster_id: str) -> PlanRow | None:
    rows = await PLANS.where(
        pool, "id = (select id from plan where cluster_id = $1 order by id desc limit 1)", cluster_id
    )
    return rows[0] if rows else None


async def newest_of(pool: Pool, cluster_id: str, kind: PlanKind) -> PlanRow | None:
    rows = await PLANS.where(
        pool,
        "id = (select id from plan where cluster_id = $1 and kind = $2 order by id desc limit 1)",
        cluster_id,
        str(kind),
    )
    return rows[0] if rows else None


async def forgotten(pool: Pool, days: int) -> list[PlanRow]:
    """Plans that ended so long ago."""
    return await PLANS.where(
        pool, "state <> 'running' and created_at < now() - make_interval(days => $1)", days
    )


async def standing(pool: Pool, host_ids: Sequence[str]) -> dict[str, str]:
    """VM → its host, of those whose only claim is on one of these hosts, where inventory says that they run."""
    records = await pool.fetch(
        """select c.vm_id, c.host_id, v.host_id as runs_on from claim c join vm v on v.id = c.vm_id
           where not v.deleted and v.host_id = any($1::text[]) order by c.vm_id, c.host_id""",
        list(host_ids),
    )
    held: dict[str, set[str]] = {}
    for r in records:
        held.setdefault(r["vm_id"], {r["runs_on"]}).add(r["host_id"])
    return {vm_id: next(iter(hosts)) for vm_id, hosts in held.items() if len(hosts) == 1}
