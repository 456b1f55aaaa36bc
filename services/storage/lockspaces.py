"""Hosts join the lockspaces of storage domains with leases, again after each boot, and leave them. Joining takes
half a minute (3 io_timeouts), so it happens beside everything else, and shows on the domain."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from services.storage import lease_model
from services.storage.storage import Storage
from services.storage.store import DOMAINS, DomainPrivate, HostRow, Member
from volery.contracts.agent import StorageDomainReport, StorageReported
from volery.contracts.errors import Kind, Refused
from volery.contracts.leases import JOIN_LOCKSPACE, LEAVE_LOCKSPACE, LeaveLockspace
from volery.contracts.storage import StorageDomain
from volery.runtime.clock import monotonic
from volery.runtime.tables import Change, Row

log = logging.getLogger(__name__)


def object_of(domain_id: str) -> str:
    """What these orders are about: not the domain itself, whose orders need not wait for a join."""
    return f"lockspace-{domain_id}"


def key_of(domain_id: str, host_id: str) -> str:
    return f"lockspace:{domain_id}:{host_id}"


async def due(svc: Storage, row: Row[StorageDomain, DomainPrivate], hosts: Iterable[HostRow]) -> list[str]:
    """Keys of the hosts that should join this domain's lockspace and have not, or leave it."""
    members = await svc.leases.members(row.id)
    if not row.public.leases and not members:
        return []
    found = []
    for host in hosts:
        joins = lease_model.joins(row.public, row.private.maintenance, host)
        missing = joins and host.id not in row.public.lease_host_ids
        if missing or lease_model.leaves(row.public, row.private.maintenance, host, members.get(host.id)):
            found.append(key_of(row.id, host.id))
    return found


async def settle(svc: Storage, rest: str) -> None:
    """Have one host join or leave one lockspace, unless that is under way or has just failed."""
    domain_id, host_id = rest.split(":")
    key = (domain_id, host_id)
    if key in svc.joining or svc.core.quarantine.holds:
        return
    if monotonic() - svc.joining_failed.get(key, float("-inf")) < svc.config.again_seconds:
        return
    row, host = await DOMAINS.find(svc.core.pool, domain_id), await svc.store.host(host_id)
    if row is None or host is None:
        return
    member = await svc.leases.member(domain_id, host_id)
    if lease_model.joins(row.public, row.private.maintenance, host):
        if why := lease_model.cannot_join(host):
            await say_problem(svc, domain_id, host_id, why)
            return
        work = _join(svc, row, host)
    elif lease_model.leaves(row.public, row.private.maintenance, host, member):
        work = _leave(svc, row.public, host_id)
    else:
        return
    if key in svc.joining:  # what a dead host left is being freed since
        work.close()
        return
    svc.joining.add(key)
    svc.core.operations.spawn(work)


async def _join(svc: Storage, row: Row[StorageDomain, DomainPrivate], host: HostRow) -> None:
    domain, key = row.public, (row.id, host.id)
    try:
        member = await svc.leases.number(row.id, host.id)
        await svc.core.commit(svc.leases.asked(member))
        await svc.core.orders.carry_out(
            JOIN_LOCKSPACE,
            lease_model.join_order(domain, member.number, initialise=not row.private.lockspace),
            host_id=host.id,
            object_id=object_of(row.id),
            timeout_seconds=svc.config.join_seconds,
        )
    except Refused as refused:
        log.info("host %s has not joined the lockspace of %s: %s", host.name, domain.name, refused.message)
        svc.joining_failed[key] = monotonic()
        await say_problem(svc, row.id, host.id, refused.message)
    else:
        svc.joining_failed.pop(key, None)
        await svc.edit(DOMAINS, row.id, _with_lockspace)
        await svc.core.hosts.ask_report(host.id)  # says under which boot, and with which generation
    finally:
        svc.joining.discard(key)


def _with_lockspace(
    row: Row[StorageDomain, DomainPrivate],
) -> tuple[StorageDomain, DomainPrivate]:
    return row.public, replace(row.private, lockspace=True)


