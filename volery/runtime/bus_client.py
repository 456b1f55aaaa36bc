"""nats-py's client, made to last: TLS before the first word, and no error ends it for ever.

nats-py 2.16 upgrades to TLS only when the server's greeting asks for it, waits for ever for a socket to close whose
handshake failed, closes the client on most errors that a server speaks, and stops reconnecting at an exception that it
doesn't expect (uvloop says RuntimeError for a closed transport). Each is put right here, in the methods that do it;
`tests/runtime/test_bus_client.py` fails when a newer nats-py calls them otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from urllib.parse import ParseResult

from nats.aio.client import Client, Srv
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.errors import AuthorizationError, ConnectionDrainingError
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeout

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS: Final = 5.0
"""As long as the server waits for it: on a busy machine a handshake may take more than a round trip."""
SHUTDOWN_SECONDS: Final = 1.0
"""For the other side to take what is left and to say goodbye; one that is cut off never does."""
STUMBLE_SECONDS: Final = 1.0
REFUSED_FIRST_SECONDS: Final = 0.5
REFUSED_MOST_SECONDS: Final = 30.0
ADVICE: Final = "look at its credentials: they are made when the installation is set up"


class BusTransport(TcpTransport):
    """A TCP connection that, given a context, begins with TLS: nothing is read or written before."""

    def __init__(self, context: ssl.SSLContext | None, name: str | None) -> None:
        """`name` is what the certificate must have been issued for."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._context, self._name = context, name

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        """Raises OSError (ssl.SSLError is one) or TimeoutError, and leaves nothing open then."""
        tls: dict[str, Any] = {}
        if self._context is not None:
            tls = {
                "ssl": self._context,
                "server_hostname": self._name,
                "ssl_handshake_timeout": HANDSHAKE_SECONDS,
                "ssl_shutdown_timeout": SHUTDOWN_SECONDS,
            }
        reached = await _reach(uri.hostname or "", uri.port or 4222, connect_timeout)
        try:
            self._io_reader, self._io_writer = await asyncio.open_connection(
                sock=reached, limit=buffer_size, **tls
            )
        except BaseException:
            reached.close()
            raise
        self._bare_io_reader, self._bare_io_writer = self._io_reader, self._io_writer

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """Where nats-py would begin with TLS; here it has begun before, or never will."""
        if self._context is None:
            raise NatsError(
                "the server wants TLS, but this program was given no certificate authority to know it by"
            )

    # Python 3.11.2, as in Debian 12, has let go of TLS when it was closed: what is tried then raises AttributeError.
    # (The ignored types are nats-py's, whose transports have none.)

    def write(self, payload: bytes) -> None:
        try:
            super().write(payload)  # type: ignore[no-untyped-call]
        except AttributeError as error:
            raise ConnectionResetError("the connection is closed") from error

    def writelines(self, payload: Iterable[bytes]) -> None:
        try:
            super().writelines(payload)  # type: ignore[no-untyped-call]
        except AttributeError as error:
            raise ConnectionResetError("the connection is closed") from error

    def abort(self) -> None:
        """Closes the connection at once, whatever is in it."""
        if self._io_writer is not None:
            with contextlib.suppress(AttributeError):
                self._io_writer.transport.abort()

    async def wait_closed(self) -> None:
        """Not for ever, as it would with a socket that was cut off while something was still to be sent; and whoever is
        cancelled here takes nothing from others who wait for the same."""
        if self._io_writer is None:
            return
        closing = asyncio.ensure_future(self._io_writer.wait_closed())
        closing.add_done_callback(_minded)
        done, _ = await asyncio.wait({closing}, timeout=SHUTDOWN_SECONDS)
        if not done:
            self.abort()


def _minded(closing: asyncio.Future[None]) -> None:
    """However a connection ends, it has ended."""
    if not closing.cancelled():
        closing.exception()


async def _reach(host: str, port: int, timeout_seconds: float) -> socket.socket:
    """A TCP connection to any of the host's addresses. Raises OSError or TimeoutError.

    (Not with `asyncio.wait_for`: before Python 3.12 it swallows a cancellation that meets its end.)
    """
    loop = asyncio.get_running_loop()
    failed: OSError | TimeoutError = OSError(f"{host} has no address")
    async with asyncio.timeout(timeout_seconds):
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found:
        attempt = socket.socket(family, kind, protocol)
        try:
            attempt.setblocking(False)
            attempt.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(timeout_seconds):
                await loop.sock_connect(attempt, address)
            return attempt
        except (OSError, TimeoutError) as error:
            attempt.close()
            failed = error
        except BaseException:
            attempt.close()
            raise
    raise failed


