"""A host's maintenance and back: every VM leaves it, several at a time, the most important first.

VMs that can't leave are named with the reason, and the host stays what it was. A VM that ends meanwhile, because its guest
shut down or the host itself died, has left too: the operation's result says who moved, who was stopped and who ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from msgspec.structs import replace

from services.inventory import model
from services.inventory.desk import Inventory
from services.inventory.specs import need_of
from services.inventory.store import HOSTS, VMS
from volery.contracts.errors import Refused, conflict
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
from volery.contracts.vm import MIGRATE_VM, STOP_VM, MigrateVm, StopVm, Vm
from volery.runtime import checks
from volery.runtime.bus import LOST, Caller
from volery.runtime.operations import busy
from volery.runtime.run import CancelRequested, Run
from volery.runtime.service import Part
from volery.runtime.tables import Stale
from volery.runtime.tasks import end

part = Part()

ROUNDS = 3
"""How often those that could not leave are tried again: a VM may have been busy, a destination full."""
STOP_SECONDS = 120


class Left(StrEnum):
    """How a VM left its host."""

    MOVED = "moved"
    STOPPED = "stopped"
    ENDED = "ended"


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
    """Where each VM would go, looked at as if it were the only one; "" with the reason when nowhere."""
    vms = await _to_clear(inv, host.id)
    plan = [await _fate(inv, vm, ask, caller) for vm in vms]
    return {"vm_ids": [vm.id for vm in vms], "vms": [vm.name for vm in vms], "plan": plan}


async def _fate(inv: Inventory, vm: Vm, ask: MaintainHost, caller: Caller) -> dict[str, str]:
    said = {"vm_id": vm.id, "name": vm.name, "host_id": ""}
    if ask.stop_vms:
        return said | {"message": "is shut down"}
    if not vm.migration.allowed:
        return said | {"message": "its migration policy forbids to move it"}
    question = Place(
        need=await need_of(inv, vm, caller),
        epoch=vm.epoch + 1,
        purpose=Purpose.MIGRATE,
        excluded_host_ids=(vm.host_id,),
        dry_run=True,
    )
    placed = await inv.core.bus.ask(PLACE, question, Caller(caller.principal))
    return said | {"host_id": placed.host_id, "message": placed.message}


async def _to_clear(inv: Inventory, host_id: str) -> list[Vm]:
    """Volery's own VMs that are on the host, in the order in which they leave."""
    vms = [row.public for row in await inv.store.vms_on(host_id)]
    ours = [vm for vm in vms if vm.status in model.ALIVE and not vm.external]
    return sorted(
        ours, key=lambda vm: (not vm.high_availability.enabled, -vm.high_availability.priority, vm.id)
    )


@part.runs("host.maintain", deadline_seconds=4 * 3600)
async def maintain(inv: Inventory, run: Run) -> None:
    ask = run.input(MaintainHost)

    async def give_back() -> None:
        await _settle(inv, ask.id, maintenance=False)

    run.undo("back to up", give_back)
    left = {name: Left(how) for how, names in run.operation.result.items() for name in names}
    failed: dict[str, str] = {}
    for attempt in range(ROUNDS):
        vms = await _to_clear(inv, ask.id)
        if not vms:
            failed = {}
            break
        failed = await _Round(inv, run, ask, attempt, left).clear(vms)
        run.checkpoint()
    if failed:
        names = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise conflict(
            f"these VMs can't leave host {run.operation.object_name}: {names}. Stop them, or repeat with stop_vms",
            vms=failed,
        )
    await _settle(inv, ask.id, maintenance=True)


class _Round:
    """One try at every VM that is still there, a few of them at a time."""

    def __init__(
        self, inv: Inventory, run: Run, ask: MaintainHost, attempt: int, left: dict[str, Left]
    ) -> None:
        self.inv, self.run, self.ask, self.attempt, self.left = inv, run, ask, attempt, left
        self.failed: dict[str, str] = {}
        self.gate = asyncio.Semaphore(inv.config.evacuations_at_once)

    async def clear(self, vms: Sequence[Vm]) -> dict[str, str]:
        """Those that could not leave, by name, with the reason."""
        leaving = [asyncio.create_task(self._leave(vm)) for vm in vms]
        try:
            await asyncio.gather(*leaving)
        finally:
            await end(leaving)
        return self.failed

    async def _leave(self, vm: Vm) -> None:
        async with self.gate:
            try:
                how = await self.run.step(
                    f"clear-{vm.id}-{self.attempt}", f"Moving {vm.name}", lambda: self._go(vm), Left
                )
            except Refused as refused:
                self.failed[vm.name] = refused.message
                return
            except CancelRequested:
                return  # the round's end says so for all
        self.left[vm.name] = how
        await self._show()

    async def _go(self, vm: Vm) -> Left:
        """Ask, under the same id after a crash, and wait for the end. Raises Refused with its reason."""
        caller = self.run.caller_for(f"clear-{vm.id}-{self.attempt}")
        begun = await self.inv.once_free(lambda: self._begin(vm, caller))
        if isinstance(begun, Left):
            return begun
        ended = await self._ended(begun)
        if ended.problem is None:
            return Left.STOPPED if self.ask.stop_vms else Left.MOVED
        if (how := await self._gone(vm)) is not None:
            return how  # it could not be moved since it has ended
        details = {name: value for name, value in ended.problem.details.items() if name != LOST}
        raise Refused(ended.problem.kind, ended.problem.message, **details)

    async def _gone(self, vm: Vm) -> Left | None:
        """How it left without us; None: it is still there."""
        row = await VMS.find(self.inv.core.pool, vm.id)
        if row is None or row.public.status not in model.ALIVE:
            return Left.ENDED
        return None if row.public.host_id == self.ask.id else Left.MOVED

    async def _begin(self, vm: Vm, caller: Caller) -> Operation | Left:
        """Asked only while it is there: whoever it was busy with may have moved it."""
        if (how := await self._gone(vm)) is not None:
            return how
        if self.ask.stop_vms:
            stop = StopVm(id=vm.id, force_after_seconds=STOP_SECONDS)
            return await self.inv.core.bus.ask(STOP_VM, stop, caller)
        return await self.inv.core.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id), caller)

    async def _ended(self, op: Operation) -> Operation:
        """The child's end. When we are cancelled it is, too: what has moved stays where it is."""
        ending = asyncio.create_task(self.inv.operation_ended(op.id))
        cancelling = asyncio.create_task(self.run.cancelling.wait())
        try:
            await asyncio.wait([ending, cancelling], return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                with contextlib.suppress(Refused):  # it has just ended by itself
                    await self.inv.core.operations.cancel(op.id)
            return await ending
        finally:
            await end([ending, cancelling])

    async def _show(self) -> None:
        """Who has left, and how far it is."""
        still = len(await _to_clear(self.inv, self.ask.id))
        percent = round(100.0 * len(self.left) / max(len(self.left) + still, 1), 1)
        by = {how: sorted(name for name, its in self.left.items() if its is how) for how in Left}
        result = {str(how): names for how, names in by.items() if names}
        await self.run.save(lambda op: replace(op, progress=percent, result=op.result | result))


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
