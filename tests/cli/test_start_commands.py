"""`volery vm start` of many VMs: what it asks, and the table of what became of each."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.api_gateway.scripted import Script, deployed, operation
from tests.cli.desk import CLUSTER, DB, HOST, SPREAD, WEB, listed
from tests.cli.test_placing_commands import Desk
from volery.contracts.affinity_group import LIST_AFFINITY_GROUPS
from volery.contracts.base import encode
from volery.contracts.cluster import LIST_CLUSTERS
from volery.contracts.errors import Kind, Problem
from volery.contracts.host import LIST_HOSTS
from volery.contracts.operation import OperationState, Page
from volery.contracts.vm import LIST_VMS, START_VM
from volery.contracts.vm_starts import START_VMS, Became, StartVms, VmStart
from volery.setup.embedded import Embedded

VMS = (
    VmStart(vm_id=WEB.id, name="web1", became=Became.STARTED, host_id=HOST.id, host_name="h1"),
    VmStart(vm_id=DB.id, name="db1", became=Became.REFUSED, message="no host has room"),
)
FAILED = operation(
    state=OperationState.FAILED,
    kind="vm.start_many",
    problem=Problem(kind=Kind.EXHAUSTED, message="1 of 2 VMs run, 1 don't. db1: no host has room"),
    result={"vms": msgspec.to_builtins(VMS)},
)


@pytest.fixture
async def desk(nats: Embedded) -> AsyncIterator[Desk]:
    script = Script()
    script.on(LIST_VMS, listed(WEB, DB))
    script.on(LIST_HOSTS, listed(HOST))
    script.on(LIST_CLUSTERS, listed(CLUSTER))
    script.on(LIST_AFFINITY_GROUPS, Page(items=(msgspec.Raw(encode(SPREAD)),)))
    script.on(START_VMS, FAILED)
    script.on(START_VM, operation(state=OperationState.SUCCEEDED, object_name="web1", kind="vm.start"))
    async with deployed(nats.url, script) as at:
        yield Desk(at.url, script)


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("vm start web1 db1", StartVms(vm_ids=(WEB.id, DB.id))),
        ("vm start web1 db1 --host h1", StartVms(vm_ids=(WEB.id, DB.id), host_id=HOST.id)),
        (f"vm start --group {SPREAD.name}", StartVms(affinity_group_id=SPREAD.id)),
        (
            "vm start --cluster Default --tag night --all-or-nothing",
            StartVms(cluster_id=CLUSTER.id, tag="night", all_or_nothing=True),
        ),
        ("vm start web1 --all-or-nothing", StartVms(vm_ids=(WEB.id,), all_or_nothing=True)),
    ],
)
async def test_many_are_one_question_and_a_table(desk: Desk, line: str, asked: StartVms) -> None:
    shown = await desk.types(line)
    assert desk.script.questions(START_VMS) == [asked]
    assert not desk.script.questions(START_VM)
    assert shown.exit_code == 1  # not all of them run
    for words in (("NAME", "BECAME", "HOST", "NAME", "MESSAGE"), ("web1", "started", "h1", "-")):
        assert " ".join(words) in " ".join(shown.output.split())
    assert "db1 refused - no host has room" in " ".join(shown.output.split())
    assert "1 of 2 VMs run, 1 don't" in shown.output


async def test_programs_get_json(desk: Desk) -> None:
    shown = await desk.types("vm start web1 db1 -o json")
    found = json.loads(shown.stdout)
    assert [each["became"] for each in found["result"]["vms"]] == ["started", "refused"]


async def test_a_rehearsal_is_a_table_too(desk: Desk) -> None:
    desk.script.on(START_VMS, operation(id="", result=FAILED.result))
    shown = await desk.types("vm start web1 --dry-run")
    assert shown.exit_code == 0, shown.output
    assert desk.script.questions(START_VMS) == [StartVms(vm_ids=(WEB.id,), dry_run=True)]
    assert "no host has room" in shown.output


async def test_one_is_started_as_ever(desk: Desk) -> None:
    shown = await desk.types("vm start web1")
    assert shown.exit_code == 0, shown.output
    assert [ask.id for ask in desk.script.questions(START_VM)] == [WEB.id]
    assert not desk.script.questions(START_VMS)


async def test_what_is_for_one_vm_is_refused_for_many(desk: Desk) -> None:
    shown = await desk.types("vm start web1 db1 --paused")
    assert shown.exit_code == 2
    assert "start it by itself" in " ".join(shown.output.split())
