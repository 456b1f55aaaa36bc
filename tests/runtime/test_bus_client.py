"""The bus speaks only TLS, and whatever happens to handshakes, every connection comes back."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import pytest
import uvloop
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError, OutboundBufferLimitError
from nats.errors import TimeoutError as NatsTimeout

from tests.support.interloper import GREETING, between
from tests.support.nats_realm import enrol, ignore
from volery.runtime.bus_client import BusClient, open_client
from volery.runtime.connection import connect_options, revoke, settle
from volery.runtime.identity import Realm, mint_agent
from volery.runtime.signing import Key, format_creds
from volery.setup import embedded, servers
from volery.setup.home import Home

PATIENCE_SECONDS = 15.0
SILENCE_SECONDS = 0.5
"""Ten times what a server with `handshake_first: "auto"` waits before it greets."""
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@dataclass(frozen=True)
class World:
    """The installation's own bus, as `make up` configures it."""

    home: Home
    realm: Realm
    port: int

    def options(self, user: str = "inventory", port: int | None = None, **more: Any) -> dict[str, Any]:
        creds = more.pop("creds", None) or self.realm.creds_path(user)
        url = f"tls://127.0.0.1:{port or self.port}"
        made = connect_options(creds, user, [url], ca=self.home.ca_certificate, **more)
        return made | {"error_cb": ignore, "reconnect_time_wait": 0.1}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with embedded.temporary_home("volery-bus-client-") as home:
        home.change_settings({"VOLERY_SETUP_BUS_ADDRESS": "127.0.0.1"})
        servers.ensure_certificates(home)
        try:
            server = embedded.start_nats(home, servers.nats_options(home))
            yield World(home, Realm.load(home.bus_credentials), int(server.url.rpartition(":")[2]))
        finally:
            embedded.stop(home, "nats")


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not true():
            await asyncio.sleep(0.01)  # nats-py announces the end of a reconnect before it knows it itself


async def test_the_server_says_nothing_before_tls(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), SILENCE_SECONDS)
    writer.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
    assert b"INFO" not in await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)
    writer.close()


@pytest.mark.parametrize("connect", [open_client, lambda options: nats.connect(**options)])
async def test_a_server_in_clear_text_learns_nothing(
    world: World, connect: Callable[[dict[str, Any]], Awaitable[Any]]
) -> None:
    async with between(world.port) as liar:
        liar.storm("greeted")
        trying = asyncio.create_task(_try(connect, world.options(port=liar.port)))
        await until(lambda: len(liar.heard) > 0)
        await asyncio.sleep(SILENCE_SECONDS)  # that nothing comes after it has no event
        trying.cancel()
    assert liar.heard[:1] == b"\x16", "the first word is a TLS handshake"
    for secret in (b"CONNECT", b"eyJ", b"jwt", b"PING"):
        assert secret not in liar.heard


async def _try(connect: Callable[[dict[str, Any]], Awaitable[Any]], options: dict[str, Any]) -> None:
    await connect(options)
    raise AssertionError("a server in clear text was taken")


async def test_a_running_client_does_not_follow_into_clear_text(world: World) -> None:
    """Cut off, and met by somebody who greets without TLS in the server's place."""
    async with between(world.port) as liar:
        client = await open_client(world.options(port=liar.port))
        liar.storm("greeted")
        liar.cut()
        await until(lambda: liar.met.count("greeted") >= 3)
        assert b"CONNECT" not in liar.heard
        assert b"eyJ" not in liar.heard
        liar.calm()
        await until(lambda: client.is_connected)
        await settle(client)
        await client.close()


