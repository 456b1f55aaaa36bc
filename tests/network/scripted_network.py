"""Hosts' networks in memory, behind agents that speak the real protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from services.network.service import make_service
from tests.support.runtime import running
from tests.support.scripted_agent import ScriptedAgent, scripted
from tests.support.service_process import ServiceProcess, service_process
from tests.support.stand_in import World, inventory
from volery.contracts.agent import BridgeReport
from volery.contracts.base import Owner
from volery.contracts.cluster import Cluster, DataCenter, GetById
from volery.contracts.errors import Refused
from volery.contracts.host import Host
from volery.contracts.network import (
    CREATE_NETWORK,
    GET_NETWORK,
    LIST_MAC_POOLS,
    CreateNetwork,
    MacPool,
    Network,
)
from volery.contracts.network_orders import APPLY_NETWORKS, ApplyNetworks, HostNetwork, NetworksApplied
from volery.contracts.operation import GET_OPERATION, GetOperation, ListQuery, Operation
from volery.runtime.bus import Bus
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings
from volery.runtime.service import Service


@dataclass
class NetworkHost:
    """One host's side. `refuse` may raise for a set; `held` makes it wait."""

    agent: ScriptedAgent
    networks: tuple[HostNetwork, ...] = ()
    broken: set[str] = field(default_factory=set)
    """Networks that somebody took down behind our back."""
    unplugged: set[str] = field(default_factory=set)
    """Networks whose NIC has no link."""
    refuse: Any = None
    held: asyncio.Event | None = None

    def __post_init__(self) -> None:
        self.agent.does(APPLY_NETWORKS, self.apply)
        self.agent.reports["network"] = lambda: {"networks": self.reports()}

    async def apply(self, ask: ApplyNetworks) -> NetworksApplied:
        if self.held is not None:
            await self.held.wait()
        if self.refuse is not None:
            self.refuse(ask)
        self.networks = ask.networks
        self.broken.clear()
        return NetworksApplied(networks=self.reports())

    def reports(self) -> tuple[BridgeReport, ...]:
        return tuple(
            BridgeReport(
                network_id=n.network_id,
                bridge=n.bridge,
                in_sync=n.network_id not in self.broken,
                link_down="eth1 has no link" if n.network_id in self.unplugged else "",
            )
            for n in self.networks
        )

    def names(self) -> set[str]:
        return {network.name for network in self.networks}

    def applies(self) -> int:
        return len(self.agent.begun("network.apply"))


@dataclass
class Plant:
    """A running network service with its world."""

    bus: Bus
    world: World
    center: DataCenter
    cluster: Cluster
    hosts: list[NetworkHost]
    rows: list[Host]

    async def network(self, name: str = "n1", **fields: Any) -> Network:
        ask = CreateNetwork(name=name, data_center_id=self.center.id, **fields)
        return await self.bus.ask(CREATE_NETWORK, ask)

    async def get(self, network: Network) -> Network:
        return await self.bus.ask(GET_NETWORK, GetById(id=network.id))

    async def pool(self, name: str = "Default") -> MacPool:
        page = await self.bus.ask(LIST_MAC_POOLS, ListQuery(filter={"name": name}))
        return msgspec.json.decode(page.items[0], type=MacPool)

    async def ended(self, operation: Operation, seconds: float = 20.0) -> Operation:
        async with asyncio.timeout(seconds):
            while True:
                op = await self.bus.ask(GET_OPERATION[Owner.NETWORK], GetOperation(id=operation.id))
                if op.ended_at is not None:
                    return op
                await asyncio.sleep(0.01)

    async def until(self, true: Any, seconds: float = 15.0) -> Any:
        """What the async `true` answers, once it is true. For what shows only by asking."""
        async with asyncio.timeout(seconds):
            while not (found := await true()):
                await asyncio.sleep(0.02)
            return found

    async def until_ready(self, network: Network, hosts: int) -> Network:
        async def ready() -> Network | None:
            found = await self.get(network)
            return found if len(found.ready_host_ids) == hosts else None

        found: Network = await self.until(ready)
        return found


def network_process(configured: Settings, **environment: str) -> AbstractAsyncContextManager[ServiceProcess]:
    return service_process("network", configured, **environment)


@asynccontextmanager
async def plant(
    configured: Settings, hosts: int = 2, service: Service | None = None, outside: bool = False
) -> AsyncIterator[Plant]:
    """Network and a stand-in for inventory, with a data center of so many hosts that are up.

    `outside`: network runs elsewhere (see network_process).
    """
    world = World()
    async with AsyncExitStack() as stack:
        inside = () if outside else (service or make_service(),)
        bus = await stack.enter_async_context(running(configured, *inside, inventory(world)))
        center = await world.data_center()
        cluster = await world.cluster(center)
        made, rows = [], []
        for number in range(hosts):
            agent = ScriptedAgent(configured.bus.servers, owners=("network",))
            made.append(NetworkHost(agent))
            await stack.enter_async_context(scripted(agent))
            rows.append(
                await world.host(
                    center,
                    agent.host_id,
                    f"h{number + 1}",
                    cluster_id=cluster.id,
                    address=f"10.0.0.{number + 1}",
                    nics=("eth0", "eth1"),
                )
            )
        for host in made:
            await host.agent.until_committed("network", 30)
        await _known(configured, [row.id for row in rows])
        yield Plant(bus, world, center, cluster, made, rows)


async def _known(configured: Settings, host_ids: list[str]) -> None:
    """Until network has heard of these hosts."""
    async with open_direct(configured.database, Owner.NETWORK) as connection, asyncio.timeout(15):
        while True:
            found = {row["id"] for row in await connection.fetch("select id from host")}
            pools = await connection.fetchval("select count(*) from mac_pool")
            if found.issuperset(host_ids) and pools:
                return
            await asyncio.sleep(0.02)


def refusing(refused: Refused, name: str) -> Any:
    """A host that can't have the network of this name."""

    def refuse(ask: ApplyNetworks) -> None:
        if any(network.name == name for network in ask.networks):
            raise refused

    return refuse
