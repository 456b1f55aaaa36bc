"""Every SQL statement of ha, but for those about VMs (`watched_vms`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeAlias

import asyncpg

from services.ha.watch import HostFacts
from volery.contracts.base import Message
from volery.contracts.liveness import (
    LIVENESS_CHANGED,
    LIVENESS_DELETED,
    RESTART_CHANGED,
    RESTART_DELETED,
    HostLiveness,
    VmRestart,
)
from volery.contracts.power import (
    FENCE_RECORD_CHANGED,
    FENCE_RECORD_DELETED,
    FENCING_PAUSE_CHANGED,
    FENCING_PAUSE_DELETED,
    FENCING_POLICY_CHANGED,
    FENCING_POLICY_DELETED,
    POWER_MANAGEMENT_CHANGED,
    POWER_MANAGEMENT_DELETED,
    FenceRecord,
    FencingPause,
    FencingPolicy,
    PowerManagement,
)
from volery.contracts.protection import (
    PROTECTION_CHANGED,
    PROTECTION_DELETED,
    RESERVE_CHANGED,
    RESERVE_DELETED,
    ClusterReserve,
    VmProtection,
)
from volery.contracts.start_group import START_GROUP_CHANGED, START_GROUP_DELETED, StartGroup
from volery.runtime.tables import Change, Nothing, Row, Stale, Table

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


class LivenessPrivate(Message):
    admitted_generation: str = ""
    """The journal of the agent that inventory admitted; "" is any."""


class RestartPrivate(Message):
    attempts: tuple[datetime, ...] = ()
    """When restarts were asked for, oldest first; only those that still count."""
    pending: str = ""
    """The request id of an attempt whose answer isn't known yet."""
    epoch: int = 0
    """The placement that ended."""
    preferred_host_id: str = ""
    avoided_host_ids: tuple[str, ...] = ()
    only_host_id: str = ""
    waits_since: datetime | None = None
    """Since when it waits for other start groups."""
    learned: str = ""
    """The last operation whose outcome was taken into account."""


LIVENESS: Table[HostLiveness, LivenessPrivate] = Table(
    "liveness",
    HostLiveness,
    LivenessPrivate,
    columns={"host_name": "host_name", "cluster_id": "cluster_id", "state": "state"},
    changed=LIVENESS_CHANGED,
    deleted=LIVENESS_DELETED,
    noun="host",
)

RESTARTS: Table[VmRestart, RestartPrivate] = Table(
    "restart",
    VmRestart,
    RestartPrivate,
    columns={"vm_id": "vm_id", "vm_name": "vm_name", "gave_up": "gave_up"},
    changed=RESTART_CHANGED,
    deleted=RESTART_DELETED,
)


class PowerPrivate(Message):
    """Secrets, sealed, in the order of the devices."""

    secrets: tuple[dict[str, str], ...] = ()


POWER: Table[PowerManagement, PowerPrivate] = Table(
    "power_management",
    PowerManagement,
    PowerPrivate,
    columns={
        "host_name": "host_name",
        "cluster_id": "cluster_id",
        "enabled": "enabled",
        "identity": "identity",
        "test_passed": "test_passed",
        "tested_at": "tested_at",
    },
    changed=POWER_MANAGEMENT_CHANGED,
    deleted=POWER_MANAGEMENT_DELETED,
    noun="power management of host",
)

RECORDS: Table[FenceRecord, Nothing] = Table(
    "fence_record",
    FenceRecord,
    Nothing,
    columns={
        "host_id": "host_id",
        "host_name": "host_name",
        "cluster_id": "cluster_id",
        "state": "state",
        "requested_by": "requested_by",
    },
    changed=FENCE_RECORD_CHANGED,
    deleted=FENCE_RECORD_DELETED,
)

PAUSES: Table[FencingPause, Nothing] = Table(
    "fencing_pause",
    FencingPause,
    Nothing,
    columns={"scope": "scope", "object_id": "object_id"},
    changed=FENCING_PAUSE_CHANGED,
    deleted=FENCING_PAUSE_DELETED,
)

PROTECTION: Table[VmProtection, Nothing] = Table(
    "protection",
    VmProtection,
    Nothing,
    columns={
        "vm_name": "vm_name",
        "cluster_id": "cluster_id",
        "host_id": "host_id",
        "protected": "protected",
    },
    changed=PROTECTION_CHANGED,
    deleted=PROTECTION_DELETED,
    noun="protection of VM",
)

RESERVES: Table[ClusterReserve, Nothing] = Table(
    "reserve",
    ClusterReserve,
    Nothing,
    columns={"cluster_name": "cluster_name", "kept": "kept"},
    changed=RESERVE_CHANGED,
    deleted=RESERVE_DELETED,
    noun="reserve of cluster",
)

