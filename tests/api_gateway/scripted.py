"""Services that answer by a dictionary, on a real NATS, and a gateway in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec

from api_gateway.config import GatewayConfig
from api_gateway.feed import Feed
from api_gateway.service import Gateway
from volery.contracts.account import (
    CHECK_TOKEN,
    LOGIN,
    CheckToken,
    IssuedToken,
    Login,
    Principal,
    Scope,
    Token,
)
from volery.contracts.base import Call, Owner
from volery.contracts.errors import Kind, Refused
from volery.contracts.health import GET_HEALTH, Health
from volery.contracts.ids import new_id
from volery.contracts.operation import GET_OPERATION, LIST_OPERATIONS, Operation, Page
from volery.contracts.vm import Vm
from volery.runtime.bus import Answers, Bus, Caller, open_bus
from volery.runtime.config import BusConfig, DatabaseConfig, TelemetryConfig
from volery.runtime.programs import Settings

SECRET = "s3cret_with_underscores"
NOW = datetime(2026, 11, 20, tzinfo=UTC)


def entity(**fields: Any) -> dict[str, Any]:
    return {"id": new_id(), "revision": 1, "created_at": NOW, "updated_at": NOW} | fields


def vm(**fields: Any) -> Vm:
    return Vm(**entity(name="web1", cluster_id=new_id(), data_center_id=new_id()) | fields)


def operation(owner: Owner = Owner.INVENTORY, **fields: Any) -> Operation:
    given = {"id": f"{owner}-{new_id()}", "kind": "vm.start", "object_kind": "vm", "object_id": new_id()}
    return Operation(**entity(deadline=NOW) | given | fields)


@dataclass
class Script:
    """Call → answer, or a function of (question, caller) that gives it or raises Refused."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, Any, Caller]] = field(default_factory=list)
    scopes: tuple[Scope, ...] = (Scope.READ, Scope.WRITE, Scope.ADMIN)
    tokens: dict[str, Principal] = field(default_factory=dict)
    silent: set[Owner] = field(default_factory=set)
    """Services that aren't there."""

    def on(self, call: Call[Any, Any], answer: Any) -> None:
        self.answers[call.subject] = answer

    def questions(self, call: Call[Any, Any]) -> list[Any]:
        return [question for subject, question, _ in self.asked if subject == call.subject]

    def token(self, *scopes: Scope, expires: datetime | None = None) -> str:
        """A bearer that the script knows."""
        token_id = new_id()
        self.tokens[token_id] = Principal(
            principal=f"user:{new_id()}",
            user_name="ann",
            token_id=token_id,
            scopes=scopes or self.scopes,
            expires_at=expires or datetime.now(UTC) + timedelta(hours=1),
        )
        return f"vol_{token_id}_{SECRET}"

    def check(self, question: CheckToken, caller: Caller) -> Principal:
        import hashlib

        right = hashlib.sha256(SECRET.encode()).hexdigest()
        if question.token_id not in self.tokens or question.secret_sha256 != right:
            raise Refused(Kind.UNAUTHENTICATED, "this token is not known here")
        return self.tokens[question.token_id]

    def log_in(self, question: Login, caller: Caller) -> IssuedToken:
        if question.password != "right":
            raise Refused(Kind.UNAUTHENTICATED, "name or password is wrong")
        secret = self.token()
        token_id = secret.split("_")[1]
        token = Token(**entity(user_id=new_id(), user_name=question.name, expires_at=NOW) | {"id": token_id})
        return IssuedToken(token=token, secret=secret)


@dataclass
class Deployed:
    """A gateway with its scripted services."""

    http: httpx.AsyncClient
    script: Script
    bus: Bus
    """Of the services: publishes what they would."""
    gateway: Gateway
    url: str

    @property
    def feed(self) -> Feed:
        assert self.gateway.desk is not None
        return self.gateway.desk.feed

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.http.get(path, **options)


def all_calls() -> list[Call[Any, Any]]:
    """Every call of the contracts."""
    import importlib
    import pkgutil

    import volery.contracts

    found: dict[str, Call[Any, Any]] = {}
    for module in pkgutil.iter_modules(volery.contracts.__path__):
        for value in vars(importlib.import_module(f"volery.contracts.{module.name}")).values():
            values = value.values() if isinstance(value, dict) else [value]
            found |= {call.subject: call for call in values if isinstance(call, Call)}
    return list(found.values())


def settings(url: str) -> Settings:
    return Settings(BusConfig(servers=url, require_sync_always=False), DatabaseConfig(), TelemetryConfig())


@asynccontextmanager
async def scripted_services(nats_url: str, script: Script) -> AsyncIterator[Bus]:
    """Answers every call of the contracts; what the script doesn't know is not found."""
    script.answers.setdefault(CHECK_TOKEN.subject, script.check)
    script.answers.setdefault(LOGIN.subject, script.log_in)
    for owner in Owner:
        script.answers.setdefault(LIST_OPERATIONS[owner].subject, Page(items=()))
        script.answers.setdefault(GET_HEALTH[owner].subject, Health(owner=owner, leader=True))
        script.answers.setdefault(GET_OPERATION[owner].subject, None)
    async with AsyncExitStack() as stack:
        buses = []
        for owner in Owner:
            bus = await stack.enter_async_context(open_bus(settings(nats_url).bus, str(owner)))
            answers = Answers(bus)
            calls = [call for call in all_calls() if call.owner == owner and owner not in script.silent]
            await answers.open({call.subject: (call, _handler(script, call)) for call in calls})
            stack.push_async_callback(answers.close)
            buses.append(bus)
        yield buses[0]


def _handler(script: Script, call: Call[Any, Any]) -> Callable[[Any, Caller], Any]:
    async def answer(question: Any, caller: Caller) -> Any:
        script.asked.append((call.subject, question, caller))
        found = script.answers.get(call.subject)
        if callable(found):
            found = found(question, caller)
            if asyncio.iscoroutine(found):
                found = await found
        if found is None:
            raise Refused(Kind.NOT_FOUND, "the script has no such thing")
        return found

    return answer


@asynccontextmanager
async def running_gateway(nats_url: str, config: GatewayConfig | None = None) -> AsyncIterator[Gateway]:
    gateway = Gateway(config or GatewayConfig(listen="127.0.0.1:0"))
    stop = asyncio.Event()
    task = asyncio.create_task(gateway.main(settings(nats_url), stop))
    waiting = asyncio.create_task(gateway.ready.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield gateway
    finally:
        waiting.cancel()
        stop.set()
        await asyncio.wait_for(task, 20)


@asynccontextmanager
async def deployed(
    nats_url: str, script: Script | None = None, config: GatewayConfig | None = None
) -> AsyncIterator[Deployed]:
    script = script or Script()
    async with scripted_services(nats_url, script) as bus, running_gateway(nats_url, config) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        headers = {"authorization": f"Bearer {script.token()}"}
        async with httpx.AsyncClient(base_url=f"{url}/api/v1", headers=headers, timeout=20) as http:
            yield Deployed(http, script, bus, gateway, url)


def decoded(answer: httpx.Response) -> Any:
    return msgspec.json.decode(answer.content)
