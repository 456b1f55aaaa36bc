"""Hosts, NATS, PostgreSQL and all services end at once and come back: who ran and is to come back runs again, once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from services.inventory.service import service as inventory
from tests.ha.test_restarts import restarts
from tests.ha.world import ha, hurried
from tests.inventory.scripted_scheduler import Scheduler
from tests.inventory.world import Machine, World, found_cluster, until
from tests.support.bell import Bell
from tests.support.runtime import Databases, running, settings
from volery.contracts.cluster import GetById
from volery.contracts.domain_orders import RUN_DOMAIN
from volery.contracts.errors import Kind, Refused
from volery.contracts.liveness import GET_LIVENESS, Proof, ProofKind
from volery.contracts.vm import DesiredState, Vm, VmStatus
from volery.runtime.programs import Settings
from volery.setup.embedded import start_nats, start_postgres, stop, temporary_home
from volery.setup.embedded import status as server_of
from volery.setup.home import Home
from volery.setup.nats_server import NatsOptions
from volery.setup.postgres_server import PostgresOptions

NATS = NatsOptions(preferred_port=None)
POSTGRES = PostgresOptions(sync_after_creation=False)


@dataclass
class Power:
    """The control plane's machine: its servers, with what they have on their disks."""

    home: Home
    configured: Settings

    def lost(self) -> None:
        for name in ("nats", "postgres"):
            process = server_of(self.home, name)  # type: ignore[arg-type]  # a literal of the two
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            while process.alive():
                pass

    async def back(self) -> None:
        await asyncio.gather(
            asyncio.to_thread(start_nats, self.home, NATS),
            asyncio.to_thread(start_postgres, self.home, POSTGRES),
        )


@contextmanager
def servers() -> Iterator[Home]:
    with temporary_home("volery-blackout-") as home:
        try:
            yield home
        finally:
            stop(home, "nats")
            stop(home, "postgres")


@asynccontextmanager
async def powered() -> AsyncIterator[Power]:
    with servers() as home:
        bus, postgres = start_nats(home, NATS), start_postgres(home, POSTGRES)
        databases = Databases(postgres)
        await databases.make_template()
        yield Power(home, hurried(settings(bus.url, await databases.fresh()), VOLERY_HA_RESTARTS_AT_MOST="2"))


@asynccontextmanager
async def plane(world: World) -> AsyncIterator[World]:
    """Services, until the block ends."""
    async with running(world.settings, world.scheduler.service(), inventory, ha()) as bus:
        world.bus = bus
        yield world


@dataclass
class Site:
    """Three hosts with what runs there."""

    world: World
    hosts: list[Machine]
    vms: dict[str, Vm]

    async def is_(self, name: str, status: VmStatus) -> Vm:
        return await self.world.vm_is(self.vms[name].id, status)

    def runs_ordered(self, name: str) -> int:
        """How often a host began to run it."""
        vm_id = self.vms[name].id
        begun = [ask for host in self.hosts for kind, ask in host.agent.log if kind == RUN_DOMAIN.kind]
        return sum(ask.vm_id == vm_id for ask in begun)


ON = {"db": 0, "app": 1, "wanted": 1, "plain": 1, "waived": 1, "lost": 2}
"""VM → the host on which it runs."""


async def furnish(world: World) -> Site:
    await found_cluster(world)
    hosts = [await world.machine(f"h{number}") for number in (1, 2, 3)]
    vms = {}
    for name, number in ON.items():
        first = hosts[number].id
        world.scheduler.host_ids.sort(key=lambda host_id: host_id != first)
        back = {"wanted": True, "waived": False}.get(name)
        vms[name] = await world.vm(ha=name not in ("wanted", "plain"), start_after_blackout=back)
        assert vms[name].host_id == first
    world.scheduler.host_ids.sort(
        key=lambda host_id: host_id != hosts[2].id
    )  # the missing one would be taken
    return Site(world, hosts, vms)


async def test_who_is_to_come_back_does_once_and_what_ran_on_the_missing_host_waits_for_proof() -> None:
    async with powered() as power:
        # Its connection is a control plane's, of which there are two here: `plane` sets it for each.
        world = World(None, power.configured, Scheduler(), Bell())  # type: ignore[arg-type]
        async with plane(world):
            site = await furnish(world)
            for host in site.hosts:
                await host.die()
            power.lost()
        before = {name: site.runs_ordered(name) for name in ON}
        await power.back()
        first, second, third = site.hosts
        for host in site.hosts:
            host.refusals[RUN_DOMAIN.kind] = Refused(Kind.UNAVAILABLE, "its storage isn't connected yet")
        await second.boot()
        try:
            async with plane(world):
                await site.is_("app", VmStatus.DOWN)
                await first.boot()

                async def tried_more_often_than_counts() -> bool:
                    return site.runs_ordered("app") > before["app"] + 2 * 2

                await until(tried_more_often_than_counts)
                (told,) = [r for r in await restarts(world.bus) if r.vm_id == site.vms["app"].id]
                assert not told.gave_up
                assert "while hosts are coming back" in told.message or "was asked for" in told.message
                for host in site.hosts:
                    host.refusals.clear()
                for name in ("db", "app", "wanted"):
                    assert (await site.is_(name, VmStatus.UP)).host_id != third.id
                for name in ("plain", "waived"):
                    down = await site.is_(name, VmStatus.DOWN)
                    assert (down.desired, down.status_reason) == (DesiredState.DOWN, "host_died")
                await site.is_("lost", VmStatus.UNKNOWN)

                async def explained() -> bool:
                    said = await world.bus.ask(GET_LIVENESS, GetById(id=third.id))
                    return "it has no power management" in said.fencing

                await until(explained)
                assert site.runs_ordered("lost") == before["lost"]
                await third.boot()
                await site.is_("lost", VmStatus.UP)

                async def proven() -> Proof | None:
                    """Inventory has the new boot from the host itself, and may be quicker than ha's next look."""
                    return (await world.bus.ask(GET_LIVENESS, GetById(id=third.id))).proof

                assert (await until(proven)).kind is ProofKind.NEW_BOOT
                assert site.runs_ordered("lost") == before["lost"] + 1
                running_on = [vm_id for host in site.hosts for vm_id in host.domains]
                names = ("db", "app", "wanted", "lost")
                assert sorted(running_on) == sorted(site.vms[name].id for name in names)
        finally:
            for host in site.hosts:
                await host.agent.kill()
