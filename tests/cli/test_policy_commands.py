"""`volery scheduling-policy`: what it asks of the scheduler, and what it prints."""

from __future__ import annotations

import msgspec

from tests.cli.desk import ANSWERS, CLUSTER, EVEN, OWN, Desk
from tests.cli.test_ha_commands import Bad, Row
from volery.contracts import scheduling_policy as c

ROWS = (
    Row("scheduling-policy list", c.LIST_SCHEDULING_POLICIES, {}, ("own", "evenly_distributed", "SELECTOR")),
    Row(
        "scheduling-policy create quiet --without swap --weight memory_even=3 --parameter HighUtilization=60 --selector rank",
        c.CREATE_SCHEDULING_POLICY,
        {
            "name": "quiet",
            "copy_of": EVEN.id,
            "filters": ("cpu",),
            "weights": {"cpu_even": 2.0, "memory_even": 3.0},
            "parameters": {"HighUtilization": 60.0},
            "selector": c.Selector.RANK,
            "balance": msgspec.UNSET,
        },
        ("own",),
    ),
    Row(
        "scheduling-policy create other --copy-of own",
        c.CREATE_SCHEDULING_POLICY,
        {"copy_of": OWN.id, "filters": msgspec.UNSET, "weights": msgspec.UNSET},
    ),
    Row(
        "scheduling-policy edit own --filter cluster_maintenance --without cpu_even --without HighUtilization "
        "--weight guests_even=2 --balance none --name mine",
        c.UPDATE_SCHEDULING_POLICY,
        {
            "id": OWN.id,
            "if_revision": OWN.revision,
            "name": "mine",
            "filters": ("cpu", "swap", "cluster_maintenance"),
            "weights": {"guests_even": 2.0},
            "parameters": {},
            "balance": "none",
            "selector": msgspec.UNSET,
        },
    ),
    Row(
        "scheduling-policy give own Default",
        c.GIVE_SCHEDULING_POLICY,
        {"cluster_id": CLUSTER.id, "policy_id": OWN.id},
    ),
    Row(
        "scheduling-policy take Default",
        c.GIVE_SCHEDULING_POLICY,
        {"cluster_id": CLUSTER.id, "policy_id": ""},
    ),
    Row("scheduling-policy of Default", c.GET_CLUSTERS_POLICY, {"id": CLUSTER.id}, ("own",)),
    Row(
        "scheduling-policy balance Default",
        c.GET_CLUSTER_BALANCE,
        {"id": CLUSTER.id},
        ("power_saving of scheduling policy own (revision 7)", "little"),
    ),
    Row(
        "scheduling-policy units",
        c.LIST_POLICY_UNITS,
        {},
        ("excludes a host that has too little", "no: a claim needs it"),
    ),
    Row("scheduling-policy units -o json", c.LIST_POLICY_UNITS, {}, ('"mandatory": "a claim needs it"',)),
    Row("scheduling-policy delete own", c.DELETE_SCHEDULING_POLICY, {"id": OWN.id}, ("deleted",)),
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


BAD = (
    Bad("scheduling-policy create x --weight cpu_even", "write NAME=NUMBER"),
    Bad("scheduling-policy edit own --parameter HighUtilization=much", "write NAME=NUMBER"),
    Bad("scheduling-policy edit own --without smell", "own has no such filter, weight or parameter"),
    Bad("scheduling-policy create x --copy-of nobody", "nobody"),
    Bad("scheduling-policy create x --selector dice", "dice", status=2),
    Bad("scheduling-policy give own Nowhere", "Nowhere"),
)


async def test_what_can_not_be_meant_is_said_and_asked_of_nobody(desk: Desk) -> None:
    mutating = [call for call in ANSWERS if call.mutates]
    for bad in BAD:
        desk.at.script.asked.clear()
        result = await desk.types(bad.line)
        assert (result.exit_code, bad.words in result.output) == (bad.status, True), (bad, result.output)
        assert [call for call in mutating if desk.at.script.questions(call)] == [], bad
