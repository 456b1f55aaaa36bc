"""The protection of highly available VMs, kept current: what inventory and the scheduler say of them, and what ha knows
of their hosts, judged together. Marks say whose is due; what is true is asked for when it is judged."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from services.ha import executors, pauses, reserve, store, watched_vms
from services.ha.policies.protection import HostProof, judge
from services.ha.policies.reserve import Standing
from services.ha.state import Ha
from services.ha.store import PAUSES, POWER, PROTECTION
from volery.contracts.cluster import CLUSTER_CHANGED, Cluster, GetById
from volery.contracts.errors import Refused
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, Host
from volery.contracts.operation import ListQuery
from volery.contracts.power import PowerManagement
from volery.contracts.protection import (
    DESCRIBE_NEEDS,
    GET_PROTECTION,
    LIST_PROTECTION,
    ProtectionReason,
    VmNeed,
    VmNeeds,
    VmProtection,
)
from volery.contracts.scheduling import FIND_ROOM, FindRoom, Room, RoomFor
from volery.contracts.storage import FIND_LEASE_PROOFS, FindLeaseProofs
from volery.contracts.vm import VM_CHANGED, VM_DELETED, Vm
from volery.runtime.bus import Caller
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.hear_owners import Said
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Change, Nothing, Row, Stale

log = logging.getLogger(__name__)

part = Part()

LOOK_SECONDS = 0.5
TOGETHER = 100
"""VMs that are asked about at a time."""
WRITTEN_TOGETHER = 20

Proofs = Mapping[str, Mapping[str, HostProof]]
"""Cluster → host → what its death could be proven by."""


async def begin(ha: Ha) -> None:
    """Leadership begins: everything is due."""
    ha.unjudged.known = {row.id for row in await PROTECTION.where(ha.core.pool)}
    ha.unjudged.all_due = 0.0


@part.hears_together(VM_CHANGED, VM_DELETED)
async def vms_said(ha: Ha, said: Sequence[Said]) -> list[Change]:
    """They are due at once; the others, since these may have taken or left room, later."""
    vms: list[Vm] = [vm for _, vm in said]
    ha.unjudged.vm_ids.update(
        vm.id for vm in vms if vm.high_availability.enabled or vm.id in ha.unjudged.known
    )
    ha.unjudged.mark_all(ha.config.protection_capacity_seconds, ha.config.protection_between_seconds)
    return []


@part.hears_together(HOST_CHANGED)
async def hosts_changed(ha: Ha, _: Sequence[Said]) -> list[Change]:
    fleet_changed(ha)
    return []


@part.hears(HOST_DELETED)
@part.hears(CLUSTER_CHANGED)
async def something_changed(ha: Ha, _: Host | Cluster) -> list[Change]:
    """A cluster's over-commit says what fits, too."""
    fleet_changed(ha)
    return []


def fleet_changed(ha: Ha) -> None:
    """Everybody's protection may be another one now."""
    ha.unjudged.mark_all(ha.config.protection_settle_seconds, ha.config.protection_between_seconds)


@part.every(LOOK_SECONDS)
async def look(ha: Ha) -> None:
    marks, now = ha.unjudged, monotonic()
    if (settings := await store.fencing_revisions(ha.core.pool)) != marks.settings:
        marks.settings = settings  # set by whichever replica was asked
        fleet_changed(ha)
    wanted, marks.vm_ids = marks.vm_ids, set()
    everything = now >= marks.all_due
    if everything:
        wanted = wanted | marks.known | await watched_vms.highly_available(ha.core.pool)
        marks.all_at, marks.all_due = now, now + ha.config.protection_longest_seconds
    if not wanted:
        return
    proofs = await _proofs(ha)
    found: list[Standing] = []
    for some in _chunks(sorted(wanted), TOGETHER):
        try:
            found += await _judge(ha, some, proofs)
        except Refused as refused:
            log.info("the protection of %d VMs is judged later: %s", len(wanted), refused.message)
            marks.vm_ids |= wanted
            return
        except Stale:
            marks.vm_ids.update(some)
    if everything:
        await reserve.judge(ha, found)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


async def _proofs(ha: Ha) -> Proofs:
    found: dict[str, dict[str, HostProof]] = defaultdict(dict)
    leases = await _leases(ha)
    power = {row.id: row.public for row in await POWER.where(ha.core.pool)}
    paused = {row.id: row.public for row in await PAUSES.where(ha.core.pool) if row.public.until > utc_now()}
    for watch in ha.watches.values():
        facts = watch.facts
        if watch.known and facts.cluster_id:
            found[facts.cluster_id][facts.id] = HostProof(
                id=facts.id,
                name=facts.name,
                power=power.get(facts.id),
                paused=pauses.words_of([paused[key] for key in pauses.keys_of(facts) if key in paused]),
                lease=leases.get(facts.id, ""),
                lacking=_lacking(ha, facts.id, facts.cluster_id, power.get(facts.id)),
            )
    return found


