"""Every SQL statement of the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from operator import attrgetter
from typing import Any, TypeAlias

import asyncpg
import msgspec

from services.scheduler import cell_claims, device_claims
from services.scheduler.figures import HostFigures, NetworkReach
from services.scheduler.model import ClusterPolicy, Limits, SeenVm
from services.scheduler.pages import Pages
from volery.contracts.affinity_group import AFFINITY_GROUP_CHANGED, AFFINITY_GROUP_DELETED, AffinityGroup
from volery.contracts.base import Message, encode
from volery.contracts.cluster import Cluster
from volery.contracts.domain import NumaNode
from volery.contracts.host import Host
from volery.contracts.network import Network
from volery.contracts.scheduling import CLAIM_CHANGED, CLAIM_DELETED, Claim
from volery.contracts.vm import Vm
from volery.runtime.tables import Change, Nothing, Row, Table, text_columns

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

LOST = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
"""What a lost connection to the database looks like."""

FLEET_CHANNEL = "scheduler_fleet"


class ClaimPrivate(Message):
    decision_id: str = ""
    """The decision that chose its host."""


CLAIMS: Table[Claim, ClaimPrivate] = Table(
    "claim",
    Claim,
    ClaimPrivate,
    columns={
        "vm_id": "vm_id",
        "epoch": "epoch",
        "host_id": "host_id",
        "state": "state",
        "memory_bytes": "memory_bytes",
        "vcpus": "vcpus",
        "high_availability": "high_availability",
        "pages_2m": "pages_2m",
        "pages_1g": "pages_1g",
        "cpu_pinning": "cpu_pinning",
        "exclusive_cpus": "exclusive_cpus",
        "created_at": "created_at",
        "updated_at": "updated_at",
    },
    changed=CLAIM_CHANGED,
    deleted=CLAIM_DELETED,
)
CLAIM_TAKEN = "claim_vm_epoch"

GROUPS: Table[AffinityGroup, Nothing] = Table(
    "affinity_group",
    AffinityGroup,
    Nothing,
    columns={"name": "name", "cluster_id": "cluster_id", "vm_ids": "vm_ids", "host_ids": "host_ids"},
    changed=AFFINITY_GROUP_CHANGED,
    deleted=AFFINITY_GROUP_DELETED,
    noun="affinity group",
)
GROUP_NAME = "affinity_group_name"

# Claims and the capacity they hold. The host's row is always written first, so that its lock orders them.


def take_capacity(claim: Claim) -> Change:
    """Its guard fails when the host has not that much left, or is no longer up. For a VM without CPUs of its own; see
    `cpu_store.take_cpus`."""
    return Change(
        f"""{_HOLD} and status = 'up' and not gone
             and memory_used_bytes + {{1}} <= memory_limit_bytes
             and (vcpus_used - vcpus_exclusive + {{2}}) * cpus::bigint
                 <= vcpus_limit::bigint * (cpus - cpus_exclusive)
             and (cpus_exclusive = 0 or {{2}} <= cpus - cpus_exclusive)
             and ({{5}} = 0 or pages_2m_used + {{5}} <= pages_2m) and ({{6}} = 0 or pages_1g_used + {{6}} <= pages_1g)
           returning 1""",
        _held(claim),
    )


def force_capacity(claim: Claim, times: int = 1) -> Change:
    """For a VM that runs there already: what is true must be recordable. -1 times gives back."""
    return Change(_HOLD, _held(claim, times), guarded=False)


_HOLD = """update host_capacity
           set memory_used_bytes = memory_used_bytes + {1}, vcpus_used = vcpus_used + {2}, guests = guests + {3},
               ha_guests = ha_guests + {4}, pages_2m_used = pages_2m_used + {5}, pages_1g_used = pages_1g_used + {6},
               cpus_revision = cpus_revision + {7}, cpus_exclusive = cpus_exclusive + {8},
               vcpus_exclusive = vcpus_exclusive + {9}, largest_shared = greatest(largest_shared, {10})
           where id = {0}"""


def _held(claim: Claim, times: int = 1) -> tuple[str | int, ...]:
    """The host, what is added to its counters, and what it holds of its CPUs."""
    return (
        claim.host_id,
        *held(claim, times),
        int(bool(claim.cpu_pinning)),
        times * claim.exclusive_cpus,
        times * claim.vcpus if claim.exclusive_cpus else 0,
        claim.vcpus if times > 0 and not claim.cpu_pinning else 0,
    )


def held(claim: Claim, times: int = 1) -> tuple[int, ...]:
    """Bytes, vCPUs, guests, highly available ones, huge pages of 2 MiB and 1 GiB: what is added to a host's counters."""
    counts = (
        claim.memory_bytes,
        claim.vcpus,
        1,
        int(claim.high_availability),
        claim.pages_2m,
        claim.pages_1g,
    )
    return tuple(times * count for count in counts)


