"""What may happen together with a VM and its host: every cell of the table that inventory decides, by the service itself.

What holds a VM is begun and held where its host, storage or the scheduler would be at work; then the newcomer is asked for.
`CELLS` is what is played here: tests/contracts/test_together.py counts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping

import pytest

from tests.inventory.stages import DOWN, stage
from tests.inventory.test_snapshots import failed, snapshots
from tests.inventory.world import until
from volery.contracts import together
from volery.contracts.domain_orders import (
    MIGRATE_DOMAIN,
    RUN_DOMAIN,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import MAINTAIN_HOST, HostStatus, MaintainHost
from volery.contracts.ids import new_id
from volery.contracts.operation import Operation, OperationState
from volery.contracts.snapshot import (
    SnapshotStatus,
)
from volery.contracts.together import HELD, TABLE, Held, Outcome, Work
from volery.contracts.vm import (
    DELETE_VM,
    DeleteVm,
    MigrationPolicy,
    NewDisk,
    Vm,
    VmStatus,
)
from volery.runtime.programs import Settings

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
