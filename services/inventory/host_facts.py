"""What hosts say: full reports, and domains that changed. The desired state has the last word on what it means."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from msgspec.structs import replace

from services.inventory import late_unplug, memory, model, reported_store
from services.inventory.desk import Inventory
from services.inventory.endings import ended
from services.inventory.stop_table import End, end_of
from services.inventory.store import HOSTS, VMS, HostPrivate, PlacementRow, VmPrivate
from volery.contracts.agent import (
    DOMAIN_CHANGED,
    DOMAIN_EVENT_HAPPENED,
    HOST_REPORTED,
    DomainChanged,
    DomainEventHappened,
    DomainReport,
    FromHost,
    HostReported,
)
from volery.contracts.base import Owner
from volery.contracts.domain import DomainState
from volery.contracts.host import Host, PowerSaving
from volery.contracts.ids import new_id
from volery.contracts.liveness import LIVENESS_CHANGED, HostLiveness
from volery.contracts.operation import ENDED, OPERATION_CHANGED, Operation
from volery.contracts.vm import DesiredState, GuestInfo, Vm, VmStatus
from volery.runtime.clock import utc_now
from volery.runtime.hear import Apart
from volery.runtime.hear_owners import Said, newest
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row

log = logging.getLogger(__name__)
part = Part()

ENDED_STATES = {DomainState.SHUTOFF, DomainState.CRASHED, DomainState.GONE}
ALIVE_STATES = {DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUTTING_DOWN, DomainState.PMSUSPENDED}

MOST_CHANGES = 200
"""In one statement: beyond, it takes PostgreSQL longer to plan it than to carry them out."""
RESTORED = "restored"
"""The reason of a VM that was taken over as a host reported it: shown until it is stopped or started."""
REASONS = {"ioerror": model.IO_ERROR}
"""libvirt's reason for a pause → what it is called here."""


Known: TypeAlias = Mapping[str, tuple[Row[Vm, VmPrivate] | None, PlacementRow]]
"""VM → what is written of it, if it is one, and where it may run."""


@dataclass(slots=True)
class Heard:
    """What follows from what hosts said."""

    changes: list[Change] = field(default_factory=list)
    running: list[tuple[PlacementRow, str]] = field(default_factory=list)
    """VMs that run as they should, and the boot under which they do, where that was not known."""

    def all_changes(self, inv: Inventory) -> list[Change]:
        return [*self.changes, *reported_store.under_boots(inv.store, self.running)]


@part.hears_hosts_together(HOST_REPORTED)
async def hosts_reported(inv: Inventory, said: Sequence[HostReported]) -> Sequence[Change]:
    """The whole truth about hosts. What one doesn't name doesn't run there. Raises Apart when two of them have to do with
    one VM."""
    hosts = await reported_store.hosts_with(inv.store, [fact.host_id for fact in said])
    named = [domain.vm_id for fact in said for domain in fact.domains]
    known = await reported_store.domains_of(inv.store, [fact.host_id for fact in said], named)
    _refuse_shared(said, known)
    heard, here = Heard(), _by_host(known)
    for fact in said:
        row = hosts.get(fact.host_id)
        if row is None:
            log.warning("host %s reports, but is not known: it was deleted", fact.host_id)
            continue
        heard.changes.append(_host_change(inv, row, fact))
        await _reported(inv, row.public, fact, known, here.get(fact.host_id, ()), heard)
    return heard.all_changes(inv)


def _refuse_shared(said: Sequence[HostReported], known: Known) -> None:
    """Of changes that one statement makes to a row only the first takes place."""
    if len(said) == 1:
        return
    seen: dict[str, str] = {}
    for fact in said:
        for domain in fact.domains:
            if seen.setdefault(domain.vm_id, fact.host_id) != fact.host_id:
                raise Apart
    for vm_id, (row, placement) in known.items():
        there = {seen.get(vm_id, ""), placement.host_id, placement.destination_id}
        there |= {row.public.host_id} if row is not None else set()
        if len(there & {fact.host_id for fact in said}) > 1:
            raise Apart


def _by_host(known: Known) -> dict[str, list[str]]:
    """Host → VMs that should be there, or are shown there."""
    found: dict[str, list[str]] = {}
    for vm_id, (row, placement) in known.items():
        shown = row.public.host_id if row is not None else ""
        for host_id in {placement.host_id, placement.destination_id, shown} - {""}:
            found.setdefault(host_id, []).append(vm_id)
    return found


