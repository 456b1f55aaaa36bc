"""What was under way in a backup that was restored since.

An operation's steps say what had been done when the backup was taken; what was done afterwards, and perhaps taken back
again, only the hosts know. What they report is believed before the operation. Their answers to its orders are not: a host
that knows an order by its id gives its first answer again, whatever came after it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from services.inventory.desk import Inventory
from services.inventory.host_facts import ALIVE_STATES
from services.inventory.store import VMS, VmPrivate
from volery.contracts.agent import DomainReport
from volery.contracts.domain import DomainState
from volery.contracts.errors import conflict
from volery.contracts.vm import Vm
from volery.runtime.clock import monotonic
from volery.runtime.run import Run
from volery.runtime.tables import Row

HAS_DISKS_OPEN = ALIVE_STATES | {DomainState.INCOMING}
HEARD_SECONDS = 5.0
"""A host that doesn't report for so long is believed what it said last."""


async def refuse_running(inv: Inventory, run: Run, vm_id: str) -> None:
    """For what is done only to a VM that doesn't run, before anything is to be undone: what has come to run since was
    reported by its host. Raises Refused(conflict)."""
    placement = await inv.store.placement(vm_id)
    if placement.state != "running":
        return
    vm = (await VMS.get(inv.core.pool, vm_id)).public
    raise conflict(
        f"VM {vm.name} runs on host {placement.host_id} under epoch {placement.epoch}, as that host reported after the "
        f"database was restored from a backup in which {run.operation.kind} was under way: it runs on as it is. Look at "
        "the VM, and ask again for what it still lacks",
        host_id=placement.host_id,
        epoch=placement.epoch,
    )


async def refuse_old_memory(inv: Inventory, row: Row[Vm, VmPrivate]) -> None:
    """A VM that is suspended in the backup may have run since, and stopped again: no host has anything of it but the file,
    which would be restored onto disks that have changed. Raises Refused(conflict)."""
    if not row.private.saved_path:
        return
    placement = await inv.store.placement(row.id)
    if placement.epoch <= await inv.store.restored_to():
        raise conflict(
            f"VM {row.public.name} was suspended before the database was restored from a backup, and may have run since: then "
            "its saved memory would ruin its disks. Stop it first, which gives the memory up, then start it",
            epoch=placement.epoch,
        )


def refuse_half_done(run: Run, advice: str) -> None:
    """For what can't be gone on with. Raises Refused(conflict)."""
    if run.from_backup:
        operation = run.operation
        raise conflict(
            f"the database was restored from a backup in which {operation.kind} of {operation.object_kind} "
            f"{operation.object_name or operation.object_id} was under way, and what became of it since isn't known: "
            f"{advice}"
        )


def order_name(run: Run, name: str) -> str:
    """Of an order that does no harm when it is carried out again: the host looks at the device itself, and doesn't
    answer what it answered before this restore."""
    return f"{name}-{run.operations.quarantine.base}" if run.from_backup else name


async def refuse_open_elsewhere(inv: Inventory, vm_id: str, disk_ids: Collection[str], what: str) -> None:
    """Raises Refused(conflict) when a host reports that another VM has one of these disks open. A restored database may
    know neither that VM nor that it was given the disk. A host is asked once more first: what it said last may be old."""
    asked: set[str] = set()
    while (found := _open_elsewhere(inv, vm_id, disk_ids)) is not None:
        host_id, disk_id, report = found
        if host_id in asked or not await _heard(inv, host_id, report.vm_id):
            raise conflict(
                f"disk {disk_id} can't be {what}: VM {report.name or report.vm_id} on host {host_id} has it open, as that "
                "host reports. Stop that VM, or detach the disk there, first",
                disk_id=disk_id,
                vm_id=report.vm_id,
                host_id=host_id,
            )
        asked.add(host_id)


def _open_elsewhere(
    inv: Inventory, vm_id: str, disk_ids: Collection[str]
) -> tuple[str, str, DomainReport] | None:
    for (host_id, other_id), report in inv.seen.items():
        if other_id == vm_id or report.state not in HAS_DISKS_OPEN:
            continue
        open_there = next((disk_id for disk_id in report.disk_ids if disk_id in disk_ids), "")
        if open_there and not inv.has_ended(host_id, inv.boots.get((host_id, other_id), "")):
            return host_id, open_there, report
    return None


async def _heard(inv: Inventory, host_id: str, vm_id: str) -> bool:
    """Whether the host has reported anew, or can't any more."""
    boot_id, until = inv.boots.get((host_id, vm_id), ""), monotonic() + HEARD_SECONDS
    ended = partial(inv.has_ended, host_id, boot_id)
    return await inv.fresh_report(host_id, lambda: ended() or monotonic() > until) or ended()
