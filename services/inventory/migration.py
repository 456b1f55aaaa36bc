"""Live migration: the destination gets the next epoch, the source keeps its own until QEMU there has ended.

While it moves, both hosts may run the VM and nothing starts it elsewhere. A migration whose outcome the source
can't tell is settled by what both hosts report. One that failed gives the source an epoch above the destination's.
"""

from __future__ import annotations

from msgspec.structs import replace

from services.inventory import choosing, holders, model, resizing, restored
from services.inventory.desk import Inventory
from services.inventory.endings import down, in_blackout
from services.inventory.giving_up import release_claim
from services.inventory.specs import domain_spec, need_of
from services.inventory.stop_table import End
from services.inventory.store import CLUSTERS, HOSTS, VMS
from volery.contracts.agent import DomainReport, OrderProgressed
from volery.contracts.base import Message
from volery.contracts.domain import DomainSpec, DomainState
from volery.contracts.domain_orders import (
    ADMIT_MIGRATION,
    FORGET_DOMAIN,
    MIGRATE_DOMAIN,
    RUN_DOMAIN,
    AdmitMigration,
    ForgetDomain,
    MigrateDomain,
    RunDomain,
)
from volery.contracts.errors import Kind, Refused, conflict
from volery.contracts.host import Host
from volery.contracts.operation import Operation
from volery.contracts.plan import LEAVING
from volery.contracts.scheduling import PLACE, Place, Placement, Purpose
from volery.contracts.together import Work
from volery.contracts.vm import MIGRATE_VM, MigrateVm, Vm, VmStatus
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.deaths import host_died
from volery.runtime.run import CancelRequested, Run
from volery.runtime.service import Part
from volery.runtime.tables import Change, Stale

part = Part()

STILL_THERE = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUTTING_DOWN})
"""States at the source in which a migration that failed leaves the VM where it was."""


class Moving(Message):
    """What a migration decided first."""

    source_id: str
    source_epoch: int
    epoch: int
    source_boot_id: str = ""
    """Under which it runs there; "" when nobody has said so yet."""


@part.answers(MIGRATE_VM)
async def migrate_vm(inv: Inventory, ask: MigrateVm, caller: Caller) -> Operation:
    checks.between(ask.timeout_seconds, 5, 86400, "timeout_seconds", "seconds")
    while True:
        row = await VMS.get(inv.core.pool, ask.id)
        vm = row.public
        checks.revision(vm, ask.if_revision, "VM")
        await holders.check_action(inv, vm, "migrate")
        if not vm.migration.allowed:
            raise conflict(f"VM {vm.name} may not be migrated; its migration policy says so", vm_id=vm.id)
        if ask.host_id:
            checks.object_id(ask.host_id, "host")
            if ask.host_id == vm.host_id:
                raise conflict(f"VM {vm.name} runs on that host already", host_id=ask.host_id)
        op, begun = inv.core.operations.begin(
            "vm.migrate",
            object_kind="vm",
            object_id=vm.id,
            object_name=vm.name,
            question=ask,
            caller=caller,
            deadline_seconds=ask.timeout_seconds + 120,
        )
        if ask.dry_run:
            question = Place(
                need=await need_of(inv, vm, caller, shape=resizing.kept(vm)),
                epoch=vm.epoch + 1,
                purpose=Purpose.MIGRATE,
                excluded_host_ids=(vm.host_id,),
                target_host_id=ask.host_id,
                dry_run=True,
            )
            plan = await inv.core.bus.ask(PLACE, question, Caller(caller.principal))
            return replace(op, id="", result={"placement": plan})
        new = replace(vm, status=VmStatus.MIGRATING, busy_with=op.id, allowed_actions=())
        try:
            await inv.core.commit(VMS.update(row, new), begun, caller=caller, answer=op)
        except Stale:
            continue
        return op


