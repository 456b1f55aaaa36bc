"""Publishes the journal's facts in the order of their numbers, and again until their owner has committed them.

JetStream's acknowledgement only says that the fact need not be sent again after a reconnect; it may still be lost
(§2 of the protocols). What is older than 5 s and not covered by the owner's word is published again: from the first
such fact on, a window at a time, as fast as the owner's words advance. While the owner says nothing the pauses
grow, since it may be down for a day and the stream keeps what it has; any word of it makes them short again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from host_agent.facts import Reservation, Spooled
from host_agent.journal import Journal
from volery.contracts.agent import CommittedWord
from volery.runtime.clock import monotonic

log = logging.getLogger(__name__)

AGAIN_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 600.0
WINDOW = 1000
"""Facts published again before the owner's word must have advanced."""
READ_AT_ONCE = 200


@dataclass(slots=True)
class _Channel:
    """One owner's facts on their way out."""

    owner: str
    head: int = 0
    committed: int = 0
    sent: int = 0
    """Published on this connection, up to here."""
    acknowledged: int = 0
    held: int = 0
    """A report is being put together under this number: nothing from here on is published. 0: none."""
    again_from: int = 0
    again_to: int = 0
    """What is between these two is published once more."""
    outstanding: int = 0
    """Published once more since the owner's word last advanced."""
    progress_at: float = 0.0
    pause: float = AGAIN_SECONDS
    complained_at: float = -60.0
    fresh: deque[Spooled] = field(default_factory=lambda: deque(maxlen=READ_AT_ONCE))
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the owner's word advanced."""

    def rewind(self, seq: int) -> None:
        """Everything above `seq` counts as not sent."""
        self.sent = min(self.sent, seq)
        self.fresh.clear()
        self.wake.set()


