"""Which silent hosts of a cluster are spared, as its administrator set it."""

from __future__ import annotations

import logging
from typing import Any

from services.ha.state import Ha
from services.ha.store import POLICIES
from volery.contracts.cluster import CLUSTER_DELETED, GET_CLUSTER, Cluster, GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.operation import ListQuery
from volery.contracts.power import (
    GET_FENCING_POLICY,
    LIST_FENCING_POLICIES,
    SET_FENCING_POLICY,
    FencingPolicy,
    SetFencingPolicy,
)
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Stale, Taken

log = logging.getLogger(__name__)

part = Part()


@part.answers(GET_FENCING_POLICY)
async def get_policy(ha: Ha, ask: GetById, caller: Caller) -> FencingPolicy:
    row = await POLICIES.find(ha.core.pool, ask.id)
    if row is not None:
        return row.public
    cluster = await _cluster(ha, ask.id)
    return FencingPolicy(
        id=cluster.id, revision=0, created_at=cluster.created_at, updated_at=cluster.created_at
    )


@part.answers(LIST_FENCING_POLICIES)
async def list_policies(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    return await page(ha.core.pool, POLICIES, ask)


@part.answers(SET_FENCING_POLICY)
async def set_policy(ha: Ha, ask: SetFencingPolicy, caller: Caller) -> FencingPolicy:
    checks.between(ask.connectivity_broken_percent, 1, 100, "connectivity_broken_percent", "%")
    cluster = await _cluster(ha, ask.id)
    while True:
        try:
            return await _set(ha, cluster, ask, caller)
        except (Stale, Taken):
            continue


async def _set(ha: Ha, cluster: Cluster, ask: SetFencingPolicy, caller: Caller) -> FencingPolicy:
    row, now = await POLICIES.find(ha.core.pool, ask.id), utc_now()
    made = FencingPolicy(
        id=ask.id,
        revision=1 if row is None else row.public.revision,
        created_at=now if row is None else row.public.created_at,
        updated_at=now,
        skip_while_lease_alive=ask.skip_while_lease_alive,
        skip_if_connectivity_broken=ask.skip_if_connectivity_broken,
        connectivity_broken_percent=ask.connectivity_broken_percent,
        skip_while_peers_answer=ask.skip_while_peers_answer,
    )
    if row is not None:
        checks.revision(row.public, ask.if_revision, "fencing policy")
    elif ask.if_revision:
        raise Refused(
            Kind.STALE,
            f"cluster {cluster.name} has no fencing policy of its own any more: get it again",
            revision=0,
        )
    change = POLICIES.insert(made, Nothing()) if row is None else POLICIES.update(row, made)
    await ha.core.commit(change, caller=caller, answer=change.document)
    log.info("the fencing policy of cluster %s was set by %s", cluster.name, caller.principal)
    found: FencingPolicy = change.document
    return found


async def _cluster(ha: Ha, cluster_id: str) -> Cluster:
    """Raises Refused(not_found) for one that inventory doesn't know."""
    return await ha.core.bus.ask(GET_CLUSTER, GetById(id=checks.object_id(cluster_id, "cluster")))


@part.hears(CLUSTER_DELETED)
async def cluster_deleted(ha: Ha, cluster: Cluster) -> list[Change]:
    row = await POLICIES.find(ha.core.pool, cluster.id)
    return [] if row is None else [POLICIES.delete(row)]


async def forget_what_has_no_cluster(ha: Ha) -> None:
    """After facts were lost: clusters may have been deleted meanwhile."""
    for row in await POLICIES.where(ha.core.pool):
        try:
            await _cluster(ha, row.id)
        except Refused as refused:
            if refused.kind is not Kind.NOT_FOUND:
                raise
            await ha.core.commit(POLICIES.delete(row))