async def _reported(
    inv: Inventory, host: Host, fact: HostReported, known: Known, here: Sequence[str], heard: Heard
) -> None:
    new_boot = host.boot_id not in ("", fact.boot_id)
    named = {domain.vm_id: domain for domain in fact.domains}
    inv.seen.forget(fact.host_id)
    inv.storage_work[fact.host_id] = fact.storage_work
    for domain in fact.domains:
        _see(inv, fact, domain)
    for vm_id in dict.fromkeys([*named, *here]):
        row, placement = known[vm_id]
        gone = DomainReport(
            vm_id=vm_id,
            epoch=-1,
            order_seq=0,
            name="",
            state=DomainState.GONE,
            reason="host_died" if new_boot else "",
        )
        if vm_id not in named and not await _is_missing(inv, fact, placement):
            continue
        await _domain(inv, fact, named.get(vm_id, gone), row, placement, heard, full=True)
    inv.core.wake(f"host/{fact.host_id}")
    inv.deaf.discard(fact.host_id)
    inv.core.wake(f"memory/{fact.host_id}")


async def _is_missing(inv: Inventory, fact: HostReported, placement: PlacementRow) -> bool:
    """Whether a VM that isn't named doesn't run there. One that has just come, and that nobody has seen there yet, may have
    come after this report was made: the host is asked, and a report that answers is believed."""
    vm_id = placement.vm_id
    unseen = placement.host_id == fact.host_id and placement.state == "running" and not placement.boot_id
    if not unseen or fact.asked is None:
        return True
    epoch, ask = inv.missing.get(vm_id, (0, ""))
    if epoch == placement.epoch and ask in fact.asked:
        del inv.missing[vm_id]
        return True
    if epoch != placement.epoch:
        ask = new_id()
        inv.missing[vm_id] = (placement.epoch, ask)
    await inv.core.hosts.ask_report(fact.host_id, ask)
    return False


def _host_change(inv: Inventory, row: Row[Host, HostPrivate], fact: HostReported) -> Change:
    host = replace(
        row.public,
        capabilities=fact.capabilities,
        boot_id=fact.boot_id,
        agent_generation=fact.generation,
        enrolled_at=row.public.enrolled_at or utc_now(),
        vm_count=sum(1 for d in fact.domains if d.state not in ENDED_STATES),
    )
    if row.public.power_saving is PowerSaving.ASLEEP and row.public.boot_id != fact.boot_id:
        host = model.switched_on(host)
    private = replace(row.private, reported=True)
    preparing = model.is_leaving(host)
    host = model.host_with_status(host, private.liveness, private.maintenance, preparing, inv.config)
    if host == row.public and private == row.private:
        told = Change("select 1 as nothing_new", (), guarded=False)
    else:
        told = HOSTS.update(row, host, private)
    return told.and_then(lambda: inv.reported(fact.host_id, fact.asked))


@part.hears_hosts(DOMAIN_CHANGED)
async def domain_changed(inv: Inventory, fact: DomainChanged) -> Sequence[Change]:
    _see(inv, fact, fact.domain)
    known = await inv.store.domain_on(fact.host_id, fact.domain.vm_id)
    if known is None:
        return ()  # the host was deleted
    heard = Heard()
    await _domain(inv, fact, fact.domain, *known, heard, full=False)
    return heard.all_changes(inv)


def _see(inv: Inventory, fact: FromHost, domain: DomainReport) -> None:
    inv.seen[fact.host_id, domain.vm_id] = domain
    inv.boots[fact.host_id, domain.vm_id] = fact.boot_id


async def _domain(
    inv: Inventory,
    fact: FromHost,
    report: DomainReport,
    row: Row[Vm, VmPrivate] | None,
    placement: PlacementRow,
    heard: Heard,
    *,
    full: bool,
) -> None:
    host_id, boot_id = fact.host_id, fact.boot_id
    if row is None or row.public.external:
        heard.changes += await _external(inv, host_id, row, report)
        return
    if report.state in ALIVE_STATES and report.epoch > placement.epoch and not inv.core.quarantine.reason:
        await inv.core.quarantine.contradicted(host_id, _why_older(row.public, host_id, report, placement))
    if inv.core.quarantine.reason and report.state in ALIVE_STATES and _is_newer(report, placement):
        heard.changes += _adopted(inv, row, placement, host_id, report, boot_id)
    elif placement.host_id == host_id and placement.state in ("running", "starting"):
        _at_home(inv, row, placement, report, boot_id, heard, full=full)
    elif placement.state == "moving":
        return  # the migration's operation decides, from both hosts' words
    elif report.state in ALIVE_STATES or report.state is DomainState.INCOMING:
        # Runs, or waits to run, where it may not: the host is told to forget it, under an epoch it must obey.
        inv.core.wake(f"stray/{host_id}/{report.vm_id}")


def _why_older(vm: Vm, host_id: str, report: DomainReport, placement: PlacementRow) -> str:
    """Every epoch is written before a host is told of it."""
    return (
        f"host {host_id} has VM {vm.name} under epoch {report.epoch}, and the database knows none above {placement.epoch}, so "
        "PostgreSQL was restored from an older state"
    )


