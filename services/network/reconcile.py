"""Makes every host's networks what they should be, and shows where they are; right also after missing every event."""

from __future__ import annotations

from collections.abc import Sequence

from services.network import hosts, mac_pools
from services.network.fabric import Fabric
from services.network.store import ATTACHMENTS


async def reconcile(svc: Fabric, key: str) -> None:
    """Keys: `host:{id}`, `again:{host}`, `everybody:{data center}`, `network:{id}`, `shown:{data center}`, `pool:{id}`."""
    kind, _, object_id = key.partition(":")
    await _KINDS[kind](svc, object_id)


async def reconcile_all(svc: Fabric) -> Sequence[str]:
    for row in await svc.store.stray_attachments():
        await svc.core.commit(ATTACHMENTS.delete(row))
    return [
        *(f"host:{host_id}" for host_id in await hosts.unsettled(svc)),
        *(f"network:{network_id}" for network_id in await svc.store.network_ids()),
        *(f"pool:{pool_id}" for pool_id in await svc.store.pool_ids()),
    ]


async def _host(svc: Fabric, host_id: str) -> None:
    await hosts.reconcile_host(svc, host_id)


async def _again(svc: Fabric, host_id: str) -> None:
    await hosts.reconcile_host(svc, host_id, again=True)


async def _everybody(svc: Fabric, data_center_id: str) -> None:
    """A network, or a host that others tunnel to, changed."""
    for host in await svc.store.hosts_in(data_center_id):
        svc.core.wake(f"host:{host.id}")


async def _shown(svc: Fabric, data_center_id: str) -> None:
    for row in await svc.store.networks_in(data_center_id):
        svc.core.wake(f"network:{row.id}")


_KINDS = {
    "host": _host,
    "again": _again,
    "everybody": _everybody,
    "network": hosts.show,
    "shown": _shown,
    "pool": mac_pools.count,
}
