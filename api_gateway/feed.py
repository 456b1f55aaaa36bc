"""Every owner's facts, followed once per process, merged and kept for a while in memory.

The order of one owner's facts is its log's; owners are merged as they arrive. Each event is encoded once, with
the cursor that a live client has after it. Nothing is skipped: a follower that breaks goes on where it stood.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import nats.errors
import nats.js.errors
from nats.aio.client import Client

from api_gateway.cursor import COUNT, NO_HISTORY, OWNERS, Cursor, short
from volery.contracts.base import Owner
from volery.runtime.relay import stream_name
from volery.runtime.tail import Broken, Tail, follow
from volery.runtime.tasks import together

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Event:
    """One fact as clients get it."""

    number: int
    """Its place in the merged order of this process."""
    index: int
    """Of its owner in `OWNERS`."""
    position: int
    type: str
    """dev.volery.inventory.vm.changed"""
    about: str
    """vm/{id}, the CloudEvent's subject"""
    body: bytes
    """The CloudEvent, byte for byte as the bus carries it."""
    cursor: bytes
    """Of a live client that has read it."""
    positions: tuple[int, ...]
    """The same as numbers."""
    frame: bytes
    """As an SSE event."""


def names(subject: str) -> tuple[str, str]:
    """CloudEvents type and subject of fact.{owner}.{noun}.{id}.{verb}: dev.volery.{owner}.{noun}.{verb}, {noun}/{id}."""
    _, owner, noun, object_id, verb = subject.split(".", 4)
    return f"dev.volery.{owner}.{noun}.{verb}", f"{noun}/{object_id}"


def sse_frame(cursor: bytes, kind: bytes, body: bytes) -> bytes:
    return b"id: " + cursor + b"\nevent: " + kind + b"\ndata: " + body + b"\n\n"


@dataclass(slots=True)
class Source:
    """One owner's stream as this process has heard it."""

    index: int
    owner: Owner
    history: str = ""
    prefix: bytes = b""
    """What every CloudEvent of this history begins with."""
    position: int = 0
    kept_after: int = 0
    """Facts behind this position are in the ring."""
    known: bool = False
    absent: bool = False
    """Its stream wasn't there when it was first looked for: whoever followed since has read nothing of it."""
    live: bool = False


Push = Callable[[], bool]
"""Takes and writes what is at hand; False: wake whoever waits instead."""


@dataclass(frozen=True, slots=True)
class Waiter:
    woken: asyncio.Future[None]
    push: Push | None