@part.runs("vm.migrate", deadline_seconds=1200)
async def migrate(inv: Inventory, run: Run) -> None:
    ask = run.input(MigrateVm)

    run.undo("status", lambda: _stay(inv, ask.id))
    if (await inv.store.placement(ask.id)).state != "moving":
        restored.refuse_half_done(
            run, "look where the VM runs now, and migrate it again if it isn't there yet"
        )
    moving = await run.write("epoch", "Deciding", lambda: _begin_move(inv, ask.id), Moving)
    run.undo("epoch", lambda: _give_back(inv, run, ask.id, moving))
    placed = await _choose(inv, run, ask, moving)
    run.undo("claim", lambda: release_claim(inv, run, ask.id, moving.epoch))
    source = (await HOSTS.get(inv.core.pool, moving.source_id)).public
    target = (await HOSTS.get(inv.core.pool, placed.host_id)).public
    await run.step("move", "Reserving the destination", lambda: _destined(inv, ask.id, moving, target.id))
    vm = (await VMS.get(inv.core.pool, ask.id)).public
    spec = await inv.once_free(
        lambda: domain_spec(
            inv, vm, target.id, None, run.caller, placed.cpus, placed.shape, work=Work.MIGRATE
        )
    )
    run.undo("destination", lambda: _forget(inv, run, ask.id, moving, target.id))
    admitted = await run.order(
        "admit",
        f"Preparing {target.name}",
        ADMIT_MIGRATION,
        AdmitMigration(vm_id=vm.id, spec=spec),
        host_id=target.id,
        epoch=moving.epoch,
    )
    await _transfer(inv, run, ask, vm, spec, moving, source, target, admitted.shared_cpus)
    # From here on it is at the destination, whatever happens to us.
    for undo in ("destination", "claim", "epoch", "status"):
        run.undone(undo)
    await _arrived(inv, ask.id, moving, target.id)


async def _begin_move(inv: Inventory, vm_id: str) -> tuple[Moving, list[Change]]:
    """From where it moves, under which epoch, and the changes that begin it."""
    before = await inv.store.placement(vm_id)
    if before.state != "running":
        raise conflict(f"this VM is not settled on a host ({before.state}); try again when it runs")
    row = await VMS.get(inv.core.pool, vm_id)
    epoch = await inv.store.next_epoch(before)
    moving = Moving(
        source_id=before.host_id,
        source_epoch=before.epoch,
        epoch=epoch,
        source_boot_id=before.boot_id,
    )
    return moving, [
        inv.store.place(before, epoch=epoch, host_id=before.host_id, state="moving", boot_id=before.boot_id),
        VMS.update(row, replace(row.public, epoch=epoch)),
    ]


async def _choose(inv: Inventory, run: Run, ask: MigrateVm, moving: Moving) -> Placement:
    async def place() -> Placement:
        vm = (await VMS.get(inv.core.pool, ask.id)).public
        question = Place(
            need=await need_of(inv, vm, run.caller, shape=resizing.kept(vm)),
            epoch=moving.epoch,
            purpose=Purpose.MIGRATE,
            excluded_host_ids=(moving.source_id,),
            target_host_id=ask.host_id,
            operation_id=run.id,
        )
        return await choosing.choose_host(inv, run, "place", question)

    placed = await run.step("place", "Choosing a host", place, Placement)
    if not placed.host_id:
        raise Refused(Kind.EXHAUSTED, placed.message, placement=placed)
    return placed


async def _destined(inv: Inventory, vm_id: str, moving: Moving, target_id: str) -> None:
    """From here on the destination may run it too."""
    while True:
        before = await inv.store.placement(vm_id)
        if not await inv.store.is_in_use(target_id):
            raise conflict(
                "the destination goes into maintenance or falls asleep to save power, and takes no VMs",
                host_id=target_id,
                rule=LEAVING,
            )
        change = inv.store.place(
            before,
            epoch=moving.epoch,
            host_id=moving.source_id,
            state="moving",
            destination_id=target_id,
            boot_id=moving.source_boot_id,
        )
        try:
            await inv.core.commit(inv.store.takes_vms(target_id), change)
        except Stale:
            continue
        return