def _is_newer(report: DomainReport, placement: PlacementRow) -> bool:
    """What a host has, than what a restored database says: also a VM that was just being started there, or that nobody
    had decided yet where to start; or one that has arrived whole, wherever it was sent."""
    decided = report.epoch == placement.epoch
    starting = decided and placement.state == "starting"
    whole = report.state is DomainState.RUNNING and not report.reason.startswith("postcopy")
    return starting or (decided and whole and placement.state == "moving") or report.epoch > placement.epoch


def _adopted(
    inv: Inventory,
    row: Row[Vm, VmPrivate],
    placement: PlacementRow,
    host_id: str,
    report: DomainReport,
    boot_id: str,
) -> list[Change]:
    """The database is older than the hosts: a domain under a later epoch is the truth. Memory that was saved before it came
    to run is older than its disks, and what it ran with before says nothing."""
    new = replace(
        row.public,
        status=model.STATUS_OF[report.state],
        desired=DesiredState.UP,
        status_reason=RESTORED,
        host_id=host_id,
        epoch=report.epoch,
        runs_with=row.public.runs_with if report.epoch == placement.epoch else None,
        busy_with="",
    )
    private = replace(row.private, saved_path="", saved_host_id="")
    return [
        VMS.update(row, model.with_actions(new), private),
        inv.store.place(placement, epoch=report.epoch, host_id=host_id, state="running", boot_id=boot_id),
        *memory.given_up(inv, row.id, row.private),
    ]


def _at_home(
    inv: Inventory,
    row: Row[Vm, VmPrivate],
    placement: PlacementRow,
    report: DomainReport,
    boot_id: str,
    heard: Heard,
    *,
    full: bool,
) -> None:
    """A domain on the host where its VM belongs."""
    if report.state in ENDED_STATES:
        heard.changes += _ended_at_home(inv, row, placement, report, boot_id, full=full)
    elif report.epoch != placement.epoch:
        if placement.state == "running" and not row.public.busy_with:
            inv.core.wake(f"behind/{row.id}")
    else:
        heard.changes += _alive(inv, row, placement, report)
        if placement.state == "running" and placement.boot_id != boot_id:
            heard.running.append((placement, boot_id))


def _ended_at_home(
    inv: Inventory,
    row: Row[Vm, VmPrivate],
    placement: PlacementRow,
    report: DomainReport,
    boot_id: str,
    *,
    full: bool,
) -> list[Change]:
    if placement.state == "starting" and (full or report.epoch != placement.epoch):
        return []  # the order that starts it is still under way
    if report.epoch not in (-1, placement.epoch):
        return []
    end = end_of(report.reason, row.public.status_reason)
    if full and placement.boot_id not in ("", boot_id):
        end = End.HOST_DIED
    if row.public.status is VmStatus.SAVING_STATE and end is not End.HOST_DIED:
        return []  # its operation writes where the memory is
    return ended(inv, row, placement, end, boot_id)


def _alive(
    inv: Inventory, row: Row[Vm, VmPrivate], placement: PlacementRow, report: DomainReport
) -> list[Change]:
    vm = row.public
    status = model.STATUS_OF[report.state]
    if vm.status in (VmStatus.POWERING_DOWN, VmStatus.SAVING_STATE) and status is VmStatus.UP:
        status = vm.status
    if vm.status in (VmStatus.WAIT_FOR_LAUNCH, VmStatus.RESTORING_STATE) and placement.state == "starting":
        status = vm.status  # its operation says when it is up
    if not report.responsive:
        status = VmStatus.NOT_RESPONDING
    said = REASONS.get(report.reason, report.reason)
    reason = said if status in (VmStatus.PAUSED, VmStatus.NOT_RESPONDING) else vm.status_reason
    if status is VmStatus.UP and reason != RESTORED:
        reason = ""
    known = vm.guest
    guest = GuestInfo(
        agent_connected=report.agent_connected,
        hostname=report.hostname or known.hostname,
        ip_addresses=report.ip_addresses or (known.ip_addresses if report.agent_connected else ()),
        os=report.guest_os or known.os,
    )
    new = model.with_actions(replace(vm, status=status, status_reason=reason, guest=guest))
    private = replace(
        row.private,
        had_agent=row.private.had_agent or report.agent_connected,
        killing=row.private.killing and status in (VmStatus.PAUSED, VmStatus.NOT_RESPONDING),
        unplugging=late_unplug.waited_for(vm, row.private),
    )
    if late_unplug.gone(private.unplugging, report):
        inv.core.wake(f"unplugged/{vm.id}")
    if new == vm and private == row.private:
        return []
    return [VMS.update(row, new, private)]


