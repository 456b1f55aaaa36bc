"""Following a stream from a position: in order, without a gap, until something is wrong.

A push consumer without acknowledgements: positions are kept in PostgreSQL or by the client, never by NATS.
Heartbeats and the consumer's own sequence show every loss; the follower then starts again where it stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 3.5


class Broken(Exception):
    """The consumer lost a message, its stream, or its server: follow again from the last position."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One message of a stream."""

    position: int
    subject: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Standing:
    """A stream as it was when the follower began."""

    history: str
    first: int
    last: int


class _State(msgspec.Struct, frozen=True):
    last_seq: int


class _Info(msgspec.Struct, frozen=True):
    """What a follower of many streams needs of the server's word on one; nats-py reads all of it, 20 times as slowly."""

    state: _State = _State(0)
    error: dict[str, Any] | None = None


async def last_position(client: Client, stream: str, timeout_seconds: float = 5.0) -> int:
    """Where a stream stands. Raises NotFoundError when there is none, nats.errors.Error when nobody answers."""
    said = await client.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=timeout_seconds)
    info = msgspec.json.decode(said.data, type=_Info)
    if info.error is not None:
        raise nats.js.errors.APIError.from_error(info.error)
    return info.state.last_seq


@dataclass(slots=True)
class Tail:
    """An open follower. Iterate it; it raises Broken and never ends otherwise."""

    client: Client
    queue: asyncio.Queue[Msg]
    standing: Standing
    expected: int = 1

    def __aiter__(self) -> AsyncIterator[Heard]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[Heard]:
        while True:
            try:
                message = self.queue.get_nowait()
            except asyncio.QueueEmpty:
                try:
                    async with asyncio.timeout(SILENCE_SECONDS):
                        message = await self.queue.get()
                except TimeoutError:
                    raise Broken("no heartbeat from the consumer") from None
            if message.headers and "Status" in message.headers:
                await self._status(message)
                continue
            yield self._take(message)

    async def _status(self, message: Msg) -> None:
        headers = message.headers or {}
        if headers["Status"] != "100":
            raise Broken(f"the consumer ended: {headers.get('Description', headers['Status'])}")
        if message.reply:
            await self.client.publish(message.reply)
        elif stalled := headers.get("Nats-Consumer-Stalled"):
            await self.client.publish(stalled)

    def _take(self, message: Msg) -> Heard:
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>
        tokens = message.reply.split(".")
        position, delivered = int(tokens[-4]), int(tokens[-3])
        if delivered != self.expected:
            raise Broken(f"message {self.expected} of the consumer was lost")
        self.expected += 1
        return Heard(position, message.subject, message.data)

    async def at_hand(self, most: int) -> list[Heard]:
        """The next messages, as far as they are here already."""
        found: list[Heard] = []
        while len(found) < most and not self.queue.empty():
            message = self.queue.get_nowait()
            if message.headers and "Status" in message.headers:
                await self._status(message)
            else:
                found.append(self._take(message))
        return found

    def waiting(self) -> bool:
        """Whether more messages are at hand already."""
        return not self.queue.empty()


@asynccontextmanager
async def follow(
    client: Client, stream: str, after: int, subjects: Sequence[str] = ()
) -> AsyncIterator[Tail]:
    """Follow a stream behind position `after` (0: from its oldest message).

    Raises nats.js.errors.NotFoundError when there is no such stream.
    """
    js = client.jetstream(timeout=5)
    info = await js.stream_info(stream)
    metadata = info.config.metadata or {}
    standing = Standing(metadata.get("history", ""), info.state.first_seq, info.state.last_seq)
    inbox = client.new_inbox()
    queue: asyncio.Queue[Msg] = asyncio.Queue()
    subscription = await client.subscribe(inbox, cb=queue.put, pending_msgs_limit=-1, pending_bytes_limit=-1)
    name = ""
    try:
        created = await js.add_consumer(
            stream,
            ConsumerConfig(
                deliver_subject=inbox,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE if after else DeliverPolicy.ALL,
                opt_start_seq=after + 1 if after else None,
                filter_subjects=list(subjects) or None,
                ack_policy=AckPolicy.NONE,
                flow_control=True,
                idle_heartbeat=HEARTBEAT_SECONDS,
                inactive_threshold=30,
                num_replicas=1,
                mem_storage=True,
            ),
        )
        name = created.name
        yield Tail(client, queue, standing)
    finally:
        await _discard(client, stream, name, subscription)


async def _discard(client: Client, stream: str, consumer: str, subscription: object) -> None:
    """Best effort: the server forgets an inactive consumer by itself."""
    if client.is_closed or not client.is_connected:
        return
    await subscription.unsubscribe()  # type: ignore[attr-defined]
    if consumer:
        try:
            await client.jetstream(timeout=1).delete_consumer(stream, consumer)
        except (nats.js.errors.Error, TimeoutError):
            return
