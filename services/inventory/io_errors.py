"""VMs that QEMU paused since a disk could not be read or written: told to go on, left, or ended, as each one's policy says.

QEMU keeps the request that failed and repeats it when the VM goes on, so the guest sees a disk that took its time. That
the storage is back is found out by trying: a VM whose disk still fails is paused again. How long one has been paused is
counted from when this leader first saw it, so that a new one gives it more time, never less.
"""

from __future__ import annotations

import logging

from msgspec.structs import replace

from services.inventory import io_error_rules, model
from services.inventory.desk import Inventory, Stalled
from services.inventory.io_error_rules import Step
from services.inventory.store import VMS, VmPrivate
from volery.contracts.domain_orders import (
    ACT_ON_DOMAIN,
    STOP_DOMAIN,
    ActOnDomain,
    DomainAction,
    StopDomain,
    StopMethod,
)
from volery.contracts.errors import Refused
from volery.contracts.vm import DesiredState, Vm, VmStatus
from volery.runtime.clock import monotonic
from volery.runtime.service import Part
from volery.runtime.tables import Row, Stale

log = logging.getLogger(__name__)

part = Part()

LOOK_SECONDS = 1.0
FORGET_SECONDS = 15.0
"""One that ran on for this long was not paused again by the same error."""


def is_stalled(vm: Vm) -> bool:
    """A pause that somebody asked for is his to end."""
    return (
        vm.status is VmStatus.PAUSED
        and vm.status_reason == model.IO_ERROR
        and vm.desired is DesiredState.UP
        and not vm.busy_with
        and not vm.external
    )


@part.every(LOOK_SECONDS)
async def look(inv: Inventory) -> None:
    now = monotonic()
    paused = {row.id: row.public for row in await inv.store.paused_vms() if is_stalled(row.public)}
    for vm_id, vm in paused.items():
        known = inv.stalled.get(vm_id)
        if known is None or known.epoch != vm.epoch:
            inv.stalled[vm_id] = Stalled(since=now, epoch=vm.epoch, tried_at=now)
            log.warning("VM %s was paused by an I/O error; its policy is %s", vm.name, vm.io_error)
        inv.core.wake(f"paused/{vm_id}")
    for vm_id in [v for v, s in inv.stalled.items() if v not in paused and now - s.tried_at > FORGET_SECONDS]:
        del inv.stalled[vm_id]


async def go_on(inv: Inventory, vm_id: str) -> None:
    """One step for one VM."""
    row, stalled = await VMS.find(inv.core.pool, vm_id), inv.stalled.get(vm_id)
    if row is None or stalled is None or not is_stalled(row.public):
        return
    now, vm = monotonic(), row.public
    step = io_error_rules.step(
        vm.io_error, now - stalled.since, now - stalled.tried_at, stalled.tries, inv.config
    )
    if step is Step.WAIT:
        return
    stalled.tried_at, stalled.tries = now, stalled.tries + 1
    try:
        if step is Step.KILL:
            await _kill(inv, row)
        else:
            await inv.order_now(
                ACT_ON_DOMAIN,
                ActOnDomain(vm_id=vm_id, action=DomainAction.RESUME),
                host_id=vm.host_id,
                object_id=vm_id,
                epoch=vm.epoch,
            )
    except Refused as refused:
        log.warning("VM %s stays paused by its I/O error: %s", vm.name, refused.message)
    except Stale:
        inv.core.wake(f"paused/{vm_id}")


async def _kill(inv: Inventory, row: Row[Vm, VmPrivate]) -> None:
    """What it is ended for is written first: its host only says that it ended."""
    vm = row.public
    await inv.core.commit(VMS.update(row, vm, replace(row.private, killing=True)))
    log.warning("VM %s was paused by an I/O error for too long: it is ended, by its policy", vm.name)
    await inv.order_now(
        STOP_DOMAIN,
        StopDomain(vm_id=vm.id, methods=(StopMethod.DESTROY,)),
        host_id=vm.host_id,
        object_id=vm.id,
        epoch=vm.epoch,
    )
