"""`volery vm snapshot`: what it asks, by names of VMs, disks and snapshots."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.api_gateway.samples import sample
from tests.api_gateway.scripted import Script, deployed, operation
from tests.cli.desk import WEB, listed
from tests.cli.test_placing_commands import Desk
from volery.contracts.cluster import DeleteById
from volery.contracts.operation import OperationState
from volery.contracts.snapshot import (
    CREATE_SNAPSHOT,
    DELETE_SNAPSHOT,
    LIST_SNAPSHOTS,
    REVERT_TO_SNAPSHOT,
    CreateSnapshot,
    RevertToSnapshot,
    Snapshot,
)
from volery.contracts.vm import LIST_VMS
from volery.setup.embedded import Embedded

FIRST = msgspec.structs.replace(sample(Snapshot), name="first", vm_id=WEB.id, configuration=None)
DONE = operation(state=OperationState.SUCCEEDED, object_name="web1", kind="vm.snapshot")


@pytest.fixture
async def desk(nats: Embedded) -> AsyncIterator[Desk]:
    script = Script()
    script.on(LIST_VMS, listed(WEB))
    script.on(LIST_SNAPSHOTS, listed(FIRST))
    for call in (CREATE_SNAPSHOT, DELETE_SNAPSHOT, REVERT_TO_SNAPSHOT):
        script.on(call, DONE)
    async with deployed(nats.url, script) as at:
        yield Desk(at.url, script)


async def test_each_command_asks_its_question(desk: Desk) -> None:
    for line, call, asked in (
        (
            "vm snapshot create web1 first --description nightly",
            CREATE_SNAPSHOT,
            CreateSnapshot(vm_id=WEB.id, name="first", description="nightly"),
        ),
        ("vm snapshot delete web1 first", DELETE_SNAPSHOT, DeleteById(id=FIRST.id)),
        ("vm snapshot revert web1 first", REVERT_TO_SNAPSHOT, RevertToSnapshot(id=FIRST.id)),
    ):
        shown = await desk.types(line)
        assert shown.exit_code == 0, shown.output
        assert desk.script.questions(call) == [asked]
    for line in ("vm snapshot list web1", "vm snapshot show web1 first"):
        shown = await desk.types(line)
        assert "first" in shown.output
    filters = [ask.filter for ask in desk.script.questions(LIST_SNAPSHOTS)]
    assert {"vm_id": WEB.id, "name": "first"} in filters
    assert {"vm_id": WEB.id} in filters