async def _external(
    inv: Inventory, host_id: str, row: Row[Vm, VmPrivate] | None, report: DomainReport
) -> list[Change]:
    """A domain that isn't ours, or that a restored database has forgotten: shown, left alone, and gone from the
    list when it ends."""
    if row is None:
        if report.state in ENDED_STATES:
            return []
        found = await HOSTS.find(inv.core.pool, host_id)
        if found is None:
            return []
        host, now = found.public, utc_now()
        vm = Vm(
            id=report.vm_id,
            revision=1,
            created_at=now,
            updated_at=now,
            name=report.name,
            cluster_id=host.cluster_id,
            data_center_id=host.data_center_id,
            status=model.STATUS_OF[report.state],
            desired=DesiredState.UP,
            host_id=host_id,
            memory_bytes=report.memory_bytes,
            vcpus=max(report.vcpus, 1),
            hugepage_kib=report.hugepage_kib,
            external=True,
        )
        return [_recount(inv, host_id, VMS.insert(vm, VmPrivate()))]
    if report.state in ENDED_STATES:
        return [_recount(inv, host_id, VMS.delete(row))] if row.public.host_id == host_id else []
    new = replace(row.public, status=model.STATUS_OF[report.state], host_id=host_id)
    return [VMS.update(row, new)] if new != row.public else []


def _recount(inv: Inventory, host_id: str, change: Change) -> Change:
    return change.and_then(lambda: inv.core.wake(f"host/{host_id}"))


@part.hears_hosts(DOMAIN_EVENT_HAPPENED)
async def event_happened(inv: Inventory, fact: DomainEventHappened) -> Sequence[Change]:
    """Events that are no state: kept as the VM's reason where a person would look for it."""
    row = await VMS.find(inv.core.pool, fact.vm_id)
    if row is None or row.public.external:
        return ()
    if fact.event == "device_removed" and row.private.unplugging:
        inv.core.wake(f"boot/{fact.host_id}")  # its report says which devices there are
    reasons = {"io_error": "io_error", "watchdog": "watchdog", "panic": "panic"}
    reason = reasons.get(fact.event)
    if reason is None or row.public.status_reason == reason:
        return ()
    return [VMS.update(row, replace(row.public, status_reason=reason))]


@part.hears_together(LIVENESS_CHANGED)
async def liveness_changed(inv: Inventory, said: Sequence[Said]) -> Sequence[Change]:
    """ha's word on hosts; a host's VMs are unknown while it is silent, and nothing starts them elsewhere. Raises Apart when
    they have too many VMs for one statement."""
    facts: list[HostLiveness] = newest(said)
    ids = [fact.id for fact in facts]
    hosts = await reported_store.hosts_with(inv.store, ids)
    vms = await reported_store.vms_by_host(inv.store, ids)
    changes: list[Change] = []
    for fact in facts:
        if (row := hosts.get(fact.id)) is not None:
            changes += await _heard_of(inv, fact, row, vms.get(fact.id, ()))
    if len(said) > 1 and len(changes) > MOST_CHANGES:
        raise Apart
    return changes


async def _heard_of(
    inv: Inventory, fact: HostLiveness, row: Row[Host, HostPrivate], vms: Sequence[Row[Vm, VmPrivate]]
) -> list[Change]:
    word = "up" if fact.state == "unknown" else str(fact.state)
    if row.private.liveness == word:
        return []
    private = replace(row.private, liveness=word)
    host = model.host_with_status(
        row.public, word, private.maintenance, model.is_leaving(row.public), inv.config
    )
    changes = [HOSTS.update(row, host, private)]
    for vm in vms:
        changes += _vm_of_silent(vm, word)
    if word == "up":
        await inv.core.hosts.ask_report(fact.id)
    return changes


def _vm_of_silent(row: Row[Vm, VmPrivate], word: str) -> list[Change]:
    vm = row.public
    if word in ("non_responsive", "dead") and vm.status in model.RUNNING | {
        VmStatus.PAUSED,
        VmStatus.POWERING_DOWN,
    }:
        return [VMS.update(row, model.with_actions(replace(vm, status=VmStatus.UNKNOWN)))]
    if word == "up" and vm.status is VmStatus.UNKNOWN:
        return [VMS.update(row, model.with_actions(replace(vm, status=VmStatus.UP)))]
    return []


@part.hears(OPERATION_CHANGED[Owner.STORAGE])
async def storage_operation_changed(inv: Inventory, fact: Operation) -> None:
    _tell(inv, fact)


@part.hears(OPERATION_CHANGED[Owner.NETWORK])
async def network_operation_changed(inv: Inventory, fact: Operation) -> None:
    _tell(inv, fact)


def _tell(inv: Inventory, fact: Operation) -> None:
    waiting = inv.foreign.get(fact.id)
    if waiting is not None and fact.state in ENDED:
        waiting.set()
