"""What hosts say: full reports, and domains that changed. The desired state has the last word on what it means."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from msgspec.structs import replace

from services.inventory import late_unplug, memory, model
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
from volery.contracts.host import Host
from volery.contracts.ids import new_id
from volery.contracts.liveness import LIVENESS_CHANGED, HostLiveness
from volery.contracts.operation import ENDED, OPERATION_CHANGED, Operation
from volery.contracts.vm import DesiredState, GuestInfo, Vm, VmStatus
from volery.runtime.clock import utc_now
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row

log = logging.getLogger(__name__)
part = Part()

ENDED_STATES = {DomainState.SHUTOFF, DomainState.CRASHED, DomainState.GONE}
ALIVE_STATES = {DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUTTING_DOWN, DomainState.PMSUSPENDED}

RESTORED = "restored"
"""The reason of a VM that was taken over as a host reported it: shown until it is stopped or started."""
REASONS = {"ioerror": model.IO_ERROR}
"""libvirt's reason for a pause → what it is called here."""


@part.hears_hosts(HOST_REPORTED)
async def host_reported(inv: Inventory, fact: HostReported) -> Sequence[Change]:
    """The whole truth about a host. What it doesn't name doesn't run there."""
    row = await HOSTS.find(inv.core.pool, fact.host_id)
    if row is None:
        log.warning("host %s reports, but is not known: it was deleted", fact.host_id)
        return ()
    host = row.public
    new_boot = host.boot_id not in ("", fact.boot_id)
    named = {domain.vm_id: domain for domain in fact.domains}
    inv.seen.forget(fact.host_id)
    for domain in fact.domains:
        _see(inv, fact, domain)
    changes: list[Change] = [_host_change(inv, row, fact)]
    for vm_id in await _of_interest(inv, fact.host_id, named):
        gone = DomainReport(
            vm_id=vm_id,
            epoch=-1,
            order_seq=0,
            name="",
            state=DomainState.GONE,
            reason="host_died" if new_boot else "",
        )
        if vm_id not in named and not await _is_missing(inv, fact, vm_id):
            continue
        changes += await _domain(inv, fact, named.get(vm_id, gone), full=True)
    changes[0] = changes[0].and_then(lambda: inv.reported(fact.host_id, fact.asked))
    inv.core.wake(f"host/{fact.host_id}")
    inv.deaf.discard(fact.host_id)
    inv.core.wake(f"memory/{fact.host_id}")
    return changes


async def _is_missing(inv: Inventory, fact: HostReported, vm_id: str) -> bool:
    """Whether a VM that isn't named doesn't run there. One that has just come, and that nobody has seen there yet, may have
    come after this report was made: the host is asked, and a report that answers is believed."""
    placement = await inv.store.placement(vm_id)
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


async def _of_interest(inv: Inventory, host_id: str, named: dict[str, DomainReport]) -> list[str]:
    """VMs that the host names, that should be there, or that were shown there."""
    placed = [p.vm_id for p in await inv.store.placements_on(host_id)]
    shown = [v.id for v in await inv.store.vms_on(host_id)]
    return list(dict.fromkeys([*named, *placed, *shown]))


def _host_change(inv: Inventory, row: Row[Host, HostPrivate], fact: HostReported) -> Change:
    host = replace(
        row.public,
        capabilities=fact.capabilities,
        boot_id=fact.boot_id,
        agent_generation=fact.generation,
        enrolled_at=row.public.enrolled_at or utc_now(),
        vm_count=sum(1 for d in fact.domains if d.state not in ENDED_STATES),
    )
    private = replace(row.private, reported=True)
    preparing = bool(host.busy_with)
    host = model.host_with_status(host, private.liveness, private.maintenance, preparing, inv.config)
    return HOSTS.update(row, host, private)


@part.hears_hosts(DOMAIN_CHANGED)
async def domain_changed(inv: Inventory, fact: DomainChanged) -> Sequence[Change]:
    _see(inv, fact, fact.domain)
    return await _domain(inv, fact, fact.domain, full=False)


def _see(inv: Inventory, fact: FromHost, domain: DomainReport) -> None:
    inv.seen[fact.host_id, domain.vm_id] = domain
    inv.boots[fact.host_id, domain.vm_id] = fact.boot_id


async def _domain(inv: Inventory, fact: FromHost, report: DomainReport, *, full: bool) -> list[Change]:
    host_id, boot_id = fact.host_id, fact.boot_id
    known = await inv.store.domain_on(host_id, report.vm_id)
    if known is None:
        return []  # the host was deleted
    row, placement = known
    if row is None or row.public.external:
        return await _external(inv, host_id, row, report)
    if report.state in ALIVE_STATES and report.epoch > placement.epoch and not inv.core.quarantine.reason:
        await inv.core.quarantine.contradicted(host_id, _why_older(row.public, host_id, report, placement))
    if inv.core.quarantine.reason and report.state in ALIVE_STATES and _is_newer(report, placement):
        return _adopted(inv, row, placement, host_id, report, boot_id)
    if placement.host_id == host_id and placement.state in ("running", "starting"):
        return _at_home(inv, row, placement, report, boot_id, full=full)
    if placement.state == "moving":
        return []  # the migration's operation decides, from both hosts' words
    if report.state in ALIVE_STATES or report.state is DomainState.INCOMING:
        # Runs, or waits to run, where it may not: the host is told to forget it, under an epoch it must obey.
        inv.core.wake(f"stray/{host_id}/{report.vm_id}")
    return []


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
    to run is older than its disks."""
    new = replace(
        row.public,
        status=model.STATUS_OF[report.state],
        desired=DesiredState.UP,
        status_reason=RESTORED,
        host_id=host_id,
        epoch=report.epoch,
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
    *,
    full: bool,
) -> list[Change]:
    """A domain on the host where its VM belongs."""
    if report.state in ENDED_STATES:
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
    if report.epoch != placement.epoch:
        if placement.state == "running" and not row.public.busy_with:
            inv.core.wake(f"behind/{row.id}")
        return []
    changes = _alive(inv, row, placement, report)
    if placement.state == "running" and placement.boot_id != boot_id:
        here = inv.store.place(
            placement, epoch=placement.epoch, host_id=placement.host_id, state="running", boot_id=boot_id
        )
        changes.append(here)
    return changes


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


@part.hears(LIVENESS_CHANGED)
async def liveness_changed(inv: Inventory, fact: HostLiveness) -> Sequence[Change]:
    """ha's word on a host; its VMs are unknown while it is silent, and nothing starts them elsewhere."""
    row = await HOSTS.find(inv.core.pool, fact.id)
    word = "up" if fact.state == "unknown" else str(fact.state)
    if row is None or row.private.liveness == word:
        return ()
    private = replace(row.private, liveness=word)
    host = model.host_with_status(
        row.public, word, private.maintenance, bool(row.public.busy_with), inv.config
    )
    changes = [HOSTS.update(row, host, private)]
    for vm in await inv.store.vms_on(fact.id):
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
