"""High availability that could never bring a VM back elsewhere is refused when that was asked for; what was always
accepted still is. And what ha is told of VMs."""

from __future__ import annotations

from typing import Any

import pytest

from services.inventory.service import service
from tests.inventory.world import world_of
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.cluster import (
    CREATE_CLUSTER,
    CREATE_DATA_CENTER,
    UPDATE_CLUSTER,
    CreateCluster,
    CreateDataCenter,
    UpdateCluster,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery, OperationState
from volery.contracts.protection import DESCRIBE_NEEDS, VmNeeds
from volery.contracts.storage import (
    GET_DISK,
    REACH_DISKS,
    Disk,
    DiskReach,
    DiskStatus,
    ReachDisks,
)
from volery.contracts.vm import (
    ATTACH_VM_DISK,
    CREATE_VM,
    LIST_VMS,
    RESTART_VM,
    UPDATE_VM,
    Affinity,
    AttachVmDisk,
    CreateVm,
    HighAvailability,
    NewDisk,
    RestartVm,
    RestartWhere,
    UpdateVm,
    VmStatus,
)
from volery.runtime.bus import Bus, Caller
from volery.runtime.clock import utc_now
from volery.runtime.programs import Settings

MIB = 1024 * 1024
LOCAL = new_id()
"""The host whose directory holds every disk here."""
ELSEWHERE = HighAvailability(enabled=True, where=RestartWhere.ELSEWHERE)
ALWAYS_ACCEPTED = HighAvailability(enabled=True)


def storage() -> Speaker:
    """Every disk is there, in a local directory."""

    async def disk(_: Speaker, ask: Any, caller: Caller) -> Disk:
        now = utc_now()
        return Disk(
            id=ask.id, revision=1, created_at=now, updated_at=now, name="d", storage_domain_id="s",
            status=DiskStatus.OK, size_bytes=MIB,
        )  # fmt: skip

    async def reach(_: Speaker, ask: ReachDisks, caller: Caller) -> DiskReach:
        return DiskReach(any_host=False, host_ids=(LOCAL,), local_host_id=LOCAL)

    return Speaker(Owner.STORAGE, answers=[(GET_DISK, disk), (REACH_DISKS, reach)])


async def cluster_id(bus: Bus, *, local: bool = False) -> str:
    center = await bus.ask(CREATE_DATA_CENTER, CreateDataCenter(name=new_id(), local=local))
    return (await bus.ask(CREATE_CLUSTER, CreateCluster(name=new_id(), data_center_id=center.id))).id


async def test_what_could_never_be_restarted_elsewhere_is_refused_and_nothing_is_made(
    configured: Settings,
) -> None:
    async with running(configured, service, storage().service()) as bus:
        shared, alone = await cluster_id(bus), await cluster_id(bus, local=True)
        one, two = new_id(), new_id()
        disk = NewDisk(disk_id=new_id())
        cases: list[tuple[str, dict[str, Any]]] = [
            ("pinned", {"affinity": Affinity(host_ids=(one,))}),
            ("pinned", {"affinity": Affinity(host_ids=(one, one))}),
            ("local_data_center", {"cluster_id": alone}),
            ("local_disk", {"disks": (disk,)}),
        ]
        for rule, fields in cases:
            made: dict[str, Any] = {"name": "db", "cluster_id": shared, "memory_bytes": 64 * MIB}
            ask = CreateVm(**(made | {"high_availability": ELSEWHERE} | fields))
            with pytest.raises(Refused, match="VM db can't be restarted elsewhere") as refused:
                await bus.ask(CREATE_VM, ask)
            assert (refused.value.kind, refused.value.details["rule"]) == (Kind.CONFLICT, rule)
            assert "same_host" in refused.value.message
        assert (await bus.ask(LIST_VMS, ListQuery())).items == ()
        fits = Affinity(host_ids=(one, two))
        await bus.ask(
            CREATE_VM,
            CreateVm(
                name="db",
                cluster_id=shared,
                memory_bytes=64 * MIB,
                high_availability=ELSEWHERE,
                affinity=fits,
            ),
        )


async def test_what_was_always_accepted_still_is_and_its_own_host_may_be_asked_for(
    configured: Settings,
) -> None:
    same = HighAvailability(enabled=True, where=RestartWhere.SAME_HOST)
    async with running(configured, service, storage().service()) as bus:
        pinned = Affinity(host_ids=(new_id(),))
        for number, available in enumerate((ALWAYS_ACCEPTED, same)):
            ask = CreateVm(
                name=f"vm{number}",
                cluster_id=await cluster_id(bus),
                memory_bytes=64 * MIB,
                high_availability=available,
                affinity=pinned,
            )
            await bus.ask(CREATE_VM, ask)


async def test_neither_an_edit_nor_a_disk_makes_it_impossible_afterwards(configured: Settings) -> None:
    async with world_of(configured, storage().service()) as (world, (h1, h2)):
        vm = await world.vm(start=False)
        both = Affinity(host_ids=(h1.id, h2.id))
        await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, high_availability=ELSEWHERE, affinity=both))
        for ask in (
            UpdateVm(id=vm.id, affinity=Affinity(host_ids=(h1.id,))),
            UpdateVm(id=vm.id, affinity=Affinity(host_ids=(h2.id,)), high_availability=ELSEWHERE),
        ):
            with pytest.raises(Refused, match="pinned to host"):
                await world.bus.ask(UPDATE_VM, ask)
        with pytest.raises(Refused, match="local directory"):
            await world.bus.ask(ATTACH_VM_DISK, AttachVmDisk(id=vm.id, disk_id=new_id()))
        assert (await world.get(vm.id)).affinity == both
        await world.bus.ask(UPDATE_VM, UpdateVm(id=vm.id, description="may be edited"))


