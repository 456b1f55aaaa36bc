"""Saved memory that was given up goes from its host: at once, or when the host is heard again.

It is noted with what gives it up, and forgotten once the host has said that it is gone. Its name is its suspension's own, so
what is asked late, or twice, never takes the memory of another one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from services.inventory.desk import HOST_SECONDS, Inventory
from services.inventory.store import VmPrivate
from volery.contracts.domain_orders import DISCARD_MEMORY, DiscardMemory
from volery.contracts.errors import Kind, Refused
from volery.runtime.orders import SILENT_SECONDS
from volery.runtime.tables import Change

log = logging.getLogger(__name__)


def name_for(vm_id: str, operation_id: str) -> str:
    """Of the memory that this operation saves."""
    return f"{vm_id}-{operation_id}.save"


def given_up(inv: Inventory, vm_id: str, private: VmPrivate) -> list[Change]:
    """What is written with the VM that forgets its saved memory; where that is isn't known of what a former release wrote."""
    if not private.saved_path or not private.saved_host_id:
        return []
    return [noted(inv, vm_id, private.saved_host_id, private.saved_path)]


def noted(inv: Inventory, vm_id: str, host_id: str, path: str) -> Change:
    note = inv.store.discard_memory(host_id, path, vm_id)
    return note.and_then(lambda: inv.core.wake(f"memory/{host_id}"))


async def heard_again(inv: Inventory) -> Sequence[str]:
    """Hosts that have some and can be told."""
    beats, hosts = inv.core.beats, await inv.store.hosts_with_discarded_memory()
    return [h for h in hosts if h not in inv.deaf and beats.silent_seconds(h) < SILENT_SECONDS]


async def discard(inv: Inventory, host_id: str) -> None:
    """A host that doesn't answer, or can't remove it, is told again with the next look."""
    for path, vm_id in await inv.store.discarded_memory(host_id):
        try:
            await inv.core.orders.carry_out(
                DISCARD_MEMORY,
                DiscardMemory(of_vm_id=vm_id, path=path),
                host_id=host_id,
                object_id=f"memory-{vm_id}",
                timeout_seconds=HOST_SECONDS,
            )
        except Refused as refused:
            log.warning("saved memory %s stays on host %s: %s", path, host_id, refused.message)
            if refused.kind is Kind.INVALID:
                inv.deaf.add(host_id)
            return
        await inv.core.commit(inv.store.memory_discarded(host_id, path))
