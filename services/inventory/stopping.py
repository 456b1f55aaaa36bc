"""How a running VM is stopped, suspended, paused, reset: asked of its own host, under its epoch."""

from __future__ import annotations

from msgspec.structs import replace

from services.inventory import holders, memory, model
from services.inventory.desk import Inventory
from services.inventory.store import HOSTS, VMS, PlacementRow
from volery.contracts.domain_orders import (
    ACT_ON_DOMAIN,
    OPEN_CONSOLE,
    SAVE_DOMAIN,
    STOP_DOMAIN,
    UNKILLABLE,
    ActOnDomain,
    DomainAction,
    OpenConsole,
    SaveDomain,
    StopDomain,
    StopMethod,
)
from volery.contracts.errors import Refused, conflict, invalid
from volery.contracts.ids import new_id
from volery.contracts.operation import Operation
from volery.contracts.vm import (
    ACT_ON_VM,
    OPEN_VM_CONSOLE,
    STOP_VM,
    SUSPEND_VM,
    ActOnVm,
    ConsoleTicket,
    DesiredState,
    OpenVmConsole,
    StopVm,
    SuspendVm,
    VmAction,
    VmStatus,
)
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.deaths import host_died
from volery.runtime.run import Run
from volery.runtime.service import Part
from volery.runtime.tables import Stale

part = Part()

DOMAIN_ACTIONS: dict[VmAction, DomainAction] = {
    VmAction.REBOOT: DomainAction.REBOOT,
    VmAction.RESET: DomainAction.RESET,
    VmAction.PAUSE: DomainAction.PAUSE,
    VmAction.UNPAUSE: DomainAction.RESUME,
}
MAX_STOP_SECONDS = 3600.0
STAYS_SHOWN = {VmStatus.SUSPENDED, VmStatus.UNKNOWN}
"""What a VM is shown as also while it is stopped: of one on a silent host nobody knows that it shuts down."""
STOPPABLE = model.RUNNING | {VmStatus.POWERING_DOWN, VmStatus.PAUSED}
STAYS_STUCK = {VmStatus.NOT_RESPONDING, VmStatus.UNKNOWN}
"""What a VM that didn't stop is shown as, also afterwards."""


