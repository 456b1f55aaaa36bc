"""Clients that follow events: SSE and WebSocket. Both write what the feed made, never more than the client takes."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from api_gateway.auth import RANK, rank
from api_gateway.cursor import Cursor, not_one, parse
from api_gateway.desk import Desk
from api_gateway.exchange import Exchange, unknown_parameter
from api_gateway.feed import Event, Push, sse_frame
from api_gateway.reader import Lost, Reader, Wants
from api_gateway.wire import Wire, wire_of
from volery.contracts.account import Principal, Scope
from volery.contracts.errors import invalid

PARAMETERS = ("after", "types", "subject")
PATTERNS = {
    "types": re.compile(r"[a-z][a-z_.]*\*?"),
    "subject": re.compile(r"[a-z][a-z_]*(/[0-9A-Za-z_-]*)?\*?"),
}
ACCOUNT_NOUNS = ("user/", "token/", "reader/")
"""Facts about accounts are shown to those who may read accounts."""
SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
    (b"x-content-type-options", b"nosniff"),
)
BATCH_EVENTS = 256
"""Written at once: bounds what a client that lags has in flight."""


def wanted(query: dict[str, str], principal: Principal) -> Wants | None:
    """The filter of a client; None when it sees everything. Raises Refused(invalid)."""
    for name in query:
        if name not in PARAMETERS:
            raise unknown_parameter(name, PARAMETERS)
    types = _patterns("types", query.get("types", ""))
    abouts = _patterns("subject", query.get("subject", ""))
    types = [t if t.startswith("dev.volery.") else f"dev.volery.{t}" for t in types]
    sees_accounts = rank(principal) >= RANK[Scope.ADMIN]
    if not types and not abouts and sees_accounts:
        return None

    def wants(kind: str, about: str) -> bool:
        if not sees_accounts and about.startswith(ACCOUNT_NOUNS):
            return False
        if types and not any(_matches(pattern, kind) for pattern in types):
            return False
        return not abouts or any(_matches(pattern, about) for pattern in abouts)

    return wants


def _patterns(name: str, text: str) -> list[str]:
    found = [part for part in text.split(",") if part]
    for part in found:
        if not PATTERNS[name].fullmatch(part):
            raise invalid(
                f"{part[:80]!r} is no pattern for {name}: give names as events have them, with * at the end for "
                "any that begins so",
                parameter=name,
            )
    return found


def _matches(pattern: str, value: str) -> bool:
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def cursor_of(query: dict[str, str], last_event_id: str | None) -> Cursor | None:
    """Where the client goes on: Last-Event-ID (a browser's reconnect) before `after`. Raises Refused(invalid)."""
    text = last_event_id if last_event_id else query.get("after", "")
    if not text:
        return None
    if not text.isascii():
        raise not_one(text)
    return parse(text)


@dataclass(slots=True)
class Client:
    """One client that follows. `over` ends it; it resumes with its cursor."""

    desk: Desk
    principal: Principal
    reader: Reader
    over: bool = False
    waiter: asyncio.Future[None] | None = None
    push: Push | None = None

    def end(self) -> None:
        self.over = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def events(self) -> AsyncIterator[list[Event]]:
        """Batches of events; an empty one is a heartbeat. Ends when the client must come back."""
        feed = self.desk.feed
        try:
            batch: list[Event] = []
            async for event in self.reader.old():
                if self.is_over():
                    return
                batch.append(event)
                if len(batch) >= BATCH_EVENTS:
                    yield batch
                    batch = []
            if batch:
                yield batch
            tick = feed.ticks
            while not self.is_over():
                found = self.reader.take()
                for start in range(0, len(found), BATCH_EVENTS):
                    yield found[start : start + BATCH_EVENTS]
                if self.reader.number == feed.next:
                    if tick != feed.ticks:
                        tick = feed.ticks
                        if self.principal.expires_at <= datetime.now(UTC):
                            return
                        yield []
                        continue
                    self.waiter = feed.waiter(self.push)
                    await self.waiter
        except Lost:
            self.desk.meters.streams_lost += 1

    def is_over(self) -> bool:
        return self.over or self.desk.feed.closing


@contextlib.asynccontextmanager
async def following(desk: Desk, principal: Principal, reader: Reader) -> AsyncIterator[Client]:
    """A client that ends when its token does."""
    client = Client(desk, principal, reader)

    def evicted(matches: Callable[[Principal], bool]) -> None:
        if matches(principal):
            client.end()

    desk.door.on_evicted.append(evicted)
    desk.meters.streams += 1
    try:
        yield client
    finally:
        desk.meters.streams -= 1
        desk.door.on_evicted.remove(evicted)


async def sse(desk: Desk, http: Exchange) -> None:
    """GET /events. Raises Refused before the answer begins."""
    assert http.principal is not None
    query = http.query()
    reader = Reader(desk.feed, wanted(query, http.principal), desk.catch_ups)
    await reader.begin(cursor_of(query, http.header(b"last-event-id")))
    async with following(desk, http.principal, reader) as client:
        watching = asyncio.create_task(_until_gone(http, client))
        try:
            await http.start(200, SSE_HEADERS)
            # The first id lets a client resume that was cut off before its first event.
            if (wire := wire_of(http.send)) is not None:
                client.push = partial(_pushed, client, wire)
            await _write(http, b": this is Volery\nretry: 1000\nid: " + reader.cursor().encode() + b"\n\n")
            async for batch in client.events():
                await _write(http, _sse(reader, batch))
            await http.send({"type": "http.response.body", "body": b""})
        finally:
            watching.cancel()


def _pushed(client: Client, wire: Wire) -> bool:
    """Live events, written where they came: no task is woken. Whatever is not that simple is its task's: a heartbeat, its
    end, a client that takes too slowly or gets its own cursors."""
    reader = client.reader
    at_hand = reader.feed.next - reader.number
    if client.is_over() or not reader.joined or not 0 < at_hand <= BATCH_EVENTS or not wire.takes():
        return False
    try:
        found = reader.take()
    except Lost:
        return False  # which it learns again
    if found:
        wire.write(_sse(reader, found))
    return True


def _sse(reader: Reader, batch: list[Event]) -> bytes:
    if not batch:
        return b": beat\nid: " + reader.cursor().encode() + b"\n\n"
    if len(batch) == 1 and batch[0].frame:
        return batch[0].frame
    return b"".join(e.frame or sse_frame(reader.cursor_of(e), e.type.encode(), e.body) for e in batch)


async def _write(http: Exchange, body: bytes) -> None:
    await http.send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(http: Exchange, client: Client) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        continue
    client.end()
