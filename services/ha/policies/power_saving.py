"""Why a host is not switched off to save power: a table of reasons. Pure.

It is no fence: the host lives, and nothing is known to run there. So nothing needs to be done in doubt, and every reason
to fence nobody is one here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.ha.policies.fencing import Power
from volery.contracts.host import HostStatus
from volery.contracts.liveness import LivenessState
from volery.contracts.power import Identity

UNCERTAIN_SECONDS = 5.0
"""Beyond the time of its device, after which an order to switch off that nobody heard of again can't come true any more."""


@dataclass(frozen=True, slots=True)
class Tired:
    """A host that inventory wants to sleep, as ha knows it."""

    name: str
    state: LivenessState
    boot_id: str
    wanted_boot_id: str
    power: Power | None
    power_tested: bool = False
    vms: int = 0
    """VMs that may run there, as far as ha has heard."""
    paused: str = ""
    quarantine: str = ""
    ours: bool = False
    cut_off: bool = False
    silent_hosts: int = 0
    """Hosts of its cluster of which nobody knows whether they live."""


@dataclass(frozen=True, slots=True)
class Reason:
    rule: str
    applies: Callable[[Tired], bool]
    sentence: str


REASONS: tuple[Reason, ...] = (
    Reason("no_power_management", lambda t: t.power is None,
           "it has no power management, so nobody could wake it: set it, and test it"),
    Reason("power_management_off", lambda t: t.power is not None and not t.power.enabled, "its power management is switched off"),
    Reason("identity", lambda t: t.power is not None and t.power.identity is not Identity.CHECKED,
           "nobody has checked that its BMC is its own: test its power management"),
    Reason("untested", lambda t: not t.power_tested, "the last test of its power management failed: look at it, and test it again"),
    Reason("no_executor", lambda t: t.power is not None and not t.power.executor,
           "no other host of its cluster can run its fence agent now"),
    Reason("ours", lambda t: t.ours, "ha itself runs on it"),
    Reason("quarantine", lambda t: bool(t.quarantine), "the database was restored: {quarantine}"),
    Reason("paused", lambda t: bool(t.paused), "fencing is paused {paused}"),
    Reason("cut_off", lambda t: t.cut_off, "most hosts of its cluster are silent, so it may be ha that is cut off"),
    Reason("silent_hosts", lambda t: t.silent_hosts > 0,
           "{silent} other hosts of its cluster are silent, and it may be needed"),
    Reason("silent", lambda t: t.state is not LivenessState.UP, "it is {state}, and only a host that is up is put to sleep"),
    Reason("boot", lambda t: bool(t.wanted_boot_id) and t.boot_id != t.wanted_boot_id, "it has rebooted meanwhile"),
    Reason("vms", lambda t: bool(t.wanted_boot_id) and t.vms > 0, "{vms} VMs may still run on it"),
)  # fmt: skip
"""In the order in which a person should hear of them. The last two are asked only when it is really to be switched off."""

READY = frozenset({HostStatus.PREPARING_FOR_MAINTENANCE, HostStatus.MAINTENANCE})


def refusal(tired: Tired) -> tuple[str, str]:
    """Rule and sentence; empty when it may be switched off."""
    reason = next((reason for reason in REASONS if reason.applies(tired)), None)
    if reason is None:
        return "", ""
    sentence = reason.sentence.format(
        quarantine=tired.quarantine,
        paused=tired.paused,
        silent=tired.silent_hosts,
        state=tired.state,
        vms=tired.vms,
    )
    return reason.rule, f"host {tired.name} is not switched off: {sentence}"


def uncertain_seconds(timeouts: list[float]) -> float:
    """For how long an order to switch off by these devices may come true."""
    return max(timeouts, default=0.0) + UNCERTAIN_SECONDS
