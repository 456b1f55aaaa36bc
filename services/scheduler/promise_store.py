"""The SQL of promises: the count that guards them, what VMs would ask of another host, and where they would go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from services.scheduler import cell_store
from services.scheduler.config import SchedulerConfig
from services.scheduler.model import MIB
from services.scheduler.pages import Pages
from services.scheduler.policies.promise import Guest
from services.scheduler.store import Pool
from volery.contracts.base import encode
from volery.contracts.cluster import Cluster
from volery.contracts.ids import new_id
from volery.contracts.promise import PROMISE_CHANGED, PROMISE_DELETED, ClusterPromise, PlannedChange
from volery.contracts.scheduling import Need
from volery.runtime.tables import Change, Nothing, Table

PROMISES: Table[ClusterPromise, Nothing] = Table(
    "promise",
    ClusterPromise,
    Nothing,
    columns={"cluster_id": "cluster_id", "kept": "kept"},
    changed=PROMISE_CHANGED,
    deleted=PROMISE_DELETED,
)

HOLD_SECONDS = 15.0
"""A change that its owner asked about is made, and heard of here, long before."""


async def count(pool: Pool, cluster_id: str) -> int:
    """How often something changed that may change whether the cluster's promise holds; read before all else."""
    found: int | None = await pool.fetchval(
        "select changes from promise_count where cluster_id = $1", cluster_id
    )
    return -1 if found is None else found


def next_count(cluster_id: str, seen: int) -> Change:
    """Guards what was checked: nothing changed since the count was read."""
    return Change(
        """update promise_count set changes = changes + 1 where cluster_id = {0} and changes = {1} returning 1""",
        (cluster_id, seen),
    )


def raise_count(cluster_ids: Collection[str], by: int = 1) -> Change:
    """By none it only takes the turn of whoever writes about the cluster's VMs."""
    return Change(
        "update promise_count set changes = changes + {1} where cluster_id = any({0}::text[])",
        (sorted(cluster_ids), by),
        guarded=False,
    )


async def guests(pool: Pool, cluster_id: str, config: SchedulerConfig) -> dict[str, Guest]:
    """The VMs that hold capacity in a cluster, where their newest claim is."""
    records = await pool.fetch(
        """select c.id, c.vm_id, c.host_id, c.memory_bytes, c.vcpus, c.high_availability, p.need, p.lost_host_id,
                  p.refuge_host_id, v.name, c.pages_2m, c.pages_1g
           from host_capacity h join claim c on c.host_id = h.id left join promised_vm p on p.vm_id = c.vm_id
                left join vm v on v.id = c.vm_id
           where h.cluster_id = $1 order by c.vm_id, c.epoch""",
        cluster_id,
    )
    cells = await cell_store.held(pool, cluster_id)
    overhead, decoder, found = config.guest_overhead_mib * MIB, msgspec.json.Decoder(Need), {}
    for r in records:
        pages = Pages(r["pages_2m"], r["pages_1g"])
        memory = pages.memory_bytes or r["memory_bytes"] - overhead
        need = decoder.decode(r["need"]) if r["need"] is not None else Need(
            vm_id=r["vm_id"], cluster_id=cluster_id, memory_bytes=max(memory, 1), vcpus=r["vcpus"],
            name=r["name"] or r["vm_id"], high_availability=r["high_availability"], hugepage_kib=pages.page_kib,
        )  # fmt: skip
        found[r["vm_id"]] = Guest(
            need,
            r["host_id"],
            r["memory_bytes"],
            r["vcpus"],
            r["lost_host_id"] or "",
            r["refuge_host_id"] or "",
            pages,
            cells.get(r["id"], ()),
        )
    return found


async def figures(pool: Pool, cluster_id: str) -> list[tuple[str, str, int, int, int, int, Pages, Pages]]:
    """Host, status, limits of memory and vCPUs, what is taken of them, huge pages, and what is taken of those. Memory may be
    a second behind."""
    records = await pool.fetch(
        """select id, status, memory_limit_bytes, vcpus_limit, memory_used_bytes, vcpus_used, pages_2m, pages_1g,
                  pages_2m_used, pages_1g_used
           from host_capacity where cluster_id = $1 and not gone""",
        cluster_id,
    )
    return [(r[0], r[1], r[2], r[3], r[4], r[5], Pages(r[6], r[7]), Pages(r[8], r[9])) for r in records]


async def unasked(pool: Pool, cluster_ids: Sequence[str], seconds: float) -> list[str]:
    """VMs there whose needs nobody told, or that were heard of since, or whose needs were told so long ago."""
    records = await pool.fetch(
        """select c.vm_id from host_capacity h join claim c on c.host_id = h.id
                left join promised_vm p on p.vm_id = c.vm_id left join vm v on v.id = c.vm_id
           where h.cluster_id = any($1::text[])
             and (p.vm_id is null or v.heard_at > p.asked_at or p.asked_at < now() - make_interval(secs => $2))
           order by c.vm_id""",
        list(cluster_ids),
        seconds,
    )
    return list(dict.fromkeys(r["vm_id"] for r in records))


