"""A VM's console: the client's WebSocket bridged to the one of the host that runs the VM."""

from __future__ import annotations

import asyncio

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from api_gateway.data import tls, unreachable
from api_gateway.desk import Desk
from api_gateway.question import SAFE_ID
from api_gateway.sockets import Socket
from volery.contracts.base import encode
from volery.contracts.errors import invalid, not_found
from volery.contracts.vm import OPEN_VM_CONSOLE, ConsoleTicket
from volery.runtime.bus import Caller

KINDS = ("serial", "vnc")
OPEN_SECONDS = 15.0
MAX_MESSAGE_BYTES = 1024 * 1024
NORMAL, BROKEN = 1000, 1011


async def bridge(desk: Desk, socket: Socket) -> None:
    """/vms/{id}/console?kind=serial|vnc. Raises Refused before the client's WebSocket is open."""
    vm_id = socket.http.parameters["id"]
    kind = _kind(socket)
    if not SAFE_ID.fullmatch(vm_id):
        raise not_found("VM", vm_id[:80])
    question = encode({"id": vm_id, "kind": kind})
    answer = await desk.ask(OPEN_VM_CONSOLE, question, Caller(socket.http.who))
    ticket = msgspec.json.decode(answer, type=ConsoleTicket)
    scheme = "wss" if desk.config.ca else "ws"
    try:
        host = await connect(
            f"{scheme}://{ticket.data_address}/console/{ticket.ticket}",
            ssl=await tls(desk.config),
            open_timeout=OPEN_SECONDS,
            max_size=MAX_MESSAGE_BYTES,
            compression=None,
            proxy=None,
        )
    except (OSError, TimeoutError, InvalidHandshake) as error:
        raise unreachable(f"the console of VM {vm_id}", ticket.data_address, error) from None
    async with host:
        await socket.accept()
        await _pass_on(socket, host)


def _kind(socket: Socket) -> str:
    socket.http.refuse_query("kind")
    kind = socket.http.query().get("kind", "serial")
    if kind not in KINDS:
        raise invalid(f"kind is one of {', '.join(KINDS)}, not {kind[:80]!r}", parameter="kind")
    return kind


async def _pass_on(socket: Socket, host: ClientConnection) -> None:
    """Until either side ends; the client learns why the host did."""
    to_host = asyncio.create_task(_to_host(socket, host))
    try:
        try:
            async for data in host:
                await socket.send_bytes(data if isinstance(data, bytes) else data.encode())
        except ConnectionClosed:
            pass  # its code and reason are passed on below
        if not to_host.done():
            code = host.close_code
            # 1005 and 1006 stand for no code at all and must not be sent.
            told = code if code is not None and code not in (1005, 1006) else BROKEN
            await socket.close(told, host.close_reason or "")
    finally:
        to_host.cancel()


async def _to_host(socket: Socket, host: ClientConnection) -> None:
    try:
        while (data := await socket.receive()) is not None:
            await host.send(data)
    except ConnectionClosed:
        return
    await host.close(NORMAL)
