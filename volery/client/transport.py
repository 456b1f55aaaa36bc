"""Sending requests: one client that blocks, one that awaits. Both retry what may be repeated under its own key."""

from __future__ import annotations

import asyncio
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from volery.client import session
from volery.client.request import ListPage, Request, Resource
from volery.contracts.base import Entity, Message
from volery.contracts.operation import ENDED, Operation

A = TypeVar("A")
E = TypeVar("E", bound=Entity)
M = TypeVar("M", bound=Message)

TRIES = 5
AGAIN = {429, 502, 503, 504}
"""Worth another try: a service restarts, or the outcome is unknown and the key makes a repeat harmless."""
WAIT_SECONDS = 20


class ProblemError(Exception):
    """The server refused: an RFC 9457 problem. `str` is its sentence."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(problem.get("detail") or problem.get("title") or f"HTTP {status}")
        self.status = status
        self.problem = problem
        self.kind = str(problem.get("type", "")).rsplit("/", 1)[-1]


class OperationFailed(Exception):
    """An operation ended as failed or cancelled. `str` is its reason."""

    def __init__(self, operation: Operation) -> None:
        reason = operation.problem.message if operation.problem else str(operation.state)
        super().__init__(reason)
        self.operation = operation


class NotOne(Exception):
    """A name that nothing, or more than one thing, has."""


def _tls(known: session.Session) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=known.ca_file) if known.ca_file else True


def _headers(known: session.Session) -> dict[str, str]:
    return {"Authorization": f"Bearer {known.token}"} if known.token else {}


def _prepare(request: Request[Any], key: str) -> dict[str, Any]:
    headers = request.headers()
    if request.method != "GET":
        headers["Idempotency-Key"] = key
    query = dict(request.query) | ({"dry_run": "true"} if request.dry_run else {})
    return {
        "method": request.method,
        "url": f"/api/v1/{request.path}",
        "content": request.body,
        "params": query,
        "headers": headers,
    }


def _decode(request: Request[A], answer: httpx.Response) -> A:
    if answer.status_code >= 400:
        raise problem_of(answer)
    if request.answer is None or not answer.content:
        return None  # type: ignore[return-value]
    return msgspec.json.decode(answer.content, type=request.answer)


def problem_of(answer: httpx.Response) -> ProblemError:
    try:
        problem = msgspec.json.decode(answer.content, type=dict[str, Any])
    except msgspec.DecodeError:
        problem = {"title": answer.reason_phrase}
    return ProblemError(answer.status_code, problem)


def _next_pause(attempt: int, answer: httpx.Response | None) -> float:
    if answer is not None and answer.headers.get("Retry-After", "").isdigit():
        return min(float(answer.headers["Retry-After"]), 10.0)
    return float(min(0.2 * 2**attempt, 5.0))


def _only(noun: str, name: str, found: list[E]) -> E:
    if len(found) != 1:
        ids = ", ".join(item.id for item in found)
        raise NotOne(
            f"there is no {noun} named {name!r}"
            if not found
            else f"{len(found)} {noun}s are named {name!r} ({ids}); give the id"
        )
    return found[0]


class Client:
    """Blocks. A context manager."""

    def __init__(self, known: session.Session, timeout_seconds: float = 60.0) -> None:
        self.session = known
        self.http = httpx.Client(
            base_url=known.url, verify=_tls(known), headers=_headers(known), timeout=timeout_seconds
        )

    @classmethod
    def from_session(cls) -> Self:
        """The session of this person or machine. Raises NoSession."""
        return cls(session.load())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    def send(self, request: Request[A]) -> A:
        """The answer. Raises ProblemError, httpx.TransportError."""
        prepared = _prepare(request, str(uuid.uuid4()))
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                answer = self.http.request(**prepared)
            except httpx.TransportError:
                if last:
                    raise
                answer = None
            if answer is not None and (last or answer.status_code not in AGAIN):
                return _decode(request, answer)
            time.sleep(_next_pause(attempt, answer))
        raise AssertionError

    def list(self, resource: Resource[M], **query: Any) -> Iterator[M]:
        """Every item, page by page."""
        page = ""
        while True:
            found: ListPage[M] = self.send(resource.list(page=page, **query))
            yield from found.items
            if not (page := found.next):
                return

    def find(self, resource: Resource[E], name_or_id: str) -> E:
        """By id or by name. Raises NotOne, ProblemError."""
        if _is_uuid(name_or_id):
            return self.send(resource.get(name_or_id))
        return _only(
            resource.name, name_or_id, list(self.list(resource, filter={"name": name_or_id}, limit=10))
        )

    def poll(self, operation: Operation, seconds: int = WAIT_SECONDS) -> Operation:
        """The operation, at its end or after a while: the server waits for us."""
        answer = self.http.get(
            f"/api/v1/operations/{operation.id}",
            headers={"Prefer": f"wait={seconds}"},
            timeout=seconds + 15,
        )
        if answer.status_code in AGAIN:
            time.sleep(0.5)
            return operation
        return _decode(Request("GET", "", Operation), answer)

    def wait(self, operation: Operation, timeout_seconds: float = 3600.0) -> Operation:
        """The ended operation. Raises OperationFailed, TimeoutError."""
        until = time.monotonic() + timeout_seconds
        while operation.state not in ENDED:
            if time.monotonic() > until:
                raise TimeoutError(f"operation {operation.id} has not ended after {timeout_seconds:g} s")
            operation = self.poll(operation)
        if operation.problem is not None:
            raise OperationFailed(operation)
        return operation


class AsyncClient:
    """Awaits. An asynchronous context manager."""

    def __init__(self, known: session.Session, timeout_seconds: float = 60.0) -> None:
        self.session = known
        self.http = httpx.AsyncClient(
            base_url=known.url, verify=_tls(known), headers=_headers(known), timeout=timeout_seconds
        )

    @classmethod
    def from_session(cls) -> Self:
        return cls(session.load())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()

    async def send(self, request: Request[A]) -> A:
        """The answer. Raises ProblemError, httpx.TransportError."""
        prepared = _prepare(request, str(uuid.uuid4()))
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                answer = await self.http.request(**prepared)
            except httpx.TransportError:
                if last:
                    raise
                answer = None
            if answer is not None and (last or answer.status_code not in AGAIN):
                return _decode(request, answer)
            await asyncio.sleep(_next_pause(attempt, answer))
        raise AssertionError

    async def list(self, resource: Resource[M], **query: Any) -> AsyncIterator[M]:
        page = ""
        while True:
            found: ListPage[M] = await self.send(resource.list(page=page, **query))
            for item in found.items:
                yield item
            if not (page := found.next):
                return

    async def find(self, resource: Resource[E], name_or_id: str) -> E:
        if _is_uuid(name_or_id):
            return await self.send(resource.get(name_or_id))
        found = [item async for item in self.list(resource, filter={"name": name_or_id}, limit=10)]
        return _only(resource.name, name_or_id, found)

    async def wait(self, operation: Operation, timeout_seconds: float = 3600.0) -> Operation:
        """The ended operation. Raises OperationFailed, TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            while operation.state not in ENDED:
                answer = await self.http.get(
                    f"/api/v1/operations/{operation.id}",
                    headers={"Prefer": f"wait={WAIT_SECONDS}"},
                    timeout=WAIT_SECONDS + 15,
                )
                if answer.status_code in AGAIN:
                    await asyncio.sleep(0.5)
                    continue
                operation = _decode(Request("GET", "", Operation), answer)
        if operation.problem is not None:
            raise OperationFailed(operation)
        return operation


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True
