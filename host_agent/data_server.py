"""The agent's own HTTPS server: image uploads and downloads, and consoles, each admitted by a ticket.

Bytes pass through in pieces of at most 256 KiB; disks are touched by children only.

    PUT  /images/{ticket}?offset=N   a part of an upload (or with Content-Range); answers how much is here
    HEAD /images/{ticket}            of an upload: Upload-Offset, Upload-Length; of a download: its headers
    GET  /images/{ticket}            a download, whole or a Range
    WS   /console/{ticket}           a serial or VNC console
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import socket
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from host_agent import console, listening
from host_agent.action import Host
from host_agent.transfers import Download, Received, Upload
from volery.contracts.errors import STATUS, Kind, Refused, invalid

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

STALL_SECONDS = 120.0
"""A client that sends nothing for so long is taken for gone; the upload resumes with its next request."""
RELOAD_SECONDS = 60.0
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
SHUTDOWN_SECONDS = 5
BIND_AGAIN_SECONDS = 5.0
LINGER_SECONDS = 5.0
LINGER_BYTES = 16 * 1024 * 1024


class Server(uvicorn.Server):
    """uvicorn inside a process that handles its own signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_app(host: Host) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        noun, _, secret = scope["path"].strip("/").partition("/")
        if scope["type"] == "websocket":
            await console.serve(host, secret if noun == "console" else "", scope, receive, send)
        elif scope["type"] == "http":
            try:
                await _image(host, secret if noun == "images" else "", scope, receive, send)
            except Refused as refused:
                await _refuse(receive, send, refused)

    return app


async def _image(host: Host, secret: str, scope: Scope, receive: Receive, send: Send) -> None:
    upload = host.tickets.find(secret, "upload")
    download = host.tickets.find(secret, "download")
    method = scope["method"]
    if upload is not None and method == "PUT":
        await _put(upload.target, scope, receive, send)
    elif upload is not None and method in ("GET", "HEAD"):
        await _progress(send, upload.target, await upload.target.look())
    elif download is not None and method in ("GET", "HEAD"):
        await _get(download.target, scope, receive, send)
    elif upload is not None or download is not None:
        raise invalid(
            f"{method} isn't possible with this ticket: PUT sends an upload, GET fetches a download"
        )
    else:
        raise Refused(
            Kind.NOT_FOUND,
            "there is no such transfer here: its ticket has expired or was finished; open it again",
        )


# Uploads


async def _put(upload: Upload, scope: Scope, receive: Receive, send: Send) -> None:
    headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
    offset = _offset(scope, headers)
    length = int(headers.get("content-length") or 0)
    if offset + length > upload.size_bytes:
        raise Refused(
            Kind.TOO_LARGE,
            f"upload {upload.transfer_id} ends at byte {upload.size_bytes}, this request at {offset + length}",
            size_bytes=upload.size_bytes,
        )
    done = await upload.receive(offset, _body(receive))
    await _progress(send, upload, done)


def _offset(scope: Scope, headers: dict[str, str]) -> int:
    """Where a PUT's first byte belongs: from `offset` in its query or from its Content-Range; else 0."""
    given = urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get("offset", [""])[0]
    ranged = headers.get("content-range", "")
    if ranged and not given:
        found = CONTENT_RANGE.fullmatch(ranged)
        if found is None:
            raise invalid(f"Content-Range {ranged[:80]!r} isn't of the form `bytes first-last/size`")
        given = found[1]
    if given and not (given.isascii() and given.isdigit() and len(given) < 20):
        raise invalid(f"offset {given[:80]!r} isn't a number of bytes")
    return int(given or 0)


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    """The request's body; ends early when the client went away or stalls."""
    while True:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                message = await receive()
        except TimeoutError:
            return
        if message["type"] != "http.request":
            return
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return


async def _progress(send: Send, upload: Upload, found: Received) -> None:
    await _answer(
        send,
        200,
        {"received_bytes": found.received_bytes, "size_bytes": upload.size_bytes},
        [
            (b"upload-offset", str(found.received_bytes).encode()),
            (b"upload-length", str(upload.size_bytes).encode()),
        ],
    )


# Downloads


