"""The OpenAPI document is fuzzed against the real services: no bug, no status that isn't documented."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_gateway.config import GatewayConfig
from api_gateway.service import Gateway
from services.dwh.service import service as dwh
from services.ha.service import service as ha
from services.inventory.service import service as inventory
from services.network.service import service as network
from services.scheduler.service import service as scheduler
from services.storage.service import service as storage
from tests.support.runtime import running
from volery.contracts.account import CREATE_USER, CreateUser
from volery.runtime.programs import Settings

PASSWORD = "correct horse battery"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
ENDLESS = "/api/v1/events"
"""Never answers wholly."""


SUICIDAL = ("delete_tokens_id", "delete_users_id", "post_users_id_password", "delete_sessions_current")
"""They end the fuzzer's own token, and everything after them would only be answered 401."""
WITHOUT_IDENTITIES = ("post_event_readers",)
"""This test's bus has no identities to give: documented, and answered 503."""
SEED = os.environ.get("VOLERY_TEST_FUZZ_SEED", "1")
PHASES = os.environ.get("VOLERY_TEST_FUZZ_PHASES", "examples,coverage,fuzzing")
EXAMPLES = os.environ.get("VOLERY_TEST_FUZZ_EXAMPLES", "10")
COUNTED = re.compile(r'volery_http_requests_total\{method="(\w+)",path="([^"]*)",status="(\d+)"\} (\d+)')


@asynccontextmanager
async def everything(configured: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """Every service and the gateway, and an administrator's client."""
    gateway = Gateway(GatewayConfig(listen="127.0.0.1:0", login_attempts_per_minute=10_000))
    programs = (inventory, scheduler, storage, network, ha, dwh, gateway)
    async with running(configured, *programs) as bus:
        await gateway.ready.wait()
        await bus.ask(CREATE_USER, CreateUser(name="ada", password=PASSWORD))
        url = f"http://127.0.0.1:{gateway.port}"
        async with httpx.AsyncClient(base_url=f"{url}/api/v1", timeout=30) as http:
            answer = await http.post("/sessions", json={"name": "ada", "password": PASSWORD})
            http.headers["authorization"] = f"Bearer {answer.json()['secret']}"
            yield http


async def furnish(http: httpx.AsyncClient) -> None:
    """One of each thing that needs no host, so that the fuzzer finds something to work on."""

    async def made(path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await http.post(path, json=body, headers={"prefer": "wait=20"})
        assert answer.status_code < 300, answer.text
        return answer.json()

    center = await made("/data-centers", {"name": "Default"})
    cluster = await made("/clusters", {"name": "Default", "data_center_id": center["id"]})
    await made("/hosts", {"name": "h1", "cluster_id": cluster["id"]})
    await made("/networks", {"name": "net1", "data_center_id": center["id"]})
    await made("/mac-pools", {"name": "p1", "ranges": ["56:6f:00:00:00:00-56:6f:00:00:00:ff"]})
    vm = {"name": "vm1", "cluster_id": cluster["id"], "memory_bytes": 64 * 1024 * 1024}
    ended = await made("/vms", vm)
    assert ended["state"] == "succeeded", ended


async def fuzz(http: httpx.AsyncClient, directory: Path, *selection: str) -> None:
    """Run schemathesis; fails with what it says."""
    url = str(http.base_url).removesuffix("/api/v1/")
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("st"), "run", f"{url}/openapi.json", "--url", url,
        "--header", f"Authorization: {http.headers['authorization']}",
        "--checks", CHECKS, "--phases", PHASES, "--max-examples", EXAMPLES, "--seed", SEED, *selection,
        # Not more workers: hypothesis trips over CPython 3.11's parser in threads.
        "--workers", "1", "--request-timeout", "60", "--continue-on-failure", "--no-shrink",
        "--suppress-health-check", "all", "--warnings", "off", "--no-color",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=directory,
    )  # fmt: skip
    assert process.stdout is not None
    said = (await process.stdout.read()).decode()
    (directory / "said").write_text(said)
    assert await process.wait() == 0, said[-30_000:]


async def statuses(http: httpx.AsyncClient) -> dict[tuple[str, str], Counter[int]]:
    """What each endpoint answered, by the gateway's own count."""
    text = (await http.get(str(http.base_url).removesuffix("/api/v1/") + "/metrics")).text
    found: dict[tuple[str, str], Counter[int]] = {}
    for method, path, status, count in COUNTED.findall(text):
        found.setdefault((method, path), Counter())[int(status)] += int(count)
    return found


@pytest.mark.timeout(900)
async def test_the_document_holds_against_every_service(configured: Settings, tmp_path: Path) -> None:
    async with everything(configured) as http:
        await furnish(http)
        excluded = [
            part for name in (*SUICIDAL, *WITHOUT_IDENTITIES) for part in ("--exclude-operation-id", name)
        ]
        await fuzz(http, tmp_path, "--exclude-path", ENDLESS, *excluded)
        found = await statuses(http)
        (tmp_path / "statuses").write_text("\n".join(f"{k} {dict(v)}" for k, v in sorted(found.items())))
        # It was let in, and its requests were understood often enough to have reached the services.
        answered = sum(found.values(), Counter())
        assert answered[401] < 0.4 * answered.total()
        for method, path in (
            ("GET", "/vms"),
            ("GET", "/vms/{id}"),
            ("POST", "/data-centers"),
            ("POST", "/vms"),
        ):
            assert any(status < 300 for status in found[method, path]), (path, found[method, path])


@pytest.mark.timeout(300)
async def test_also_for_what_ends_the_token(configured: Settings, tmp_path: Path) -> None:
    async with everything(configured) as http:
        selection = [part for name in SUICIDAL for part in ("--include-operation-id", name)]
        await fuzz(http, tmp_path, *selection)
