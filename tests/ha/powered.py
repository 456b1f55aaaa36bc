"""A cluster whose hosts have BMCs that really end and begin them: gateway, inventory, scheduler and ha are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from msgspec.structs import replace

from services.inventory.service import service as inventory
from tests.api_gateway.scripted import decoded, running_gateway
from tests.ha.bmcs import AGENT, PASSWORD, Bmc, Executors, executing
from tests.ha.site import uuid
from tests.ha.world import ha, hurried
from tests.inventory.scripted_scheduler import Scheduler
from tests.inventory.world import Machine, World, found_cluster, until
from tests.scheduler.fleets import hosts_known, network_owner, scheduler
from tests.support.bell import Bell
from tests.support.runtime import running
from volery.contracts.account import CREATE_USER, LOGIN, CreateUser, Login
from volery.contracts.fencing import AskPower, PowerAction, PowerAnswer, PowerState
from volery.contracts.operation import OperationState
from volery.runtime.programs import Settings
from volery.runtime.service import Service

LOGGED_IN = "correct horse battery"
ENDED = {str(s) for s in (OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED)}
QUICK = {"VOLERY_SCHEDULER_PLAN_SECONDS": "0", "VOLERY_INVENTORY_WAKE_SECONDS": "20"}


@dataclass
class Plug(Bmc):
    """A BMC that switches a machine of the test."""

    machine: Machine | None = None
    starts: bool = True
    """Whether the machine comes up when it is switched on."""
    victims: list[tuple[str, ...]] = field(default_factory=list)
    """What ran there when it was switched off."""
    switching: set[asyncio.Task[Any]] = field(default_factory=set)

    def act(self, ask: AskPower) -> PowerAnswer:
        before = self.power
        answer = super().act(ask)
        if self.machine is not None and before is not self.power:
            off = self.power is PowerState.OFF
            if off:
                self.victims.append(tuple(self.machine.domains))
            if off or self.starts:
                task = asyncio.create_task(self.machine.die() if off else self.machine.boot())
                self.switching.add(task)
                task.add_done_callback(self.switching.discard)
        return answer


@dataclass
class Replica:
    """A service that a test ends and begins again."""

    settings: Settings
    service: Service
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def begin(self) -> None:
        await self.stack.enter_async_context(running(self.settings, self.service))

    async def end(self) -> None:
        await self.stack.aclose()

    async def again(self) -> None:
        await self.end()
        await self.begin()


@dataclass
class Powered:
    http: httpx.AsyncClient
    world: World
    executors: Executors
    inventory: Replica
    ha: Replica
    machines: list[Machine] = field(default_factory=list)
    bmcs: list[Plug] = field(default_factory=list)
    known_identities: int = 0

    def identities(self) -> int:
        """How often the first BMC was asked whose it is."""
        return self.bmcs[0].did(PowerAction.IDENTITY)

    async def host(self, number: int) -> Any:
        return decoded(await self.http.get(f"/hosts/{self.machines[number].id}"))

    async def asked(self, number: int, what: str, body: dict[str, Any] | None = None) -> httpx.Response:
        return await self.http.post(f"/hosts/{self.machines[number].id}/{what}", json=body or {})

    async def begun(self, number: int, what: str, body: dict[str, Any] | None = None) -> Any:
        answer = await self.asked(number, what, body)
        assert answer.status_code == 202, answer.text
        return decoded(answer)

    async def ended(self, operation: Any, seconds: float = 60.0) -> Any:
        async def found() -> Any:
            op = decoded(await self.http.get(f"/operations/{operation['id']}"))
            return op if op["state"] in ENDED else None

        return await until(found, seconds=seconds)

    async def does(self, number: int, what: str, body: dict[str, Any] | None = None) -> Any:
        return await self.ended(await self.begun(number, what, body))

    async def sleeps(self, number: int) -> None:
        """A machine that gets no processor for two seconds silences its scripted hosts, and then none of them sleeps."""
        for _ in range(3):
            op = await self.does(number, "save-power")
            if "silent" not in ((op["problem"] or {}).get("message") or ""):
                break
        assert op["state"] == "succeeded", op

    async def vm(self, number: int, name: str, **fields: Any) -> str:
        """A VM that runs on this host."""
        assert self.world.cluster is not None
        body = {"name": name, "cluster_id": self.world.cluster.id, "memory_bytes": 1 << 30, **fields}
        vm_id: str = (await self.ended(decoded(await self.http.post("/vms", json=body))))["object_id"]
        start = await self.http.post(f"/vms/{vm_id}/start", json={"host_id": self.machines[number].id})
        op = await self.ended(decoded(start))
        assert op["state"] == "succeeded", op
        return vm_id

    async def where(self, vm_id: str) -> str:
        host_id: str = decoded(await self.http.get(f"/vms/{vm_id}"))["host_id"]
        return host_id

    async def is_host(self, number: int, **fields: Any) -> Any:
        async def found() -> Any:
            host = await self.host(number)
            return host if all(host[name] == value for name, value in fields.items()) else None

        try:
            return await until(found)
        except TimeoutError:
            raise AssertionError(f"not {fields}: {await self.host(number)}") from None

    async def liveness(self, number: int) -> Any:
        return decoded(await self.http.get(f"/liveness/{self.machines[number].id}"))

    async def settled_plug(self, number: int) -> None:
        """Until a machine that is being switched has ended or begun."""
        while self.bmcs[number].switching:
            await asyncio.gather(*self.bmcs[number].switching)


async def set_power(at: Powered, number: int) -> None:
    device = {"agent": AGENT, "address": f"bmc{number}", "username": "u", "secrets": {"password": PASSWORD}}
    body = {"devices": [device | {"timeout_seconds": 2}]}
    path = f"/hosts/{at.machines[number].id}/power-management"
    answer = await at.http.put(path, json=body)
    assert answer.status_code == 200, answer.text

    async def passed() -> bool:
        return bool(decoded(await at.http.get(path))["test_passed"])

    await until(passed)


def described(machine: Machine, number: int) -> None:
    """It says whose machine it is, and that it can run fence agents."""
    told = machine.agent.reports["inventory"]

    def tell() -> dict[str, Any]:
        fields = told()
        known = replace(
            fields["capabilities"], dmi_uuid=uuid(number), fence_agents=(AGENT,), machines=("q35",)
        )
        return fields | {"capabilities": known}

    machine.agent.reports["inventory"] = tell


@asynccontextmanager
async def powered(
    configured: Settings,
    tmp_path: Path,
    hosts: int = 3,
    **more: str,
) -> AsyncIterator[Powered]:
    """Hosts that are up, each with a BMC that was tested, and an administrator at the gateway."""
    settings = hurried(configured, VOLERY_HA_KEY_FILE=str(tmp_path / "ha.key"), **(QUICK | more))
    async with AsyncExitStack() as stack:
        others = (scheduler(), network_owner().service())
        bus = await stack.enter_async_context(running(settings, *others))
        replicas = [Replica(settings, inventory), Replica(settings, ha())]
        for replica in replicas:
            stack.push_async_callback(replica.end)
            await replica.begin()
        world = World(bus, settings, Scheduler(), Bell())
        await found_cluster(world)
        try:
            machines = [await world.machine(f"h{number}") for number in range(hosts)]
            executors = await stack.enter_async_context(executing(bus.client, *(m.id for m in machines)))
            for number, machine in enumerate(machines):
                described(machine, number)
                await machine.agent.report("inventory")
            await hosts_known(bus, hosts)
            await bus.ask(CREATE_USER, CreateUser(name="ada", password=LOGGED_IN))
            issued = await bus.ask(LOGIN, Login(name="ada", password=LOGGED_IN))
            gateway = await stack.enter_async_context(running_gateway(configured.bus.servers))
            http = await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{gateway.port}/api/v1",
                    headers={"authorization": f"Bearer {issued.secret}"},
                    timeout=20,
                )
            )
            at = Powered(http, world, executors, *replicas, machines)
            for number, machine in enumerate(machines):
                plug = Plug(uuid(number), machine=machine)
                executors.bmcs[f"bmc{number}"] = plug
                at.bmcs.append(plug)
                await set_power(at, number)
            yield at
        finally:
            for machine in world.machines.values():
                await machine.agent.kill()
