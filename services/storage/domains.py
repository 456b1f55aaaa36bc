"""Storage domains: made, attached, activated, maintained, detached, deleted. Hosts do it; operations say how far."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import replace

from services.storage import connections, disk_model, domain_model, holders, lease_model, lockspaces
from services.storage.storage import Storage
from services.storage.store import DISKS, DOMAIN_IQN, DOMAIN_NAME, DOMAINS, DomainPrivate
from volery.contracts.agent import StorageDomainReport
from volery.contracts.base import Done, Message
from volery.contracts.cluster import GetById
from volery.contracts.errors import Refused, conflict
from volery.contracts.ids import new_id
from volery.contracts.naming import (
    checked_description,
    checked_id,
    checked_name,
    checked_revision,
    checked_tags,
)
from volery.contracts.operation import ListQuery, Operation
from volery.contracts.storage import (
    ACT_ON_STORAGE_DOMAIN,
    ATTACH_STORAGE_DOMAIN,
    CREATE_STORAGE_DOMAIN,
    DELETE_STORAGE_DOMAIN,
    GET_STORAGE_DOMAIN,
    LIST_STORAGE_DOMAINS,
    UPDATE_STORAGE_DOMAIN,
    ActOnStorageDomain,
    AttachStorageDomain,
    CreateStorageDomain,
    DeleteStorageDomain,
    DomainKind,
    DomainStatus,
    StorageDomain,
    UpdateStorageDomain,
)
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.operations import busy
from volery.runtime.pages import page
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale, Taken

part = Part()
NOUN = "storage domain"
EDITABLE = ("name", "description", "tags", "leases", "lease_io_timeout_seconds", "reset_hosts")

PROBES = 3
"""Hosts that are asked in turn to initialise a new domain, until one can."""


class Probe(Message):
    """What the operation that makes a domain was asked; secrets are in the domain's private part."""

    host_ids: tuple[str, ...]


class Initialised(Message):
    host_id: str
    report: StorageDomainReport


def _taken(taken: Taken, domain: StorageDomain) -> Refused:
    if taken.constraint == DOMAIN_IQN:
        return conflict(
            f"target {domain.iqn} is a storage domain already: two domains on one target would give one LUN to two "
            "disks; use that domain",
            iqn=domain.iqn,
        )
    if taken.constraint == DOMAIN_NAME:
        return conflict(
            f"there is a storage domain {domain.name!r} already: choose another name", name=domain.name
        )
    return conflict(f"storage domain {domain.name} clashes with another one ({taken.constraint})")


@part.answers(CREATE_STORAGE_DOMAIN)
async def create(svc: Storage, ask: CreateStorageDomain, caller: Caller) -> Operation:
    ask = domain_model.checked(ask)
    lease_model.refuse_settings(_new_domain(ask, ask.leases is True))
    if ask.data_center_id:
        await svc.check_data_center(ask.data_center_id)
    hosts = await svc.connectable(ask.data_center_id, ask.host_id, f"making storage domain {ask.name}")
    domain = _new_domain(ask, lease_model.holds_leases(ask, hosts))
    host_ids = domain_model.in_turn([host.id for host in hosts], domain.id)[:PROBES]
    op, begun = svc.core.operations.begin(
        "storage_domain.create",
        object_kind="storage_domain",
        object_id=domain.id,
        object_name=domain.name,
        question=Probe(host_ids=tuple(host_ids)),
        caller=caller,
    )
    private = DomainPrivate(chap_password=svc.vault.seal(ask.chap_password))
    try:
        await svc.core.commit(
            DOMAINS.insert(replace(domain, busy_with=op.id), private), begun, caller=caller, answer=op
        )
    except Taken as taken:
        raise _taken(taken, domain) from None
    return op


