"""WebSocket endpoints: authenticated like every request, refused with a problem before they open.

The token comes in the header Authorization or, from a browser, as the subprotocol `bearer.{token}` beside
`volery.v1`; never in the URL, which ends up in logs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from api_gateway import problems
from api_gateway.auth import allow, unauthenticated
from api_gateway.desk import Desk, audit
from api_gateway.exchange import Exchange, Receive, Send
from api_gateway.exchange import Scope as AsgiScope
from api_gateway.feed import Event
from api_gateway.reader import Reader
from api_gateway.route import Node
from api_gateway.streams import Client, cursor_of, following, wanted
from volery.contracts.account import Scope
from volery.contracts.errors import Kind, Refused

PROTOCOL = "volery.v1"
BINARY_PROTOCOL = "binary"
"""What VNC clients in browsers ask for."""
BEARER_PROTOCOL = "bearer."
WEBSOCKET = "WEBSOCKET"
"""Stands for the method in the table."""


@dataclass(frozen=True)
class SocketRoute:
    """A WebSocket endpoint."""

    path: str
    handler: Callable[[Desk, Socket], Awaitable[None]]
    scope: Scope
    method: str = WEBSOCKET
    prefix: str = "/api/v1"


@dataclass(slots=True)
class Socket:
    """An open or opening WebSocket; `http` reads its request."""

    http: Exchange
    accepted: bool = False
    protocols: list[str] = field(default_factory=list)

    async def accept(self) -> None:
        message: dict[str, Any] = {"type": "websocket.accept"}
        for known in (PROTOCOL, BINARY_PROTOCOL):
            if known in self.protocols:
                message["subprotocol"] = known
                break
        await self.http.send(message)
        self.accepted = True

    async def send_text(self, text: str) -> None:
        await self.http.send({"type": "websocket.send", "text": text})

    async def send_bytes(self, data: bytes) -> None:
        await self.http.send({"type": "websocket.send", "bytes": data})

    async def receive(self) -> bytes | None:
        """The next message; None when the client has left."""
        while True:
            message = await self.http.receive()
            if message["type"] == "websocket.disconnect":
                return None
            if message["type"] == "websocket.receive":
                data = message.get("bytes")
                return data if data is not None else str(message.get("text") or "").encode()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self.http.send({"type": "websocket.close", "code": code, "reason": reason[:120]})

    async def refuse(self, kind: str, message: str, details: dict[str, Any] | None = None) -> None:
        """Before it is open with a problem, afterwards with a close code."""
        if self.accepted:
            await self.close(1011, message)
            return
        if "websocket.http.response" not in self.http.scope.get("extensions", {}):
            await self.close(1008, message)
            return
        status = problems.STATUSES[kind]
        body = problems.document(kind, message, quote(self.http.path), details)
        headers = [(b"content-type", problems.CONTENT_TYPE), (b"content-length", str(len(body)).encode())]
        await self.http.send({"type": "websocket.http.response.start", "status": status, "headers": headers})
        await self.http.send({"type": "websocket.http.response.body", "body": body})


async def serve_socket(
    desk: Desk, node: Node | None, values: list[str], scope: AsgiScope, receive: Receive, send: Send
) -> None:
    parameters = dict(zip(node.names, values, strict=True)) if node is not None and values else {}
    socket = Socket(Exchange(scope, receive, send, parameters), protocols=list(scope.get("subprotocols", ())))
    route = node.methods.get(WEBSOCKET) if node is not None else None
    await socket.http.receive()  # websocket.connect
    if route is None:
        await socket.refuse(Kind.NOT_FOUND, "there is no WebSocket at this path; see /docs")
        return
    try:
        await _admit(desk, socket, route.scope)
        audit.info("WEBSOCKET %s", socket.http.path, extra={"fields": _audited(socket)})
        await route.handler(desk, socket)
    except Refused as refused:
        await socket.refuse(str(refused.kind), refused.message, refused.details)


def _audited(socket: Socket) -> dict[str, Any]:
    principal = socket.http.principal
    assert principal is not None
    return {
        "principal": principal.principal,
        "user": principal.user_name,
        "token": principal.token_id,
        "address": socket.http.address,
        "method": WEBSOCKET,
        "path": socket.http.path[:300],
    }


async def _admit(desk: Desk, socket: Socket, scope: Scope) -> None:
    bearers = [p for p in socket.protocols if p.startswith(BEARER_PROTOCOL)]
    if socket.http.header(b"authorization") is not None:
        await desk.door.admit(socket.http, scope)
        return
    if len(bearers) != 1:
        raise unauthenticated(
            f"a WebSocket needs the header Authorization, or the subprotocols {PROTOCOL} and bearer.{{token}}"
        )
    socket.http.principal = await desk.door.principal(bearers[0].removeprefix(BEARER_PROTOCOL))
    allow(socket.http.principal, scope)


async def events(desk: Desk, socket: Socket) -> None:
    """/events/ws: each message is `{"cursor":"…","event":{CloudEvent}}`, a heartbeat has no event."""
    principal = socket.http.principal
    assert principal is not None
    query = socket.http.query()
    reader = Reader(desk.feed, wanted(query, principal), desk.catch_ups)
    await reader.begin(cursor_of(query, None))
    async with following(desk, principal, reader) as client:
        await socket.accept()
        watching = asyncio.create_task(_until_gone(socket, client))
        try:
            await socket.send_text(_beat(reader))
            async for batch in client.events():
                for event in batch:
                    await socket.send_text(_message(reader, event))
                if not batch:
                    await socket.send_text(_beat(reader))
            await socket.close(1012, "come back with your cursor")
        finally:
            watching.cancel()


def _beat(reader: Reader) -> str:
    return '{"cursor":"' + reader.cursor() + '"}'


def _message(reader: Reader, event: Event) -> str:
    return '{"cursor":"' + reader.cursor_of(event).decode() + '","event":' + event.body.decode() + "}"


async def _until_gone(socket: Socket, client: Client) -> None:
    while await socket.receive() is not None:
        continue
    client.end()
