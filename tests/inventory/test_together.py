"""What may happen together with a VM and its host: every cell of the table that inventory decides, by the service itself.

What holds a VM is begun and held where its host, storage or the scheduler would be at work; then the newcomer is asked for.
`CELLS` is what is played here: tests/contracts/test_together.py counts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.inventory.test_snapshots import KINDS, Snapshots, failed, snapshots
from tests.inventory.world import Machine, World, until, world_of
from tests.support.speaker import Speaker
from volery.contracts import together
from volery.contracts.base import Entity
from volery.contracts.cluster import DeleteById
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import (
    ACT_ON_DOMAIN,
    ATTACH_DISK,
    MIGRATE_DOMAIN,
    RUN_DOMAIN,
    SAVE_DOMAIN,
    STOP_DOMAIN,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import MAINTAIN_HOST, HostStatus, MaintainHost
from volery.contracts.ids import new_id
from volery.contracts.operation import Operation, OperationState
from volery.contracts.snapshot import (
    CREATE_SNAPSHOT,
    DELETE_SNAPSHOT,
    REVERT_TO_SNAPSHOT,
    CreateSnapshot,
    RevertToSnapshot,
    SnapshotStatus,
)
from volery.contracts.storage import DELETE_DISK, DetachDiskFrom, PreparedDisks, PrepareDisks
from volery.contracts.together import HELD, TABLE, By, Held, Holder, Outcome, Thing, Work
from volery.contracts.vm import (
    ACT_ON_VM,
    ATTACH_VM_DISK,
    DELETE_VM,
    MIGRATE_VM,
    RESTART_VM,
    START_VM,
    STOP_VM,
    SUSPEND_VM,
    UPDATE_VM,
    ActOnVm,
    AttachVmDisk,
    DeleteVm,
    MigrateVm,
    MigrationPolicy,
    NewDisk,
    RestartVm,
    StartVm,
    StopVm,
    SuspendVm,
    UpdateVm,
    Vm,
    VmAction,
    VmStatus,
)
from volery.contracts.volumes import SnapshotDisks
from volery.runtime.bus import Caller
from volery.runtime.programs import Settings
from volery.runtime.run import Run

W = Work
NEWCOMERS = (
    *(W.START, W.RESTART, W.STOP, W.CONTROL, W.SUSPEND, W.MIGRATE, W.DEVICES, W.EDIT, W.DELETE),
    *(W.SNAPSHOT, W.MERGE),
)
ASKED_OF_RUNNING = (W.STOP, W.CONTROL, W.SUSPEND, W.MIGRATE, W.DEVICES, W.EDIT, W.SNAPSHOT)
HOLDERS = (
    *(W.CREATE, W.START, W.RESTART, W.STOP, W.CONTROL, W.SUSPEND, W.MIGRATE, W.DEVICES, W.DELETE),
    *(W.SNAPSHOT, W.MERGE),
)
DOWN = (W.START, W.DELETE, W.MERGE)
"""Asked of a VM that is down."""
NEVER_MEET: Mapping[tuple[Work, Work], str] = {
    (W.CREATE, W.MERGE): "a VM that is being made has no snapshot yet, and none is made of it meanwhile",
}
"""Holder and newcomer → why one is never there when the other comes. The reason is tested, too."""
OF_DISKS = (W.FILL, W.RESIZE, W.COPY, W.UPLOAD, W.DOWNLOAD, W.REMOVE)
NOT_OPENING = (W.STOP, W.CONTROL, W.SUSPEND, W.EDIT)
CELLS = frozenset(
    [(holder, newcomer) for holder in (*HOLDERS, W.RUN, W.MAINTAIN) for newcomer in (*NEWCOMERS, W.MAINTAIN)]
    + [(holder, newcomer) for holder in OF_DISKS for newcomer in (*NOT_OPENING, W.DELETE, W.MAINTAIN)]
)
GATED = (RUN_DOMAIN, STOP_DOMAIN, ACT_ON_DOMAIN, SAVE_DOMAIN, MIGRATE_DOMAIN, ATTACH_DISK)


@dataclass
class HeldStorage(Snapshots):
    """Storage whose disks may be held: it answers by the table, as the real one does (tests/storage/test_together.py)."""

    holders: dict[str, Holder] = field(default_factory=dict)
    """Disk → who holds it."""
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: what holds them has ended."""
    may_detach: asyncio.Event = field(default_factory=asyncio.Event)
    removed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.may_detach.set()
        self.answers = [
            *self.answers,
            (DELETE_DISK, self._delete),
        ]
        self.runs = [*self.runs, ("disk.held", self._held), ("disk.gone", self._gone)]

    def _refuse(self, work: Work, disk_id: str) -> None:
        held = [self.holders[disk_id]] if disk_id in self.holders else []
        together.refuse(work, Thing(Held.DISK, disk_id, "disk"), held)

    async def _detach(self, _: Speaker, ask: DetachDiskFrom, caller: Caller) -> Entity:
        await self.may_detach.wait()
        return await super()._detach(_, ask, caller)

    async def _disks(self, _: Speaker, ask: PrepareDisks, caller: Caller) -> PreparedDisks:
        for disk_id in ask.disk_ids:
            self._refuse(ask.work, disk_id)
        return await super()._disks(_, ask, caller)

    async def _ask(self, _: Speaker, ask: Any, caller: Caller) -> Operation:
        new = isinstance(ask, SnapshotDisks)
        for disk_id in ask.disk_ids if new else [disk.id for disk in self.of(ask.snapshot_id)]:
            self._refuse(W.SNAPSHOT if new else W.MERGE, disk_id)
        return await super()._ask(_, ask, caller)

    async def _delete(self, _: Speaker, ask: DeleteById, caller: Caller) -> Operation:
        self._refuse(W.REMOVE, ask.id)
        self.removed.append(ask.id)
        return await self._begun("disk.gone", ask.id)

    async def _begun(self, kind: str, disk_id: str) -> Operation:
        assert self.core is not None
        caller = Caller("service:test")
        op, begun = self.core.operations.begin(kind, object_kind="disk", object_id=disk_id, caller=caller)
        await self.core.commit(begun)
        return op

    async def _held(self, _: Speaker, run: Run) -> None:
        await self.freed.wait()

    async def _gone(self, _: Speaker, run: Run) -> None:
        return

    async def take(self, disk_id: str, work: Work) -> None:
        if work in (W.UPLOAD, W.DOWNLOAD):
            self.holders[disk_id] = Holder(By.TRANSFER, new_id(), work)
            return
        op = await self._begun("disk.held", disk_id)
        self.holders[disk_id] = Holder(By.OPERATION, op.id, work)

    def free(self) -> None:
        self.holders.clear()
        self.freed.set()


