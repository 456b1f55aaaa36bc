"""Hosts: edit, delete, maintenance and back. What they report is heard in `host_facts`."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from services.inventory import model
from services.inventory.clusters import name_taken
from services.inventory.desk import Inventory
from services.inventory.store import CLUSTERS, HOSTS, VMS
from volery.contracts.base import Done
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Refused, conflict
from volery.contracts.host import (
    ACTIVATE_HOST,
    DELETE_HOST,
    GET_HOST,
    LIST_HOSTS,
    MAINTAIN_HOST,
    UPDATE_HOST,
    ActivateHost,
    HostStatus,
    MaintainHost,
    UpdateHost,
)
from volery.contracts.operation import ListQuery, Operation
from volery.contracts.vm import MIGRATE_VM, STOP_VM, MigrateVm, StopVm, Vm
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.operations import Run, busy
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Stale, Taken

part = Part()


@part.answers(GET_HOST)
async def get_host(inv: Inventory, ask: GetById, caller: Caller) -> Any:
    return await HOSTS.raw(inv.core.pool, ask.id)


@part.answers(LIST_HOSTS)
async def list_hosts(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, HOSTS, ask)


@part.answers(UPDATE_HOST)
async def update_host(inv: Inventory, ask: UpdateHost, caller: Caller) -> Any:
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "host")
        new = replace(row.public, **model.given(ask))
        checks.name(new.name)
        checks.text(new.comment, "comment")
        checks.tags(new.tags)
        if new.cluster_id != row.public.cluster_id:
            if row.public.status not in (HostStatus.MAINTENANCE, HostStatus.INSTALLING):
                raise conflict(
                    f"host {new.name} is {row.public.status}; put it into maintenance before it changes its cluster",
                    status=row.public.status,
                )
            cluster = (await CLUSTERS.get(inv.core.pool, checks.object_id(new.cluster_id, "cluster"))).public
            new = replace(new, data_center_id=cluster.data_center_id)
        try:
            update = HOSTS.update(row, new)
            await inv.core.commit(update, caller=caller, answer=update.document)
        except Stale:
            continue
        except Taken:
            raise name_taken("host", new.name) from None
        return update.document


@part.answers(DELETE_HOST)
async def delete_host(inv: Inventory, ask: DeleteById, caller: Caller) -> Done:
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        host = row.public
        checks.revision(host, ask.if_revision, "host")
        busy(host, "host", host.busy_with)
        if host.status not in (HostStatus.MAINTENANCE, HostStatus.INSTALLING):
            raise conflict(
                f"host {host.name} is {host.status}; put it into maintenance before deleting it",
                status=host.status,
            )
        if placed := await inv.store.placements_on(host.id):
            raise conflict(
                f"{len(placed)} VMs may still run on host {host.name}; it can't be deleted before they ended",
                vm_ids=[p.vm_id for p in placed],
            )
        external = [v for v in await inv.store.vms_on(host.id) if v.public.external]
        try:
            await inv.core.commit(
                HOSTS.delete(row), *(VMS.delete(vm) for vm in external), caller=caller, answer=Done()
            )
        except Stale:
            continue
        await inv.revoke_keys([row.private.public_key])
        return Done()


@part.answers(MAINTAIN_HOST)
async def maintain_host(inv: Inventory, ask: MaintainHost, caller: Caller) -> Operation:
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        host = row.public
        checks.revision(host, ask.if_revision, "host")
        checks.text(ask.reason, "reason")
        busy(host, "host", host.busy_with)
        if host.status in (HostStatus.MAINTENANCE, HostStatus.INSTALLING):
            raise conflict(f"host {host.name} is {host.status}; there is nothing to move", status=host.status)
        op, begun = inv.core.operations.begin(
            "host.maintain",
            object_kind="host",
            object_id=host.id,
            object_name=host.name,
            question=ask,
            caller=caller,
            deadline_seconds=4 * 3600,
        )
        if ask.dry_run:
            vms = [v.public for v in await inv.store.vms_on(host.id) if v.public.status in model.ALIVE]
            return replace(op, id="", result={"vm_ids": [v.id for v in vms], "vms": [v.name for v in vms]})
        new = replace(
            host,
            status=HostStatus.PREPARING_FOR_MAINTENANCE,
            busy_with=op.id,
            maintenance_reason=ask.reason,
        )
        try:
            await inv.core.commit(
                HOSTS.update(row, new, replace(row.private, maintenance=True)),
                begun,
                caller=caller,
                answer=op,
            )
        except Stale:
            continue
        return op


@part.runs("host.maintain", deadline_seconds=4 * 3600)
async def maintain(inv: Inventory, run: Run) -> None:
    """Move every VM away, several at a time; those that can't move are named."""
    ask = run.input(MaintainHost)

    async def give_back() -> None:
        await _settle(inv, ask.id, maintenance=False)

    run.undo("back to up", give_back)
    failed: dict[str, str] = {}
    for attempt in range(3):
        vms = [v.public for v in await inv.store.vms_on(ask.id) if v.public.status in model.ALIVE]
        ours = [vm for vm in vms if not vm.external]
        failed = {}
        for vm in ours:
            run.checkpoint()
            try:
                await _clear(inv, run, vm, ask, attempt)
            except Refused as refused:
                failed[vm.name] = refused.message
        if not failed:
            break
    if failed:
        names = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise conflict(
            f"these VMs can't leave host {run.operation.object_name}: {names}. Stop them, or repeat with stop_vms",
            vms=failed,
        )
    await _settle(inv, ask.id, maintenance=True)