START_GROUPS: Table[StartGroup, Nothing] = Table(
    "start_group",
    StartGroup,
    Nothing,
    columns={"name": "name", "cluster_id": "cluster_id"},
    changed=START_GROUP_CHANGED,
    deleted=START_GROUP_DELETED,
    noun="start group",
)

POLICIES: Table[FencingPolicy, Nothing] = Table(
    "fencing_policy",
    FencingPolicy,
    Nothing,
    columns={},
    changed=FENCING_POLICY_CHANGED,
    deleted=FENCING_POLICY_DELETED,
    noun="fencing policy of cluster",
)


async def liveness_of(pool: Pool, host_ids: Sequence[str]) -> dict[str, Row[HostLiveness, LivenessPrivate]]:
    return {row.id: row for row in await LIVENESS.where(pool, "id = any($1::text[])", list(host_ids))}


async def start_order(pool: Pool, cluster_id: str) -> int:
    """How often the order of a cluster's start groups was changed."""
    found = await pool.fetchval("select revision from start_order where cluster_id = $1", cluster_id)
    return 0 if found is None else int(found)


def next_start_order(cluster_id: str, seen: int) -> Change:
    """Guards a change of the order: nobody else changed it since it was looked at."""
    return Change(
        """insert into start_order (cluster_id, revision) values ({0}, {1}::bigint + 1)
           on conflict (cluster_id) do update set revision = excluded.revision
           where start_order.revision = {1}::bigint returning 1""",
        (cluster_id, seen),
    )


_HOST = "id, revision, name, cluster_id, status, hardware_uuid, boot_id, fence_agents"


def saw_host(host: HostFacts) -> Change:
    """Facts and lists may come twice: a revision already known changes nothing."""
    return Change(
        """insert into host (id, revision, name, cluster_id, status, hardware_uuid, boot_id, fence_agents)
           values ({0}, {1}, {2}, {3}, {4}, {5}, {6}, {7})
           on conflict (id) do update set revision = excluded.revision, name = excluded.name,
               cluster_id = excluded.cluster_id, status = excluded.status,
               hardware_uuid = excluded.hardware_uuid, boot_id = excluded.boot_id,
               fence_agents = excluded.fence_agents
           where host.revision < excluded.revision""",
        (
            host.id,
            host.revision,
            host.name,
            host.cluster_id,
            host.status,
            host.hardware_uuid,
            host.boot_id,
            " ".join(host.fence_agents),
        ),
        guarded=False,
    )


async def hosts(pool: Pool) -> list[HostFacts]:
    return [_host(r) for r in await pool.fetch(f"select {_HOST} from host")]


async def host(pool: Pool, host_id: str) -> HostFacts | None:
    record = await pool.fetchrow(f"select {_HOST} from host where id = $1", host_id)
    return None if record is None else _host(record)


def _host(record: asyncpg.Record) -> HostFacts:
    fields = dict(record)
    return HostFacts(**(fields | {"fence_agents": tuple(fields["fence_agents"].split())}))


async def fence_agents_in(pool: Pool, cluster_id: str) -> set[str]:
    """Agents that some host of the cluster can run."""
    rows = await pool.fetch("select fence_agents from host where cluster_id = $1", cluster_id)
    return {name for row in rows for name in row["fence_agents"].split()}


async def host_ends(pool: Pool, host_id: str, then: Callable[[], None]) -> list[Change]:
    """Everything that is kept about a host that is no more; its fence records stay."""
    found: list[Change] = [Change("delete from host where id = {0}", (host_id,), guarded=False, then=then)]
    liveness = await LIVENESS.find(pool, host_id)
    power = await POWER.find(pool, host_id)
    pause = await PAUSES.find(pool, f"host-{host_id}")
    found += [LIVENESS.delete(liveness)] if liveness is not None else []
    found += [POWER.delete(power)] if power is not None else []
    found += [PAUSES.delete(pause)] if pause is not None else []
    return found


async def untested_power(
    pool: Pool, tested_before: datetime, failed_before: datetime
) -> list[Row[PowerManagement, PowerPrivate]]:
    """Power management whose test is due: never, too long ago, or failed a while ago."""
    return await POWER.where(
        pool,
        """enabled and (tested_at is null or tested_at < $1 or (not test_passed and tested_at < $2))""",
        tested_before,
        failed_before,
    )


