"""What was under way in a backup doesn't go on against what the hosts have done since."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from tests.inventory.restores import (
    Story,
    backed_up_during,
    backed_up_while_placing,
    before_the_restore,
    refused,
    story_of,
)
from tests.inventory.world import inventory_of, until
from tests.support.backup import restored
from volery.contracts.base import Owner
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import DETACH_DISK, FORGET_DOMAIN, RUN_DOMAIN
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import Operation, OperationState
from volery.contracts.vm import (
    ATTACH_VM_DISK,
    DELETE_VM,
    DETACH_VM_DISK,
    MIGRATE_VM,
    START_VM,
    STOP_VM,
    SUSPEND_VM,
    AttachVmDisk,
    DeleteVm,
    DetachVmDisk,
    MigrateVm,
    NewDisk,
    StartVm,
    StopVm,
    SuspendVm,
    Vm,
    VmStatus,
)
from volery.runtime.programs import Settings


async def test_a_start_makes_no_second_copy_of_what_came_to_run_elsewhere(configured: Settings) -> None:
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, second = story.hosts
            vm = await world.vm(start=False)
            op = await backed_up_during(story, first, RUN_DOMAIN, START_VM, StartVm(id=vm.id))
            await story.stop(vm.id)
            now = await story.start(vm.id, second)
        async with story.restored():
            assert "runs on host" in await refused(story, op)
            shown = await world.vm_is(vm.id, VmStatus.UP)
            assert (shown.host_id, shown.epoch) == (second.id, now.epoch)
        assert story.homes(vm.id) == [second.id]
        assert not second.agent.begun(FORGET_DOMAIN.kind)
        assert len(first.agent.begun(RUN_DOMAIN.kind)) == 1


async def test_a_backup_beside_an_empty_bus_makes_no_second_copy(configured: Settings) -> None:
    """The control plane's machine was lost: no stream tells that the database is older, only the hosts do."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            _, second = story.hosts
            vm = await world.vm(start=False)
            await story.backed_up()
            now = await story.start(vm.id, second)
            await second.agent.until_committed("inventory")
        await second.agent.kill()
        await restored(world.settings.database, Owner.INVENTORY, story.backup)
        await story.bus_lost()
        async with inventory_of(world):
            await until(story.leads, "inventory leads, and has found its stream lost")
            with pytest.raises(Refused) as put_off:
                await world.bus.ask(START_VM, StartVm(id=vm.id))
            assert put_off.value.kind is Kind.UNAVAILABLE
            assert second.id in put_off.value.details["waits_for_hosts"]
            await second.agent.start()
            shown = await world.vm_is(vm.id, VmStatus.UP)
            assert (shown.host_id, shown.epoch) == (second.id, now.epoch)
            assert shown.status_reason == "restored"
            assert await story.was_quarantined()
            await until(story.out_of_quarantine, "every host has reported")
            await story.stop(vm.id)
        assert story.homes(vm.id) == []
        assert len(second.agent.begun(RUN_DOMAIN.kind)) == 1
        assert not second.agent.begun(FORGET_DOMAIN.kind)


