"""A cluster's hosts are upgraded one after the other: each is emptied by its maintenance, and whoever upgrades it activates it.

How a host is upgraded is not known here: by a person, by Ansible, by whatever hears that the operation waits for it. The next
one is emptied when it is up again. Whoever cancels the operation keeps what was done; a host that waits stays in maintenance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from services.inventory.clearing import ended_or_cancelled
from services.inventory.desk import Inventory
from services.inventory.emptying import NAMED
from services.inventory.store import CLUSTERS, HOSTS
from volery.contracts.cluster import UPGRADE_CLUSTER, Cluster, UpgradeCluster
from volery.contracts.errors import Refused, conflict, invalid
from volery.contracts.host import MAINTAIN_HOST, Host, HostStatus, MaintainHost, PowerSaving
from volery.contracts.operation import Operation
from volery.contracts.plan import MAKE_PLAN, MakePlan, Plan, PlanKind
from volery.runtime import checks
from volery.runtime.bus import LOST, Caller
from volery.runtime.operations import busy
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Stale
from volery.runtime.tasks import end

part = Part()

UPGRADE_SECONDS = 14 * 24 * 3600
"""Hosts wait for people, and people for windows."""
LOOK_SECONDS = 2.0
TAKEN = frozenset({HostStatus.UP, HostStatus.MAINTENANCE})


@part.answers(UPGRADE_CLUSTER)
async def upgrade_cluster(inv: Inventory, ask: UpgradeCluster, caller: Caller) -> Operation:
    """Raises Refused(conflict) when a VM would have no place, or a host can't be emptied now."""
    while True:
        row = await CLUSTERS.get(inv.core.pool, ask.id)
        cluster = row.public
        checks.revision(cluster, ask.if_revision, "cluster")
        checks.text(ask.reason, "reason")
        busy(cluster, "cluster", cluster.busy_with)
        hosts = await _hosts(inv, cluster, ask.host_ids)
        plan = await _plan(inv, cluster, hosts, caller)
        order = _order(hosts, plan)
        op, begun = inv.core.operations.begin(
            "cluster.upgrade",
            object_kind="cluster",
            object_id=cluster.id,
            object_name=cluster.name,
            question=replace(ask, host_ids=tuple(order)),
            caller=caller,
            deadline_seconds=UPGRADE_SECONDS,
        )
        if ask.dry_run:
            shown = {"plan": plan, "host_ids": list(order), "hosts": list(order.values())}
            return replace(op, id="", result=shown)
        _check_places(cluster, plan, ask)
        try:
            new = replace(cluster, busy_with=op.id)
            await inv.core.commit(CLUSTERS.update(row, new), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


async def _hosts(inv: Inventory, cluster: Cluster, wanted: Sequence[str]) -> list[Host]:
    """Those to be upgraded, by name. Raises Refused for one that isn't the cluster's, or that can't be emptied now."""
    rows = await HOSTS.where(inv.core.pool, "cluster_id = $1", cluster.id)
    own = {row.id: row.public for row in sorted(rows, key=lambda row: row.public.name)}
    for host_id in wanted:
        if host_id not in own:
            raise invalid(f"host {host_id} is none of cluster {cluster.name}'s", field="host_ids")
    if twice := [host_id for host_id in wanted if wanted.count(host_id) > 1]:
        raise invalid(f"host {own[twice[0]].name} is named twice; a host has one turn", field="host_ids")
    hosts = [host for host in own.values() if not wanted or host.id in wanted]
    if not hosts:
        raise conflict(f"cluster {cluster.name} has no hosts; there is nothing to upgrade")
    for host in hosts:
        if host.power_saving is not PowerSaving.AWAKE:
            raise conflict(
                f"host {host.name} sleeps to save power: wake it first, or name the others", host_id=host.id
            )
        if host.status not in TAKEN:
            raise conflict(
                f"host {host.name} is {host.status}, and only hosts that are up or in maintenance have a turn: mend it first, or "
                "name the others",
                host_id=host.id,
                status=host.status,
            )
    return hosts


async def _plan(inv: Inventory, cluster: Cluster, hosts: Sequence[Host], caller: Caller) -> Plan | None:
    """For those that run VMs; None when all are in maintenance."""
    up = tuple(host.id for host in hosts if host.status is HostStatus.UP)
    if not up:
        return None
    question = MakePlan(cluster_id=cluster.id, kind=PlanKind.UPGRADE, host_ids=up, dry_run=True)
    answer = await inv.core.bus.ask(MAKE_PLAN, question, Caller(caller.principal), again=False)
    return msgspec.convert(answer.result["plan"], Plan)


def _order(hosts: Sequence[Host], plan: Plan | None) -> dict[str, str]:
    """Host → its name. Who is in maintenance already is empty, and has room for others when it is back."""
    names = {host.id: host.name for host in hosts}
    first = [host.id for host in hosts if host.status is HostStatus.MAINTENANCE]
    return {host_id: names[host_id] for host_id in (*first, *(plan.host_ids if plan is not None else ()))}


def _check_places(cluster: Cluster, plan: Plan | None, ask: UpgradeCluster) -> None:
    if plan is None or not plan.unplaced or ask.stop_vms:
        return
    named = "; ".join(f"{each.vm_name}: {each.reason}" for each in plan.unplaced[:NAMED])
    more = len(plan.unplaced) - NAMED
    raise conflict(
        f"cluster {cluster.name} is not upgraded, since these VMs would have no place when it is their host's turn: "
        f"{named}{f'; and {more} more' if more > 0 else ''}. Stop or move them, leave their hosts out, or repeat with stop_vms",
        vm_ids=[each.vm_id for each in plan.unplaced],
    )


@part.runs("cluster.upgrade", deadline_seconds=UPGRADE_SECONDS)
async def upgrade(inv: Inventory, run: Run) -> None:
    ask = run.input(UpgradeCluster)
    done: list[str] = []
    for number, host_id in enumerate(ask.host_ids):
        row = await HOSTS.find(inv.core.pool, host_id)
        if row is not None:  # else it was removed meanwhile
            await _turn(inv, run, ask, row.public, ask.host_ids[number + 1 :], done)
            done.append(row.public.name)
        await _show(run, done, "", len(ask.host_ids))


async def _turn(
    inv: Inventory, run: Run, ask: UpgradeCluster, host: Host, avoided: Sequence[str], done: Sequence[str]
) -> None:
    await run.step(
        f"empty-{host.id}", f"Emptying {host.name}", lambda: _emptied(inv, run, ask, host, avoided)
    )
    run.checkpoint()
    await _show(run, done, host.name, len(ask.host_ids))
    await run.step(
        f"upgrade-{host.id}",
        f"Host {host.name} is empty and in maintenance: upgrade it, then activate it",
        lambda: _is_back(inv, run, host.id),
    )


async def _emptied(inv: Inventory, run: Run, ask: UpgradeCluster, host: Host, avoided: Sequence[str]) -> None:
    """Raises Refused with the reason why it can't be, conflict when it was taken into maintenance and back by others."""
    question = MaintainHost(
        id=host.id,
        reason=ask.reason or f"its turn in the upgrade of cluster {run.operation.object_name}",
        stop_vms=ask.stop_vms,
        avoided_host_ids=tuple(avoided),
    )
    caller = run.caller_for(f"empty-{host.id}")

    async def begin() -> Operation | None:
        if (await HOSTS.get(inv.core.pool, host.id)).public.status is HostStatus.MAINTENANCE:
            return None
        return await inv.core.bus.ask(MAINTAIN_HOST, question, caller)

    begun = await inv.once_free(begin)
    if begun is None:
        return
    ended = await ended_or_cancelled(inv, run, begun)
    run.checkpoint()
    if ended.problem is not None:
        details = {name: value for name, value in ended.problem.details.items() if name != LOST}
        raise Refused(
            ended.problem.kind,
            f"host {host.name} could not be emptied, and the upgrade of cluster {run.operation.object_name} ends here: "
            f"{ended.problem.message}. Hosts that were upgraded stay so; begin it again for the others",
            **details,
        )


async def _is_back(inv: Inventory, run: Run, host_id: str) -> None:
    """Until somebody has activated it. Raises what ends the operation when it is cancelled."""
    cancelling = asyncio.create_task(run.cancelling.wait())
    try:
        while True:
            row = await HOSTS.find(inv.core.pool, host_id)
            if row is None or row.public.status is HostStatus.UP:
                return
            await asyncio.wait([cancelling], timeout=LOOK_SECONDS)
            run.checkpoint()
    finally:
        await end([cancelling])


async def _show(run: Run, done: Sequence[str], waiting_for: str, hosts: int) -> None:
    result: dict[str, Any] = {"done": list(done), "waiting_for": waiting_for}
    percent = round(100.0 * len(done) / hosts, 1)
    await run.save(lambda op: replace(op, progress=percent, result=op.result | result))
