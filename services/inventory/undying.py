"""A VM whose start failed and whose QEMU can't be killed: it has its disks and its lease, so it runs, as far as anybody may
rely on it, until its host says that QEMU has ended, or is proven dead."""

from __future__ import annotations

from msgspec.structs import replace

from services.inventory import model
from services.inventory.desk import Inventory
from services.inventory.store import VMS, PlacementRow
from volery.contracts.domain_orders import UNKILLABLE
from volery.contracts.errors import Refused
from volery.contracts.vm import DesiredState, VmStatus
from volery.runtime.tables import Stale


def is_undying(refused: Refused) -> bool:
    return refused.details.get("rule") == UNKILLABLE


async def stays(inv: Inventory, vm_id: str, placement: PlacementRow, boot_id: str, *, wanted: bool) -> None:
    """Shown as what it is, where it is, under the epoch of that start. `wanted`: it is brought back once that has ended."""
    while True:
        row = await VMS.find(inv.core.pool, vm_id)
        if row is None or await inv.store.placement(vm_id) != placement:
            return
        new = replace(
            row.public,
            status=VmStatus.NOT_RESPONDING,
            status_reason=UNKILLABLE,
            desired=DesiredState.UP if wanted else DesiredState.DOWN,
            host_id=placement.host_id,
        )
        runs = inv.store.place(
            placement, epoch=placement.epoch, host_id=placement.host_id, state="running", boot_id=boot_id
        )
        try:
            await inv.core.commit(runs, VMS.update(row, model.with_actions(new)))
        except Stale:
            continue
        inv.core.wake(f"claims/{vm_id}")
        await inv.core.hosts.ask_report(placement.host_id)  # it may have ended a moment ago
        return