async def highly_available_on(pool: Pool, host_id: str) -> int:
    """How many VMs that ha watches over are on this host, or not known to have ended there."""
    return int(
        await pool.fetchval(
            "select count(*) from vm where host_id = $1 and enabled and status not in ('down', 'suspended')",
            host_id,
        )
    )


async def unsettled_on(pool: Pool, host_id: str) -> int:
    """How many VMs of a dead host inventory has not dealt with yet."""
    return int(
        await pool.fetchval(
            "select count(*) from vm where host_id = $1 and status not in ('down', 'suspended')", host_id
        )
    )


async def open_record(pool: Pool, host_id: str) -> Row[FenceRecord, Nothing] | None:
    """What ha began with this host and has not ended."""
    rows = await RECORDS.where(
        pool, "host_id = $1 and state in ('running', 'off') and requested_by = 'service:ha'", host_id
    )
    return rows[-1] if rows else None


async def open_records(pool: Pool) -> set[str]:
    """Hosts with which ha began something that it has not ended."""
    rows = await pool.fetch(
        "select distinct host_id from fence_record where state in ('running', 'off') and requested_by = 'service:ha'"
    )
    return {row["host_id"] for row in rows}


async def old_records(pool: Pool, before: datetime) -> list[Row[FenceRecord, Nothing]]:
    return await RECORDS.where(pool, "(doc::jsonb->>'created_at')::timestamptz < $1", before)


async def fencing_revisions(pool: Pool) -> frozenset[tuple[str, int]]:
    """Of all power management and all pauses of fencing: another set once any of them has changed."""
    rows = await pool.fetch("select id, revision from power_management")
    paused = await pool.fetch("select id, revision from fencing_pause")
    return frozenset((row["id"], row["revision"]) for row in (*rows, *paused))


async def pauses_of(pool: Pool, host_id: str, cluster_id: str, now: datetime) -> list[FencingPause]:
    """Pauses that hold for this host now."""
    rows = await PAUSES.where(
        pool, "id = any($1::text[])", ["global", f"cluster-{cluster_id}", f"host-{host_id}"]
    )
    return [row.public for row in rows if row.public.until > now]


async def silent_hosts(pool: Pool) -> list[HostLiveness]:
    """Without proof of death."""
    rows = await LIVENESS.where(pool, "state in ('connecting', 'non_responsive')")
    return [row.public for row in rows]


async def count_hosts(pool: Pool, cluster_id: str) -> int:
    return int(await pool.fetchval("select count(*) from host where cluster_id = $1", cluster_id))


async def switched_by_hand(pool: Pool, since: datetime) -> list[FenceRecord]:
    rows = await RECORDS.where(
        pool,
        "requested_by not in ('service:ha', 'service:inventory') and (doc::jsonb->>'created_at')::timestamptz > $1",
        since,
    )
    return [row.public for row in rows]


async def ordered_off(pool: Pool, cluster_id: str, since: datetime, but: tuple[str, str] = ("", "")) -> int:
    """How many hosts of a cluster were ordered off since then, without one boot of one host."""
    return int(
        await pool.fetchval(
            """select count(distinct host_id) from power_off
               where cluster_id = $1 and at > $2 and not (host_id = $3 and boot_id = $4)""",
            cluster_id,
            since,
            *but,
        )
    )


async def braked_clusters(pool: Pool, since: datetime) -> list[str]:
    rows = await pool.fetch("select distinct cluster_id from power_off where at > $1 order by 1", since)
    return [row["cluster_id"] for row in rows]


async def book_power_off(
    pool: Pool, token: int, host: HostFacts, boot_id: str, limit: int, since: datetime, now: datetime
) -> bool:
    """Whether the brake lets this host be ordered off; then it counts. Ordering the same boot off again counts once.

    The leader's row is locked, so that two hosts at once can't both take the last place, and a former leader's token
    takes none. Raises Stale for a token that leads no more.
    """
    async with pool.acquire() as connection, connection.transaction():
        leads = await connection.fetchval("select 1 from leader where token = $1 for update", token)
        if not leads:
            raise Stale
        count = await connection.fetchval(
            """select count(distinct host_id) from power_off
               where cluster_id = $1 and at > $2 and not (host_id = $3 and boot_id = $4)""",
            host.cluster_id,
            since,
            host.id,
            boot_id,
        )
        if count >= limit:
            return False
        await connection.execute(
            """insert into power_off (host_id, boot_id, cluster_id, at) values ($1, $2, $3, $4)
               on conflict (host_id, boot_id) do update set at = excluded.at""",
            host.id,
            boot_id,
            host.cluster_id,
            now,
        )
    return True


async def forget_power_offs(pool: Pool, before: datetime) -> None:
    await pool.execute("delete from power_off where at < $1", before)
