"""A host is proven dead: what ran there has ended, what was ordered from it too, and nothing else has."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import msgspec
import pytest

from tests.inventory.world import Machine, World, found_cluster, inventory_of, surroundings, until, world_of
from volery.contracts.agent import Outcome
from volery.contracts.base import Owner
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import (
    ACT_ON_DOMAIN,
    ADMIT_MIGRATION,
    FORGET_DOMAIN,
    MIGRATE_DOMAIN,
    RUN_DOMAIN,
    STOP_DOMAIN,
    DomainStopped,
    StopDomain,
    StopMethod,
)
from volery.contracts.errors import Kind, Problem, Refused
from volery.contracts.host import HostStatus
from volery.contracts.ids import new_id
from volery.contracts.liveness import LivenessState, Proof, ProofKind
from volery.contracts.operation import CANCEL_OPERATION, CancelOperation, Operation, OperationState
from volery.contracts.vm import (
    ACT_ON_VM,
    MIGRATE_VM,
    RESTART_VM,
    START_VM,
    STOP_VM,
    ActOnVm,
    DesiredState,
    MigrateVm,
    RestartVm,
    StartVm,
    StopVm,
    Vm,
    VmAction,
    VmStatus,
)
from volery.runtime.bus import Caller
from volery.runtime.database import open_pool
from volery.runtime.programs import Settings


async def restart(world: World, vm: Vm, **fields: object) -> Vm:
    """As ha asks for it."""
    ask = RestartVm(vm_id=vm.id, epoch=vm.epoch, reason=vm.status_reason, **fields)  # type: ignore[arg-type]

    op = await world.bus.ask(RESTART_VM, ask, Caller("service:ha", f"r-{vm.id}", "r"))
    assert (await world.ended(op)).state is OperationState.SUCCEEDED
    return await world.vm_is(vm.id, VmStatus.UP)


async def silent(world: World, machine: Machine) -> None:
    await world.liveness(machine, LivenessState.NON_RESPONSIVE)
    await world.host_is(machine, HostStatus.NON_RESPONSIVE)


async def test_the_vms_of_a_dead_host_have_ended_and_restart_elsewhere(configured: Settings) -> None:
    async with world_of(configured) as (world, (first, second)):
        plain, protected = await world.vm(), await world.vm(ha=True)
        boot_id = await first.die()
        await silent(world, first)
        assert (await world.vm_is(protected.id, VmStatus.UNKNOWN)).host_id == first.id
        await world.proven_dead(first, boot_id)
        await world.host_is(first, HostStatus.DOWN)
        down = await world.vm_is(protected.id, VmStatus.DOWN)
        assert (down.desired, down.status_reason, down.host_id) == (DesiredState.UP, "host_died", "")
        other = await world.vm_is(plain.id, VmStatus.DOWN)
        assert (other.desired, other.status_reason) == (DesiredState.DOWN, "host_died")
        again = await restart(world, down, preferred_host_id=second.id, avoided_host_ids=(first.id,))
        assert again.epoch > down.epoch
        asked = world.scheduler.asked[-1]
        assert (asked.preferred_host_id, asked.avoided_host_ids) == (second.id, (first.id,))


async def test_a_proof_for_another_boot_ends_nothing(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await world.vm(ha=True)
        proof = Proof(id=new_id(), kind=ProofKind.NEW_BOOT, at=datetime.now(UTC), boot_id="the boot before")
        await world.liveness(host, LivenessState.UP, proof=proof)
        marker = await world.vm()
        assert (await world.get(marker.id)).status is VmStatus.UP
        await world.until_noted(host, "the boot before")
        assert (await world.get(vm.id)).status is VmStatus.UP


async def test_a_proof_that_was_voided_before_it_was_heard_has_no_effect(configured: Settings) -> None:
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            host = await world.machine("h1")
            vm = await world.vm(ha=True)
        await world.proven_dead(host, host.agent.boot_id)
        await world.void(host)
        await world.proven_dead(host, "another boot")
        async with inventory_of(world):
            await world.until_noted(host, "another boot")
            found = await world.get(vm.id)
            assert (found.desired, found.host_id) == (DesiredState.UP, host.id)
            assert vm.id in host.domains


async def test_a_death_that_was_missed_is_found(configured: Settings) -> None:
    """No fact is heard: ha's list says it."""
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            host = await world.machine("h1")
            vm = await world.vm(ha=True)
        boot_id = await host.die()
        await world.proven_dead(host, boot_id, announced=False)
        async with inventory_of(world):
            assert (await world.vm_is(vm.id, VmStatus.DOWN)).status_reason == "host_died"