def release(row: Row[Claim, ClaimPrivate]) -> list[Change]:
    """Delete a claim and give its capacity back."""
    parts = [*cell_claims.give_back(row.public), *device_claims.give_back(row.public)]
    changes = [force_capacity(row.public, -1), *parts, CLAIMS.delete(row)]
    if row.public.cpu_pinning:
        sql = "update cpu_use set ended_at = now() where id = {0}"
        changes.append(Change(sql, (row.id,), guarded=False))
    return changes


async def claims_of(pool: Pool, vm_id: str) -> list[Row[Claim, ClaimPrivate]]:
    return await CLAIMS.where(pool, "vm_id = $1", vm_id)


RECENT_SECONDS = 120.0
"""What was said of a VM so long ago may contradict its claim, or lack one; what was said earlier has been looked at."""
OF_RECENT_VMS = """
    and (c.state = 'tentative'
         or c.vm_id = any(array(select r.id from vm r where r.heard_at > now() - make_interval(secs => $3))))"""


async def suspicious_claims(
    pool: Pool, claim_seconds: float, settled_seconds: float, *, recent: bool = False
) -> list[tuple[Row[Claim, ClaimPrivate], SeenVm | None, bool]]:
    """Claims that may contradict what inventory says of their VMs, and whether a later placement of the VM holds
    one on the same host; model.settle decides. `recent`: only those that are tentative, or whose VMs were heard of lately."""
    lately = OF_RECENT_VMS if recent else ""
    records = await pool.fetch(
        f"""select c.doc, c.private, v.*,
                  exists(select 1 from claim n where n.vm_id = c.vm_id and n.host_id = c.host_id
                         and n.epoch > c.epoch and n.epoch <= v.epoch) as replaced
           from claim c left join vm v on v.id = c.vm_id
           where c.updated_at < now() - make_interval(secs => $2)
             and (v.id is null and c.created_at < now() - make_interval(secs => $1)
                  or v.deleted or v.epoch > c.epoch
                  or c.state = 'tentative'
                  or v.host_id <> c.host_id or v.status in ('down', 'suspended', 'image_locked'))
             and (v.id is null or v.heard_at < now() - make_interval(secs => $2)){lately}
           order by c.id""",
        claim_seconds,
        settled_seconds,
        *((RECENT_SECONDS,) if recent else ()),
    )
    return [(CLAIMS.row(r), None if r["id"] is None else seen(r), r["replaced"]) for r in records]


def seen(record: asyncpg.Record) -> SeenVm:
    return SeenVm(**{name: record[name] for name in SeenVm.__slots__})


async def now(pool: Pool) -> datetime:
    """The database's clock, which dates claims and what was heard of VMs."""
    at: datetime = await pool.fetchval("select now()")
    return at