def _new_domain(ask: CreateStorageDomain, leases: bool) -> StorageDomain:
    now = utc_now()
    return StorageDomain(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        name=ask.name,
        kind=ask.kind,
        data_center_id=ask.data_center_id,
        status=DomainStatus.ACTIVATING if ask.data_center_id else DomainStatus.UNATTACHED,
        description=ask.description,
        tags=ask.tags,
        path=ask.path,
        host_id=ask.host_id,
        portal=ask.portal,
        iqn=ask.iqn,
        chap_user=ask.chap_user,
        leases=leases,
        lease_io_timeout_seconds=ask.lease_io_timeout_seconds,
        reset_hosts=ask.reset_hosts,
    )


@part.runs("storage_domain.create", deadline_seconds=300)
async def creating(svc: Storage, run: Run) -> None:
    domain_id, host_ids = run.operation.object_id, run.input(Probe).host_ids
    run.undo("domain", partial(_remove, svc, domain_id, host_ids))
    made = await run.step(
        "initialise", "Initialise the storage", partial(_initialise, svc, domain_id, host_ids), Initialised
    )
    domain = (await svc.domain(domain_id)).public
    _refuse_empty(domain, made.report)
    if domain.data_center_id:
        await connections.record(svc, domain_id, {made.host_id: made.report})
        await run.step(
            "connect", "Connect the hosts", partial(connections.connect_everywhere, svc, domain_id)
        )
    else:
        await run.step("measure", "Record what is there", partial(_measure, svc, domain_id, made.report))
        await run.step("leave", "Disconnect", partial(connections.disconnect, svc, domain_id, [made.host_id]))


async def _initialise(svc: Storage, domain_id: str, host_ids: Sequence[str]) -> Initialised:
    """On the first of these hosts that can. Raises Refused with what the first one said."""
    first: Refused | None = None
    for host_id in host_ids:
        try:
            report = await connections.look(svc, domain_id, host_id, initialise=True)
            return Initialised(host_id=host_id, report=report)
        except Refused as refused:
            host = await svc.store.host(host_id)
            name = host.name if host is not None else host_id
            first = first or Refused(refused.kind, f"host {name}: {refused.message}", **refused.details)
    assert first is not None
    raise first


def _refuse_empty(domain: StorageDomain, report: StorageDomainReport) -> None:
    if domain.kind is DomainKind.ISCSI and not report.volumes:
        raise conflict(
            f"target {domain.iqn} at {domain.portal} has no LUN: make some on the target first",
            iqn=domain.iqn,
        )


async def _measure(svc: Storage, domain_id: str, report: StorageDomainReport) -> None:
    def measured(row: Row[StorageDomain, DomainPrivate]) -> tuple[StorageDomain, DomainPrivate]:
        seen = domain_model.with_report(row.public, "", report, [], {}, ())
        return replace(seen, host_ids=()), row.private

    await svc.edit(DOMAINS, domain_id, measured)


async def _remove(svc: Storage, domain_id: str, probed: Sequence[str]) -> None:
    """Nothing of a domain that could not be made stays behind; its marker goes as soon as a host can."""
    row = await DOMAINS.find(svc.core.pool, domain_id)
    if row is None:
        return
    path = row.public.path
    await connections.disconnect(svc, domain_id, sorted(set(row.public.host_ids) - set(probed)))
    problems = await connections.disconnect(svc, domain_id, probed, remove=path)
    while (row := await DOMAINS.find(svc.core.pool, domain_id)) is not None:
        leaving = [svc.store.leave_behind(row.public, row.public.host_id)] if problems and path else []
        try:
            await svc.core.commit(DOMAINS.delete(row), *leaving)
        except Stale:
            continue


@part.answers(UPDATE_STORAGE_DOMAIN)
async def update(svc: Storage, ask: UpdateStorageDomain, caller: Caller) -> StorageDomain:
    while True:
        row = await svc.domain(checked_id(NOUN, ask.id))
        checked_revision(NOUN, row.public.name, row.public.revision, ask.if_revision)
        given = {name: value for name in EDITABLE if (value := getattr(ask, name)) is not msgspec.UNSET}
        new = replace(row.public, **given)
        new = replace(
            new,
            name=checked_name(NOUN, new.name),
            description=checked_description(new.description),
            tags=checked_tags(new.tags),
            revision=row.public.revision + 1,
            updated_at=utc_now(),
        )
        await lockspaces.refuse_change(svc, row.public, new)
        new = new if new.leases else lease_model.only_wanted(new, row.private.maintenance, ())
        change = svc.then_wake(DOMAINS.update(row, new), f"domain:{row.id}")
        try:
            await svc.core.commit(change, caller=caller, answer=new)
        except Stale:
            continue
        except Taken as taken:
            raise _taken(taken, new) from None
        return new