@dataclass
class Stage:
    world: World
    storage: HeldStorage
    machines: list[Machine]
    gate: asyncio.Event
    snapped: dict[str, str] = field(default_factory=dict)
    """VM → its snapshot, made before the gates close."""

    def disk(self) -> str:
        assert self.world.cluster is not None
        domain = self.storage.domain(self.world.cluster.data_center_id, leases=False)
        return self.storage.disk(domain).id

    def close(self) -> None:
        for machine in self.machines:
            machine.held.update({order.kind: self.gate for order in GATED})
        for kind in KINDS.values():
            self.storage.hold(kind)
            self.storage.held[kind] = self.gate

    def open(self) -> None:
        self.gate.set()
        self.storage.may_detach.set()
        self.storage.free()
        self.world.scheduler.may_confirm.set()

    async def ask(self, work: Work, vm: Vm, *, reverting: bool = False) -> Any:
        """`reverting`: the VM goes back to its snapshot; else that is deleted."""
        bus, snapshot_id = self.world.bus, self.snapped.get(vm.id, "")
        if reverting:
            return await bus.ask(REVERT_TO_SNAPSHOT, RevertToSnapshot(id=snapshot_id))
        asks: dict[Work, Callable[[], Awaitable[Any]]] = {
            W.START: lambda: bus.ask(START_VM, StartVm(id=vm.id)),
            W.RESTART: lambda: bus.ask(RESTART_VM, RestartVm(vm_id=vm.id, epoch=0, reason="crashed")),
            W.STOP: lambda: bus.ask(STOP_VM, StopVm(id=vm.id)),
            W.CONTROL: lambda: bus.ask(ACT_ON_VM, ActOnVm(id=vm.id, action=VmAction.PAUSE)),
            W.SUSPEND: lambda: bus.ask(SUSPEND_VM, SuspendVm(id=vm.id)),
            W.MIGRATE: lambda: bus.ask(MIGRATE_VM, MigrateVm(id=vm.id)),
            W.DEVICES: lambda: bus.ask(ATTACH_VM_DISK, AttachVmDisk(id=vm.id, disk_id=self.disk())),
            W.EDIT: lambda: bus.ask(UPDATE_VM, UpdateVm(id=vm.id, description="edited")),
            W.DELETE: lambda: bus.ask(DELETE_VM, DeleteVm(id=vm.id)),
            W.SNAPSHOT: lambda: bus.ask(CREATE_SNAPSHOT, CreateSnapshot(vm_id=vm.id, name=new_id())),
            W.MERGE: lambda: bus.ask(DELETE_SNAPSHOT, DeleteById(id=snapshot_id)),
        }
        return await asks[work]()

    async def vm_for(self, work: Work) -> Vm:
        """A VM of which that can be asked."""
        vm = await self.vm(ha=True, start=work not in DOWN)
        if work is W.RESTART:
            await self.crash(vm)
        if work is W.MERGE:
            await self.snapshot(vm)
        return await self.world.get(vm.id)

    async def vm(self, **fields: Any) -> Vm:
        """One with a disk."""
        return await self.world.vm(disks=(NewDisk(disk_id=self.disk()),), **fields)

    async def snapshot(self, vm: Vm) -> None:
        before = {snapshot.id for snapshot in await snapshots(self.world)}
        await self.world.ended(await self.ask(W.SNAPSHOT, vm))
        (self.snapped[vm.id],) = {snapshot.id for snapshot in await snapshots(self.world)} - before

    async def crash(self, vm: Vm) -> None:
        """Its QEMU ends; busy or not."""
        now = await self.world.get(vm.id)
        machine = self.world.machines[now.host_id]
        await machine.tell(vm.id, DomainState.CRASHED, now.epoch, "crashed")

        async def down() -> bool:
            return (await self.world.get(vm.id)).status is VmStatus.DOWN

        await until(down)

    async def held(self, work: Work) -> tuple[Vm, str]:
        """A VM, and the operation that holds it, when the gates are closed."""
        vm = await self.vm_for(work)
        return vm, (await self.ask(work, vm)).id


