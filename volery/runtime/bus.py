"""The bus as a program sees it: connect with its own identity, ask, answer, listen.

Answers run as tasks (nats-py's endpoints handle one call at a time and leak exception texts), bounded per
service; only `Refused` reaches the wire.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import EndpointConfig
from nats.micro.service import Service as MicroService

from volery.contracts.base import Call, Message, encode
from volery.contracts.errors import STATUS, Kind, Problem, Refused
from volery.runtime import telemetry
from volery.runtime.bus_client import open_client
from volery.runtime.clock import monotonic
from volery.runtime.config import BusConfig
from volery.runtime.connection import connect_options
from volery.runtime.database import AWAY
from volery.runtime.packing import ENCODING, ENCODING_HEADER, Packed, pack, unpack

log = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Message)
A = TypeVar("A")

ERROR_HEADER = "Nats-Service-Error"
ERROR_CODE_HEADER = "Nats-Service-Error-Code"
PRINCIPAL_HEADER = "Volery-Principal"
REQUEST_HEADER = "Volery-Request"
HASH_HEADER = "Volery-Request-Hash"
FRESH_HEADER = "Volery-Request-Fresh"
LOST = "lost"
"""Detail of a refusal that nobody spoke: the question or its answer got lost. Ask again with the same id."""
MAX_ANSWER_BYTES = 900_000
"""NATS carries 1 MiB; lists are pages."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and under which request id: a repeat with the same id gets the first answer."""

    principal: str
    """`user:{id}`, `token:{id}` or `service:{name}`."""
    request_id: str = ""
    request_hash: str = ""
    """Hash of method, path and body: another body under the same id is refused."""

    fresh: bool = False
    """The id was made for this very attempt: no earlier answer need be looked for."""

    def headers(self) -> dict[str, str]:
        found = {PRINCIPAL_HEADER: self.principal}
        if self.request_id:
            found |= {REQUEST_HEADER: self.request_id, HASH_HEADER: self.request_hash}
        if self.fresh:
            found[FRESH_HEADER] = "yes"
        return found


Handler = Callable[[Any, Caller], Awaitable[Any]]


async def connect(
    config: BusConfig,
    user: str,
    *,
    never_queue: bool = False,
    on_closed: Callable[[], Awaitable[None]] | None = None,
) -> Client:
    """A connection with the user's own credentials and inbox.

    `never_queue`: publishing while disconnected fails at once instead of being sent after the reconnect, which
    is what orders and beats need. `on_closed` is called when the connection ends for ever, which only `close` should
    make it do.
    """
    servers = config.servers.split(",")
    if config.credentials_dir:
        options = connect_options(
            Path(config.credentials_dir, f"{user}.creds"),
            user,
            servers,
            ca=Path(config.ca_file) if config.ca_file else None,
            at_once=never_queue,
        )
    else:
        options = {"servers": servers, "name": user, "inbox_prefix": f"_INBOX.{user}"}
        options |= {"max_reconnect_attempts": -1, "reconnect_time_wait": 0.1}
        options |= {"pending_size": 0} if never_queue else {}
    options["error_cb"] = _note_error
    if on_closed is not None:
        options["closed_cb"] = on_closed
    while True:
        try:
            return await open_client(options)
        except (OSError, nats.errors.NoServersError, nats.errors.TimeoutError) as error:
            log.warning("the bus is not reachable yet: %s", error)
            await asyncio.sleep(0.5)


async def _note_error(error: Exception) -> None:
    log.info("bus: %s", error or type(error).__name__)


def _problem(message: Msg) -> Problem | None:
    if message.headers and ERROR_CODE_HEADER in message.headers:
        try:
            return msgspec.json.decode(message.data, type=Problem)
        except msgspec.DecodeError:
            return Problem(kind=Kind.INTERNAL, message="the service answered with an error it can't explain")
    return None


