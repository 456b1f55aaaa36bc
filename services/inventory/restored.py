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
from services.inventory.store import VMS
from volery.contracts.agent import DomainReport
from volery.contracts.domain import DomainState
from volery.contracts.errors import conflict
from volery.runtime.run import Run

SILENT_SECONDS = 3.0
"""Six beats: as long as ha takes to suspect a host. What it said last must do then."""
HAS_DISKS_OPEN = ALIVE_STATES | {DomainState.INCOMING}


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
    """Raises Refused(conflict) when another VM has one of these disks open. A restored database may know neither that VM nor
    that it was given the disk. A host is asked first: it may have let go of the disk since it last said what it has."""
    for host_id in {host_id for host_id, _, _ in _open_elsewhere(inv, vm_id, disk_ids)}:
        await inv.fresh_report(host_id, partial(_is_silent, inv, host_id))
    for host_id, other, disk_id in _open_elsewhere(inv, vm_id, disk_ids):
        raise conflict(
            f"disk {disk_id} can't be {what}: VM {other.name or other.vm_id} on host {host_id} has it open, as that host "
            "reports. Stop that VM, or detach the disk there, first",
            disk_id=disk_id,
            vm_id=other.vm_id,
            host_id=host_id,
        )


def _open_elsewhere(
    inv: Inventory, vm_id: str, disk_ids: Collection[str]
) -> list[tuple[str, DomainReport, str]]:
    """Host, VM and disk, as hosts said last under boots that haven't ended."""
    return [
        (host_id, report, disk_id)
        for (host_id, other_id), report in inv.seen.items()
        if other_id != vm_id and report.state in HAS_DISKS_OPEN
        for disk_id in report.disk_ids
        if disk_id in disk_ids and not inv.has_ended(host_id, inv.boots.get((host_id, other_id), ""))
    ]


def _is_silent(inv: Inventory, host_id: str) -> bool:
    return inv.core.beats.silent_seconds(host_id) >= SILENT_SECONDS