@asynccontextmanager
async def stage(configured: Settings) -> AsyncIterator[Stage]:
    storage = HeldStorage()
    async with world_of(configured, storage.service()) as (world, machines):
        made = Stage(world, storage, machines, asyncio.Event())
        try:
            yield made
        finally:
            made.open()


async def refusal(asked: Awaitable[object]) -> Refused | None:
    try:
        await asked
    except Refused as refused:
        return refused
    return None


def outcome(holder: Work, newcomer: Work, vm: Vm, operation: str, refused: Refused | None) -> Outcome:
    """What became of it. A refusal by the table names the VM, who holds it and what to do; others are of the VM's status."""
    if refused is None:
        return Outcome.TOGETHER
    if newcomer is W.RESTART and "there is nothing to restart" in refused.message:
        return Outcome.REFUSED
    if holder is not W.RUN:
        assert refused.details["rule"] == HELD, refused.message
        assert (refused.details["operation"], refused.details["holder"]) == (operation, holder)
        assert refused.message.startswith(f"VM {vm.name} can't be ")
        assert f"while operation {operation} " in refused.message
        assert refused.message.endswith("wait for it, or cancel it")
    return Outcome.WAITS if refused.kind is Kind.UNAVAILABLE else Outcome.REFUSED


async def test_every_cell_of_what_is_done_with_a_vm(configured: Settings) -> None:
    async with stage(configured) as at:
        made = [(work, await at.vm_for(work)) for work in (*HOLDERS, W.MERGE, W.RUN) if work is not W.CREATE]
        for work, vm in made:
            if work is not W.MERGE:
                await at.snapshot(vm)
        at.close()
        at.storage.may_detach.clear()
        held: list[tuple[Work, Vm, str]] = []
        for work, vm in made:
            reverting = work is W.MERGE and work in [holder for holder, *_ in held]
            op_id = (await at.ask(work, vm, reverting=reverting)).id if work is not W.RUN else ""
            held.append((work, vm, op_id))
        created = await at.world.create()
        held.append((W.CREATE, await at.world.get(created.object_id), created.id))
        wrong = {}
        for holder, vm, op_id in held:
            # A running VM lets in what would hold it: that is tried below.
            lets_in = holder is W.RUN
            for newcomer, reverting in (*((work, False) for work in NEWCOMERS), (W.MERGE, True)):
                if newcomer is W.RESTART and TABLE[holder, newcomer].outcome is Outcome.WAITS:
                    continue  # after a crash, below
                if lets_in and TABLE[holder, newcomer].outcome is Outcome.TOGETHER:
                    continue
                if (holder, newcomer) in NEVER_MEET:
                    continue
                refused = await refusal(at.ask(newcomer, vm, reverting=reverting))
                real = outcome(holder, newcomer, vm, op_id, refused)
                if real is not TABLE[holder, newcomer].outcome:
                    wrong[f"{holder}, then {newcomer}"] = str(real)
        assert wrong == {}


