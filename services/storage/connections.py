"""Which hosts reach a storage domain, and what they see there: orders to connect, and reports taken as truth."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from msgspec.structs import replace

from services.storage import chain_model, domain_model, lease_model, lockspaces, lun_model, luns
from services.storage.storage import Storage
from services.storage.store import (
    DISKS,
    DOMAINS,
    DiskPrivate,
    DomainPrivate,
    HostLuns,
    HostRow,
    Leftover,
    Member,
)
from volery.contracts.agent import STORAGE_REPORTED, StorageDomainReport, StorageReported
from volery.contracts.errors import Refused
from volery.contracts.storage import Disk, DiskStatus, DomainStatus, StorageDomain
from volery.contracts.volume_orders import (
    CONNECT_STORAGE,
    DISCONNECT_STORAGE,
    ConnectStorage,
    DirectoryLocation,
    DisconnectStorage,
)
from volery.runtime.clock import monotonic
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

log = logging.getLogger(__name__)

UNHEARD_SECONDS = 15.0
"""How often a host is asked that has not said anything yet: it begins with a report, which may wait for its turn."""
AT_ONCE = 32
"""Hosts that one domain is connected on at the same time."""

part = Part()


async def look(
    svc: Storage, domain_id: str, host_id: str, *, initialise: bool = False
) -> StorageDomainReport:
    """Have a host connect the domain and say what is there now. Raises Refused with the host's sentence."""
    row = await svc.domain(domain_id)
    disks = [disk.public for disk in await svc.store.disks_of(domain_id)]
    chains = await svc.chains_in(domain_id, disks)
    question = ConnectStorage(
        domain_id=domain_id,
        location=svc.location(row),
        initialise=initialise,
        known=domain_model.known_paths(row.public, chain_model.known(row.public, disks, chains)),
    )
    return await svc.core.orders.carry_out(
        CONNECT_STORAGE,
        question,
        host_id=host_id,
        object_id=domain_id,
        timeout_seconds=svc.config.connect_seconds,
    )


async def connect(svc: Storage, domain_id: str, host_ids: Iterable[str]) -> None:
    """Connect the domain on these hosts and record what came of it; being unable to is an answer, too.

    What several hosts said meanwhile is written at once: a thousand hosts make a few revisions, not a thousand.
    """
    before = await svc.store.disks_of(domain_id)
    gate = asyncio.Semaphore(AT_ONCE)
    pending = {asyncio.create_task(_looked(svc, gate, domain_id, host_id)) for host_id in host_ids}
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            said = dict(task.result() for task in done)
            await record(svc, domain_id, said)
            for report in said.values():
                if report.reachable:
                    await _lose(svc, domain_id, before, report)
    finally:
        for task in pending:
            task.cancel()


async def _looked(
    svc: Storage, gate: asyncio.Semaphore, domain_id: str, host_id: str
) -> tuple[str, StorageDomainReport]:
    async with gate:
        try:
            report = await look(svc, domain_id, host_id)
        except Refused as refused:
            svc.tried[domain_id, host_id] = monotonic()
            return host_id, StorageDomainReport(domain_id=domain_id, reachable=False, problem=refused.message)
    svc.tried.pop((domain_id, host_id), None)
    return host_id, report


async def connect_everywhere(svc: Storage, domain_id: str, *, again: bool = False) -> None:
    """Connect on every host that should have the domain and doesn't; `again` looks at all of them afresh.

    Raises Refused(unavailable) when no host reaches it afterwards.
    """
    row = await svc.domain(domain_id)
    wanted = domain_model.wanted_hosts(row.public, row.private.maintenance, await svc.store.hosts())
    await connect(svc, domain_id, [h for h in wanted if again or h not in row.public.host_ids])
    domain = (await svc.domain(domain_id)).public
    if not domain.host_ids:
        raise domain_model.unreached(domain)


