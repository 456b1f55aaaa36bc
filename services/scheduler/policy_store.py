"""The SQL of scheduling policies: the policies, and which cluster was given which."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from services.scheduler.policies.recipe import Recipe
from services.scheduler.store import Pool
from volery.contracts.scheduling_policy import (
    SCHEDULING_POLICY_CHANGED,
    SCHEDULING_POLICY_DELETED,
    SchedulingPolicy,
)
from volery.runtime.tables import Change, Nothing, Row, Table

PolicyRow = Row[SchedulingPolicy, Nothing]

POLICIES: Table[SchedulingPolicy, Nothing] = Table(
    "scheduling_policy",
    SchedulingPolicy,
    Nothing,
    columns={"name": "name", "built_in": "built_in"},
    changed=SCHEDULING_POLICY_CHANGED,
    deleted=SCHEDULING_POLICY_DELETED,
    noun="scheduling policy",
)
POLICY_NAME = "scheduling_policy_name"


@dataclass(frozen=True, slots=True)
class Given:
    """A cluster, and the policy that it was given; "" is none."""

    id: str
    name: str
    balance: str
    policy_id: str


async def recipes(pool: Pool, condition: str = "true", *arguments: Any) -> list[Recipe]:
    records = await pool.fetch(f"select doc from scheduling_policy where {condition}", *arguments)
    return [Recipe.of(msgspec.json.decode(r["doc"], type=SchedulingPolicy)) for r in records]


async def recipes_of(pool: Pool, cluster_id: str) -> list[Recipe]:
    """The one that the cluster was given, if it was given one."""
    return await recipes(pool, "id = (select policy_id from cluster where id = $1)", cluster_id)


async def given(pool: Pool, cluster_id: str) -> Given | None:
    """None: nobody spoke of the cluster."""
    record = await pool.fetchrow("select id, name, balance, policy_id from cluster where id = $1", cluster_id)
    return None if record is None else Given(**dict(record))


async def in_use(pool: Pool) -> list[PolicyRow]:
    """There are few policies, so all are read."""
    return [row for row in await POLICIES.where(pool) if row.public.cluster_ids]


async def all_given(pool: Pool) -> dict[str, str]:
    """Cluster → its policy, of those that were given one."""
    records = await pool.fetch("select id, policy_id from cluster where policy_id <> ''")
    return {r["id"]: r["policy_id"] for r in records}


async def cluster_names(pool: Pool, cluster_ids: Collection[str]) -> list[str]:
    records = await pool.fetch(
        "select name from cluster where id = any($1::text[]) order by name", list(cluster_ids)
    )
    return [r["name"] for r in records]


def give(cluster: Given, policy_id: str) -> Change:
    """Guarded: nobody else gave the cluster another one meanwhile. Placements that were decided before are not
    committed."""
    return Change(
        """update cluster set policy_id = {2}, groups_revision = groups_revision + 1 where id = {0} and policy_id = {1}
           returning 1""",
        (cluster.id, cluster.policy_id, policy_id),
    )


def decide_again(cluster_ids: Sequence[str]) -> Change:
    """Placements in these clusters that were decided before aren't committed."""
    return Change(
        "update cluster set groups_revision = groups_revision + 1 where id = any({0}::text[])",
        (list(cluster_ids),),
        guarded=False,
    )


def with_cluster(row: PolicyRow, cluster_id: str) -> Change:
    named = dict.fromkeys((*row.public.cluster_ids, cluster_id))
    return POLICIES.update(row, replace(row.public, cluster_ids=tuple(named)))


def without_clusters(row: PolicyRow, cluster_ids: Collection[str]) -> Change:
    kept = tuple(each for each in row.public.cluster_ids if each not in cluster_ids)
    return POLICIES.update(row, replace(row.public, cluster_ids=kept))
