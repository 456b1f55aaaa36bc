"""A VM whose QEMU was killed and does not end: it is not down before it has ended, and then it is what was asked for."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.inventory.test_io_errors import Storage, hurried
from tests.inventory.world import Machine, World, until, world_of
from volery.contracts.agent import DOMAIN_CHANGED
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import (
    FORGET_DOMAIN,
    RUN_DOMAIN,
    STOP_DOMAIN,
    UNKILLABLE,
    DomainRunning,
    DomainStopped,
    ForgetDomain,
    RunDomain,
    StopDomain,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import OperationState
from volery.contracts.vm import (
    RESTART_VM,
    START_VM,
    STOP_VM,
    DesiredState,
    IoErrorPolicy,
    RestartVm,
    StartVm,
    StopVm,
    Vm,
    VmStatus,
)
from volery.runtime.bus import Caller
from volery.runtime.programs import Settings

IN_VAIN = Refused(Kind.TIMEOUT, "its QEMU was sent SIGKILL and does not end", rule=UNKILLABLE)
HANGS = Refused(Kind.TIMEOUT, "its guest did not power off within 1 s")


def hangs(host: Machine, refusal: Refused, reason: str) -> list[StopDomain]:
    """From now on QEMU on this host answers nobody, and stops are refused so. Returns what it was told to stop."""
    told: list[StopDomain] = []

    async def stop(ask: StopDomain) -> DomainStopped:
        told.append(ask)
        report = replace(host.domains[ask.vm_id], responsive=False, reason=reason)
        host.domains[ask.vm_id] = report
        await host.agent.say("inventory", DOMAIN_CHANGED, domain=report)
        raise refusal

    host.agent.does(STOP_DOMAIN, stop)
    return told


async def stop_fails(world: World, vm: Vm, words: str) -> Vm:
    op = await world.ended(await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True)))
    assert op.state is OperationState.FAILED
    assert op.problem is not None
    assert words in op.problem.message
    return await world.vm_is(vm.id, VmStatus.NOT_RESPONDING)


@pytest.mark.parametrize("end", ["it ends", "its host dies"])
async def test_a_stop_that_kills_in_vain_stays_asked_for(configured: Settings, end: str) -> None:
    async with world_of(configured) as (world, (host, other)):
        vm = await world.vm(ha=True)
        told = hangs(host, IN_VAIN, UNKILLABLE)
        stuck = await stop_fails(world, vm, "does not end")
        shown = (stuck.status_reason, stuck.desired, stuck.host_id, stuck.epoch)
        assert shown == (UNKILLABLE, DesiredState.DOWN, host.id, vm.epoch)
        with pytest.raises(Refused, match="it is not_responding"):
            await world.bus.ask(START_VM, StartVm(id=vm.id))
        again = await stop_fails(world, vm, "does not end")  # asked by a person it is tried again
        assert (again.desired, len(told)) == (DesiredState.DOWN, 2)
        if end == "it ends":
            await host.tell(vm.id, DomainState.GONE, vm.epoch, "failed")
        else:
            await world.proven_dead(host, await host.die())
        down = await world.vm_is(vm.id, VmStatus.DOWN)
        assert (down.status_reason, down.desired) == ("user", DesiredState.DOWN)
        assert not other.domains


async def test_a_vm_whose_stop_failed_since_it_hangs_is_wanted_to_run(configured: Settings) -> None:
    """What was asked for and failed is over: it isn't asked again when the VM answers, and a crash is put right."""
    async with world_of(configured, hosts=1) as (world, (host,)):
        vm = await world.vm(ha=True)
        hangs(host, HANGS, "booted")
        stuck = await stop_fails(world, vm, "did not power off")
        assert stuck.desired is DesiredState.UP
        await host.tell(vm.id, DomainState.CRASHED, vm.epoch, "crashed")
        down = await world.vm_is(vm.id, VmStatus.DOWN)
        assert (down.status_reason, down.desired) == ("crashed", DesiredState.UP)


