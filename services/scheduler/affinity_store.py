"""The SQL of affinity groups: the groups, the counters that guard what is decided under them, where VMs are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

import msgspec

from services.scheduler.model import SeenVm
from services.scheduler.policies.affinity import ClusterRules, Group
from services.scheduler.store import CLAIMS, ClaimPrivate, Pool
from volery.contracts.affinity_group import AffinityGroup
from volery.contracts.scheduling import Claim
from volery.runtime.tables import Change, Nothing, Row

GroupRow = Row[AffinityGroup, Nothing]
ClaimRow = Row[Claim, ClaimPrivate]


async def rules(pool: Pool) -> dict[str, ClusterRules]:
    """Cluster → its groups at one revision; clusters nobody spoke of have none."""
    records = await pool.fetch(
        """select c.id, c.groups_revision, g.doc from cluster c left join affinity_group g on g.cluster_id = c.id
           order by c.id"""
    )
    return _by_cluster([(r["id"], r["groups_revision"], r["doc"]) for r in records])


async def rules_of(pool: Pool, cluster_id: str) -> ClusterRules | None:
    records = await pool.fetch(
        """select c.id, c.groups_revision, g.doc from cluster c left join affinity_group g on g.cluster_id = c.id
           where c.id = $1""",
        cluster_id,
    )
    return _by_cluster([(r["id"], r["groups_revision"], r["doc"]) for r in records]).get(cluster_id)


def _by_cluster(records: Sequence[tuple[str, int, str | None]]) -> dict[str, ClusterRules]:
    revisions = {cluster_id: revision for cluster_id, revision, _ in records}
    groups: dict[str, list[Group]] = {cluster_id: [] for cluster_id in revisions}
    for cluster_id, _, doc in records:
        if doc is not None:
            groups[cluster_id].append(Group.of(msgspec.json.decode(doc, type=AffinityGroup)))
    return {c: ClusterRules(revision, tuple(groups[c])) for c, revision in revisions.items()}


def same_groups(cluster_id: str, revision: int) -> Change:
    """Guards a placement: the cluster's groups are those it was decided under, until it is committed."""
    return Change(
        "select 1 from cluster where id = {0} and groups_revision = {1} for share", (cluster_id, revision)
    )


def no_groups(cluster_id: str) -> Change:
    """Guards a placement in a cluster that nobody spoke of: still nobody has."""
    return Change("select 1 where not exists (select 1 from cluster where id = {0})", (cluster_id,))


def next_groups(cluster_id: str, revision: int) -> Change:
    """Guards a change of a cluster's groups: nobody else changed one since they were looked at."""
    return Change(
        """update cluster set groups_revision = groups_revision + 1 where id = {0} and groups_revision = {1}
           returning 1""",
        (cluster_id, revision),
    )


async def placements(pool: Pool, group_ids: Sequence[str]) -> dict[str, int]:
    """How many claims each of these groups has had; read before the claims are."""
    records = await pool.fetch(
        "select id, placements from affinity_group where id = any($1::text[])", list(group_ids)
    )
    return {r["id"]: r["placements"] for r in records}


def next_placement(group_id: str, seen: int) -> Change:
    """Guards a placement: no other VM that the group concerns got a claim since its places were read."""
    return Change(
        "update affinity_group set placements = placements + 1 where id = {0} and placements = {1} returning 1",
        (group_id, seen),
    )


async def seen_vms(pool: Pool, vm_ids: Collection[str]) -> dict[str, SeenVm]:
    records = await pool.fetch(
        """select id, epoch, status, host_id, memory_bytes, vcpus, name, deleted, heard_at, hugepage_kib from vm
           where id = any($1::text[])""",
        sorted(vm_ids),
    )
    return {r["id"]: SeenVm(**dict(r)) for r in records}


async def claim_rows(pool: Pool, vm_ids: Collection[str]) -> list[ClaimRow]:
    return await CLAIMS.where(pool, "vm_id = any($1::text[])", sorted(vm_ids))


async def claims_of_all(pool: Pool, vm_ids: Collection[str]) -> list[Claim]:
    return [row.public for row in await claim_rows(pool, vm_ids)]


async def heard_since(pool: Pool, since: datetime | None) -> set[str]:
    """VMs that inventory spoke of since then; None: all."""
    if since is None:
        return {r["id"] for r in await pool.fetch("select id from vm")}
    return {r["id"] for r in await pool.fetch("select id from vm where heard_at > $1", since)}


async def hosts_by_cluster(pool: Pool) -> Mapping[str, dict[str, str]]:
    """Cluster → host → its name."""
    found: dict[str, dict[str, str]] = {}
    for r in await pool.fetch("select id, name, cluster_id from host_capacity where not gone"):
        found.setdefault(r["cluster_id"], {})[r["id"]] = r["name"]
    return found


async def gone_hosts(pool: Pool) -> set[str]:
    return {r["id"] for r in await pool.fetch("select id from host_capacity where gone")}


async def groups_without_cluster(pool: Pool) -> list[str]:
    records = await pool.fetch(
        """select g.id from affinity_group g left join cluster c on c.id = g.cluster_id where c.id is null
           order by g.id"""
    )
    return [r["id"] for r in records]


async def host_clusters(pool: Pool, host_ids: Collection[str]) -> dict[str, str]:
    """Host → its cluster, of those known here."""
    records = await pool.fetch(
        "select id, cluster_id from host_capacity where not gone and id = any($1::text[])", sorted(host_ids)
    )
    return {r["id"]: r["cluster_id"] for r in records}