@dataclass(slots=True)
class Feed:
    """The merged ring and its followers. `on_event` hears every event before clients do."""

    client: Client
    ring_events: int
    ring_bytes: int
    preload_events: int
    on_event: Callable[[Event], None] = lambda event: None
    sources: list[Source] = field(default_factory=lambda: [Source(i, o) for i, o in enumerate(OWNERS)])
    events: dict[int, Event] = field(default_factory=dict)
    first: int = 0
    """Number of the oldest event in the ring."""
    next: int = 0
    """Number that the next event will get."""
    bytes_kept: int = 0
    ticks: int = 0
    """Grows with every heartbeat."""
    generation: int = 0
    """Grows when an owner's history was rewritten: cursors of before are worth nothing."""
    closing: bool = False
    looked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once every owner's stream was found, or found not to be there yet."""
    waiters: list[Waiter] = field(default_factory=list)
    _histories: tuple[str, ...] = (NO_HISTORY,) * COUNT
    _positions: list[int] = field(default_factory=lambda: [0] * COUNT)
    _histories_text: str = NO_HISTORY * COUNT

    async def run(self, heartbeat_seconds: float) -> None:
        """Until cancelled."""
        await together([*map(self._follow_for_ever, self.sources), self._beat(heartbeat_seconds)])

    async def _beat(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            self.ticks += 1
            self.wake()

    def cursor(self) -> Cursor:
        """Of a client that has read everything so far."""
        return Cursor(self._histories, tuple(self._positions))

    def positions(self) -> list[int]:
        return self._positions

    def waiter(self, push: Push | None = None) -> asyncio.Future[None]:
        """Done at the next event, heartbeat, or the end. With `push`: only when that says no."""
        woken = asyncio.get_running_loop().create_future()
        self.waiters.append(Waiter(woken, push))
        return woken

    def wake(self) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if waiter.woken.done():
                continue
            if waiter.push is not None and waiter.push():
                self.waiters.append(waiter)
            else:
                waiter.woken.set_result(None)

    def close(self) -> None:
        """Let every client go; they resume elsewhere."""
        self.closing = True
        self.wake()

    async def _follow_for_ever(self, source: Source) -> None:
        while True:
            try:
                await self._follow(source)
            except nats.js.errors.NotFoundError:
                self._first_look(source, absent=True)
            except (Broken, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.info("following %s again: %s", source.owner, error or type(error).__name__)
            source.live = False
            await asyncio.sleep(RETRY_SECONDS)

    async def _follow(self, source: Source) -> None:
        stream = stream_name(source.owner)
        info = await self.client.jetstream(timeout=5).stream_info(stream)
        history = (info.config.metadata or {}).get("history", "")
        if not source.known or source.history != history:
            oldest = max(info.state.first_seq - 1, 0)
            recent = oldest if source.absent else info.state.last_seq - self.preload_events
            source.absent = False
            self._begin(source, history, max(recent, oldest))
            self._first_look(source)
        async with follow(self.client, stream, source.position) as tail:
            if tail.standing.history != source.history:
                raise Broken("the stream was made anew with another history")
            if tail.standing.first > source.position + 1:
                log.error(
                    "facts %d to %d of %s are beyond its retention: clients are told to list again",
                    source.position + 1,
                    tail.standing.first - 1,
                    source.owner,
                )
                self._begin(source, source.history, tail.standing.first - 1)
            source.live = True
            await self._hear(source, tail)

    def _first_look(self, source: Source, *, absent: bool = False) -> None:
        source.absent = absent and not source.known
        if all(each.known or each.absent for each in self.sources):
            self.looked.set()

    async def _hear(self, source: Source, tail: Tail) -> None:
        async for heard in tail:
            if not heard.body.startswith(source.prefix):
                raise Broken("the owner's history was rewritten")
            if heard.position <= source.position:
                continue
            if heard.position != source.position + 1:
                raise Broken(f"position {source.position + 1} is missing")
            self._add(source, heard.position, heard.subject, heard.body)
            if not tail.waiting():
                self.wake()

    def _begin(self, source: Source, history: str, position: int) -> None:
        """Stand at a position without what was before: at start, or after a history was rewritten."""
        if source.known:
            self.generation += 1
            self.events.clear()
            self.first, self.bytes_kept = self.next, 0
            for other in self.sources:
                other.kept_after = other.position
        source.known, source.history = True, history
        source.prefix = f'{{"specversion":"1.0","id":"{history}.'.encode()
        source.position = source.kept_after = position
        self._positions[source.index] = position
        self._histories = tuple(short(s.history) for s in self.sources)
        self._histories_text = "".join(self._histories)
        self.wake()

    def _add(self, source: Source, position: int, subject: str, body: bytes) -> None:
        source.position = position
        self._positions[source.index] = position
        positions = tuple(self._positions)
        i, s, w, h, c, d = positions
        cursor = f"{self._histories_text}.i{i}.s{s}.w{w}.h{h}.c{c}.d{d}".encode()
        kind, about = names(subject)
        frame = sse_frame(cursor, kind.encode(), body)
        event = Event(self.next, source.index, position, kind, about, body, cursor, positions, frame)
        self.events[event.number] = event
        self.next += 1
        self.bytes_kept += len(frame)
        while self.next - self.first > self.ring_events or (
            self.bytes_kept > self.ring_bytes and self.next - self.first > 1
        ):
            self._forget_oldest()
        self.on_event(event)

    def _forget_oldest(self) -> None:
        gone = self.events.pop(self.first)
        self.first += 1
        self.bytes_kept -= len(gone.frame)
        self.sources[gone.index].kept_after = gone.position
