"""A real agent behind somebody who spoils its handshakes: beats and orders both come back, and it says why it can't."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.js.api import StreamConfig

from host_agent.enrolment import Identity, Keys, store
from tests.support.agent_process import AgentProcess, Listener
from tests.support.certificates import make_certificate
from tests.support.interloper import Interloper, between
from tests.support.nats_realm import Server
from tests.support.toy_host import HOST_ID, TOY, Control, Toy
from volery.contracts.agent import Outcome
from volery.contracts.enrolment import Enrolled
from volery.runtime.connection import connect_options, revoke
from volery.runtime.identity import Realm, mint_agent
from volery.runtime.signing import Key, Signer, parse_creds

HANDSHAKES = 8
"""Met before the weather turns, by the agent's two connections together."""


@dataclass
class World:
    realm: Realm
    key: Key
    agent: AgentProcess
    interloper: Interloper
    ear: Listener
    directory: Path

    async def works(self) -> None:
        """An order is heard and done, and beats come: the one and the other connection."""
        self.ear.beat = None
        order = await self.ear.order(TOY, Toy(path=str(self.directory / "marks")))
        await self.ear.send(order)
        assert (await self.ear.finished(order)).outcome is Outcome.SUCCEEDED

    async def weather(self, count: int) -> None:
        """Until so many connections were begun; those that came through are cut, too."""
        begun = len(self.interloper.met)
        async with asyncio.timeout(60):
            while len(self.interloper.met) < begun + count:
                self.interloper.cut(0.2)
                await asyncio.sleep(0.1)


def enrolled(realm: Realm, key: Key, certificate: Path, port: int) -> Identity:
    answer = Enrolled(
        host_id=HOST_ID,
        installation="test",
        user_jwt=mint_agent(realm, HOST_ID, key.public),
        bus_servers=(f"tls://127.0.0.1:{port}",),
        owner_keys=realm.order_keys(),
        ca_pem=certificate.read_text(),
        certificate_pem="",
    )
    return Identity(keys=Keys(seed=key.seed, data_key_pem=""), enrolled=answer)


@asynccontextmanager
async def beside(server: Server, realm: Realm, certificate: Path) -> AsyncIterator[Listener]:
    """An owner's ear on a connection of its own that nobody spoils."""
    url = server.url.replace("nats:", "tls:")
    client = Client()
    await client.connect(**connect_options(realm.creds_path("inventory"), "inventory", [url], ca=certificate))
    await client.jetstream().add_stream(StreamConfig(name="FACTS_HOST", subjects=["fact.host.>"]))
    _, key = parse_creds(realm.creds_path("inventory").read_text())
    ear = Listener(client, Control(signer=Signer(key.seed)))
    await ear.listen()
    try:
        yield ear
    finally:
        await client.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    realm = Realm.create(tmp_path / "realm")
    certificate = make_certificate(tmp_path / "tls")
    server = Server(tmp_path / "nats", realm)
    files = f'cert_file: "{certificate}", key_file: "{certificate.with_suffix(".key")}"'
    server.write_config(f"tls: {{ {files}, handshake_first: true, timeout: 5 }}")
    server.start()
    async with AsyncExitStack() as stack:
        stack.callback(server.stop)
        interloper = await stack.enter_async_context(between(server.port, seed=1))
        ear = await stack.enter_async_context(beside(server, realm, certificate))
        key = Key.new("user")
        store(tmp_path / "state", enrolled(realm, key, certificate, interloper.port))
        agent = AgentProcess(tmp_path / "state", module="tests.support.toy_agent")
        stack.callback(agent.kill)
        yield World(realm, key, agent, interloper, ear, tmp_path)


@pytest.mark.parametrize("mischief", ["greeted", "reset", ""])
async def test_both_connections_come_back(world: World, mischief: str) -> None:
    world.interloper.storm(mischief)  # from the first connection on
    world.agent.start()
    await world.weather(HANDSHAKES // 2)
    world.interloper.calm()
    await world.works()
    world.interloper.storm(mischief)
    await world.weather(HANDSHAKES)
    world.interloper.calm()
    await world.works()
    assert "Traceback" not in world.agent.log
    assert world.agent.log.count("hears its orders") == 1, "the process is the same"
    assert world.agent.stop() == 0


async def test_an_agent_whose_key_was_revoked_says_what_to_do_and_asks_on(world: World) -> None:
    world.agent.start()
    await world.works()
    claims = Client()
    url = f"tls://127.0.0.1:{world.interloper.target}"
    ca = world.directory / "tls" / "data.crt"
    await claims.connect(**connect_options(world.realm.creds_path("claims"), "claims", [url], ca=ca))
    await revoke(world.realm, claims, [world.key.public])
    await claims.close()
    async with asyncio.timeout(30):
        while world.agent.log.count("the bus refuses the credentials") < 4:
            await asyncio.sleep(0.05)  # a file announces nothing
    assert "python -m host_agent enrol" in world.agent.log
    assert str(world.directory / "state" / "identity") in world.agent.log
    assert world.agent.stop() == 0