async def test_what_never_meets_has_its_reason(configured: Settings) -> None:
    async with stage(configured) as at:
        at.close()
        created = await at.world.create(disks=(NewDisk(disk_id=at.disk()),))
        vm = await at.world.get(created.object_id)
        refused = await refusal(at.ask(W.SNAPSHOT, vm))
        assert outcome(W.CREATE, W.SNAPSHOT, vm, created.id, refused) is Outcome.REFUSED
        assert await snapshots(at.world) == []
        at.snapped[vm.id] = new_id()
        for reverting in (False, True):
            refused = await refusal(at.ask(W.MERGE, vm, reverting=reverting))
            assert refused is not None
            assert refused.kind is Kind.NOT_FOUND


@pytest.mark.parametrize("newcomer", ASKED_OF_RUNNING)
async def test_a_running_vm_lets_in_what_is_asked_of_it(configured: Settings, newcomer: Work) -> None:
    assert TABLE[W.RUN, newcomer].outcome is Outcome.TOGETHER
    async with stage(configured) as at:
        begun = await at.ask(newcomer, await at.vm())
        if isinstance(begun, Operation):
            assert (await at.world.ended(begun)).state is OperationState.SUCCEEDED


async def test_a_vm_that_ends_while_it_is_held_is_brought_back_when_that_has_ended(
    configured: Settings,
) -> None:
    async with stage(configured) as at:
        scheduler = at.world.scheduler
        works = (W.START, W.RESTART, W.CONTROL, W.DEVICES, W.SNAPSHOT)
        before = {work: await at.vm_for(work) for work in works}
        # This one has ended before, and nobody has brought it back yet.
        before[W.MERGE] = await at.vm_for(W.RESTART)
        await at.snapshot(before[W.MERGE])
        scheduler.may_confirm.clear()
        at.close()
        for order in (RUN_DOMAIN,):  # these run, and wait for the scheduler's word
            for machine in at.machines:
                del machine.held[order.kind]
        held = {work: (await at.ask(work, vm)).id for work, vm in before.items()}
        created = await at.world.create(ha=True)
        held[W.CREATE], before[W.CREATE] = created.id, await at.world.get(created.object_id)
        assert {work for work in HOLDERS if TABLE[work, W.RESTART].outcome is Outcome.WAITS} == set(before)
        for work, vm in before.items():

            async def runs(vm_id: str = vm.id) -> bool:
                return (await at.world.get(vm_id)).status is VmStatus.UP

            if work is not W.MERGE:
                await until(runs)
                await at.crash(vm)
            refused = await refusal(at.ask(W.RESTART, vm))
            assert outcome(work, W.RESTART, vm, held[work], refused) is Outcome.WAITS, work
        at.open()

        for work in (W.CONTROL, W.SNAPSHOT, W.MERGE):

            async def let_in(vm: Vm = before[work]) -> bool:
                return await refusal(at.ask(W.RESTART, vm)) is None

            await until(let_in)


