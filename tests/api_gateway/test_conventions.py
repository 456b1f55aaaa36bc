"""What holds for every endpoint: problems for everything that isn't right, retries that are safe, waiting."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from api_gateway.config import GatewayConfig
from tests.api_gateway.facts import facts_of, tell
from tests.api_gateway.scripted import NOW, Deployed, Script, decoded, deployed, operation, vm
from volery.contracts.base import Owner, encode
from volery.contracts.cluster import LIST_CLUSTERS
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import GET_HOST
from volery.contracts.operation import GET_OPERATION, OperationState, Page
from volery.contracts.vm import CREATE_VM, GET_VM, LIST_VMS, START_VM
from volery.runtime.bus import Caller
from volery.setup.embedded import Embedded

BODY = {"name": "web1", "cluster_id": "c1", "memory_bytes": 1}


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "says"),
    [
        ("GET", "/nothing", {}, 404, "nothing at this path"),
        ("GET", "/vms/", {}, 404, "nothing at this path"),
        ("GET", "/vms/a%2Fb", {}, 404, "nothing at this path"),
        ("GET", "/vms/a%00b", {}, 404, "can't be the id"),
        ("GET", "/vms/%22%7D", {}, 404, "can't be the id"),
        ("PUT", "/vms/x", {}, 405, "possible: DELETE, GET, HEAD, PATCH"),
        ("TRACE", "/vms", {}, 405, "possible: GET, HEAD, POST"),
        ("GET", "/vms?limit=0x", {}, 400, "limit must be a number"),
        ("GET", "/vms?colour=red", {}, 400, "colour"),
        ("GET", "/vms?limit=1&limit=2", {}, 400, "given twice"),
        ("GET", "/vms?search=%FF", {}, 400, "UTF-8"),
        ("GET", "/vms?search=%00", {}, 400, "NUL"),
        ("GET", "/vms?expand=colour", {}, 400, "can't be expanded"),
        ("GET", "/vms/x?fields=id", {}, 400, "no parameter"),
        ("POST", "/vms?dry_run=perhaps", {"json": BODY}, 400, "dry_run"),
        ("POST", "/vms", {}, 400, "a JSON body is needed"),
        ("POST", "/vms", {"content": b"{"}, 400, "not JSON"),
        ("POST", "/vms", {"content": b"[" * 100_000}, 400, ""),
        ("POST", "/vms", {"content": b'"\xff"'}, 400, ""),
        ("POST", "/vms", {"content": b"[]"}, 400, "expected `object`"),
        ("POST", "/vms", {"json": BODY | {"id": "x"}}, 400, "unknown field `id`"),
        ("POST", "/vms", {"json": BODY | {"if_revision": 3}}, 400, "unknown field"),
        ("POST", "/vms", {"content": b"name=a", "headers": {"content-type": "text/plain"}}, 415, "application/json"),
        ("POST", "/vms", {"content": b" " * (1024 * 1024 + 1)}, 413, "1048576 bytes"),
        ("POST", "/vms", {"json": BODY, "headers": {"idempotency-key": "a b"}}, 400, "Idempotency-Key"),
        ("POST", "/vms", {"json": BODY, "headers": {"idempotency-key": "x" * 256}}, 400, "Idempotency-Key"),
        ("POST", "/vms", {"json": BODY, "headers": {"if-match": '"1"'}}, 400, "If-Match has no meaning"),
        ("DELETE", "/vms/x", {"headers": {"if-match": '"abc"'}}, 400, "If-Match must be"),
        ("DELETE", "/vms/x?delete_disks=2", {}, 400, "delete_disks"),
        ("GET", "/history/samples", {}, 400, "/noun"),
        ("GET", "/history/versions?noun=vm&at=yesterday", {}, 400, "/at"),
        ("GET", "/operations/x", {}, 404, "no operation"),
        ("GET", "/operations/inventory", {}, 404, ""),
        ("POST", "/streams/nobody/rebuild", {}, 404, "no stream"),
        ("POST", "/hosts/h1/excuse", {"json": {"confirm": "h1"}}, 409, "no service waits"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_a_problem_that_says_so(
    gateway: Deployed, method: str, path: str, options: dict[str, Any], status: int, says: str
) -> None:
    gateway.script.on(LIST_VMS, Page(items=()))
    answer = await gateway.http.request(method, path, **options)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = decoded(answer)
    assert problem["status"] == status
    assert problem["type"].startswith("https://volery.dev/problems/")
    assert says in problem["detail"]
    assert not gateway.script.questions(CREATE_VM)
    if status == 405:
        assert answer.headers["allow"]


async def test_a_long_body_is_refused_while_it_comes(gateway: Deployed) -> None:
    async def endless():  # type: ignore[no-untyped-def]
        for _ in range(100):
            yield b" " * 100_000

    answer = await gateway.http.post("/vms", content=endless())
    assert answer.status_code == 413


async def test_bugs_and_details_never_replace_the_standard_members(gateway: Deployed) -> None:
    def refuse(question: Any, caller: Caller) -> Any:
        raise Refused(Kind.EXHAUSTED, "full", status=1, type="x", detail="y")

    gateway.script.on(GET_VM, refuse)
    answer = await gateway.get("/vms/x")
    problem = decoded(answer)
    assert (answer.status_code, problem["status"], problem["detail"]) == (503, 503, "full")
    assert answer.headers["retry-after"]

    def break_(question: Any, caller: Caller) -> Any:
        raise ZeroDivisionError("a secret in a traceback")

    gateway.script.on(GET_VM, break_)
    answer = await gateway.get("/vms/x")
    assert answer.status_code == 500
    assert "secret" not in answer.text


async def test_a_traced_request_has_its_trace_id_in_the_problem(gateway: Deployed) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    problem = decoded(await gateway.get("/vms/x", headers=headers))
    assert problem["trace_id"] == trace
    problem = decoded(await gateway.http.post("/vms/x/start"))
    assert len(problem["trace_id"]) == 32


async def test_one_key_is_one_request(gateway: Deployed) -> None:
    gateway.script.on(CREATE_VM, operation())
    for body in (BODY, BODY, BODY | {"vcpus": 2}):
        await gateway.http.post("/vms", json=body, headers={"idempotency-key": "k"})
    await gateway.http.post("/vms", json=BODY)
    callers = [caller for subject, _, caller in gateway.script.asked if subject == CREATE_VM.subject]
    first, second, other, own = callers
    assert first == second
    assert (other.request_id, other.request_hash != first.request_hash) == ("k", True)
    assert own.request_id not in ("", "k")
    assert own.request_hash == first.request_hash


async def test_a_lost_answer_is_asked_for_again_under_the_same_id(nats: Embedded) -> None:
    config = GatewayConfig(listen="127.0.0.1:0", call_attempt_seconds=0.3, call_total_seconds=5)
    op = operation()
    tries = 0

    async def answer(question: Any, caller: Caller) -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            await asyncio.sleep(10)
        return op

    script = Script()
    script.on(START_VM, answer)
    async with deployed(nats.url, script, config) as gateway:
        answered = await gateway.http.post("/vms/x/start")
        assert answered.status_code == 202
        callers = [caller for subject, _, caller in script.asked if subject == START_VM.subject]
        assert len(callers) == 3
        assert len({caller.request_id for caller in callers}) == 1


async def test_nobody_there(nats: Embedded) -> None:
    config = GatewayConfig(listen="127.0.0.1:0", call_attempt_seconds=0.2, call_total_seconds=0.5)
    async with deployed(nats.url, Script(silent={Owner.STORAGE}), config) as gateway:
        started = time.monotonic()
        answer = await gateway.get("/disks")
        assert answer.status_code in (503, 504)
        assert "storage" in decoded(answer)["detail"]
        assert time.monotonic() - started < 15
        ready = await gateway.http.get(f"{gateway.url}/readyz")
        assert ready.status_code == 503
        assert [name for name, ok in decoded(ready)["services"].items() if not ok] == ["storage"]


async def test_waiting_for_the_end_of_an_operation(gateway: Deployed) -> None:
    op = operation(state=OperationState.RUNNING)
    ended = operation(id=op.id, revision=2, state=OperationState.SUCCEEDED, ended_at=NOW)
    gateway.script.on(START_VM, op)
    gateway.script.on(GET_OPERATION[Owner.INVENTORY], op)
    await facts_of(gateway.bus, Owner.INVENTORY)
    while not any(source.known for source in gateway.feed.sources):
        await asyncio.sleep(0.01)
    waiting = asyncio.create_task(gateway.http.post("/vms/x/start", headers={"prefer": "wait=20"}))
    looking = asyncio.create_task(
        gateway.get(f"/operations/{op.id}", headers={"prefer": "respond-async, wait=20"})
    )
    while not gateway.script.questions(START_VM) or not gateway.script.questions(
        GET_OPERATION[Owner.INVENTORY]
    ):
        await asyncio.sleep(0.01)
    other = operation(state=OperationState.SUCCEEDED, ended_at=NOW)
    subject = "fact.inventory.operation.{}.changed"
    await tell(gateway.bus, 1, subject.format(other.id), other)
    await tell(gateway.bus, 2, subject.format(ended.id), ended)
    for task in (waiting, looking):
        answer = await asyncio.wait_for(task, 5)
        assert answer.status_code == 200
        assert answer.content == encode(ended)
        assert answer.headers["etag"] == '"2"'
        assert answer.headers["preference-applied"] == "wait=20"
    assert waiting.result().headers["location"] == f"/api/v1/operations/{op.id}"


async def test_waiting_gives_up_in_time(gateway: Deployed) -> None:
    gateway.script.on(START_VM, operation())
    started = time.monotonic()
    answer = await gateway.http.post("/vms/x/start", headers={"prefer": "wait=1"})
    assert answer.status_code == 202
    assert 0.9 < time.monotonic() - started < 5


async def test_the_end_that_came_before_the_answer_is_not_missed(gateway: Deployed) -> None:
    op = operation()
    ended = operation(id=op.id, revision=2, state=OperationState.FAILED, ended_at=NOW)
    await facts_of(gateway.bus, Owner.INVENTORY)
    feed = gateway.feed
    while not any(source.live for source in feed.sources):
        await asyncio.sleep(0.01)

    async def start(question: Any, caller: Caller) -> Any:
        await tell(gateway.bus, 1, f"fact.inventory.operation.{op.id}.changed", ended)
        while not feed.next:
            await asyncio.sleep(0.01)
        return op

    gateway.script.on(START_VM, start)
    answer = await asyncio.wait_for(gateway.http.post("/vms/x/start", headers={"prefer": "wait=30"}), 10)
    assert (answer.status_code, decoded(answer)["state"]) == (200, "failed")


async def test_expanding(gateway: Deployed) -> None:
    first, second, gone = (vm(host_id=h, name=h or "none") for h in ("h1", "", "h2"))
    gateway.script.on(
        LIST_VMS, Page(items=tuple(encode_raw(v) for v in (first, second, gone, first)), next="n")
    )
    gateway.script.on(GET_HOST, lambda q, c: {"id": q.id} if q.id == "h1" else None)
    page = decoded(await gateway.get("/vms?expand=host"))
    assert [item["host"] for item in page["items"]] == [{"id": "h1"}, None, None, {"id": "h1"}]
    assert page["next"] == "n"
    assert sorted(q.id for q in gateway.script.questions(GET_HOST)) == ["h1", "h2"]
    gateway.script.on(LIST_CLUSTERS, Page(items=()))
    assert (await gateway.get("/clusters?expand=host")).status_code == 400


def encode_raw(value: Any) -> Any:
    import msgspec

    return msgspec.Raw(encode(value))
