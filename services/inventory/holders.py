"""Who is at work on a VM or a host, and whether what is asked of it now may come: by the table of what may happen together.

An operation that asks another service for what is held waits there (`Inventory.once_free`).
"""

from __future__ import annotations

from services.inventory import model
from services.inventory.desk import Inventory
from volery.contracts import together
from volery.contracts.host import Host
from volery.contracts.together import KINDS, By, Held, Holder, Thing, Work
from volery.contracts.vm import Vm


async def at_work(inv: Inventory, operation_id: str) -> Holder:
    """The operation, and what it does with what it holds."""
    row = await inv.core.operations.table.find(inv.core.pool, operation_id)
    return Holder(By.OPERATION, operation_id, KINDS.get(row.public.kind) if row is not None else None)


async def check_action(inv: Inventory, vm: Vm, action: str) -> None:
    """Raises Refused(conflict) unless this may be asked of the VM now."""
    model.check_action(vm, action, await at_work(inv, vm.busy_with) if vm.busy_with else None)


async def check_restart(inv: Inventory, vm: Vm) -> None:
    """Raises Refused(unavailable), after which ha asks again."""
    if vm.busy_with:
        holder = await at_work(inv, vm.busy_with)
        together.refuse(Work.RESTART, Thing(Held.VM, vm.id, vm.name), [holder])


async def check_maintenance(inv: Inventory, host: Host) -> None:
    """Raises Refused(conflict)."""
    if host.busy_with:
        holder = await at_work(inv, host.busy_with)
        together.refuse(Work.MAINTAIN, Thing(Held.HOST, host.id, host.name), [holder])
