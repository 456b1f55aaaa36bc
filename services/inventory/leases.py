"""Where a VM's lease is: chosen when it is made or edited, made by storage for each start."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from msgspec import UNSET
from msgspec.structs import replace

from services.inventory.desk import Inventory
from volery.contracts.cluster import GetById
from volery.contracts.domain import DomainLease
from volery.contracts.errors import Refused, conflict, invalid
from volery.contracts.storage import (
    GET_DISK,
    GET_STORAGE_DOMAIN,
    PREPARE_LEASE,
    RELEASE_LEASE,
    DomainKind,
    PrepareLease,
    ReleaseLease,
    StorageDomain,
)
from volery.contracts.vm import CreateVm, UpdateVm, Vm, VmStatus
from volery.runtime import checks
from volery.runtime.bus import Caller

log = logging.getLogger(__name__)


def refuse_place(domain: StorageDomain, vm_name: str, data_center_id: str) -> None:
    """Raises Refused unless VMs of this data center can have their lease there."""
    if domain.kind is not DomainKind.DIRECTORY or domain.host_id:
        why = "belongs to one host" if domain.host_id else f"is of kind {domain.kind}"
        raise invalid(
            f"VM {vm_name} can't have its lease on storage domain {domain.name}, which {why}: take a directory that "
            "every host has mounted; the VM's disks may be elsewhere",
            field="lease",
        )
    if domain.data_center_id != data_center_id:
        raise conflict(
            f"storage domain {domain.name} isn't attached to the data center of VM {vm_name}: its lease can't be there",
            storage_domain_id=domain.id,
        )
    if not domain.leases:
        raise conflict(
            f"storage domain {domain.name} holds no leases: switch them on there (leases), or leave VM {vm_name} "
            "without one",
            storage_domain_id=domain.id,
        )


def is_offered(domain: StorageDomain, data_center_id: str) -> bool:
    """Whether a VM gets its lease there unasked: not where fewer than two hosts can hold one, since then it could be
    brought back nowhere else."""
    held = domain.leases and len(domain.lease_host_ids) > 1
    return held and domain.data_center_id == data_center_id


async def for_new(inv: Inventory, ask: CreateVm, data_center_id: str, caller: Caller) -> str:
    """The storage domain of a new VM's lease; "" is none. Raises Refused when it can't be there."""
    if ask.lease is not None:
        return await _checked(inv, ask.lease, ask.name, data_center_id, caller)
    if not ask.high_availability.enabled:
        return ""
    written = [disk for disk in ask.disks if not disk.read_only]
    domain_ids = [disk.storage_domain_id for disk in written if not disk.disk_id]
    domain_ids += [await _domain_of(inv, disk.disk_id, caller) for disk in written if disk.disk_id]
    return await _offered(inv, domain_ids, data_center_id, caller)


async def for_edited(inv: Inventory, vm: Vm, ask: UpdateVm, new: Vm, caller: Caller) -> Vm:
    """The edited VM with its lease. Raises Refused when that can't be there, or not be changed now."""
    if ask.lease is not UNSET and ask.lease != vm.lease:
        if vm.status is not VmStatus.DOWN or vm.busy_with:
            raise conflict(
                f"the lease of VM {vm.name} can't be changed while it is {vm.status}"
                + (" and busy" if vm.busy_with else "")
                + ": the host that runs it holds it; stop the VM first",
                status=vm.status,
            )
        lease = await _checked(inv, ask.lease, vm.name, vm.data_center_id, caller)
        return replace(new, lease=lease, next_lease="")
    if not new.high_availability.enabled and vm.next_lease:
        return replace(new, next_lease="")
    becomes = new.high_availability.enabled and not vm.high_availability.enabled
    if not becomes or ask.lease is not UNSET or vm.lease:
        return new
    written = [disk.disk_id for disk in vm.disks if disk.active and not disk.read_only]
    domain_ids = [await _domain_of(inv, disk_id, caller) for disk_id in written]
    offered = await _offered(inv, domain_ids, vm.data_center_id, caller)
    if vm.status is VmStatus.DOWN and not vm.busy_with:
        return replace(new, lease=offered)
    return replace(new, next_lease=offered, next_run=new.next_run or bool(offered))


async def at_start(inv: Inventory, vm: Vm) -> Vm:
    """The VM with the lease that waited for this start. One that could not be held now goes on waiting: nobody asked for
    it, so no start fails for it."""
    if not vm.next_lease:
        return vm
    try:
        domain = await inv.core.bus.ask(GET_STORAGE_DOMAIN, GetById(id=vm.next_lease), again=False)
    except Refused as refused:
        log.info("VM %s starts without the lease that waits for it: %s", vm.name, refused.message)
        return vm
    if not is_offered(domain, vm.data_center_id):
        return vm
    return replace(vm, lease=vm.next_lease, next_lease="")


async def _checked(inv: Inventory, domain_id: str, name: str, data_center_id: str, caller: Caller) -> str:
    if not domain_id:
        return ""
    checks.object_id(domain_id, "storage domain")
    domain = await inv.core.bus.ask(GET_STORAGE_DOMAIN, GetById(id=domain_id), caller)
    refuse_place(domain, name, data_center_id)
    return domain_id


async def _domain_of(inv: Inventory, disk_id: str, caller: Caller) -> str:
    return (await inv.core.bus.ask(GET_DISK, GetById(id=disk_id), caller)).storage_domain_id


async def _offered(inv: Inventory, domain_ids: Iterable[str], data_center_id: str, caller: Caller) -> str:
    for domain_id in dict.fromkeys(domain_ids):
        domain = await inv.core.bus.ask(GET_STORAGE_DOMAIN, GetById(id=domain_id), caller)
        if is_offered(domain, data_center_id):
            return domain_id
    return ""


async def prepared(inv: Inventory, vm: Vm, host_id: str, caller: Caller) -> DomainLease | None:
    """The VM's lease for this host, there and free or its own. Raises Refused with storage's sentence."""
    if not vm.lease:
        return None
    question = PrepareLease(storage_domain_id=vm.lease, vm_id=vm.id, host_id=host_id)
    return await inv.core.bus.ask(PREPARE_LEASE, question, caller)


async def let_go(inv: Inventory, old: Vm, new: Vm, caller: Caller) -> None:
    """After it was given another lease. Should storage not be there, the old one goes with the VM."""
    if not old.lease or old.lease == new.lease:
        return
    question = ReleaseLease(storage_domain_id=old.lease, vm_id=old.id)
    try:
        await inv.core.bus.ask(RELEASE_LEASE, question, caller)
    except Refused as refused:
        log.info("the former lease of VM %s stays until it is deleted: %s", old.name, refused.message)
