"""One cluster whose hosts beat on a real bus, with a scripted BMC each, and ha with a key for their secrets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from tests.ha.bmcs import AGENT, PASSWORD, Bmc, Executors, executing
from tests.ha.world import Heart, Inventory, becomes, ha, hearts, host, hurried, until
from tests.support.runtime import running
from volery.contracts.agent import HostCapabilities
from volery.contracts.cluster import GetById
from volery.contracts.host import Host
from volery.contracts.ids import new_id
from volery.contracts.liveness import GET_LIVENESS, HostLiveness
from volery.contracts.operation import ListQuery
from volery.contracts.power import (
    GET_POWER_MANAGEMENT,
    LIST_FENCE_RECORDS,
    SET_POWER_MANAGEMENT,
    FenceRecord,
    NewFenceDevice,
    PowerManagement,
    SetPowerManagement,
)
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings
from volery.runtime.service import Service


def uuid(number: int) -> str:
    return f"6b1d2f6e-8f4e-4f4e-9b58-00000000000{number}"


@dataclass
class Site:
    """One cluster whose hosts beat, with a BMC each."""

    bus: Bus
    owner: Inventory
    hosts: list[Host]
    hearts: list[Heart]
    executors: Executors

    def bmc(self, number: int) -> Bmc:
        return self.executors.bmcs[f"bmc{number}"]

    async def liveness(self, number: int) -> HostLiveness:
        return await self.bus.ask(GET_LIVENESS, GetById(id=self.hosts[number].id))

    async def power(self, number: int) -> PowerManagement:
        return await self.bus.ask(GET_POWER_MANAGEMENT, GetById(id=self.hosts[number].id))

    async def set_power(self, number: int, **fields: Any) -> PowerManagement:
        device = NewFenceDevice(
            agent=AGENT,
            address=f"bmc{number}",
            username="u",
            secrets={"password": PASSWORD},
            timeout_seconds=2,
        )
        ask = SetPowerManagement(id=self.hosts[number].id, devices=(device,))
        return await self.bus.ask(SET_POWER_MANAGEMENT, replace(ask, **fields), caller("set"))

    async def tested(self, number: int) -> PowerManagement:
        async def passed() -> PowerManagement | None:
            found = await self.power(number)
            return found if found.test_passed else None

        found: PowerManagement = await until(passed)
        return found

    async def becomes(self, number: int, state: str, seconds: float = 30.0) -> HostLiveness:
        return await becomes(self.bus, self.hosts[number].id, state, seconds)

    async def says(self, number: int, words: str, seconds: float = 30.0) -> HostLiveness:
        """Waits until its `fencing` has these words."""

        async def said() -> HostLiveness | None:
            found = await self.liveness(number)
            return found if words in found.fencing else None

        found: HostLiveness = await until(said, seconds)
        return found

    async def records(self) -> list[FenceRecord]:
        page = await self.bus.ask(LIST_FENCE_RECORDS, ListQuery())
        return [msgspec.json.decode(item, type=FenceRecord) for item in page.items]

    async def ended(self, state: str, seconds: float = 30.0) -> FenceRecord:
        async def found() -> FenceRecord | None:
            return next((r for r in await self.records() if r.state == state), None)

        record: FenceRecord = await until(found, seconds)
        return record


def caller(name: str) -> Caller:
    return Caller("user:ann", f"{name}-{new_id()}", name)


@asynccontextmanager
async def site(
    configured: Settings,
    tmp_path: Path,
    count: int = 3,
    replicas: int = 1,
    *,
    powered: bool = True,
    beside: Sequence[Service] = (),
    **more: str,
) -> AsyncIterator[Site]:
    owner = Inventory()
    hosts = [
        host(
            f"h{n}",
            capabilities=HostCapabilities(
                dmi_uuid=uuid(n), fence_agents=(AGENT,), data_address=f"10.0.0.{n + 1}:54322"
            ),
            boot_id="boot-1",
        )
        for n in range(count)
    ]
    owner.knows(*hosts)
    settings = hurried(configured, VOLERY_HA_KEY_FILE=str(tmp_path / "ha.key"), **more)
    async with AsyncExitStack() as stack:
        programs = [ha() for _ in range(replicas)]
        bus = await stack.enter_async_context(running(settings, owner.service(), *beside, *programs))
        executors = await stack.enter_async_context(executing(bus.client, *(h.id for h in hosts)))
        for n in range(count):
            executors.bmcs[f"bmc{n}"] = Bmc(uuid(n))
        beating = await stack.enter_async_context(hearts(bus.client, *hosts))
        for heart in beating:
            heart.boot_id = "boot-1"
        made = Site(bus, owner, hosts, beating, executors)
        for n in range(count):
            await made.becomes(n, "up")
            if powered:
                await made.set_power(n)
        for n in range(count if powered else 0):
            await made.tested(n)
        yield made
