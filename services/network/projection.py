"""What network knows of inventory's nouns: data centers, clusters, hosts and VMs' names, as their facts say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from services.network.fabric import Fabric
from services.network.store import ATTACHMENTS, HostRow
from volery.contracts.base import Call
from volery.contracts.cluster import (
    CLUSTER_CHANGED,
    CLUSTER_DELETED,
    DATA_CENTER_CHANGED,
    DATA_CENTER_DELETED,
    LIST_CLUSTERS,
    LIST_DATA_CENTERS,
    Cluster,
    DataCenter,
    GetById,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, LIST_HOSTS, Host
from volery.contracts.network import NETWORK_CHANGED, NETWORK_DELETED, Network
from volery.contracts.operation import ListQuery
from volery.contracts.vm import GET_VM, LIST_VMS, VM_CHANGED, VM_DELETED, Vm
from volery.runtime.hear_owners import Said, newest
from volery.runtime.listing import pages
from volery.runtime.service import Part
from volery.runtime.tables import Change

part = Part()


@part.hears(DATA_CENTER_CHANGED)
async def data_center_changed(svc: Fabric, center: DataCenter) -> list[Change]:
    return [svc.store.know_name("data_center", center.id, center.name)]


@part.hears(DATA_CENTER_DELETED)
async def data_center_deleted(svc: Fabric, center: DataCenter) -> list[Change]:
    return [svc.store.forget("data_center", center.id)]


@part.hears(CLUSTER_CHANGED)
async def cluster_changed(svc: Fabric, cluster: Cluster) -> list[Change]:
    return [svc.store.know_cluster(cluster)]


@part.hears(CLUSTER_DELETED)
async def cluster_deleted(svc: Fabric, cluster: Cluster) -> list[Change]:
    return [svc.store.forget("cluster", cluster.id)]


@part.hears_together(HOST_CHANGED)
async def hosts_changed(svc: Fabric, said: Sequence[Said]) -> list[Change]:
    hosts: list[Host] = newest(said)
    known = await svc.store.hosts_with([host.id for host in hosts])
    return [change for host in hosts for change in _changed(svc, host, known.get(host.id))]


def _changed(svc: Fabric, host: Host, known: HostRow | None) -> list[Change]:
    """Only what its networks depend on makes anything to do: for itself, and for those that tunnel to it."""
    if known == _row(host):
        return []
    tunnels = known is None or (known.address, known.cluster_id, known.data_center_id) != (
        host.address,
        host.cluster_id,
        host.data_center_id,
    )
    key = f"everybody:{host.data_center_id}" if tunnels else f"host:{host.id}"
    return [svc.then_wake(svc.store.know_host(host), key, f"shown:{host.data_center_id}")]


def _row(host: Host) -> HostRow:
    return HostRow(
        host.id,
        host.name,
        host.data_center_id,
        host.cluster_id,
        str(host.status),
        host.address,
        host.capabilities.nics,
        host.boot_id,
    )


@part.hears(HOST_DELETED)
async def host_deleted(svc: Fabric, host: Host) -> list[Change]:
    """Its attachments go with it; the others stop tunnelling to it."""
    going = [ATTACHMENTS.delete(row) for row in await svc.store.attachments_of(host.id)]
    gone = svc.then_wake(
        svc.store.forget("host", host.id),
        f"everybody:{host.data_center_id}",
        f"shown:{host.data_center_id}",
    )
    return [gone, svc.store.forget("host_state", host.id), *going]


@part.hears_together(VM_CHANGED)
async def vms_changed(svc: Fabric, said: Sequence[Said]) -> list[Change]:
    vms: list[Vm] = newest(said)
    known = await svc.store.vm_names([vm.id for vm in vms])
    return [svc.store.know_name("vm", vm.id, vm.name) for vm in vms if known.get(vm.id) != vm.name]


@part.hears(VM_DELETED)
async def vm_deleted(svc: Fabric, vm: Vm) -> list[Change]:
    """A VM that is gone has no address."""
    pools = dict.fromkeys(nic.mac_pool_id for nic in await svc.store.nics_of(vm.id))
    return [
        svc.store.forget("vm", vm.id),
        svc.then_wake(svc.store.take_back_all(vm.id), *(f"pool:{pool_id}" for pool_id in pools)),
    ]


@part.hears(NETWORK_CHANGED)
async def network_changed(svc: Fabric, network: Network) -> list[Change]:
    """Our own fact: whichever replica wrote it, the leader hears of it here and has the hosts follow."""
    shape = msgspec.structs.replace(
        network,
        revision=0,
        updated_at=network.created_at,
        ready_host_ids=(),
        problems={},
        lost={},
        tags=(),
        description="",
    )
    if svc.shapes.get(network.id) != shape:
        svc.shapes[network.id] = shape
        svc.core.wake(f"everybody:{network.data_center_id}")
    return []


@part.hears(NETWORK_DELETED)
async def network_deleted(svc: Fabric, network: Network) -> list[Change]:
    svc.shapes.pop(network.id, None)
    svc.core.wake(f"everybody:{network.data_center_id}")
    return []


@part.every(300.0)
async def release_orphans(svc: Fabric) -> None:
    """Addresses of VMs that inventory doesn't have, whose deletion was never heard."""
    for vm_id in await svc.store.unknown_users():
        try:
            await svc.core.bus.ask(GET_VM, GetById(id=vm_id))
        except Refused as refused:
            if refused.kind is Kind.NOT_FOUND:
                await svc.core.commit(svc.store.take_back_all(vm_id))


async def list_again(svc: Fabric, stream: str) -> None:
    """Facts were lost for good: take inventory's lists as the truth."""
    if stream != "FACTS_INVENTORY":
        return
    hosts = await _all(svc, LIST_HOSTS, Host)
    clusters = await _all(svc, LIST_CLUSTERS, Cluster)
    centers = await _all(svc, LIST_DATA_CENTERS, DataCenter)
    vms = await _all(svc, LIST_VMS, Vm)
    await svc.core.commit(
        *(svc.store.know_host(host) for host in hosts),
        svc.store.forget_all_but("host", [host.id for host in hosts]),
        *(svc.store.know_cluster(cluster) for cluster in clusters),
        svc.store.forget_all_but("cluster", [cluster.id for cluster in clusters]),
        *(svc.store.know_name("data_center", center.id, center.name) for center in centers),
        svc.store.forget_all_but("data_center", [center.id for center in centers]),
    )
    for vm in vms:
        await svc.core.commit(svc.store.know_name("vm", vm.id, vm.name))
    await svc.core.commit(svc.store.forget_all_but("vm", [vm.id for vm in vms]))
    for center in centers:
        svc.core.wake(f"everybody:{center.id}")


async def _all(svc: Fabric, call: Call[ListQuery, Any], type_: type[Any]) -> list[Any]:
    return [one async for page in pages(svc.core.bus, call, type_) for one in page]
