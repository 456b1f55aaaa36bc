"""What is done to the host, by which proof its VM may run elsewhere, and how long that may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.bmc import Bmc
from lab.board import Fault
from lab.host import Host
from volery.contracts.liveness import ProofKind

SILENCE_SECONDS = 35.0
"""`VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS` in trials: the least that ha accepts."""
SETTINGS = {
    "VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": f"{SILENCE_SECONDS:.0f}",
    # Trials follow each other within minutes: the holds that they would run into have tests of their own.
    "VOLERY_HA_START_HOLD_SECONDS": "5",
    "VOLERY_HA_SWITCH_QUIET_SECONDS": "1",
    "VOLERY_HA_BRAKE_WINDOW_SECONDS": "10",
}

Act = Callable[[Host, Bmc], None]


@dataclass(frozen=True)
class Kind:
    """`order_seconds`: from the fault until the restart is ordered, at most."""

    name: str
    title: str
    fault: Act
    mend: Act
    """After the VM runs elsewhere. The host is then waited for."""
    proof: ProofKind
    order_seconds: float
    share: float = 1.0
    """Of the trials that were asked for."""
    fenced: bool = False
    """ha must have ordered it off, and only when it was silent for long enough."""
    io_timeout_seconds: int = 0
    """Leases, at this io_timeout; 0 is none."""


def pull_plug(host: Host, _: Bmc) -> None:
    host.power_off()


def power_on(host: Host, _: Bmc) -> None:
    host.power_on()


def lose_all(host: Host, bmc: Bmc) -> None:
    bmc.set_fault(Fault.UNREACHABLE)
    host.power_off()


def bring_back(host: Host, bmc: Bmc) -> None:
    bmc.set_fault(Fault.NONE)
    host.power_on()


KINDS = (
    Kind(
        "plug",
        "power lost, BMC answers off",
        pull_plug,
        power_on,
        ProofKind.BMC_OFF,
        10.0,
    ),
    Kind(
        "frozen",
        "host frozen, BMC on",
        lambda host, _: host.freeze(),
        lambda host, _: None,
        ProofKind.BMC_OFF,
        SILENCE_SECONDS + 15,
        share=1 / 3,
        fenced=True,
    ),
    Kind(
        "cut",
        "network cut, BMC reachable",
        lambda host, _: host.cut(),
        lambda host, _: host.join(),
        ProofKind.BMC_OFF,
        SILENCE_SECONDS + 15,
        share=1 / 3,
        fenced=True,
    ),
    Kind(
        "lease2",
        "power and BMC lost, lease at io_timeout 2",
        lose_all,
        bring_back,
        ProofKind.LEASE_EXPIRED,
        86.0,
        share=1 / 6,
        io_timeout_seconds=2,
    ),
    Kind(
        "lease10",
        "power and BMC lost, lease at io_timeout 10",
        lose_all,
        bring_back,
        ProofKind.LEASE_EXPIRED,
        150.0,
        share=0.0,
        io_timeout_seconds=10,
    ),
)
"""`share` 0 is once."""
