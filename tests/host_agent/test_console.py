"""Consoles over WebSockets: a real guest's serial console and its VNC server."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect

from host_agent import console, data_server, listening
from tests.support.agent_host import running
from tests.support.certificates import make_certificate
from tests.support.vms import VmHost, new_uuid, tiny_spec
from volery.contracts.domain_orders import OpenConsole
from volery.contracts.errors import Kind, Refused

pytestmark = pytest.mark.timeout(180)


class Consoles:
    def __init__(self, host: VmHost, base: str, trust: ssl.SSLContext) -> None:
        self.host, self.base, self.trust = host, base, trust

    async def admit(self, vm_id: str, kind: str = "serial") -> str:
        ticket = f"console-ticket-{new_uuid()}"
        await console.open_console(
            self.host.host, OpenConsole(vm_id=vm_id, ticket=ticket, kind=kind), running(vm_id)
        )
        return ticket

    def connect(self, ticket: str, **options: object) -> connect:
        return connect(f"{self.base}/console/{ticket}", ssl=self.trust, **options)  # type: ignore[arg-type]


@pytest.fixture
async def consoles(qemu: VmHost) -> AsyncIterator[Consoles]:
    config = qemu.host.config
    certificate = make_certificate(Path(config.state_dir) / "identity")
    serving = asyncio.create_task(data_server.serve(qemu.host))
    address = listening.address(config)
    await listens(address)
    yield Consoles(qemu, f"wss://{address}", ssl.create_default_context(cafile=str(certificate)))
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


async def until(socket: ClientConnection, text: bytes, seconds: float = 60) -> bytes:
    heard = b""
    async with asyncio.timeout(seconds):
        while text not in heard:
            message = await socket.recv()
            heard += message if isinstance(message, bytes) else message.encode()
    return heard


async def test_a_shell_on_the_serial_console(consoles: Consoles) -> None:
    spec = tiny_spec()
    await consoles.host.run(spec)
    try:
        ticket = await consoles.admit(spec.vm_id)
        async with consoles.connect(ticket, subprotocols=["binary"]) as socket:
            assert socket.subprotocol == "binary"
            await until(socket, b"GUEST-UP")
            await socket.send(b"echo sum-$((40+2))\n")
            await until(socket, b"sum-42")
            await socket.send("echo text-$((1+1))\n")
            await until(socket, b"text-2")
            with pytest.raises(websockets.InvalidStatus) as again:
                async with consoles.connect(ticket):
                    pass
            assert again.value.response.status_code == 404
            await consoles.host.power_off(spec.vm_id)
            with pytest.raises(websockets.ConnectionClosedOK):
                await until(socket, b"never")
    finally:
        await consoles.host.power_off(spec.vm_id)


async def test_vnc_speaks_rfb(consoles: Consoles) -> None:
    spec = tiny_spec(graphics=True)
    await consoles.host.run(spec)
    try:
        async with consoles.connect(await consoles.admit(spec.vm_id, "vnc")) as socket:
            assert (await until(socket, b"\n", 10)).startswith(b"RFB 003.")
    finally:
        await consoles.host.power_off(spec.vm_id)


async def test_what_has_no_console_is_refused(consoles: Consoles) -> None:
    with pytest.raises(Refused) as refused:
        await consoles.admit(new_uuid())
    assert refused.value.kind is Kind.CONFLICT
    spec = tiny_spec()
    await consoles.host.run(spec, paused=True)
    try:
        with pytest.raises(Refused, match="no VNC console") as refused:
            await consoles.admit(spec.vm_id, "vnc")
        assert refused.value.kind is Kind.CONFLICT
        with pytest.raises(Refused, match="kind of console"):
            await consoles.admit(spec.vm_id, "telepathy")
    finally:
        await consoles.host.power_off(spec.vm_id)
    for ticket in ("console-ticket-nobody-has", "x"):
        with pytest.raises(websockets.InvalidStatus) as closed:
            async with consoles.connect(ticket):
                pass
        assert closed.value.response.status_code == 404
        assert b"ticket was used or has expired" in closed.value.response.body