async def test_a_program_without_an_authority_tells_a_server_that_wants_tls_nothing(world: World) -> None:
    """It couldn't know whom it tells."""
    options = world.options()
    del options["tls"], options["tls_handshake_first"]
    asking = GREETING.replace(b'"tls_required":false', b'"tls_required":true')
    heard = bytearray()

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(asking)
        heard.extend(await reader.read())
        writer.close()

    async with await asyncio.start_server(ask, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        options |= {"servers": [f"nats://127.0.0.1:{port}"], "allow_reconnect": False}
        with pytest.raises(NatsError, match="no certificate authority"):
            await open_client(options)
    assert not heard


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("seed", range(3))
def test_every_connection_survives_a_storm_of_broken_handshakes(world: World, loop: str, seed: int) -> None:
    """Connections begun in it, and those that were there before; both kinds, under both event loops."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(_storm(world, seed))


async def _storm(world: World, seed: int) -> None:
    host_id, creds, _ = enrol(world.realm, world.home.run)
    async with AsyncExitStack() as stack:
        interloper = await stack.enter_async_context(between(world.port, seed))
        witness = await open_client(world.options())
        stack.push_async_callback(witness.close)
        beats: list[bytes] = []

        async def hear(message: Any) -> None:
            beats.append(message.data)

        await witness.subscribe(f"beat.host.{host_id}", cb=hear)

        def options(number: int) -> dict[str, Any]:
            made = world.options(host_id, interloper.port, creds=creds, at_once=number % 2 == 0)
            return made | {"connect_timeout": 0.5}

        clients = [await open_client(options(number)) for number in range(4)]
        answered = [await _answers(client, f"host.{host_id}.ask") for client in clients[1::2]]
        interloper.storm()
        begun = [asyncio.create_task(open_client(options(number))) for number in range(4)]
        for _ in range(30):
            interloper.cut(0.3)
            await asyncio.sleep(0.1)  # the weather
        interloper.calm()
        clients += await asyncio.wait_for(asyncio.gather(*begun), PATIENCE_SECONDS)
        await until(lambda: all(client.is_connected for client in clients))
        for number, client in enumerate(clients):
            stack.push_async_callback(client.close)
            await client.publish(f"beat.host.{host_id}", b"%d" % number)
        await until(lambda: {int(beat) for beat in beats} == set(range(8)))
        await witness.publish(f"host.{host_id}.ask", b"")
        await until(lambda: all(answered))
    assert len(set(interloper.met)) == 5, f"the storm was too mild: {interloper.met}"


async def _answers(client: BusClient, subject: str) -> list[bytes]:
    """What the client hears there, from now on."""
    heard: list[bytes] = []

    async def hear(message: Any) -> None:
        heard.append(message.data)

    await client.subscribe(subject, cb=hear)
    await settle(client)
    return heard


TROUBLE: dict[str, tuple[bytes, bytes]] = {
    "ends at once": (b"", b""),
    "no greeting": (b"HTTP/1.1 400 Bad Request\r\n", b""),
    "half a greeting": (b"INFO\r\n", b""),
    "no JSON": (b"INFO {x\r\n", b""),
    "an endless line": (b"INFO " + b"x" * 300_000 + b"\r\n", b""),
    "lets nobody in": (GREETING, b""),
    "too many": (GREETING, b"-ERR 'maximum connections exceeded'\r\n"),
    "does not know us yet": (GREETING, b"-ERR 'Authorization Violation'\r\n"),
    "nonsense afterwards": (GREETING, b"PONG\r\nMSG\r\n"),
    "an error afterwards": (GREETING, b"PONG\r\n-ERR 'Unknown Protocol Operation'\r\n"),
    "expired afterwards": (GREETING, b"PONG\r\n-ERR 'User Authentication Expired'\r\n"),
}


@asynccontextmanager
async def troubled(world: World, greeting: bytes, answer: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server with the right certificate which, twice, is in this trouble, and then is well."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(world.home.pki / "nats.pem", world.home.pki / "nats.key")
    trust = ssl.create_default_context(cafile=str(world.home.ca_certificate))
    met: list[bytes] = []
    going: set[asyncio.Task[None] | None] = set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.read(65_536):
            writer.write(said)
        writer.transport.abort()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        going.add(asyncio.current_task())
        met.append(answer)
        try:
            if len(met) > 2:
                there_reader, there = await asyncio.open_connection("127.0.0.1", world.port, ssl=trust)
                await asyncio.gather(relay(reader, there), relay(there_reader, writer))
            else:
                await misbehave(reader, writer)
        except ConnectionError:  # the client has left
            pass
        finally:
            writer.transport.abort()

    async def misbehave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        if greeting == GREETING:
            while b"PING" not in await reader.readline():
                pass
            writer.write(answer)
            if answer.startswith(b"PONG"):
                await reader.read()
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(take, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1], met
        await asyncio.wait([task for task in going if task is not None])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_server_in_trouble_is_tried_until_it_is_well(world: World, trouble: str, loop: str) -> None:
    async def story() -> None:
        async with troubled(world, *TROUBLE[trouble]) as (port, met):
            client = await open_client(world.options(port=port) | {"ping_interval": 0.3})
            await until(lambda: len(met) > 2 and client.is_connected)
            await settle(client)
            assert len(met) == 3
            await client.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(story())


async def test_a_server_that_is_cut_off_is_left_at_once(world: World) -> None:
    """Closing TLS in good order would wait for an answer that can't come."""
    async with between(world.port) as cable:
        client = await open_client(world.options(port=cable.port))
        cable.freeze()
        lost = asyncio.get_running_loop().time()
        await client.force_reconnect()
        await until(lambda: client.is_connected and client.stats["reconnects"] == 1)
        assert asyncio.get_running_loop().time() - lost < 1.0
        await client.close()


def _warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "volery.runtime.bus_client"]


