"""Reports of many hosts, heard together: what each says of its own VMs counts, and nothing new is no change."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import Any

import pytest

from services.inventory.desk import Inventory
from services.inventory.host_facts import hosts_reported
from services.inventory.service import service as inventory
from tests.inventory.world import Machine, World, found_cluster, surroundings, until
from tests.support.runtime import running
from tests.support.service_process import captured
from volery.contracts.agent import DomainReport, HostCapabilities, HostReported
from volery.contracts.cluster import GetById
from volery.contracts.domain import DomainState
from volery.contracts.host import GET_HOST
from volery.contracts.vm import GET_VM, Vm
from volery.runtime.hear import Apart
from volery.runtime.programs import Settings
from volery.runtime.tables import Stale, commit


def says(machine: Machine, *domains: DomainReport, boot_id: str = "") -> HostReported:
    return HostReported(
        host_id=machine.id,
        generation=machine.agent.generation,
        boot_id=boot_id or machine.agent.boot_id,
        seq=1000,
        after_seq=0,
        at=datetime.now(UTC),
        capabilities=HostCapabilities(
            hostname="scripted",
            cpus=8,
            memory_bytes=1 << 34,
            libvirt_uri=machine.id,
            libvirt_version=9_000_000,
        ),
        domains=domains,
        asked=(),
    )


def runs(vm: Vm, state: DomainState = DomainState.RUNNING) -> DomainReport:
    return DomainReport(
        vm_id=vm.id, epoch=vm.epoch, order_seq=0, name=vm.name, state=state, reason="", installation="test"
    )


@contextlib.asynccontextmanager
async def world_of(configured: Settings, found: list[Inventory]) -> Any:
    async with surroundings(configured) as world, running(configured, captured(inventory, found)):
        await found_cluster(world)
        yield world


async def boots(made: Inventory, *vms: Vm) -> list[str]:
    return [(await made.store.placement(vm.id)).boot_id for vm in vms]


async def two(world: World) -> tuple[Machine, Machine, Vm, Vm]:
    """Two hosts, and a VM on each."""
    h1, h2 = await world.machine("h1"), await world.machine("h2")
    one = await world.vm()
    world.scheduler.host_ids = [h2.id]
    other = await world.vm()
    return h1, h2, one, other


async def test_each_hosts_word_counts_for_its_own_vms(configured: Settings) -> None:
    """One has a new boot, and its VM still; the other's VM has ended."""
    found: list[Inventory] = []
    async with world_of(configured, found) as world:
        h1, h2, one, other = await two(world)
        made = found[0]
        changes = await hosts_reported(made, [says(h1, runs(one), boot_id="again"), says(h2)])
        await commit(made.core.pool, changes)
        assert await boots(made, one) == ["again"]
        assert (await world.bus.ask(GET_VM, GetById(id=one.id))).status == "up"

        async def ended() -> bool:
            return (await world.bus.ask(GET_VM, GetById(id=other.id))).status == "down"

        await until(ended)


async def test_what_was_placed_anew_meanwhile_is_decided_again(configured: Settings) -> None:
    found: list[Inventory] = []
    async with world_of(configured, found) as world:
        h1, h2, one, other = await two(world)
        made = found[0]
        changes = await hosts_reported(
            made, [says(h1, runs(one), boot_id="again"), says(h2, runs(other), boot_id="too")]
        )
        before = await boots(made, one, other)
        await made.core.pool.execute("update placement set epoch = epoch + 1 where vm_id = $1", one.id)
        with pytest.raises(Stale):
            await commit(made.core.pool, changes)
        assert await boots(made, one, other) == before, "none of it was written"


async def test_two_hosts_that_have_to_do_with_one_vm_are_heard_one_after_the_other(
    configured: Settings,
) -> None:
    """Whether both name it, or one should have it and the other says so."""
    found: list[Inventory] = []
    async with world_of(configured, found) as world:
        h1, h2, one, other = await two(world)
        made = found[0]
        for said in (
            [says(h1, runs(one)), says(h2, runs(one), runs(other))],
            [says(h1), says(h2, runs(one), runs(other))],
        ):
            with pytest.raises(Apart):
                await hosts_reported(made, said)
        assert await hosts_reported(made, [says(h1, runs(one)), says(h2, runs(other))])


async def test_a_report_with_nothing_new_is_no_change_of_its_host(configured: Settings) -> None:
    found: list[Inventory] = []
    async with world_of(configured, found) as world:
        h1 = await world.machine("h1")
        vm = await world.vm()
        made = found[0]
        assert await made.fresh_report(h1.id)

        async def counted() -> bool:
            return (await world.bus.ask(GET_HOST, GetById(id=h1.id))).vm_count == 1

        await until(counted)
        before = await world.bus.ask(GET_HOST, GetById(id=h1.id))
        assert await made.fresh_report(h1.id), "whoever waits for it is told all the same"
        assert await world.bus.ask(GET_HOST, GetById(id=h1.id)) == before
        assert await boots(made, vm) == [h1.agent.boot_id]
