"""Who may ask: tokens, scopes, what is remembered and what a fact takes back at once."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from api_gateway.config import GatewayConfig
from tests.api_gateway.facts import facts_of, tell
from tests.api_gateway.scripted import SECRET, Deployed, Script, decoded, deployed, vm
from tests.api_gateway.sse_client import Ended, Follower
from volery.contracts.account import CHECK_TOKEN, DELETE_TOKEN, LIST_USERS, LOGIN, Scope
from volery.contracts.base import Done, Owner
from volery.contracts.operation import Page
from volery.contracts.vm import GET_VM, START_VM
from volery.setup.embedded import Embedded

NOBODY = "01a22853-4c25-799d-b69d-26b96db2f63d"


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Basic YTpi",
        "Bearer",
        "Bearer x",
        "Bearer vol_",
        "Bearer vol_x_y",
        f"Bearer vol_{NOBODY}_",
        f"Bearer vol_{NOBODY}_{'x' * 5000}",
        f"Bearer vol_{NOBODY}_unknown",
        "Bearer vol_\xff_\xff",
    ],
)
async def test_who_has_no_token_is_told_how_to_get_one(gateway: Deployed, authorization: str) -> None:
    gateway.script.on(GET_VM, vm())
    headers = {"authorization": authorization.encode("latin-1")} if authorization else {}
    async with httpx.AsyncClient(base_url=f"{gateway.url}/api/v1") as http:
        answer = await http.get("/vms/x", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert decoded(answer)["type"].endswith("/unauthenticated")
    assert not gateway.script.questions(GET_VM)


async def test_a_secret_of_another_token_is_worth_nothing(gateway: Deployed) -> None:
    token_id = gateway.script.token().split("_")[1]
    answer = await gateway.get("/vms/x", headers=bearer(f"vol_{token_id}_{SECRET}x"))
    assert answer.status_code == 401


async def test_an_expired_token_is_refused_also_when_it_is_remembered(gateway: Deployed) -> None:
    gateway.script.on(GET_VM, vm())
    short = bearer(gateway.script.token(expires=datetime.now(UTC) + timedelta(seconds=0.5)))
    assert (await gateway.get("/vms/x", headers=short)).status_code == 200
    async with asyncio.timeout(5):
        while (answer := await gateway.get("/vms/x", headers=short)).status_code == 200:
            await asyncio.sleep(0.05)
    assert "expired" in decoded(answer)["detail"]
    assert len(gateway.script.questions(CHECK_TOKEN)) == 1


async def test_scopes(gateway: Deployed) -> None:
    gateway.script.on(GET_VM, vm())
    gateway.script.on(LIST_USERS, Page(items=()))
    read, write, admin = (
        bearer(gateway.script.token(scope)) for scope in (Scope.READ, Scope.WRITE, Scope.ADMIN)
    )

    async def statuses(method: str, path: str) -> list[int]:
        return [
            (await gateway.http.request(method, path, headers=h)).status_code for h in (read, write, admin)
        ]

    assert await statuses("GET", "/vms/x") == [200, 200, 200]
    assert await statuses("POST", "/vms/x/start") == [403, 404, 404]
    assert await statuses("GET", "/users") == [403, 403, 200]
    assert await statuses("DELETE", "/operations/inventory-x") == [403, 404, 404]
    refused = await gateway.http.post("/vms/x/start", headers=read)
    assert decoded(refused)["needed"] == "write"
    assert len(gateway.script.questions(START_VM)) == 2


async def test_a_token_is_checked_once_and_forgotten_when_it_is_deleted(gateway: Deployed) -> None:
    gateway.script.on(GET_VM, vm())
    await facts_of(gateway.bus, Owner.INVENTORY)
    token = gateway.script.token()
    token_id = token.split("_")[1]
    for _ in range(5):
        assert (await gateway.get("/vms/x", headers=bearer(token))).status_code == 200
    assert len(gateway.script.questions(CHECK_TOKEN)) == 1
    follower = Follower(gateway.http)
    follower.http.headers.update(bearer(token))
    following = asyncio.create_task(_until_ended(follower))
    while not follower.cursor:
        await asyncio.sleep(0.01)
    del gateway.script.tokens[token_id]
    await tell(gateway.bus, 1, f"fact.inventory.token.{token_id}.deleted", {"id": token_id})
    async with asyncio.timeout(5):
        await following  # its stream ends with it
        while (await gateway.get("/vms/x", headers=bearer(token))).status_code != 401:
            await asyncio.sleep(0.01)


async def _until_ended(follower: Follower) -> None:
    try:
        async for _ in follower.events():
            pass
    except Ended:
        return


async def test_logging_in_and_out(gateway: Deployed) -> None:
    gateway.script.on(DELETE_TOKEN, Done())
    async with httpx.AsyncClient(base_url=f"{gateway.url}/api/v1") as http:
        wrong = await http.post("/sessions", json={"name": "ann", "password": "wrong"})
        assert wrong.status_code == 401
        answer = await http.post("/sessions", json={"name": "ann", "password": "right"})
        assert answer.status_code == 201
        assert answer.headers["cache-control"].startswith("no-store")
        issued = decoded(answer)
        http.headers.update(bearer(issued["secret"]))
        me = decoded(await http.get("/sessions/current"))
        assert (me["user_name"], me["token_id"]) == ("ann", issued["token"]["id"])
        assert (await http.delete("/sessions/current")).status_code == 204
        assert gateway.script.questions(DELETE_TOKEN)[0].id == issued["token"]["id"]


async def test_guessing_is_slowed_down(nats: Embedded) -> None:
    config = GatewayConfig(listen="127.0.0.1:0", login_attempts_per_minute=3)
    async with deployed(nats.url, Script(), config) as gateway:
        for _ in range(3):
            answer = await gateway.http.post("/sessions", json={"name": "ann", "password": "wrong"})
            assert answer.status_code == 401
        answer = await gateway.http.post("/sessions", json={"name": "ann", "password": "right"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert decoded(answer)["retry_after_seconds"] <= 61
        assert len(gateway.script.questions(LOGIN)) == 3


async def test_no_secret_is_in_a_problem_or_in_the_audit_log(
    gateway: Deployed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    token = gateway.script.token()
    await gateway.http.post("/vms", json={"name": "a", "password": "hunter2"}, headers=bearer(token))
    answer = await gateway.http.post("/sessions", json={"name": "ann", "password": "hunter2"})
    logged = "\n".join(f"{r.getMessage()} {json.dumps(getattr(r, 'fields', {}))}" for r in caplog.records)
    assert "hunter2" not in logged + answer.text
    assert SECRET not in logged
    audited = [r.fields for r in caplog.records if r.name == "volery.audit"]  # type: ignore[attr-defined]
    assert [(f["method"], f["path"], f["status"]) for f in audited] == [
        ("POST", "/api/v1/vms", 400),
        ("POST", "/api/v1/sessions", 401),
    ]
    assert audited[0]["principal"].startswith("user:")
