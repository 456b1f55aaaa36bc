"""A host's maintenance and back: every VM leaves it, by a plan of the scheduler's; then, and without a plan, several at a
time, the most important first.

VMs that can't leave are named with the reason, and the host stays what it was. A VM that ends meanwhile, because its guest
shut down or the host itself died, has left too: the operation's result says who moved, who was stopped and who ended.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from services.inventory import admission, emptying, host_devices, model
from services.inventory.clearing import Clearing, to_clear
from services.inventory.desk import Inventory
from services.inventory.specs import need_of
from services.inventory.store import HOSTS
from volery.contracts.errors import conflict
from volery.contracts.host import (
    ACTIVATE_HOST,
    MAINTAIN_HOST,
    ActivateHost,
    Host,
    HostStatus,
    MaintainHost,
)
from volery.contracts.operation import Operation
from volery.contracts.scheduling import PLACE, Place, Purpose
from volery.contracts.vm import Vm
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
        busy(host, "host", host.busy_with)
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
            return replace(op, id="", result=await _plan(inv, host, ask, caller))
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


async def _plan(inv: Inventory, host: Host, ask: MaintainHost, caller: Caller) -> dict[str, Any]:
    """Where each VM would go, in the order of the plan that would be followed, then who would go nowhere and why. A VM that
    isn't part of it is looked at as if it were the only one."""
    vms = await to_clear(inv, host.id)
    planned = await emptying.shown(inv, host, vms, caller) if vms and not ask.stop_vms else {}
    moves = [fate for fate in planned.values() if fate["host_id"]]
    moving = {fate["vm_id"] for fate in moves}
    rest = [planned.get(vm.id) or await _fate(inv, vm, ask, caller) for vm in vms if vm.id not in moving]
    return {
        "vm_ids": [vm.id for vm in vms],
        "vms": [vm.name for vm in vms],
        "plan": [*moves, *rest],
    }


async def _fate(inv: Inventory, vm: Vm, ask: MaintainHost, caller: Caller) -> dict[str, str]:
    said = {"vm_id": vm.id, "name": vm.name, "host_id": ""}
    if ask.stop_vms:
        return said | {"message": "is shut down"}
    if not vm.migration.allowed:
        return said | {"message": "its migration policy forbids to move it"}
    if why := host_devices.stays(vm, "migrate"):
        return said | {"message": why}
    question = Place(
        need=await need_of(inv, vm, caller),
        epoch=vm.epoch + 1,
        purpose=Purpose.MIGRATE,
        excluded_host_ids=(vm.host_id,),
        dry_run=True,
    )
    placed = await inv.core.bus.ask(PLACE, question, Caller(caller.principal))
    return said | {"host_id": placed.host_id, "message": placed.message}


@part.runs("host.maintain", deadline_seconds=4 * 3600)
async def maintain(inv: Inventory, run: Run) -> None:
    ask = run.input(MaintainHost)

    async def give_back() -> None:
        await _settle(inv, ask.id, maintenance=False)

    run.undo("back to up", give_back)
    clearing = Clearing(inv, run, ask.id, stop_vms=ask.stop_vms)
    if not ask.stop_vms:
        host = (await HOSTS.get(inv.core.pool, ask.id)).public
        await emptying.follow(inv, run, clearing, host)
    failed = await clearing.clear()
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
