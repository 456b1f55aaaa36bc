"""What a dead host held in a lockspace is free as soon as its BMC, or a new boot, proves its death: another host writes its host lease free,
and then sanlock lets anybody take what it held, instead of 8 io_timeouts + 60 s after its last renewal.

Only for the boot that the proof names, if it is the one that reported the generation that is on the storage: ha is asked
again before the order is given, and whoever carries it out looks at the storage again. One host at a time may write, it is
written down which, and until it has said how that ended the number is not joined again: a write that comes late can't meet
the lease of a later boot.
"""

from __future__ import annotations

import asyncio
import logging

from services.storage import domain_model, lease_model, lockspaces
from services.storage.storage import Storage
from services.storage.store import DOMAINS, Member
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HostStatus
from volery.contracts.leases import FREE_HOST_LEASE, LEASE_TAKEN, FreeHostLease
from volery.contracts.liveness import ProofKind
from volery.contracts.storage import StorageDomain
from volery.runtime.clock import monotonic
from volery.runtime.tables import Stale

log = logging.getLogger(__name__)

HOSTS_TRIED = 2
AGAIN_SECONDS = 5.0


async def died(svc: Storage) -> None:
    """After each death, and every now and then as long as something is left to free."""
    for member in await svc.leases.dead():
        svc.core.wake(lockspaces.key_of(member.domain_id, member.host_id))


async def settle(svc: Storage, rest: str) -> None:
    """First what a dead boot left under this number; then the host itself joins or leaves."""
    domain_id, host_id = rest.split(":")
    member = await svc.leases.member(domain_id, host_id)
    if member is None or not is_due(svc, member):
        await lockspaces.settle(svc, rest)
    elif monotonic() - svc.freeing_failed.get((domain_id, host_id), float("-inf")) >= AGAIN_SECONDS:
        begin(svc, member)


def is_due(svc: Storage, member: Member) -> bool:
    """A person's word alone frees nothing: if it was an error, the lease that is renewed keeps the VMs where they run. By
    the time that somebody has looked and said so, a dead host's lease has mostly expired."""
    proof = svc.core.orders.deaths.ended.get((member.host_id, member.boot_id))
    by_machine = proof is not None and proof.kind is not ProofKind.PERSON
    return bool(member.freer_host_id) or (by_machine and member.generation > 0)


async def freed(svc: Storage, domain_id: str, within_seconds: float) -> None:
    """Before a lease of this domain is taken: whatever dead hosts hold there is freed, or that was tried for so long."""
    dead = await svc.leases.dead()
    due = [member for member in dead if member.domain_id == domain_id and is_due(svc, member)]
    tasks = {task for member in due if (task := begin(svc, member)) is not None}
    if tasks:
        await asyncio.wait(tasks, timeout=within_seconds)


def begin(svc: Storage, member: Member) -> asyncio.Task[None] | None:
    """None while the number is being joined or left, or nothing may be changed at all."""
    key = (member.domain_id, member.host_id)
    if (under_way := svc.freeing.get(key)) is not None:
        return under_way
    if key in svc.joining or svc.core.quarantine.holds:
        return None
    svc.joining.add(key)

    def over(task: asyncio.Task[None]) -> None:
        svc.joining.discard(key)
        svc.freeing.pop(key, None)
        svc.core.wake(f"domain:{member.domain_id}")  # whoever came back meanwhile joins now

    task = svc.core.operations.spawn(_free(svc, member))
    svc.freeing[key] = task
    task.add_done_callback(over)
    return task


async def _free(svc: Storage, member: Member) -> None:
    """Until it is settled: whoever was ordered to write and doesn't say how that ended is asked on, and nobody else."""
    key, domain_id = (member.domain_id, member.host_id), member.domain_id
    svc.freeing_failed[key] = monotonic()
    while (row := await DOMAINS.find(svc.core.pool, domain_id)) is not None:
        try:
            if await _settled(svc, row.public, member):
                svc.freeing_failed.pop(key, None)
            return
        except Refused as refused:
            log.info("what %s holds on %s isn't freed: %s", member.host_id, row.public.name, refused.message)
            if refused.kind is not Kind.TIMEOUT:
                return
        except Stale:
            log.info("number %d in the lockspace of %s changed meanwhile", member.number, row.public.name)
            return
        now = await svc.leases.member(*key)
        if now is None or not is_due(svc, now):
            return
        member = now


async def _settled(svc: Storage, domain: StorageDomain, member: Member) -> bool:
    for freer_id in await _freers(svc, domain, member):
        if await _by(svc, domain, member, freer_id):
            return True
    return False


async def _freers(svc: Storage, domain: StorageDomain, member: Member) -> list[str]:
    """Whoever began goes on, alone. Raises Refused while an earlier join may still take the number."""
    if member.freer_host_id:
        return [member.freer_host_id]
    if await svc.core.orders.left_open(member.host_id, lockspaces.object_of(domain.id)):
        raise Refused(Kind.CONFLICT, "an order for that host to join or leave has not ended")
    up = {host.id for host in await svc.store.hosts() if host.status == HostStatus.UP}
    able = (up & set(domain.lease_host_ids)) - {member.host_id}
    if not able:
        log.info("no other host that is up has joined the lockspace of %s", domain.name)
    return domain_model.in_turn(able, member.host_id)[:HOSTS_TRIED]


async def _by(svc: Storage, domain: StorageDomain, member: Member, freer_id: str) -> bool:
    """Whether nothing is left to do for another host. Raises Refused, Stale."""
    if not await svc.core.orders.deaths.confirmed(member.host_id, member.boot_id):
        await _end_what_was_ordered(svc, member)
        return True
    await svc.core.commit(svc.leases.freeing(member, freer_id))
    order = FreeHostLease(
        domain_id=domain.id,
        path=lease_model.lockspace_path(domain),
        host_number=member.number,
        generation=member.generation,
    )
    try:
        await svc.core.orders.carry_out(
            FREE_HOST_LEASE,
            order,
            host_id=freer_id,
            object_id=_object_of(member),
            timeout_seconds=svc.config.free_lease_seconds,
        )
    except Refused as refused:
        if refused.kind is Kind.TIMEOUT:
            raise  # it may still write
        if refused.details.get("rule") != LEASE_TAKEN:
            log.info("host %s can't free what %s held: %s", freer_id, member.host_id, refused.message)
            await svc.core.commit(svc.leases.freeing(member, ""))
            return False
        log.info("what boot %s held on %s is gone: %s", member.boot_id, domain.name, refused.message)
    else:
        log.warning("what dead host %s held on %s is free: %s", member.host_id, domain.name, freer_id)
    await svc.core.commit(svc.leases.freed(member))
    return True


async def _end_what_was_ordered(svc: Storage, member: Member) -> None:
    """The proof is void: what was ordered by it ends, as it may, before the number counts as the host's again."""
    if not member.freer_host_id:
        return
    try:
        async with asyncio.timeout(svc.config.free_lease_seconds):
            for order_id in await svc.core.orders.left_open(member.freer_host_id, _object_of(member)):
                await svc.core.orders.give_up(order_id)
    except TimeoutError:
        raise Refused(Kind.TIMEOUT, f"host {member.freer_host_id} doesn't say how it ended") from None
    await svc.core.commit(svc.leases.freeing(member, ""))


def _object_of(member: Member) -> str:
    return f"freed-{member.domain_id}-{member.host_id}"
