"""Images and consoles pass through the gateway to the host's real data server, over TLS that our authority vouches for."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import resource
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from api_gateway.config import GatewayConfig
from host_agent import data_server, listening, transfers
from host_agent.action import Host
from tests.api_gateway.scripted import Deployed, Script, decoded, deployed
from tests.support.agent_host import make_host, running
from tests.support.certificates import make_certificate
from tests.support.storage_domain import MIB, Domain, connected_domain
from volery.contracts.domain import ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.storage import FIND_TRANSFER_ENDPOINT, FindTransferEndpoint, TransferEndpoint
from volery.contracts.vm import OPEN_VM_CONSOLE, ConsoleTicket
from volery.contracts.volume_orders import OpenTransfer, TransferDirection
from volery.runtime.bus import Caller
from volery.setup.embedded import Embedded


@dataclass
class Real:
    """A gateway, and a host with a storage domain."""

    gateway: Deployed
    host: Host
    domain: Domain
    orders: dict[str, OpenTransfer]

    async def open(self, direction: TransferDirection, size: int = 0, source: Any = None) -> str:
        """A transfer, admitted on the host."""
        source = source or self.domain.source(new_id(), ImageFormat.RAW)
        order = OpenTransfer(
            transfer_id=new_id(),
            disk_id=Path(source.path).stem,
            ticket=f"ticket-{new_id()}",
            direction=direction,
            source=source,
            size_bytes=size,
        )
        await transfers.open_transfer(self.host, order, running())
        self.orders[order.transfer_id] = order
        return order.transfer_id

    async def endpoint(self, question: FindTransferEndpoint, caller: Caller) -> TransferEndpoint:
        order = self.orders.get(question.id)
        if order is None:
            raise Refused(Kind.NOT_FOUND, "there is no such transfer")
        if question.again:
            await transfers.open_transfer(self.host, order, running())
        return TransferEndpoint(
            ticket=order.ticket,
            data_address=listening.address(self.host.config),
            direction=order.direction,
            size_bytes=order.size_bytes,
        )

    def staged(self, transfer_id: str) -> Path:
        return self.domain.staging / f"{transfer_id}.upload"


@pytest.fixture
async def real(nats: Embedded, tmp_path: Path) -> AsyncIterator[Real]:
    host = make_host(tmp_path / "state")
    certificate = make_certificate(tmp_path / "state" / "identity")
    domain = await connected_domain(host, tmp_path / "storage")
    serving = asyncio.create_task(data_server.serve(host))
    script = Script()
    config = GatewayConfig(listen="127.0.0.1:0", ca=str(certificate))
    async with deployed(nats.url, script, config) as gateway:
        made = Real(gateway, host, domain, {})
        script.on(FIND_TRANSFER_ENDPOINT, made.endpoint)
        await listens(listening.address(host.config))
        yield made
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


async def listens(address: str) -> None:
    host, port = listening.split(address)
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
                return
            await asyncio.sleep(0.02)


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def pieces(data: bytes, size: int = 300_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def test_an_upload_that_is_cut_goes_on_where_the_host_has_it(real: Real) -> None:
    data = noise(20 * MIB)
    transfer = await real.open(TransferDirection.UPLOAD, len(data))
    path = f"/transfers/{transfer}/data"

    async def cut() -> AsyncIterator[bytes]:
        async for piece in pieces(data[: 12 * MIB]):
            yield piece
        raise OSError("the client's cable")

    with pytest.raises(OSError, match="cable"):
        await real.gateway.http.put(path, content=cut())
    async with asyncio.timeout(20):
        while True:
            head = await real.gateway.http.head(path)
            assert head.status_code == 200
            offset = int(head.headers["upload-offset"])
            if offset:
                break
            await asyncio.sleep(0.05)
    assert offset <= 12 * MIB
    rest = await real.gateway.http.put(path, params={"offset": offset}, content=pieces(data[offset:]))
    assert rest.status_code == 200
    assert decoded(rest) == {"received_bytes": len(data), "size_bytes": len(data)}
    assert hashlib.sha256(real.staged(transfer).read_bytes()).digest() == hashlib.sha256(data).digest()


async def test_nothing_is_kept_in_the_gateway(real: Real) -> None:
    size = 192 * MIB
    transfer = await real.open(TransferDirection.UPLOAD, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    block = bytes(MIB)

    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(size // MIB):
            yield block

    answer = await real.gateway.http.put(f"/transfers/{transfer}/data", content=blocks())
    assert decoded(answer)["received_bytes"] == size
    # This process has the client, the gateway and the host: with any of them keeping it, far more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert real.gateway.gateway.desk is not None
    assert real.gateway.gateway.desk.meters.transfer_bytes["upload"] == size


async def test_downloads_whole_and_in_ranges(real: Real) -> None:
    data = noise(5 * MIB)
    _, source = await real.domain.create(ImageFormat.RAW, len(data))
    Path(source.path).write_bytes(data)
    path = f"/transfers/{await real.open(TransferDirection.DOWNLOAD, 0, source)}/data"
    whole = await real.gateway.get(path)
    assert (whole.status_code, whole.content == data) == (200, True)
    assert whole.headers["content-type"] == "application/octet-stream"
    part = await real.gateway.get(path, headers={"range": f"bytes={MIB}-{MIB + 9}"})
    assert (part.status_code, part.content) == (206, data[MIB : MIB + 10])
    assert part.headers["content-range"] == f"bytes {MIB}-{MIB + 9}/{len(data)}"
    beyond = await real.gateway.get(path, headers={"range": f"bytes={len(data)}-"})
    assert beyond.status_code == 416
    head = await real.gateway.http.head(path)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(data)))
    put = await real.gateway.http.put(path, content=b"x")
    assert (put.status_code, "download" in decoded(put)["detail"]) == (409, True)


async def test_what_the_host_refuses_is_a_problem(real: Real) -> None:
    transfer = await real.open(TransferDirection.UPLOAD, 10)
    path = f"/transfers/{transfer}/data"
    answer = await real.gateway.http.put(path, content=b"x" * 11)
    assert answer.status_code == 413
    assert "ends at byte 10" in decoded(answer)["detail"]
    assert (await real.gateway.get(path)).status_code == 409
    for query in ("offset=-1", "offset=x", "colour=red"):
        assert (await real.gateway.http.put(f"{path}?{query}", content=b"x")).status_code == 400
    assert (await real.gateway.get(f"/transfers/{new_id()}/data")).status_code == 404
    assert (await real.gateway.get("/transfers/a%22b/data")).status_code == 404


async def test_an_agent_that_forgot_the_ticket_is_asked_to_admit_it_again(real: Real) -> None:
    transfer = await real.open(TransferDirection.UPLOAD, 4)
    real.host.tickets.revoke(real.orders[transfer].ticket)
    answer = await real.gateway.http.put(f"/transfers/{transfer}/data", content=b"abcd")
    assert decoded(answer)["received_bytes"] == 4


async def test_a_host_that_is_away_or_another_is_named(real: Real, tmp_path: Path) -> None:
    transfer = await real.open(TransferDirection.UPLOAD, 4)
    stranger = make_certificate(tmp_path / "stranger")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(stranger, stranger.with_name("data.key"))
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    order = real.orders[transfer]
    for address in (f"127.0.0.1:{port}", "127.0.0.1:1"):
        endpoint = TransferEndpoint(
            ticket=order.ticket, data_address=address, direction=order.direction, size_bytes=4
        )
        real.gateway.script.on(FIND_TRANSFER_ENDPOINT, endpoint)
        for answer in (
            await real.gateway.http.put(f"/transfers/{transfer}/data", content=b"abcd"),
            await real.gateway.http.head(f"/transfers/{transfer}/data"),
        ):
            assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
    server.close()


# Consoles

Talk = Callable[[ServerConnection], Awaitable[None]]


@contextlib.asynccontextmanager
async def host_console(nats_url: str, directory: Path, talk: Talk) -> AsyncIterator[Deployed]:
    """A gateway, and a host whose console server talks like this."""
    certificate = make_certificate(directory)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, certificate.with_name("data.key"))
    config = GatewayConfig(listen="127.0.0.1:0", ca=str(certificate))
    async with (
        serve_websocket(talk, "127.0.0.1", 0, ssl=context) as server,
        deployed(nats_url, Script(), config) as gateway,
    ):
        port = next(iter(server.sockets)).getsockname()[1]
        ticket = ConsoleTicket(ticket="t" * 20, data_address=f"127.0.0.1:{port}", host_id="h1")
        gateway.script.on(OPEN_VM_CONSOLE, ticket)
        yield gateway


def console(gateway: Deployed, query: str = "", **options: Any) -> connect:
    headers = {"authorization": f"Bearer {gateway.script.token()}"}
    url = f"{gateway.url.replace('http', 'ws')}/api/v1/vms/v1/console{query}"
    return connect(url, proxy=None, additional_headers=headers, **options)


async def test_a_console_is_bridged_both_ways(nats: Embedded, tmp_path: Path) -> None:
    async def shout(host: ServerConnection) -> None:
        assert host.request is not None
        assert host.request.path == "/console/" + "t" * 20
        async for message in host:
            data = message if isinstance(message, bytes) else message.encode()
            if data == b"bye":
                await host.close(1000, "the guest has ended")
                return
            await host.send(data.upper())

    async with host_console(nats.url, tmp_path, shout) as gateway:
        async with console(gateway, "?kind=vnc", subprotocols=["binary"]) as socket:
            assert socket.subprotocol == "binary"
            await socket.send(b"ls\n\x00\xff")
            assert await socket.recv() == b"LS\n\x00\xff"
            await socket.send("text")
            assert await socket.recv() == b"TEXT"
            await socket.send(noise(900_000))
            assert await socket.recv() == noise(900_000).upper()
            await socket.send(b"bye")
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1000, "the guest has ended")
        assert gateway.script.questions(OPEN_VM_CONSOLE)[0].kind == "vnc"


async def test_the_hosts_side_ends_when_the_client_leaves(nats: Embedded, tmp_path: Path) -> None:
    left = asyncio.Event()

    async def listen(host: ServerConnection) -> None:
        async for _ in host:
            pass
        left.set()

    async with host_console(nats.url, tmp_path, listen) as gateway:
        async with console(gateway) as socket:
            await socket.send(b"x")
        await asyncio.wait_for(left.wait(), 10)


async def test_a_console_that_can_not_be_had(nats: Embedded, tmp_path: Path) -> None:
    async def silent(host: ServerConnection) -> None:
        return

    async def status(gateway: Deployed, query: str = "") -> int:
        with pytest.raises(InvalidStatus) as refused:
            async with console(gateway, query):
                pass
        return refused.value.response.status_code

    async with host_console(nats.url, tmp_path, silent) as gateway:
        assert await status(gateway, "?kind=telepathy") == 400
        gateway.script.on(
            OPEN_VM_CONSOLE, ConsoleTicket(ticket="t", data_address="127.0.0.1:1", host_id="h1")
        )
        assert await status(gateway) == 503
        gateway.script.on(OPEN_VM_CONSOLE, None)
        assert await status(gateway) == 404