async def test_what_was_under_way_in_a_backup_beside_an_empty_bus_waits_for_the_hosts(
    configured: Settings,
) -> None:
    """In doubt, too: the host that knows better speaks last, and the others have nothing to say against going on."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, second = story.hosts
            vm, another = [await world.vm(start=False) for _ in range(2)]
            for host in story.hosts:
                await host.agent.until_committed("inventory")
            op = await backed_up_while_placing(story, START_VM, StartVm(id=vm.id))
            await first.agent.until_committed("inventory")
        await first.agent.kill()
        world.scheduler.host_ids.reverse()
        await restored(world.settings.database, Owner.INVENTORY, story.backup)
        await story.bus_lost()
        asked = len(world.scheduler.asked)

        async def waits_for_the_first_alone() -> bool:
            with pytest.raises(Refused) as put_off:
                await world.bus.ask(START_VM, StartVm(id=another.id))
            return put_off.value.details.get("waits_for_hosts") == [first.id]

        async with inventory_of(world):
            await until(story.leads, "inventory leads, and has found its stream lost")
            await until(waits_for_the_first_alone)
            assert len(world.scheduler.asked) == asked
            await first.agent.start()
            assert "runs on host" in await refused(story, op)
            assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == first.id
        assert story.homes(vm.id) == [first.id]
        assert not second.agent.begun(RUN_DOMAIN.kind)


async def test_reports_from_between_backup_and_restore_end_no_quarantine(configured: Settings) -> None:
    """The hosts' stream has them, and after them what became of the VMs since. Only what hosts say when they are asked is
    how they are now."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, second = story.hosts
            vm = await story.running_on(first)
            await story.backed_up()
            await story.stop(vm.id)
            await story.start(vm.id, second)
            for host in story.hosts:
                await host.agent.report("inventory")
            await story.stop(vm.id)
            now = await story.start(vm.id, first)
            for host in story.hosts:
                await host.agent.until_committed("inventory")
                await host.agent.kill()
        await restored(world.settings.database, Owner.INVENTORY, story.backup)
        async with inventory_of(world):
            await until(story.has_replayed, "all that hosts had said was heard again")
            with pytest.raises(Refused) as put_off:
                await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True))
            assert put_off.value.kind is Kind.UNAVAILABLE
            assert set(put_off.value.details["waits_for_hosts"]) == {first.id, second.id}
            for host in story.hosts:
                await host.agent.start()
            await until(story.out_of_quarantine, "every host has reported")
            shown = await world.vm_is(vm.id, VmStatus.UP)
            assert (shown.host_id, shown.epoch) == (first.id, now.epoch)
        assert story.homes(vm.id) == [first.id]
        assert not [host for host in story.hosts if host.agent.begun(FORGET_DOMAIN.kind)]


async def test_a_host_that_has_a_vm_under_a_later_epoch_tells_of_a_restore(configured: Settings) -> None:
    """A standby that lacked the last moment took over, and neither stream nor journal tell: it isn't ended as a stray."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, second = story.hosts
            vm = await story.running_on(first)
            first.domains.clear()
            await second.tell(vm.id, DomainState.RUNNING, vm.epoch + 1, "booted")

            async def taken_over() -> bool:
                return (await world.get(vm.id)).host_id == second.id

            await until(taken_over)
            shown = await world.get(vm.id)
            assert (shown.epoch, shown.status_reason) == (vm.epoch + 1, "restored")
            await until(story.out_of_quarantine, "every host has reported")
            assert await story.was_quarantined()
        assert story.homes(vm.id) == [second.id]
        assert not second.agent.begun(FORGET_DOMAIN.kind)


@pytest.mark.parametrize("silent", [False, True])
async def test_a_lost_bus_alone_begins_no_quarantine(configured: Settings, silent: bool) -> None:
    """Operations go on when every host has reported, or at the latest after some seconds."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, second = story.hosts
            vm = await world.vm(start=False)
            for host in story.hosts:
                await host.agent.until_committed("inventory")
        if silent:
            await second.agent.kill()
        await story.bus_lost()
        async with inventory_of(world):
            await until(story.leads, "inventory leads, and has found its stream lost")
            await story.done(await story.started(vm.id))
            assert (await world.get(vm.id)).host_id == first.id
        assert not await story.was_quarantined()


