"""A client with nats-py's methods, status, errors and statistics, whose server is in this process.

Subscriptions, messages, micro services and JetStream contexts are nats-py's own; only what touches a socket is ours.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import nats.errors
from nats.aio.client import Client, ServerVersion
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from sim.loop import PROCESS, Process
from sim.nats.server import HOP_SECONDS, Connection, Link, NatsServer

CONNECT_TIMEOUT_SECONDS = 2.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 2.0
PENDING_BYTES = 2 * 1024 * 1024


class _Numbers:
    """Tokens of nats-py's length that repeat themselves in every run."""

    def __init__(self, client: int) -> None:
        self._client, self._count = client, 0

    def next(self) -> bytearray:
        self._count += 1
        return bytearray(f"{self._client:06d}{self._count:016d}", "ascii")


class MemoryClient(Client):
    """`connect` waits for the server for ever, as Volery's own client does."""

    made = 0

    def __init__(self, server: NatsServer, link: Link) -> None:
        super().__init__()
        MemoryClient.made += 1
        self.server, self.link = server, link
        self.process: Process | None = PROCESS.get()
        self.user = ""
        self._nuid: Any = _Numbers(MemoryClient.made)
        self._prefix = "_INBOX"
        self._connection: Connection | None = None
        self._unsent: list[Callable[[Connection], None]] = []
        self._unsent_bytes = 0
        self._waiting: set[asyncio.Future[Any]] = set()

    # Its life

    async def connect(self, servers: Any = "", **options: Any) -> None:  # type: ignore[override]
        self.process = PROCESS.get()
        self._context = contextvars.copy_context()
        self.options |= options
        self.user = str(options.get("name") or "")
        self._prefix = str(options.get("inbox_prefix") or "_INBOX")
        self._inbox_prefix = bytearray(self._prefix, "ascii")
        self._max_pending_size = int(options.get("pending_size", PENDING_BYTES))
        self._error_cb = options.get("error_cb") or _ignore
        self._closed_cb = options.get("closed_cb")
        self._reconnected_cb = options.get("reconnected_cb")
        self._disconnected_cb = options.get("disconnected_cb")
        self._status = Client.CONNECTING
        await self._reach()
        self._status = Client.CONNECTED

    async def _reach(self) -> None:
        """A new connection, however long it takes."""
        failures = 0
        while True:
            if self.link.cut:
                await asyncio.sleep(CONNECT_TIMEOUT_SECONDS)
            else:
                await asyncio.sleep(2 * HOP_SECONDS + self.link.delay_seconds)
                if self.server.up and not self.link.cut:
                    self._connection = self.server.accept(self)
                    return
            most = min(FIRST_PAUSE_SECONDS * 2.0**failures, LONGEST_PAUSE_SECONDS)
            failures = min(failures + 1, 10)
            await asyncio.sleep(random.uniform(most / 2, most))

    def gives_up(self, connection: Connection) -> Callable[[], None]:
        """What the server calls when the client will notice that this connection is dead."""

        def noticed() -> None:
            if self._connection is connection and not self.is_closed:
                self._connection = None
                self._status = Client.RECONNECTING
                self.server.drop(connection, "Client Closed" if not connection.link.cut else "")
                self._reconnection_task = asyncio.get_running_loop().create_task(self._come_back())

        def tell() -> None:
            asyncio.get_running_loop().call_soon(noticed, context=self._context)

        return tell

    async def _come_back(self) -> None:
        if self._disconnected_cb is not None:
            await self._disconnected_cb()
        await asyncio.sleep(random.uniform(0, FIRST_PAUSE_SECONDS))
        await self._reach()
        connection = self._connection
        assert connection is not None
        self.stats["reconnects"] += 1
        for sid, sub in self._subs.items():
            self.server.subscribe(connection, sid, sub.subject, sub.queue)
        self._status = Client.CONNECTED
        unsent, self._unsent, self._unsent_bytes = self._unsent, [], 0
        for write in unsent:
            self._write(write)
        if self._reconnected_cb is not None:
            await self._reconnected_cb()

    async def close(self) -> None:
        if self.is_closed:
            return
        self._status = Client.CLOSED
        if self._reconnection_task is not None:
            self._reconnection_task.cancel()
        await asyncio.sleep(0)
        for sub in list(self._subs.values()):
            sub._stop_processing()
            for call in list((sub._pending_next_msgs_calls or {}).values()):
                call.cancel()
        self._subs.clear()
        if self._connection is not None:
            if not self._connection.link.cut:
                self.server.drop(self._connection, "Client Closed")
            self._connection = None
        if self._disconnected_cb is not None:
            await self._disconnected_cb()
        if self._closed_cb is not None:
            await self._closed_cb()

    async def drain(self) -> None:
        await self.flush()
        await self.close()

    @property
    def connected_server_version(self) -> ServerVersion:
        return ServerVersion("2.15.1")

    # Writing

    def _write(self, write: Callable[[Connection], None]) -> None:
        connection = self._connection
        assert connection is not None
        if connection.link.cut:
            connection.outbox.append(partial(write, connection))
        elif connection.alive:
            write(connection)

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._publish(subject, payload, reply, headers, None)

    def _publish(self, subject: str, payload: bytes, reply: str, headers: Any, patient: Any) -> None:
        if self._status == Client.CLOSED:
            raise nats.errors.ConnectionClosedError
        size = len(payload)
        connected = self._status == Client.CONNECTED
        if not connected and (
            self._max_pending_size <= 0 or size + self._unsent_bytes > self._max_pending_size
        ):
            raise nats.errors.OutboundBufferLimitError
        if size > self._max_payload:
            raise nats.errors.MaxPayloadError
        self.stats["out_msgs"] += 1
        data = bytes(payload)
        connection = self._connection
        if connected and connection is not None and connection.alive and not connection.link.cut:
            self.server.publish(connection, subject, reply, data, headers, patient)
            return

        def write(connection: Connection) -> None:
            self.server.publish(connection, subject, reply, data, headers, patient)

        if connected:
            self._write(write)
        else:
            self._unsent.append(write)
            self._unsent_bytes += size

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,
        old_style: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        inbox = f"{self._prefix}.{self._nuid.next().decode()}"
        future = asyncio.get_running_loop().create_future()
        self._publish(subject, payload, inbox, headers, future)
        try:
            message: Msg = await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise nats.errors.TimeoutError from None
        finally:
            self.server.requests.pop(inbox, None)
        if message.headers and message.headers.get("Status") == "503":
            raise nats.errors.NoRespondersError
        return message

    async def flush(self, timeout: float = 10) -> None:
        if timeout <= 0:
            raise nats.errors.BadTimeoutError
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        future = asyncio.get_running_loop().create_future()
        if self.is_connected:
            self._write(lambda connection: self.server.pong(connection, future))
        try:
            await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise nats.errors.FlushTimeoutError from None

    async def subscribe(
        self,
        subject: str,
        queue: str = "",
        cb: Callable[[Msg], Awaitable[None]] | None = None,
        future: asyncio.Future[Any] | None = None,
        max_msgs: int = 0,
        pending_msgs_limit: int = 512 * 1024,
        pending_bytes_limit: int = 128 * 1024 * 1024,
    ) -> Subscription:
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        self._sid += 1
        sid = self._sid
        sub = Subscription(
            self,
            sid,
            subject,
            queue=queue,
            cb=cb,
            future=future,
            max_msgs=max_msgs,
            pending_msgs_limit=pending_msgs_limit,
            pending_bytes_limit=pending_bytes_limit,
        )
        sub._start(self._error_cb)  # type: ignore[no-untyped-call]
        self._subs[sid] = sub
        if self.is_connected:
            self._write(lambda connection: self.server.subscribe(connection, sid, subject, queue))
        return sub

    async def _send_unsubscribe(self, sid: int, limit: int = 0) -> None:
        if self.is_connected:
            self._write(lambda connection: self.server.unsubscribe(connection, sid, limit))

    # Hearing

    def message(self, subject: str, reply: str, data: bytes, headers: Any) -> Msg:
        return Msg(self, subject, reply, data, headers)

    def take(self, sid: int, subject: str, reply: str, data: bytes, headers: Any) -> None:
        """A message that arrived."""
        sub = self._subs.get(sid)
        if sub is None:
            return
        sub._received += 1
        if sub._max_msgs > 0 and sub._received >= sub._max_msgs:
            self._subs.pop(sid, None)
        self.stats["in_msgs"] += 1
        message = Msg(self, subject, reply, data, headers)
        if sub._future is not None:
            if not sub._future.done():
                sub._future.set_result(message)
            return
        sub._pending_size += len(data)
        if not sub._pending_queue.full():
            sub._pending_queue.put_nowait(message)


async def _ignore(_: Exception) -> None:
    """Errors of callbacks, where nobody asked for them."""
