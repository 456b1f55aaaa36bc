"""Level-triggered: what should be against what is. Right even when every event was missed.

Keys: `vm/{id}` (a VM whose state is not the desired one), `claims/{id}` (capacity that a VM no longer needs),
`stray/{host}/{vm}` (a domain of ours where its VM may not run), `host/{id}` (committed sums shown on the host),
`order/{id}` (an order that a host was too slow for, and that must not come true later), `lost/{host}` (VMs that ran under
a boot that has ended by proof), `boot/{host}` (VMs there of which it isn't known under which boot they run),
`paused/{vm}` (a VM that an I/O error paused), `away/{host}` (one that has lost storage or a network), `reports/` (what every
 host has now), `unplugged/{vm}` (a device that a guest let go of too late), `behind/{vm}` (a VM whose host has it under an
 epoch before its own, and isn't believed), `memory/{host}` (saved memory there that was given up).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from msgspec.structs import replace

from services.inventory import memory
from services.inventory.dead_parts import leave
from services.inventory.desk import HOST_SECONDS, Inventory
from services.inventory.devices import unplugged
from services.inventory.endings import bury
from services.inventory.host_facts import ALIVE_STATES
from services.inventory.io_errors import go_on
from services.inventory.specs import domain_spec
from services.inventory.store import HOSTS, VMS
from volery.contracts.base import Call, Message
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import FORGET_DOMAIN, RUN_DOMAIN, UNKILLABLE, ForgetDomain, RunDomain
from volery.contracts.errors import Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import Operation
from volery.contracts.scheduling import CONFIRM_CLAIM, RELEASE_VM_CLAIMS, ClaimKey, ReleaseVm
from volery.contracts.vm import DELETE_VM, STOP_VM, DeleteVm, DesiredState, StopVm, VmStatus
from volery.runtime.bus import LOST, Caller

log = logging.getLogger(__name__)
ABANDONED_SECONDS = HOST_SECONDS + 5.0
GIVE_UP_SECONDS = 3.0
STRAY_SECONDS = 5.0
CLAIM_SECONDS = 2.0
HELD_IN_QUARANTINE = frozenset({"vm", "claims", "stray", "order", "paused", "unplugged", "behind", "memory"})
"""Looks that end, move or release something: while the database is older than the hosts, what it calls wrong is right."""


async def reconcile(inv: Inventory, key: str) -> None:
    noun, _, rest = key.partition("/")
    if noun in HELD_IN_QUARANTINE and inv.core.quarantine.holds:
        return  # seen again when it has ended, by what every host reports then
    await LOOKS[noun](inv, rest)


async def reconcile_all(inv: Inventory) -> Sequence[str]:
    """Everything that may need a look, whatever was heard or missed."""
    vms = await inv.store.unsettled_vms()
    orders = await inv.core.orders.abandoned(ABANDONED_SECONDS)
    return [
        *(f"vm/{vm_id}" for vm_id in vms),
        *(f"host/{host_id}" for host_id in await inv.store.hosts_shown_wrong()),
        *(f"order/{order_id}" for order_id in orders),
        *(f"lost/{row.host_id}" for row in await inv.store.lost_placements()),
        *(f"away/{host_id}" for host_id in await inv.store.non_operational_hosts()),
        *(f"boot/{host_id}" for host_id in await inv.store.hosts_of_unknown_boots()),
        *(f"unplugged/{vm_id}" for vm_id in await inv.store.vms_unplugging()),
        *(f"memory/{host_id}" for host_id in await memory.heard_again(inv)),
    ]


async def _vm(inv: Inventory, vm_id: str) -> None:
    """A stop that was asked for while the host was away is asked again; starts are ha's and people's."""
    row = await VMS.find(inv.core.pool, vm_id)
    if row is None or row.public.busy_with or row.public.external:
        return
    vm = row.public
    placement = await inv.store.placement(vm_id)
    if vm.status is VmStatus.DELETING:
        await _again(inv, DELETE_VM, DeleteVm(id=vm_id, delete_disks=row.private.delete_disks), vm_id)
    elif vm.status is VmStatus.UNKNOWN or vm.status_reason == UNKILLABLE:
        return  # nobody hears it now, or it is killed already
    elif vm.desired is DesiredState.DOWN and placement.state == "running":
        await _again(inv, STOP_VM, StopVm(id=vm_id, force=row.private.stop_forced), vm_id)


async def _again(inv: Inventory, call: Call[Any, Operation], question: Message, vm_id: str) -> None:
    """What was asked for once and did not come to its end."""
    try:
        await inv.core.bus.ask(call, question, Caller("service:inventory", new_id(), vm_id))
    except Refused as refused:
        log.info("%s of %s again: %s", call.subject, vm_id, refused.message)


async def _claims(inv: Inventory, vm_id: str) -> None:
    """A VM that ended or moved holds no capacity but that of its placement, which is certain once it runs."""
    placement = await inv.store.placement(vm_id)
    kept: tuple[int, ...] = (placement.epoch,) if placement.state != "none" else ()
    if placement.state == "moving":
        return
    question = ReleaseVm(vm_id=vm_id, keep_epochs=kept)
    try:
        await inv.core.bus.ask(RELEASE_VM_CLAIMS, question, Caller("service:inventory", new_id(), vm_id))
    except Refused as refused:
        # The scheduler's own reconciling releases what nobody needs.
        log.info("releasing the claims of %s: %s", vm_id, refused.message)
    if placement.state == "running":
        await _confirm_claim(inv, vm_id, placement.epoch)


async def _confirm_claim(inv: Inventory, vm_id: str, epoch: int) -> None:
    question = ClaimKey(vm_id=vm_id, epoch=epoch)
    try:
        await inv.core.bus.ask(CONFIRM_CLAIM, question, Caller("service:inventory", new_id(), vm_id))
    except Refused as refused:
        # One that is gone is made again by the scheduler, from what is said of the VM.
        log.info("confirming the claim of %s: %s", vm_id, refused.message)
        if refused.details.get(LOST):
            await asyncio.sleep(CLAIM_SECONDS)
            inv.core.wake(f"claims/{vm_id}")


async def _stray(inv: Inventory, rest: str) -> None:
    """A domain of ours runs where its VM may not. It is ended there, under the newest epoch."""
    host_id, _, vm_id = rest.partition("/")
    seen = inv.seen.get((host_id, vm_id))
    placement = await inv.store.placement(vm_id)
    if seen is None or seen.state in (DomainState.GONE, DomainState.SHUTOFF):
        return
    if host_id in (placement.host_id, placement.destination_id):
        return
    row = await VMS.find(inv.core.pool, vm_id)
    if row is None and not seen.epoch:
        return
    log.warning(
        "VM %s runs on host %s where it may not (epoch %d); ending it there", vm_id, host_id, seen.epoch
    )
    epoch = max(placement.epoch, seen.epoch)
    # A later epoch is one that waits for a migration; others tell of a restore.
    if epoch > placement.epoch and row is not None:
        await inv.core.commit(
            inv.store.raised(placement, epoch), VMS.update(row, replace(row.public, epoch=epoch))
        )
    try:
        await inv.order_now(
            FORGET_DOMAIN, ForgetDomain(vm_id=vm_id), host_id=host_id, object_id=vm_id, epoch=epoch
        )
    except (Refused, TimeoutError) as error:
        log.warning("the stray domain of %s on %s: %s", vm_id, host_id, error)
        await asyncio.sleep(STRAY_SECONDS)
        await inv.core.hosts.ask_report(host_id)  # still there, it is ended again


async def _behind(inv: Inventory, vm_id: str) -> None:
    """A migration failed, and the source could not be told the epoch under which it goes on: it is told now."""
    placement = await inv.store.placement(vm_id)
    row = await VMS.find(inv.core.pool, vm_id)
    seen = inv.seen.get((placement.host_id, vm_id))
    if row is None or row.public.busy_with or placement.state != "running":
        return
    if seen is None or seen.state not in ALIVE_STATES or seen.epoch >= placement.epoch:
        return
    try:
        spec = await domain_spec(inv, row.public, placement.host_id, None, Caller("service:inventory"))
        await inv.order_now(
            RUN_DOMAIN,
            RunDomain(vm_id=vm_id, spec=spec, goes_on=True),
            host_id=placement.host_id,
            object_id=vm_id,
            epoch=placement.epoch,
        )
    except Refused as refused:
        log.warning("VM %s stays under an epoch that has passed: %s", vm_id, refused.message)
        await asyncio.sleep(STRAY_SECONDS)
        await inv.core.hosts.ask_report(placement.host_id)  # still there: told again; gone: it has ended


async def _host(inv: Inventory, host_id: str) -> None:
    """What its VMs were promised, shown on the host."""
    row = await HOSTS.find(inv.core.pool, host_id)
    if row is None:
        return
    vms, committed = await inv.store.promised(host_id)
    if (row.public.vm_count, row.public.memory_committed_bytes) == (vms, committed):
        return
    new = replace(row.public, vm_count=vms, memory_committed_bytes=committed)
    await inv.core.commit(HOSTS.update(row, new))


async def _order(inv: Inventory, order_id: str) -> None:
    """A host that is silent is asked again with the next look."""
    try:
        async with asyncio.timeout(GIVE_UP_SECONDS):
            await inv.core.orders.give_up(order_id)
    except TimeoutError:
        log.info("order %s can't be taken back yet: its host is silent", order_id)


async def _lost(inv: Inventory, host_id: str) -> None:
    if any(host == host_id for host, _ in inv.core.orders.deaths.ended):
        await bury(inv)


async def _boot(inv: Inventory, host_id: str) -> None:
    await inv.core.hosts.ask_report(host_id)


async def _reports(inv: Inventory, _: str) -> None:
    for row in await inv.store.hosts():
        await inv.core.hosts.ask_report(row.id)


LOOKS: dict[str, Callable[[Inventory, str], Awaitable[None]]] = {
    "vm": _vm,
    "claims": _claims,
    "stray": _stray,
    "host": _host,
    "order": _order,
    "lost": _lost,
    "boot": _boot,
    "paused": go_on,
    "away": leave,
    "reports": _reports,
    "unplugged": unplugged,
    "behind": _behind,
    "memory": memory.discard,
}