@pytest.mark.parametrize("moment", ["placing", "running"])
async def test_a_start_that_came_true_after_the_backup_stays_where_it_is(
    configured: Settings, moment: str
) -> None:
    """Also when nobody had decided yet where: the scheduler may say another host the second time."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, second = story.hosts
            vm = await world.vm(start=False)
            ask = StartVm(id=vm.id)
            if moment == "placing":
                op = await backed_up_while_placing(story, START_VM, ask)
            else:
                op = await backed_up_during(story, first, RUN_DOMAIN, START_VM, ask)
        world.scheduler.host_ids.reverse()
        async with story.restored():
            assert "runs on host" in await refused(story, op)
            assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == first.id
            await first.agent.until_committed("inventory")
        assert story.homes(vm.id) == [first.id]
        assert not first.agent.begun(FORGET_DOMAIN.kind)
        assert not second.agent.log


async def test_a_start_that_no_host_knows_of_any_more_is_not_taken_for_done(configured: Settings) -> None:
    """Its host has kept the answer to its order: "it runs". It was stopped afterwards."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, _ = story.hosts
            vm = await world.vm(start=False)
            op = await backed_up_during(story, first, RUN_DOMAIN, START_VM, StartVm(id=vm.id))
            await story.stop(vm.id)
        async with story.restored():
            assert "start it again" in await refused(story, op)
            await world.vm_is(vm.id, VmStatus.DOWN)
            assert story.homes(vm.id) == []
            again = await story.start(vm.id, first)
            assert again.epoch > vm.epoch + 1
        assert story.homes(vm.id) == [first.id]


async def test_memory_that_was_saved_before_the_vm_ran_again_is_forgotten(configured: Settings) -> None:
    """It would be restored onto disks that have changed since."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, _ = story.hosts
            vm = await world.vm()
            await story.done(await world.bus.ask(SUSPEND_VM, SuspendVm(id=vm.id)))
            await story.backed_up()
            await story.start(vm.id, first)
            assert first.agent.begun(RUN_DOMAIN.kind)[-1].restore_path
        async with story.restored():
            await world.vm_is(vm.id, VmStatus.UP)
            await story.stop(vm.id)
            await story.start(vm.id, first)
            assert not first.agent.begun(RUN_DOMAIN.kind)[-1].restore_path


async def test_memory_from_before_the_restore_is_not_resumed(configured: Settings) -> None:
    """The VM ran since, on disks that have changed, and runs no more: no host tells of it, nor any stream."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, _ = story.hosts
            vm = await world.vm()
            await story.done(await world.bus.ask(SUSPEND_VM, SuspendVm(id=vm.id)))
            await story.backed_up()
            await story.stop(vm.id)
            await story.start(vm.id, first)
            await story.stop(vm.id)
            await first.agent.until_committed("inventory")
        await restored(world.settings.database, Owner.INVENTORY, story.backup)
        await story.bus_lost()
        async with inventory_of(world):
            await until(story.was_quarantined, "the first host tells of the restore")
            await until(story.out_of_quarantine, "every host has reported")
            await world.vm_is(vm.id, VmStatus.SUSPENDED)
            with pytest.raises(Refused, match="its saved memory would ruin its disks") as put_off:
                await world.bus.ask(START_VM, StartVm(id=vm.id))
            assert put_off.value.kind is Kind.CONFLICT
            await story.stop(vm.id)
            await story.start(vm.id, first)
            assert not [run for run in first.agent.begun(RUN_DOMAIN.kind) if run.restore_path]


