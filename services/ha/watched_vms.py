"""VMs as inventory last said: every SQL statement about the table `vm`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from services.ha.policies.restart_order import WatchedVm
from services.ha.policies.start_groups import Member
from services.ha.store import RESTARTS, Pool, RestartPrivate
from volery.contracts.liveness import VmRestart
from volery.contracts.vm import RestartWhere, Vm, VmStatus
from volery.runtime.tables import Change, Row, text_columns

_VM = "id, name, epoch, status, desired, reason, host_id, enabled, priority, busy, same_host, after_blackout, placed, cluster_id"


def saw(vms: Sequence[Vm]) -> Change:
    """What was said of them, in its order. Facts and lists may come twice: an older revision changes nothing, the same one
    says what a former release of ha didn't write. The host is the last one that was named: where it was before it ended."""
    last = {vm.id: vm for vm in vms}
    hosts = {vm.id: vm.host_id for vm in vms if vm.host_id}
    return Change(
        """insert into vm
               (id, revision, name, epoch, status, desired, reason, host_id, enabled, priority, busy, same_host,
                agent, after_blackout, placed, cluster_id)
           select v.id, v.revision::bigint, v.name, v.epoch::bigint, v.status, v.desired, v.reason, v.host_id,
                  v.enabled::bool, v.priority::int, v.busy::bool, v.same_host::bool, v.agent::bool,
                  v.after_blackout::bool, v.placed::bool, v.cluster_id
           from unnest({0}::text[], {1}::text[], {2}::text[], {3}::text[], {4}::text[], {5}::text[], {6}::text[],
                       {7}::text[], {8}::text[], {9}::text[], {10}::text[], {11}::text[], {12}::text[], {13}::text[],
                       {14}::text[], {15}::text[])
                as v(id, revision, name, epoch, status, desired, reason, host_id, enabled, priority, busy, same_host,
                     agent, after_blackout, placed, cluster_id)
           on conflict (id) do update set revision = excluded.revision, name = excluded.name,
               epoch = excluded.epoch, status = excluded.status, desired = excluded.desired,
               reason = excluded.reason, enabled = excluded.enabled, priority = excluded.priority,
               busy = excluded.busy, same_host = excluded.same_host, agent = excluded.agent,
               after_blackout = excluded.after_blackout, placed = excluded.placed,
               cluster_id = excluded.cluster_id,
               host_id = case when excluded.host_id = '' then vm.host_id else excluded.host_id end
           where vm.revision <= excluded.revision""",
        text_columns(_columns(vm, hosts.get(vm.id, "")) for vm in last.values()),
        guarded=False,
    )


def _columns(vm: Vm, host_id: str) -> tuple[str | int | bool, ...]:
    return (
        vm.id,
        vm.revision,
        vm.name,
        vm.epoch,
        vm.status,
        vm.desired,
        vm.status_reason,
        host_id,
        vm.high_availability.enabled,
        vm.high_availability.priority,
        bool(vm.busy_with),
        vm.high_availability.where is RestartWhere.SAME_HOST,
        vm.guest.agent_connected,
        vm.start_after_blackout is True,
        bool(vm.host_id),
        vm.cluster_id,
    )


def gone(vm_ids: Sequence[str]) -> Change:
    return Change("delete from vm where id = any({0}::text[])", (list(vm_ids),), guarded=False)


async def known(pool: Pool) -> set[str]:
    return {r["id"] for r in await pool.fetch("select id from vm")}


async def crashed(pool: Pool) -> list[WatchedVm]:
    """Those that may need a restart, the most important first."""
    records = await pool.fetch(
        f"""select {_VM} from vm
            where (enabled or after_blackout) and status = 'down' and desired = 'up' and not busy
            order by priority desc, id"""
    )
    return [WatchedVm(**dict(r)) for r in records]


async def wanted_on(pool: Pool, host_ids: Sequence[str]) -> list[WatchedVm]:
    """VMs that ha would bring back and of which nobody has said that they ended, the most important first."""
    if not host_ids:
        return []
    records = await pool.fetch(
        f"""select {_VM} from vm where (enabled or after_blackout) and desired = 'up'
            and status not in ('down', 'suspended') and host_id = any($1::text[])
            order by priority desc, id""",
        list(host_ids),
    )
    return [WatchedVm(**dict(r)) for r in records]


async def highly_available(pool: Pool) -> set[str]:
    return {r["id"] for r in await pool.fetch("select id from vm where enabled")}


async def among(pool: Pool, vm_ids: Sequence[str], statuses: Collection[VmStatus]) -> set[str]:
    """Those of these VMs that were in one of these states, as far as was heard."""
    records = await pool.fetch(
        "select id from vm where id = any($1::text[]) and status = any($2::text[])",
        list(vm_ids),
        sorted(statuses),
    )
    return {r["id"] for r in records}


async def find(pool: Pool, vm_id: str) -> WatchedVm | None:
    record = await pool.fetchrow(f"select {_VM} from vm where id = $1", vm_id)
    return None if record is None else WatchedVm(**dict(record))


async def unplaced(pool: Pool) -> list[WatchedVm]:
    """Those whose restart was asked for and that have no host yet, the most important first."""
    records = await pool.fetch(
        f"""select {_VM} from vm where desired = 'up' and not placed and status in ('down', 'wait_for_launch')
            and exists (select from restart where restart.id = vm.id) order by priority desc, id"""
    )
    asked = {
        row.id
        for row in await RESTARTS.where(pool, "id = any($1::text[])", [r["id"] for r in records])
        if is_under_way(row)
    }
    return [WatchedVm(**dict(r)) for r in records if r["id"] in asked]


def is_under_way(row: Row[VmRestart, RestartPrivate]) -> bool:
    """Whether a restart is being asked for, or nobody has looked yet what came of it."""
    return bool(row.private.pending) or row.public.last_operation_id not in ("", row.private.learned)


async def members(pool: Pool, vm_ids: Sequence[str]) -> dict[str, Member]:
    """VMs of start groups, as far as ha knows them."""
    rows = await pool.fetch(
        """select id, name, status, desired, enabled or after_blackout as enabled, agent, host_id from vm
           where id = any($1::text[])""",
        list(vm_ids),
    )
    restarts = {row.id: row for row in await RESTARTS.where(pool, "id = any($1::text[])", list(vm_ids))}
    return {
        row["id"]: Member(
            name=row["name"],
            status=row["status"],
            desired=row["desired"],
            enabled=row["enabled"],
            agent=row["agent"],
            host_id=row["host_id"],
            brought_back=row["id"] in restarts and bool(restarts[row["id"]].private.attempts),
            gave_up=row["id"] in restarts and restarts[row["id"]].public.gave_up,
        )
        for row in rows
    }