async def test_a_host_is_emptied_of_what_is_held_as_soon_as_that_has_ended(configured: Settings) -> None:
    """Of each kind of work one VM that is held, all on one host. A disk of one more is being resized."""
    works = [work for work in HOLDERS if TABLE[work, W.MAINTAIN].outcome is Outcome.WAITS]
    assert set(works) == {*HOLDERS} - {W.DELETE, W.MERGE}
    works.remove(W.CREATE)  # below
    async with stage(configured) as at:
        first, second = at.machines
        disk_id = at.disk()
        vms = {work: await at.vm_for(work) for work in works}
        vms[W.RESIZE] = await at.world.vm(disks=(NewDisk(disk_id=disk_id),))
        assert TABLE[W.RESIZE, W.MAINTAIN].outcome is Outcome.WAITS
        await at.storage.take(disk_id, W.RESIZE)
        for (
            machine
        ) in at.machines:  # first those alone that start: they are seen, though they run nowhere yet
            machine.held[RUN_DOMAIN.kind] = at.gate
        begun = {work: await at.ask(work, vms[work]) for work in (W.START, W.RESTART)}
        at.close()
        begun |= {work: await at.ask(work, vms[work]) for work in works if work not in begun}
        op = await at.world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id))

        async def moves() -> bool:
            return bool(at.storage.placed or first.agent.begun(MIGRATE_DOMAIN.kind))

        await until(moves)
        assert (await at.world.host_is(first, HostStatus.PREPARING_FOR_MAINTENANCE)).busy_with == op.id
        at.open()
        at.storage.free()
        done = await at.world.ended(op)
        assert done.state is OperationState.SUCCEEDED, done.problem
        for work, vm in vms.items():
            now = await at.world.get(vm.id)
            assert now.host_id in ("", second.id), f"{work}: {now.status} on the host that was emptied"
        assert (await at.world.get(vms[W.RESIZE].id)).host_id == second.id


@pytest.mark.parametrize("work", [W.CREATE, W.START, W.RESTART])
async def test_a_host_is_not_empty_while_a_vm_is_on_its_way_to_it(configured: Settings, work: Work) -> None:
    async with stage(configured) as at:
        first, second = at.machines
        vm = await at.vm_for(work) if work is not W.CREATE else None
        first.begun.clear()
        at.close()
        begun = await (at.ask(work, vm) if vm is not None else at.world.create())
        vm_id = vm.id if vm is not None else begun.object_id
        await first.begun.wait()
        op = await at.world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id))

        await at.world.host_is(first, HostStatus.PREPARING_FOR_MAINTENANCE)
        await asyncio.sleep(0.5)  # as long as it would take to be over
        assert (await at.world.operation(op)).ended_at is None
        at.open()
        assert (await at.world.ended(op)).state is OperationState.SUCCEEDED
        assert (await at.world.vm_is(vm_id, VmStatus.UP)).host_id == second.id


async def test_what_goes_on_while_a_host_is_emptied(configured: Settings) -> None:
    async with stage(configured) as at:
        first, _ = at.machines
        leaving = [await at.world.vm(ha=True) for _ in range(2)]  # as many as leave at a time
        stays = MigrationPolicy(allowed=False)
        vms = {
            work: await at.vm(start=work not in DOWN, migration=stays)
            for work in NEWCOMERS
            if work not in (W.RESTART, W.MIGRATE)
        }
        vms[W.MIGRATE] = await at.world.vm()
        vms[W.RESTART] = await at.vm_for(W.RESTART)
        await at.snapshot(vms[W.MERGE])
        at.close()
        op = await at.world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id))

        async def moving() -> bool:
            return len(first.agent.begun(MIGRATE_DOMAIN.kind)) == len(leaving)

        await until(moving)
        for work, vm in vms.items():
            assert TABLE[W.MAINTAIN, work].outcome is Outcome.TOGETHER
            assert await refusal(at.ask(work, vm)) is None, work
        refused = await refusal(at.world.bus.ask(MAINTAIN_HOST, MaintainHost(id=first.id)))
        assert TABLE[W.MAINTAIN, W.MAINTAIN].outcome is Outcome.REFUSED
        assert refused is not None
        assert (refused.details["operation"], refused.details["rule"]) == (op.id, HELD)
        assert "host h1 can't be put into maintenance while operation" in refused.message


async def test_a_host_is_emptied_whatever_is_merged(configured: Settings) -> None:
    """Its VM is down, so nothing of it is on a host."""
    async with stage(configured) as at:
        vms = [await at.vm_for(W.MERGE) for _ in range(2)]
        at.close()
        for vm, reverting in zip(vms, (False, True), strict=True):
            assert TABLE[W.MERGE, W.MAINTAIN].outcome is Outcome.TOGETHER
            begun = await at.ask(W.MERGE, vm, reverting=reverting)
            op = await at.world.bus.ask(MAINTAIN_HOST, MaintainHost(id=at.machines[reverting].id))
            assert (await at.world.ended(op)).state is OperationState.SUCCEEDED
            assert (await at.world.get(vm.id)).busy_with == begun.id