class BusClient(Client):
    """A connection that is there again as soon as a server is, until `close`.

    `advice` is what to do when servers refuse these credentials; it is logged while they do, and they are asked
    ever more slowly, but for ever: credentials may be replaced in their file.
    """

    def __init__(self, advice: str = ADVICE) -> None:
        super().__init__()
        self._advice = advice
        self._refused = 0
        self.at_once: dict[int, Callable[[bytes, bytes], None]] = {}
        """Subscription → who hears it in the reading task."""

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        hear = self.at_once.get(sid)
        if hear is None:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            hear(subject, data)

    async def _connect_to_server(self, s: Srv) -> None:
        self._abandon()
        s.last_attempt = time.monotonic()
        context = self.ssl_context if "tls" in self.options or s.uri.scheme == "tls" else None
        self._transport = BusTransport(context, s.tls_name or s.uri.hostname)
        await self._transport.connect(
            s.uri, buffer_size=32_768, connect_timeout=self.options["connect_timeout"]
        )

    async def _process_connect_init(self) -> None:
        """Raises what the caller expects, and only returns once the server has let us in."""
        try:
            await super()._process_connect_init()
            if not self.is_connected:
                raise NatsError("the connection ended before the server had let us in")
        except (OSError, TimeoutError):
            self._abandon()
            raise
        except NatsError as error:
            self._abandon()
            await self._mind_refusal(str(error))
            raise
        except Exception as error:  # what a stranger said instead of a greeting, and uvloop's RuntimeError
            self._abandon()
            raise NatsError(f"no NATS server is at the other end: {error or type(error).__name__}") from error
        self._refused = 0

    async def close(self) -> None:
        """Also while the connection is being lost: what was still to be sent is lost with it."""
        try:
            await super().close()
        except OSError:
            self._pending, self._pending_data_size = [], 0
            self._status = Client.DISCONNECTED  # nats-py takes for closed what it began to close
            await super().close()

    def _abandon(self) -> None:
        """Ends what is left of the former connection: nats-py would read from both."""
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        if isinstance(self._transport, BusTransport):
            self._transport.abort()

    async def _mind_refusal(self, error: str) -> None:
        """Waits before these credentials are tried again, and says what to do about them."""
        if "authorization" not in error.lower() and "authentication" not in error.lower():
            return
        most = min(REFUSED_FIRST_SECONDS * 2.0 ** min(self._refused, 10), REFUSED_MOST_SECONDS)
        self._refused += 1
        log.warning(
            "the bus refuses the credentials of %s (%s), and is asked again in %.0f s. If it goes on: %s",
            self.options["name"],
            error,
            most,
            self._advice,
        )
        await asyncio.sleep(random.uniform(most / 2, most))  # noqa: S311 - spreads, hides nothing

    async def _request_new_style(
        self, subject: str, payload: bytes, timeout: float = 1, headers: dict[str, Any] | None = None
    ) -> Msg:
        """Asks as nats-py does, with one timer where that has a waiting future and random bytes for each question: they
        are a tenth of a call. The time also runs while the question waits to be sent."""
        if self.is_draining_pubs:
            raise ConnectionDrainingError
        if self._resp_sub_prefix is None:
            await self._init_request_sub()
        assert self._resp_sub_prefix is not None
        token = self._nuid.next().decode()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Msg] = loop.create_future()
        self._resp_map[token] = answer
        timer = loop.call_later(timeout, _too_late, answer)
        try:
            await self.publish(
                subject, payload, reply=self._resp_sub_prefix.decode() + token, headers=headers
            )
            return await answer
        finally:
            timer.cancel()
            self._resp_map.pop(token, None)

    async def _attempt_reconnect(self) -> None:
        while not self.is_closed:
            self._abandon()  # also a server that is cut off, and would not take part in closing TLS
            try:
                await super()._attempt_reconnect()
                return
            except Exception as error:  # the runtime's own loop: whoever isn't tried again is lost
                log.warning("reconnecting to the bus stumbled, and begins anew", exc_info=error)
                if not self.is_closed:
                    self._status = Client.RECONNECTING
                await asyncio.sleep(STUMBLE_SECONDS)

    async def _process_err(self, err_msg: str) -> None:
        """A server's `-ERR`: it is about a subject, or the server is about to close the connection."""
        if "permissions violation" in err_msg.lower() or "stale connection" in err_msg.lower():
            await super()._process_err(err_msg)
            return
        text = err_msg.strip("'")
        refused = "authorization violation" in text.lower()
        self._err = AuthorizationError() if refused else NatsError(f"nats: {text}")
        await self._error_cb(self._err)
        await self._process_op_err(self._err)

    async def _read_loop(self) -> None:
        """Also an error that nats-py only logs begins a new connection: nobody would read from this one."""
        await super()._read_loop()
        task = asyncio.current_task()
        ended_by_itself = task is self._reading_task and task is not None and not task.cancelling()
        if ended_by_itself and self.is_connected:
            await self._process_op_err(NatsError("reading from the server ended"))


async def hear_often(client: Client, subject: str, hear: Callable[[bytes, bytes], None]) -> None:
    """(subject, data) of what comes a thousand times a second: half of a message's cost is its queue and its task."""

    async def one(message: Msg) -> None:
        hear(message.subject.encode(), message.data)

    subscription = await client.subscribe(subject, cb=one)
    if isinstance(client, BusClient):
        client.at_once[subscription._id] = hear


def _too_late(answer: asyncio.Future[Msg]) -> None:
    if not answer.done():
        answer.set_exception(NatsTimeout())


async def open_client(options: dict[str, Any], advice: str = ADVICE) -> BusClient:
    """Connected as `connect_options` says. Without a server it waits for one, for ever."""
    client = BusClient(advice)
    await client.connect(**options)
    return client