async def test_a_host_that_dies_alone_is_no_blackout(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        waived = await world.vm(ha=True, start_after_blackout=False)
        wanted = await world.vm(start_after_blackout=True)
        await world.proven_dead(host, await host.die())
        assert (await world.vm_is(waived.id, VmStatus.DOWN)).desired is DesiredState.UP
        assert (await world.vm_is(wanted.id, VmStatus.DOWN)).desired is DesiredState.DOWN


@pytest.mark.parametrize("first", ["ha's proof", "its own report"])
async def test_a_host_that_died_while_inventory_was_down_died_in_a_blackout(
    configured: Settings, first: str
) -> None:
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            host = await world.machine("h1")
            waived = await world.vm(ha=True, start_after_blackout=False)
            wanted = await world.vm(start_after_blackout=True)
            stopped = await world.vm(start_after_blackout=True)
            await world.ended(await world.bus.ask(STOP_VM, StopVm(id=stopped.id)))
        boot_id = await host.die()
        if first == "ha's proof":
            await world.proven_dead(host, boot_id)
        else:
            await host.boot()
        async with inventory_of(world):
            assert (await world.vm_is(waived.id, VmStatus.DOWN)).desired is DesiredState.DOWN
            down = await world.vm_is(wanted.id, VmStatus.DOWN)
            assert (down.desired, down.status_reason) == (DesiredState.UP, "host_died")
            assert (await world.get(stopped.id)).desired is DesiredState.DOWN
            if first == "ha's proof":
                await host.boot()
                await world.host_is(host, HostStatus.DOWN)
                await world.liveness(host, LivenessState.UP)
            await restart(world, down)


async def test_a_stop_succeeds_when_its_host_dies(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await world.vm(ha=True)
        host.held[STOP_DOMAIN.kind] = asyncio.Event()
        host.begun.clear()
        op = await world.bus.ask(STOP_VM, StopVm(id=vm.id))
        await host.begun.wait()
        await world.proven_dead(host, await host.die())
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        down = await world.vm_is(vm.id, VmStatus.DOWN)
        assert (down.desired, down.status_reason) == (DesiredState.DOWN, "user")


async def test_a_stop_asked_of_a_silent_host_stays_asked_for(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await world.vm(ha=True)
        boot_id = await host.die()
        await silent(world, host)
        await world.vm_is(vm.id, VmStatus.UNKNOWN)
        op = await world.bus.ask(STOP_VM, StopVm(id=vm.id))
        assert (await world.get(vm.id)).status is VmStatus.UNKNOWN
        await world.proven_dead(host, boot_id)
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        down = await world.vm_is(vm.id, VmStatus.DOWN)
        assert (down.desired, down.status_reason) == (DesiredState.DOWN, "user")


async def test_a_stop_that_a_silent_host_never_answered_stays_asked_for_when_it_is_heard_again_first(
    configured: Settings,
) -> None:
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            host = await world.machine("h1")
            vm = await world.vm(ha=True)
            await host.agent.kill()
            await silent(world, host)
            await world.vm_is(vm.id, VmStatus.UNKNOWN)
            op = await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True))
        told = list[StopDomain]()

        async def stop(ask: StopDomain) -> DomainStopped:
            told.append(ask)
            await host.tell(ask.vm_id, DomainState.SHUTOFF, vm.epoch, "destroyed")
            return DomainStopped(vm_id=ask.vm_id)

        host.agent.does(STOP_DOMAIN, stop)
        await pass_the_deadline(world, op)
        await world.liveness(host, LivenessState.UP)
        async with inventory_of(world):
            await world.host_is(host, HostStatus.UP)
            await host.agent.start()
            assert (await world.ended(op)).state is OperationState.FAILED
            down = await world.vm_is(vm.id, VmStatus.DOWN)
            assert down.desired is DesiredState.DOWN
            assert [ask.methods for ask in told] == [(StopMethod.DESTROY,)]  # as it was asked for


async def deadline_now(world: World, op: Operation) -> None:
    """For whoever takes it up next."""
    async with open_pool(world.settings.database, "inventory") as pool:
        doc = await pool.fetchval("select doc from operation where id = $1", op.id)
        due = msgspec.structs.replace(msgspec.json.decode(doc, type=Operation), deadline=datetime.now(UTC))
        await pool.execute(
            "update operation set doc = $2 where id = $1", op.id, msgspec.json.encode(due).decode()
        )


async def pass_the_deadline(world: World, op: Operation) -> None:
    """As an operation is left when its deadline and the grace are over, and its host has not answered."""
    async with open_pool(world.settings.database, "inventory") as pool:
        doc = await pool.fetchval("select doc from operation where id = $1", op.id)
        was = msgspec.json.decode(doc, type=Operation)
        left = msgspec.structs.replace(
            was,
            state=OperationState.FAILED,
            outcome_pending=True,
            problem=Problem(kind=Kind.TIMEOUT, message="it did not finish by its deadline"),
        )
        sql = "update operation set state = 'failed', doc = $2 where id = $1"
        await pool.execute(sql, op.id, msgspec.json.encode(left).decode())


async def test_a_stop_of_a_silent_host_that_a_person_took_back_is_no_longer_asked_for(
    configured: Settings,
) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await world.vm(ha=True)
        await host.agent.kill()
        await silent(world, host)
        await world.vm_is(vm.id, VmStatus.UNKNOWN)
        op = await world.bus.ask(STOP_VM, StopVm(id=vm.id))
        await world.bus.ask(CANCEL_OPERATION[Owner.INVENTORY], CancelOperation(id=op.id))
        await host.agent.start()
        assert (await world.ended(op)).state is OperationState.CANCELLED
        assert (await world.get(vm.id)).desired is DesiredState.UP


async def test_a_reset_fails_with_the_death_and_its_proof(configured: Settings) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await world.vm(ha=True)
        host.held[ACT_ON_DOMAIN.kind] = asyncio.Event()
        host.begun.clear()
        op = await world.bus.ask(ACT_ON_VM, ActOnVm(id=vm.id, action=VmAction.RESET))
        await host.begun.wait()
        await world.proven_dead(host, await host.die())
        ended = await world.ended(op)
        assert ended.state is OperationState.FAILED
        assert ended.problem is not None
        assert "died (bmc_off" in ended.problem.message
        assert ended.problem.details["outcome"] == Outcome.HOST_DIED
        assert (await world.vm_is(vm.id, VmStatus.DOWN)).desired is DesiredState.UP


async def test_a_start_goes_on_elsewhere_when_its_host_dies(configured: Settings) -> None:
    async with world_of(configured) as (world, (first, second)):
        vm = await world.vm(start=False)
        first.held[RUN_DOMAIN.kind] = asyncio.Event()
        first.begun.clear()
        op = await world.bus.ask(START_VM, StartVm(id=vm.id))
        await first.begun.wait()
        await world.proven_dead(first, await first.die())
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        up = await world.vm_is(vm.id, VmStatus.UP)
        assert up.host_id == second.id
        await first.boot()  # what its journal had of the boot that died is not carried out
        await first.agent.until_committed("inventory")
        assert vm.id not in first.domains
        assert second.domains[vm.id].epoch == up.epoch
        assert not first.agent.begun(FORGET_DOMAIN.kind)


async def test_an_order_that_was_never_sent_does_not_wait_for_the_dead_host(configured: Settings) -> None:
    async with world_of(configured) as (world, (first, second)):
        vm = await world.vm(start=False)
        await world.proven_dead(first, await first.die())
        await world.host_is(first, HostStatus.DOWN)
        op = await world.bus.ask(START_VM, StartVm(id=vm.id))  # this scheduler has not heard of it
        assert (await world.ended(op)).state is OperationState.SUCCEEDED
        assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == second.id


async def test_what_a_rebooted_host_runs_is_not_ended_by_the_proof_of_its_former_boot(
    configured: Settings,
) -> None:
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await world.vm(ha=True)
        former = await host.die()
        await host.boot()
        down = await world.vm_is(vm.id, VmStatus.DOWN)  # its full report doesn't name it
        assert (down.status_reason, down.desired) == ("host_died", DesiredState.UP)
        up = await restart(world, down)
        proof = Proof(id=new_id(), kind=ProofKind.NEW_BOOT, at=datetime.now(UTC), boot_id=former)
        await world.liveness(host, LivenessState.UP, proof=proof)
        await world.until_noted(host, former)
        assert (await world.get(vm.id)).status is VmStatus.UP
        assert host.domains[vm.id].epoch == up.epoch


async def test_a_late_word_of_a_dead_boot_changes_nothing(configured: Settings) -> None:
    async with world_of(configured) as (world, (first, second)):
        vm = await world.vm(ha=True)
        boot_id = first.agent.boot_id
        await world.proven_dead(first, await first.die())
        up = await restart(world, await world.vm_is(vm.id, VmStatus.DOWN))
        # Restarted on the same boot's journal: it still has to say what it saw before it died.
        first.agent.boot_id = boot_id
        await first.agent.start()
        await first.tell(vm.id, DomainState.RUNNING, vm.epoch)
        await first.tell(vm.id, DomainState.CRASHED, vm.epoch, "crashed")
        await first.agent.until_committed("inventory")
        found = await world.get(vm.id)
        assert (found.status, found.host_id, found.epoch) == (VmStatus.UP, second.id, up.epoch)


async def moving(world: World, source: Machine, vm: Vm) -> object:
    source.held[MIGRATE_DOMAIN.kind] = asyncio.Event()
    source.begun.clear()
    op = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id))

    async def begun() -> bool:
        return bool(source.agent.begun(MIGRATE_DOMAIN.kind))

    await until(begun)
    return op


