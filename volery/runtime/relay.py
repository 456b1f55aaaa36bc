"""The log of an owner and its stream: every fact gets its gapless position, then goes to the bus.

PostgreSQL is the truth. The stream's sequence is the log's position, so each publish expects its predecessor:
that fences an older relay, replays nothing twice, and heals a stream that lost its tail. A stream ahead of the
log means that PostgreSQL was restored from a backup: the history id changes and the stream is made anew. No stream at
all says nothing: NATS lost its store, or the whole control plane was made anew from a backup.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import asyncpg
import nats.errors
import nats.js.errors
from nats.js.api import PubAck, StorageType, StreamConfig, StreamInfo
from nats.js.client import JetStreamContext

from volery.contracts.base import Owner
from volery.contracts.ids import random_token
from volery.runtime import telemetry
from volery.runtime.bus import Bus
from volery.runtime.tail import last_position

log = logging.getLogger(__name__)

RETENTION_SECONDS = 7 * 86400
RETENTION_BYTES = 2 * 1024**3
BATCH = 1000
PENDING = 4 * BATCH
"""Publishes without an answer that the client allows; each batch waits for its own."""
ANSWER_SECONDS = 10.0
"""The server's word on a publish takes at most so long, or it got lost."""
EXPECTED_LAST_SEQUENCE = "Nats-Expected-Last-Sequence"

_MOVE = """
    with moved as (
        delete from outbox where id in (select id from outbox order by id limit $1)
        returning id, subject, body
    ), head as (
        update log_head set position = position + (select count(*) from moved)
        where exists (select from moved)
        returning history, position - (select count(*) from moved) as before
    ), numbered as (
        select h.before + row_number() over (order by m.id) as position, m.subject, m.body, h.history
        from moved m, head h
    )
    insert into log (position, subject, body)
    select position, subject,
           convert_to('{"specversion":"1.0","id":"' || history || '.' || $2 || '.' || position
                      || '","sequence":"' || position || '"', 'UTF8') || body
    from numbered order by position
    returning position, subject, body
"""


def stream_name(owner: str) -> str:
    return f"FACTS_{owner.upper()}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One fact with its place in the owner's history."""

    position: int
    subject: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Head:
    history: str
    position: int
    oldest: int
    """The first position still in the log; position + 1 when it is empty."""


@dataclass(slots=True)
class Log:
    """The owner's log in PostgreSQL. `connection` is the relay's own, whose session lock makes it the only one."""

    owner: str
    connection: asyncpg.Connection[asyncpg.Record]

    async def move(self) -> list[Entry]:
        """Give the waiting facts their positions, durably; the oldest first, at most a batch."""
        records = await self.connection.fetch(_MOVE, BATCH, self.owner)
        return [Entry(r["position"], r["subject"], r["body"]) for r in records]

    async def head(self) -> Head:
        record = await self.connection.fetchrow(
            """select history, position, (select min(position) from log) as oldest from log_head"""
        )
        assert record is not None
        oldest = record["oldest"] or record["position"] + 1
        return Head(record["history"], record["position"], oldest)

    async def after(self, position: int, limit: int = BATCH) -> list[Entry]:
        records = await self.connection.fetch(
            "select position, subject, body from log where position > $1 order by position limit $2",
            position,
            limit,
        )
        return [Entry(r["position"], r["subject"], r["body"]) for r in records]

    async def rewrite_history(self, position: int) -> str:
        """The past was restored: a new history id, positions go on after what the stream had."""
        history = random_token(6)
        await self.connection.execute(
            """with gone as (delete from log)
               update log_head set history = $1, position = greatest(position, $2)""",
            history,
            position,
        )
        return history

    async def trim(self) -> int:
        """Forget what is older or larger than the retention. Returns the oldest position kept."""
        oldest = await self.connection.fetchval(
            """with sized as (
                   select position, at, sum(length(body)) over (order by position desc) as bytes from log
               ), gone as (
                   delete from log where position <= (
                       select coalesce(max(position), 0) from sized
                       where bytes > $1 or at < now() - make_interval(secs => $2))
                   returning position)
               select coalesce((select min(position) from log l where not exists
                                (select 1 from gone g where g.position = l.position)), 0)""",
            RETENTION_BYTES,
            RETENTION_SECONDS,
        )
        return int(oldest)


def _history_of(info: StreamInfo) -> str:
    """ "" where the stream doesn't say."""
    return (info.config.metadata or {}).get("history", "")


