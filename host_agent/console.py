"""A VM's serial or VNC console over a WebSocket, admitted once by a ticket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from host_agent import runningxml
from host_agent.action import Action, Host, Running
from host_agent.tickets import Ticket
from volery.contracts.base import Done
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import OPEN_CONSOLE, OpenConsole
from volery.contracts.errors import STATUS, Kind, Refused, conflict, invalid

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SERIAL, VNC = "serial", "vnc"
CHUNK_BYTES = 64 * 1024
CLOSED_NORMALLY = 1000
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


class VncStream:
    """A connection to QEMU's VNC server."""

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
    if (await host.hypervisor.domain(order.vm_id)).state in (DomainState.GONE, DomainState.SHUTOFF):
        raise conflict(f"VM {order.vm_id} doesn't run on this host: start it, then open its console")
    if order.kind == VNC and not await has_vnc(host, order.vm_id):
        raise conflict(f"VM {order.vm_id} has no VNC console: give it graphics and start it again")
    host.tickets.admit(order.ticket, order.kind, Console(order.vm_id, order.kind), order.expires_seconds)
    return Done()


async def has_vnc(host: Host, vm_id: str) -> bool:
    root = runningxml.parsed(await host.hypervisor.domain_xml(vm_id))
    return root.find("devices/graphics[@type='vnc']") is not None


async def _open_serial(host: Host, vm_id: str) -> Stream:
    return await host.hypervisor.open_console(vm_id)


async def _open_vnc(host: Host, vm_id: str) -> Stream:
    connection = await host.hypervisor.open_graphics(vm_id)
    connection.setblocking(False)
    return VncStream(*await asyncio.open_connection(sock=connection))


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
    try:
        stream = await _opened(host, ticket)
    except Refused as refused:
        await _reject(send, refused)
        return
    offered = SUBPROTOCOL in scope.get("subprotocols", ())
    await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL if offered else None})
    try:
        await _bridge(stream, receive, send)
    finally:
        await stream.close()


async def _opened(host: Host, ticket: Ticket | None) -> Stream:
    if ticket is None:
        raise Refused(
            Kind.NOT_FOUND, "there is no such console here: its ticket was used or has expired; open it again"
        )
    console: Console = ticket.target
    return await OPENERS[console.kind](host, console.vm_id)


async def _reject(send: Send, refused: Refused) -> None:
    """Answers the handshake with a contracts.errors.Problem (ASGI's WebSocket denial response)."""
    body = msgspec.json.encode(refused.problem())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": STATUS[refused.kind], "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


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
