"""`volery explain` and `volery decision`: what they ask, and the table that a person reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from tests.api_gateway.scripted import Script, deployed, entity, operation, vm
from volery.cli.main import app
from volery.contracts.base import encode
from volery.contracts.host import LIST_HOSTS, Host
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery, Page
from volery.contracts.scheduling import (
    GET_DECISION,
    LIST_CAPACITY,
    LIST_DECISIONS,
    Change,
    ChangeKind,
    HostCapacity,
    HostVerdict,
    PastDecision,
    Placement,
    Remedy,
    Verdict,
)
from volery.contracts.vm import LIST_VMS, START_VM
from volery.setup.embedded import Embedded

WEB = vm(name="web1")
HOST = Host(**entity(name="h1", cluster_id=new_id(), data_center_id=new_id()))
REFUSED = Placement(
    vm_id=WEB.id,
    epoch=2,
    message="no host of cluster Default can take VM web1. h1: too full [93 %]",
    decision_id="d1",
    considered=30,
    excluded_by={"memory": 30, "network": 2},
    hosts=(
        HostVerdict(
            host_id=HOST.id,
            name="h1",
            verdicts=(
                Verdict(rule="memory", passed=False, message="h1 has 1 GiB left"),
                Verdict(rule="network", passed=False, message="lan is not ready"),
            ),
        ),
    ),
    remedies=(
        Remedy(
            kind=ChangeKind.MIXED,
            host_id=HOST.id,
            host_name="h1",
            changes=(
                Change(
                    rules=("memory",), kind=ChangeKind.HOST, object_kind="host", object_id=HOST.id,
                    field="memory_used_bytes", current=5, wanted=3, amount=2, unit="bytes", sentence="free 2 bytes",
                ),
            ),
            sentence="free 2 bytes and attach lan",
        ),
    ),
)  # fmt: skip
CHOSEN = Placement(
    vm_id=WEB.id,
    epoch=1,
    host_id=HOST.id,
    message="VM web1 is placed on h1, the best of 2 that fit",
    considered=2,
    fitting=2,
    hosts=(
        HostVerdict(
            host_id=HOST.id, name="h1", fits=True, weight=2.5, weights={"cpu_even": 2.0, "memory_even": 0.5}
        ),
        HostVerdict(host_id="other", name="h2", fits=True, weight=2.0, weights={"cpu_even": 2.0}),
    ),
)
PAST = PastDecision(**entity(vm_id=WEB.id, vm_name="web1", host_id=HOST.id, host_name="h1", message="chosen"))

LESS = HostCapacity(
    host_id=HOST.id, name="h1", cluster_id=HOST.cluster_id, memory_bytes=1 << 30, memory_used_bytes=2 << 30, vcpus_limit=8,
    vcpus_used=1, schedulable=True, problem="h1 has promised more than it has",
)  # fmt: skip


def listed(*entities: Any) -> Any:
    def answer(question: ListQuery, caller: object) -> Page:
        return Page(items=tuple(msgspec.Raw(encode(e)) for e in entities))

    return answer


class Desk:
    def __init__(self, url: str, script: Script) -> None:
        self.script, self.url, self.token = script, url, script.token()

    async def types(self, line: str) -> Result:
        environment = {"VOLERY_CLI_URL": self.url, "VOLERY_CLI_TOKEN": self.token, "COLUMNS": "300"}
        return await asyncio.to_thread(CliRunner().invoke, app, line.split(), env=environment)


@pytest.fixture
async def desk(nats: Embedded) -> AsyncIterator[Desk]:
    script = Script()
    script.on(LIST_VMS, listed(WEB))
    script.on(LIST_HOSTS, listed(HOST))
    script.on(START_VM, operation(id="", result={"placement": REFUSED}))
    script.on(GET_DECISION, CHOSEN)
    script.on(LIST_DECISIONS, listed(PAST))
    script.on(LIST_CAPACITY, listed(LESS))
    async with deployed(nats.url, script) as at:
        yield Desk(at.url, script)


async def test_a_refusal_is_a_table_of_hosts_and_one_of_what_would_help(desk: Desk) -> None:
    for line in ("explain web1 --host h1", "vm explain web1 --host h1"):
        shown = await desk.types(line)
        assert shown.exit_code == 0, shown.output
        asked = desk.script.questions(START_VM)[-1]
        assert (asked.id, asked.host_id, asked.dry_run) == (WEB.id, HOST.id, True)
        words = shown.output.split()
        assert REFUSED.message.split()[:4] == words[:4]
        assert "[93 %]" in shown.output
        for said in (
            "memory: h1 has 1 GiB left",
            "network: lan is not ready",
            "free 2 bytes and attach lan",
            "mixed",
        ):
            assert said in shown.output
        assert "29 more hosts; of all 30, excluded by: memory 30, network 2" in shown.output
    raw = await desk.types("explain web1 -o json")
    assert desk.script.questions(START_VM)[-1].host_id == ""
    assert '"wanted": 3' in raw.output


async def test_a_past_decision_says_why_this_host(desk: Desk) -> None:
    shown = await desk.types("decision show d1")
    assert shown.exit_code == 0, shown.output
    assert desk.script.questions(GET_DECISION)[-1].id == "d1"
    for said in ("h1 *", "2.500", "cpu_even 2, memory_even 0.5", "h2", "2.000"):
        assert said in shown.output
    assert "WHAT WOULD HELP" not in shown.output


async def test_past_decisions_are_listed_by_vm_and_host(desk: Desk) -> None:
    shown = await desk.types("decision list --vm web1 --host h1")
    assert shown.exit_code == 0, shown.output
    assert desk.script.questions(LIST_DECISIONS)[-1].filter == {"vm_id": WEB.id, "host_id": HOST.id}
    assert "chosen" in shown.output
    assert (await desk.types("decision list -o json")).output.count('"vm_name": "web1"') == 1
    assert desk.script.questions(LIST_DECISIONS)[-1].filter == {}


async def test_what_hosts_have_left_is_a_table_with_those_that_promised_too_much(desk: Desk) -> None:
    shown = await desk.types("host capacity")
    assert shown.exit_code == 0, shown.output
    assert "h1 has promised more than it has" in shown.output
    assert '"memory_used_bytes": 2147483648' in (await desk.types("host capacity -o json")).output
