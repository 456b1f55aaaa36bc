"""Every row of the table: the right call with the path's fields, the right status, documented."""

from __future__ import annotations

import pytest

from api_gateway.route import Route
from api_gateway.routes import TABLE
from tests.api_gateway.samples import answer_of, body_of, path_of
from tests.api_gateway.scripted import Deployed
from volery.contracts.base import Call

ROUTES = [row for row in TABLE if isinstance(row, Route)]
INTERNAL = {
    # What services ask each other; people have no business with these.
    "inventory.token.check",
    "inventory.token.login",  # /sessions
    "inventory.vm.restart",
    "inventory.vm.needs",
    "inventory.vm.resize_disk",
    "inventory.vm.switch_disks",
    "inventory.vm.open_console",  # a WebSocket
    "inventory.host.enrol",
    "inventory.host.renew_certificate",
    "scheduler.place",
    "scheduler.place_many",
    "scheduler.room.find",
    "scheduler.promise.admit",
    "scheduler.claim.confirm",
    "scheduler.claim.release",
    "scheduler.claim.release_vm",
    "storage.transfer.endpoint",
    "storage.disk.attach",
    "storage.disk.detach",
    "storage.disk.prepare",
    "storage.disk.reach",
    "storage.disk.reach_of_many",
    "storage.snapshot.create",  # /snapshots ask inventory
    "storage.snapshot.forget",
    "storage.snapshot.revert",
    "storage.lease.prepare",
    "storage.lease.release",
    "storage.lease.read_host",
    "storage.lease.find_proofs",
    "ha.power.down",  # /hosts/{id}/save-power and /wake ask inventory
    "ha.power.up",
    "network.nic.allocate",
    "network.nic.release",
    "network.host.prepare",
}


async def test_every_row_asks_its_call_and_answers_its_status(gateway: Deployed) -> None:
    for route in ROUTES:
        gateway.script.on(route.call, answer_of(route))
        query = {name: "host" if name == "noun" else "x1" for name in route.query if name in ("noun", "id")}
        answer = await gateway.http.request(route.method, path_of(route), json=body_of(route), params=query)
        assert answer.status_code == route.success, f"{route.method} {route.path}: {answer.text}"
        asked = gateway.script.questions(route.call)[-1]
        for name in route.names:
            field = route.renamed.get(name, name)
            value = asked.filter[field] if route.lists else getattr(asked, field)
            assert value == f"p-{name}"
        for field, value in route.fixed.items():
            assert getattr(asked, field) == value


async def test_every_mutation_carries_a_request_id_and_the_principal(gateway: Deployed) -> None:
    for route in ROUTES:
        gateway.script.on(route.call, answer_of(route))
        headers = {"idempotency-key": "key-1"}
        await gateway.http.request(route.method, path_of(route), json=body_of(route), headers=headers)
        asked = [(s, c) for s, _, c in gateway.script.asked if s == route.call.subject]
        if not asked:
            continue  # it needs query parameters
        caller = asked[-1][1]
        assert caller.principal.startswith("user:")
        assert caller.request_id == ("key-1" if route.call.mutates else "")


def test_every_call_for_people_has_an_endpoint() -> None:
    from tests.api_gateway.scripted import all_calls

    def is_served(call: Call) -> bool:
        special = any(
            part in call.subject for part in (".operation.", ".health.", ".quarantine.", ".stream.")
        )
        return call.subject in INTERNAL or special or call.owner.startswith("host")

    served = {route.call.subject for route in ROUTES}
    missing = [call.subject for call in all_calls() if call.subject not in served and not is_served(call)]
    assert missing == []
    assert INTERNAL.isdisjoint(served)


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path}")
def test_names_of_the_table_exist_in_the_contract(route: Route) -> None:
    known = route.question_fields
    assert set(route.fixed) | set(route.query) | set(route.hidden) <= known or route.lists
    if not route.lists:
        assert {route.renamed.get(name, name) for name in route.names} <= known
    assert route.items is not None or not route.lists