async def disconnect(svc: Storage, domain_id: str, host_ids: Sequence[str], *, remove: str = "") -> list[str]:
    """Have hosts forget the domain; what one of them couldn't do is returned, and does no harm. `remove` is the path
    of a directory domain whose own directory goes, too, if nothing is in it."""
    problems: list[str] = []

    async def one(host_id: str) -> None:
        try:
            await svc.core.orders.carry_out(
                DISCONNECT_STORAGE,
                DisconnectStorage(domain_id=domain_id, remove=bool(remove), path=remove),
                host_id=host_id,
                object_id=domain_id,
                timeout_seconds=svc.config.discard_seconds,
            )
        except Refused as refused:
            log.info("storage domain %s stays connected on %s: %s", domain_id, host_id, refused.message)
            problems.append(refused.message)

    await asyncio.gather(*(one(host_id) for host_id in host_ids))
    return problems


async def clean(svc: Storage, left: Leftover, host_id: str) -> None:
    """Have a host remove a deleted domain's own directory, unless something is in it. Raises Refused."""
    order = partial(
        svc.core.orders.carry_out,
        host_id=host_id,
        object_id=left.domain_id,
        timeout_seconds=svc.config.connect_seconds,
    )
    where = DirectoryLocation(path=left.path)
    await order(CONNECT_STORAGE, ConnectStorage(domain_id=left.domain_id, location=where))
    gone = DisconnectStorage(domain_id=left.domain_id, remove=True, path=left.path)
    await order(DISCONNECT_STORAGE, gone)


async def record(svc: Storage, domain_id: str, said: Mapping[str, StorageDomainReport]) -> None:
    """Write what hosts said just now."""
    while True:
        row = await DOMAINS.find(svc.core.pool, domain_id)
        if row is None:
            return
        try:
            await svc.core.commit(*await _changes(svc, row, said, await luns.seen(svc, row.public)))
        except Stale:
            continue
        return


async def _changes(
    svc: Storage,
    row: Row[StorageDomain, DomainPrivate],
    said: Mapping[str, StorageDomainReport],
    about: lun_model.Seen,
    members: Mapping[str, Member] | None = None,
) -> list[Change]:
    """`members`: the lockspaces of the host whose own report this is; an answer to an order says nothing of them."""
    disks = await svc.store.disks_of(row.id)
    idle = {disk.id: disk for disk in disks if not disk.public.busy_with}
    all_disks = [disk.public for disk in disks]
    public = row.public
    withheld = lun_model.withheld(public, row.private.stained, about, all_disks)
    chains = await svc.chains_in(row.id, all_disks)
    known = chain_model.known(public, all_disks, chains)
    seen: dict[str, Disk] = {}
    for host_id, report in said.items():
        public = domain_model.with_report(public, host_id, report, all_disks, withheld, known)
        if members is not None:
            public = lease_model.with_lockspace(public, host_id, report, members.get(row.id))
        if report.reachable:
            seen |= {
                disk.id: new for disk, new in chain_model.seen(row.public, idle.values(), chains, report)
            }
    activating = bool(public.busy_with) and public.status is DomainStatus.ACTIVATING
    public = domain_model.with_status(public, row.private.maintenance, activating=activating)
    changes = [DOMAINS.update(row, public)] if public != row.public else []
    return [*changes, *(DISKS.update(idle[disk_id], new) for disk_id, new in seen.items())]


async def changes(
    svc: Storage, row: Row[StorageDomain, DomainPrivate], said: Mapping[str, StorageDomainReport]
) -> list[Change]:
    """What follows from what hosts said of this domain."""
    return await _changes(svc, row, said, await luns.seen(svc, row.public))


async def _lose(
    svc: Storage, domain_id: str, before: Sequence[Row[Disk, DiskPrivate]], report: StorageDomainReport
) -> None:
    """Mark the disks missing that were whole before the host looked, and that it didn't find; and those illegal whose files
    it found otherwise than they should be."""
    row = await DOMAINS.find(svc.core.pool, domain_id)
    if row is None:
        return
    chains = await svc.chains_in(domain_id, [disk.public for disk in before])
    absent = chain_model.absent(row.public, before, chains, report)
    gone = {disk.id for disk in absent}
    there = [disk for disk in before if disk.id not in gone]
    worse = [(disk, replace(disk.public, status=DiskStatus.MISSING)) for disk in absent]
    for disk, new in [*worse, *chain_model.broken(row.public, there, chains, report)]:
        try:
            await svc.core.commit(DISKS.update(disk, new))
        except Stale:  # it was changed or deleted meanwhile: the next look decides
            continue


