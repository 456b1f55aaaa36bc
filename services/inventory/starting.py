"""How a VM comes to run: a claim, its disks and networks there, the order; another host when one fails.

Each attempt raises the epoch, in the transaction that decides it. A host that failed is told to forget the VM at
that epoch before another one is tried, so that nothing of the attempt can wake up later.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from msgspec.structs import replace

from services.inventory import (
    choosing,
    giving_up,
    holders,
    host_devices,
    leases,
    memory,
    model,
    restored,
    undying,
)
from services.inventory.desk import Inventory
from services.inventory.specs import disk_ids, domain_spec, need_of
from services.inventory.store import VMS, VmPrivate
from services.inventory.turns import Spot
from volery.contracts.base import Message
from volery.contracts.domain import DomainSpec
from volery.contracts.domain_orders import RUN_DOMAIN, RunDomain
from volery.contracts.errors import Kind, Refused, conflict
from volery.contracts.leases import FREE_LATER
from volery.contracts.operation import Operation
from volery.contracts.scheduling import (
    CONFIRM_CLAIM,
    PLACE,
    ClaimKey,
    Place,
    Placement,
    Purpose,
)
from volery.contracts.storage import REACH_DISKS, ReachDisks
from volery.contracts.together import Work
from volery.contracts.vm import (
    RESTART_VM,
    START_VM,
    DesiredState,
    RestartVm,
    RunOnce,
    StartVm,
    Vm,
    VmStatus,
)
from volery.runtime import checks
from volery.runtime.bus import LOST, Caller
from volery.runtime.clock import utc_now
from volery.runtime.run import Run, Then
from volery.runtime.service import Part
from volery.runtime.tables import Change, Row, Stale

log = logging.getLogger(__name__)
part = Part()

MAX_HOSTS = 3
"""Hosts that are tried before a start fails (oVirt: NumberOfFailedRunsOnVds)."""
HOPELESS = {Kind.INVALID, Kind.FORBIDDEN, Kind.INTERNAL}
"""A refusal that no other host would answer otherwise, unless it is the host's own: hosts differ in their QEMU."""

CHOOSING, PREPARING = "Choosing a host", "Preparing disks and networks"


class Starting(Message):
    """What a start works on."""

    vm_id: str
    host_id: str = ""
    run_once: RunOnce | None = None
    purpose: Purpose = Purpose.START
    preferred_host_id: str = ""
    avoided_host_ids: tuple[str, ...] = ()
    priority: int = 0
    """Of a restart, among others."""


