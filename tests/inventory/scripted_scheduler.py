"""The scheduler as inventory knows it, scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.speaker import Speaker
from volery.contracts.base import Done, Owner
from volery.contracts.cpus import GivenCpus
from volery.contracts.errors import Kind, Refused
from volery.contracts.host_devices import GivenDevice
from volery.contracts.operation import Operation
from volery.contracts.plan import MAKE_PLAN, MakePlan
from volery.contracts.resizing import VmShape
from volery.contracts.scheduling import (
    CONFIRM_CLAIM,
    PLACE,
    PLACE_MANY,
    RELEASE_CLAIM,
    RELEASE_VM_CLAIMS,
    ClaimKey,
    Place,
    PlaceMany,
    Placement,
    Placements,
    ReleaseVm,
)
from volery.runtime.bus import Caller


@dataclass
class Scheduler(Speaker):
    """Takes the first host that isn't left out; a preferred one before the others."""

    owner: Owner = Owner.SCHEDULER
    host_ids: list[str] = field(default_factory=list)
    asked: list[Place] = field(default_factory=list)
    plans_asked: int = 0
    may_place: asyncio.Event = field(default_factory=asyncio.Event)
    confirming: Callable[[ClaimKey], None] = lambda ask: None
    """Raises what the confirmation of a claim is refused with."""
    confirm_asked: asyncio.Event = field(default_factory=asyncio.Event)
    may_confirm: asyncio.Event = field(default_factory=asyncio.Event)
    confirmed: list[ClaimKey] = field(default_factory=list)
    released: list[ReleaseVm] = field(default_factory=list)
    given_back: list[ClaimKey] = field(default_factory=list)
    many: list[PlaceMany] = field(default_factory=list)
    many_asked: asyncio.Event = field(default_factory=asyncio.Event)
    nowhere: set[str] = field(default_factory=set)
    """VMs that fit on no host."""
    not_yet: int = 0
    """So many placements find no host, but may when they ask again."""
    cpus: dict[str, GivenCpus] = field(default_factory=dict)
    """Host → the physical CPUs that a VM gets there."""
    shapes: dict[str, VmShape] = field(default_factory=dict)
    """Host → what a VM runs with there that is resized to it."""
    devices: dict[str, tuple[GivenDevice, ...]] = field(default_factory=dict)
    """Host → the devices of it, likewise."""

    def __post_init__(self) -> None:
        self.may_place.set()
        self.may_confirm.set()
        self.answers = [
            (PLACE, self._place),
            (PLACE_MANY, self._place_many),
            (CONFIRM_CLAIM, self._confirm),
            (RELEASE_CLAIM, self._release),
            (RELEASE_VM_CLAIMS, self._release_vm),
            (MAKE_PLAN, self._no_plan),
        ]

    async def _no_plan(self, _: Speaker, ask: MakePlan, caller: Caller) -> Operation:
        self.plans_asked += 1
        raise Refused(Kind.UNAVAILABLE, "this scheduler makes no plans")

    async def _place(self, _: Speaker, ask: Place, caller: Caller) -> Placement:
        self.asked.append(ask)
        await self.may_place.wait()
        fits = [h for h in self.host_ids if h not in ask.excluded_host_ids]
        hopeful = self.not_yet > 0
        self.not_yet -= hopeful
        if hopeful or ask.need.vm_id in self.nowhere:
            fits = []
        if ask.target_host_id:
            fits = [h for h in fits if h == ask.target_host_id]
        host_id = fits[0] if fits else ""
        return Placement(
            vm_id=ask.need.vm_id,
            epoch=ask.epoch,
            host_id=host_id,
            message="" if host_id else "no host is left",
            cpus=self.cpus.get(host_id),
            shape=self.shapes.get(host_id),
            devices=self.devices.get(host_id, ()),
            hopeful=hopeful,
        )

    async def _place_many(self, _: Speaker, ask: PlaceMany, caller: Caller) -> Placements:
        self.many.append(ask)
        self.many_asked.set()
        return Placements(placements=tuple([await self._place(_, each, caller) for each in ask.places]))

    async def _confirm(self, _: Speaker, ask: ClaimKey, caller: Caller) -> Done:
        self.confirm_asked.set()
        await self.may_confirm.wait()
        self.confirming(ask)
        self.confirmed.append(ask)
        return Done()

    async def _release(self, _: Speaker, ask: ClaimKey, caller: Caller) -> Done:
        self.given_back.append(ask)
        return Done()

    async def _release_vm(self, _: Speaker, ask: ReleaseVm, caller: Caller) -> Done:
        self.released.append(ask)
        return Done()


def not_claimed(ask: ClaimKey) -> None:
    raise Refused(Kind.NOT_FOUND, "it holds no claim: it expired")
