"""What other owners say: their facts, and their lists when facts were missed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from services.scheduler import cell_claims, device_claims, promise_store, saving_store, store
from services.scheduler.cells import cells_of
from services.scheduler.looks import Looks
from services.scheduler.model import ClusterPolicy, Looked, limits
from services.scheduler.pages import pages_of
from services.scheduler.scheduling_policies import keep_built_in
from services.scheduler.state import Scheduler
from volery.contracts.base import Call, Entity, Owner
from volery.contracts.cluster import CLUSTER_CHANGED, CLUSTER_DELETED, LIST_CLUSTERS, Cluster
from volery.contracts.errors import Refused
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, LIST_HOSTS, Host
from volery.contracts.network import LIST_NETWORKS, NETWORK_CHANGED, NETWORK_DELETED, Network
from volery.contracts.operation import ListQuery, Page
from volery.contracts.vm import LIST_VMS, VM_CHANGED, VM_DELETED, Vm
from volery.runtime.hear_owners import Said, newest
from volery.runtime.listing import pages
from volery.runtime.relay import stream_name
from volery.runtime.service import Part
from volery.runtime.tables import Change, commit

log = logging.getLogger(__name__)

part = Part()

LIST_SECONDS = 2.0


@part.hears_together(HOST_CHANGED)
async def hosts_said(scheduler: Scheduler, said: Sequence[Said]) -> list[Change]:
    hosts: list[Host] = newest(said)
    clusters = await store.clusters(
        scheduler.core.pool, "id = any($1::text[])", sorted({host.cluster_id for host in hosts})
    )
    policies = {cluster.id: cluster for cluster in clusters}
    changes = [change for host in hosts for change in _saw(scheduler, host, policies.get(host.cluster_id))]
    return [*changes, device_claims.saw_devices(hosts)]


def _saw(scheduler: Scheduler, host: Host, policy: ClusterPolicy | None) -> list[Change]:
    pages = pages_of(host.capabilities.numa)
    memory = max(host.capabilities.memory_bytes - pages.memory_bytes, 0)
    policy = policy or ClusterPolicy(host.cluster_id)
    allowed = limits(memory, host.capabilities.cpus, policy, scheduler.config)
    cells = cells_of(host.capabilities)
    return [
        store.saw_host(host, memory, pages, allowed),
        *cell_claims.saw_cells(host.id, host.revision, cells),
        *saving_store.saw(host),
    ]


async def host_listed(scheduler: Scheduler, host: Host) -> list[Change]:
    found = await store.clusters(scheduler.core.pool, "id = $1", host.cluster_id)
    return [*_saw(scheduler, host, found[0] if found else None), device_claims.saw_devices([host])]


@part.hears(HOST_DELETED)
async def host_deleted(scheduler: Scheduler, host: Host) -> list[Change]:
    return [store.host_gone(host.id)]


@part.hears(CLUSTER_CHANGED)
async def cluster_changed(scheduler: Scheduler, cluster: Cluster) -> list[Change]:
    """Its over-commit is part of every limit of its hosts."""
    policy = ClusterPolicy(
        cluster.id,
        memory_overcommit_percent=cluster.memory_overcommit_percent,
        cpu_overcommit_ratio=cluster.cpu_overcommit_ratio,
    )
    hosts = await store.hosts_of(scheduler.core.pool, cluster.id)
    new = {h.id: limits(h.memory_bytes, h.cpus, policy, scheduler.config) for h in hosts}
    done = await promise_store.done_as(scheduler.core.pool, cluster)
    heard = promise_store.heard_of_cluster(cluster.id, done)
    return [store.saw_cluster(cluster), store.set_limits(new), *heard]


@part.hears(CLUSTER_DELETED)
async def cluster_deleted(scheduler: Scheduler, cluster: Cluster) -> list[Change]:
    return [store.cluster_gone(cluster.id)]


@part.hears(NETWORK_CHANGED)
async def network_changed(scheduler: Scheduler, network: Network) -> list[Change]:
    return [store.saw_network(network)]


@part.hears(NETWORK_DELETED)
async def network_deleted(scheduler: Scheduler, network: Network) -> list[Change]:
    return [store.network_gone(network.id)]


@part.hears_together(VM_CHANGED, VM_DELETED)
async def vms_said(scheduler: Scheduler, said: Sequence[Said]) -> list[Change]:
    deleted = {vm.id for fact, vm in said if fact is VM_DELETED}
    for _, vm in said:
        if vm.id in scheduler.moving:
            scheduler.moving[vm.id].set()
    return [store.saw_vms(newest(said), deleted)]


async def vm_listed(scheduler: Scheduler, vm: Vm) -> list[Change]:
    return [store.saw_vms([vm])]


@dataclass(frozen=True, slots=True)
class Listing:
    """How an owner's noun is listed again."""

    owner: Owner
    call: Call[ListQuery, Page]
    table: str
    type: type[Entity]
    take: Callable[[Scheduler, Any], Awaitable[list[Change]]]


LISTINGS: tuple[Listing, ...] = (
    # Clusters before hosts: a host's limits are its cluster's over-commit.
    Listing(Owner.INVENTORY, LIST_CLUSTERS, "cluster", Cluster, cluster_changed),
    Listing(Owner.INVENTORY, LIST_HOSTS, "host_capacity", Host, host_listed),
    Listing(Owner.INVENTORY, LIST_VMS, "vm", Vm, vm_listed),
    Listing(Owner.NETWORK, LIST_NETWORKS, "network", Network, network_changed),
)


async def list_again(scheduler: Scheduler, owner: Owner) -> None:
    """Everything of an owner that the fleet is made of. Raises Refused when the owner doesn't answer."""
    for listing in LISTINGS:
        if listing.owner is owner:
            before = await store.known(scheduler.core.pool, listing.table)
            listed = await _take_list(scheduler, listing)
            await commit(scheduler.core.pool, [store.gone(listing.table, sorted(before - listed))])
    scheduler.listed.add(stream_name(owner))
    log.info("listed %s again", owner)


async def _take_list(scheduler: Scheduler, listing: Listing) -> set[str]:
    ids: set[str] = set()
    async for entities in pages(scheduler.core.bus, listing.call, listing.type):
        changes = [change for entity in entities for change in await listing.take(scheduler, entity)]
        await commit(scheduler.core.pool, changes)
        ids |= {entity.id for entity in entities}
    return ids


async def facts_were_lost(scheduler: Scheduler, stream: str) -> None:
    """Have the owner listed as soon as it answers."""
    scheduler.listed.discard(stream)


async def leadership_begins(scheduler: Scheduler) -> None:
    await keep_built_in(scheduler)
    scheduler.listed.clear()
    scheduler.looked = Looked()
    scheduler.looks = Looks()


@part.every(LIST_SECONDS)
async def list_what_was_missed(scheduler: Scheduler) -> None:
    """Once per leadership and after each loss: a fleet rebuilt from facts alone trusts that none was trimmed."""
    for owner in (Owner.INVENTORY, Owner.NETWORK):
        if stream_name(owner) not in scheduler.listed:
            try:
                await list_again(scheduler, owner)
            except Refused as refused:
                log.info("%s can't be listed yet: %s", owner, refused.message)