async def test_ha_is_told_what_vms_need_where_they_run_and_whether_they_are_settled(
    configured: Settings,
) -> None:
    async with world_of(configured) as (world, (h1, _)):
        up, down = await world.vm(ha=True), await world.vm(start=False)
        answer = await world.bus.ask(DESCRIBE_NEEDS, VmNeeds(vm_ids=(up.id, down.id, new_id())))
        told = {vm.need.vm_id: vm for vm in answer.vms}
        assert told.keys() == {up.id, down.id}
        assert (told[up.id].host_id, told[up.id].highly_available, told[up.id].settled) == (h1.id, True, True)
        assert (told[down.id].host_id, told[down.id].highly_available) == ("", False)
        assert told[up.id].need.memory_bytes == 64 * MIB
        with pytest.raises(Refused, match="at most 200"):
            await world.bus.ask(DESCRIBE_NEEDS, VmNeeds(vm_ids=(up.id,) * 201))


async def test_a_restart_on_its_own_host_only_is_tried_nowhere_else(configured: Settings) -> None:
    async with world_of(configured) as (world, (h1, h2)):
        vm = await world.vm(ha=True)
        await h1.tell(vm.id, "crashed", vm.epoch, "crashed")
        await world.vm_is(vm.id, VmStatus.DOWN)
        world.scheduler.host_ids.remove(h1.id)
        ask = RestartVm(vm_id=vm.id, epoch=0, reason="crashed", only_host_id=h1.id)
        op = await world.ended(await world.bus.ask(RESTART_VM, ask))
        assert op.state is OperationState.FAILED
        assert op.problem is not None
        assert op.problem.kind is Kind.EXHAUSTED
        assert world.scheduler.asked[-1].target_host_id == h1.id
        assert not h2.domains


async def test_a_cluster_reserves_for_0_to_16_hosts(configured: Settings) -> None:
    async with running(configured, service) as bus:
        cluster = await cluster_id(bus)
        ask = UpdateCluster(id=cluster, reserve_host_failures=2)
        assert (await bus.ask(UPDATE_CLUSTER, ask)).reserve_host_failures == 2
        for wrong in (-1, 17):
            with pytest.raises(Refused, match="reserve_host_failures is 0 to 16 hosts"):
                await bus.ask(UPDATE_CLUSTER, UpdateCluster(id=cluster, reserve_host_failures=wrong))
