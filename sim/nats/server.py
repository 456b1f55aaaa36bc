"""The server: routes messages over links that can be cut or slow, and says who came and went.

A message is routed at the instant it is published and arrives a moment later, in order per connection. Over a cut
link nothing passes; what was written meanwhile arrives if the link is mended before either side gives up.
"""

from __future__ import annotations

import asyncio
import base64
import contextvars
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from sim.loop import Process
from sim.nats.streams import API, JetStream
from sim.nats.subjects import Interest, Interests

if TYPE_CHECKING:
    from sim.nats.client import MemoryClient

HOP_SECONDS = 0.0004
STALE_SECONDS = 2.5
"""Two pings a second apart without an answer, and a bit."""
CLIENT_STALE_SECONDS = 5.0
DISK_SECONDS = 0.001
"""`sync_interval: always`."""
TICK_SECONDS = 2.5
"""Between heartbeats of quiet consumers: less than a follower's patience."""
NO_RESPONDERS = {"Status": "503"}

_EMPTY = contextvars.Context()


@dataclass(slots=True, eq=False)
class Link:
    """A machine's way to the server."""

    name: str = ""
    cut: bool = False
    delay_seconds: float = 0.0
    orphans: list[Connection] = field(default_factory=list)
    """Connections that the server closed while the link was cut: their clients learn it when it is mended."""


@dataclass(slots=True, eq=False)
class Connection:
    """One client's, as the server has it."""

    client: MemoryClient
    link: Link
    number: int
    process: Process | None
    alive: bool = True
    silent: bool = False
    """Its process is stopped: it answers no ping."""
    next_in: float = 0.0
    """Nothing arrives at the client before this time."""
    outbox: list[Callable[[], None]] = field(default_factory=list)
    """Written by the client over a cut link."""
    inbox: list[Callable[[], None]] = field(default_factory=list)
    interests: dict[int, Interest] = field(default_factory=dict)
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    patience: asyncio.TimerHandle | None = None
    """When its client gives it up."""