async def correct_counters(pool: Pool) -> list[tuple[str, int, int]]:
    """Hosts whose counters differed from the sum of their claims, and by how much; they are right afterwards."""
    suspects = await pool.fetch(
        """select h.id from host_capacity h left join claim c on c.host_id = h.id
           group by h.id
           having h.memory_used_bytes <> coalesce(sum(c.memory_bytes), 0)
               or h.vcpus_used <> coalesce(sum(c.vcpus), 0) or h.guests <> count(c.id)
               or h.ha_guests <> coalesce(sum(c.high_availability::integer), 0)
               or h.pages_2m_used <> coalesce(sum(c.pages_2m), 0) or h.pages_1g_used <> coalesce(sum(c.pages_1g), 0)
               or h.cpus_exclusive <> coalesce(sum(c.exclusive_cpus), 0)
               or h.vcpus_exclusive <> coalesce(sum(case when c.exclusive_cpus > 0 then c.vcpus else 0 end), 0)
               or h.largest_shared <> coalesce(max(case when c.cpu_pinning = '' then c.vcpus else 0 end), 0)
           order by h.id"""
    )
    wrong = []
    for suspect in suspects:
        async with pool.acquire() as connection, connection.transaction():
            # Locked first and summed by a later statement: a claim committed in between would be lost otherwise.
            before = await connection.fetchrow(
                "select memory_used_bytes, vcpus_used from host_capacity where id = $1 for update",
                suspect["id"],
            )
            after = await connection.fetchrow(
                """update host_capacity set memory_used_bytes = s.memory, vcpus_used = s.vcpus, guests = s.guests,
                       ha_guests = s.ha_guests, cpus_exclusive = s.exclusive, vcpus_exclusive = s.alone,
                       largest_shared = s.largest, cpus_revision = cpus_revision + 1, pages_2m_used = s.pages_2m, pages_1g_used = s.pages_1g
                   from (select coalesce(sum(memory_bytes), 0)::bigint as memory,
                                coalesce(sum(vcpus), 0)::integer as vcpus, count(*)::integer as guests,
                                coalesce(sum(high_availability::integer), 0)::integer as ha_guests,
                                coalesce(sum(pages_2m), 0)::integer as pages_2m,
                                coalesce(sum(pages_1g), 0)::integer as pages_1g,
                                coalesce(sum(exclusive_cpus), 0)::integer as exclusive,
                                coalesce(sum(case when exclusive_cpus > 0 then vcpus else 0 end), 0)::integer as alone,
                                coalesce(max(case when cpu_pinning = '' then vcpus else 0 end), 0)::integer as largest
                         from claim where host_id = $1) s
                   where id = $1 returning memory_used_bytes, vcpus_used""",
                suspect["id"],
            )
        if before is not None and after is not None and before != after:
            wrong.append((suspect["id"], after[0] - before[0], after[1] - before[1]))
    return wrong


async def forget_gone(pool: Pool) -> None:
    """Rows that nothing refers to any more."""
    await pool.execute(
        """delete from host_capacity h where gone and not exists (select 1 from claim where host_id = h.id)
           and not exists (select 1 from affinity_group where position(h.id in host_ids) > 0)"""
    )
    await pool.execute(
        """delete from vm v where deleted and heard_at < now() - interval '1 day'
           and not exists (select 1 from claim where vm_id = v.id)
           and not exists (select 1 from affinity_group where position(v.id in vm_ids) > 0)"""
    )


# What other owners said. A revision already known changes nothing, so facts and lists may come twice.


def saw_host(host: Host, memory_bytes: int, pages: Pages, limits: Limits) -> Change:
    """Memory is that beside huge pages. The same revision again says what the previous release didn't take over."""
    return Change(
        """insert into host_capacity (id, revision, name, cluster_id, status, cpus, memory_bytes, cpu_models,
               machines, memory_limit_bytes, vcpus_limit, pages_2m, pages_1g, cores)
           values ({0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}::text[], {8}::text[], {9}, {10}, {11}, {12}, {13})
           on conflict (id) do update set revision = excluded.revision, name = excluded.name,
               cluster_id = excluded.cluster_id, status = excluded.status, cpus = excluded.cpus,
               memory_bytes = excluded.memory_bytes, cpu_models = excluded.cpu_models,
               machines = excluded.machines, memory_limit_bytes = excluded.memory_limit_bytes,
               vcpus_limit = excluded.vcpus_limit, pages_2m = excluded.pages_2m, pages_1g = excluded.pages_1g,
               cores = excluded.cores
           where not host_capacity.gone
             and (host_capacity.revision < excluded.revision
                  or host_capacity.revision = excluded.revision
                     and (host_capacity.memory_bytes, host_capacity.pages_2m, host_capacity.pages_1g, host_capacity.cores)
                         is distinct from (excluded.memory_bytes, excluded.pages_2m, excluded.pages_1g, excluded.cores))""",
        (
            host.id,
            host.revision,
            host.name,
            host.cluster_id,
            str(host.status),
            host.capabilities.cpus,
            memory_bytes,
            list(host.capabilities.cpu_models),
            list(host.capabilities.machines),
            limits.memory_bytes,
            limits.vcpus,
            *pages,
            encode(host.capabilities.cores).decode() if host.capabilities.cores else "",
        ),
        guarded=False,
    )


