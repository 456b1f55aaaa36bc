"""Images pass through the gateway in pieces, as fast as the slower side: nothing is kept here.

An interrupted upload goes on where the host has it (HEAD tells), a download by Range.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec

from api_gateway.data import refusal, tls, unreachable
from api_gateway.desk import Desk
from api_gateway.exchange import Exchange, Gone
from api_gateway.openapi_parts import answer_of
from api_gateway.question import SAFE_ID
from volery.contracts.account import Scope
from volery.contracts.base import encode
from volery.contracts.errors import Refused, conflict, invalid, not_found
from volery.contracts.storage import FIND_TRANSFER_ENDPOINT, TransferEndpoint
from volery.contracts.volume_orders import TransferDirection
from volery.runtime.bus import Caller

WRITE = Scope.WRITE
TIMEOUT = httpx.Timeout(connect=10.0, read=300.0, write=120.0, pool=10.0)
"""Reading is long: after the last byte the host makes them durable before it answers."""
PASSED_ON = (
    "content-type",
    "content-length",
    "content-range",
    "accept-ranges",
    "upload-offset",
    "upload-length",
)
RECEIVED_HEADER: dict[str, Any] = {
    "upload-offset": {"schema": {"type": "integer"}, "description": "Bytes that the host has: go on here"},
    "upload-length": {"schema": {"type": "integer"}, "description": "Bytes that the upload will have"},
}
CHUNK_BYTES = 256 * 1024


class ReceivedBytes(msgspec.Struct):
    """How far an upload came."""

    received_bytes: int
    size_bytes: int


RECEIVED = answer_of(ReceivedBytes, "Every byte of this request is at the host") | {
    "headers": RECEIVED_HEADER
}


async def upload(desk: Desk, http: Exchange) -> None:
    """PUT /transfers/{id}/data?offset=N"""
    offset = _offset(http)
    async with _client(desk) as client:
        endpoint, _ = await _looked(desk, http, client)
        if endpoint.direction is not TransferDirection.UPLOAD:
            raise conflict(f"transfer {http.parameters['id']} is a download: GET its data")
        headers = {"content-type": "application/octet-stream"}
        if length := http.header(b"content-length"):
            headers["content-length"] = length
        url = _url(desk, endpoint)
        try:
            answer = await client.put(
                url, params={"offset": offset}, content=_body(desk, http), headers=headers
            )
        except httpx.HTTPError as error:
            raise _unreachable(http, endpoint, error) from None
    if answer.status_code >= 300:
        raise refusal(_what(http), answer.status_code, answer.content)
    await http.answer(200, answer.content, _passed(answer))


async def download(desk: Desk, http: Exchange) -> None:
    """GET /transfers/{id}/data, whole or a Range."""
    http.refuse_query()
    async with _client(desk) as client:
        endpoint, _ = await _looked(desk, http, client)
        if endpoint.direction is not TransferDirection.DOWNLOAD:
            raise conflict(
                f"transfer {http.parameters['id']} is an upload: HEAD tells how far it came, PUT sends data"
            )
        async with _stream(client, desk, http, endpoint) as answer:
            await http.start(answer.status_code, [*_passed(answer), (b"cache-control", b"no-store")])
            async for piece in answer.aiter_raw(CHUNK_BYTES):
                desk.meters.transfer_bytes["download"] += len(piece)
                await http.send({"type": "http.response.body", "body": piece, "more_body": True})
            await http.send({"type": "http.response.body", "body": b""})


async def progress(desk: Desk, http: Exchange) -> None:
    """HEAD /transfers/{id}/data"""
    http.refuse_query()
    async with _client(desk) as client:
        _, answer = await _looked(desk, http, client)
    if answer.status_code >= 300:
        raise refusal(_what(http), answer.status_code, b"")
    await http.start(200, _passed(answer))
    await http.send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def _stream(
    client: httpx.AsyncClient, desk: Desk, http: Exchange, endpoint: TransferEndpoint
) -> AsyncIterator[httpx.Response]:
    """The data server's answer, its body unread. Raises Refused until the answer has begun."""
    wanted = http.header(b"range")
    headers = {"range": wanted} if wanted else {}
    request = client.build_request("GET", _url(desk, endpoint), headers=headers)
    try:
        answer = await client.send(request, stream=True)
    except httpx.HTTPError as error:
        raise _unreachable(http, endpoint, error) from None
    try:
        if answer.status_code >= 300 and answer.status_code != 416:
            raise refusal(_what(http), answer.status_code, await answer.aread())
        try:
            yield answer
        except httpx.HTTPError as error:
            raise _unreachable(http, endpoint, error) from None
    finally:
        await answer.aclose()


@asynccontextmanager
async def _client(desk: Desk) -> AsyncIterator[httpx.AsyncClient]:
    context = await tls(desk.config)
    async with httpx.AsyncClient(verify=context or True, timeout=TIMEOUT, trust_env=False) as client:
        yield client


async def _looked(
    desk: Desk, http: Exchange, client: httpx.AsyncClient
) -> tuple[TransferEndpoint, httpx.Response]:
    """Where the bytes go, and what the host has of them. A host whose agent was restarted has forgotten the ticket:
    before a byte is read from the client it is admitted once more."""
    for again in (False, True):
        endpoint = await _endpoint(desk, http, again)
        try:
            answer = await client.head(_url(desk, endpoint))
        except httpx.HTTPError as error:
            if again:
                raise _unreachable(http, endpoint, error) from None
            continue
        if answer.status_code != 404:
            break
    return endpoint, answer


async def _endpoint(desk: Desk, http: Exchange, again: bool) -> TransferEndpoint:
    transfer_id = http.parameters["id"]
    if not SAFE_ID.fullmatch(transfer_id):
        raise not_found("transfer", transfer_id[:80])
    answer = await desk.ask(
        FIND_TRANSFER_ENDPOINT, encode({"id": transfer_id, "again": again}), Caller(http.who)
    )
    return msgspec.json.decode(answer, type=TransferEndpoint)


def _url(desk: Desk, endpoint: TransferEndpoint) -> str:
    scheme = "https" if desk.config.ca else "http"
    return f"{scheme}://{endpoint.data_address}/images/{endpoint.ticket}"


async def _body(desk: Desk, http: Exchange) -> AsyncIterator[bytes]:
    """The client's bytes as they come; the server reads on only when they were taken."""
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        piece = message.get("body", b"")
        if piece:
            desk.meters.transfer_bytes["upload"] += len(piece)
            yield piece
        if not message.get("more_body", False):
            return


def _offset(http: Exchange) -> int:
    http.refuse_query("offset")
    text = http.query().get("offset", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise invalid(f"offset {text[:80]!r} isn't a number of bytes", parameter="offset")
    return int(text)


def _passed(answer: httpx.Response) -> list[tuple[bytes, bytes]]:
    return [(n.encode(), answer.headers[n].encode("latin-1")) for n in PASSED_ON if n in answer.headers]


def _what(http: Exchange) -> str:
    return f"transfer {http.parameters['id']}"


def _unreachable(http: Exchange, endpoint: TransferEndpoint, error: Exception) -> Refused:
    return unreachable(_what(http), endpoint.data_address, error or type(error).__name__)
