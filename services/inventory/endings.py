"""What is written when a VM's QEMU has ended: it is down, nowhere, and wanted as the stop table says.

A VM has ended when its host says so, or when the boot under which it runs has ended by proof. The second is looked for
in the tables, never taken from an event: a proof that came before the VM's boot was known is seen as soon as it is. A VM
whose boot isn't known, such as one that has just arrived, has not ended until its host says under which boot it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from msgspec.structs import replace

from services.inventory import model, stop_table
from services.inventory.desk import Inventory
from services.inventory.stop_table import End
from services.inventory.store import VMS, PlacementRow, VmPrivate
from volery.contracts.vm import Vm
from volery.runtime.clock import utc_now
from volery.runtime.tables import Change, Row, Stale

log = logging.getLogger(__name__)

DEAD_CLAIMS_SECONDS = 2.0
"""Nobody waits for capacity on a dead host, and its VMs give up their claims when they are placed anew: others first."""
TOGETHER = 20
"""VMs whose end is written in one commit: a host that dies takes a hundred with it."""


def in_blackout(inv: Inventory, host_id: str, boot_id: str, present_boot_id: str = "") -> bool:
    """Whether a boot that has ended was not heard since this process began: both were down. Where it isn't known, whether
    none but the host's present one was heard."""
    heard = inv.core.beats.boots.get(host_id, set())
    return boot_id not in heard if boot_id else not heard - {present_boot_id}


def down(vm: Vm, private: VmPrivate, end: End, *, blackout: bool = False) -> tuple[Vm, VmPrivate]:
    """The VM once it has ended so, and what is wanted of it from now on."""
    if private.killing and end is not End.HOST_DIED:
        end = End.IO_ERROR
    after = stop_table.after(
        end,
        stop_table.wish(vm, private.stop_asked),
        protected=vm.high_availability.enabled,
        restart_after_guest_shutdown=vm.high_availability.restart_after_guest_shutdown,
        start_after_blackout=vm.start_after_blackout,
        blackout=blackout,
    )
    new = replace(
        vm,
        status=model.S.DOWN,
        status_reason=after.reason,
        desired=after.desired,
        host_id="",
        stopped_at=utc_now(),
        guest=replace(vm.guest, agent_connected=False, ip_addresses=()),
    )
    return model.with_actions(new), replace(private, stop_asked=False, killing=False, unplugging=())


def ended(
    inv: Inventory, row: Row[Vm, VmPrivate], placement: PlacementRow, end: End, boot_id: str = ""
) -> list[Change]:
    """`boot_id`: the host's present boot, where it is known."""
    blackout = in_blackout(inv, placement.host_id, placement.boot_id, boot_id)
    new, private = down(row.public, row.private, end, blackout=blackout)
    after_seconds = DEAD_CLAIMS_SECONDS if end is End.HOST_DIED else 0.0
    placed = inv.store.place(
        placement, epoch=placement.epoch, host_id="", state="none", claims_after_seconds=after_seconds
    )
    return [VMS.update(row, new, private), placed]


async def bury(inv: Inventory) -> None:
    """Every VM that ran under a boot that has ended by proof has ended. One that moves is left to its operation, which
    knows both hosts, and one that starts to its own, whose order ends with the boot that it was sent to."""
    lost = await inv.store.lost_placements()
    for start in range(0, len(lost), TOGETHER):
        some = lost[start : start + TOGETHER]
        if not await _bury_together(inv, some):
            for placement in some:
                await _bury(inv, placement)


async def _bury_together(inv: Inventory, placements: Sequence[PlacementRow]) -> bool:
    """False, and nothing written, when one of them changed meanwhile."""
    ids = [placement.vm_id for placement in placements]
    rows = {row.id: row for row in await VMS.where(inv.core.pool, "id = any($1::text[])", ids)}
    known = [placement for placement in placements if placement.vm_id in rows]
    try:
        await inv.core.commit(
            *(change for p in known for change in ended(inv, rows[p.vm_id], p, End.HOST_DIED))
        )
    except Stale:
        return False
    for placement in known:
        _buried(inv, rows[placement.vm_id].public, placement)
    return True


async def _bury(inv: Inventory, placement: PlacementRow) -> None:
    while True:
        row = await VMS.find(inv.core.pool, placement.vm_id)
        if row is None or await inv.store.placement(placement.vm_id) != placement:
            return
        try:
            await inv.core.commit(*ended(inv, row, placement, End.HOST_DIED))
        except Stale:
            continue
        _buried(inv, row.public, placement)
        return


def _buried(inv: Inventory, vm: Vm, placement: PlacementRow) -> None:
    inv.seen.pop((placement.host_id, placement.vm_id), None)
    log.warning("VM %s ran on host %s, which died: it has ended", vm.name, placement.host_id)