@dataclass(slots=True)
class Bus:
    """One program's connection. `name` is the service it speaks for."""

    client: Client
    name: str
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the connection is closed and will not come back."""
    decoders: dict[Any, msgspec.json.Decoder[Any]] = field(default_factory=dict)

    def decoder(self, type_: Any) -> msgspec.json.Decoder[Any]:
        found = self.decoders.get(type_)
        if found is None:
            found = self.decoders[type_] = msgspec.json.Decoder(type_)
        return found

    async def ask(self, call: Call[Q, A], question: Q, caller: Caller | None = None, **options: Any) -> A:
        """The answer, decoded. Raises Refused; a timeout means: outcome unknown, ask again with the same id."""
        if caller is None and call.mutates:
            caller = Caller(f"service:{self.name}")
        body = await self.ask_raw(
            call.subject, call.encode(question), caller, call.timeout_seconds, **options
        )
        answer: A = self.decoder(call.answer).decode(body)
        return answer

    async def ask_raw(
        self,
        subject: str,
        body: bytes,
        caller: Caller | None = None,
        timeout_seconds: float = 10.0,
        *,
        again: bool = True,
    ) -> bytes:
        """The answer's bytes. No responders are tried again until the time is up (services restart).

        Without a caller a service asks for itself, which needs no headers: they are a fifth of a call's cost.
        """
        headers = telemetry.inject(caller.headers() if caller else {}) or None
        until = monotonic() + timeout_seconds
        while True:
            left = until - monotonic()
            try:
                message = await self.client.request(subject, body, timeout=max(left, 0.01), headers=headers)
            except nats.errors.NoRespondersError:
                if not again or monotonic() + 0.05 > until:
                    raise Refused(
                        Kind.UNAVAILABLE,
                        f"nobody answers {subject} right now: the {subject.split('.')[0]} service is down or "
                        "starting; try again in a few seconds",
                        **{LOST: True},
                    ) from None
                await asyncio.sleep(0.05)
                continue
            except (
                nats.errors.TimeoutError,
                nats.errors.ConnectionClosedError,
                nats.errors.OutboundBufferLimitError,
            ):
                raise Refused(
                    Kind.TIMEOUT,
                    f"{subject} did not answer within {timeout_seconds:g} s: the outcome is unknown, so ask again "
                    "with the same Idempotency-Key",
                    **{LOST: True},
                ) from None
            problem = _problem(message)
            if problem is not None:
                raise Refused(problem.kind, problem.message, **problem.details)
            return unpack(message.data, message.headers)


SOME_SERVICE = Caller("service")
"""Who asks without saying who: one of our own, reading."""


def caller_of(headers: dict[str, str] | None) -> Caller:
    if not headers:
        return SOME_SERVICE
    return Caller(
        headers.get(PRINCIPAL_HEADER, SOME_SERVICE.principal),
        headers.get(REQUEST_HEADER, ""),
        headers.get(HASH_HEADER, ""),
        FRESH_HEADER in headers,
    )


@dataclass(slots=True)
class Answers:
    """The calls a service answers, registered as NATS micro endpoints in one queue group."""

    bus: Bus
    limit: int = 64
    """Calls at work at once."""
    queue_limit: int = 2000
    """Calls that wait for their turn; one more is refused, so that a flood can't take the memory."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    micro: MicroService | None = None
    turns: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.turns = asyncio.Semaphore(self.limit)

    async def open(self, table: dict[str, tuple[Call[Any, Any], Handler]], version: str = "0.1.0") -> None:
        self.micro = await add_service(
            self.bus.client, name=self.bus.name, version=version, queue_group=self.bus.name
        )
        for subject, (call, handler) in table.items():
            await self.micro.add_endpoint(
                EndpointConfig(
                    name=subject.replace(".", "-"), subject=subject, handler=self._endpoint(call, handler)
                )
            )

    def _endpoint(self, call: Call[Any, Any], handler: Handler) -> Callable[[Request], Awaitable[None]]:
        async def take(request: Request) -> None:
            if len(self.tasks) >= self.limit + self.queue_limit:
                await _refuse(request, Refused(Kind.EXHAUSTED, f"{self.bus.name} is busy; try again shortly"))
                return
            task = asyncio.create_task(self._answer(call, handler, request))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

        return take

    async def _answer(self, call: Call[Any, Any], handler: Handler, request: Request) -> None:
        telemetry.service_name.set(self.bus.name)
        outcome = "ok"
        async with self.turns:
            started = time.perf_counter()
            with telemetry.answering(call.subject, request.headers) as span:
                try:
                    question = self.bus.decoder(call.question).decode(request.data)
                    answer = await handler(question, caller_of(request.headers))
                    await _respond(request, answer)
                except Exception as error:  # the runtime's own loop: a bug is logged, never sent
                    refused = self._refusal(call.subject, error, span)
                    outcome = refused.kind.value
                    await _refuse(request, refused)
        labels = {"subject": call.subject, "outcome": outcome}
        telemetry.calls_total.add(1, labels)
        telemetry.call_seconds.record(time.perf_counter() - started, labels)

    def _refusal(self, subject: str, error: Exception, span: Any) -> Refused:
        """What the caller is told of an error."""
        match error:
            case Refused():
                return error
            case msgspec.ValidationError():
                return Refused(Kind.INVALID, f"the request is not as expected: {error}")
            case msgspec.DecodeError():
                return Refused(Kind.INVALID, f"the request is not JSON: {error}")
            case _ if isinstance(error, AWAY):
                log.warning("%s: the database is away: %s", subject, error or type(error).__name__)
                return _database_away(self.bus.name)
        span.record_exception(error)
        hidden = _internal(span)
        log.error("%s failed, told as %s", subject, hidden.details["trace_id"], exc_info=error)
        return hidden

    async def close(self, timeout_seconds: float = 10.0) -> None:
        """Take no more calls, let those at work finish."""
        if self.micro is not None:
            for endpoint in list(self.micro._endpoints):
                await endpoint._stop()
            self.micro._endpoints = []
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=timeout_seconds)
        if self.micro is not None and self.bus.client.is_connected:
            await self.micro.stop()