def host_gone(host_id: str) -> Change:
    return Change(
        "update host_capacity set gone = true, status = 'gone' where id = {0}", (host_id,), guarded=False
    )


def saw_cluster(cluster: Cluster) -> Change:
    """The same revision again says what the previous release didn't take over."""
    return Change(
        """insert into cluster (id, revision, name, cpu_model, machine, memory_overcommit_percent,
               cpu_overcommit_ratio, balance, reserve_host_failures, admission_control)
           values ({0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9})
           on conflict (id) do update set revision = excluded.revision, name = excluded.name,
               cpu_model = excluded.cpu_model, machine = excluded.machine,
               memory_overcommit_percent = excluded.memory_overcommit_percent,
               cpu_overcommit_ratio = excluded.cpu_overcommit_ratio, balance = excluded.balance,
               reserve_host_failures = excluded.reserve_host_failures,
               admission_control = excluded.admission_control
           where cluster.revision < excluded.revision
              or cluster.revision = excluded.revision
                 and (cluster.reserve_host_failures, cluster.admission_control)
                     is distinct from (excluded.reserve_host_failures, excluded.admission_control)""",
        (
            cluster.id,
            cluster.revision,
            cluster.name,
            cluster.cpu_model,
            cluster.machine,
            cluster.memory_overcommit_percent,
            cluster.cpu_overcommit_ratio,
            str(cluster.balance),
            cluster.reserve_host_failures,
            str(cluster.admission_control),
        ),
        guarded=False,
    )


def cluster_gone(cluster_id: str) -> Change:
    return Change("delete from cluster where id = {0}", (cluster_id,), guarded=False)


def set_limits(new: dict[str, Limits]) -> Change:
    return Change(
        """update host_capacity h set memory_limit_bytes = n.memory, vcpus_limit = n.vcpus
           from unnest({0}::text[], {1}::bigint[], {2}::integer[]) as n(id, memory, vcpus)
           where h.id = n.id""",
        (list(new), [limit.memory_bytes for limit in new.values()], [limit.vcpus for limit in new.values()]),
        guarded=False,
    )


async def hosts_of(pool: Pool, cluster_id: str) -> list[HostFigures]:
    return await hosts(pool, "cluster_id = $1 and not gone", cluster_id)


def saw_network(network: Network) -> Change:
    return Change(
        """insert into network (id, revision, name, ready_host_ids) values ({0}, {1}, {2}, {3}::text[])
           on conflict (id) do update set revision = excluded.revision, name = excluded.name,
               ready_host_ids = excluded.ready_host_ids
           where network.revision < excluded.revision""",
        (network.id, network.revision, network.name, list(network.ready_host_ids)),
        guarded=False,
    )


def network_gone(network_id: str) -> Change:
    return Change("delete from network where id = {0}", (network_id,), guarded=False)


_OF_VM = attrgetter("id", "revision", "name", "epoch", "status", "host_id", "memory_bytes")


def _taken_by(vm: Vm) -> tuple[int, tuple[NumaNode, ...]]:
    """vCPUs and NUMA nodes, of one that is resized those that it runs with."""
    found = vm if vm.runs_with is None else vm.runs_with
    return found.vcpus, found.numa_nodes