async def say_problem(svc: Storage, domain_id: str, host_id: str, why: str) -> None:
    def said(row: Row[StorageDomain, DomainPrivate]) -> tuple[StorageDomain, DomainPrivate] | None:
        if not lease_model.has_lockspace(row.public, row.private.maintenance):
            return None
        return lease_model.with_problem(row.public, host_id, why), row.private

    await svc.edit(DOMAINS, domain_id, said)


async def _leave(svc: Storage, domain: StorageDomain, host_id: str) -> None:
    key = (domain.id, host_id)
    try:
        await leave(svc, domain, host_id)
    except Refused as refused:
        log.info("host %s stays in the lockspace of %s: %s", host_id, domain.name, refused.message)
        svc.joining_failed[key] = monotonic()
        await say_problem(svc, domain.id, host_id, refused.message)
    finally:
        svc.joining.discard(key)


async def leave(svc: Storage, domain: StorageDomain, host_id: str) -> None:
    """Have a host give its number back. Raises Refused, also because a lease is held there."""

    def gone(row: Row[StorageDomain, DomainPrivate]) -> tuple[StorageDomain, DomainPrivate]:
        return lease_model.without_host(row.public, host_id), row.private

    await svc.edit(
        DOMAINS, domain.id, gone
    )  # before the order: from now on nothing is started there with a lease
    await svc.core.orders.carry_out(
        LEAVE_LOCKSPACE,
        LeaveLockspace(domain_id=domain.id, path=lease_model.lockspace_path(domain)),
        host_id=host_id,
        object_id=object_of(domain.id),
        timeout_seconds=svc.config.leave_seconds,
    )
    await svc.core.commit(svc.leases.left(domain.id, host_id))


async def holders(svc: Storage, domain_id: str, *, running: bool = False) -> list[str]:
    """Names of the VMs that have their lease there; `running`: that may hold it now."""
    ids = [lease.vm_id for lease in await svc.leases.leases_in(domain_id) if not lease.doomed]
    return lease_model.holders(ids, await svc.store.vms(ids), running=running)


async def refuse_change(svc: Storage, old: StorageDomain, new: StorageDomain) -> None:
    """Raises Refused unless the domain's leases can be so, and this change of them can be made."""
    lease_model.refuse_settings(new)
    lease_model.refuse_change(old, new, await holders(svc, old.id))


async def leave_everywhere(svc: Storage, domain_id: str, host_ids: Iterable[str]) -> None:
    """Before these hosts disconnect the domain. Raises Refused when one of them still holds a lease; one that can't be
    reached leaves later."""
    domain = (await svc.domain(domain_id)).public
    members = await svc.leases.members(domain_id)
    for host_id in host_ids:
        if host_id not in members or not members[host_id].asked:
            continue
        try:
            await leave(svc, domain, host_id)
        except Refused as refused:
            if refused.kind is Kind.CONFLICT:
                raise
            log.info("host %s leaves the lockspace of %s later: %s", host_id, domain.name, refused.message)


def reported(
    svc: Storage, fact: StorageReported, report: StorageDomainReport, member: Member | None
) -> Sequence[Change]:
    """What a host's own word about its place in a lockspace changes, beside the domain itself."""
    said = report.lockspace
    if said is None or not said.generation:
        if member is None or not member.boot_id:
            return ()
        return [svc.leases.ended(member)]
    if member is None:
        return [svc.leases.adopted(report.domain_id, fact.host_id, said.host_number)]
    if said.host_number != member.number or (member.boot_id, member.joined) == (
        fact.boot_id,
        replace(said, failing=False),
    ):
        return ()
    return [svc.leases.joined(fact.host_id, fact.boot_id, said)]


def wakes(
    row: Row[StorageDomain, DomainPrivate],
    host: HostRow,
    report: StorageDomainReport,
    members: Mapping[str, Member],
) -> bool:
    """Whether there is something to do after this report: it has not joined as it should."""
    return lease_model.joins(row.public, row.private.maintenance, host) and not lease_model.is_settled(
        row.public, report, members.get(row.id)
    )