async def _respond(request: Request, answer: Any) -> None:
    if isinstance(answer, msgspec.Raw):
        answer = bytes(answer)
    body = pack(answer if isinstance(answer, bytes) else encode(answer))
    if len(body) > MAX_ANSWER_BYTES:
        raise Refused(Kind.TOO_LARGE, f"the answer has {len(body)} bytes; ask for a smaller page")
    await request.respond(body, {ENCODING_HEADER: ENCODING} if isinstance(body, Packed) else None)


def _database_away(name: str) -> Refused:
    return Refused(
        Kind.UNAVAILABLE,
        f"{name} can't reach its database right now; whether the request took effect is unknown, so ask again with the "
        "same Idempotency-Key in a few seconds",
        **{LOST: True},
    )


def _internal(span: Any) -> Refused:
    """What the caller is told instead. A call that isn't traced gets an id all the same, to be found in the log."""
    trace_id = format(span.get_span_context().trace_id or secrets.randbits(128), "032x")
    return Refused(
        Kind.INTERNAL,
        f"something went wrong inside Volery; the log has it under trace {trace_id}",
        trace_id=trace_id,
    )


async def _refuse(request: Request, refused: Refused) -> None:
    headers = {
        ERROR_HEADER: refused.kind.value,
        ERROR_CODE_HEADER: str(STATUS[refused.kind]),
    }
    await request.respond(msgspec.json.encode(refused.problem()), headers=headers)


Connect = Callable[..., Awaitable[Client]]
"""`connect`, or what stands in for it."""


@asynccontextmanager
async def open_bus(config: BusConfig, name: str, connect: Connect = connect) -> AsyncIterator[Bus]:
    lost = asyncio.Event()

    async def closed() -> None:
        lost.set()

    client = await connect(config, name, on_closed=closed)
    try:
        yield Bus(client, name, lost)
    finally:
        await client.close()
