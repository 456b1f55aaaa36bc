"""Requests become questions, answers pass through as they are, refusals become problems."""

from __future__ import annotations

from tests.api_gateway.scripted import Deployed, decoded, operation, vm
from volery.contracts.base import encode
from volery.contracts.errors import Kind, Refused
from volery.contracts.operation import Page
from volery.contracts.vm import CREATE_VM, GET_VM, LIST_VMS, START_VM, UPDATE_VM


async def test_get_passes_the_owners_bytes_on_with_the_revision_as_etag(gateway: Deployed) -> None:
    found = vm(revision=7)
    gateway.script.on(GET_VM, found)
    answer = await gateway.get(f"/vms/{found.id}")
    assert answer.status_code == 200
    assert answer.content == encode(found)
    assert answer.headers["etag"] == '"7"'
    assert gateway.script.questions(GET_VM)[0].id == found.id
    again = await gateway.get(f"/vms/{found.id}", headers={"if-none-match": '"7"'})
    assert (again.status_code, again.content) == (304, b"")
    head = await gateway.http.head(f"/vms/{found.id}")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", '"7"')


async def test_refusals_become_problems(gateway: Deployed) -> None:
    gateway.script.on(
        GET_VM, lambda q, c: (_ for _ in ()).throw(Refused(Kind.CONFLICT, "no, because", limit=3))
    )
    answer = await gateway.get("/vms/x1")
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    problem = decoded(answer)
    assert problem["type"] == "https://volery.dev/problems/conflict"
    assert problem["detail"] == "no, because"
    assert problem["instance"] == "/api/v1/vms/x1"
    assert problem["limit"] == 3


async def test_what_takes_time_answers_202_and_where_to_look(gateway: Deployed) -> None:
    op = operation()
    gateway.script.on(START_VM, op)
    answer = await gateway.http.post(f"/vms/{op.object_id}/start", json={"host_id": "h"})
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/api/v1/operations/{op.id}"
    assert answer.content == encode(op)
    asked = gateway.script.questions(START_VM)[0]
    assert (asked.id, asked.host_id, asked.dry_run) == (op.object_id, "h", False)
    planned = await gateway.http.post(f"/vms/{op.object_id}/start?dry_run=true")
    assert planned.status_code == 200
    assert "location" not in planned.headers
    assert gateway.script.questions(START_VM)[1].dry_run


async def test_lists(gateway: Deployed) -> None:
    gateway.script.on(LIST_VMS, Page(items=(), next="abc"))
    answer = await gateway.get(
        "/vms?limit=5&page=xyz&order_by=-name&search=we&fields=id,name&filter.status=up&filter.host_id=h1"
    )
    assert answer.status_code == 200
    assert answer.headers["link"].endswith(
        'page=abc&order_by=-name&search=we&fields=id%2Cname&filter.status=up&filter.host_id=h1>; rel="next"'
    )
    asked = gateway.script.questions(LIST_VMS)[0]
    assert (asked.limit, asked.page, asked.order_by, asked.search) == (5, "xyz", "-name", "we")
    assert asked.fields == ("id", "name")
    assert asked.filter == {"status": "up", "host_id": "h1"}


async def test_a_body_that_does_not_fit_is_pointed_at(gateway: Deployed) -> None:
    body = {"name": "a", "cluster_id": "c", "memory_bytes": 1, "disks": [{"size_bytes": 1}, {"sizebytes": 1}]}
    answer = await gateway.http.post("/vms", json=body)
    assert answer.status_code == 400
    assert decoded(answer)["pointer"] == "/disks/1/sizebytes"
    body = {"name": "a", "cluster_id": "c", "memory_bytes": 2**64}
    assert decoded(await gateway.http.post("/vms", json=body))["pointer"] == "/memory_bytes"
    body = {"name": "a\0b", "cluster_id": "c", "memory_bytes": 1}
    assert decoded(await gateway.http.post("/vms", json=body))["pointer"] == "/name"
    missing = await gateway.http.post("/vms", json={"name": "a"})
    assert decoded(missing)["pointer"] == "/cluster_id"
    assert not gateway.script.questions(CREATE_VM)


async def test_if_match_becomes_if_revision(gateway: Deployed) -> None:
    gateway.script.on(UPDATE_VM, vm(revision=4))
    answer = await gateway.http.patch("/vms/v1", json={"vcpus": 2}, headers={"if-match": '"3"'})
    assert answer.status_code == 200
    asked = gateway.script.questions(UPDATE_VM)[0]
    assert (asked.id, asked.if_revision, asked.vcpus) == ("v1", 3, 2)
    bad = await gateway.http.patch("/vms/v1", json={}, headers={"if-match": "3"})
    assert bad.status_code == 400
