"""One HTTP request and its answer, on bare ASGI: only what a handler needs, read when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote

from api_gateway import problems
from volery.contracts.account import Principal
from volery.contracts.errors import Kind, Refused, invalid

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
NOSNIFF = (b"x-content-type-options", b"nosniff")
PRIVATE = (b"cache-control", b"private, no-cache")
"""Kept by nobody without asking us again (with If-None-Match)."""
_BASE = [JSON, NOSNIFF, PRIVATE]
ANONYMOUS = "anonymous"
"""The principal of who needs no token."""
MAX_QUERY_BYTES = 16_384
WORD = re.compile(r"[\x21-\x7e]{1,255}")
"""What may stand in a NATS header: printable ASCII without blanks."""


class Gone(Exception):
    """The client has left."""


@dataclass(slots=True)
class Exchange:
    """A request. `parameters` are the path's."""

    scope: Scope
    receive: Receive
    send: Send
    parameters: dict[str, str] = field(default_factory=dict)
    principal: Principal | None = None
    status: int = 0
    """Of the answer, once it began."""
    operation_id: str = ""
    kept_body: bytes | None = None
    """The body, once it was read."""

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def address(self) -> str:
        client = self.scope.get("client")
        return str(client[0]) if client else ""

    def header(self, name: bytes) -> str | None:
        """The header's value; None if it isn't there. `name` is in lower case."""
        for key, value in self.scope["headers"]:
            if key == name:
                return str(value.decode("latin-1"))
        return None

    @property
    def who(self) -> str:
        """The principal that every owner sees."""
        return ANONYMOUS if self.principal is None else self.principal.principal

    def refuse_query(self, *known: str) -> None:
        """Raises Refused(invalid) for a query parameter that isn't one of those known."""
        if not self.scope["query_string"]:
            return
        for name in self.query():
            if name not in known:
                raise unknown_parameter(name, known)

    def query(self) -> dict[str, str]:
        """The query parameters. Raises Refused for one that is given twice or isn't UTF-8."""
        raw = self.scope["query_string"]
        if not raw:
            return {}
        if len(raw) > MAX_QUERY_BYTES:
            raise invalid(f"the query has {len(raw)} bytes; {MAX_QUERY_BYTES} are the most")
        try:
            pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict")
        except ValueError:
            raise invalid("the query is not percent-encoded UTF-8") from None
        found: dict[str, str] = {}
        for name, value in pairs:
            if name in found:
                raise invalid(f"the query parameter {name} is given twice; give it once", parameter=name)
            if "\0" in value or "\0" in name:
                raise invalid(f"the query parameter {name[:80]!r} holds a NUL", parameter=name[:80])
            found[name] = value
        return found

    async def body(self, limit: int) -> bytes:
        """The whole body, also when it was read before. Raises Refused(too_large), Gone."""
        if self.kept_body is not None:
            return self.kept_body
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
            if not message.get("more_body", False):
                self.kept_body = b"".join(parts)
                return self.kept_body

    async def start(self, status: int, headers: Headers) -> None:
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def answer(self, status: int, body: bytes = b"", headers: Headers = ()) -> None:
        """A whole answer, JSON unless `headers` name another type first."""
        self.status = status
        found = [(b"content-length", str(len(body)).encode()), *headers]
        if body:
            found += _BASE if not any(name == b"content-type" for name, _ in found) else _BASE[1:]
        await self.send({"type": "http.response.start", "status": status, "headers": found})
        await self.send({"type": "http.response.body", "body": body})

    async def problem(
        self, kind: str, message: str, details: dict[str, Any] | None = None, headers: Headers = ()
    ) -> None:
        status = problems.STATUSES[kind]
        body = problems.document(kind, message, quote(self.path), details)
        found = [(b"content-type", problems.CONTENT_TYPE), *headers]
        if kind in problems.RETRY_SECONDS:
            found.append((b"retry-after", str(problems.RETRY_SECONDS[kind]).encode()))
        if kind == Kind.UNAUTHENTICATED:
            found.append((b"www-authenticate", b'Bearer realm="volery"'))
        await self.answer(status, body, found)


def unknown_parameter(name: str, known: Iterable[str]) -> Refused:
    names = ", ".join(known) or "none"
    return invalid(f"{name[:80]!r} is no parameter of this; its parameters are: {names}", parameter=name[:80])


def _too_large(limit: int) -> Refused:
    return Refused(
        Kind.TOO_LARGE,
        f"the body has more than {limit} bytes, which is the most for JSON; images are sent through /transfers",
        limit_bytes=limit,
    )


def word(name: str, value: str) -> str:
    """The value of a header that goes on in a NATS header. Raises Refused(invalid)."""
    if not WORD.fullmatch(value):
        raise invalid(f"{name} has 1 to 255 printable ASCII characters without blanks", header=name)
    return value
