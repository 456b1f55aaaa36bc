"""A REST client that keeps asking, under the same Idempotency-Key, until there is an answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
import msgspec

from volery.client import api
from volery.client.request import ListPage, Request, Resource, body_of
from volery.client.session import Session
from volery.client.transport import AsyncClient, ProblemError, problem_of
from volery.contracts.account import IssuedToken, Login
from volery.contracts.base import Entity
from volery.contracts.operation import ENDED, Operation

A = TypeVar("A")
E = TypeVar("E", bound=Entity)
AGAIN = frozenset({429, 500, 502, 503, 504})
ANSWER_SECONDS = 90.0


class NoAnswer(Exception):
    """Nobody answered for so long that something must be wrong."""


@dataclass
class Patient:
    """Whoever asks through it sees refusals, never the outages between; those are counted."""

    client: AsyncClient
    trouble: Counter[str] = field(default_factory=Counter)
    """What it met: HTTP statuses that are asked again after, and broken connections."""

    async def send(self, request: Request[A], key: str = "") -> A:
        """The answer. Raises ProblemError for a refusal, NoAnswer."""
        key = key or str(uuid.uuid4())
        until = time.monotonic() + ANSWER_SECONDS
        while True:
            said = await self._try(request, key)
            if isinstance(said, httpx.Response):
                if said.status_code not in AGAIN:
                    return _decoded(request, said)
                said = f"{said.status_code} {said.text[:300]}"
            self.trouble[said.split()[0]] += 1
            if time.monotonic() > until:
                raise NoAnswer(f"{request.method} {request.path}: {said}")
            await asyncio.sleep(0.1)

    async def _try(self, request: Request[A], key: str) -> httpx.Response | str:
        headers = request.headers()
        if request.method != "GET":
            headers["Idempotency-Key"] = key
        try:
            return await self.client.http.request(
                request.method,
                f"/api/v1/{request.path}",
                content=request.body,
                params=dict(request.query),
                headers=headers,
                timeout=20,
            )
        except httpx.TransportError as error:
            return type(error).__name__

    async def everything(self, resource: Resource[E]) -> list[E]:
        """Every item of a collection, when every owner of it answers."""
        found: list[E] = []
        page = ""
        while True:
            shape: type[ListPage[E]] = ListPage[resource.entity]  # type: ignore[name-defined]
            request = resource.list(page=page)
            answer: ListPage[E] = await self.send(Request("GET", request.path, shape, query=request.query))
            found += answer.items
            if not (page := answer.next):
                return found

    async def operations(self) -> list[Operation]:
        """All operations of all owners; asked again while one of them is missing from the answer."""
        while True:
            found: list[Operation] = []
            page, missing = "", False
            while True:
                request = api.OPERATIONS.list(page=page)
                answer = await self.send(Request("GET", request.path, _Operations, query=request.query))
                found += answer.items
                missing = missing or bool(answer.missing)
                if not (page := answer.next):
                    break
            if not missing:
                return found
            await asyncio.sleep(0.2)

    async def ended(self, operation: Operation, seconds: float = 120.0) -> Operation:
        """The operation once it has ended, however. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while operation.state not in ENDED:
                await asyncio.sleep(0.1)
                operation = await self.send(api.OPERATIONS.get(operation.id))
        return operation

    async def succeeded(self, operation: Operation, seconds: float = 120.0) -> Operation:
        """Likewise, and it must have succeeded."""
        found = await self.ended(operation, seconds)
        assert found.problem is None, found.problem
        return found


class _Operations(msgspec.Struct):
    items: list[Operation]
    missing: list[str]
    next: str = ""


def _decoded(request: Request[A], answer: httpx.Response) -> A:
    if answer.status_code >= 400:
        raise problem_of(answer)
    if request.answer is None or not answer.content:
        return None  # type: ignore[return-value]
    return msgspec.json.decode(answer.content, type=request.answer)


async def logged_in(url: str, ca_file: str, password: str) -> Patient:
    """As the administrator, once the gateway answers and knows them. Close its client afterwards."""
    unknown = Patient(AsyncClient(Session(url=url, ca_file=ca_file)))
    login = Request("POST", "sessions", IssuedToken, body_of(Login(name="admin", password=password)))
    until = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            issued = await unknown.send(login)
            break
        except ProblemError as problem:  # the first administrator is made while the services start
            if problem.status != 401 or time.monotonic() > until:
                raise
            await asyncio.sleep(0.5)
    await unknown.client.http.aclose()
    return Patient(AsyncClient(Session(url=url, ca_file=ca_file, token=issued.secret)))
