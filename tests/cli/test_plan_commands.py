"""`volery plan` and `volery cluster balance`: what they ask of the scheduler, and what they print."""

from __future__ import annotations

from tests.cli.desk import CLUSTER, HOST, MOVES, Desk
from tests.cli.test_ha_commands import Bad, Row
from volery.contracts import plan as n

SHOWN = ("balance: moves 1 VM away from 1 host", "web1", "h2", "it is pinned")
ROWS = (
    Row("plan list", n.LIST_PLANS, {}, ("moves 1 VM", "running")),
    Row(
        "plan list --cluster Default --running",
        n.LIST_PLANS,
        {"filter": {"cluster_id": CLUSTER.id, "state": "running"}},
    ),
    Row(f"plan show {MOVES.id}", n.GET_PLAN, {"id": MOVES.id}, SHOWN),
    Row(f"plan cancel {MOVES.id}", n.CANCEL_PLAN, {"id": MOVES.id}),
    Row(
        "cluster balance Default --dry-run",
        n.MAKE_PLAN,
        {"cluster_id": CLUSTER.id, "kind": n.PlanKind.BALANCE, "dry_run": True},
        SHOWN,
    ),
    Row(
        "plan make Default --kind evacuation --host h1 --dry-run",
        n.MAKE_PLAN,
        {"cluster_id": CLUSTER.id, "kind": n.PlanKind.EVACUATION, "host_ids": (HOST.id,), "dry_run": True},
        SHOWN,
    ),
    Row("plan make Default --most-moves 3 --dry-run", n.MAKE_PLAN, {"most_moves": 3}, SHOWN),
)
BAD = (
    Bad("plan make Nowhere", "Nowhere"),
    Bad("plan make Default --kind dance", "dance", status=2),
    Bad("plan make Default --kind evacuation --host nobody", "nobody"),
)


async def test_every_command_asks_what_its_line_says(desk: Desk) -> None:
    for row in ROWS:
        desk.at.script.asked.clear()
        result = await desk.types(row.line)
        assert result.exit_code == 0, (row.line, result.output, result.exception)
        (question,) = desk.at.script.questions(row.call)[-1:]
        assert {name: getattr(question, name) for name in row.fields} == row.fields, row.line
        for words in row.words:
            assert words in result.output, (row.line, result.output)


async def test_what_can_not_be_meant_is_said_and_asked_of_nobody(desk: Desk) -> None:
    for bad in BAD:
        desk.at.script.asked.clear()
        result = await desk.types(bad.line)
        assert (result.exit_code, bad.words in result.output) == (bad.status, True), (bad, result.output)
        assert desk.at.script.questions(n.MAKE_PLAN) == [], bad
