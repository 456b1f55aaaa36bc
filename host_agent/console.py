"""A VM's serial or VNC console over a WebSocket, admitted once by a ticket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from host_agent import runningxml
from host_agent.action import Action, Host, Running
from host_agent.tickets import Ticket
from volery.contracts.base import Done
from volery.contracts.domain_orders import OPEN_CONSOLE, OpenConsole
from volery.contracts.errors import Kind, Refused, conflict, invalid

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SERIAL, VNC = "serial", "vnc"
CHUNK_BYTES = 64 * 1024
CONNECT_SECONDS = 10.0
CLOSED_NORMALLY, REFUSED, FAILED = 1000, 4404, 1011
MIN_TICKET = 16
SUBPROTOCOL = "binary"
"""What VNC clients in browsers ask for."""


@dataclass(frozen=True, slots=True)
class Console:
    """What a console's ticket stands for."""

    vm_id: str
    kind: str


class Stream(Protocol):
    """Both kinds of console: `read` returns b"" at the end, `write` raises ConnectionError there."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def close(self) -> None: ...


class TcpStream:
    """A VNC server's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        return await self._reader.read(CHUNK_BYTES)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        self._writer.close()


async def open_console(host: Host, order: OpenConsole, running: Running) -> Done:
    """Admits one WebSocket. Raises Refused: no such VM here, it has no such console."""
    if order.kind not in OPENERS:
        raise invalid(f"{order.kind!r} isn't a kind of console: serial or vnc")
    if len(order.ticket) < MIN_TICKET:
        raise invalid(f"a console's ticket must have {MIN_TICKET} or more characters")
    if order.kind == VNC:
        await vnc_port(host, order.vm_id)
    else:
        await host.hypervisor.domain(order.vm_id)
    host.tickets.admit(order.ticket, order.kind, Console(order.vm_id, order.kind), order.expires_seconds)
    return Done()


async def vnc_port(host: Host, vm_id: str) -> int:
    """The VM's VNC port on this host's loopback. Raises Refused(conflict) when it has none."""
    port = runningxml.graphics_port(runningxml.parsed(await host.hypervisor.domain_xml(vm_id)))
    if not port:
        raise conflict(f"VM {vm_id} has no VNC console: give it graphics and start it again")
    return port


async def _open_serial(host: Host, vm_id: str) -> Stream:
    return await host.hypervisor.open_console(vm_id)


async def _open_vnc(host: Host, vm_id: str) -> Stream:
    port = await vnc_port(host, vm_id)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return TcpStream(*await asyncio.open_connection("127.0.0.1", port))
    except (OSError, TimeoutError) as error:
        raise Refused(Kind.UNAVAILABLE, f"VM {vm_id}'s VNC server on port {port} doesn't answer") from error


OPENERS: dict[str, Callable[[Host, str], Awaitable[Stream]]] = {SERIAL: _open_serial, VNC: _open_vnc}


def find(host: Host, secret: str) -> Ticket | None:
    """The console's ticket, which is used up by this."""
    for kind in OPENERS:
        ticket = host.tickets.find(secret, kind)
        if ticket is not None:
            host.tickets.revoke(secret)
            return ticket
    return None


async def serve(host: Host, secret: str, scope: Message, receive: Receive, send: Send) -> None:
    """One WebSocket, from its handshake to its end."""
    ticket = find(host, secret)
    if (await receive())["type"] != "websocket.connect":
        return
    if ticket is None:
        await send({"type": "websocket.close", "code": REFUSED, "reason": "no such ticket"})
        return
    console: Console = ticket.target
    try:
        stream = await OPENERS[console.kind](host, console.vm_id)
    except Refused as refused:
        await send({"type": "websocket.close", "code": FAILED, "reason": refused.message[:120]})
        return
    offered = SUBPROTOCOL in scope.get("subprotocols", ())
    await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL if offered else None})
    try:
        await _bridge(stream, receive, send)
    finally:
        await stream.close()


async def _bridge(stream: Stream, receive: Receive, send: Send) -> None:
    """Both directions until one of them ends."""
    tasks = {
        asyncio.create_task(_to_client(stream, send)),
        asyncio.create_task(_to_guest(stream, receive)),
    }
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _to_client(stream: Stream, send: Send) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await stream.read():
            await send({"type": "websocket.send", "bytes": data})
    await send({"type": "websocket.close", "code": CLOSED_NORMALLY, "reason": "the console has ended"})


async def _to_guest(stream: Stream, receive: Receive) -> None:
    with contextlib.suppress(ConnectionError):
        while (message := await receive())["type"] == "websocket.receive":
            data = message.get("bytes") or (message.get("text") or "").encode()
            await stream.write(data)


ACTIONS = (Action(OPEN_CONSOLE, open_console),)
