"""Makes the hosts' connections and the disks' volumes what they should be; right also after missing every event."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from services.storage import (
    connections,
    dead_leases,
    disk_work,
    domain_model,
    lease_model,
    lockspaces,
    lun_model,
    luns,
    vm_leases,
    volume_work,
)
from services.storage.storage import Storage
from services.storage.store import DISKS, DOMAINS, DomainPrivate, HostRow
from volery.contracts.errors import Kind, Refused
from volery.contracts.operation import ENDED
from volery.contracts.storage import StorageDomain
from volery.runtime.clock import monotonic
from volery.runtime.tables import Row

log = logging.getLogger(__name__)


async def reconcile(svc: Storage, key: str) -> None:
    """Keys: `domain:{id}`, `check:{domain}:{host}`, `host:{id}`, `disk:{id}`, `leftover:{domain}`,
    `lockspace:{domain}:{host}`, `lease:{domain}:{vm}`."""
    kind, _, rest = key.partition(":")
    await _KINDS[kind](svc, rest)


async def reconcile_all(svc: Storage) -> Sequence[str]:
    return [
        *(f"domain:{domain_id}" for domain_id in await svc.store.attached_domain_ids()),
        *(f"disk:{disk_id}" for disk_id in await _disks(svc)),
        *(f"leftover:{left.domain_id}" for left in await svc.store.leftovers()),
        *(lockspaces.key_of(one.domain_id, one.host_id) for one in await svc.leases.dead()),
        *(f"lease:{lease.domain_id}:{lease.vm_id}" for lease in await svc.leases.doomed_leases()),
    ]


async def _domain(svc: Storage, domain_id: str) -> None:
    """Forget what hosts said whose word no longer counts, and connect those that should have it."""
    row = await DOMAINS.find(svc.core.pool, domain_id)
    if row is None or row.public.busy_with:
        return
    hosts = await svc.store.hosts()
    disks = [disk.public for disk in await svc.store.disks_of(domain_id)]
    seen = await luns.seen(svc, row.public)

    def settled(
        row: Row[StorageDomain, DomainPrivate],
    ) -> tuple[StorageDomain, DomainPrivate] | None:
        if row.public.busy_with:
            return None
        kept = domain_model.kept_hosts(row.public, row.private.maintenance, hosts)
        withheld = lun_model.withheld(row.public, row.private.stained, seen, disks)
        public = domain_model.with_disks(domain_model.only_hosts(row.public, kept), disks, withheld)
        public = lease_model.only_wanted(public, row.private.maintenance, hosts)
        return domain_model.with_status(public, row.private.maintenance), row.private

    await svc.edit(DOMAINS, domain_id, settled)
    row = await DOMAINS.find(svc.core.pool, domain_id)
    if row is None or row.public.busy_with:
        return
    wanted = domain_model.wanted_hosts(row.public, row.private.maintenance, hosts)
    now = monotonic()
    due = [
        host_id
        for host_id in wanted
        if host_id not in row.public.host_ids
        and now - svc.tried.get((domain_id, host_id), -1e9) >= svc.config.again_seconds
    ]
    for key in await lockspaces.due(svc, row, hosts):
        svc.core.wake(key)
    if due:
        await connections.connect(svc, domain_id, due)


async def _check(svc: Storage, rest: str) -> None:
    """A report and our picture differ: look now, since the report may be older."""
    domain_id, host_id = rest.split(":")
    row = await DOMAINS.find(svc.core.pool, domain_id)
    host = await svc.store.host(host_id)
    if row is None or host is None or row.public.busy_with:
        return
    if host_id in domain_model.wanted_hosts(row.public, row.private.maintenance, [host]):
        await connections.connect(svc, domain_id, [host_id])


async def _host(svc: Storage, host_id: str) -> None:
    """A host's status or data center changed: its word counts again or no more."""
    for failures in (svc.tried, svc.joining_failed):
        for failed in [failed for failed in failures if failed[1] == host_id]:
            failures.pop(failed, None)
    host = await svc.store.host(host_id) or HostRow(host_id, "", "", "", "")
    for row in await svc.store.domains_of(host):
        svc.core.wake(f"domain:{row.id}")
    for lockspace_id in await svc.leases.memberships(host_id):
        svc.core.wake(lockspaces.key_of(lockspace_id, host_id))
    for disk_id in await _disks(svc):
        svc.core.wake(f"disk:{disk_id}")
    for left in await svc.store.leftovers():
        svc.core.wake(f"leftover:{left.domain_id}")


async def _disks(svc: Storage) -> set[str]:
    """Those with which something is to be done, perhaps."""
    return {
        *await svc.store.unsettled_disks(),
        *await svc.volumes.leaving(),
        *await svc.volumes.undescribed(),
    }


async def _disk(svc: Storage, disk_id: str) -> None:
    """Remove what a failed operation left, as soon as its host can."""
    row = await DISKS.find(svc.core.pool, disk_id)
    if row is None or svc.core.quarantine.holds:
        return
    await volume_work.describe(svc, row.public)
    if await _held(svc, row.public.busy_with):
        return
    if not row.private.doomed:
        await volume_work.clean_up(svc, disk_id, svc.config.connect_seconds)
        return
    try:
        await disk_work.remove_volume(svc, row, svc.config.connect_seconds)
    except Refused as refused:
        log.info("disk %s still can't be removed: %s", disk_id, refused.message)
        return
    await disk_work.drop(svc, disk_id)


async def _held(svc: Storage, operation_id: str) -> bool:
    """Whether an operation still works on its object."""
    if not operation_id:
        return False
    row = await svc.core.operations.table.find(svc.core.pool, operation_id)
    return row is not None and (row.public.state not in ENDED or row.public.outcome_pending)


async def _leftover(svc: Storage, domain_id: str) -> None:
    """Have a host remove the directory of a deleted domain, if nothing else is in it. Found nowhere, it is gone."""
    left = next((one for one in await svc.store.leftovers() if one.domain_id == domain_id), None)
    if left is None or svc.core.quarantine.holds:
        return
    nowhere = True
    for host in await svc.store.hosts():
        if left.host_id not in ("", host.id):
            continue
        if host.status not in domain_model.CAN_CONNECT:
            nowhere = False
            continue
        try:
            await connections.clean(svc, left, host.id)
        except Refused as refused:
            nowhere = nowhere and refused.kind is Kind.NOT_FOUND
            continue
        nowhere = True
        break
    if nowhere:
        await svc.core.commit(svc.store.cleaned(domain_id))


_KINDS = {
    "domain": _domain,
    "check": _check,
    "host": _host,
    "disk": _disk,
    "leftover": _leftover,
    "lockspace": dead_leases.settle,
    "lease": vm_leases.remove,
}