async def _leases(ha: Ha) -> Mapping[str, str]:
    """Host → storage domain whose lease could prove its death; as it was said last when storage doesn't answer."""
    try:
        said = await ha.core.bus.ask(FIND_LEASE_PROOFS, FindLeaseProofs(), again=False)
    except Refused as refused:
        log.debug("storage doesn't say which leases could prove a death: %s", refused.message)
    else:
        ha.unjudged.leases = said.domains
    return ha.unjudged.leases


def _lacking(ha: Ha, host_id: str, cluster_id: str, power: PowerManagement | None) -> tuple[str, ...]:
    """Fence agents that nobody else can run. A host that reported none may have them all the same."""
    if power is None:
        return ()
    others = [w.facts for w in executors.in_cluster(ha, cluster_id) if w.facts.id != host_id]
    if any(not facts.fence_agents for facts in others):
        return ()
    have = {agent for facts in others for agent in facts.fence_agents}
    wanted = {device.agent for device in power.devices} - have
    return tuple(sorted(agent for agent in wanted if not executors.own_hands([agent])))


async def _judge(ha: Ha, vm_ids: Sequence[str], proofs: Proofs) -> list[Standing]:
    """What these VMs take, and where. Raises Refused when inventory or the scheduler doesn't answer: then what is
    written stays."""
    bus, caller = ha.core.bus, Caller("service:ha")
    told = (await bus.ask(DESCRIBE_NEEDS, VmNeeds(vm_ids=tuple(vm_ids)), caller)).vms
    available = [vm for vm in told if vm.highly_available]
    due = [vm for vm in available if vm.settled]
    rooms: tuple[Room, ...] = ()
    if due:
        asks = tuple(
            RoomFor(need=vm.need, excluded_host_ids=(vm.host_id,) if vm.host_id else ()) for vm in due
        )
        rooms = (await bus.ask(FIND_ROOM, FindRoom(asks=asks), caller)).rooms
    rows = {row.id: row for row in await PROTECTION.where(ha.core.pool, "id = any($1::text[])", list(vm_ids))}
    changes = [
        change
        for vm, room in zip(due, rooms, strict=True)
        if (
            change := _change(
                vm, judge(vm, room, proofs.get(vm.need.cluster_id, {})), rows.get(vm.need.vm_id)
            )
        )
        is not None
    ]
    ended = rows.keys() - {vm.need.vm_id for vm in available}
    changes += [PROTECTION.delete(rows[vm_id]) for vm_id in sorted(ended)]
    await _write(ha, changes, ended)
    takes = {room.vm_id: room.memory_bytes for room in rooms}
    return [
        Standing(vm.need.name, vm.need.cluster_id, vm.host_id, takes.get(vm.need.vm_id), vm.need.vcpus)
        for vm in available
    ]


async def _write(ha: Ha, changes: Sequence[Change], ended: Collection[str]) -> None:
    for some in _chunks(changes, WRITTEN_TOGETHER):
        await ha.core.commit(*some)
        for change in some:
            _say(change.document)
            ha.unjudged.known.add(change.document.id)
    ha.unjudged.known -= set(ended)


def _change(
    vm: VmNeed, reasons: tuple[ProtectionReason, ...], row: Row[VmProtection, Nothing] | None
) -> Change | None:
    """What is to be written; None when it is written already."""
    now = utc_now()
    old = row.public if row is not None else VmProtection(
        id=vm.need.vm_id, revision=1, created_at=now, updated_at=now, vm_id=vm.need.vm_id
    )  # fmt: skip
    new = replace(
        old,
        vm_name=vm.need.name,
        cluster_id=vm.need.cluster_id,
        host_id=vm.host_id,
        protected=not reasons,
        reasons=reasons,
    )
    if row is None:
        return PROTECTION.insert(new, Nothing())
    return PROTECTION.update(row, new) if new != old else None


def _say(protection: VmProtection) -> None:
    if not protection.protected:
        why = "; ".join(reason.message for reason in protection.reasons)
        log.info("VM %s is not protected: %s", protection.vm_name, why)


@part.answers(GET_PROTECTION)
async def get_protection(ha: Ha, ask: GetById, caller: Caller) -> Any:
    return await PROTECTION.raw(ha.core.pool, ask.id)


@part.answers(LIST_PROTECTION)
async def list_protection(ha: Ha, ask: ListQuery, caller: Caller) -> Any:
    return await page(ha.core.pool, PROTECTION, ask)