async def needs(pool: Pool, vm_ids: Sequence[str]) -> dict[str, Need]:
    records = await pool.fetch(
        "select vm_id, need from promised_vm where vm_id = any($1::text[])", list(vm_ids)
    )
    return {r["vm_id"]: msgspec.json.decode(r["need"], type=Need) for r in records}


def as_restarted(need: Need) -> str:
    """What a VM runs with binds it as long as it runs: brought back, it takes the shape of any host."""
    return encode(replace(need, shape=None)).decode()


def keep_needs(told: Sequence[Need]) -> Change:
    """What these VMs would ask of another host; where they would go stays."""
    return Change(
        """insert into promised_vm (vm_id, cluster_id, need)
           select n.vm_id, n.cluster_id, n.need
           from unnest({0}::text[], {1}::text[], {2}::text[]) as n(vm_id, cluster_id, need)
           on conflict (vm_id) do update set cluster_id = excluded.cluster_id, need = excluded.need, asked_at = now()""",
        (
            [need.vm_id for need in told],
            [need.cluster_id for need in told],
            [as_restarted(need) for need in told],
        ),
        guarded=False,
    )


def keep_need(need: Need, lost_host_id: str, refuge_host_id: str) -> Change:
    """The same of one VM, with where it goes: one statement can't write a row twice."""
    return Change(
        """insert into promised_vm (vm_id, cluster_id, need, lost_host_id, refuge_host_id)
           values ({0}, {1}, {2}, {3}, {4})
           on conflict (vm_id) do update set cluster_id = excluded.cluster_id, need = excluded.need,
               lost_host_id = excluded.lost_host_id, refuge_host_id = excluded.refuge_host_id, asked_at = now()""",
        (need.vm_id, need.cluster_id, as_restarted(need), lost_host_id, refuge_host_id),
        guarded=False,
    )


def keep_refuges(found: Mapping[str, tuple[str, str]]) -> Change:
    """VM → the host whose loss it is for, and where it goes then."""
    vm_ids = sorted(found)
    return Change(
        """update promised_vm p set lost_host_id = n.lost, refuge_host_id = n.refuge
           from unnest({0}::text[], {1}::text[], {2}::text[]) as n(vm_id, lost, refuge)
           where p.vm_id = n.vm_id""",
        (vm_ids, [found[v][0] for v in vm_ids], [found[v][1] for v in vm_ids]),
        guarded=False,
    )


async def refuge(pool: Pool, vm_id: str) -> str:
    """Where it is to be brought back; "" when that isn't known."""
    found: str | None = await pool.fetchval("select refuge_host_id from promised_vm where vm_id = $1", vm_id)
    return found or ""


async def holds(pool: Pool, cluster_id: str) -> list[PlannedChange]:
    records = await pool.fetch(
        "select doc from promise_hold where cluster_id = $1 and until > now() order by id", cluster_id
    )
    return [msgspec.json.decode(r["doc"], type=PlannedChange) for r in records]


def hold(planned: PlannedChange) -> Change:
    return Change(
        """insert into promise_hold (id, cluster_id, doc, of_cluster, until)
           values ({0}, {1}, {2}, {3}, now() + make_interval(secs => {4})) returning 1""",
        (
            new_id(),
            planned.cluster_id,
            encode(planned).decode(),
            planned.admission_control is not None or planned.reserve_host_failures is not None,
            HOLD_SECONDS,
        ),
    )


def heard_of_cluster(cluster_id: str, done: Sequence[str]) -> list[Change]:
    """`done`: ids of what was planned for the cluster itself, and is as planned now."""
    return [
        Change(
            """insert into promise_count (cluster_id, changes) values ({0}, 0)
               on conflict (cluster_id) do update set changes = promise_count.changes + 1""",
            (cluster_id,),
            guarded=False,
        ),
        Change("delete from promise_hold where id = any({0}::text[])", (list(done),), guarded=False),
    ]


async def done_as(pool: Pool, cluster: Cluster) -> list[str]:
    """Of what was planned for the cluster itself, what it says of itself now. Its owner is also heard again of what it
    was before."""
    records = await pool.fetch(
        "select id, doc from promise_hold where of_cluster and cluster_id = $1 order by id", cluster.id
    )
    found = [(r["id"], msgspec.json.decode(r["doc"], type=PlannedChange)) for r in records]
    return [
        hold_id
        for hold_id, planned in found
        if planned.reserve_host_failures in (None, cluster.reserve_host_failures)
        and planned.admission_control in (None, cluster.admission_control)
    ]


async def forget(pool: Pool) -> None:
    await pool.execute("delete from promise_hold where until < now()")
    await pool.execute(
        "delete from promised_vm p where not exists (select 1 from claim c where c.vm_id = p.vm_id)"
    )
