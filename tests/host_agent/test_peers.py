"""A host that tries another: what it finds at real doors, and whom it obeys."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import pytest

from host_agent.agent import Agent
from host_agent.config import AgentConfig
from host_agent.peers import AT_ONCE, LIBVIRT_QUESTION, Trier, knock
from lab.bmc import make_certificate
from tests.host_agent.test_agent_identity import enrolled, running
from tests.support import nats_realm, toy_agent
from tests.support.toy_host import HOST_ID
from volery.contracts.agent import SIGNATURE_HEADER
from volery.contracts.base import encode, fill
from volery.contracts.errors import Kind, Refused
from volery.contracts.peers import TRY_SUBJECT, Door, DoorTried, HostTried, Reach, Speaks, TryHost
from volery.runtime.identity import Realm
from volery.runtime.signing import Key, Signer, Verifier, parse_creds

ELSEWHERE = "127.0.0.2"
"""An address that connections from here don't come from."""

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve, host: str = ELSEWHERE, **more: Any) -> AsyncIterator[str]:
    server = await asyncio.start_server(serve, host, 0, **more)
    async with server:
        yield f"{host}:{server.sockets[0].getsockname()[1]}"


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def banner(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2p1\r\n")
    await wait(reader, writer)


async def libvirt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As libvirtd: silent until it is asked, and only what is whole is a question."""
    asked = await reader.readexactly(int.from_bytes(await reader.readexactly(4)) - 4)
    assert asked.startswith(bytes.fromhex("20008086 00000001"))
    writer.write(bytes(4))
    writer.close()


async def at(address: str, speaks: Speaks = Speaks.TLS, seconds: float = 1) -> DoorTried:
    return await knock(Door(name="agent", address=address, speaks=speaks), seconds)


async def test_a_program_that_speaks_tls_answers(tmp_path: Path) -> None:
    """Whoever vouches for it; and one that refuses our hello has read it, too."""
    made = tmp_path / "bmc.pem"
    make_certificate(made)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made)
    async with serving(wait, ssl=context) as address:
        assert (await at(address, seconds=20)).reach is Reach.ANSWERS
    async with serving(banner) as address:
        assert (await at(address, seconds=20)).reach is Reach.ANSWERS


@pytest.mark.parametrize(("speaks", "serve"), [(Speaks.LIBVIRT, libvirt), (Speaks.SSH, banner)])
async def test_a_program_that_speaks_answers(speaks: Speaks, serve: Serve) -> None:
    async with serving(serve) as address:
        assert await at(address, speaks, 20) == DoorTried(name="agent", reach=Reach.ANSWERS, words="answers")
    async with serving(hang_up) as address:
        assert (await at(address, speaks)).reach is Reach.TAKEN


async def test_a_kernel_that_takes_or_refuses_connections_is_no_program() -> None:
    """So looks a host whose processes stand still: its kernel goes on taking connections."""
    with socket.socket() as listening:
        listening.bind((ELSEWHERE, 0))
        address = f"{ELSEWHERE}:{listening.getsockname()[1]}"
        refused = await at(address)
        assert (refused.reach, refused.words) == (Reach.TAKEN, "refuses connections")
        listening.listen()
        found = await at(address)
        assert (found.reach, found.words) == (Reach.TAKEN, "takes connections and says nothing")


async def test_its_own_address_and_one_that_nobody_has_are_nothing() -> None:
    async with serving(banner, "127.0.0.1") as address:
        own = await at(address, Speaks.SSH)
        assert own.reach is Reach.NOTHING
        assert "of the host that tried it" in own.words
    assert (await at("no-such-host.invalid:1")).reach is Reach.NOTHING


class World:
    def __init__(self) -> None:
        self.ha, self.inventory = Signer(Key.new("user").seed), Signer(Key.new("user").seed)
        keys = {"ha": self.ha.public_key, "inventory": self.inventory.public_key}
        self.go, self.knocked = asyncio.Event(), 0
        self.trier = Trier(HOST_ID, Verifier(keys), self.knock)

    async def knock(self, door: Door) -> DoorTried:
        self.knocked += 1
        await self.go.wait()
        return DoorTried(name=door.name, reach=Reach.ANSWERS)

    async def hears(self, ask: TryHost, signer: Signer | None = None) -> HostTried:
        subject, body = fill(TRY_SUBJECT, ask), encode(ask)
        return await self.trier.hear(
            subject, body, {SIGNATURE_HEADER: (signer or self.ha).sign(subject, body)}
        )

    async def refuses(self, ask: TryHost, kind: Kind, words: str, signer: Signer | None = None) -> None:
        with pytest.raises(Refused, match=words) as refused:
            await self.hears(ask, signer)
        assert refused.value.kind is kind


DOOR = Door(name="agent", address="10.0.0.7:54322")
ASK = TryHost(host_id=HOST_ID, target_host_id="target", doors=(DOOR,))
replace = msgspec.structs.replace


async def test_it_tries_only_what_ha_asks_and_only_others() -> None:
    world = World()
    await world.refuses(ASK, Kind.FORBIDDEN, "not signed by ha", world.inventory)
    await world.refuses(replace(ASK, host_id="h2"), Kind.INVALID, "is asked of another host, h2")
    await world.refuses(replace(ASK, target_host_id=HOST_ID), Kind.CONFLICT, "that host itself")
    for doors in ((), (DOOR,) * 5):
        await world.refuses(replace(ASK, doors=doors), Kind.INVALID, "1 to 4 doors")
    for address in ("10.0.0.7", "10.0.0.7:0", "10.0.0.7:65536", ":22", "10.0.0.7:x"):
        wrong = replace(DOOR, address=address)
        await world.refuses(replace(ASK, doors=(DOOR, wrong)), Kind.INVALID, "no HOST:PORT")
    with pytest.raises(Refused, match="no question about another host"):
        await world.trier.hear("host.x.try", b"{}", None)
    assert world.knocked == 0
    waiting = [asyncio.ensure_future(world.hears(ASK)) for _ in range(AT_ONCE)]
    while world.knocked < AT_ONCE:
        await asyncio.sleep(0)
    await world.refuses(ASK, Kind.EXHAUSTED, f"tries {AT_ONCE} others already")
    world.go.set()
    for found in await asyncio.gather(*waiting):
        assert found.doors == (DoorTried(name="agent", reach=Reach.ANSWERS),)
    assert (await world.hears(ASK)).target_host_id == "target"


async def test_an_agent_tries_another_over_a_real_bus(tmp_path: Path) -> None:
    """With the permissions that ha and hosts have."""
    realm = Realm.create(tmp_path / "realm")
    server = nats_realm.Server(tmp_path / "nats", realm)
    server.write_config()
    server.start()
    try:
        user = await nats_realm.open_user(server, realm.creds_path("ha"), "ha")
        _, key = parse_creds(realm.creds_path("ha").read_text())
        settings = AgentConfig(state_dir=str(tmp_path / "state"), libvirt_uri="test:///default")
        agent = Agent(settings, enrolled(realm, tmp_path / "state", server.url), toy_agent.PARTS)
        async with serving(libvirt) as address, running(agent):
            door = Door(name="libvirt", address=address, speaks=Speaks.LIBVIRT)
            ask = replace(ASK, doors=(door,))
            subject, body = fill(TRY_SUBJECT, ask), encode(ask)
            headers = {SIGNATURE_HEADER: Signer(key.seed).sign(subject, body)}
            while True:  # it is asked before it listens
                try:
                    message = await user.nc.request(subject, body, timeout=10, headers=headers)
                    break
                except nats.errors.NoRespondersError:
                    await asyncio.sleep(0.02)
        found = msgspec.json.decode(message.data, type=HostTried)
        assert found.doors == (DoorTried(name="libvirt", reach=Reach.ANSWERS, words="answers"),)
        assert user.errors == []
        await user.nc.close()
    finally:
        server.stop()


def test_the_question_for_libvirt_is_whole() -> None:
    assert len(LIBVIRT_QUESTION) == int.from_bytes(LIBVIRT_QUESTION[:4]) == 28
