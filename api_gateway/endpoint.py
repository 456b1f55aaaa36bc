"""A route at work: the request's question goes to the owner, the owner's bytes come back as they are."""

from __future__ import annotations

import re
import time
from urllib.parse import urlencode

from api_gateway.desk import Desk
from api_gateway.exchange import Exchange, word
from api_gateway.expand import expanded
from api_gateway.question import question
from api_gateway.route import PREFIX, Route
from api_gateway.waiting import wait_for_end
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.runtime.bus import Caller
from volery.runtime.core import body_hash

_HEAD = re.compile(rb'\{"id":"([^"\\]{1,128})","revision":(\d{1,18})[,}]')
"""How the document of every entity begins: msgspec writes a struct's fields in their order."""
_NEXT = re.compile(rb',"next":"([^"\\]+)"\}\Z')
_TOKEN_BYTES = 8192
"""The longest end of a page in which its token is looked for."""
_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d{1,4})(?:$|[,;\s])")


async def serve(route: Route, desk: Desk, http: Exchange) -> None:
    """Answer one request. Raises Refused, HttpRefused, Gone."""
    if not route.open:
        await desk.door.admit(http, route.needed)
    body = await question(route, http, desk.config.body_limit_bytes)
    caller = caller_of(http, route, body)
    waits = wait_seconds(http, desk) if route.operates else 0.0
    before = desk.feed.next
    answer = await desk.ask(route.call, body, caller)
    if route.operates:
        await _answer_operation(route, desk, http, answer, waits, before)
    elif route.lists:
        await _answer_page(route, desk, http, answer)
    else:
        await _answer_one(route, http, answer)


def caller_of(http: Exchange, route: Route, body: bytes) -> Caller:
    """Who asks, under the client's Idempotency-Key or an id of our own, so that our retries are safe."""
    if not route.call.mutates:
        return Caller(http.who)
    key = http.header(b"idempotency-key")
    request_id = new_id() if key is None else word("Idempotency-Key", key)
    digest = body_hash(http.method.encode(), http.path.encode(), body)
    return Caller(http.who, request_id, digest, fresh=key is None)


def wait_seconds(http: Exchange, desk: Desk) -> float:
    """How long `Prefer: wait=N` waits. Other preferences are ignored, as RFC 7240 says."""
    found = _WAIT.search(http.header(b"prefer") or "")
    return min(float(found[1]), desk.config.wait_limit_seconds) if found else 0.0


async def _answer_operation(
    route: Route, desk: Desk, http: Exchange, answer: bytes, waits: float, before: int
) -> None:
    """202 while it runs, 200 when it ended within `Prefer: wait`, and for a plan (dry_run)."""
    if route.plans or http.query().get("dry_run") in ("true", "1"):
        await http.answer(200, answer)  # nothing was begun: it has no id
        return
    head = _HEAD.match(answer)
    if head is None:
        raise Refused(Kind.INTERNAL, "the owner's answer is not an operation")
    operation_id = http.operation_id = head[1].decode()
    headers = [(b"location", f"{PREFIX}/operations/{operation_id}".encode())]
    ended = False
    if waits:
        headers.append((b"preference-applied", b"wait=%d" % int(waits)))
        answer, ended = await wait_for_end(desk, operation_id, answer, before, time.monotonic() + waits)
    headers += etag(answer)
    if not ended:
        headers.append((b"retry-after", b"1"))
    await http.answer(200 if ended else 202, answer, headers)


async def _answer_page(route: Route, desk: Desk, http: Exchange, answer: bytes) -> None:
    query = http.query() if http.scope["query_string"] else {}
    if "expand" in query:
        answer = await expanded(route, desk, http, query["expand"], answer)
    await http.answer(200, answer, next_link(http, query, answer))


def next_link(http: Exchange, query: dict[str, str], answer: bytes) -> list[tuple[bytes, bytes]]:
    """`Link: <…>; rel="next"` when the page has a next one."""
    found = _NEXT.search(answer, max(0, len(answer) - _TOKEN_BYTES))
    if found is None:
        return []
    target = f"{http.path}?{urlencode({**query, 'page': found[1].decode()})}"
    return [(b"link", f'<{target}>; rel="next"'.encode())]


async def _answer_one(route: Route, http: Exchange, answer: bytes) -> None:
    if route.success == 204:
        await http.answer(204)
        return
    headers: list[tuple[bytes, bytes]] = []
    if route.entity:
        headers = etag(answer)
        if headers and unchanged(http, headers[0][1]):
            await http.answer(304, b"", headers)
            return
    if route.at:
        headers += _location(route, answer)
    await http.answer(route.success, answer, headers)


def etag(answer: bytes) -> list[tuple[bytes, bytes]]:
    """The ETag header of an entity's document, which is its revision."""
    head = _HEAD.match(answer)
    return [(b"etag", b'"' + head[2] + b'"')] if head else []


def _location(route: Route, answer: bytes) -> list[tuple[bytes, bytes]]:
    # The entity itself, or the first one in an answer that wraps it (an issued token, a host with its token).
    head = _HEAD.search(answer)
    return [(b"location", f"{PREFIX}{route.at}/".encode() + head[1])] if head else []


def unchanged(http: Exchange, etag: bytes) -> bool:
    if http.method not in ("GET", "HEAD"):
        return False
    asked = http.header(b"if-none-match")
    if asked is None:
        return False
    return any(part.strip().removeprefix("W/").encode() in (etag, b"*") for part in asked.split(","))