@part.answers(STOP_VM)
async def stop_vm(inv: Inventory, ask: StopVm, caller: Caller) -> Operation:
    checks.between(ask.timeout_seconds, 1, MAX_STOP_SECONDS, "timeout_seconds", "seconds")
    checks.between(ask.force_after_seconds, 0, MAX_STOP_SECONDS, "force_after_seconds", "seconds")
    while True:
        row = await VMS.get(inv.core.pool, ask.id)
        vm = row.public
        checks.revision(vm, ask.if_revision, "VM")
        await holders.check_action(inv, vm, "stop")
        op, begun = inv.core.operations.begin(
            "vm.stop",
            object_kind="vm",
            object_id=vm.id,
            object_name=vm.name,
            question=ask,
            caller=caller,
            deadline_seconds=2 * (ask.timeout_seconds + ask.force_after_seconds) + 60,
        )
        new = replace(
            vm,
            desired=DesiredState.DOWN,
            status=vm.status if vm.status in STAYS_SHOWN else VmStatus.POWERING_DOWN,
            busy_with=op.id,
            allowed_actions=(),
        )
        forced = ask.force or ask.force_after_seconds > 0
        private = replace(row.private, stop_asked=True, stop_forced=forced)
        try:
            await inv.core.commit(VMS.update(row, new, private), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.runs("vm.stop", deadline_seconds=600)
async def stop(inv: Inventory, run: Run) -> None:
    """From the mildest way on; forced off only if that was asked."""
    ask = run.input(StopVm)
    placement = await inv.store.placement(ask.id)
    if placement.state == "none":
        await _discard_saved(inv, ask.id)
        return

    async def still_up() -> None:
        await _still_up(inv, run, ask.id)

    run.undo("state", still_up)
    await _is_the_same(inv, run, "stop", placement)
    mild = (StopMethod.GUEST_AGENT, StopMethod.ACPI)
    wait = (ask.force_after_seconds or ask.timeout_seconds) / len(mild)
    methods: tuple[StopMethod, ...] = mild
    if ask.force:
        methods = (StopMethod.DESTROY,)
    elif ask.force_after_seconds:
        methods = (*mild, StopMethod.DESTROY)
    try:
        await run.order(
            "stop",
            "Forcing it off" if ask.force else "Asking the guest to shut down",
            STOP_DOMAIN,
            StopDomain(vm_id=ask.id, methods=methods, wait_seconds=wait),
            host_id=placement.host_id,
            epoch=placement.epoch,
        )
    except Refused as refused:
        if not host_died(refused):
            raise
        # It stays asked for, whatever becomes of this operation; and a VM that ended with its host has stopped.
        run.undone("state")
        now = await inv.store.placement(ask.id)
        if (now.epoch, now.state) == (placement.epoch, "running"):
            raise
    await mark_down(inv, ask.id, placement.epoch, "user")


async def _is_the_same(inv: Inventory, run: Run, name: str, placement: PlacementRow) -> None:
    """What a host said of an earlier placement is never taken for an answer about this one. Raises Refused(conflict)."""
    told = await inv.core.orders.epoch_of(run.order_id(name))
    if told is not None and told != placement.epoch:
        raise conflict(
            f"this VM was told to {name} under epoch {told} and runs under epoch {placement.epoch} now, as its host "
            "reported after the database was restored: it runs on; ask again",
            told_epoch=told,
            epoch=placement.epoch,
        )


async def mark_down(inv: Inventory, vm_id: str, epoch: int, reason: str) -> None:
    """The host said that this epoch's domain has ended. Nothing to do if its fact came first."""
    while True:
        before = await inv.store.placement(vm_id)
        row = await VMS.find(inv.core.pool, vm_id)
        if row is None or before.epoch != epoch or before.state == "none":
            return
        new = model.with_actions(
            replace(
                row.public,
                status=VmStatus.DOWN,
                status_reason=reason,
                host_id="",
                guest=replace(row.public.guest, agent_connected=False, ip_addresses=()),
            )
        )
        try:
            await inv.core.commit(
                inv.store.place(before, epoch=epoch, host_id="", state="none"), VMS.update(row, new)
            )
        except Stale:
            continue
        return


async def _still_up(inv: Inventory, run: Run, vm_id: str) -> None:
    """The guest did not stop: it runs on as it was, and is wanted to. A stop that a silent host never answered stays asked
    for, also when it is heard again before this is written, and is asked again; unless a person took it back. So does one
    whose QEMU was killed and ends as soon as it can."""
    by_person, failed = run.row.private.cancelled, run.row.private.failed
    killed = failed is not None and failed.details.get("rule") == UNKILLABLE
    while True:
        row = await VMS.find(inv.core.pool, vm_id)
        placement = await inv.store.placement(vm_id)
        if row is None or placement.state != "running":
            return
        shown, private = row.public.status, row.private
        if shown not in STOPPABLE | STAYS_STUCK:
            return
        status = shown if shown in STAYS_STUCK else inv.running_status(placement.host_id, vm_id)
        desired = DesiredState.PAUSED if status is VmStatus.PAUSED else DesiredState.UP
        unanswered = shown is VmStatus.UNKNOWN or run.operation.outcome_pending
        if not by_person and (unanswered or killed):
            desired = row.public.desired
        else:
            private = replace(private, stop_asked=False)
        new = replace(row.public, status=status, desired=desired)
        if killed and status is not VmStatus.UNKNOWN:
            new = replace(new, status=VmStatus.NOT_RESPONDING, status_reason=UNKILLABLE)
        if (new, private) == (row.public, row.private):
            return
        try:
            await inv.core.commit(VMS.update(row, new, private))
        except Stale:
            continue
        await inv.core.hosts.ask_report(placement.host_id)
        return


async def _discard_saved(inv: Inventory, vm_id: str) -> None:
    """Stopping a suspended VM gives its memory up."""
    while True:
        row = await VMS.get(inv.core.pool, vm_id)
        new = model.with_actions(replace(row.public, status=VmStatus.DOWN, status_reason="user"))
        private = replace(row.private, saved_path="", saved_host_id="")
        try:
            await inv.core.commit(VMS.update(row, new, private), *memory.given_up(inv, vm_id, row.private))
        except Stale:
            continue
        return


@part.answers(ACT_ON_VM)
async def act_on_vm(inv: Inventory, ask: ActOnVm, caller: Caller) -> Operation:
    while True:
        row = await VMS.get(inv.core.pool, ask.id)
        vm = row.public
        checks.revision(vm, ask.if_revision, "VM")
        await holders.check_action(inv, vm, str(ask.action))
        op, begun = inv.core.operations.begin(
            f"vm.{ask.action}",
            object_kind="vm",
            object_id=vm.id,
            object_name=vm.name,
            question=ask,
            caller=caller,
            deadline_seconds=180,
        )
        new = replace(vm, busy_with=op.id, allowed_actions=())
        try:
            await inv.core.commit(VMS.update(row, new), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


async def act(inv: Inventory, run: Run) -> None:
    ask = run.input(ActOnVm)
    placement = await inv.store.placement(ask.id)
    await run.order(
        "act",
        str(ask.action).capitalize(),
        ACT_ON_DOMAIN,
        ActOnDomain(vm_id=ask.id, action=DOMAIN_ACTIONS[ask.action]),
        host_id=placement.host_id,
        epoch=placement.epoch,
    )
    wanted = {
        VmAction.PAUSE: (VmStatus.PAUSED, DesiredState.PAUSED),
        VmAction.UNPAUSE: (VmStatus.UP, DesiredState.UP),
    }.get(ask.action)
    if wanted is None:
        return
    while True:
        row = await VMS.get(inv.core.pool, ask.id)
        if row.public.status not in model.RUNNING | {VmStatus.PAUSED}:
            return
        try:
            await inv.core.commit(
                VMS.update(row, replace(row.public, status=wanted[0], desired=wanted[1], status_reason=""))
            )
        except Stale:
            continue
        return


for _action in VmAction:
    part.runs(f"vm.{_action}", deadline_seconds=180)(act)


@part.answers(SUSPEND_VM)
async def suspend_vm(inv: Inventory, ask: SuspendVm, caller: Caller) -> Operation:
    while True:
        row = await VMS.get(inv.core.pool, ask.id)
        vm = row.public
        checks.revision(vm, ask.if_revision, "VM")
        await holders.check_action(inv, vm, "suspend")
        op, begun = inv.core.operations.begin(
            "vm.suspend",
            object_kind="vm",
            object_id=vm.id,
            object_name=vm.name,
            question=ask,
            caller=caller,
            deadline_seconds=3600,
        )
        new = replace(vm, status=VmStatus.SAVING_STATE, busy_with=op.id, allowed_actions=())
        private = replace(row.private, stop_asked=True)
        try:
            await inv.core.commit(VMS.update(row, new, private), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.runs("vm.suspend", deadline_seconds=3600)
async def suspend(inv: Inventory, run: Run) -> None:
    """Its memory goes to a file on the host; it is resumed there."""
    ask = run.input(SuspendVm)
    placement = await inv.store.placement(ask.id)

    path = memory.name_for(ask.id, run.id)

    async def still_up() -> None:
        await _not_saved(inv, ask.id)

    async def nothing_left() -> None:
        if await inv.core.orders.exists(run.order_id("save")):
            host_id = await inv.core.orders.host_of(run.order_id("save"))
            await inv.core.commit(memory.noted(inv, ask.id, host_id, path))

    run.undo("state", still_up)
    run.undo("memory", nothing_left)
    await _is_the_same(inv, run, "save", placement)
    await run.order(
        "save",
        "Saving its memory",
        SAVE_DOMAIN,
        SaveDomain(vm_id=ask.id, path=path),
        host_id=placement.host_id,
        epoch=placement.epoch,
    )
    # Not where it is placed: after a crash that may be written already, and it is placed nowhere.
    saved_at = await inv.core.orders.host_of(run.order_id("save"))
    while True:
        before = await inv.store.placement(ask.id)
        row = await VMS.get(inv.core.pool, ask.id)
        new = replace(
            row.public,
            status=VmStatus.SUSPENDED,
            desired=DesiredState.SUSPENDED,
            status_reason="saved",
            host_id="",
        )
        private = replace(row.private, saved_path=path, saved_host_id=saved_at, stop_asked=False)
        try:
            await inv.core.commit(
                inv.store.place(before, epoch=before.epoch, host_id="", state="none"),
                VMS.update(row, new, private),
            )
        except Stale:
            continue
        return


async def _not_saved(inv: Inventory, vm_id: str) -> None:
    while True:
        row = await VMS.find(inv.core.pool, vm_id)
        if row is None or row.public.status is not VmStatus.SAVING_STATE:
            return
        host_id = row.public.host_id
        new = replace(row.public, status=inv.running_status(host_id, vm_id))
        try:
            await inv.core.commit(VMS.update(row, new, replace(row.private, stop_asked=False)))
        except Stale:
            continue
        await inv.core.hosts.ask_report(host_id)
        return


CONSOLES = ("serial", "vnc")


@part.leader_answers(OPEN_VM_CONSOLE)
async def open_console(inv: Inventory, ask: OpenVmConsole, caller: Caller) -> ConsoleTicket:
    """Have the VM's host admit one connection. Not an operation: it ends with the connection."""
    if ask.kind not in CONSOLES:
        raise invalid(f"{ask.kind!r} is not a kind of console; there are {', '.join(CONSOLES)}", field="kind")
    vm = (await VMS.get(inv.core.pool, ask.id)).public
    placement = await inv.store.placement(vm.id)
    if vm.status not in model.ALLOWED["console"] or not placement.host_id:
        raise conflict(f"VM {vm.name} is {vm.status}; a console needs a running VM", status=vm.status)
    host = (await HOSTS.get(inv.core.pool, placement.host_id)).public
    ticket = new_id()
    await inv.order_now(
        OPEN_CONSOLE,
        OpenConsole(vm_id=vm.id, ticket=ticket, kind=ask.kind),
        host_id=host.id,
        object_id=vm.id,
        epoch=placement.epoch,
    )
    return ConsoleTicket(ticket=ticket, data_address=host.capabilities.data_address, host_id=host.id)
