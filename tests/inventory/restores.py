"""A database that is restored from a backup while its hosts go on: the story that `test_restored.py` tells."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import nats.js.errors

from tests.inventory import test_leases
from tests.inventory.world import Machine, World, found_cluster, inventory_of, surroundings, until
from tests.support.backup import Backup, backed_up, restored
from tests.support.speaker import Speaker
from volery.contracts.base import Call, Entity, Order, Owner
from volery.contracts.cluster import DeleteById
from volery.contracts.errors import Kind, Refused, conflict, not_found
from volery.contracts.health import GET_HEALTH, AskHealth
from volery.contracts.operation import Operation, OperationState
from volery.contracts.storage import DELETE_DISK, DetachDiskFrom, Disk
from volery.contracts.vm import (
    START_VM,
    STOP_VM,
    StartVm,
    StopVm,
    Vm,
)
from volery.runtime.bus import Caller
from volery.runtime.database import open_pool
from volery.runtime.hear import HOST_STREAM
from volery.runtime.programs import Settings
from volery.runtime.relay import stream_name


@dataclass
class Storage(test_leases.Storage):
    """Its own database isn't restored: what it did is what the world has."""

    may_detach: asyncio.Event = field(default_factory=asyncio.Event)
    detach_asked: asyncio.Event = field(default_factory=asyncio.Event)
    refuses: bool = False
    deleted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.may_detach.set()
        self.answers = [*self.answers, (DELETE_DISK, self._delete)]

    async def _detach(self, speaker: Speaker, ask: DetachDiskFrom, caller: Caller) -> Entity:
        self.detach_asked.set()
        await self.may_detach.wait()
        if self.refuses:
            raise conflict("a test says so")
        return await super()._detach(speaker, ask, caller)

    async def _delete(self, _: Speaker, ask: DeleteById, caller: Caller) -> Operation:
        self.deleted.append(ask.id)
        raise not_found("disk", ask.id)


@dataclass
class Story:
    """Two hosts, and a database of inventory that can be made an older one."""

    world: World
    storage: Storage
    hosts: list[Machine] = field(default_factory=list)
    backup: Backup = field(default_factory=dict)

    def disk(self) -> Disk:
        assert self.world.cluster is not None
        return self.storage.disk(self.storage.domain(self.world.cluster.data_center_id, leases=False))

    async def backed_up(self) -> None:
        self.backup = await backed_up(self.world.settings.database, Owner.INVENTORY)

    async def done(self, op: Operation) -> Operation:
        ended = await self.world.ended(op)
        assert ended.state is OperationState.SUCCEEDED, ended.problem
        return ended

    async def start(self, vm_id: str, host: Machine) -> Vm:
        await self.done(await self.world.bus.ask(START_VM, StartVm(id=vm_id, host_id=host.id)))
        return await self.world.get(vm_id)

    async def stop(self, vm_id: str) -> None:
        await self.done(await self.world.bus.ask(STOP_VM, StopVm(id=vm_id, force=True)))

    def homes(self, vm_id: str) -> list[str]:
        return [host.id for host in self.hosts if vm_id in host.domains]

    @asynccontextmanager
    async def restored(self) -> AsyncIterator[None]:
        """Inventory with the database of then, once every host has reported."""
        await restored(self.world.settings.database, Owner.INVENTORY, self.backup)
        async with inventory_of(self.world):
            await until(self._out_of_quarantine, "every host has reported")
            yield

    async def _out_of_quarantine(self) -> bool:
        health = await self.world.bus.ask(GET_HEALTH[Owner.INVENTORY], AskHealth())
        return not health.quarantine and health.log_history != self._history

    async def bus_lost(self) -> None:
        """What NATS kept of inventory and of the hosts is gone."""
        for name in (stream_name(Owner.INVENTORY), HOST_STREAM):
            await self.world.bus.client.jetstream().delete_stream(name)

    async def leads(self) -> bool:
        """Whether inventory has made its stream anew."""
        with contextlib.suppress(nats.js.errors.NotFoundError):
            await self.world.bus.client.jetstream().stream_info(stream_name(Owner.INVENTORY))
            return True
        return False

    async def out_of_quarantine(self) -> bool:
        return not (await self.world.bus.ask(GET_HEALTH[Owner.INVENTORY], AskHealth())).quarantine

    async def was_quarantined(self) -> bool:
        async with open_pool(self.world.settings.database, "inventory") as pool:
            return bool(await pool.fetchval("select base > 0 from restore_base"))

    async def running_on(self, host: Machine) -> Vm:
        vm = await self.world.vm(start=False)
        return await self.start(vm.id, host)

    async def has_replayed(self) -> bool:
        """Whether inventory has heard all that the hosts ever said."""
        async with open_pool(self.world.settings.database, "inventory") as pool:
            heard = {row["host_id"]: row["seq"] for row in await pool.fetch("select * from heard_host")}
        return all(heard.get(host.id, 0) >= host.agent.spools["inventory"].head for host in self.hosts)

    async def started(self, vm_id: str) -> Operation:
        """A start that is asked for until it isn't put off any more."""

        async def asked() -> Operation | None:
            try:
                return await self.world.bus.ask(START_VM, StartVm(id=vm_id))
            except Refused as refused:
                if refused.kind is not Kind.UNAVAILABLE:
                    raise
                return None

        op: Operation = await until(asked)
        return op

    _history: str = ""

    async def known_history(self) -> None:
        self._history = (await self.world.bus.ask(GET_HEALTH[Owner.INVENTORY], AskHealth())).log_history


@asynccontextmanager
async def story_of(configured: Settings) -> AsyncIterator[Story]:
    storage = Storage()
    async with surroundings(configured, storage.service()) as world:
        yield Story(world, storage)


@asynccontextmanager
async def before_the_restore(story: Story, hosts: int = 2) -> AsyncIterator[None]:
    async with inventory_of(story.world):
        await found_cluster(story.world)
        story.hosts += [await story.world.machine(f"h{number + 1}") for number in range(hosts)]
        await story.known_history()
        yield


async def backed_up_during(
    story: Story, host: Machine, order: Order[Any, Any], call: Call[Any, Operation], ask: Any
) -> Operation:
    """A backup is taken while the host carries out this order; then the operation goes on, and ends."""
    host.held[order.kind] = asyncio.Event()
    host.begun.clear()
    op = await story.world.bus.ask(call, ask)
    await host.begun.wait()
    await story.backed_up()
    host.held.pop(order.kind).set()
    await story.done(op)
    return op


async def backed_up_while_placing(story: Story, call: Call[Any, Operation], ask: Any) -> Operation:
    """A backup is taken while the scheduler is asked; then the operation goes on, and ends."""
    scheduler = story.world.scheduler
    held = scheduler.may_place = asyncio.Event()
    asked = len(scheduler.asked)
    op = await story.world.bus.ask(call, ask)

    async def placing() -> bool:
        return len(scheduler.asked) > asked

    await until(placing)
    await story.backed_up()
    held.set()
    await story.done(op)
    return op


async def refused(story: Story, op: Operation) -> str:
    """The sentence of an operation that was under way in the backup."""
    ended = await story.world.ended(op)
    assert ended.state is OperationState.FAILED
    assert ended.problem is not None
    assert "restored from a backup" in ended.problem.message
    return ended.problem.message