class NatsServer:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.up = True
        self.interests = Interests()
        self.connections: dict[int, Connection] = {}
        self.requests: dict[str, tuple[Connection, asyncio.Future[Any]]] = {}
        """Reply subject → who waits for one answer."""
        self.jetstream = JetStream(self._push, loop.time)
        self.overhears: list[Callable[[str, bytes, Any], None]] = []
        """Called with subject, body and headers of each message that a client publishes."""
        self.withholds: list[Callable[[str, bytes, Any], bool]] = []
        """Likewise; a message that one of them wants for itself reaches nobody."""
        self.accepted = 0
        self.messages = 0
        self._tick()

    # Connections

    def accept(self, client: MemoryClient) -> Connection:
        self.accepted += 1
        connection = Connection(client, client.link, self.accepted, client.process)
        self.connections[connection.number] = connection
        self._say("CONNECT", connection, "")
        return connection

    def drop(self, connection: Connection, reason: str) -> None:
        """The server closes a connection, or sees that it was closed. "": it says nothing about it."""
        if not connection.alive:
            return
        connection.alive = False
        for timer in connection.timers:
            timer.cancel()
        del self.connections[connection.number]
        self.interests.remove(list(connection.interests.values()))
        connection.interests.clear()
        if connection.link.cut:
            connection.link.orphans.append(connection)
        if reason:
            self._say("DISCONNECT", connection, reason)

    def process_gone(self, process: Process, *, power: bool = False) -> None:
        """A process was killed; with `power` its machine can't even close the connection."""
        for connection in self._of(lambda c: c.process is process):
            if power or connection.link.cut:
                self._later(connection, STALE_SECONDS, partial(self.drop, connection, "Stale Connection"))
            else:
                self.drop(connection, "Client Closed")

    def process_stopped(self, process: Process) -> None:
        for connection in self._of(lambda c: c.process is process):
            connection.silent = True
            self._later(connection, STALE_SECONDS, partial(self._stale, connection))

    def process_continued(self, process: Process) -> None:
        for connection in self._of(lambda c: c.process is process):
            connection.silent = False
            if not connection.link.cut:
                self._calm(connection)

    def cut(self, link: Link) -> None:
        link.cut = True
        for connection in self._of(lambda c: c.link is link):
            self._later(connection, STALE_SECONDS, partial(self._stale, connection))
            gives_up = connection.client.gives_up(connection)
            connection.patience = self.loop.call_later(CLIENT_STALE_SECONDS, gives_up, context=_EMPTY)

    def mend(self, link: Link) -> None:
        link.cut = False
        orphans, link.orphans = link.orphans, []
        for orphan in orphans:
            if orphan.patience is not None:
                orphan.patience.cancel()
            orphan.client.gives_up(orphan)()
        for connection in self._of(lambda c: c.link is link):
            if connection.patience is not None:
                connection.patience.cancel()
            if not connection.silent:
                self._calm(connection)
            outbox, connection.outbox = connection.outbox, []
            inbox, connection.inbox = connection.inbox, []
            for write in outbox:
                write()
            for arrive in inbox:
                self._arrives(connection, arrive)

    def stop(self) -> None:
        self.up = False
        for connection in self._of(lambda c: True):
            self.drop(connection, "")
            if not connection.link.cut:
                connection.client.gives_up(connection)()
        self.requests.clear()

    def start(self) -> None:
        self.up = True

    def _stale(self, connection: Connection) -> None:
        self.drop(connection, "Stale Connection")
        if not connection.link.cut:
            connection.client.gives_up(connection)()

    def _of(self, which: Callable[[Connection], bool]) -> list[Connection]:
        return [connection for connection in self.connections.values() if which(connection)]

    def _later(self, connection: Connection, seconds: float, act: Callable[[], None]) -> None:
        connection.timers.append(self.loop.call_later(seconds, act, context=_EMPTY))

    def _calm(self, connection: Connection) -> None:
        for timer in connection.timers:
            timer.cancel()
        connection.timers.clear()

    def _say(self, what: str, connection: Connection, reason: str) -> None:
        """The system account's event."""
        name = connection.client.user
        claims = base64.urlsafe_b64encode(json.dumps({"name": name}).encode()).rstrip(b"=").decode()
        event = {"client": {"jwt": f"e30.{claims}.", "user": f"U{name}"}, "reason": reason}
        self._route(f"$SYS.ACCOUNT.VOLERY.{what}", "", json.dumps(event).encode(), None)

    # What clients write

    def subscribe(self, connection: Connection, sid: int, subject: str, queue: str) -> None:
        interest = Interest(connection, sid, subject, queue)
        connection.interests[sid] = interest
        self.interests.add(interest)

    def unsubscribe(self, connection: Connection, sid: int, limit: int) -> None:
        interest = connection.interests.get(sid)
        if interest is None:
            return
        if limit:
            interest.left = limit
            return
        del connection.interests[sid]
        self.interests.remove([interest])

    def publish(
        self, connection: Connection, subject: str, reply: str, data: bytes, headers: Any, patient: Any = None
    ) -> None:
        """`patient` is the future of a request: its answer goes nowhere else."""
        for hear in tuple(self.overhears):
            hear(subject, data, headers)
        if patient is not None:
            self.requests[reply] = (connection, patient)
        if self.withholds and any(withhold(subject, data, headers) for withhold in self.withholds):
            return
        if subject.startswith(API):
            answer = msgspec.json.encode(self.jetstream.answer(subject, data))
            self._reply(reply, answer, None, DISK_SECONDS)
            return
        if subject in self.requests:
            self._reply(subject, data, headers)
            return
        interested = self._route(subject, reply, data, headers)
        stream = self.jetstream.find(subject)
        if stream is not None:
            stored = self.jetstream.store(stream, subject, data, headers)
            if reply:
                self._reply(reply, msgspec.json.encode(stored), None, DISK_SECONDS)
        elif not interested and reply:
            self._reply(reply, b"", NO_RESPONDERS)

    def pong(self, connection: Connection, future: asyncio.Future[Any]) -> None:
        def arrive() -> None:
            if not future.done():
                future.set_result(None)

        self._send(connection, arrive)

    # What clients hear

    def _reply(
        self, reply: str, data: bytes, headers: Mapping[str, str] | None, more_seconds: float = 0.0
    ) -> None:
        waiting = self.requests.pop(reply, None)
        if waiting is None:
            if more_seconds:
                self.loop.call_later(more_seconds, self._route, reply, "", data, headers, context=_EMPTY)
            else:
                self._route(reply, "", data, headers)
            return
        connection, future = waiting
        client = connection.client

        def arrive() -> None:
            if not future.done():
                future.set_result(client.message(reply, "", data, headers))

        self._send(connection, arrive, more_seconds)

    def _route(self, subject: str, reply: str, data: bytes, headers: Mapping[str, str] | None) -> bool:
        """Whether anybody is interested."""
        found = self.interests.find(subject)
        if not found.everybody:
            return False
        self.messages += 1
        for interest in found.each:
            self._to(interest, subject, reply, data, headers)
        for members in found.groups:
            chosen = members[0] if len(members) == 1 else members[random.randrange(len(members))]
            self._to(chosen, subject, reply, data, headers)
        return True

    def _to(
        self, interest: Interest, subject: str, reply: str, data: bytes, headers: Mapping[str, str] | None
    ) -> None:
        connection = interest.connection
        if interest.left:
            interest.left -= 1
            if not interest.left:
                self.unsubscribe(connection, interest.sid, 0)
        self._send(connection, partial(connection.client.take, interest.sid, subject, reply, data, headers))

    def _push(
        self, deliver: str, subject: str, reply: str, data: bytes, headers: Mapping[str, str] | None
    ) -> bool:
        found = self.interests.find(deliver).everybody
        for interest in found:
            self._to(interest, subject, reply, data, headers)
        return bool(found)

    def _send(self, connection: Connection, arrive: Callable[[], Any], more_seconds: float = 0.0) -> None:
        if connection.link.cut:
            connection.inbox.append(arrive)
            return
        at = self.loop.time() + HOP_SECONDS + more_seconds + connection.link.delay_seconds
        if at < connection.next_in:
            at = connection.next_in
        connection.next_in = at
        self.loop.call_at(at, self._arrives, connection, arrive, context=_EMPTY)

    def _arrives(self, connection: Connection, arrive: Callable[[], Any]) -> None:
        if not connection.alive:
            return
        if connection.link.cut:
            connection.inbox.append(arrive)
        else:
            arrive()

    def _tick(self) -> None:
        if self.up:
            self.jetstream.beat()
        self.loop.call_later(TICK_SECONDS, self._tick, context=_EMPTY)
