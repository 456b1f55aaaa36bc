"""The lease of a volume: every program that writes it holds it, on whichever host, so that two never write at once.

Only on storage domains that hold leases, and by hosts that have joined their lockspace: other hosts' programs have
the volume's lock on their own host, and that an operation goes to one host only, and to another once that is proven dead.
"""

from __future__ import annotations

from collections.abc import Collection

from services.storage import dead_leases, domain_model, lease_model
from services.storage.storage import Storage
from services.storage.store import DomainPrivate
from volery.contracts.domain import DomainLease
from volery.contracts.storage import StorageDomain
from volery.runtime.tables import Change, Row


def chosen_host(domain: StorageDomain, able: Collection[str], disk_id: str) -> str:
    """One of these hosts to write the volume, one that can hold its lease before others. "" when there is none."""
    joined = set(able) & set(domain.lease_host_ids)
    return domain_model.choose_host(joined or able, disk_id)


async def lease_for(
    svc: Storage, row: Row[StorageDomain, DomainPrivate], disk_id: str, host_id: str
) -> DomainLease | None:
    """What this host's programs must hold to write the volume. What a dead host held of it is free by then, or that was
    tried."""
    domain = row.public
    if host_id not in domain.lease_host_ids:
        return None
    await svc.core.commit(svc.leases.has_lease(domain.id, disk_id, of_disk=True))
    await dead_leases.freed(svc, domain.id, svc.config.free_lease_seconds)
    return lease_model.lease_of(domain, disk_id)


def gone(svc: Storage, domain_id: str, disk_id: str) -> Change:
    """The disk has ended: its lease is removed by whoever can."""
    return svc.then_wake(svc.leases.doomed(disk_id), f"lease:{domain_id}:{disk_id}")