async def test_one_whose_key_was_revoked_tries_on_and_says_what_to_do(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host_id, creds, key = enrol(world.realm, tmp_path)
    closed = asyncio.Event()

    async def on_closed() -> None:
        closed.set()

    options = world.options(host_id, creds=creds, at_once=True)
    client = await open_client(options | {"closed_cb": on_closed}, advice="enrol it again")
    claims = await open_client(world.options("claims"))
    with caplog.at_level(logging.WARNING, "volery.runtime.bus_client"):
        await revoke(world.realm, claims, [key.public])
        await until(lambda: len(_warned(caplog)) >= 2)
    assert host_id in _warned(caplog)[-1]
    assert "enrol it again" in _warned(caplog)[-1]
    assert not closed.is_set()
    with pytest.raises(OutboundBufferLimitError):
        await client.publish(f"beat.host.{host_id}", b"")
    fresh = Key.new("user")
    creds.write_text(format_creds(mint_agent(world.realm, host_id, fresh.public), fresh.seed))
    await until(lambda: client.is_connected)
    await settle(client)
    await claims.close()
    await client.close()
    assert closed.is_set()


async def test_closing_ends_one_that_can_not_connect(world: World) -> None:
    async with between(world.port) as interloper:
        client = await open_client(world.options(port=interloper.port))
        interloper.storm("hung")
        interloper.cut()
        await until(lambda: "hung" in interloper.met)
        await asyncio.wait_for(client.close(), PATIENCE_SECONDS / 3)
        assert client.is_closed


async def test_closing_ends_one_whose_connection_is_just_lost(world: World) -> None:
    """At any moment between the loss and the client's knowledge of it, with something still to be sent."""
    for moments in range(12):
        async with between(world.port) as way:
            client = await open_client(world.options(port=way.port))
            way.cut()
            for _ in range(moments):
                await asyncio.sleep(0)
                await client.publish("nobody.listens", b"x" * 1000)
            await client.close()
            assert client.is_closed
            assert not client.is_connected


async def test_a_question_is_answered_or_ends_in_time_and_nothing_of_it_is_kept(world: World) -> None:
    server, client = (
        await open_client(world.options("inventory")),
        await open_client(world.options("gateway")),
    )
    held = asyncio.Event()

    async def echo(message: Msg) -> None:
        await message.respond(message.data)

    async def never(message: Msg) -> None:
        held.set()

    await server.subscribe("inventory.test.echo", cb=echo)
    await server.subscribe("inventory.test.never", cb=never)
    await settle(server)
    answers = await asyncio.gather(
        *(client.request("inventory.test.echo", b"%d" % n, timeout=10) for n in range(50))
    )
    assert [answer.data for answer in answers] == [b"%d" % n for n in range(50)]
    with pytest.raises(NatsTimeout):
        await client.request("inventory.test.never", timeout=0.05)
    with pytest.raises(NoRespondersError):
        await client.request("inventory.test.nobody", timeout=10)
    held.clear()
    asked = asyncio.create_task(client.request("inventory.test.never", timeout=10))
    await held.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not client._resp_map
    await client.close()
    await server.close()
