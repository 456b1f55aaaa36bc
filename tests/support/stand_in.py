"""A stand-in for inventory on a real bus and database: it says the facts that a test wants said, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from volery.contracts.agent import HOST_REPORTED, HostCapabilities
from volery.contracts.base import Done, Entity, Fact, Owner, encode
from volery.contracts.cluster import (
    CLUSTER_CHANGED,
    DATA_CENTER_CHANGED,
    GET_CLUSTER,
    GET_DATA_CENTER,
    LIST_CLUSTERS,
    LIST_DATA_CENTERS,
    Cluster,
    DataCenter,
    GetById,
)
from volery.contracts.domain_orders import SwitchDisks
from volery.contracts.errors import Refused, not_found
from volery.contracts.host import HOST_CHANGED, LIST_HOSTS, Host, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery, Page
from volery.contracts.snapshot import SWITCH_VM_DISKS
from volery.contracts.vm import (
    GET_VM,
    LIST_VMS,
    RESIZE_VM_DISK,
    VM_CHANGED,
    VM_DELETED,
    Nic,
    ResizeVmDisk,
    Vm,
    VmStatus,
)
from volery.runtime.bus import Caller
from volery.runtime.core import Core
from volery.runtime.service import Part, Service
from volery.runtime.tables import Change, say


def stamped() -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"revision": 1, "created_at": now, "updated_at": now}


def _let_go() -> tuple[asyncio.Event, asyncio.Event]:
    go_on = asyncio.Event()
    go_on.set()
    return asyncio.Event(), go_on


@dataclass
class World:
    """What this inventory has; `put` changes it and says so."""

    objects: dict[str, Entity] = field(default_factory=dict)
    resized: list[ResizeVmDisk] = field(default_factory=list)
    switched: list[SwitchDisks] = field(default_factory=list)
    switching: Refused | None = None
    """What the next VM's switch of its disks is answered with."""
    held_switch: tuple[asyncio.Event, asyncio.Event] = field(default_factory=_let_go)
    core: Core | None = None

    def hold_switch(self) -> tuple[asyncio.Event, asyncio.Event]:
        """(a VM's switch was asked for, it goes on)"""
        self.held_switch = asyncio.Event(), asyncio.Event()
        return self.held_switch

    async def put(self, fact: Fact[Any], thing: Entity) -> None:
        self.objects[thing.id] = thing
        await self._say(fact, thing)

    async def take(self, fact: Fact[Any], thing: Entity) -> None:
        self.objects.pop(thing.id, None)
        await self._say(fact, thing)

    async def _say(self, fact: Fact[Any], thing: Entity) -> None:
        assert self.core is not None, "the stand-in isn't running"
        await self.core.commit(Change("select 1", (), (say(fact, thing),)))

    def of(self, type_: type[Any]) -> list[Any]:
        return [thing for thing in self.objects.values() if isinstance(thing, type_)]

    async def data_center(self, name: str = "main") -> DataCenter:
        center = DataCenter(id=new_id(), name=name, **stamped())
        await self.put(DATA_CENTER_CHANGED, center)
        return center

    async def cluster(self, center: DataCenter, name: str = "c1") -> Cluster:
        cluster = Cluster(id=new_id(), name=name, data_center_id=center.id, **stamped())
        await self.put(CLUSTER_CHANGED, cluster)
        return cluster

    async def host(
        self,
        center: DataCenter,
        host_id: str,
        name: str = "h1",
        *,
        status: HostStatus = HostStatus.UP,
        cluster_id: str = "",
        address: str = "",
        **capabilities: Any,
    ) -> Host:
        host = Host(
            id=host_id,
            name=name,
            cluster_id=cluster_id or center.id,
            data_center_id=center.id,
            status=status,
            address=address,
            capabilities=HostCapabilities(**capabilities),
            **stamped(),
        )
        await self.put(HOST_CHANGED, host)
        return host

    async def vm(
        self,
        center: DataCenter,
        name: str = "v1",
        *,
        vm_id: str = "",
        status: VmStatus = VmStatus.DOWN,
        nics: tuple[Nic, ...] = (),
        host_id: str = "",
    ) -> Vm:
        vm = Vm(
            id=vm_id or new_id(),
            name=name,
            cluster_id=center.id,
            data_center_id=center.id,
            status=status,
            nics=nics,
            host_id=host_id,
            **stamped(),
        )
        await self.put(VM_CHANGED, vm)
        return vm

    async def delete_vm(self, vm: Vm) -> None:
        await self.take(VM_DELETED, vm)


class NoSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


def inventory(world: World) -> Service:
    part = Part()

    def get(call: Any, noun: str) -> None:
        async def answer(core: Core, ask: GetById, caller: Caller) -> Entity:
            if ask.id not in world.objects:
                raise not_found(noun, ask.id)
            return world.objects[ask.id]

        part.answers(call)(answer)

    def listed(call: Any, type_: type[Any]) -> None:
        async def answer(core: Core, ask: ListQuery, caller: Caller) -> Page:
            return Page(items=tuple(msgspec.Raw(encode(thing)) for thing in world.of(type_)))

        part.answers(call)(answer)

    for call, noun in ((GET_DATA_CENTER, "data center"), (GET_CLUSTER, "cluster"), (GET_VM, "VM")):
        get(call, noun)
    for call, type_ in (
        (LIST_DATA_CENTERS, DataCenter),
        (LIST_CLUSTERS, Cluster),
        (LIST_HOSTS, Host),
        (LIST_VMS, Vm),
    ):
        listed(call, type_)

    @part.answers(RESIZE_VM_DISK)
    async def resize(core: Core, ask: ResizeVmDisk, caller: Caller) -> Done:
        world.resized.append(ask)
        return Done()

    @part.answers(SWITCH_VM_DISKS)
    async def switch(core: Core, ask: SwitchDisks, caller: Caller) -> Done:
        world.switched.append(ask)
        asked, go_on = world.held_switch
        asked.set()
        await go_on.wait()
        if world.switching is not None:
            raise world.switching
        return Done()

    @asynccontextmanager
    async def opened(core: Core) -> AsyncIterator[Core]:
        world.core = core
        yield core

    return Service(Owner.INVENTORY, opened, NoSettings, [part], report=HOST_REPORTED)