@part.answers(ATTACH_STORAGE_DOMAIN)
async def attach(svc: Storage, ask: AttachStorageDomain, caller: Caller) -> Operation:
    checked_id("data center", ask.data_center_id)
    await svc.check_data_center(ask.data_center_id)
    while True:
        row = await _free(svc, ask.id, ask.if_revision)
        if row.public.status is not DomainStatus.UNATTACHED:
            raise conflict(
                f"storage domain {row.public.name} is attached to data center {row.public.data_center_id}: "
                "detach it there first",
                data_center_id=row.public.data_center_id,
            )
        await svc.connectable(
            ask.data_center_id, row.public.host_id, f"attaching storage domain {row.public.name}"
        )
        op, begun = _begin(svc, "attach", row.public, caller)
        new = replace(
            row.public,
            data_center_id=ask.data_center_id,
            status=DomainStatus.ACTIVATING,
            busy_with=op.id,
        )
        private = replace(row.private, maintenance=False)
        try:
            await svc.core.commit(DOMAINS.update(row, new, private), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


def _begin(svc: Storage, action: str, domain: StorageDomain, caller: Caller) -> tuple[Operation, Change]:
    return svc.core.operations.begin(
        f"storage_domain.{action}",
        object_kind="storage_domain",
        object_id=domain.id,
        object_name=domain.name,
        caller=caller,
    )


async def _free(svc: Storage, domain_id: str, if_revision: int) -> Row[StorageDomain, DomainPrivate]:
    row = await svc.domain(checked_id(NOUN, domain_id))
    checked_revision(NOUN, row.public.name, row.public.revision, if_revision)
    busy(row.public, NOUN, row.public.busy_with)
    return row


@part.runs("storage_domain.attach", deadline_seconds=300)
async def attaching(svc: Storage, run: Run) -> None:
    domain_id = run.operation.object_id
    run.undo("attach", partial(_unattach, svc, domain_id))
    await run.step("connect", "Connect the hosts", partial(connections.connect_everywhere, svc, domain_id))
    await run.step("disks", "Take its disks along", partial(_take_along, svc, domain_id))


async def _take_along(svc: Storage, domain_id: str) -> None:
    """Its disks belong to the data center that it belongs to."""
    data_center_id = (await svc.domain(domain_id)).public.data_center_id
    for disk in await svc.store.disks_of(domain_id):
        await svc.edit(
            DISKS, disk.id, lambda row: (replace(row.public, data_center_id=data_center_id), row.private)
        )


async def _unattach(svc: Storage, domain_id: str) -> None:
    hosts = [host.id for host in await svc.store.hosts() if host.status in domain_model.CAN_CONNECT]
    row = await svc.domain(domain_id)
    connected = sorted(set(hosts) & set(row.public.host_ids))

    def unattached(row: Row[StorageDomain, DomainPrivate]) -> tuple[StorageDomain, DomainPrivate]:
        new = replace(row.public, data_center_id="", host_ids=(), unreachable={}, lost={})
        new = lease_model.only_wanted(new, False, ())
        return domain_model.with_status(new, False), replace(row.private, maintenance=False)

    await lockspaces.leave_everywhere(svc, domain_id, connected)
    await svc.edit(DOMAINS, domain_id, unattached)
    await _take_along(svc, domain_id)
    await connections.disconnect(svc, domain_id, connected)


@part.answers(ACT_ON_STORAGE_DOMAIN)
async def act(svc: Storage, ask: ActOnStorageDomain, caller: Caller) -> Operation:
    while True:
        row = await _free(svc, ask.id, ask.if_revision)
        domain_model.refuse_transition(row.public, ask.action)
        new, private = await _BEGINNINGS[ask.action](svc, row)
        op, begun = _begin(svc, ask.action, row.public, caller)
        try:
            await svc.core.commit(
                DOMAINS.update(row, replace(new, busy_with=op.id), private), begun, caller=caller, answer=op
            )
        except Stale:
            continue
        return op


async def _activate(
    svc: Storage, row: Row[StorageDomain, DomainPrivate]
) -> tuple[StorageDomain, DomainPrivate]:
    await svc.connectable(
        row.public.data_center_id, row.public.host_id, f"activating storage domain {row.public.name}"
    )
    return replace(row.public, status=DomainStatus.ACTIVATING), replace(row.private, maintenance=False)


async def _maintain(
    svc: Storage, row: Row[StorageDomain, DomainPrivate]
) -> tuple[StorageDomain, DomainPrivate]:
    """From here on nothing new begins on it; what was begun just before is looked for by the operation."""
    await _refuse_in_use(svc, row.public)
    return replace(row.public, status=DomainStatus.MAINTENANCE), replace(row.private, maintenance=True)


async def _refuse_in_use(svc: Storage, domain: StorageDomain) -> None:
    disks = await svc.store.disks_of(domain.id)
    vms = await svc.users(*disks)
    at_work = [
        d.public.name for d in disks if d.public.busy_with or d.private.readers or d.private.transfer_id
    ]
    running = domain_model.running_users(disks, vms) + await lockspaces.holders(svc, domain.id, running=True)
    domain_model.refuse_maintenance(domain, sorted(set(running)), at_work)


async def _detach(
    svc: Storage, row: Row[StorageDomain, DomainPrivate]
) -> tuple[StorageDomain, DomainPrivate]:
    used = await svc.store.used_disks(row.id)
    if used:
        vms = await svc.users(*used)
        names = sorted(
            {vms[u.vm_id].name if u.vm_id in vms else u.vm_id for d in used for u in d.public.uses}
        )
        raise conflict(
            f"storage domain {row.public.name} can't be detached: disks on it are attached to VM "
            f"{', '.join(names[:5])}; detach these disks first",
            vms=names[:100],
        )
    await lockspaces.refuse_change(svc, row.public, replace(row.public, leases=False, reset_hosts=False))
    return row.public, row.private


async def _refresh(
    svc: Storage, row: Row[StorageDomain, DomainPrivate]
) -> tuple[StorageDomain, DomainPrivate]:
    """Also at LUNs that were found to hold something: they may have been cleared since."""
    return row.public, replace(row.private, stained={})


_BEGINNINGS = {"activate": _activate, "maintain": _maintain, "detach": _detach, "refresh": _refresh}


@part.runs("storage_domain.activate", deadline_seconds=300)
async def activating(svc: Storage, run: Run) -> None:
    domain_id = run.operation.object_id
    run.undo("activate", partial(_back_to, svc, domain_id, True))
    await run.step("connect", "Connect the hosts", partial(connections.connect_everywhere, svc, domain_id))


async def _back_to(svc: Storage, domain_id: str, maintenance: bool) -> None:
    def back(row: Row[StorageDomain, DomainPrivate]) -> tuple[StorageDomain, DomainPrivate]:
        return domain_model.with_status(row.public, maintenance), replace(
            row.private, maintenance=maintenance
        )

    await svc.edit(DOMAINS, domain_id, back)


@part.runs("storage_domain.maintain", deadline_seconds=300)
async def maintaining(svc: Storage, run: Run) -> None:
    domain_id = run.operation.object_id
    run.undo("maintain", partial(_back_to, svc, domain_id, False))
    row = await svc.domain(domain_id)
    await _refuse_in_use(svc, row.public)
    hosts = {host.id for host in await svc.store.hosts() if host.status in domain_model.CAN_CONNECT}
    found = sorted(hosts & set(row.public.host_ids))
    leave = partial(lockspaces.leave_everywhere, svc, domain_id, found)
    await run.step("leases", "Leave its lockspace", leave)
    disconnect = partial(connections.disconnect, svc, domain_id, found)
    await run.step("disconnect", "Disconnect the hosts", disconnect)

    def alone(row: Row[StorageDomain, DomainPrivate]) -> tuple[StorageDomain, DomainPrivate]:
        return lease_model.only_wanted(
            replace(row.public, host_ids=(), unreachable={}, lost={}), True, ()
        ), row.private

    await svc.edit(DOMAINS, domain_id, alone)


@part.runs("storage_domain.detach", deadline_seconds=300)
async def detaching(svc: Storage, run: Run) -> None:
    await run.step("detach", "Detach it", partial(_unattach, svc, run.operation.object_id))


@part.runs("storage_domain.refresh", deadline_seconds=300)
async def refreshing(svc: Storage, run: Run) -> None:
    domain_id = run.operation.object_id
    look = partial(connections.connect_everywhere, svc, domain_id, again=True)
    await run.step("look", "Look at it from every host", look)


@part.answers(DELETE_STORAGE_DOMAIN)
async def delete(svc: Storage, ask: DeleteStorageDomain, caller: Caller) -> Done:
    """Only what nobody uses. What is on the storage stays there, but for Volery's own empty directory."""
    while True:
        row = await _free(svc, ask.id, ask.if_revision)
        if ask.destroy:
            await _forget_disks(svc, row.public)
        else:
            await _refuse_deletion(svc, row.public)
        leaving = row.public.kind is DomainKind.DIRECTORY and not ask.destroy
        left = [svc.store.leave_behind(row.public, row.public.host_id)] if leaving else []
        done = Done()
        try:
            gone = [*left, *svc.leases.domain_gone(row.id)]
            await svc.core.commit(DOMAINS.delete(row), *gone, caller=caller, answer=done)
        except (Stale, Taken):  # Taken: a disk came meanwhile, and refers to it
            continue
        svc.core.wake(f"leftover:{row.id}")
        return done


async def _refuse_deletion(svc: Storage, domain: StorageDomain) -> None:
    if domain.status is not DomainStatus.UNATTACHED:
        raise conflict(
            f"storage domain {domain.name} is attached: put it into maintenance and detach it first",
            data_center_id=domain.data_center_id,
        )
    if count := await svc.store.disks_in(domain.id):
        raise conflict(
            f"storage domain {domain.name} has {count} disks: attach it, delete or copy them, and detach it again; "
            "or destroy it, if its storage is lost",
            disks=count,
        )


async def _forget_disks(svc: Storage, domain: StorageDomain) -> None:
    """The storage is lost: its disks end without an order. Raises Refused while anything uses them."""
    if domain.status not in (DomainStatus.UNATTACHED, DomainStatus.MAINTENANCE):
        raise conflict(
            f"storage domain {domain.name} is {domain.status}: put it into maintenance before it is destroyed",
            status=str(domain.status),
        )
    disks = await svc.store.disks_of(domain.id)
    vms = await svc.users(*disks)
    for disk in disks:
        await holders.refuse_removal(svc, disk, "forgotten")
        disk_model.refuse_attached(disk.public, vms, "forgotten")
    for disk in disks:
        try:
            await svc.core.commit(DISKS.delete(disk), svc.volumes.forget_all(disk.id))
        except Stale:  # the next turn of the loop finds what became of it
            return


@part.answers(GET_STORAGE_DOMAIN)
async def get(svc: Storage, ask: GetById, caller: Caller) -> Any:
    return await DOMAINS.raw(svc.core.pool, ask.id)


@part.answers(LIST_STORAGE_DOMAINS)
async def listed(svc: Storage, ask: ListQuery, caller: Caller) -> Any:
    return await page(svc.core.pool, DOMAINS, ask)


async def release(svc: Storage, operation: Operation) -> Sequence[Change]:
    """What frees the domain of an ended operation. Whatever came while it was busy is looked at afterwards."""
    row = await DOMAINS.find(svc.core.pool, operation.object_id)
    if row is None or row.public.busy_with != operation.id:
        return ()
    free = domain_model.with_status(replace(row.public, busy_with=""), row.private.maintenance)
    return [svc.then_wake(DOMAINS.update(row, free), f"domain:{row.id}")]