async def test_a_vm_that_has_moved_stays_where_it_arrived(configured: Settings) -> None:
    """Nobody had decided where to; the scheduler says another host the second time."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story, hosts=3):
            _, second, third = story.hosts
            vm = await world.vm()
            op = await backed_up_while_placing(story, MIGRATE_VM, MigrateVm(id=vm.id))
            assert story.homes(vm.id) == [second.id]
        world.scheduler.host_ids.reverse()
        async with story.restored():
            assert "migrate it again" in await refused(story, op)
            assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == second.id
            await second.agent.until_committed("inventory")
        assert story.homes(vm.id) == [second.id]
        assert not second.agent.begun(FORGET_DOMAIN.kind)
        assert not third.agent.log


async def begun_deletion(story: Story, vm: Vm) -> Operation:
    """Backed up while it is under way; then it fails, and the VM is as before."""
    storage, bus = story.storage, story.world.bus
    storage.may_detach.clear()
    op = await bus.ask(DELETE_VM, DeleteVm(id=vm.id))
    await storage.detach_asked.wait()
    await story.backed_up()
    storage.refuses = True
    storage.may_detach.set()
    assert (await story.world.ended(op)).state is OperationState.FAILED
    storage.refuses = False
    return op


async def test_a_deletion_takes_nothing_from_a_vm_that_came_to_run(configured: Settings) -> None:
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            disk = story.disk()
            vm = await world.vm(start=False, disks=(NewDisk(disk_id=disk.id),))
            op = await begun_deletion(story, vm)
            await story.start(vm.id, story.hosts[0])
        async with story.restored():
            assert "runs on host" in await refused(story, op)
            shown = await world.vm_is(vm.id, VmStatus.UP)
            assert [d.disk_id for d in shown.disks] == [disk.id]
        assert story.homes(vm.id) == [story.hosts[0].id]
        assert (story.storage.detached, story.storage.deleted) == ([], [])


async def test_a_deletion_deletes_no_disk_that_was_given_to_another_vm(configured: Settings) -> None:
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            disk = story.disk()
            vm = await world.vm(start=False, disks=(NewDisk(disk_id=disk.id),))
            other = await world.vm()
            op = await begun_deletion(story, vm)
            await story.done(await world.bus.ask(DETACH_VM_DISK, DetachVmDisk(id=vm.id, disk_id=disk.id)))
            story.storage.detached.clear()
            await story.done(await world.bus.ask(ATTACH_VM_DISK, AttachVmDisk(id=other.id, disk_id=disk.id)))
        async with story.restored():
            ended = await world.ended(op)
            assert ended.problem is not None
            assert ended.problem.details["vm_id"] == other.id
            assert (await world.vm_is(vm.id, VmStatus.DOWN)).disks
        assert (story.storage.detached, story.storage.deleted) == ([], [])


async def test_a_vm_whose_disk_another_has_open_is_not_started(configured: Settings) -> None:
    """A VM that the restored database doesn't know."""
    async with story_of(configured) as story:
        world = story.world
        async with before_the_restore(story):
            first, second = story.hosts
            disk = story.disk()
            vm = await world.vm(start=False, disks=(NewDisk(disk_id=disk.id),))
            unknown = new_id()
            await second.tell(unknown, DomainState.RUNNING, 3)
            second.domains[unknown] = replace(second.domains[unknown], disk_ids=(disk.id,))
            await second.agent.report("inventory")
            await second.agent.until_committed("inventory")
            failed = await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id, host_id=first.id)))
            assert failed.problem is not None
            assert "has it open" in failed.problem.message
            assert story.homes(vm.id) == []
            await second.tell(unknown, DomainState.SHUTOFF, 3)
            await second.agent.until_committed("inventory")
            await story.start(vm.id, first)


@pytest.mark.parametrize("restores", [1, 2])
async def test_a_disk_is_not_free_before_its_guest_let_go_of_it_again(
    configured: Settings, restores: int
) -> None:
    """It was unplugged once, and plugged in again after the backup. The host has kept its first answer."""
    async with story_of(configured) as story:
        world, storage = story.world, story.storage
        async with before_the_restore(story):
            first, _ = story.hosts
            disk = story.disk()
            vm = await world.vm(disks=(NewDisk(disk_id=disk.id),))
            first.domains[vm.id] = replace(first.domains[vm.id], disk_ids=(disk.id,))
            op = await backed_up_during(
                story, first, DETACH_DISK, DETACH_VM_DISK, DetachVmDisk(id=vm.id, disk_id=disk.id)
            )
        for _ in range(restores):
            first.domains[vm.id] = replace(first.domains[vm.id], disk_ids=(disk.id,))
            storage.detached.clear()
            held = first.held[DETACH_DISK.kind] = asyncio.Event()
            first.begun.clear()
            async with story.restored():
                async with asyncio.timeout(20):
                    await first.begun.wait()
                assert storage.detached == []
                held.set()
                await story.done(op)
                assert first.domains[vm.id].disk_ids == ()
                assert storage.detached == [disk.id]
                assert (await world.get(vm.id)).disks == ()
                await story.known_history()