async def _transfer(
    inv: Inventory,
    run: Run,
    ask: MigrateVm,
    vm: Vm,
    spec: DomainSpec,
    moving: Moving,
    source: Host,
    target: Host,
    shared_cpus: tuple[int, ...] | None,
) -> None:
    policy = vm.migration
    cluster = (await CLUSTERS.get(inv.core.pool, vm.cluster_id)).public
    question = MigrateDomain(
        vm_id=vm.id,
        destination_uri=target.capabilities.libvirt_uri,
        destination_address=target.capabilities.migration_address,
        destination_epoch=moving.epoch,
        destination_order_seq=1,
        bandwidth_mib_per_second=ask.bandwidth_mib_per_second
        or policy.bandwidth_mib_per_second
        or cluster.migration_bandwidth_mib_per_second,
        auto_converge=policy.auto_converge if ask.auto_converge is None else ask.auto_converge,
        post_copy=policy.post_copy if ask.post_copy is None else ask.post_copy,
        parallel_connections=policy.parallel_connections,
        max_downtime_ms=ask.max_downtime_ms or policy.max_downtime_ms,
        timeout_seconds=ask.timeout_seconds,
        disks=spec.disks,
        nics=spec.nics,
        cpus=spec.cpus,
        shared_cpus=shared_cpus,
    )

    def progressed(fact: OrderProgressed) -> None:
        run.say_progress("migrate", fact.progress)

    try:
        await run.order(
            "migrate",
            f"Moving from {source.name} to {target.name}",
            MIGRATE_DOMAIN,
            question,
            host_id=source.id,
            epoch=moving.source_epoch,
            on_progress=progressed,
        )
    except (Refused, CancelRequested):
        # Also a migration that was cancelled may have been quicker, and must not be ended where it is now.
        with run.waiting_for_host():
            is_there = await _is_there(inv, vm.id, moving, source.id, target.id)
        if not is_there:
            raise


async def _is_there(inv: Inventory, vm_id: str, moving: Moving, source_id: str, target_id: str) -> bool:
    """Whether the VM has moved, by what both hosts say now: nobody guesses. A source that died by proof need not be
    heard. The destination must be, unless the source runs the VM: it may have arrived there under any boot."""
    await _hear_source(inv, moving)
    here = _seen_at_source(inv, vm_id, moving)
    if here is not None and here.state is DomainState.RUNNING:
        return False

    if not await inv.fresh_report(target_id, lambda: _arrived_and_died(inv, vm_id, moving, target_id)):
        return False
    there = inv.seen.get((target_id, vm_id))
    return has_arrived(here, there, moving.epoch, source_died=_source_died(inv, moving))


def has_arrived(
    here: DomainReport | None, there: DomainReport | None, epoch: int, *, source_died: bool
) -> bool:
    """Whether the VM is at its destination, whole. One whose memory was still on a source that died never will be."""
    if there is None or there.epoch != epoch:
        return False
    if source_died:
        return there.state is DomainState.RUNNING and not there.reason.startswith("postcopy")
    runs_here = here is not None and here.state in (DomainState.RUNNING, DomainState.PAUSED)
    return there.state in (DomainState.RUNNING, DomainState.PAUSED) and not runs_here


def _source_died(inv: Inventory, moving: Moving) -> bool:
    return inv.has_ended(moving.source_id, moving.source_boot_id)


async def _hear_source(inv: Inventory, moving: Moving) -> None:
    await inv.fresh_report(moving.source_id, lambda: _source_died(inv, moving))


def _seen_at_source(inv: Inventory, vm_id: str, moving: Moving) -> DomainReport | None:
    """As its source has it now; nothing, when the boot under which it ran there has ended."""
    return None if _source_died(inv, moving) else inv.seen.get((moving.source_id, vm_id))


def _arrived_and_died(inv: Inventory, vm_id: str, moving: Moving, target_id: str) -> bool:
    """Whether the destination said that it has the VM, and the boot that said so has ended."""
    there = inv.seen.get((target_id, vm_id))
    arrived = there is not None and there.epoch == moving.epoch
    return arrived and inv.has_ended(target_id, inv.boots.get((target_id, vm_id), ""))


async def _arrived(inv: Inventory, vm_id: str, moving: Moving, target_id: str) -> None:
    while True:
        before = await inv.store.placement(vm_id)
        row = await VMS.get(inv.core.pool, vm_id)
        if before.epoch != moving.epoch or before.state != "moving":
            return
        seen = inv.seen.get((target_id, vm_id))
        is_it = seen is not None and seen.epoch == moving.epoch
        paused = is_it and seen is not None and seen.state is DomainState.PAUSED
        # Not known: then the report that is asked for below says it, and until then no proof of death ends the VM.
        boot_id = inv.boots.get((target_id, vm_id), "") if is_it else ""
        new = replace(
            row.public,
            status=VmStatus.PAUSED if paused else VmStatus.UP,
            status_reason="migrated",
            host_id=target_id,
        )
        try:
            await inv.core.commit(
                inv.store.place(
                    before, epoch=moving.epoch, host_id=target_id, state="running", boot_id=boot_id
                ),
                VMS.update(row, new),
            )
        except Stale:
            continue
        await inv.core.hosts.ask_report(target_id)
        return


