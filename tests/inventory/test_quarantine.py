"""A database that is older than the hosts: what they run is not ended, and no answer counts for another placement."""

from __future__ import annotations

import asyncio

import pytest

from tests.inventory.world import Machine, World, found_cluster, inventory_of, surroundings, until
from volery.contracts.base import Owner
from volery.contracts.cluster import DeleteById
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import FORGET_DOMAIN, STOP_DOMAIN
from volery.contracts.errors import Kind, Refused
from volery.contracts.health import EXCUSE_HOST, GET_HEALTH, AskHealth, ExcuseHost
from volery.contracts.host import DELETE_HOST, MAINTAIN_HOST, HostStatus, MaintainHost
from volery.contracts.operation import OperationState
from volery.contracts.vm import STOP_VM, StopVm, VmStatus
from volery.runtime.database import open_pool
from volery.runtime.programs import Settings

LATER = 5
"""So many epochs after the backup."""


async def remember(world: World, *statements: tuple[str, *tuple[object, ...]]) -> None:
    """While inventory is away: what its database says from now on."""
    async with open_pool(world.settings.database, "inventory") as pool:
        for statement, *args in statements:
            await pool.execute(statement, *args)


async def test_a_stop_takes_no_earlier_placements_end_for_an_answer(configured: Settings) -> None:
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            first, second = [await world.machine(name) for name in ("h1", "h2")]
            vm = await world.vm()
            first.held[STOP_DOMAIN.kind] = asyncio.Event()
            stop = await world.bus.ask(STOP_VM, StopVm(id=vm.id, force=True))
            await until_begun(first, STOP_DOMAIN.kind)
        moved = (
            "update placement set epoch = $2, host_id = $3, state = 'running', boot_id = $4 where vm_id = $1"
        )
        await remember(world, (moved, vm.id, vm.epoch + LATER, second.id, second.agent.boot_id))
        first.held[STOP_DOMAIN.kind].set()
        async with inventory_of(world):
            await second.tell(vm.id, DomainState.RUNNING, vm.epoch + LATER)
            ended = await world.ended(stop)
            assert ended.state is OperationState.FAILED
            assert ended.problem is not None
            assert ended.problem.details["epoch"] == vm.epoch + LATER
            assert (await world.vm_is(vm.id, VmStatus.UP)).status_reason == ""
        assert vm.id in second.domains
        assert vm.id not in first.domains


async def test_what_runs_where_it_may_not_is_ended_only_after_quarantine(configured: Settings) -> None:
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            first, second = [await world.machine(name) for name in ("h1", "h2")]
            vm = await world.vm()
        await second.agent.kill()
        await remember(
            world,
            ("update placement set host_id = $2, boot_id = '' where vm_id = $1", vm.id, second.id),
            ("insert into quarantine (reason) values ('a test says so')",),
            ("insert into quarantine_host select id from host",),
        )
        async with inventory_of(world):
            await until(lambda: is_awaited(world, second), "the first host was asked, and reported")
            await first.tell(vm.id, DomainState.RUNNING, vm.epoch)
            await first.agent.until_committed("inventory")
            assert not first.agent.begun(FORGET_DOMAIN.kind)
            await world.bus.ask(
                EXCUSE_HOST[Owner.INVENTORY], ExcuseHost(host_id=second.id, confirm=second.id)
            )
            await until_begun(first, FORGET_DOMAIN.kind)


async def test_a_host_that_has_not_reported_is_not_deleted(configured: Settings) -> None:
    """It was in maintenance in the backup, and may run VMs since: its key revoked, it could never say so."""
    async with surroundings(configured) as world:
        async with inventory_of(world):
            await found_cluster(world)
            host = await world.machine("h1")
            await world.ended(await world.bus.ask(MAINTAIN_HOST, MaintainHost(id=host.id)))
            await world.host_is(host, HostStatus.MAINTENANCE)
        await host.agent.kill()
        await remember(
            world,
            ("insert into quarantine (reason) values ('a test says so')",),
            ("insert into quarantine_host select id from host",),
        )
        async with inventory_of(world):
            await until(lambda: is_awaited(world, host))
            with pytest.raises(Refused) as refused:
                await world.bus.ask(DELETE_HOST, DeleteById(id=host.id))
            assert refused.value.kind is Kind.UNAVAILABLE
            assert host.id in refused.value.message
            await host.agent.start()

            async def deleted() -> bool:
                try:
                    await world.bus.ask(DELETE_HOST, DeleteById(id=host.id))
                except Refused as refused:
                    if refused.kind is not Kind.UNAVAILABLE:
                        raise
                    return False
                return True

            await until(deleted)


async def until_begun(machine: Machine, kind: str) -> None:
    async def begun() -> bool:
        return bool(machine.agent.begun(kind))

    await until(begun)


async def is_awaited(world: World, machine: Machine) -> bool:
    """Whether quarantine waits for this host alone."""
    health = await world.bus.ask(GET_HEALTH[Owner.INVENTORY], AskHealth())
    return health.waits_for_hosts == (machine.id,)