@pytest.mark.parametrize("reason", ["", "postcopy"])
async def test_a_migration_whose_source_dies_restarts_unless_it_has_arrived(
    configured: Settings, reason: str
) -> None:
    """Not yet there, or its memory still on the source: what waits at the destination is ended, then it is down."""
    async with world_of(configured) as (world, (source, target)):
        vm = await world.vm(ha=True)
        op = await moving(world, source, vm)
        state = DomainState.RUNNING if reason else DomainState.INCOMING
        await target.tell(vm.id, state, vm.epoch + 1, reason)
        await world.proven_dead(source, await source.die())
        assert (await world.ended(op)).state is OperationState.FAILED  # type: ignore[arg-type]
        down = await world.vm_is(vm.id, VmStatus.DOWN)
        assert (down.desired, down.status_reason) == (DesiredState.UP, "host_died")
        assert vm.id not in target.domains
        assert down.epoch > vm.epoch + 1


async def test_a_migration_that_had_arrived_survives_its_source(configured: Settings) -> None:
    async with world_of(configured) as (world, (source, target)):
        vm = await world.vm(ha=True)
        op = await moving(world, source, vm)
        await source.arrive(vm.id, target, vm.epoch + 1)
        await world.proven_dead(source, await source.die())
        assert (await world.ended(op)).state is OperationState.SUCCEEDED  # type: ignore[arg-type]
        up = await world.vm_is(vm.id, VmStatus.UP)
        assert (up.host_id, up.epoch) == (target.id, vm.epoch + 1)
        assert not target.agent.begun(FORGET_DOMAIN.kind)


