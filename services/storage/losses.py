"""Which hosts have lost a storage domain that others of their cluster still have: what their agents' checks come to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from services.storage import connections, domain_model
from services.storage.storage import Storage
from services.storage.store import DOMAINS, DomainPrivate
from volery.contracts.agent import STORAGE_CHECKED, StorageChecked, StorageDomainReport
from volery.contracts.storage import StorageDomain
from volery.runtime.clock import monotonic
from volery.runtime.losses import Losses, Patience
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row

log = logging.getLogger(__name__)

part = Part()


@part.hears_hosts(STORAGE_CHECKED)
async def checked(svc: Storage, fact: StorageChecked) -> Sequence[Change]:
    """A host that can't read a domain doesn't reach it. That it can again is looked at: only a look says what is there."""
    host = await svc.store.host(fact.host_id)
    row = await DOMAINS.find(svc.core.pool, fact.domain_id)
    if host is None or row is None or row.public.busy_with:
        return ()
    if host.id not in domain_model.kept_hosts(row.public, row.private.maintenance, [host]):
        return ()
    if fact.readable:
        svc.core.wake(f"check:{row.id}:{host.id}")
        return ()
    said = StorageDomainReport(domain_id=row.id, reachable=False, problem=fact.problem)
    return await connections.changes(svc, row, {host.id: said})


@part.every(1.0)
async def decide(svc: Storage) -> None:
    rows = await svc.store.incomplete_domains()
    for domain_id in svc.losses.keys() - {row.id for row in rows}:
        del svc.losses[domain_id]
    if not rows:
        return
    groups = {host.id: host.cluster_id for host in await svc.store.hosts()}
    for row in rows:
        decided = partial(_decided, svc, svc.losses.setdefault(row.id, Losses()), groups)
        if decided(row) is not None and (now := await svc.edit(DOMAINS, row.id, decided)) is not None:
            _say(row.public, now.public)


def _decided(
    svc: Storage, losses: Losses, groups: dict[str, str], row: Row[StorageDomain, DomainPrivate]
) -> tuple[StorageDomain, DomainPrivate] | None:
    domain = row.public
    patience = Patience(svc.config.lost_after_seconds, svc.config.back_after_seconds)
    lost = losses.decide(monotonic(), patience, domain.lost, domain.host_ids, domain.unreachable, groups)
    return None if lost == domain.lost else (replace(domain, lost=lost), row.private)


def _say(before: StorageDomain, now: StorageDomain) -> None:
    for host_id in sorted(now.lost.keys() - before.lost.keys()):
        log.warning("host %s has lost storage domain %s: %s", host_id, now.name, now.lost[host_id])
    for host_id in sorted(before.lost.keys() - now.lost.keys()):
        log.info("host %s has storage domain %s back, or is no longer to have it", host_id, now.name)