def never_dies(host: Machine) -> None:
    """A start fails on this host, and what it leaves can't be killed."""

    async def run(ask: RunDomain) -> DomainRunning:
        await host.tell(ask.vm_id, DomainState.RUNNING, host.agent.at_work[ask.vm_id].epoch, UNKILLABLE)
        host.domains[ask.vm_id] = replace(host.domains[ask.vm_id], responsive=False)
        raise Refused(Kind.INTERNAL, "its storage hangs")

    async def forget(ask: ForgetDomain) -> None:
        raise IN_VAIN

    host.agent.does(RUN_DOMAIN, run)
    host.agent.does(FORGET_DOMAIN, forget)


@pytest.mark.parametrize("end", ["it ends", "its host dies"])
async def test_a_start_that_can_t_be_taken_back_ends_and_says_so(configured: Settings, end: str) -> None:
    async with world_of(configured) as (world, (host, other)):
        vm = await world.vm(start=False)
        never_dies(host)
        op = await world.ended(await world.bus.ask(START_VM, StartVm(id=vm.id)))
        assert op.state is OperationState.FAILED
        assert op.problem is not None
        assert (op.problem.details["rule"], op.problem.message) == (UNKILLABLE, IN_VAIN.message)
        stuck = await world.vm_is(vm.id, VmStatus.NOT_RESPONDING)
        shown = (stuck.status_reason, stuck.desired, stuck.host_id, stuck.busy_with)
        assert shown == (UNKILLABLE, DesiredState.DOWN, host.id, "")
        with pytest.raises(Refused, match="it is not_responding"):
            await world.bus.ask(START_VM, StartVm(id=vm.id))
        await host.agent.report("inventory")
        await host.agent.until_committed("inventory")
        assert (await world.get(vm.id)).status is VmStatus.NOT_RESPONDING
        if end == "it ends":
            await host.tell(vm.id, DomainState.GONE, stuck.epoch, "failed")
        else:
            await world.proven_dead(host, await host.die())
        down = await world.vm_is(vm.id, VmStatus.DOWN)
        assert down.desired is DesiredState.DOWN
        assert not other.domains


async def test_a_restart_that_can_t_be_taken_back_is_wanted_once_it_has_ended(configured: Settings) -> None:
    async with world_of(configured) as (world, (host, other)):
        vm = await world.vm(ha=True)
        await host.tell(vm.id, DomainState.CRASHED, vm.epoch, "crashed")
        down = await world.vm_is(vm.id, VmStatus.DOWN)
        never_dies(host)
        ask = RestartVm(vm_id=vm.id, epoch=down.epoch, reason="crashed", preferred_host_id=host.id)
        op = await world.ended(await world.bus.ask(RESTART_VM, ask, Caller("service:ha", new_id(), "r")))
        assert op.state is OperationState.FAILED
        stuck = await world.vm_is(vm.id, VmStatus.NOT_RESPONDING)
        assert (stuck.status_reason, stuck.desired) == (UNKILLABLE, DesiredState.UP)
        assert not other.domains
        await host.tell(vm.id, DomainState.GONE, stuck.epoch, "failed")
        assert (await world.vm_is(vm.id, VmStatus.DOWN)).desired is DesiredState.UP


async def test_an_io_error_policy_that_kills_in_vain_is_why_it_ended(configured: Settings) -> None:
    async with world_of(hurried(configured), hosts=1) as (world, (host,)):
        storage = Storage(host)
        vm = await world.vm(ha=True, io_error=IoErrorPolicy.KILL)
        told = hangs(host, IN_VAIN, UNKILLABLE)
        await storage.fails(vm)

        async def killed() -> bool:
            return bool(told)

        await until(killed)
        stuck = await world.vm_is(vm.id, VmStatus.NOT_RESPONDING)
        assert (stuck.status_reason, stuck.desired) == (UNKILLABLE, DesiredState.UP)
        await host.tell(vm.id, DomainState.GONE, vm.epoch, "failed")
        down = await world.vm_is(vm.id, VmStatus.DOWN)
        assert (down.status_reason, down.desired) == ("io_error", DesiredState.UP)
        assert len(told) == 1