async def test_a_migration_whose_destination_dies_stays_at_its_source(configured: Settings) -> None:
    async with world_of(configured) as (world, (source, target)):
        vm = await world.vm(ha=True)
        op = await moving(world, source, vm)
        await world.proven_dead(target, await target.die())
        source.refusals[MIGRATE_DOMAIN.kind] = Refused(Kind.UNAVAILABLE, "the destination is gone")
        source.held[MIGRATE_DOMAIN.kind].set()
        assert (await world.ended(op)).state is OperationState.FAILED  # type: ignore[arg-type]
        up = await world.vm_is(vm.id, VmStatus.UP)
        assert (up.host_id, up.epoch) == (source.id, vm.epoch + 2)
        assert source.domains[vm.id].epoch == vm.epoch + 2


async def test_a_vm_that_arrived_at_an_unknown_boot_waits_for_its_host(configured: Settings) -> None:
    """The destination was reset before the VM came, and its agent isn't up yet: the former boot's end says nothing."""
    async with world_of(configured) as (world, (source, target)):
        vm = await world.vm(ha=True)
        op = await moving(world, source, vm)
        former = await target.die()
        await world.proven_dead(target, former)
        await world.host_is(target, HostStatus.DOWN)
        report = source.domains[vm.id]
        source.held[MIGRATE_DOMAIN.kind].set()  # libvirtd there is up, its agent is not
        assert (await world.ended(op)).state is OperationState.SUCCEEDED  # type: ignore[arg-type]
        await world.until_noted(target, former)
        assert (await world.get(vm.id)).host_id == target.id
        assert (await world.get(vm.id)).status is not VmStatus.DOWN
        assert report.vm_id in target.domains
        await target.boot()
        await world.liveness(target, LivenessState.UP, boot_id=target.agent.boot_id)
        assert (await world.vm_is(vm.id, VmStatus.UP)).epoch == vm.epoch + 1


async def test_admitting_a_migration_fails_when_the_destination_dies(configured: Settings) -> None:
    async with world_of(configured) as (world, (source, target)):
        vm = await world.vm(ha=True)
        target.held[ADMIT_MIGRATION.kind] = asyncio.Event()
        target.begun.clear()
        op = await world.bus.ask(MIGRATE_VM, MigrateVm(id=vm.id))
        await target.begun.wait()
        await world.proven_dead(target, await target.die())
        assert (await world.ended(op)).state is OperationState.FAILED
        assert (await world.vm_is(vm.id, VmStatus.UP)).host_id == source.id
        assert vm.id in source.domains
        assert Owner.INVENTORY in op.id
