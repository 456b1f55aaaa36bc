"""Network while its process and the agents are killed: no address twice, and in the end every host as it should be."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import asyncpg

from tests.network.scripted_network import Plant, network_process, plant
from volery.contracts.base import Owner
from volery.contracts.cluster import DeleteById
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.network import (
    ALLOCATE_NIC,
    CREATE_NETWORK,
    DELETE_NETWORK,
    RELEASE_NIC,
    AllocateNic,
    CreateNetwork,
    Network,
    ReleaseNic,
)
from volery.contracts.network_orders import NetworkKind
from volery.runtime.bus import Caller
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


async def insist(at: Plant, call: Any, ask: Any, caller: Caller | None = None) -> Any:
    """The answer, asked again under the same id while network is down or its answer was lost."""
    while True:
        try:
            return await at.bus.ask(call, ask, caller)
        except Refused as refused:
            if refused.kind not in (Kind.TIMEOUT, Kind.UNAVAILABLE):
                raise
            await asyncio.sleep(0.05)


async def test_random_kills_give_no_address_twice_and_leave_no_bridge(configured: Settings) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with network_process(configured) as process, plant(configured, hosts=3, outside=True) as at:
        networks = [await insist(at, CREATE_NETWORK, ask(at, f"base{n}", chance)) for n in range(3)]
        held: dict[str, tuple[str, str]] = {}
        stop = asyncio.Event()

        async def takes() -> None:
            while not stop.is_set():
                network = chance.choice(networks)
                nic = AllocateNic(nic_id=new_id(), vm_id=new_id(), network_id=network.id)
                got = await insist(at, ALLOCATE_NIC, nic, Caller("user:1", new_id(), "h"))
                assert got.mac not in held, f"{got.mac} was given twice (seed {seed})"
                held[got.mac] = (nic.nic_id, nic.vm_id)
                await asyncio.sleep(chance.uniform(0, 0.05))
                if chance.random() < 0.5:
                    mac = chance.choice(list(held))
                    nic_id, vm_id = held.pop(mac)
                    await insist(at, RELEASE_NIC, ReleaseNic(nic_id=nic_id, vm_id=vm_id))

        async def makes() -> None:
            mine: list[Network] = []
            while not stop.is_set():
                if mine and chance.random() < 0.4:
                    network = mine.pop()
                    gone = DeleteById(id=network.id)
                    await insist(at, DELETE_NETWORK, gone, Caller("user:1", new_id(), "h"))
                    networks_now.pop(network.id)
                else:
                    name = ask(at, new_id(), chance)
                    network = await insist(at, CREATE_NETWORK, name, Caller("user:1", new_id(), "h"))
                    networks_now[network.id] = network.name
                    mine.append(network)
                await asyncio.sleep(chance.uniform(0, 0.2))

        async def breaks() -> None:
            for _ in range(4):
                await asyncio.sleep(chance.uniform(0.2, 1.0))
                if chance.random() < 0.5:
                    await process.restart()
                else:
                    host = chance.choice(at.hosts)
                    await host.agent.kill()
                    if chance.random() < 0.3:
                        host.agent.lose_journal()
                        host.networks = ()
                    await asyncio.sleep(chance.uniform(0, 0.5))
                    await host.agent.start()
            stop.set()

        networks_now = {network.id: network.name for network in networks}
        async with asyncio.TaskGroup() as group:
            group.create_task(breaks())
            for _ in range(4):
                group.create_task(takes())
            group.create_task(makes())
        wanted = set(networks_now.values())

        async def settled() -> bool:
            return all(host.names() == wanted for host in at.hosts)

        await at.until(settled, 60)
        async with open_direct(configured.database, Owner.NETWORK) as connection:
            kept = await allocated(connection)
        assert kept == {nic_id for nic_id, _ in held.values()}, f"seed {seed}"


async def allocated(connection: asyncpg.Connection[asyncpg.Record]) -> set[str]:
    return {row["id"] for row in await connection.fetch("select id from nic")}


def ask(at: Plant, name: str, chance: random.Random) -> CreateNetwork:
    kind = chance.choice([NetworkKind.BRIDGE, NetworkKind.VXLAN, NetworkKind.NAT])
    return CreateNetwork(name=name, data_center_id=at.center.id, kind=kind)
