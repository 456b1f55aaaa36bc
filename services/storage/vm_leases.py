"""VMs' leases on storage domains, made for a start and removed with the VM; and hosts' leases, read for ha."""

from __future__ import annotations

import asyncio
import logging

from msgspec.structs import replace

from services.storage import dead_leases, domain_model, lease_model
from services.storage.lease_store import VmLease
from services.storage.storage import Storage
from services.storage.store import DOMAINS, HostRow, Member
from volery.contracts.base import Done
from volery.contracts.domain import DomainLease
from volery.contracts.errors import Refused
from volery.contracts.host import HostStatus
from volery.contracts.leases import (
    CREATE_LEASE,
    DELETE_LEASE,
    READ_HOST_LEASE,
    CreateLease,
    DeleteLease,
    ReadHostLease,
)
from volery.contracts.naming import checked_id
from volery.contracts.storage import (
    FIND_LEASE_PROOFS,
    PREPARE_LEASE,
    READ_HOST_LEASES,
    RELEASE_LEASE,
    FindLeaseProofs,
    HostLeases,
    HostLeaseSeen,
    LeaseProofs,
    PrepareLease,
    ReadHostLeases,
    ReleaseLease,
    StorageDomain,
)
from volery.runtime.bus import Caller
from volery.runtime.service import Part

log = logging.getLogger(__name__)
part = Part()


def _lock(svc: Storage, vm_id: str) -> asyncio.Lock:
    return svc.at_leases.setdefault(vm_id, asyncio.Lock())


@part.leader_answers(PREPARE_LEASE)
async def prepare(svc: Storage, ask: PrepareLease, caller: Caller) -> DomainLease:
    """Looked for on the storage each time: what somebody removed there is made again. Raises Refused."""
    vm_id = checked_id("VM", ask.vm_id)
    async with _lock(svc, vm_id):
        domain = (await svc.domain(checked_id("storage domain", ask.storage_domain_id))).public
        domain_model.refuse_unusable(domain)
        lease_model.refuse_unheld(domain, ask.host_id)
        lease = lease_model.lease_of(domain, vm_id)
        await svc.core.commit(svc.leases.has_lease(domain.id, vm_id))
        await dead_leases.freed(svc, domain.id, svc.config.free_lease_seconds)
        await svc.core.orders.carry_out(
            CREATE_LEASE,
            CreateLease(domain_id=domain.id, key=vm_id, path=lease.path),
            host_id=ask.host_id,
            object_id=vm_id,
            timeout_seconds=PREPARE_LEASE.timeout_seconds - svc.config.free_lease_seconds - 2,
        )
    return lease


@part.answers(RELEASE_LEASE)
async def release(svc: Storage, ask: ReleaseLease, caller: Caller) -> Done:
    change = svc.then_wake(
        svc.leases.doomed(ask.vm_id, checked_id("storage domain", ask.storage_domain_id)),
        f"lease:{ask.storage_domain_id}:{ask.vm_id}",
    )
    await svc.core.commit(change, caller=caller, answer=Done())
    return Done()


async def remove(svc: Storage, rest: str) -> None:
    """Remove a lease that nobody needs any more, by a host that can. One that is held stays, and is tried again."""
    domain_id, vm_id = rest.split(":")
    async with _lock(svc, vm_id):
        lease = await svc.leases.lease(domain_id, vm_id)
        if lease is None or not lease.doomed or svc.core.quarantine.holds:
            return
        row = await DOMAINS.find(svc.core.pool, domain_id)
        if row is None:
            await svc.core.commit(svc.leases.removed(lease))
            return
        await _remove(svc, row.public, lease)


async def _remove(svc: Storage, domain: StorageDomain, lease: VmLease) -> None:
    for host_id in domain_model.in_turn(domain.lease_host_ids, lease.vm_id)[:2]:
        try:
            await svc.core.orders.carry_out(
                DELETE_LEASE,
                DeleteLease(
                    domain_id=domain.id, key=lease.vm_id, path=lease_model.lease_of(domain, lease.vm_id).path
                ),
                host_id=host_id,
                object_id=lease.vm_id,
                timeout_seconds=svc.config.connect_seconds,
            )
        except Refused as refused:
            log.info("the lease of VM %s on %s stays for now: %s", lease.vm_id, domain.name, refused.message)
            continue
        await svc.core.commit(svc.leases.removed(lease))
        return


# Hosts' leases


@part.leader_answers(READ_HOST_LEASES)
async def read_host_leases(svc: Storage, ask: ReadHostLeases, caller: Caller) -> HostLeases:
    """By a host that has joined the same lockspace and is up; by the one that read before, if it still can."""
    host = await svc.store.host(checked_id("host", ask.host_id))
    if host is None:
        return HostLeases()
    members = (await svc.leases.memberships(host.id)).values()
    telling = [m for m in members if lease_model.could_prove(m, lease_model.watchdog_of(m, host))]
    seen = await asyncio.gather(*(_seen(svc, host, m, ask.reader_ids.get(m.domain_id, "")) for m in telling))
    return HostLeases(leases=tuple(one for one in seen if one is not None))


@part.answers(FIND_LEASE_PROOFS)
async def find_lease_proofs(svc: Storage, ask: FindLeaseProofs, caller: Caller) -> LeaseProofs:
    members = await svc.leases.resetting()
    if not members:
        return LeaseProofs()
    ids = sorted({member.domain_id for member in members})
    domains = {row.id: row.public for row in await DOMAINS.where(svc.core.pool, "id = any($1::text[])", ids)}
    hosts = {host.id: host for host in await svc.store.hosts()}
    return LeaseProofs(domains=lease_model.proofs(members, domains, hosts))


async def _seen(svc: Storage, host: HostRow, member: Member, before: str) -> HostLeaseSeen | None:
    row = await DOMAINS.find(svc.core.pool, member.domain_id)
    if row is None:
        return None
    domain = row.public
    up = {h.id for h in await svc.store.hosts() if h.status == HostStatus.UP and h.id != host.id}
    able = domain_model.in_turn(up & set(domain.lease_host_ids), host.id)
    reader_id = before if before in able else next(iter(able), "")
    seen = HostLeaseSeen(
        storage_domain_id=domain.id,
        storage_domain_name=domain.name,
        boot_id=member.boot_id,
        joined=member.joined,
        watchdog=lease_model.watchdog_of(member, host),
        reader_id=reader_id,
        problem="" if reader_id else f"no other host that is up has joined the lockspace of {domain.name}",
    )
    return await _read(svc, domain, member, seen) if reader_id else seen


async def _read(svc: Storage, domain: StorageDomain, member: Member, seen: HostLeaseSeen) -> HostLeaseSeen:
    question = ReadHostLease(
        domain_id=domain.id, path=lease_model.lockspace_path(domain), host_number=member.number
    )
    try:
        readings = await svc.core.orders.carry_out(
            READ_HOST_LEASE,
            question,
            host_id=seen.reader_id,
            object_id=f"lease-of-{member.host_id}",
            timeout_seconds=svc.config.read_lease_seconds,
        )
    except Refused as refused:
        return replace(seen, problem=refused.message)
    return replace(seen, readings=readings)
