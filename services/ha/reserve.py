"""Reserved capacity: whether clusters that ask for it have room for the VMs of hosts that die. Told, never enforced."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from services.ha.policies.reserve import HostRoom, Standing, missing, sentences
from services.ha.state import Ha
from services.ha.store import RESERVES
from volery.contracts.cluster import LIST_CLUSTERS, Cluster, GetById
from volery.contracts.errors import Refused
from volery.contracts.operation import ListQuery
from volery.contracts.protection import GET_RESERVE, LIST_RESERVES, ClusterReserve
from volery.contracts.scheduling import LIST_CAPACITY, HostCapacity
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.listing import pages
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Row, Stale

log = logging.getLogger(__name__)

part = Part()


async def judge(ha: Ha, vms: Sequence[Standing]) -> None:
    """All clusters, from all highly available VMs. What can't be asked now is judged with the next look."""
    bus = ha.core.bus
    try:
        clusters = [c async for some in pages(bus, LIST_CLUSTERS, Cluster) for c in some]
        wanting = {c.id: c for c in clusters if c.reserve_host_failures}
        capacity = (
            [h async for some in pages(bus, LIST_CAPACITY, HostCapacity) for h in some] if wanting else []
        )
    except Refused as refused:
        log.info("reserves are judged later: %s", refused.message)
        return
    rows = {row.id: row for row in await RESERVES.where(ha.core.pool)}
    changes = [RESERVES.delete(rows[cluster_id]) for cluster_id in sorted(rows.keys() - wanting.keys())]
    for cluster in wanting.values():
        ours = [vm for vm in vms if vm.cluster_id == cluster.id]
        if any(vm.memory_bytes is None for vm in ours):
            continue  # Something moves: what it takes is counted twice, or not at all.
        hosts = [_room(h) for h in capacity if h.cluster_id == cluster.id and h.schedulable]
        if (change := _change(cluster, hosts, ours, rows.get(cluster.id))) is not None:
            changes.append(change)
    for change in changes:
        try:
            await ha.core.commit(change)
        except Stale:
            continue
        if not change.document.kept:
            log.warning("%s", change.document.message)


def _room(host: HostCapacity) -> HostRoom:
    return HostRoom(
        id=host.host_id,
        name=host.name,
        memory_bytes=host.memory_bytes - host.memory_used_bytes,
        vcpus=host.vcpus_limit - host.vcpus_used,
    )


def _change(
    cluster: Cluster,
    hosts: Sequence[HostRoom],
    vms: Sequence[Standing],
    row: Row[ClusterReserve, Nothing] | None,
) -> Change | None:
    """What is to be written; None when it is written already."""
    found, now = missing(hosts, vms, cluster.reserve_host_failures), utc_now()
    message, change = (
        ("", "") if found is None else sentences(cluster.name, cluster.reserve_host_failures, found)
    )
    old = row.public if row is not None else ClusterReserve(
        id=cluster.id, revision=1, created_at=now, updated_at=now, cluster_id=cluster.id
    )  # fmt: skip
    new = replace(
        old,
        cluster_name=cluster.name,
        host_failures=cluster.reserve_host_failures,
        kept=found is None,
        message=message,
        change=change,
    )
    if row is None:
        return RESERVES.insert(new, Nothing())
    return RESERVES.update(row, new) if new != old else None


@part.answers(GET_RESERVE)
async def get_reserve(ha: Ha, ask: GetById, caller: Caller) -> Any:
    return await RESERVES.raw(ha.core.pool, ask.id)


@part.answers(LIST_RESERVES)
async def list_reserves(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    return await page(ha.core.pool, RESERVES, ask)
