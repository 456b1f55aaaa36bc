"""Devices that a guest lets go of later than it was waited for.

QEMU keeps asking the guest, also after the operation gave up, and takes the device away when the guest lets go, or is
reset. Then what the operation was asked for has come true, and is written: the disk or NIC is the VM's no more.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import partial

from msgspec.structs import replace

from services.inventory.desk import Inventory
from services.inventory.store import VMS, VmPrivate
from volery.contracts.agent import DomainReport
from volery.contracts.vm import Vm
from volery.runtime.run import Run
from volery.runtime.tables import Stale

log = logging.getLogger(__name__)


def asked(inv: Inventory, run: Run, vm_id: str, host_id: str, ident: str) -> None:
    """From here on the guest may let go at any time, whatever becomes of the operation."""
    run.undo("may go later", partial(_may_go_later, inv, vm_id, host_id, ident))


async def _may_go_later(inv: Inventory, vm_id: str, host_id: str, ident: str) -> None:
    while True:
        row = await VMS.find(inv.core.pool, vm_id)
        if row is None:
            return
        unplugging = tuple(sorted({*row.private.unplugging, ident}))
        try:
            await inv.core.commit(VMS.update(row, None, replace(row.private, unplugging=unplugging)))
        except Stale:
            continue
        break
    inv.core.wake(f"boot/{host_id}")  # it may have let go a moment ago


def waited_for(vm: Vm, private: VmPrivate) -> tuple[str, ...]:
    """Devices of the VM that its guest may still let go of."""
    if not private.unplugging:
        return ()
    own = {disk.disk_id for disk in vm.disks} | {nic.id for nic in vm.nics}
    return tuple(ident for ident in private.unplugging if ident in own)


def gone(waiting: Collection[str], report: DomainReport) -> set[str]:
    return set(waiting) - {*report.disk_ids, *report.nic_ids}
