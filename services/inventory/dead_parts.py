"""Hosts that live, but have lost a storage domain or a required network that others of their cluster have: non-operational
for as long as storage or network says so, and up again by themselves. Their highly available VMs move away.

Nothing is ended here. A VM that can't move stays as it is and is named; it is brought back elsewhere only once its own
host has said that its QEMU ended.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from services.inventory import model
from services.inventory.clearing import Clearing, to_save
from services.inventory.desk import Inventory
from services.inventory.store import HOSTS, HostPrivate
from volery.contracts.base import Owner
from volery.contracts.errors import conflict
from volery.contracts.host import Host, HostProblem, HostStatus
from volery.contracts.network import LIST_NETWORKS, NETWORK_CHANGED, NETWORK_DELETED, Network
from volery.contracts.operation import Operation
from volery.contracts.storage import (
    LIST_STORAGE_DOMAINS,
    STORAGE_DOMAIN_CHANGED,
    STORAGE_DOMAIN_DELETED,
    StorageDomain,
)
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.listing import pages
from volery.runtime.relay import stream_name
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

log = logging.getLogger(__name__)

part = Part()

EVACUATE = "host.evacuate"


@dataclass(frozen=True, slots=True)
class Thing:
    """What a host may have lost."""

    reason: str
    kind: str
    id: str
    name: str

    def problem(self, host: Host, why: str) -> HostProblem:
        noun = self.kind.replace("_", " ")
        return HostProblem(
            reason=self.reason,
            object_kind=self.kind,
            object_id=self.id,
            object_name=self.name,
            message=f"host {host.name} has lost {noun} {self.name}, which other hosts of its cluster have: {why}",
            since=utc_now(),
        )


def _domain(domain: StorageDomain) -> Thing:
    return Thing(model.STORAGE_UNREACHABLE, "storage_domain", domain.id, domain.name)


@part.hears(STORAGE_DOMAIN_CHANGED)
async def storage_domain_changed(inv: Inventory, domain: StorageDomain) -> Sequence[Change]:
    return await _lost(inv, _domain(domain), domain.lost)


@part.hears(STORAGE_DOMAIN_DELETED)
async def storage_domain_deleted(inv: Inventory, domain: StorageDomain) -> Sequence[Change]:
    return await _lost(inv, _domain(domain), {})


def _network(network: Network) -> Thing:
    return Thing(model.NETWORK_MISSING, "network", network.id, network.name)


@part.hears(NETWORK_CHANGED)
async def network_changed(inv: Inventory, network: Network) -> Sequence[Change]:
    return await _lost(inv, _network(network), network.lost)


@part.hears(NETWORK_DELETED)
async def network_deleted(inv: Inventory, network: Network) -> Sequence[Change]:
    return await _lost(inv, _network(network), {})


async def list_again(inv: Inventory, stream: str) -> None:
    """Facts were lost for good: what storage or network lists is the truth."""
    if stream == stream_name(Owner.STORAGE):
        domains = pages(inv.core.bus, LIST_STORAGE_DOMAINS, StorageDomain)
        things = {one.id: (_domain(one), one.lost) async for page in domains for one in page}
        await _settle(inv, model.STORAGE_UNREACHABLE, things)
    elif stream == stream_name(Owner.NETWORK):
        networks = pages(inv.core.bus, LIST_NETWORKS, Network)
        things = {one.id: (_network(one), one.lost) async for page in networks for one in page}
        await _settle(inv, model.NETWORK_MISSING, things)


async def _settle(inv: Inventory, reason: str, things: dict[str, tuple[Thing, dict[str, str]]]) -> None:
    """Each of these as it is now, and what isn't among them lost by nobody."""
    for row in await inv.store.hosts():
        for one in row.public.problems:
            if one.reason == reason and one.object_id not in things:
                gone = Thing(reason, one.object_kind, one.object_id, one.object_name)
                things[gone.id] = (gone, {})
    for thing, lost in things.values():
        while True:
            try:
                await inv.core.commit(*await _lost(inv, thing, lost))
            except Stale:
                continue
            break


async def _lost(inv: Inventory, thing: Thing, lost: Mapping[str, str]) -> list[Change]:
    """The hosts that have lost it, and those that had, as they are with it."""
    changes = []
    for row in await inv.store.hosts_concerned(thing.id, list(lost)):
        host = _with(row, thing, lost.get(row.id, ""), inv)
        if host != row.public:
            changes.append(_announced(inv, row, host))
    return changes


def _with(row: Row[Host, HostPrivate], thing: Thing, why: str, inv: Inventory) -> Host:
    host, private = row.public, row.private
    known = next((one for one in host.problems if one.object_id == thing.id), None)
    others = tuple(one for one in host.problems if one.object_id != thing.id)
    if why and known is None:
        host = replace(host, problems=(*others, thing.problem(host, why)))
    elif not why:
        host = replace(host, problems=others)
    return model.host_with_status(
        host, private.liveness, private.maintenance, model.is_leaving(host), inv.config
    )


def _announced(inv: Inventory, row: Row[Host, HostPrivate], host: Host) -> Change:
    if host.status is not row.public.status:
        what = "; ".join(one.message for one in host.problems) or "it has back what it had lost"
        log.warning("host %s is %s: %s", host.name, host.status, what)
    return HOSTS.update(row, host).and_then(lambda: inv.core.wake(f"away/{host.id}"))


# Its highly available VMs


def _is_left(row: Row[Host, HostPrivate] | None) -> bool:
    """Whether VMs are to leave the host."""
    return row is not None and row.public.status is HostStatus.NON_OPERATIONAL and bool(row.public.problems)


async def leave(inv: Inventory, host_id: str) -> None:
    """Have the highly available VMs of a host that has lost something move away, unless that is under way or was tried
    just now."""
    row = await HOSTS.find(inv.core.pool, host_id)
    if row is None or not _is_left(row):
        inv.evacuated.pop(host_id, None)
        return
    now = monotonic()
    again = now - inv.evacuated.get(host_id, float("-inf")) >= inv.config.evacuate_again_seconds
    if row.private.evacuation or not again or not await to_save(inv, host_id):
        return
    op, begun = inv.core.operations.begin(
        EVACUATE,
        object_kind="host",
        object_id=host_id,
        object_name=row.public.name,
        caller=Caller("service:inventory"),
        deadline_seconds=3600,
    )
    try:
        await inv.core.commit(HOSTS.update(row, None, replace(row.private, evacuation=op.id)), begun)
    except Stale:
        inv.core.wake(f"away/{host_id}")
        return
    inv.evacuated[host_id] = now


@part.runs(EVACUATE, deadline_seconds=3600)
async def evacuate(inv: Inventory, run: Run) -> None:
    """Ends when all have left, when the host is well again, or with the names of those that can't leave."""
    host_id = run.operation.object_id

    async def is_left() -> bool:
        return _is_left(await HOSTS.find(inv.core.pool, host_id))

    failed = await Clearing(inv, run, host_id, leavers=to_save, goes_on=is_left).clear()
    if failed and await is_left():
        names = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise conflict(
            f"host {run.operation.object_name} has lost something, and these highly available VMs can't leave it: {names}. "
            "They are left as they are; one that ends is brought back elsewhere. Mend what the host has lost, or stop them",
            vms=failed,
        )


def released(row: Row[Host, HostPrivate], operation: Operation) -> Change | None:
    """The host without this operation, if it is its evacuation."""
    if not operation.id or row.private.evacuation != operation.id:
        return None
    return HOSTS.update(row, None, replace(row.private, evacuation=""))