@part.hears_hosts_together(STORAGE_REPORTED)
async def reported(svc: Storage, said: Sequence[StorageReported]) -> list[Change]:
    """Hosts' own reports. One may be older than the last order, so what it doesn't show is looked at again."""
    mine = {fact.host_id: HostLuns(fact.host_id, fact.open_luns, fact.lun_claims) for fact in said}
    changes = await _opened(svc, mine)
    hosts = await svc.store.hosts_with(list(mine))
    domains = await svc.store.domains_by_host(hosts.values())
    for fact in said:
        if fact.host_id in domains:
            host = hosts[fact.host_id]
            changes += await _reported(svc, fact, host, mine[host.id], domains[host.id])
    return changes


async def _reported(
    svc: Storage,
    fact: StorageReported,
    host: HostRow,
    mine: HostLuns,
    domains: Sequence[Row[StorageDomain, DomainPrivate]],
) -> list[Change]:
    """Of a host with these domains."""
    changes: list[Change] = []
    said = {report.domain_id: report for report in fact.domains}
    members = await svc.leases.memberships(host.id)
    for row in domains:
        report = said.get(row.id)
        if report is not None:
            changes += lockspaces.reported(svc, fact, report, members.get(row.id))
        kept = domain_model.kept_hosts(row.public, row.private.maintenance, [host])
        if host.id not in kept or row.public.busy_with:
            continue
        if report is None:
            svc.core.wake(f"check:{row.id}:{host.id}")
            continue
        changes += await _changes(
            svc, row, {host.id: report}, (await luns.seen(svc, row.public)).with_host(mine), members
        )
        if lockspaces.wakes(row, host, report, members):
            svc.core.wake(lockspaces.key_of(row.id, host.id))
        if report.reachable and await _is_worse(svc, row.public, report):
            svc.core.wake(f"check:{row.id}:{host.id}")
    return changes


async def _is_worse(svc: Storage, domain: StorageDomain, report: StorageDomainReport) -> bool:
    """Whether a disk isn't there as it should be."""
    disks = await svc.store.disks_of(domain.id)
    chains = await svc.chains_in(domain.id, [disk.public for disk in disks])
    return bool(
        chain_model.absent(domain, disks, chains, report) or chain_model.broken(domain, disks, chains, report)
    )


async def _opened(svc: Storage, mine: Mapping[str, HostLuns]) -> list[Change]:
    """What hosts have open counts whether inventory knows them or not: a restored database may have forgotten one."""
    before = await svc.store.luns_of(list(mine))
    keep = svc.store.keep_luns(list(mine.values()))
    touched: set[str] = set()
    for host_id, now in mine.items():
        former = before.get(host_id) or HostLuns(host_id, ())
        if (former.luns, former.claims) != (now.luns, now.claims):
            touched |= {one.iqn for host in (former, now) for s in (host.luns, host.claims) for one in s}
    if not touched:
        return [keep]
    return [
        svc.then_wake(keep, *(f"domain:{domain_id}" for domain_id in await svc.store.domains_on(touched)))
    ]


@part.every(5.0)
async def ask_for_reports(svc: Storage) -> None:
    """Every host says now and then what is on its storage, spread over the time between. One that beats and that
    inventory doesn't have is asked as well: it may have VMs that a restored database has forgotten."""
    hosts = {h.id for h in await svc.store.hosts() if h.status in domain_model.STAYS_CONNECTED}
    now = monotonic()
    for host_id in sorted(hosts | set(svc.core.beats.newest)):
        heard = host_id in svc.core.hosts.positions  # no order can be given before its first report
        pause = svc.config.report_seconds if heard else min(UNHEARD_SECONDS, svc.config.report_seconds)
        if now - svc.asked.get(host_id, float("-inf")) >= pause:
            svc.asked[host_id] = now
            await svc.core.hosts.ask_report(host_id)
