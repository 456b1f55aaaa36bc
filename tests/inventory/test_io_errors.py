"""A VM that an I/O error paused: told to go on until it does, left, or ended, as its policy says."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.inventory.config import InventoryConfig
from services.inventory.io_error_rules import Step, pause, step
from tests.inventory.world import Machine, World, until, world_of
from volery.contracts.base import Done
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import ACT_ON_DOMAIN, DomainAction
from volery.contracts.vm import (
    ACT_ON_VM,
    UPDATE_VM,
    ActOnVm,
    DesiredState,
    IoErrorPolicy,
    UpdateVm,
    Vm,
    VmAction,
    VmStatus,
)
from volery.runtime.programs import Settings

CONFIG = InventoryConfig()
RESUME, LEAVE, KILL = IoErrorPolicy.RESUME, IoErrorPolicy.LEAVE, IoErrorPolicy.KILL


@pytest.mark.parametrize(
    ("policy", "paused", "untried", "tries", "then"),
    [
        (RESUME, 4.9, 4.9, 0, Step.WAIT),
        (RESUME, 5.0, 5.0, 0, Step.RESUME),
        (RESUME, 12.0, 7.0, 1, Step.WAIT),
        (RESUME, 15.0, 10.0, 1, Step.RESUME),
        (RESUME, 9999.0, 60.0, 500, Step.RESUME),
        (LEAVE, 9999.0, 9999.0, 0, Step.WAIT),
        (KILL, 5.0, 5.0, 0, Step.RESUME),
        (KILL, 79.9, 1.0, 4, Step.WAIT),
        (KILL, 80.0, 5.0, 4, Step.KILL),
        (KILL, 80.0, 4.0, 5, Step.WAIT),
    ],
)
def test_what_is_done_next(
    policy: IoErrorPolicy, paused: float, untried: float, tries: int, then: Step
) -> None:
    assert step(policy, paused, untried, tries, CONFIG) is then


def test_it_is_tried_ever_more_seldom_up_to_a_minute() -> None:
    assert [pause(tries, CONFIG) for tries in range(6)] == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


@dataclass
class Storage:
    """A host whose guests fail at their disks for as long as it is broken."""

    machine: Machine
    broken: bool = True
    resumed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine.agent.does(ACT_ON_DOMAIN, self._act)

    async def fails(self, vm: Vm) -> None:
        await self.machine.tell(vm.id, DomainState.PAUSED, vm.epoch, "ioerror")

    async def _act(self, ask: Any) -> Done:
        epoch = self.machine.domains[ask.vm_id].epoch
        if ask.action is DomainAction.PAUSE:
            await self.machine.tell(ask.vm_id, DomainState.PAUSED, epoch, "user")
            return Done()
        self.resumed.append(ask.vm_id)
        await self.machine.tell(ask.vm_id, DomainState.RUNNING, epoch, "unpaused")
        if self.broken:
            await self.machine.tell(ask.vm_id, DomainState.PAUSED, epoch, "ioerror")
        return Done()


def hurried(configured: Settings) -> Settings:
    short = {
        "VOLERY_INVENTORY_IO_ERROR_FIRST_SECONDS": "0.2",
        "VOLERY_INVENTORY_IO_ERROR_LONGEST_SECONDS": "0.5",
        "VOLERY_INVENTORY_IO_ERROR_KILL_SECONDS": "3",
    }
    return dataclasses.replace(configured, environ=short)


async def paused(world: World, vm: Vm) -> Vm:
    async def shown() -> Vm | None:
        found = await world.get(vm.id)
        return found if (found.status, found.status_reason) == (VmStatus.PAUSED, "io_error") else None

    found: Vm = await until(shown)
    return found


async def test_it_runs_on_when_the_storage_is_back(configured: Settings) -> None:
    async with world_of(hurried(configured), hosts=1) as (world, (host,)):
        storage = Storage(host)
        vm = await world.vm(ha=True)
        assert vm.io_error is RESUME
        await storage.fails(vm)
        await paused(world, vm)

        async def tried_again() -> bool:
            return len(storage.resumed) >= 3

        await until(tried_again)
        await paused(world, vm)
        storage.broken = False
        up = await world.vm_is(vm.id, VmStatus.UP)
        assert (up.epoch, up.host_id, up.status_reason) == (vm.epoch, host.id, "")


async def test_one_that_is_left_is_left_and_so_is_one_that_somebody_paused(configured: Settings) -> None:
    async with world_of(hurried(configured), hosts=1) as (world, (host,)):
        storage = Storage(host)
        left, by_hand, other = [await world.vm(io_error=policy) for policy in (LEAVE, RESUME, RESUME)]
        await world.ended(await world.bus.ask(ACT_ON_VM, ActOnVm(id=by_hand.id, action=VmAction.PAUSE)))
        await world.vm_is(by_hand.id, VmStatus.PAUSED)
        for vm in (left, other):
            await storage.fails(vm)

        async def tried_again() -> bool:
            return storage.resumed.count(other.id) >= 3

        await until(tried_again)
        assert set(storage.resumed) == {other.id}
        await paused(world, left)
        # The policy takes effect at once.
        now = await world.bus.ask(UPDATE_VM, UpdateVm(id=left.id, io_error=RESUME))
        assert (now.io_error, now.next_run) == (RESUME, False)
        storage.broken = False
        await world.vm_is(left.id, VmStatus.UP)


async def test_one_that_is_to_be_killed_is_ended_after_its_time_and_is_wanted_elsewhere(
    configured: Settings,
) -> None:
    async with world_of(hurried(configured), hosts=1) as (world, (host,)):
        storage = Storage(host)
        protected, plain = await world.vm(ha=True, io_error=KILL), await world.vm(io_error=KILL)
        async with asyncio.timeout(30):
            for vm in (protected, plain):
                await storage.fails(vm)
            down = await world.vm_is(protected.id, VmStatus.DOWN)
            assert (down.desired, down.status_reason) == (DesiredState.UP, "io_error")
            assert storage.resumed.count(protected.id) >= 2
            other = await world.vm_is(plain.id, VmStatus.DOWN)
            assert (other.desired, other.status_reason) == (DesiredState.DOWN, "io_error")
        assert host.domains == {}