@part.answers(START_VM)
async def start_vm(inv: Inventory, ask: StartVm, caller: Caller) -> Operation:
    while True:
        row = await VMS.get(inv.core.pool, ask.id)
        vm = row.public
        checks.revision(vm, ask.if_revision, "VM")
        if ask.host_id:
            checks.object_id(ask.host_id, "host")
        if not ask.dry_run:  # where it could run may be asked of a running one too
            await holders.check_action(inv, vm, "start")
        host_id = only_host(row, ask.host_id, ask.run_once)
        await restored.refuse_old_memory(inv, row)
        op, begun = inv.core.operations.begin(
            "vm.start",
            object_kind="vm",
            object_id=vm.id,
            object_name=vm.name,
            question=Starting(vm_id=vm.id, host_id=host_id, run_once=ask.run_once),
            caller=caller,
        )
        if ask.dry_run:
            plan = await _plan(inv, vm, replace(ask, host_id=host_id), caller)
            return replace(op, id="", result={"placement": plan})
        new = replace(
            vm if row.private.saved_path else await leases.at_start(inv, vm),
            desired=DesiredState.UP,
            status=VmStatus.RESTORING_STATE if row.private.saved_path else VmStatus.WAIT_FOR_LAUNCH,
            busy_with=op.id,
            restarts=0,
            fits_nowhere="",
            allowed_actions=(),
        )
        private = replace(row.private, stop_asked=False, run_once=ask.run_once)
        try:
            await inv.core.commit(VMS.update(row, new, private), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


def only_host(row: Row[Vm, VmPrivate], asked: str, once: RunOnce | None) -> str:
    """The only host on which it may start; "" for any. Memory that was saved is a file of its host: elsewhere there is
    none, or an older one, which would be restored onto disks that have changed since. libvirt shows what it restores paused
    as it shows what waits for a migration, which nobody may resume."""
    saved_at = row.private.saved_host_id if row.private.saved_path else ""
    if row.private.saved_path and once is not None and once.paused:
        raise conflict(
            f"VM {row.public.name} is suspended, and goes on running from its memory: start it without `paused`, and pause it then"
        )
    if asked and saved_at and asked != saved_at:
        raise conflict(
            f"VM {row.public.name} is suspended, and its memory is on host {saved_at}: start it there, or stop it first, "
            "to give its memory up",
            host_id=saved_at,
        )
    return asked or saved_at


async def _plan(inv: Inventory, vm: Vm, ask: StartVm, caller: Caller) -> Placement:
    question = Place(
        need=await need_of(inv, vm, caller, ask.run_once, vm.runs_with),
        epoch=vm.epoch + 1,
        target_host_id=ask.host_id,
        dry_run=True,
    )
    return await inv.core.bus.ask(PLACE, question, Caller(caller.principal))


@part.answers(RESTART_VM)
async def restart_vm(inv: Inventory, ask: RestartVm, caller: Caller) -> Operation:
    """ha asks, because the VM's own host said that its QEMU ended, or the boot under which it ran has by proof."""
    while True:
        row, placement = await inv.store.placed(ask.vm_id)
        vm = row.public
        if vm.desired is not DesiredState.UP or vm.status is not VmStatus.DOWN or placement.state != "none":
            raise conflict(
                f"VM {vm.name} is {vm.status} and wanted {vm.desired}; there is nothing to restart",
                status=vm.status,
            )
        await holders.check_restart(inv, vm)
        if ask.epoch and ask.epoch != placement.epoch:
            raise conflict(f"VM {vm.name} has been placed since (epoch {placement.epoch}, not {ask.epoch})")
        op, begun = inv.core.operations.begin(
            "vm.restart",
            object_kind="vm",
            object_id=vm.id,
            object_name=vm.name,
            question=Starting(
                vm_id=vm.id,
                host_id=ask.only_host_id,
                purpose=Purpose.RESTART,
                preferred_host_id=ask.preferred_host_id,
                avoided_host_ids=ask.avoided_host_ids,
                priority=vm.high_availability.priority,
            ),
            caller=caller,
        )
        new = replace(
            await leases.at_start(inv, vm),
            status=VmStatus.WAIT_FOR_LAUNCH,
            status_reason=ask.reason,
            busy_with=op.id,
            restarts=vm.restarts + 1,
            allowed_actions=(),
        )
        try:
            await inv.core.commit(VMS.update(row, new), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.runs("vm.start", deadline_seconds=600)
async def start(inv: Inventory, run: Run) -> None:
    await bring_up(inv, run, run.input(Starting))


@part.runs("vm.restart", deadline_seconds=600)
async def restart(inv: Inventory, run: Run) -> None:
    await bring_up(inv, run, run.input(Starting))


async def bring_up(inv: Inventory, run: Run, ask: Starting) -> None:
    """Try hosts until one runs the VM. Raises Refused with every host's reason.

    Once it runs nothing takes it back: neither a claim that can't be confirmed, nor a cancellation or deadline.
    """
    if run.goes_only_forward:
        await _confirm(inv, run, ask.vm_id)
        return
    await restored.refuse_running(inv, run, ask.vm_id)

    async def down() -> None:
        await _stay_down(inv, run, ask)

    run.undo("state", down)
    restored.refuse_half_done(run, "no host runs this VM; start it again")
    excluded: list[str] = []
    reasons: list[str] = []
    for attempt in range(MAX_HOSTS):
        async with _turn(inv, ask, [Spot("scheduler", "")]):
            epoch = await run.write(
                f"epoch-{attempt}",
                "Deciding",
                lambda: _raised_epoch(inv, ask.vm_id),
                int,
                then=_choosing(attempt),
            )
            placed = await _place(inv, run, ask, attempt, epoch, tuple(excluded))
        if not placed.host_id:
            await giving_up.release_claim(inv, run, ask.vm_id, epoch)
            await _say_why(inv, ask.vm_id, placed.message)
            tried = f" Tried already: {'; '.join(reasons)}." if reasons else ""
            raise Refused(Kind.EXHAUSTED, f"{placed.message}{tried}", placement=placed, tried=len(reasons))
        try:
            await _run_on(inv, run, ask, attempt, epoch, placed)
        except Refused as refused:
            if refused.details.get(LOST):
                raise  # another service's silence is no fault of this host
            log.info("attempt %d on %s: %s", attempt, placed.host_id, refused.message)
            await giving_up.give_up_host(inv, run, ask.vm_id, attempt, epoch, placed.host_id)
            excluded.append(placed.host_id)
            reasons.append(f"{_host_name(placed)}: {refused.message}")
            hopeless = refused.kind in HOPELESS and "outcome" not in refused.details
            hopeless = hopeless or refused.details.get("rule") in FREE_LATER
            if hopeless or ask.host_id or attempt == MAX_HOSTS - 1:
                raise Refused(refused.kind, "; ".join(reasons), **refused.details) from None
            continue
        await _confirm(inv, run, ask.vm_id)
        return


def _choosing(attempt: int) -> Then:
    return lambda _: (f"place-{attempt}", CHOOSING)


async def _say_why(inv: Inventory, vm_id: str, message: str) -> None:
    """On the VM itself, for as long as it doesn't run."""
    while True:
        row = await VMS.get(inv.core.pool, vm_id)
        if row.public.fits_nowhere == message:
            return
        try:
            await inv.core.commit(VMS.update(row, replace(row.public, fits_nowhere=message)))
        except Stale:
            continue
        return


def _host_name(placed: Placement) -> str:
    return next((h.name for h in placed.hosts if h.host_id == placed.host_id and h.name), placed.host_id)


async def _raised_epoch(inv: Inventory, vm_id: str) -> tuple[int, list[Change]]:
    """The epoch of the next attempt, and the changes that raise it."""
    row, before = await inv.store.placed(vm_id)
    epoch = await inv.store.next_epoch(before)
    return epoch, [
        inv.store.place(before, epoch=epoch, host_id="", state="starting"),
        VMS.update(row, replace(row.public, epoch=epoch, host_id="")),
    ]


async def _place(
    inv: Inventory, run: Run, ask: Starting, attempt: int, epoch: int, excluded: tuple[str, ...]
) -> Placement:
    """The scheduler's decision, and the VM's row saying so."""

    async def place() -> Placement:
        row = await VMS.get(inv.core.pool, ask.vm_id)
        vm, shape = row.public, row.public.runs_with if row.private.saved_path else None
        silent = await choosing.silent_hosts(inv, ask.purpose, vm.cluster_id)
        question = Place(
            need=await need_of(inv, vm, run.caller, ask.run_once, shape),
            epoch=epoch,
            purpose=ask.purpose,
            excluded_host_ids=(*excluded, *silent),
            target_host_id=ask.host_id,
            preferred_host_id=ask.preferred_host_id,
            avoided_host_ids=ask.avoided_host_ids,
            operation_id=run.id,
        )
        return await choosing.choose_host(inv, run, f"place-{attempt}", question)

    async def settle(placed: Placement) -> list[Change]:
        return await _host_set(inv, ask.vm_id, epoch, placed) if placed.host_id else []

    def then(placed: Placement) -> tuple[str, str] | None:
        return (f"prepare-{attempt}", PREPARING) if placed.host_id else None

    return await run.step(f"place-{attempt}", CHOOSING, place, Placement, follows=settle, then=then)


def with_given(vm: Vm, placed: Placement) -> Vm:
    """As it starts on the host that was chosen, with what it gets of it."""
    return replace(vm, host_id=placed.host_id, runs_with=placed.shape, given_devices=placed.devices)


async def _host_set(inv: Inventory, vm_id: str, epoch: int, placed: Placement) -> list[Change]:
    row, before = await inv.store.placed(vm_id)
    if before.epoch != epoch or before.state != "starting":
        raise conflict(f"the placement of this VM changed meanwhile (epoch {before.epoch}, not {epoch})")
    host_id = placed.host_id
    if not await inv.store.is_in_use(host_id):
        return []  # it was taken out of use since it was chosen: another one is tried
    return [
        inv.store.takes_vms(host_id),
        inv.store.place(before, epoch=epoch, host_id=host_id, state="starting"),
        VMS.update(row, with_given(row.public, placed)),
    ]


async def _run_on(
    inv: Inventory, run: Run, ask: Starting, attempt: int, epoch: int, placed: Placement
) -> None:
    host_id = placed.host_id
    row, placement = await inv.store.placed(ask.vm_id)
    if placement.host_id != host_id:
        raise conflict("it goes into maintenance or falls asleep to save power, and takes no VMs")
    once, prepared = ask.run_once, list[DomainSpec]()

    async def prepare() -> None:
        host_devices.check_given(row.public, placed.devices)
        had = (placed.cpus, placed.shape, placed.devices)
        work = Work.RESTART if ask.purpose is Purpose.RESTART else Work.START
        prepared.append(await domain_spec(inv, row.public, host_id, once, run.caller, *had, work=work))

    async def question() -> RunDomain:
        await run.step(f"prepare-{attempt}", PREPARING, prepare)
        # Done before a crash: the spec holds secrets, so it isn't recorded with the operation.
        if not prepared:
            await prepare()
        return RunDomain(
            vm_id=ask.vm_id,
            spec=prepared[-1],
            paused=bool(once and once.paused),
            restore_path=row.private.saved_path,
        )

    async with _turn(inv, ask, await _places(inv, run, ask, row.public, host_id)):
        await run.order(f"run-{attempt}", "Starting QEMU", RUN_DOMAIN, question, host_id=host_id, epoch=epoch)
    boot_id = await inv.core.orders.ended_under(run.order_id(f"run-{attempt}"))
    await _settle_running(inv, run, ask, epoch, host_id, boot_id)
    if not boot_id:
        await inv.core.hosts.ask_report(host_id)  # says under which boot it runs, if it still does


@asynccontextmanager
async def _turn(inv: Inventory, ask: Starting, places: Sequence[Spot]) -> AsyncIterator[None]:
    """What is brought back by itself waits its turn; what a person starts doesn't."""
    if ask.purpose is not Purpose.RESTART:
        yield
        return
    async with inv.turns.turn(places, ask.priority, inv.config):
        yield


async def _places(inv: Inventory, run: Run, ask: Starting, vm: Vm, host_id: str) -> list[Spot]:
    """Of whom a restart on this host takes something: the host and its storage."""
    places = [Spot("host", host_id)]
    if ask.purpose is Purpose.RESTART and (ids := disk_ids(vm)):
        reach = await inv.core.bus.ask(REACH_DISKS, ReachDisks(disk_ids=ids), run.caller)
        places += [Spot("storage_domain", domain_id) for domain_id in reach.domain_ids]
    return places


async def _settle_running(
    inv: Inventory, run: Run, ask: Starting, epoch: int, host_id: str, boot_id: str
) -> None:
    """The host said that QEMU runs. It may have ended again since: then its fact was here first."""
    while True:
        row, before = await inv.store.placed(ask.vm_id)
        vm = row.public
        if before.epoch != epoch or before.state == "none":
            raise conflict(
                f"VM {vm.name} started on its host and ended at once ({vm.status_reason or 'no reason given'}); "
                "look at its console log there"
            )
        paused = bool(ask.run_once and ask.run_once.paused)
        status = VmStatus.PAUSED if paused else VmStatus.UP
        if vm.status in model.RUNNING | {VmStatus.PAUSED}:
            status = vm.status
        new = model.with_actions(
            replace(
                vm,
                status=status,
                status_reason="",
                fits_nowhere="",
                host_id=host_id,
                next_run=bool(vm.next_lease),
                started_at=utc_now(),
            )
        )
        private = replace(row.private, saved_path="", saved_host_id="", run_once=None)
        try:
            await run.only_forward(
                inv.store.place(before, epoch=epoch, host_id=host_id, state="running", boot_id=boot_id),
                VMS.update(row, new, private),
                *memory.given_up(inv, row.id, row.private),  # its host has removed it, if it could
            )
        except Stale:
            continue
        return


async def _confirm(inv: Inventory, run: Run, vm_id: str) -> None:
    """The VM runs, whatever the scheduler says: a claim that is gone is made again from what hosts report, and one
    that can't be confirmed now is confirmed by reconciling."""
    placement = await inv.store.placement(vm_id)
    question = ClaimKey(vm_id=vm_id, epoch=placement.epoch)
    try:
        await inv.core.bus.ask(CONFIRM_CLAIM, question, run.caller_for(f"confirm-{placement.epoch}"))
    except Refused as refused:
        log.info("the claim of VM %s is confirmed later: %s", vm_id, refused.message)
        inv.core.wake(f"claims/{vm_id}")


async def _stay_down(inv: Inventory, run: Run, ask: Starting) -> None:
    """The start failed or was cancelled: wherever it was tried, it is ended, and the VM is down."""
    placement = await inv.store.placement(ask.vm_id)
    if placement.state in ("starting", "running") and placement.host_id:
        attempts = [n for n in range(MAX_HOSTS) if await inv.core.orders.exists(run.order_id(f"run-{n}"))]
        try:
            if attempts:
                await giving_up.give_up_host(
                    inv, run, ask.vm_id, attempts[-1], placement.epoch, placement.host_id
                )
            else:
                await giving_up.release_claim(inv, run, ask.vm_id, placement.epoch)
        except Refused as refused:
            if not undying.is_undying(refused):
                raise
            boot_id = await inv.core.orders.ended_under(run.order_id(f"forget-{attempts[-1]}"))
            wanted = ask.purpose is Purpose.RESTART
            await undying.stays(inv, ask.vm_id, placement, boot_id, wanted=wanted)
            return
    while True:
        before = await inv.store.placement(ask.vm_id)
        row = await VMS.find(inv.core.pool, ask.vm_id)
        if row is None:
            return
        saved = bool(row.private.saved_path)
        wanted = row.public.high_availability.enabled or row.public.start_after_blackout is True
        restarting = ask.purpose is Purpose.RESTART and wanted
        new = model.with_actions(
            replace(
                row.public,
                status=VmStatus.SUSPENDED if saved else VmStatus.DOWN,
                desired=DesiredState.UP if restarting else DesiredState.DOWN,
                status_reason=row.public.status_reason or "crashed" if restarting else "start_failed",
                host_id="",
            )
        )
        try:
            await inv.core.commit(
                inv.store.place(before, epoch=before.epoch, host_id="", state="none"),
                VMS.update(row, new),
            )
        except Stale:
            continue
        return