@dataclass(slots=True)
class Relay:
    """Moves facts from outbox to log to stream, as long as its caller holds the service's leadership."""

    bus: Bus
    facts: Log
    replicas: int
    wake: asyncio.Event
    on_restored: Callable[[str, int], Awaitable[None]]
    """Awaited, before anything is rewritten, when the stream proves that PostgreSQL is older than the bus."""
    answer_seconds: float = ANSWER_SECONDS
    on_lost: Callable[[], Awaitable[None]] | None = None
    """Awaited, before it is made anew, when there is no stream though the log isn't empty: a new leader can't know then
    whether its database is older than the bus was."""
    js: JetStreamContext = field(init=False)
    history: str = ""
    published: int = 0
    aligned: asyncio.Event = field(default_factory=asyncio.Event)
    """The log was compared with the stream: a database older than the bus has been noticed."""

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.js = self.bus.client.jetstream(timeout=5, publish_async_max_pending=PENDING)

    async def run(self) -> None:
        """Until cancelled. Every trouble with the bus ends in reading again where the stream stands."""
        while True:
            try:
                await self._align()
                self.aligned.set()
                while True:
                    await self._publish_waiting()
                    await self._wait()
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.info(
                    "relay of %s reads its stream again: %s", self.facts.owner, error or type(error).__name__
                )
                await asyncio.sleep(0.2)

    async def _wait(self) -> None:
        """Until something was committed here, or a second: another replica's hint may have been lost."""
        try:
            # Not wait_for: Python 3.11's loses a cancellation that comes together with the event.
            async with asyncio.timeout(1.0):
                await self.wake.wait()
        except TimeoutError:
            last = await last_position(self.bus.client, stream_name(self.facts.owner))
            if last != self.published:
                raise nats.js.errors.Error(f"stream stands at {last}, not {self.published}") from None
        self.wake.clear()

    async def _align(self) -> None:
        head = await self.facts.head()
        info = await self._stream(head)
        # Before histories are compared: a backup from before an earlier restore has another one than the stream.
        if info.state.last_seq > head.position:
            reason = (
                f"the stream of {self.facts.owner} is at {info.state.last_seq} and the log at {head.position}, so "
                "PostgreSQL was restored from an older state"
            )
            await self.on_restored(reason, info.state.last_seq)
            await self.facts.rewrite_history(info.state.last_seq)
            await self._remake(await self.facts.head())
        elif info.state.last_seq + 1 < head.oldest or _history_of(info) not in ("", head.history):
            await self._remake(head)
        else:
            self.history, self.published = head.history, info.state.last_seq
        await self._catch_up()

    async def _stream(self, head: Head) -> StreamInfo:
        try:
            return await self.js.stream_info(stream_name(self.facts.owner))
        except nats.js.errors.NotFoundError:
            if head.position and self.on_lost is not None and not self.aligned.is_set():
                await self.on_lost()
            return await self.js.add_stream(self._config(head))

    def _config(self, head: Head) -> StreamConfig:
        return StreamConfig(
            name=stream_name(self.facts.owner),
            subjects=[f"fact.{self.facts.owner}.>"],
            storage=StorageType.FILE,
            num_replicas=self.replicas,
            first_seq=head.oldest,
            allow_direct=True,
            duplicate_window=1,
            metadata={"history": head.history},
        )

    async def _remake(self, head: Head) -> None:
        """Delete the stream and publish the whole retained log again."""
        await self.js.delete_stream(stream_name(self.facts.owner))
        info = await self.js.add_stream(self._config(head))
        self.history = head.history
        self.published = max(info.state.last_seq, head.oldest - 1)

    async def _catch_up(self) -> None:
        while entries := await self.facts.after(self.published):
            await self._publish(entries)

    async def _publish_waiting(self) -> None:
        while entries := await self.facts.move():
            await self._publish(entries)

    async def _publish(self, entries: list[Entry]) -> None:
        """Pipelined; each message names its predecessor, so only the whole sequence can land."""
        if self.js.publish_async_pending() > PENDING - len(entries):
            self._begin()  # publishes that raised keep their permits, too, and only a new context has them again
        acks: list[asyncio.Future[PubAck]] = []
        try:
            for entry in entries:
                headers = {EXPECTED_LAST_SEQUENCE: str(entry.position - 1)}
                acks.append(await self.js.publish_async(entry.subject, entry.body, headers=headers))
            for entry, ack in zip(entries, acks, strict=True):
                async with asyncio.timeout(self.answer_seconds):
                    stored = await ack
                if stored.seq != entry.position:
                    raise nats.js.errors.Error(f"position {entry.position} became sequence {stored.seq}")
        finally:
            # nats-py keeps a permit for each publish without an answer: an answer that got lost would keep it for ever.
            for ack in acks:
                ack.cancel()
        self.published = entries[-1].position
        telemetry.facts_relayed.add(len(entries), {"owner": self.facts.owner})

    async def trim(self) -> None:
        """Let stream and log forget what is beyond the retention."""
        oldest = await self.facts.trim()
        if oldest > 1:
            await self.js.purge_stream(stream_name(self.facts.owner), seq=oldest)


async def rebuild_stream(bus: Bus, owner: Owner) -> None:
    """Delete an owner's stream; its relay notices and publishes the whole retained log again."""
    try:
        await bus.client.jetstream().delete_stream(stream_name(owner))
    except nats.js.errors.NotFoundError:
        return