async def test_what_is_done_with_a_disk_is_not_waited_for_by_its_vms_snapshots(configured: Settings) -> None:
    """Whoever asked is told, and all is as it was: else a VM would be held as long as a copy takes."""
    async with stage(configured) as at:
        for holder in (W.RESIZE, W.COPY, W.DOWNLOAD, W.REMOVE):
            vm = await at.vm_for(W.MERGE)
            assert TABLE[holder, W.SNAPSHOT].outcome is TABLE[holder, W.MERGE].outcome is Outcome.REFUSED
            await at.storage.take(vm.disks[0].disk_id, holder)
            for newcomer, reverting in ((W.SNAPSHOT, False), (W.MERGE, False), (W.MERGE, True)):
                begun = await at.ask(newcomer, vm, reverting=reverting)
                said = await failed(at.world, begun)
                assert f"can't be {together.DONE[newcomer, Held.DISK]} while" in said
                assert (await at.world.get(vm.id)).busy_with == ""
        assert {(s.id, s.status) for s in await snapshots(at.world)} == {
            (snapshot_id, SnapshotStatus.OK) for snapshot_id in at.snapped.values()
        }


async def test_what_opens_no_disk_goes_on_whatever_is_done_with_the_disks(configured: Settings) -> None:
    async with stage(configured) as at:
        held = [at.disk() for _ in OF_DISKS for _ in NOT_OPENING]
        of_vm = iter(held)
        vms = {
            work: await at.world.vm(disks=tuple(NewDisk(disk_id=next(of_vm)) for _ in OF_DISKS))
            for work in NOT_OPENING
        }
        for number, disk_id in enumerate(held):
            await at.storage.take(disk_id, OF_DISKS[number % len(OF_DISKS)])
        for work, vm in vms.items():
            assert {TABLE[holder, work].outcome for holder in OF_DISKS} == {Outcome.TOGETHER}
            begun = await at.ask(work, vm)
            if isinstance(begun, Operation):
                assert (await at.world.ended(begun)).state is OperationState.SUCCEEDED, work


async def test_a_vm_is_deleted_with_its_disks_as_soon_as_nothing_is_done_with_them(
    configured: Settings,
) -> None:
    async with stage(configured) as at:
        disks = {work: at.disk() for work in OF_DISKS}
        vms = {
            work: await at.world.vm(start=False, disks=(NewDisk(disk_id=disk_id),))
            for work, disk_id in disks.items()
        }
        for work, disk_id in disks.items():
            assert TABLE[work, W.DELETE].outcome is Outcome.WAITS
            await at.storage.take(disk_id, work)
        begun = {
            work: await at.world.bus.ask(DELETE_VM, DeleteVm(id=vm.id, delete_disks=True))
            for work, vm in vms.items()
        }
        # A transfer isn't waited for: the operation ends, says so, and the reconcile loop asks again until it is over.
        for work in (W.UPLOAD, W.DOWNLOAD):
            ended = await at.world.ended(begun[work])
            assert ended.problem is not None
            assert ended.problem.details["transfer_id"] == at.storage.holders[disks[work]].id
            assert (await at.world.get(vms[work].id)).status is VmStatus.DELETING

        async def all_detached() -> bool:
            return set(at.storage.detached) == set(disks.values())

        await until(all_detached)
        # Nothing of them is on a host, so a host is emptied meanwhile.
        for holder in (W.DELETE, W.FILL, W.COPY, W.UPLOAD, W.DOWNLOAD, W.REMOVE):
            assert TABLE[holder, W.MAINTAIN].outcome is Outcome.TOGETHER
        op = await at.world.bus.ask(MAINTAIN_HOST, MaintainHost(id=at.machines[0].id))
        ended = await at.world.ended(op)
        assert ended.state is OperationState.SUCCEEDED, ended.problem
        assert at.storage.removed == []
        at.storage.free()
        for work in (W.UPLOAD, W.DOWNLOAD):
            await at.world.bus.ask(DELETE_VM, DeleteVm(id=vms[work].id, delete_disks=True))

        async def all_removed() -> bool:
            return set(at.storage.removed) == set(disks.values())

        await until(all_removed)
