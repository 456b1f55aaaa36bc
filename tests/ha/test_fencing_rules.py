"""When a silent host is read, left alone, switched off and on again: the table, row by row, and the brake."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ha.config import HaConfig
from services.ha.policies import power as power_rules
from services.ha.policies.evidence import Lease
from services.ha.policies.fencing import (
    HOLDS,
    Act,
    Power,
    Record,
    Silent,
    brake_limit,
    decide,
    is_lease_alive,
    is_majority,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import FenceDevice, PowerAction, PowerAnswer, PowerState
from volery.contracts.host import HostStatus
from volery.contracts.liveness import LivenessState
from volery.contracts.power import FenceState, FencingPolicy, Identity, NewFenceDevice
from volery.runtime.config import ConfigError, read

CONFIG = HaConfig()
NOW = datetime.now(UTC)
ON, OFF, DOUBT = PowerState.ON, PowerState.OFF, PowerState.UNKNOWN
READ_ON = Power(enabled=True, identity=Identity.CHECKED, state=ON, read_age=1.0)
SILENT = Silent(
    name="h1",
    status=HostStatus.NON_RESPONSIVE,
    state=LivenessState.NON_RESPONSIVE,
    suspected=True,
    boot_id="boot-1",
    silence=61.0,
    power=READ_ON,
    protected_vms=1,
)
OFF_ONCE = Record(FenceState.RUNNING, "boot-1", offs=1, last_off_age=3.0)


def dead_and_fenced(proven_age: float, *, executor: bool = True, last_on_age: float = float("inf")) -> Silent:
    record = replace(OFF_ONCE, proven_age=proven_age, last_on_age=last_on_age)
    power = replace(READ_ON, executor=executor)
    return replace(SILENT, state=LivenessState.DEAD, record=record, power=power)


SPARE_LEASED = FencingPolicy(id="c", revision=1, created_at=NOW, updated_at=NOW, skip_while_lease_alive=True)
SPARE_ANSWERING = msgspec.structs.replace(
    SPARE_LEASED, skip_while_lease_alive=False, skip_while_peers_answer=True
)
BROKEN_50 = msgspec.structs.replace(
    SPARE_LEASED, skip_while_lease_alive=False, skip_if_connectivity_broken=True
)


def with_power(**fields: object) -> Silent:
    return replace(SILENT, power=replace(READ_ON, **fields))  # type: ignore[arg-type]


def test_a_host_that_was_silent_for_long_enough_is_ordered_off() -> None:
    assert decide(SILENT, CONFIG).act is Act.POWER_OFF


HELD = [
    ("no_boot", replace(SILENT, boot_id="")),
    ("no_power_management", replace(SILENT, power=None)),
    ("power_management_off", with_power(enabled=False)),
    ("paused", replace(SILENT, paused="until 12:00 UTC by ann: switch replaced")),
    ("maintenance", replace(SILENT, status=HostStatus.MAINTENANCE)),
    ("preparing", replace(SILENT, status=HostStatus.PREPARING_FOR_MAINTENANCE, protected_vms=0)),
    ("installing", replace(SILENT, status=HostStatus.INSTALLING)),
    ("switched", replace(SILENT, switched_age=599.0)),
    ("leaving", replace(SILENT, leaving_age=599.0, protected_vms=0)),
    ("quarantine", replace(SILENT, quarantine="2 hosts have not reported")),
    ("ours", replace(SILENT, ours=True)),
    ("cut_off", replace(SILENT, cut_off=True)),
    ("storm", replace(SILENT, storm=True)),
    ("start", replace(SILENT, leading=299.0)),
    ("dumping", replace(SILENT, dump="it crashed")),
    ("connectivity_broken", replace(SILENT, policy=BROKEN_50, broken_hosts=2, cluster_hosts=4)),
    ("lease_alive", replace(SILENT, policy=SPARE_LEASED, lease_alive=True)),
    ("peers_answer", replace(SILENT, policy=SPARE_ANSWERING, peers_tried=2, peers_answered=1)),
    ("identity_mismatch", with_power(identity=Identity.MISMATCH)),
    ("identity_unchecked", with_power(identity=Identity.UNCHECKED)),
    ("no_executor", with_power(executor=False)),
    ("gave_up", replace(SILENT, record=Record(FenceState.RUNNING, "boot-1", offs=3, last_off_age=20.0))),
]


@pytest.mark.parametrize(("rule", "silent"), HELD, ids=[rule for rule, _ in HELD])
def test_never_fenced(rule: str, silent: Silent) -> None:
    found = decide(silent, CONFIG)
    assert (found.act, found.rule) == (Act.HOLD, rule)
    assert found.sentence.startswith("host h1: ")
    assert "{" not in found.sentence


def test_every_reason_has_its_row() -> None:
    assert {hold.rule for hold in HOLDS} == {rule for rule, _ in HELD}


@pytest.mark.parametrize(
    ("rule", "silent"),
    [
        ("preparing", replace(SILENT, status=HostStatus.PREPARING_FOR_MAINTENANCE, protected_vms=1)),
        ("switched", replace(SILENT, switched_age=601.0)),
        ("leaving", replace(SILENT, leaving_age=601.0, protected_vms=0)),
        ("leaving", replace(SILENT, leaving_age=1.0, protected_vms=1)),
        ("start", replace(SILENT, leading=301.0)),
        ("connectivity_broken", replace(SILENT, policy=BROKEN_50, broken_hosts=1, cluster_hosts=3)),
        ("connectivity_broken", replace(SILENT, policy=SPARE_LEASED, broken_hosts=3, cluster_hosts=3)),
        ("connectivity_broken", replace(SILENT, broken_hosts=3, cluster_hosts=3)),
        ("lease_alive", replace(SILENT, policy=BROKEN_50, lease_alive=True)),
        ("lease_alive", replace(SILENT, policy=SPARE_LEASED)),
        ("peers_answer", replace(SILENT, policy=SPARE_ANSWERING, peers_tried=2)),
        ("peers_answer", replace(SILENT, policy=SPARE_LEASED, peers_tried=2, peers_answered=2)),
        (
            "gave_up",
            replace(SILENT, record=Record(FenceState.RUNNING, "boot-0", offs=3, last_off_age=20.0)),
        ),
    ],
)
def test_what_does_not_hold(rule: str, silent: Silent) -> None:
    assert decide(silent, CONFIG).act is Act.POWER_OFF, rule


@pytest.mark.parametrize(
    ("lease", "alive"),
    [
        (None, False),
        (Lease(0.0, "boot-1", expired=False, watchdog_passed=False), True),
        (Lease(0.0, "boot-1", expired=True, watchdog_passed=False), False),
        (Lease(0.0, "boot-0", expired=False, watchdog_passed=False), False),
        (Lease(-80.0, "boot-1", expired=False, watchdog_passed=False), False),
    ],
)
def test_whose_lease_spares_it(lease: Lease | None, alive: bool) -> None:
    """Not one of another boot, nor one that nobody has read for a while."""
    assert is_lease_alive(lease, "boot-1", 20.0) is alive


@pytest.mark.parametrize(
    ("silent", "act", "rule"),
    [
        # Read at once, whatever holds; not what may be another machine's
        (with_power(read_age=None), Act.READ, "read"),
        (with_power(read_age=5.0), Act.READ, "read"),
        (with_power(state=OFF, read_age=2.0), Act.READ, "read"),
        (with_power(state=OFF, read_age=1.0), Act.WAIT, "off_once"),
        (replace(with_power(read_age=None), status=HostStatus.MAINTENANCE), Act.READ, "read"),
        (replace(with_power(read_age=None), leading=1.0, paused="until then", cut_off=True), Act.READ, "read"),
        (with_power(read_age=None, enabled=False), Act.HOLD, "power_management_off"),
        (with_power(read_age=None, identity=Identity.MISMATCH), Act.HOLD, "identity_mismatch"),
        (with_power(read_age=None, executor=False), Act.HOLD, "no_executor"),
        (replace(with_power(read_age=2.0), record=OFF_ONCE), Act.READ, "read"),
        (replace(with_power(read_age=29.0), silence=601.0), Act.READ, "read"),
        # Silence, and what can't be asked
        (replace(SILENT, silence=59.9), Act.WAIT, "silence"),
        (with_power(state=DOUBT), Act.HOLD, "bmc_unreachable"),
        # After the order
        (replace(SILENT, record=OFF_ONCE), Act.WAIT, "ordered_off"),
        (replace(SILENT, record=replace(OFF_ONCE, last_off_age=20.0)), Act.POWER_OFF, "fence"),
        # It came back
        (replace(SILENT, suspected=False, state=LivenessState.UP), Act.NOTHING, "alive"),
        (replace(SILENT, suspected=False, state=LivenessState.UP, record=OFF_ONCE), Act.CLOSE, "alive"),
        # Dead: only what ha switched off is switched on again, once its VMs were dealt with
        (replace(SILENT, state=LivenessState.DEAD), Act.NOTHING, "dead"),
        (
            replace(SILENT, state=LivenessState.DEAD, record=replace(OFF_ONCE, proven_age=1.0), unsettled_vms=2),
            Act.WAIT,
            "settling",
        ),
        (
            replace(SILENT, state=LivenessState.DEAD, record=replace(OFF_ONCE, proven_age=60.0), unsettled_vms=2),
            Act.POWER_ON,
            "on",
        ),
        (replace(SILENT, state=LivenessState.DEAD, record=replace(OFF_ONCE, proven_age=1.0)), Act.POWER_ON, "on"),
        (
            replace(SILENT, state=LivenessState.DEAD, record=replace(OFF_ONCE, boot_id="boot-0")),
            Act.NOTHING,
            "dead",
        ),
        (replace(SILENT, state=LivenessState.DEAD, record=OFF_ONCE, power=None), Act.CLOSE, "left_off"),
        (dead_and_fenced(1.0, executor=False), Act.WAIT, "no_executor"),
        (dead_and_fenced(60.0, executor=False), Act.CLOSE, "left_off"),
        (dead_and_fenced(30.0, last_on_age=19.0), Act.WAIT, "ordered_on"),
        (dead_and_fenced(30.0, last_on_age=20.0), Act.POWER_ON, "on"),
    ],
)  # fmt: skip
def test_what_is_done_next(silent: Silent, act: Act, rule: str) -> None:
    found = decide(silent, CONFIG)
    assert (found.act, found.rule) == (act, rule)


ages = st.floats(0, 1000)
silents = st.builds(
    Silent,
    name=st.just("h1"),
    status=st.sampled_from([str(s) for s in HostStatus]),
    state=st.sampled_from(list(LivenessState)),
    suspected=st.booleans(),
    boot_id=st.sampled_from(["", "boot-1"]),
    silence=ages,
    power=st.none()
    | st.builds(
        Power,
        st.booleans(),
        st.sampled_from(list(Identity)),
        st.sampled_from(list(PowerState)),
        st.none() | ages,
        executor=st.booleans(),
    ),
    record=st.none()
    | st.builds(
        Record,
        st.sampled_from(list(FenceState)),
        st.sampled_from(["boot-0", "boot-1"]),
        st.integers(0, 4),
        ages,
        ages,
    ),
    protected_vms=st.integers(0, 2),
    paused=st.sampled_from(["", "until then"]),
    switched_age=st.none() | ages,
    leaving_age=st.none() | ages,
    leading=ages,
    storm=st.booleans(),
    cut_off=st.booleans(),
)


@given(silents)
def test_nothing_is_switched_off_without_every_condition(silent: Silent) -> None:
    if decide(silent, CONFIG).act is not Act.POWER_OFF:
        return
    power = silent.power
    assert power is not None
    assert power.state is ON
    assert power.identity is Identity.CHECKED
    assert power.read_age is not None
    assert power.read_age <= 60
    assert silent.suspected
    assert silent.silence >= CONFIG.silence_before_fence_seconds
    assert silent.leading >= CONFIG.start_hold_seconds
    assert (silent.paused, silent.cut_off, silent.storm) == ("", False, False)
    assert silent.status not in (HostStatus.MAINTENANCE, HostStatus.INSTALLING)


@given(silents)
def test_nothing_is_switched_on_before_its_death(silent: Silent) -> None:
    if decide(silent, CONFIG).act is Act.POWER_ON:
        assert silent.state is LivenessState.DEAD
        assert silent.record is not None
        assert silent.record.boot_id == silent.boot_id


@pytest.mark.parametrize(("hosts", "limit"), [(1, 1), (2, 1), (10, 1), (19, 1), (20, 2), (100, 10)])
def test_the_brake(hosts: int, limit: int) -> None:
    assert brake_limit(hosts, CONFIG) == limit


def test_half_is_enough_to_go_on_and_nobody_is_not() -> None:
    assert is_majority(1, 2)
    assert is_majority(2, 3)
    assert not is_majority(1, 3)
    assert not is_majority(0, 0)


def test_a_silence_that_shoots_who_was_cut_off_for_a_moment_is_refused() -> None:
    with pytest.raises(ConfigError, match="never below 35"):
        read("VOLERY_HA_", HaConfig, {"VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": "34"})


# Several devices


@pytest.mark.parametrize(
    ("states", "together", "expected"),
    [
        ([OFF, OFF], True, OFF),
        ([OFF, ON], True, ON),
        ([OFF, DOUBT], True, DOUBT),
        ([], True, DOUBT),
        ([DOUBT, OFF], False, OFF),
        ([ON, OFF], False, ON),
        ([DOUBT], False, DOUBT),
    ],
)
def test_what_several_devices_say(states: list[PowerState], together: bool, expected: PowerState) -> None:
    assert power_rules.state_of(states, together=together) is expected


UUID, OTHER = "6b1d2f6e-8f4e-4f4e-9b58-1d2c3b4a5968", "11111111-2222-4333-8444-555555555555"


@pytest.mark.parametrize(
    ("said", "ours", "expected"),
    [
        ([UUID], UUID, Identity.CHECKED),
        ([UUID, ""], UUID, Identity.UNCHECKED),
        ([UUID, OTHER], UUID, Identity.MISMATCH),
        ([OTHER], UUID, Identity.MISMATCH),
        ([UUID], "", Identity.UNCHECKED),
        ([""], UUID, Identity.UNCHECKED),
        ([], UUID, Identity.UNCHECKED),
    ],
)
def test_whose_devices_they_are(said: list[str], ours: str, expected: Identity) -> None:
    answers = [PowerAnswer(ask_id="", action=PowerAction.IDENTITY, identity=one) for one in said]
    assert power_rules.identity_of(answers, ours) is expected
    assert bool(power_rules.identity_words(expected, answers, ours)) is (expected is not Identity.CHECKED)


def test_a_secret_never_follows_to_another_address() -> None:
    old = FenceDevice(agent="fence_redfish", address="10.0.0.1")
    known = [(old, {"password": "sealed:x"})]
    here = NewFenceDevice(agent="fence_redfish", address="10.0.0.1", username="other")
    there = NewFenceDevice(agent="fence_redfish", address="10.6.6.6")
    assert power_rules.secrets_for(here, power_rules.device_of(here), known) == {"password": "sealed:x"}
    assert power_rules.secrets_for(there, power_rules.device_of(there), known) == {}


def test_one_device_twice_is_refused() -> None:
    one = FenceDevice(agent="fence_redfish", address="bmc7")
    with pytest.raises(Refused, match="the same fence_redfish at BMC7"):
        power_rules.check_devices([one, FenceDevice(agent="fence_redfish", address="BMC7")])
    power_rules.check_devices(
        [
            FenceDevice(agent="fence_apc", address="pdu", options={"plug": "1"}),
            FenceDevice(agent="fence_apc", address="pdu", options={"plug": "2"}),
        ]
    )
    for wrong in ([], [one] * 9):
        with pytest.raises(Refused) as refused:
            power_rules.check_devices(wrong)
        assert refused.value.kind is Kind.INVALID


LOST, FAILED = -1, 1


@pytest.mark.parametrize(
    ("ordered", "seen", "seen_code", "over"),
    [
        (LOST, PowerState.OFF, 0, True),
        (LOST, PowerState.ON, 0, True),  # it may be about to
        (LOST, PowerState.UNKNOWN, LOST, True),
        (LOST, PowerState.UNKNOWN, FAILED, False),  # it can't be reached
        (FAILED, PowerState.OFF, 0, True),
        (FAILED, PowerState.ON, 0, False),  # it did not do it
        (FAILED, PowerState.UNKNOWN, FAILED, False),
        (FAILED, PowerState.UNKNOWN, LOST, True),
    ],
)
def test_when_another_way_may_be_ordered(ordered: int, seen: PowerState, seen_code: int, over: bool) -> None:
    order = PowerAnswer(ask_id="", action=PowerAction.OFF, exit_code=ordered)
    status = PowerAnswer(ask_id="", action=PowerAction.STATUS, state=seen, exit_code=seen_code)
    assert power_rules.is_over(order, status) is over


def test_each_order_begins_with_another_way() -> None:
    assert [power_rules.in_turn("abc", tried) for tried in range(4)] == [
        ("a", "b", "c"),
        ("b", "c", "a"),
        ("c", "a", "b"),
        ("a", "b", "c"),
    ]
    assert power_rules.in_turn((), 2) == ()