async def _get(download: Download, scope: Scope, receive: Receive, send: Send) -> None:
    headers = dict(scope["headers"])
    size = download.size_bytes
    wanted = _range(headers.get(b"range", b"").decode("latin-1"), size)
    if wanted is None:
        await _start(send, 416, [(b"content-range", f"bytes */{size}".encode())])
        await send({"type": "http.response.body", "body": b""})
        return
    start, end = wanted
    partial = [(b"content-range", f"bytes {start}-{end - 1}/{size}".encode())] if b"range" in headers else []
    await _start(
        send,
        206 if partial else 200,
        [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(end - start).encode()),
            (b"accept-ranges", b"bytes"),
            *partial,
        ],
    )
    if scope["method"] == "GET":
        await _send_range(download, start, end, receive, send)
    await send({"type": "http.response.body", "body": b""})


def _range(header: str, size: int) -> tuple[int, int] | None:
    """(first byte, behind the last); the whole for no or an odd Range; None for one that can't be had."""
    found = RANGE.fullmatch(header)
    if found is None or header == "bytes=-":
        return 0, size
    first, last = found[1], found[2]
    if not first:
        return max(0, size - int(last)), size
    start, end = int(first), min(int(last) + 1, size) if last else size
    return (start, end) if start < end else None


async def _send_range(download: Download, start: int, end: int, receive: Receive, send: Send) -> None:
    """Raises NbdError, which ends the connection: a short answer is how the client learns of it."""
    gone = asyncio.create_task(_gone(receive))
    try:
        async with download.connect() as reader:
            async for piece in reader.read(start, end):
                if gone.done():
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})
    finally:
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# Answers


async def _refuse(receive: Receive, send: Send, refused: Refused) -> None:
    """A contracts.errors.Problem as JSON. What the client still sends is read for a while and thrown away:

    a connection closed under a sender loses the answer too.
    """
    await _answer(send, STATUS[refused.kind], refused.problem(), [(b"connection", b"close")], last=False)
    left = LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while left > 0 and (message := await receive())["type"] == "http.request":
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    break
    await send({"type": "http.response.body", "body": b""})


async def _answer(
    send: Send, status: int, value: object, headers: list[tuple[bytes, bytes]], *, last: bool = True
) -> None:
    body = msgspec.json.encode(value)
    length = (b"content-length", str(len(body)).encode())
    await _start(send, status, [(b"content-type", b"application/json"), length, *headers])
    await send({"type": "http.response.body", "body": body, "more_body": not last})


async def _start(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


# The server


async def serve(host: Host) -> None:
    """Listens for as long as the agent lives, with the certificate that the host got at its enrolment."""
    identity = Path(host.config.state_dir) / "identity"
    shutil.rmtree(Path(host.config.state_dir) / "nbd", ignore_errors=True)  # of a run that was killed
    while True:
        try:
            listener = listening.bind(host.config)
        except OSError as error:
            log.error("images and consoles can't be served on %s: %s", listening.address(host.config), error)
            await asyncio.sleep(BIND_AGAIN_SECONDS)
        else:
            await run(host, listener, identity / "data.crt", identity / "data.key")


async def run(host: Host, listener: socket.socket, certificate: Path, key: Path) -> None:
    """Serves on a listening socket until cancelled; a renewed certificate is taken up by itself."""
    config = uvicorn.Config(
        make_app(host),
        http="httptools",
        ws="websockets-sansio",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    config.load()
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    renewing = asyncio.create_task(_renew(config.ssl, certificate, key))
    try:
        await asyncio.shield(serving)
    finally:
        renewing.cancel()
        server.should_exit = True
        await asyncio.wait({serving}, timeout=2 * SHUTDOWN_SECONDS)


async def _renew(context: ssl.SSLContext | None, certificate: Path, key: Path) -> None:
    """Loads the certificate again when its file has changed."""
    loaded = certificate.stat().st_mtime_ns
    while context is not None:
        await asyncio.sleep(RELOAD_SECONDS)
        try:
            changed = certificate.stat().st_mtime_ns
            if changed != loaded:
                context.load_cert_chain(certificate, key)
                loaded = changed
        except (OSError, ssl.SSLError) as error:  # between the two files' renewal: the next look gets both
            log.warning("the data server's certificate can't be loaded: %s", error)