class Spool:
    """`open` it once before anything is said; `run` it for as long as the agent lives."""

    def __init__(self, journal: Journal, client: Client, again_seconds: float = AGAIN_SECONDS) -> None:
        self._journal = journal
        self._client = client
        self._again_seconds = again_seconds
        self.window = WINDOW
        self._channels: dict[str, _Channel] = {}
        self._started = asyncio.Event()
        self._acks = ""
        self._pumps: asyncio.TaskGroup | None = None

    async def open(self) -> None:
        """Takes up what a former run left."""
        self._journal.on_spooled(self._take)
        for owner, at in (await self._journal.positions()).items():
            channel = self._channel(owner)
            channel.head = max(channel.head, at.head)
            channel.committed = channel.sent = at.committed
            channel.wake.set()

    async def run(self) -> None:
        """Publishes until cancelled."""
        inbox = self._client.new_inbox()
        self._acks = f"{inbox}.{{}}.{{}}"
        await self._client.subscribe(f"{inbox}.*.*", cb=self._acknowledged)
        async with asyncio.TaskGroup() as pumps:
            self._pumps = pumps
            for channel in self._channels.values():
                pumps.create_task(self._pump(channel), name=f"spool {channel.owner}")
            while True:
                await asyncio.sleep(self._again_seconds / 5)
                for channel in self._channels.values():
                    self._look_back(channel)

    def reconnected(self) -> None:
        """What the server had not acknowledged when the connection broke goes out again."""
        for channel in self._channels.values():
            channel.rewind(max(channel.committed, channel.acknowledged))

    async def committed(self, word: CommittedWord) -> bool:
        """The owner's word. False: it knows more than this journal ever said, so the journal is an old copy."""
        if word.generation != self._journal.generation:
            return True
        if not await self._journal.trim(word):
            return False
        channel = self._channel(word.owner)
        channel.pause = self._again_seconds
        if word.seq > channel.committed:
            channel.committed = word.seq
            channel.sent = max(channel.sent, word.seq)
            channel.again_from = max(channel.again_from, word.seq)
            channel.progress_at = monotonic()
            channel.outstanding = 0
            channel.wake.set()
            channel.heard.set()
        return True

    async def wait_committed(self, owner: str, seconds: float) -> bool:
        """Whether the owner has committed all that was said to it, or did within so many seconds."""
        channel = self._channel(owner)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while channel.committed < channel.head:
                    channel.heard.clear()
                    await channel.heard.wait()
        return channel.committed >= channel.head

    @contextlib.asynccontextmanager
    async def report(self, owner: str, rebase: bool) -> AsyncIterator[Reservation]:
        """Keeps a number for a report of the owner; what is spooled inside follows the report.

        Put the report with `journal.put_report` inside; leaving without one gives the number up.
        One at a time per owner.
        """
        reservation = await self._journal.begin_report(owner, rebase)
        channel = self._channel(owner)
        try:
            yield reservation
        finally:
            channel.held = 0
            channel.rewind(reservation.seq - 1)

    @property
    def unsent(self) -> int:
        """Numbers given to facts that are not published yet."""
        return sum(channel.head - channel.sent for channel in self._channels.values())

    def _channel(self, owner: str) -> _Channel:
        channel = self._channels.get(owner)
        if channel is None:
            channel = self._channels[owner] = _Channel(owner, pause=self._again_seconds)
            channel.progress_at = monotonic()
            if self._pumps is not None:
                self._pumps.create_task(self._pump(channel), name=f"spool {owner}")
        return channel

    def _take(self, spooled: list[Spooled | Reservation]) -> None:
        """Called as soon as they are on the disk, so that nothing numbered after a report slips out before it."""
        for fact in spooled:
            channel = self._channel(fact.owner)
            channel.head = max(channel.head, fact.seq)
            if isinstance(fact, Reservation):
                channel.held = fact.seq
                channel.rewind(fact.seq - 1)
            elif not channel.held:
                channel.fresh.append(fact)
            channel.wake.set()

    def _look_back(self, channel: _Channel) -> None:
        """Goes back to the first uncommitted fact when the owner's word has not come for too long."""
        now = monotonic()
        if channel.sent < channel.head and self._client.is_connected:
            channel.wake.set()
        if channel.committed >= channel.sent:
            channel.progress_at = now
        elif now - channel.progress_at >= channel.pause:
            channel.progress_at = now
            channel.pause = min(channel.pause * 2, LONGEST_PAUSE_SECONDS)
            channel.again_from, channel.again_to = channel.committed, channel.sent
            channel.outstanding = 0
            channel.wake.set()

    async def _pump(self, channel: _Channel) -> None:
        while True:
            await channel.wake.wait()
            channel.wake.clear()
            await self._send_again(channel)
            await self._send_new(channel)

    async def _send_again(self, channel: _Channel) -> None:
        while channel.again_from < channel.again_to and (room := self.window - channel.outstanding) > 0:
            facts = await self._read(channel, channel.again_from, min(room, READ_AT_ONCE))
            facts = [fact for fact in facts if fact.seq <= channel.again_to]
            if not facts:
                channel.again_from = channel.again_to
            for fact in facts:
                if not await self._publish(fact):
                    return
                channel.again_from = max(channel.again_from, fact.seq)
                channel.outstanding += 1

    async def _send_new(self, channel: _Channel) -> None:
        while (
            channel.sent < (limit := channel.held - 1 if channel.held else channel.head)
            and self._client.is_connected
        ):
            facts = self._next_fresh(channel) or await self._read(channel, channel.sent, READ_AT_ONCE)
            if not facts:
                channel.sent = max(channel.sent, limit)
            for fact in facts:
                if fact.seq <= channel.sent:
                    continue
                if channel.held and fact.seq >= channel.held:
                    return
                before, channel.sent = channel.sent, fact.seq
                if not await self._publish(fact):
                    channel.sent = min(before, channel.sent)
                    channel.fresh.clear()
                    return

    def _next_fresh(self, channel: _Channel) -> list[Spooled]:
        """The facts just spooled, if they follow what was sent: then the disk need not be read."""
        while channel.fresh and channel.fresh[0].seq <= channel.sent:
            channel.fresh.popleft()
        if channel.fresh and channel.fresh[0].seq == channel.sent + 1:
            return [channel.fresh.popleft()]
        return []

    async def _read(self, channel: _Channel, above: int, limit: int) -> list[Spooled]:
        found = await self._journal.pending(channel.owner, above, limit)
        # Meanwhile a report may have begun: what is numbered after it waits for it.
        return [fact for fact in found if not channel.held or fact.seq < channel.held]

    async def _publish(self, fact: Spooled) -> bool:
        """Hands the fact to the connection. False: it has gone, and the channel is woken later."""
        if not self._client.is_connected:
            return False
        try:
            await self._client.publish(fact.subject, fact.body, reply=self._acks.format(fact.owner, fact.seq))
        except nats.errors.MaxPayloadError:
            log.error(
                "fact %s of %d bytes is larger than the bus carries: it is dropped",
                fact.subject,
                len(fact.body),
            )
            await self._journal.drop(fact.owner, fact.seq)
        except (nats.errors.Error, OSError) as error:
            log.debug("fact %s waits for the bus: %s", fact.subject, error or type(error).__name__)
            return False
        return True

    async def _acknowledged(self, message: Msg) -> None:
        owner, seq = message.subject.rsplit(".", 2)[1:]
        channel = self._channels[owner]
        if problem := _refusal(message):
            now = monotonic()
            if now - channel.complained_at > 30.0:
                channel.complained_at = now
                log.warning(
                    "the bus did not take a fact for %s (%s); it is kept and sent again", owner, problem
                )
        else:
            channel.acknowledged = max(channel.acknowledged, int(seq))


def _refusal(message: Msg) -> str:
    """Why JetStream did not store it, or ""."""
    if message.headers and (status := message.headers.get("Status")):
        return "no stream listens" if status == "503" else f"status {status}"
    try:
        error = json.loads(message.data).get("error")
    except (ValueError, AttributeError):
        return "an answer that can't be read"
    return "" if error is None else str(error.get("description", error))