async def _forget(inv: Inventory, run: Run, vm_id: str, moving: Moving, target_id: str) -> None:
    """No paused incoming domain stays behind. On a destination that died nothing did; should it come to have one under
    another boot, that is a stray under an epoch below the source's."""
    if not await inv.core.orders.exists(run.order_id("admit")):
        return
    try:
        await run.order(
            "forget",
            "Cleaning the destination",
            FORGET_DOMAIN,
            ForgetDomain(vm_id=vm_id),
            host_id=target_id,
            epoch=moving.epoch,
        )
    except Refused as refused:
        if not host_died(refused):
            raise


async def _give_back(inv: Inventory, run: Run, vm_id: str, moving: Moving) -> None:
    """The source goes on, under an epoch above the destination's; or it ended meanwhile, and the VM is down."""
    await _hear_source(inv, moving)
    epoch = moving.epoch + 1
    vm = await _decide_back(inv, vm_id, moving, epoch)
    if vm is None:
        return
    # A disk that just grows is waited for: without this order the host would keep an epoch that nobody believes.
    spec = await inv.once_free(
        lambda: domain_spec(inv, vm, moving.source_id, None, run.caller, work=Work.MIGRATE)
    )
    try:
        await run.order(
            "keep",
            "Keeping it where it was",
            RUN_DOMAIN,
            RunDomain(vm_id=vm_id, spec=spec, goes_on=True),
            host_id=moving.source_id,
            epoch=epoch,
        )
    except Refused:
        # It may have ended just before, as the host said under an epoch that was the VM's no more: a whole report counts.
        await inv.core.hosts.ask_report(moving.source_id)
        raise


async def _decide_back(inv: Inventory, vm_id: str, moving: Moving, epoch: int) -> Vm | None:
    """The VM, where its source is to go on with it under this epoch: also when that was decided by an undoing that was
    interrupted before the source was told."""
    while True:
        before = await inv.store.placement(vm_id)
        row = await VMS.get(inv.core.pool, vm_id)
        if before.state != "moving":
            decided = (before.state, before.epoch, before.host_id) == ("running", epoch, moving.source_id)
            return row.public if decided else None
        here = _seen_at_source(inv, vm_id, moving)
        alive = here is not None and here.state in STILL_THERE
        if alive:
            placed = inv.store.place(
                before, epoch=epoch, host_id=moving.source_id, state="running", boot_id=moving.source_boot_id
            )
            status = inv.running_status(moving.source_id, vm_id)
            new, private = model.with_actions(replace(row.public, status=status)), row.private
        else:
            placed = inv.store.place(before, epoch=epoch, host_id="", state="none")
            died = _source_died(inv, moving) or _arrived_and_died(inv, vm_id, moving, before.destination_id)
            end = End.HOST_DIED if died else End.CRASHED
            blackout = in_blackout(inv, moving.source_id, moving.source_boot_id)
            new, private = down(row.public, row.private, end, blackout=blackout)
        try:
            await inv.core.commit(placed, VMS.update(row, replace(new, epoch=epoch), private))
        except Stale:
            continue
        # Should the destination not have let go of it yet, it is told again.
        inv.core.wake(f"stray/{before.destination_id}/{vm_id}")
        return row.public if alive else None


async def _stay(inv: Inventory, vm_id: str) -> None:
    """It runs on where it was."""
    while True:
        row = await VMS.find(inv.core.pool, vm_id)
        if row is None or row.public.status is not VmStatus.MIGRATING:
            return
        host_id = row.public.host_id
        try:
            status = inv.running_status(host_id, vm_id)
            await inv.core.commit(VMS.update(row, replace(row.public, status=status)))
        except Stale:
            continue
        await inv.core.hosts.ask_report(host_id)
        return
