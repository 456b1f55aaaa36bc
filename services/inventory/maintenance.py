"""A host's maintenance and back: every VM leaves it, by a plan of the scheduler's; then, and without a plan, several at a
time, the most important first.

VMs that can't leave are named with the reason, and the host stays what it was. A VM that ends meanwhile, because its guest
shut down or the host itself died, has left too: the operation's result says who moved, who was stopped and who ended.
"""

from __future__ import annotations

from msgspec.structs import replace

from services.inventory import admission, emptying, holders, model, power_saving
from services.inventory.clearing import Clearing
from services.inventory.desk import Inventory
from services.inventory.store import HOSTS
from volery.contracts.errors import conflict
from volery.contracts.host import (
    ACTIVATE_HOST,
    MAINTAIN_HOST,
    ActivateHost,
    HostStatus,
    MaintainHost,
    WakeHost,
)
from volery.contracts.operation import Operation
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.operations import busy
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Stale

part = Part()


@part.answers(MAINTAIN_HOST)
async def maintain_host(inv: Inventory, ask: MaintainHost, caller: Caller) -> Operation:
    while True:
        row = await HOSTS.get(inv.core.pool, ask.id)
        host = row.public
        checks.revision(host, ask.if_revision, "host")
        checks.text(ask.reason, "reason")
        await holders.check_maintenance(inv, host)
        if host.status in (HostStatus.MAINTENANCE, HostStatus.INSTALLING):
            raise conflict(f"host {host.name} is {host.status}; there is nothing to move", status=host.status)
        await admission.of_leaving(inv, host, caller, stops_vms=ask.stop_vms, dry_run=ask.dry_run)
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
            return replace(op, id="", result=await emptying.plan_of(inv, host, caller, stop_vms=ask.stop_vms))
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
    ask = run.input(MaintainHost)

    async def give_back() -> None:
        await _settle(inv, ask.id, maintenance=False)

    run.undo("back to up", give_back)
    clearing = Clearing(inv, run, ask.id, stop_vms=ask.stop_vms)
    if not ask.stop_vms:
        host = (await HOSTS.get(inv.core.pool, ask.id)).public
        await emptying.follow(inv, run, clearing, host, ask.avoided_host_ids)
    failed = await clearing.empty()
    if failed:
        names = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise conflict(
            f"these VMs can't leave host {run.operation.object_name}: {names}. Stop them, or repeat with stop_vms",
            vms=failed,
        )
    await _settle(inv, ask.id, maintenance=True)


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
        if power_saving.sleeps(host):
            return await power_saving.wake(inv, WakeHost(id=ask.id, if_revision=ask.if_revision), caller)
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
