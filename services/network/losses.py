"""Which hosts have lost a required network that others of their cluster still have."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

from msgspec.structs import replace

from services.network import model
from services.network.fabric import Fabric
from services.network.store import NETWORKS, HostRow
from volery.contracts.network import Network
from volery.runtime.clock import monotonic
from volery.runtime.losses import Losses, Patience
from volery.runtime.service import Part
from volery.runtime.tables import Nothing, Row

log = logging.getLogger(__name__)

part = Part()


@part.every(1.0)
async def decide(svc: Fabric) -> None:
    rows = await svc.store.networks_to_miss()
    for network_id in svc.losses.keys() - {row.id for row in rows}:
        del svc.losses[network_id]
    if not rows:
        return
    hosts, states = await svc.store.hosts(), await svc.store.states()
    for row in rows:
        has, lacks = model.standing(row.public, hosts, states)
        losses = svc.losses.setdefault(row.id, Losses())
        decided = partial(_decided, svc, losses, has, lacks, hosts)
        if (now := decided(row)) is not None:
            log.warning(
                "hosts that have lost network %s: %s", row.public.name, now[0].lost or "none any more"
            )
            await svc.edit(NETWORKS, row.id, decided)


def _decided(
    svc: Fabric,
    losses: Losses,
    has: frozenset[str],
    lacks: Mapping[str, str],
    hosts: list[HostRow],
    row: Row[Network, Nothing],
) -> tuple[Network, Nothing] | None:
    network = row.public
    groups = {host.id: host.cluster_id for host in hosts}
    patience = Patience(svc.config.lost_after_seconds, svc.config.back_after_seconds)
    lost = losses.decide(monotonic(), patience, network.lost, has, lacks, groups) if network.required else {}
    if lost == network.lost:
        return None
    return replace(network, lost=lost), row.private
