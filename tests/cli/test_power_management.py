"""`volery host power-management`: what isn't named stays as it is, and what can't be kept is said."""

from __future__ import annotations

from typing import Any

import msgspec

from tests.cli.desk import (
    HOST,
    POWER,
    SET,
    Desk,
    device,
)
from volery.contracts import power as p
from volery.contracts.errors import not_found
from volery.contracts.fencing import FenceDevice

DUMPS = msgspec.structs.replace(
    POWER,
    enabled=False,
    together=True,
    devices=(
        FenceDevice(agent="fence_redfish", address="bmc1", username="u", options={"ssl_insecure": "1"}),
    ),
    kdump_addresses=("10.0.8.7",),
    kdump_proves=True,
)
SAME = device(username="u", options={"ssl_insecure": "1"}, secrets=msgspec.UNSET)
KEPT = (
    ("--username v --keep-password", {"devices": (msgspec.structs.replace(SAME, username="v"),)}, ""),
    (
        "--port 8443",
        {"devices": (msgspec.structs.replace(SAME, port=8443, secrets={"password": "pw"}),)},
        "pw\n",
    ),
    ("--option a=b", {"devices": (msgspec.structs.replace(SAME, options={"a": "b"}),)}, ""),
    ("--option none", {"devices": (msgspec.structs.replace(SAME, options={}),)}, ""),
    (
        "--agent fence_ipmilan --keep-password",
        {"devices": (device(agent="fence_ipmilan", username="u", secrets=msgspec.UNSET),)},
        "",
    ),
    (
        "--agent fence_redfish --address bmc2 --keep-password",
        {"devices": (msgspec.structs.replace(SAME, address="bmc2"),)},
        "",
    ),
    ("--enabled", {"enabled": True}, ""),
    ("--no-kdump-proves", {"kdump_proves": False}, ""),
    ("--kdump-address none", {"kdump_addresses": (), "kdump_proves": False}, ""),
    ("--kdump-address 10.0.8.8 --kdump-proves", {"kdump_addresses": ("10.0.8.8",)}, ""),
    ("--file -", {"together": False}, '{"together": false}'),
)


async def test_what_is_not_named_of_power_management_stays_as_it_is(desk: Desk) -> None:
    desk.at.script.on(p.GET_POWER_MANAGEMENT, DUMPS)
    all_of_it = {
        "id": HOST.id,
        "devices": (SAME,),
        "if_revision": DUMPS.revision,
        "enabled": False,
        "together": True,
        "kdump_addresses": ("10.0.8.7",),
        "kdump_proves": True,
    }
    for line, named, stdin in KEPT:
        desk.at.script.asked.clear()
        result = await desk.types(f"host power-management set h1 {line}", stdin)
        assert result.exit_code == 0, (line, result.output, result.exception)
        (question,) = desk.at.script.questions(p.SET_POWER_MANAGEMENT)
        assert question == p.SetPowerManagement(**all_of_it | named), line


async def test_power_management_that_can_not_be_kept_is_said(desk: Desk) -> None:
    two = msgspec.structs.replace(
        POWER, devices=(*POWER.devices, FenceDevice(agent="fence_ipmilan", address="b"))
    )

    def nothing(ask: Any, caller: Any) -> p.PowerManagement:
        raise not_found("power management", HOST.id)

    bad: tuple[tuple[Any, str, str], ...] = (
        (DUMPS, "--kdump-address 10.0.8.8", "say of the new ones, too"),
        (two, "--port 8443", "it has 2 devices"),
        (nothing, "--agent fence_redfish", "name --agent and --address"),
        (nothing, "--kdump-address 10.0.8.7", "name --agent and --address"),
    )
    for known, line, words in bad:
        desk.at.script.on(p.GET_POWER_MANAGEMENT, known)
        result = await desk.types(f"host power-management set h1 {line}")
        assert (result.exit_code, words in " ".join(result.output.split())) == (1, True), (
            line,
            result.output,
        )
        assert desk.at.script.questions(p.SET_POWER_MANAGEMENT) == []
    desk.at.script.on(p.GET_POWER_MANAGEMENT, nothing)
    result = await desk.types(f"{SET} --keep-password")
    assert result.exit_code == 0, (result.output, result.exception)
    (question,) = desk.at.script.questions(p.SET_POWER_MANAGEMENT)
    assert (question.devices, question.if_revision) == ((device(secrets=msgspec.UNSET),), 0)


async def test_a_test_that_failed_is_shown_and_ends_so(desk: Desk) -> None:
    failed = msgspec.structs.replace(POWER, test_passed=False, test_words="no route to bmc1")
    desk.at.script.on(p.TEST_POWER_MANAGEMENT, failed)
    result = await desk.types("host power-management test h1")
    assert (result.exit_code, "no route to bmc1" in result.output) == (1, True), result.output