def saw_vms(vms: Sequence[Vm], deleted: Collection[str] = ()) -> Change:
    """Each of them once; `deleted` are the ids of those that are no more. The same revision again says what the previous
    release didn't take over."""
    return Change(
        """insert into vm (id, revision, name, epoch, status, host_id, memory_bytes, vcpus, deleted, hugepage_kib,
               numa_nodes, devices)
           select v.id, v.revision::bigint, v.name, v.epoch::bigint, v.status, v.host_id, v.memory_bytes::bigint,
                  v.vcpus::int, v.deleted::bool, v.hugepage_kib::int,
                  v.numa_nodes, v.devices
           from unnest({0}::text[], {1}::text[], {2}::text[], {3}::text[], {4}::text[], {5}::text[], {6}::text[],
                       {7}::text[], {8}::text[], {9}::text[], {10}::text[], {11}::text[])
                as v(id, revision, name, epoch, status, host_id, memory_bytes, vcpus, deleted, hugepage_kib, numa_nodes,
                     devices)
           on conflict (id) do update set revision = excluded.revision, name = excluded.name,
               epoch = excluded.epoch, status = excluded.status, host_id = excluded.host_id,
               memory_bytes = excluded.memory_bytes, vcpus = excluded.vcpus, deleted = excluded.deleted,
               hugepage_kib = excluded.hugepage_kib, numa_nodes = excluded.numa_nodes, devices = excluded.devices,
               heard_at = now()
           where vm.revision < excluded.revision
              or vm.revision = excluded.revision
                 and (vm.hugepage_kib, vm.numa_nodes, vm.devices)
                     is distinct from (excluded.hugepage_kib, excluded.numa_nodes, excluded.devices)""",
        text_columns(
            (*_OF_VM(v), vcpus, v.id in deleted, v.hugepage_kib, _json(nodes), _json(v.given_devices))
            for v in vms
            for vcpus, nodes in (_taken_by(v),)
        ),
        guarded=False,
    )


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


_GONE = {
    "host_capacity": "update host_capacity set gone = true, status = 'gone' where id = any({0}::text[])",
    "cluster": "delete from cluster where id = any({0}::text[])",
    "network": "delete from network where id = any({0}::text[])",
    "vm": "update vm set deleted = true, heard_at = now() where not deleted and id = any({0}::text[])",
}


async def known(pool: Pool, table: str) -> set[str]:
    """Ids that were heard of; read before a list begins, so that what is created meanwhile isn't missed in it."""
    return {r["id"] for r in await pool.fetch(f"select id from {table}")}


def gone(table: str, ids: Sequence[str]) -> Change:
    """What was known before a complete list from its owner and is not in it."""
    return Change(_GONE[table], (list(ids),), guarded=False)


# The fleet, read.

_HOST = """select id, name, cluster_id, status, cpus, memory_bytes, memory_limit_bytes, memory_used_bytes,
                  vcpus_limit, vcpus_used, guests, ha_guests, cpu_models, machines, pages_2m, pages_2m_used,
                  pages_1g, pages_1g_used, cores, largest_shared from host_capacity"""


async def hosts(pool: Pool, condition: str = "not gone", *arguments: Any) -> list[HostFigures]:
    records = await pool.fetch(f"{_HOST} where {condition}", *arguments)
    return [
        HostFigures(
            **{k: v for k, v in r.items() if k not in ("cpu_models", "machines")},
            cpu_models=frozenset(r["cpu_models"]),
            machines=frozenset(r["machines"]),
        )
        for r in records
    ]


async def clusters(pool: Pool, condition: str = "true", *arguments: Any) -> list[ClusterPolicy]:
    records = await pool.fetch(
        f"""select id, name, cpu_model, machine, memory_overcommit_percent, cpu_overcommit_ratio, balance,
                   reserve_host_failures, admission_control, policy_id
            from cluster where {condition}""",
        *arguments,
    )
    return [ClusterPolicy(**dict(r)) for r in records]


async def networks(pool: Pool, condition: str = "true", *arguments: Any) -> list[NetworkReach]:
    records = await pool.fetch(f"select id, name, ready_host_ids from network where {condition}", *arguments)
    return [NetworkReach(r["id"], r["name"], frozenset(r["ready_host_ids"])) for r in records]


@asynccontextmanager
async def fleet_changes(pool: Pool) -> AsyncIterator[asyncio.Queue[str]]:
    """`{table} {id}` of each row of the fleet that was committed; "" when the connection was lost."""
    queue: asyncio.Queue[str] = asyncio.Queue()

    def heard(_connection: Any, _pid: int, _channel: str, payload: object) -> None:
        queue.put_nowait(str(payload))

    def lost(_connection: Any) -> None:
        queue.put_nowait("")

    async with pool.acquire() as connection:
        await connection.add_listener(FLEET_CHANNEL, heard)
        connection.add_termination_listener(lost)
        try:
            yield queue
        finally:
            if not connection.is_closed():
                connection.remove_termination_listener(lost)
                await connection.remove_listener(FLEET_CHANNEL, heard)