async def _clear(inv: Inventory, run: Run, vm: Vm, ask: MaintainHost, attempt: int) -> None:
    """One VM off the host: moved, or stopped when that was asked."""
    caller = run.caller_for(f"clear-{vm.id}-{attempt}")
    if ask.stop_vms:
        op = await inv.core.bus.ask(STOP_VM, StopVm(id=vm.id, force_after_seconds=120), caller)
    else:
        op = await inv.core.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id), caller)

    async def ended() -> None:
        found = await inv.operation_ended(op.id)
        if found.problem is not None:
            raise Refused(found.problem.kind, found.problem.message)

    await run.step(f"clear-{vm.id}-{attempt}", f"Moving {vm.name}", ended)


async def _settle(inv: Inventory, host_id: str, *, maintenance: bool) -> None:
    while True:
        row = await HOSTS.get(inv.core.pool, host_id)
        private = replace(row.private, maintenance=maintenance)
        new = replace(row.public, maintenance_reason=row.public.maintenance_reason if maintenance else "")
        new = model.host_with_status(new, private.liveness, maintenance, False, inv.config)
        try:
            await inv.core.commit(HOSTS.update(row, new, private))
        except Stale:
            continue
        return


@part.answers(ACTIVATE_HOST)
async def activate_host(inv: Inventory, ask: ActivateHost, caller: Caller) -> Operation:
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        host = row.public
        checks.revision(host, ask.if_revision, "host")
        busy(host, "host", host.busy_with)
        if host.status not in (HostStatus.MAINTENANCE, HostStatus.NON_OPERATIONAL):
            raise conflict(f"host {host.name} is {host.status}; only a host in maintenance is activated")
        op, begun = inv.core.operations.begin(
            "host.activate", object_kind="host", object_id=host.id, object_name=host.name, caller=caller
        )
        try:
            await inv.core.commit(
                HOSTS.update(row, replace(host, busy_with=op.id)), begun, caller=caller, answer=op
            )
        except Stale:
            continue
        return op


@part.runs("host.activate", deadline_seconds=120)
async def activate(inv: Inventory, run: Run) -> None:
    await _settle(inv, run.operation.object_id, maintenance=False)
    await inv.core.hosts.ask_report(run.operation.object_id)
