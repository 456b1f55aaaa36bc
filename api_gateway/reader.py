"""One client's way through the feed: from its cursor, through the streams if need be and the ring, to live.

It sees every fact behind its cursor exactly once, each owner's in order. Until it has caught up its cursor is
its own; from then on it gets the same bytes as everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import nats.errors
import nats.js.errors

from api_gateway.cursor import NO_HISTORY, Cursor, short
from api_gateway.feed import RETRY_SECONDS, Event, Feed, Source, names
from volery.contracts.errors import Kind, Refused, unavailable
from volery.runtime.relay import stream_name
from volery.runtime.tail import Broken, follow

LOOK_SECONDS = 5.0
"""How long a client waits for a gateway that has just started."""

Wants = Callable[[str, str], bool]
"""(type, about) → whether this client is to see it."""


class Lost(Exception):
    """The client can't go on here: let it come back with its cursor."""


@dataclass(slots=True)
class Reader:
    """`take` gives what is at hand; when it gives nothing, wait for the feed."""

    feed: Feed
    wants: Wants | None
    catch_ups: asyncio.Semaphore
    positions: list[int] = field(default_factory=list)
    number: int = 0
    """The event of the ring that is next."""
    joined: bool = False
    """Whether the cursor is the feed's own."""
    generation: int = 0

    async def begin(self, cursor: Cursor | None) -> None:
        """Raises Refused(gone) when what lies behind the cursor isn't kept, Refused(unavailable) while a stream
        is made anew."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self.feed.looked.wait()
        except TimeoutError:
            raise unavailable("the event streams can't be reached right now; try again in a second") from None
        self.generation = self.feed.generation
        if cursor is None:
            self.number, self.joined = self.feed.next, True
            return
        self.positions = list(cursor.positions)
        for source in self.feed.sources:
            await self._check(source, cursor.histories[source.index])

    async def _check(self, source: Source, history: str) -> None:
        never_heard = history == NO_HISTORY  # its stream wasn't there yet: this client has read nothing of it
        if never_heard and source.absent:
            return
        if not source.known:
            raise unavailable(f"the events of {source.owner} are not there right now; try again in a second")
        if not never_heard and history != short(source.history):
            raise _gone(f"the history of {source.owner} was restored from a backup since")
        position = self.positions[source.index]
        if position >= source.kept_after:
            return
        try:
            info = await self.feed.client.jetstream(timeout=5).stream_info(stream_name(source.owner))
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError):
            raise unavailable(
                f"the events of {source.owner} are being made anew; try again in a second"
            ) from None
        if info.state.first_seq > position + 1:
            raise _gone(
                f"the oldest event of {source.owner} that is kept has position {info.state.first_seq}"
            )

    def lagging(self) -> Source | None:
        """An owner whose next fact isn't in the ring any more."""
        if self.joined:
            return None
        for source in self.feed.sources:
            if self.positions[source.index] < source.kept_after:
                return source
        return None

    async def old(self) -> AsyncIterator[Event]:
        """What this client missed and the ring doesn't hold, one owner after another. Raises Lost."""
        if self.joined:
            return
        while self.lagging() is not None:
            async for event in self._from_streams():
                yield event
        self._enter_ring()

    async def _from_streams(self) -> AsyncIterator[Event]:
        async with self.catch_ups:
            while (source := self.lagging()) is not None:
                try:
                    async for event in self._from_stream(source):
                        yield event
                except (Broken, nats.errors.Error, nats.js.errors.Error, TimeoutError):
                    await asyncio.sleep(RETRY_SECONDS)

    async def _from_stream(self, source: Source) -> AsyncIterator[Event]:
        index = source.index
        async with follow(self.feed.client, stream_name(source.owner), self.positions[index]) as tail:
            if tail.standing.history != source.history or tail.standing.first > self.positions[index] + 1:
                raise Lost
            async for heard in tail:
                self._check_generation()
                if not heard.body.startswith(source.prefix):
                    raise Lost
                if heard.position > self.positions[index] + 1:
                    raise Broken(f"position {self.positions[index] + 1} is missing")
                self.positions[index] = heard.position
                kind, about = names(heard.subject)
                if self.wants is None or self.wants(kind, about):
                    positions = tuple(self.positions)
                    yield Event(-1, index, heard.position, kind, about, heard.body, b"", positions, b"")
                if heard.position >= source.kept_after:
                    return

    def _enter_ring(self) -> None:
        """Find the first event of the ring that isn't wholly behind the cursor."""
        low, high = self.feed.first, self.feed.next
        while low < high:
            middle = (low + high) // 2
            event = self.feed.events[middle]
            if all(theirs <= ours for theirs, ours in zip(event.positions, self.positions, strict=True)):
                low = middle + 1
            else:
                high = middle
        self.number = low

    def take(self) -> list[Event]:
        """The events at hand. Raises Lost for a client that lags behind the ring."""
        self._check_generation()
        feed = self.feed
        if self.number == feed.next:
            return []
        if self.number < feed.first:
            raise Lost
        numbers = range(self.number, feed.next)
        self.number = feed.next
        if self.joined:
            events = [feed.events[n] for n in numbers]
            return events if self.wants is None else [e for e in events if self.wants(e.type, e.about)]
        return self._take_own(numbers)

    def _take_own(self, numbers: range) -> list[Event]:
        """Events with this client's own cursor, until it is the feed's."""
        found = []
        for number in numbers:
            event = self.feed.events[number]
            if event.position <= self.positions[event.index]:
                continue
            self.positions[event.index] = event.position
            if self.wants is None or self.wants(event.type, event.about):
                own = tuple(self.positions)
                found.append(
                    Event(-1, event.index, event.position, event.type, event.about, event.body, b"", own, b"")
                )
        for source in self.feed.sources:
            if self.positions[source.index] < source.kept_after:
                self.positions[source.index] = source.kept_after  # its stream was found only now
        self.joined = self.positions == self.feed.positions()
        return found

    def _check_generation(self) -> None:
        if self.generation != self.feed.generation:
            raise Lost

    def cursor(self) -> str:
        """Of this client as it stands now."""
        now = self.feed.cursor()
        return (now if self.joined else Cursor(now.histories, tuple(self.positions))).text()

    def cursor_of(self, event: Event) -> bytes:
        """Of this client once it has read the event."""
        return event.cursor or Cursor(self.feed.cursor().histories, event.positions).text().encode()


def _gone(why: str) -> Refused:
    return Refused(
        Kind.GONE,
        f"the events after this cursor are no longer kept: {why}. List again what you follow, then begin without "
        "a cursor",
    )
