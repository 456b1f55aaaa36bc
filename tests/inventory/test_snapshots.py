"""Snapshots of VMs: who is held meanwhile, and what is shown when storage refuses, fails or inventory ends in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.inventory.test_leases import Storage
from tests.inventory.world import World, found_cluster, inventory_of, surroundings
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.domain import BackingFile, ChainSource, ImageFormat
from volery.contracts.domain_orders import NOT_SWITCHED, SWITCH_DISKS, SwitchDisks, SwitchedDisk
from volery.contracts.errors import Kind, Refused
from volery.contracts.operation import ListQuery, Operation, OperationState
from volery.contracts.snapshot import (
    CREATE_SNAPSHOT,
    DELETE_SNAPSHOT,
    GET_SNAPSHOT,
    LIST_SNAPSHOTS,
    REVERT_TO_SNAPSHOT,
    SWITCH_VM_DISKS,
    CreateSnapshot,
    RevertToSnapshot,
    Snapshot,
    SnapshotStatus,
)
from volery.contracts.storage import Disk
from volery.contracts.vm import DELETE_VM, START_VM, DeleteVm, NewDisk, StartVm, Vm
from volery.contracts.volumes import (
    FORGET_SNAPSHOT,
    REVERT_DISKS,
    SNAPSHOT_DISKS,
    ForgetSnapshot,
    RevertDisks,
    SnapshotDisks,
    Volume,
    VolumeState,
)
from volery.runtime.bus import Caller
from volery.runtime.programs import Settings
from volery.runtime.run import Run

KINDS = {SnapshotDisks: "disk.snapshot", ForgetSnapshot: "disk.merge", RevertDisks: "disk.revert"}
FULL = Refused(Kind.EXHAUSTED, "the storage is full")


@dataclass
class Snapshots(Storage):
    """Storage whose disks get volumes, by operations that fail or wait where a test says so."""

    failing: dict[str, Refused] = field(default_factory=dict)
    held: dict[str, asyncio.Event] = field(default_factory=dict)
    begun: dict[str, asyncio.Event] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = ((call, self._ask) for call in (SNAPSHOT_DISKS, FORGET_SNAPSHOT, REVERT_DISKS))
        self.answers = [*self.answers, *asked]
        self.runs = [(kind, self._run) for kind in KINDS.values()]

    async def _ask(self, _: Any, ask: Any, caller: Caller) -> Operation:
        if isinstance(ask, ForgetSnapshot) and not self.of(ask.snapshot_id):
            raise Refused(Kind.NOT_FOUND, "there is no such snapshot")
        assert self.core is not None
        self.asked.append(ask)
        op, change = self.core.operations.begin(
            KINDS[type(ask)],
            object_kind="snapshot",
            object_id=ask.snapshot_id,
            question=ask,
            caller=caller,
        )
        await self.core.commit(change, caller=caller, answer=op)
        return op

    async def _run(self, _: Any, run: Run) -> None:
        kind, snapshot_id = run.operation.kind, run.operation.object_id
        if kind in self.begun:
            self.begun[kind].set()
            await self.held[kind].wait()
        if kind in self.failing:
            raise self.failing[kind]
        self.done.append(kind)
        if kind == "disk.snapshot":
            for disk_id in run.input(SnapshotDisks).disk_ids:
                self.put(disk_id, Volume(id=disk_id, snapshot_id=snapshot_id))
        if kind == "disk.merge":
            for disk in self.of(snapshot_id):
                self.objects[disk.id] = replace(disk, volumes=())

    def put(self, disk_id: str, *volumes: Volume) -> None:
        disk = self.objects[disk_id]
        assert isinstance(disk, Disk)
        self.objects[disk_id] = replace(disk, volumes=volumes)

    def of(self, snapshot_id: str) -> list[Disk]:
        disks = [disk for disk in self.objects.values() if isinstance(disk, Disk)]
        return [disk for disk in disks if any(v.snapshot_id == snapshot_id for v in disk.volumes)]

    def hold(self, kind: str) -> tuple[asyncio.Event, asyncio.Event]:
        """(it has begun, let it go on)"""
        self.begun[kind], self.held[kind] = asyncio.Event(), asyncio.Event()
        return self.begun[kind], self.held[kind]


@asynccontextmanager
async def place(configured: Settings) -> AsyncIterator[tuple[World, Snapshots, Vm]]:
    """A VM with two disks that is down."""
    storage = Snapshots()
    async with surroundings(configured, storage.service()) as world, inventory_of(world):
        await found_cluster(world)
        assert world.cluster is not None
        domain = storage.domain(world.cluster.data_center_id, leases=False)
        disks = tuple(NewDisk(disk_id=storage.disk(domain).id) for _ in range(2))
        yield world, storage, await world.vm(start=False, disks=disks)


async def make(world: World, vm: Vm, name: str = "first", **fields: Any) -> Operation:
    return await world.bus.ask(CREATE_SNAPSHOT, CreateSnapshot(vm_id=vm.id, name=name, **fields))


async def snapshots(world: World) -> list[Snapshot]:
    found = await world.bus.ask(LIST_SNAPSHOTS, ListQuery())
    return [msgspec.json.decode(item, type=Snapshot) for item in found.items]


async def failed(world: World, op: Operation) -> str:
    ended = await world.ended(op)
    assert ended.state is OperationState.FAILED
    assert ended.problem is not None
    return ended.problem.message


async def test_a_vm_is_held_while_its_snapshot_is_made_and_says_by_what(configured: Settings) -> None:
    async with place(configured) as (world, storage, vm):
        begun, go_on = storage.hold("disk.snapshot")
        op = await make(world, vm, description="before 15.2")
        await begun.wait()
        (now,) = await snapshots(world)
        assert (now.name, now.status, now.vm_id) == ("first", SnapshotStatus.CREATING, vm.id)
        for ask in (make(world, vm, "second"), world.bus.ask(START_VM, StartVm(id=vm.id))):
            with pytest.raises(Refused, match="makes a snapshot of it: wait for it, or cancel it"):
                await ask
        with pytest.raises(Refused, match="makes a snapshot of it: wait for it, or cancel it"):
            await world.bus.ask(DELETE_SNAPSHOT, DeleteById(id=now.id))
        go_on.set()
        await world.ended(op)
        (made,) = await snapshots(world)
        assert (made.status, made.description) == (SnapshotStatus.OK, "before 15.2")
        assert [d.volume_id for d in made.disks] == [d.disk_id for d in vm.disks]
        assert made.configuration is not None
        assert made.configuration.memory_bytes == vm.memory_bytes
        assert (await world.get(vm.id)).busy_with == ""


async def test_what_is_refused_is_refused_before_anything_is_touched(configured: Settings) -> None:
    async with place(configured) as (world, storage, vm):
        with pytest.raises(Refused, match="has no disk nothing"):
            await make(world, vm, disk_ids=("nothing",))
        with pytest.raises(Refused, match="name"):
            await make(world, vm, "")
        await world.ended(await make(world, vm))
        with pytest.raises(Refused, match="has a snapshot 'first' already"):
            await make(world, vm)
        with pytest.raises(Refused, match="1 snapshots"):
            await world.bus.ask(DELETE_VM, DeleteVm(id=vm.id, delete_disks=False))
        await world.machine("h1")
        await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        (made,) = await snapshots(world)
        for call, ask in (
            (DELETE_SNAPSHOT, DeleteById(id=made.id)),
            (REVERT_TO_SNAPSHOT, RevertToSnapshot(id=made.id)),
        ):
            with pytest.raises(Refused, match="stop the VM first"):
                await world.bus.ask(call, ask)
        assert storage.done == ["disk.snapshot"]


async def test_one_that_storage_can_not_make_is_gone(configured: Settings) -> None:
    async with place(configured) as (world, storage, vm):
        storage.failing["disk.snapshot"] = FULL
        assert "full" in await failed(world, await make(world, vm))
        assert await snapshots(world) == []
        assert (await world.get(vm.id)).busy_with == ""


async def test_one_that_was_made_is_finished_by_whoever_leads_next(configured: Settings) -> None:
    storage = Snapshots()
    async with surroundings(configured, storage.service()) as world:
        async with inventory_of(world):
            await found_cluster(world)
            assert world.cluster is not None
            domain = storage.domain(world.cluster.data_center_id, leases=False)
            vm = await world.vm(start=False, disks=(NewDisk(disk_id=storage.disk(domain).id),))
            begun, go_on = storage.hold("disk.snapshot")
            op = await make(world, vm)
            await begun.wait()
        go_on.set()
        async with inventory_of(world):
            assert (await world.ended(op)).state is OperationState.SUCCEEDED
            (made,) = await snapshots(world)
            assert made.status is SnapshotStatus.OK
            assert storage.done == ["disk.snapshot"]


async def test_a_deletion_that_fails_says_whether_the_snapshot_is_whole(configured: Settings) -> None:
    async with place(configured) as (world, storage, vm):
        await world.ended(await make(world, vm))
        (made,) = await snapshots(world)

        async def status() -> SnapshotStatus:
            return (await world.bus.ask(GET_SNAPSHOT, GetById(id=made.id))).status

        storage.failing["disk.merge"] = FULL
        assert "full" in await failed(world, await world.bus.ask(DELETE_SNAPSHOT, DeleteById(id=made.id)))
        assert await status() is SnapshotStatus.OK
        first = vm.disks[0].disk_id
        merging = Volume(id="above", parent_id=first, state=VolumeState.MERGING)
        storage.put(first, Volume(id=first, snapshot_id=made.id), merging)
        assert "full" in await failed(world, await world.bus.ask(DELETE_SNAPSHOT, DeleteById(id=made.id)))
        assert await status() is SnapshotStatus.BROKEN
        with pytest.raises(Refused, match="delete it again"):
            await world.bus.ask(REVERT_TO_SNAPSHOT, RevertToSnapshot(id=made.id))

        storage.failing.clear()
        await world.ended(await world.bus.ask(DELETE_SNAPSHOT, DeleteById(id=made.id)))
        assert await snapshots(world) == []
        await world.ended(await make(world, vm))
        (again,) = await snapshots(world)
        for disk in storage.of(again.id):
            storage.put(disk.id)  # somebody took it from storage already
        await world.ended(await world.bus.ask(DELETE_SNAPSHOT, DeleteById(id=again.id)))
        assert await snapshots(world) == []


async def test_a_running_vm_is_told_on_its_host_under_its_epoch(configured: Settings) -> None:
    async with place(configured) as (world, storage, vm):
        disks = tuple(
            SwitchedDisk(
                disk_id=disk.disk_id,
                source=ChainSource(
                    path="/new",
                    format=ImageFormat.QCOW2,
                    backing=(BackingFile(path="/old", format=ImageFormat.RAW),),
                ),
            )
            for disk in vm.disks
        )
        ask = SwitchDisks(vm_id=vm.id, disks=disks)
        await world.bus.ask(SWITCH_VM_DISKS, ask)  # it is down
        host = await world.machine("h1")
        await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        await world.ended(await make(world, vm))
        assert storage.asked[-1].vm_id == vm.id
        await world.bus.ask(SWITCH_VM_DISKS, ask)
        assert [order for order in host.asked if isinstance(order, SwitchDisks)] == [ask]
        for kind, surely in ((Kind.INVALID, True), (Kind.INTERNAL, False), (Kind.UNAVAILABLE, False)):
            host.refusals[SWITCH_DISKS.kind] = Refused(kind, "no")
            with pytest.raises(Refused) as refused:
                await world.bus.ask(SWITCH_VM_DISKS, ask)
            assert (refused.value.details.get("rule") == NOT_SWITCHED) is surely, kind
