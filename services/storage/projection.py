"""What storage knows of inventory's nouns: data centers, hosts and VMs, as their facts say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from services.storage import disk_model
from services.storage.storage import Storage
from services.storage.store import DISKS, DiskPrivate, HostRow, VmRow
from volery.contracts.base import Call
from volery.contracts.cluster import (
    DATA_CENTER_CHANGED,
    DATA_CENTER_DELETED,
    LIST_DATA_CENTERS,
    DataCenter,
    GetById,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, LIST_HOSTS, Host
from volery.contracts.operation import ListQuery
from volery.contracts.storage import Disk
from volery.contracts.vm import GET_VM, LIST_VMS, VM_CHANGED, VM_DELETED, Vm
from volery.runtime.hear_owners import Said, newest
from volery.runtime.listing import pages
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row

part = Part()


@part.hears(DATA_CENTER_CHANGED)
async def data_center_changed(svc: Storage, center: DataCenter) -> list[Change]:
    return [svc.store.know_data_center(center.id, center.name)]


@part.hears(DATA_CENTER_DELETED)
async def data_center_deleted(svc: Storage, center: DataCenter) -> list[Change]:
    return [svc.store.forget("data_center", center.id)]


@part.hears_together(HOST_CHANGED)
async def hosts_changed(svc: Storage, said: Sequence[Said]) -> list[Change]:
    hosts: list[Host] = newest(said)
    known = await svc.store.hosts_with([host.id for host in hosts])
    return [change for host in hosts for change in _changed(svc, host, known.get(host.id))]


def _changed(svc: Storage, host: Host, known: HostRow | None) -> list[Change]:
    """Only a new status, data center, boot or ability to hold leases makes anything to do."""
    if (
        known is not None
        and (known.status, known.data_center_id) == (host.status, host.data_center_id)
        and (known.name, known.data_address) == (host.name, host.capabilities.data_address)
        and (known.boot_id, known.leases) == (host.boot_id, host.capabilities.leases)
        and known.cluster_id == host.cluster_id
    ):
        return []
    return [svc.then_wake(svc.store.know_host(host), f"host:{host.id}")]


@part.hears(HOST_DELETED)
async def host_deleted(svc: Storage, host: Host) -> list[Change]:
    return [
        svc.then_wake(svc.store.forget("host", host.id), f"host:{host.id}"),
        svc.store.forget_luns(host.id),
        svc.leases.host_gone(host.id),
    ]


@part.hears_together(VM_CHANGED)
async def vms_changed(svc: Storage, said: Sequence[Said]) -> list[Change]:
    vms: list[Vm] = newest(said)
    known = await svc.store.vms([vm.id for vm in vms])
    new = [
        vm for vm in vms if known.get(vm.id) != VmRow(vm.id, vm.name, vm.host_id, str(vm.status), vm.epoch)
    ]
    return [svc.store.know_vms(new)] if new else []


@part.hears(VM_DELETED)
async def vm_deleted(svc: Storage, vm: Vm) -> list[Change]:
    """A VM that is gone uses nothing."""
    leases = [f"lease:{lease.domain_id}:{vm.id}" for lease in await svc.leases.leases_of(vm.id)]
    doomed = svc.then_wake(svc.leases.doomed(vm.id), *leases)
    return [svc.store.forget("vm", vm.id), doomed, *await released(svc, vm.id)]


async def released(svc: Storage, vm_id: str) -> list[Change]:
    """The changes that take a VM off all its disks."""
    rows = await svc.store.disks_used_by(vm_id)
    return [DISKS.update(row, *disk_model.let_go(row, vm_id)) for row in rows]


@part.every(300.0)
async def release_orphans(svc: Storage) -> None:
    """Uses by VMs that inventory doesn't have, whose deletion was never heard."""
    for vm_id in await svc.store.unknown_users():
        try:
            await svc.core.bus.ask(GET_VM, GetById(id=vm_id))
        except Refused as refused:
            if refused.kind is Kind.NOT_FOUND:
                await svc.core.commit(*await released(svc, vm_id))


@part.every(300.0)
async def settle_begun(svc: Storage) -> None:
    """What a fact should have said long ago, of VMs that were told where their disks are: it was lost, or heard by a former
    release, or inventory was restored and doesn't know that epoch."""
    begun = await svc.store.begun_disks()
    noted = [(vm_id, epoch) for row in begun for vm_id, epoch in row.private.begun.items()]
    vms = await svc.store.vms({vm_id for vm_id, _ in noted})
    for vm_id in sorted({v for v, epoch in noted if v not in vms or vms[v].epoch < epoch}):
        try:
            vm = await svc.core.bus.ask(GET_VM, GetById(id=vm_id))
        except Refused as refused:
            if refused.kind is not Kind.NOT_FOUND:
                continue
            await _forget_undone(svc, begun, {}, {vm_id})
            continue
        await svc.core.commit(svc.store.catch_up(vm))
        await _forget_undone(svc, begun, {vm_id: vm.epoch}, {vm_id})


async def list_again(svc: Storage, stream: str) -> None:
    """Facts were lost for good: take inventory's lists as the truth."""
    begun = await svc.store.begun_disks()
    hosts = await _all(svc, LIST_HOSTS, Host)
    vms = await _all(svc, LIST_VMS, Vm)
    centers = await _all(svc, LIST_DATA_CENTERS, DataCenter)
    await svc.core.commit(
        *(svc.store.know_host(host) for host in hosts),
        svc.store.forget_all_but("host", [host.id for host in hosts]),
        *(svc.store.know_data_center(center.id, center.name) for center in centers),
        svc.store.forget_all_but("data_center", [center.id for center in centers]),
    )
    for vm in vms:
        await svc.core.commit(svc.store.know_vms([vm]))
    vm_ids = [vm.id for vm in vms]
    await svc.core.commit(svc.store.forget_all_but("vm", vm_ids), svc.leases.doomed_but(vm_ids))
    for host in hosts:
        svc.core.wake(f"host:{host.id}")
    noted = {vm_id for row in begun for vm_id in row.private.begun}
    await _forget_undone(svc, begun, {vm.id: vm.epoch for vm in vms}, noted)


async def _forget_undone(
    svc: Storage, begun: Iterable[Row[Disk, DiskPrivate]], epochs: Mapping[str, int], vm_ids: Collection[str]
) -> None:
    """`begun`: disks as they were before inventory was asked for the epochs of these VMs. Inventory writes every epoch before
    it asks for disks with it. One that it doesn't know afterwards was given by a database that was since restored: no
    fact will ever say that it has ended."""
    for noted in begun:
        undone = {(v, e) for v, e in noted.private.begun.items() if v in vm_ids and epochs.get(v, 0) < e}

        def without(
            row: Row[Disk, DiskPrivate], undone: set[tuple[str, int]] = undone
        ) -> tuple[Disk, DiskPrivate]:
            left = {
                vm_id: epoch for vm_id, epoch in row.private.begun.items() if (vm_id, epoch) not in undone
            }
            return row.public, replace(row.private, begun=left)

        if undone:
            await svc.edit(DISKS, noted.id, without)


async def _all(svc: Storage, call: Call[ListQuery, Any], type_: type[Any]) -> list[Any]:
    return [one async for page in pages(svc.core.bus, call, type_) for one in page]
