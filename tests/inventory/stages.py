"""A stage for tests of what may happen together: VMs, and disks of a scripted storage, that are held until a gate opens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.inventory.test_snapshots import KINDS, Snapshots, snapshots
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
from volery.contracts.ids import new_id
from volery.contracts.operation import Operation
from volery.contracts.snapshot import (
    CREATE_SNAPSHOT,
    DELETE_SNAPSHOT,
    REVERT_TO_SNAPSHOT,
    CreateSnapshot,
    RevertToSnapshot,
)
from volery.contracts.storage import DELETE_DISK, DetachDiskFrom, PreparedDisks, PrepareDisks
from volery.contracts.together import By, Held, Holder, Thing, Work
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
DOWN = (W.START, W.DELETE, W.MERGE)
"""Asked of a VM that is down."""
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
