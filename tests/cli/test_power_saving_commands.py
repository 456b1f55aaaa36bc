"""`volery host save-power`, `host wake` and plans that save power: what they ask."""

from __future__ import annotations

from tests.cli.desk import CLUSTER, HOST, Desk, operation
from volery.contracts import host as h
from volery.contracts import plan as n
from volery.contracts.operation import OperationState


async def test_a_host_is_put_to_sleep_and_woken(desk: Desk) -> None:
    done = operation(state=OperationState.SUCCEEDED, object_name="h1", kind="host.save_power")
    for call in (h.SAVE_POWER, h.WAKE_HOST):
        desk.at.script.on(call, done)
    result = await desk.types("host save-power h1 --reason night")
    assert result.exit_code == 0, (result.output, result.exception)
    (asked,) = desk.at.script.questions(h.SAVE_POWER)
    assert (asked.id, asked.reason, asked.dry_run, asked.empty_only) == (HOST.id, "night", False, False)
    result = await desk.types("host wake h1")
    assert result.exit_code == 0, (result.output, result.exception)
    (woken,) = desk.at.script.questions(h.WAKE_HOST)
    assert woken.id == HOST.id


async def test_a_plan_names_what_sleeps_or_wakes(desk: Desk) -> None:
    result = await desk.types("plan make Default --kind saving --wake h1 --dry-run")
    assert result.exit_code == 0, (result.output, result.exception)
    (asked,) = desk.at.script.questions(n.MAKE_PLAN)
    assert (asked.cluster_id, asked.kind) == (CLUSTER.id, n.PlanKind.SAVING)
    assert (asked.host_ids, asked.wake_host_ids) == ((), (HOST.id,))
