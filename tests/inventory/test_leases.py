"""A VM's lease: where it is, on which hosts that lets it run, and what happens when another host holds it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from tests.inventory.world import Machine, World, until, world_of
from tests.support.speaker import Speaker
from volery.contracts.base import Done, Entity, Owner
from volery.contracts.cluster import GetById
from volery.contracts.domain import DomainDisk, DomainLease, FileSource, ImageFormat
from volery.contracts.domain_orders import ADMIT_MIGRATION, RUN_DOMAIN
from volery.contracts.errors import Kind, Refused, not_found, unavailable
from volery.contracts.ids import new_id
from volery.contracts.leases import IMAGE_HELD, LEASE_HELD
from volery.contracts.operation import Operation, OperationState
from volery.contracts.storage import (
    ATTACH_DISK_TO,
    DETACH_DISK_FROM,
    GET_DISK,
    GET_STORAGE_DOMAIN,
    PREPARE_DISKS,
    PREPARE_LEASE,
    REACH_DISKS,
    RELEASE_LEASE,
    AttachDiskTo,
    DetachDiskFrom,
    Disk,
    DiskReach,
    DiskStatus,
    DomainKind,
    DomainStatus,
    PreparedDisks,
    PrepareDisks,
    PrepareLease,
    ReachDisks,
    ReleaseLease,
    StorageDomain,
)
from volery.contracts.together import HELD
from volery.contracts.vm import (
    ATTACH_VM_DISK,
    MIGRATE_VM,
    START_VM,
    STOP_VM,
    UPDATE_VM,
    AttachVmDisk,
    HighAvailability,
    MigrateVm,
    NewDisk,
    StartVm,
    StopVm,
    UpdateVm,
    Vm,
    VmStatus,
)
from volery.runtime.bus import Caller
from volery.runtime.programs import Settings


def stamped() -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"id": new_id(), "revision": 1, "created_at": now, "updated_at": now}


@dataclass
class Storage(Speaker):
    """Its disks are where they are said to be; leases are made for hosts that have joined."""

    owner: Owner = Owner.STORAGE
    prepared: list[PrepareLease] = field(default_factory=list)
    released: list[ReleaseLease] = field(default_factory=list)
    reached: list[ReachDisks] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    placed: list[PrepareDisks] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [
            (GET_STORAGE_DOMAIN, self._one),
            (GET_DISK, self._one),
            (ATTACH_DISK_TO, self._attach),
            (DETACH_DISK_FROM, self._detach),
            (PREPARE_DISKS, self._disks),
            (REACH_DISKS, self._reach),
            (PREPARE_LEASE, self._lease),
            (RELEASE_LEASE, self._release),
        ]

    def domain(self, center_id: str, **fields: Any) -> StorageDomain:
        fields = {"kind": DomainKind.DIRECTORY, "leases": True, "path": "/srv"} | fields
        made = StorageDomain(
            name=f"d{len(self.objects)}",
            data_center_id=center_id,
            status=DomainStatus.ACTIVE,
            **fields,
            **stamped(),
        )
        self.knows(made)
        return made

    def disk(self, domain: StorageDomain) -> Disk:
        made = Disk(name="disk", storage_domain_id=domain.id, status=DiskStatus.OK, **stamped())
        self.knows(made)
        return made

    async def _one(self, _: Speaker, ask: GetById, caller: Caller) -> Entity:
        if ask.id not in self.objects:
            raise not_found("storage domain or disk", ask.id)
        return self.objects[ask.id]

    async def _attach(self, _: Speaker, ask: AttachDiskTo, caller: Caller) -> Entity:
        return self.objects[ask.disk_id]

    async def _detach(self, _: Speaker, ask: DetachDiskFrom, caller: Caller) -> Entity:
        self.detached.append(ask.disk_id)
        return self.objects[ask.disk_id]

    async def _disks(self, _: Speaker, ask: PrepareDisks, caller: Caller) -> PreparedDisks:
        self.placed.append(ask)

        def at(disk_id: str) -> DomainDisk:
            return DomainDisk(
                disk_id=disk_id, source=FileSource(path=f"/srv/{disk_id}", format=ImageFormat.QCOW2)
            )

        return PreparedDisks(disks=tuple(at(disk_id) for disk_id in ask.disk_ids))

    async def _reach(self, _: Speaker, ask: ReachDisks, caller: Caller) -> DiskReach:
        self.reached.append(ask)
        domain = self.objects.get(ask.lease_domain_id)
        if not isinstance(domain, StorageDomain):
            return DiskReach(any_host=True)
        problem = "" if domain.lease_host_ids else "no host has joined its lockspace"
        return DiskReach(any_host=False, host_ids=domain.lease_host_ids, lease_problem=problem)

    async def _lease(self, _: Speaker, ask: PrepareLease, caller: Caller) -> DomainLease:
        self.prepared.append(ask)
        domain = self.objects[ask.storage_domain_id]
        assert isinstance(domain, StorageDomain)
        if ask.host_id not in domain.lease_host_ids:
            raise unavailable(f"host {ask.host_id} can't hold a lease")
        return DomainLease(lockspace=domain.id, key=ask.vm_id, path=f"/srv/leases/{ask.vm_id}")

    async def _release(self, _: Speaker, ask: ReleaseLease, caller: Caller) -> Done:
        self.released.append(ask)
        return Done()


@asynccontextmanager
async def leased(configured: Settings) -> AsyncIterator[tuple[World, list[Machine], Storage]]:
    storage = Storage()
    async with world_of(configured, storage.service(), hosts=2) as (world, hosts):
        yield world, hosts, storage


def center(world: World) -> str:
    assert world.cluster is not None
    return world.cluster.data_center_id


def specs(machine: Machine) -> list[Any]:
    return [ask.spec for ask in machine.agent.begun(RUN_DOMAIN.kind)]


async def test_a_highly_available_vm_gets_a_lease_beside_a_disk_that_it_writes(configured: Settings) -> None:
    async with leased(configured) as (world, hosts, storage):
        plain = storage.domain(center(world), leases=False)
        alone = storage.domain(center(world), lease_host_ids=(hosts[0].id,))
        shared = storage.domain(center(world), lease_host_ids=(hosts[0].id, hosts[1].id))
        disks = [storage.disk(domain) for domain in (plain, alone, shared)]
        ask = tuple(NewDisk(disk_id=disk.id) for disk in disks)
        vm = await world.vm(ha=True, disks=ask)
        assert vm.lease == shared.id
        (spec,) = specs(hosts[0])
        assert spec.lease == DomainLease(lockspace=shared.id, key=vm.id, path=f"/srv/leases/{vm.id}")
        assert storage.reached[-1].lease_domain_id == shared.id
        assert (await world.vm(disks=ask)).lease == "", "it isn't highly available"
        assert (await world.vm(ha=True, disks=ask, lease="")).lease == ""
        assert (await world.vm(ha=True, disks=ask[:2])).lease == "", "only one host holds leases there"
        read = NewDisk(disk_id=disks[2].id, read_only=True)
        assert (await world.vm(ha=True, disks=(read,))).lease == ""
        assert (await world.vm(ha=True, disks=(), lease=shared.id)).lease == shared.id


async def test_storage_is_told_for_which_placement_it_is_asked(configured: Settings) -> None:
    async with leased(configured) as (world, _, storage):
        shared = storage.domain(center(world))
        vm = await world.vm(disks=(NewDisk(disk_id=storage.disk(shared).id),))
        await world.ended(await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True)))
        await world.vm_is(vm.id, VmStatus.DOWN)
        assert (await world.ended(await start(world, vm))).state is OperationState.SUCCEEDED
        again = await world.get(vm.id)
        plug = AttachVmDisk(id=vm.id, disk_id=storage.disk(shared).id)
        assert (
            await world.ended(await world.bus.ask(ATTACH_VM_DISK, plug))
        ).state is OperationState.SUCCEEDED
        assert again.epoch > vm.epoch > 0
        assert [ask.epoch for ask in storage.placed] == [vm.epoch, again.epoch, again.epoch]


async def test_a_lease_where_none_can_be_is_refused(configured: Settings) -> None:
    async with leased(configured) as (world, hosts, storage):
        for fields, sentence in (
            ({"host_id": hosts[0].id}, "belongs to one host"),
            ({"kind": DomainKind.ISCSI, "leases": False}, "is of kind iscsi"),
            ({"leases": False}, "holds no leases"),
        ):
            domain = storage.domain(center(world), **fields)
            with pytest.raises(Refused, match=sentence):
                await world.create(lease=domain.id)
        elsewhere = storage.domain(new_id(), lease_host_ids=(hosts[0].id,))
        with pytest.raises(Refused, match="isn't attached to the data center"):
            await world.create(lease=elsewhere.id)
        with pytest.raises(Refused, match="there is no"):
            await world.create(lease=new_id())
        with pytest.raises(Refused):
            await world.create(lease="../x")


async def test_the_lease_of_a_vm_that_is_down_can_be_changed(configured: Settings) -> None:
    async with leased(configured) as (world, hosts, storage):
        first, second = (storage.domain(center(world), lease_host_ids=(hosts[0].id,)) for _ in range(2))
        vm = await world.vm(lease=first.id)
        with pytest.raises(Refused, match="can't be changed while it is up"):
            await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, lease=second.id))
        await world.ended(await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True)))
        await world.vm_is(vm.id, VmStatus.DOWN)
        changed: Vm = await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, lease=second.id))
        assert (changed.lease, changed.next_run) == (second.id, False)
        assert storage.released == [ReleaseLease(storage_domain_id=first.id, vm_id=vm.id)]
        assert (await world.ended(await start(world, vm))).state is OperationState.SUCCEEDED
        assert specs(hosts[0])[-1].lease.lockspace == second.id


async def start(world: World, vm: Vm) -> Operation:
    return await world.bus.ask(START_VM, StartVm(id=vm.id))


async def test_a_vm_that_becomes_highly_available_while_it_is_down_gets_a_lease(configured: Settings) -> None:
    async with leased(configured) as (world, hosts, storage):
        shared = storage.domain(center(world), lease_host_ids=(hosts[0].id, hosts[1].id))
        vm = await world.vm(start=False, disks=(NewDisk(disk_id=storage.disk(shared).id),))
        assert vm.lease == ""
        on = UpdateVm(id=vm.id, high_availability=HighAvailability(enabled=True))
        assert (await world.bus.ask(UPDATE_VM, on)).lease == shared.id
        off = UpdateVm(id=vm.id, lease="")
        assert (await world.bus.ask(UPDATE_VM, off)).lease == ""


async def test_a_vm_that_becomes_highly_available_while_it_runs_gets_its_lease_at_the_next_start(
    configured: Settings,
) -> None:
    async with leased(configured) as (world, hosts, storage):
        shared = storage.domain(center(world), lease_host_ids=(hosts[0].id, hosts[1].id))
        vm = await world.vm(disks=(NewDisk(disk_id=storage.disk(shared).id),))
        on = UpdateVm(id=vm.id, high_availability=HighAvailability(enabled=True))
        off = UpdateVm(id=vm.id, high_availability=HighAvailability())
        said: Vm = await world.bus.ask(UPDATE_VM, on)
        assert (said.lease, said.next_lease, said.next_run) == ("", shared.id, True)
        assert (await world.bus.ask(UPDATE_VM, off)).next_lease == ""
        await world.bus.ask(UPDATE_VM, on)

        storage.knows(replace(shared, lease_host_ids=(hosts[0].id,)))  # nowhere else could it be brought back
        await again(world, vm)
        assert specs(hosts[0])[-1].lease is None
        waits = await world.get(vm.id)
        assert (waits.lease, waits.next_lease, waits.next_run) == ("", shared.id, True)

        storage.knows(shared)
        await again(world, vm)
        assert specs(hosts[0])[-1].lease.lockspace == shared.id
        held = await world.get(vm.id)
        assert (held.lease, held.next_lease, held.next_run) == (shared.id, "", False)


async def again(world: World, vm: Vm) -> None:
    await world.ended(await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True)))
    await world.vm_is(vm.id, VmStatus.DOWN)
    assert (await world.ended(await start(world, vm))).state is OperationState.SUCCEEDED


async def test_without_a_host_that_can_hold_it_the_start_says_so(configured: Settings) -> None:
    async with leased(configured) as (world, hosts, storage):
        nobody = storage.domain(center(world))
        op = await world.ended(await world.create(lease=nobody.id))
        assert op.problem is not None
        assert op.problem.kind is Kind.EXHAUSTED
        assert "no host has joined its lockspace" in op.problem.message
        assert specs(hosts[0]) == specs(hosts[1]) == []
        vm = await world.vm_is(op.object_id, VmStatus.DOWN)
        storage.knows(replace(nobody, lease_host_ids=(hosts[0].id,)))
        assert (await world.ended(await start(world, vm))).state is OperationState.SUCCEEDED


@pytest.mark.parametrize("rule", [LEASE_HELD, IMAGE_HELD, HELD])
async def test_what_is_held_elsewhere_is_no_reason_to_try_other_hosts(
    configured: Settings, rule: str
) -> None:
    async with leased(configured) as (world, hosts, storage):
        shared = storage.domain(center(world), lease_host_ids=(hosts[0].id, hosts[1].id))
        hosts[0].refusals[RUN_DOMAIN.kind] = Refused(Kind.CONFLICT, "it is held", rule=rule)
        op = await world.ended(await world.create(lease=shared.id))
        assert op.problem is not None
        assert op.problem.details["rule"] == rule
        assert specs(hosts[1]) == []
        hosts[0].refusals.clear()
        vm = await world.vm_is(op.object_id, VmStatus.DOWN)
        assert (await world.ended(await start(world, vm))).state is OperationState.SUCCEEDED


async def test_a_migration_takes_the_lease_along(configured: Settings) -> None:
    async with leased(configured) as (world, hosts, storage):
        shared = storage.domain(center(world), lease_host_ids=(hosts[0].id, hosts[1].id))
        vm = await world.vm(lease=shared.id)
        op = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id, host_id=hosts[1].id))
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        (admitted,) = hosts[1].agent.begun(ADMIT_MIGRATION.kind)
        assert admitted.spec.lease.lockspace == shared.id
        assert storage.prepared[-1].host_id == hosts[1].id

        async def moved() -> bool:
            return (await world.get(vm.id)).host_id == hosts[1].id

        await until(moved)
