"""VMs leave a host, several at a time, the most important first; who left how is in the operation's result."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from msgspec.structs import replace

from services.inventory import model
from services.inventory.desk import Inventory
from services.inventory.store import VMS
from volery.contracts.errors import Refused
from volery.contracts.operation import Operation
from volery.contracts.vm import MIGRATE_VM, STOP_VM, MigrateVm, StopVm, Vm
from volery.runtime.bus import LOST, Caller
from volery.runtime.run import CancelRequested, Run
from volery.runtime.tasks import end

ROUNDS = 3
"""How often those that could not leave are tried again: a VM may have been busy, a destination full."""
STOP_SECONDS = 120


class Left(StrEnum):
    """How a VM left its host."""

    MOVED = "moved"
    STOPPED = "stopped"
    ENDED = "ended"


async def to_clear(inv: Inventory, host_id: str) -> list[Vm]:
    """Volery's own VMs that are on the host, in the order in which they leave."""
    vms = [row.public for row in await inv.store.vms_on(host_id)]
    ours = [vm for vm in vms if vm.status in model.ALIVE and not vm.external]
    return sorted(
        ours, key=lambda vm: (not vm.high_availability.enabled, -vm.high_availability.priority, vm.id)
    )


async def to_save(inv: Inventory, host_id: str) -> list[Vm]:
    """Those of them that are highly available."""
    return [vm for vm in await to_clear(inv, host_id) if vm.high_availability.enabled]


async def ended_or_cancelled(inv: Inventory, run: Run, child: Operation) -> Operation:
    """The child's end. When we are cancelled it is, too: what has moved stays where it is."""
    ending = asyncio.create_task(inv.operation_ended(child.id))
    cancelling = asyncio.create_task(run.cancelling.wait())
    try:
        await asyncio.wait([ending, cancelling], return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            with contextlib.suppress(Refused):  # it has just ended by itself
                await inv.core.operations.cancel(child.id)
        return await ending
    finally:
        await end([ending, cancelling])


async def always() -> bool:
    return True


@dataclass(slots=True)
class Clearing:
    """One operation's work at one host."""

    inv: Inventory
    run: Run
    host_id: str
    leavers: Callable[[Inventory, str], Awaitable[list[Vm]]] = to_clear
    goes_on: Callable[[], Awaitable[bool]] = always
    """Whether those that have not begun to leave still should."""
    stop_vms: bool = False
    """Shut down instead of moved."""
    left: dict[str, Left] = field(init=False)
    """VM's name → how, those of a former run of the operation included."""

    def __post_init__(self) -> None:
        said = self.run.operation.result
        self.left = {name: how for how in Left for name in said.get(how, ())}

    async def clear(self) -> dict[str, str]:
        """Those that could not leave, by name, with the reason."""
        failed: dict[str, str] = {}
        for attempt in range(ROUNDS):
            vms = await self.leavers(self.inv, self.host_id)
            if not vms or not await self.goes_on():
                return {}
            failed = await _Round(self, attempt).clear(vms)
            self.run.checkpoint()
        return failed

    async def empty(self) -> dict[str, str]:
        """The same of a host to which no VM sets out any more (`Store.takes_vms`); those that are on their way arrive first."""
        failed = await self.clear()
        while not failed and await self._arrived():
            failed = await self.clear()
        return failed

    async def _arrived(self) -> bool:
        """Waits until no VM is on its way here; whether one was."""
        were = False
        while operation_ids := await self._arriving():
            were = True
            waited = [asyncio.create_task(self.inv.operation_ended(each)) for each in operation_ids]
            cancelling = asyncio.create_task(self.run.cancelling.wait())
            try:
                await asyncio.wait([*waited, cancelling], return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end([*waited, cancelling])
            self.run.checkpoint()
        return were

    async def _arriving(self) -> list[str]:
        """Operations that start VMs here, or move them here."""
        placements = await self.inv.store.placements_on(self.host_id)
        vm_ids = [each.vm_id for each in placements if each.state != "none"]
        return [row.public.busy_with for row in await self.inv.store.vms_with(vm_ids) if row.public.busy_with]

    async def look(self, vms: Mapping[str, str]) -> None:
        """Whether any of these, id → name, has left: somebody else moves them."""
        before = len(self.left)
        for vm_id, name in vms.items():
            if name not in self.left and (how := await self.gone(vm_id)) is not None:
                self.left[name] = how
        if len(self.left) > before:
            await self.show()

    async def gone(self, vm_id: str) -> Left | None:
        """How it left without us; None: it is still there."""
        row = await VMS.find(self.inv.core.pool, vm_id)
        if row is None or row.public.status not in model.ALIVE:
            return Left.ENDED
        return None if row.public.host_id == self.host_id else Left.MOVED

    async def show(self) -> None:
        """Who has left, and how far it is."""
        still = len(await self.leavers(self.inv, self.host_id))
        percent = round(100.0 * len(self.left) / max(len(self.left) + still, 1), 1)
        by = {how: sorted(name for name, its in self.left.items() if its is how) for how in Left}
        result = {str(how): names for how, names in by.items() if names}
        await self.run.save(lambda op: replace(op, progress=percent, result=op.result | result))


class _Round:
    """One try at every VM that is still there, a few of them at a time."""

    def __init__(self, clearing: Clearing, attempt: int) -> None:
        self.of, self.inv, self.run, self.attempt = clearing, clearing.inv, clearing.run, attempt
        self.failed: dict[str, str] = {}
        self.gate = asyncio.Semaphore(self.inv.config.evacuations_at_once)

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
            if not await self.of.goes_on():
                return
            try:
                how = await self.run.step(
                    f"clear-{vm.id}-{self.attempt}", f"Moving {vm.name}", lambda: self._go(vm), Left
                )
            except Refused as refused:
                self.failed[vm.name] = refused.message
                return
            except CancelRequested:
                return  # the round's end says so for all
        self.of.left[vm.name] = how
        await self.of.show()

    async def _go(self, vm: Vm) -> Left:
        """Ask, under the same id after a crash, and wait for the end. Raises Refused with its reason."""
        caller = self.run.caller_for(f"clear-{vm.id}-{self.attempt}")
        begun = await self.inv.once_free(lambda: self._begin(vm, caller))
        if isinstance(begun, Left):
            return begun
        ended = await ended_or_cancelled(self.inv, self.run, begun)
        if ended.problem is None:
            return Left.STOPPED if self.of.stop_vms else Left.MOVED
        if (how := await self.of.gone(vm.id)) is not None:
            return how  # it could not be moved since it has ended
        details = {name: value for name, value in ended.problem.details.items() if name != LOST}
        raise Refused(ended.problem.kind, ended.problem.message, **details)

    async def _begin(self, vm: Vm, caller: Caller) -> Operation | Left:
        """Asked only while it is there: whoever it was busy with may have moved it."""
        if (how := await self.of.gone(vm.id)) is not None:
            return how
        if self.of.stop_vms:
            stop = StopVm(id=vm.id, force_after_seconds=STOP_SECONDS)
            return await self.inv.core.bus.ask(STOP_VM, stop, caller)
        return await self.inv.core.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id), caller)
