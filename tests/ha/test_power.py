"""Power management as an administrator sets, tests and uses it; what is wrong with it is refused or said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.ha.bmcs import AGENT, PASSWORD
from tests.ha.site import Site, caller, site, uuid
from volery.contracts.cluster import DeleteById
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import PowerAction, PowerState
from volery.contracts.power import (
    DELETE_POWER_MANAGEMENT,
    PAUSE_FENCING,
    SWITCH_POWER,
    TEST_POWER_MANAGEMENT,
    FencingScope,
    Identity,
    NewFenceDevice,
    PauseFencing,
    SwitchPower,
    TestPowerManagement,
)
from volery.runtime.programs import Settings


async def test_power_by_hand_is_confirmed_quiet_and_remembered(configured: Settings, tmp_path: Path) -> None:
    async with site(configured, tmp_path) as at:
        off = SwitchPower(id=at.hosts[0].id, action=PowerAction.OFF)
        read = SwitchPower(id=at.hosts[0].id, action=PowerAction.STATUS)
        assert (await at.bus.ask(SWITCH_POWER, read, caller("read"))).state is PowerState.ON
        with pytest.raises(Refused, match="type the host's name, h0"):
            await at.bus.ask(SWITCH_POWER, off, caller("off"))
        done = await at.bus.ask(SWITCH_POWER, replace(off, confirm="h0"), caller("off"))
        assert done.state is PowerState.OFF
        with pytest.raises(Refused, match="between two switches 180 s pass"):
            await at.bus.ask(SWITCH_POWER, replace(off, action=PowerAction.ON), caller("on"))
        [record] = await at.records()
        assert (record.requested_by, record.state) == ("user:ann", "succeeded")
        at.hearts[0].stop()
        assert (await at.becomes(0, "dead")).proof is not None


async def test_power_management_is_tested_and_says_what_is_wrong(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path) as at:
        ask = TestPowerManagement(id=at.hosts[0].id)
        found = await at.bus.ask(TEST_POWER_MANAGEMENT, ask, caller("test"))
        assert (found.test_passed, found.identity, found.power) == (True, Identity.CHECKED, PowerState.ON)
        at.bmc(0).answers = False
        found = await at.bus.ask(TEST_POWER_MANAGEMENT, ask, caller("test"))
        assert not found.test_passed
        assert "connection timed out" in found.test_words
        at.bmc(0).answers, at.bmc(0).identity = True, uuid(7)
        found = await at.bus.ask(TEST_POWER_MANAGEMENT, ask, caller("test"))
        assert found.identity is Identity.MISMATCH
        assert uuid(7) in found.test_words
        await at.bus.ask(DELETE_POWER_MANAGEMENT, DeleteById(id=at.hosts[0].id), caller("delete"))
        with pytest.raises(Refused):
            await at.power(0)
        await bad_power_management_is_refused_with_a_sentence(at)


async def bad_power_management_is_refused_with_a_sentence(at: Site) -> None:
    def device(**fields: Any) -> NewFenceDevice:
        return NewFenceDevice(
            **({"agent": AGENT, "address": "bmc0", "secrets": {"password": PASSWORD}} | fields)
        )

    for devices, words in [
        ([device(agent="rm -rf")], "isn't a fence agent's name"),
        ([device(agent="fence_dummy")], "proves nothing"),
        (
            [device(agent="fence_scriptd")],
            "no host of the cluster has fence_scriptd: did you mean fence_scripted",
        ),
        ([device(address="http://bmc0/")], "neither a host name nor an IP address"),
        ([device(port=70000)], "port 70000"),
        ([device(timeout_seconds=600)], "an action may take"),
        ([device(), device()], "two devices are the same"),
        ([], "1 to 8 devices"),
        ([device(agent="fence_redfish", options={"sssl": "1"})], "no option"),
        ([device(agent="fence_apc", username="u")], "needs plug"),
    ]:
        with pytest.raises(Refused, match=words) as refused:
            await at.set_power(0, devices=tuple(devices))
        assert refused.value.kind is Kind.INVALID
    for wrong in ({"scope": FencingScope.HOST}, {"seconds": 8 * 86400.0}, {"object_id": "x"}):
        with pytest.raises(Refused):
            await at.bus.ask(PAUSE_FENCING, PauseFencing(**wrong), caller("pause"))  # type: ignore[arg-type]
