"""Why a host is not switched off to save power: the table, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.ha.policies.fencing import Power
from services.ha.policies.power_saving import REASONS, Tired, refusal, uncertain_seconds
from volery.contracts.liveness import LivenessState
from volery.contracts.power import Identity

ABLE = Power(enabled=True, identity=Identity.CHECKED)
TIRED = Tired(
    name="h1", state=LivenessState.UP, boot_id="b1", wanted_boot_id="b1", power=ABLE, power_tested=True
)
CASES: dict[str, tuple[Tired, str]] = {
    "no_power_management": (replace(TIRED, power=None, power_tested=False), "nobody could wake it"),
    "power_management_off": (replace(TIRED, power=replace(ABLE, enabled=False)), "is switched off"),
    "identity": (replace(TIRED, power=replace(ABLE, identity=Identity.UNCHECKED)), "its BMC is its own"),
    "untested": (replace(TIRED, power_tested=False), "test it again"),
    "no_executor": (replace(TIRED, power=replace(ABLE, executor=False)), "can run its fence agent"),
    "ours": (replace(TIRED, ours=True), "ha itself runs on it"),
    "quarantine": (replace(TIRED, quarantine="h2 has not reported"), "h2 has not reported"),
    "paused": (replace(TIRED, paused="until noon"), "paused until noon"),
    "cut_off": (replace(TIRED, cut_off=True), "it may be ha that is cut off"),
    "silent_hosts": (replace(TIRED, silent_hosts=2), "2 other hosts"),
    "silent": (replace(TIRED, state=LivenessState.CONNECTING), "it is connecting"),
    "boot": (replace(TIRED, boot_id="b2"), "it has rebooted"),
    "vms": (replace(TIRED, vms=3), "3 VMs may still run on it"),
}


def test_every_row_has_its_case() -> None:
    assert list(CASES) == [reason.rule for reason in REASONS]
    assert refusal(TIRED) == ("", "")


@pytest.mark.parametrize("rule", CASES)
def test_each_reason_keeps_it_up_and_says_so(rule: str) -> None:
    tired, words = CASES[rule]
    found, sentence = refusal(tired)
    assert found == rule
    assert sentence.startswith("host h1 is not switched off: ")
    assert words in sentence


def test_what_is_only_asked_beforehand_looks_neither_at_the_boot_nor_at_vms() -> None:
    assert refusal(replace(TIRED, wanted_boot_id="", boot_id="b2", vms=3)) == ("", "")


def test_an_order_may_come_true_as_long_as_the_slowest_device_may_take() -> None:
    assert uncertain_seconds([2.0, 60.0]) == 65.0
