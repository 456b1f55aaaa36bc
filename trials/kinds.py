"""What is done, and what must come of it: the VM elsewhere by a proof within a time, or nothing at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from lab import plane
from lab.board import Fault
from lab.host import Host
from lab.scene import QUIET, Scene
from volery.contracts.liveness import ProofKind
from volery.setup import embedded
from volery.setup.down import down
from volery.setup.up import up

SILENCE_SECONDS = 35.0
"""`VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS` in trials: the least that ha accepts."""
SETTINGS = {
    "VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": f"{SILENCE_SECONDS:.0f}",
    # Trials follow each other within minutes: the holds that they would run into have tests of their own.
    "VOLERY_HA_START_HOLD_SECONDS": "5",
    "VOLERY_HA_SWITCH_QUIET_SECONDS": "1",
    "VOLERY_HA_BRAKE_WINDOW_SECONDS": "10",
    "VOLERY_HA_RESTARTS_AT_MOST": "1000",
}

Act = Callable[[Scene, Host], None]
"""Does something to the host where the survivor runs, or to the control plane."""


@dataclass(frozen=True)
class Elsewhere:
    """The VM must run on another host, and the restart be ordered within `order_seconds` after the fault."""

    name: str
    title: str
    fault: Act
    mend: Act
    """After the VM runs elsewhere. The host is then waited for."""
    proof: ProofKind
    order_seconds: float
    share: float = 1.0
    """Of the trials that were asked for; at least one is done."""
    fenced: bool = False
    """ha must have ordered the host off."""
    io_timeout_seconds: int = 0
    """Leases, at this io_timeout; 0 is none."""


@dataclass(frozen=True)
class Nothing:
    """The fault lasts for so long, then it is mended: no VM is restarted, no host is fenced or believed dead, and the
    guest writes all the time."""

    name: str
    title: str
    fault: Act
    mend: Act
    seconds: float
    share: float = 1 / 10
    io_timeout_seconds: int = 0


Kind = Elsewhere | Nothing


def lose_all(scene: Scene, host: Host) -> None:
    scene.lab.bmc(host.number).set_fault(Fault.UNREACHABLE)
    host.power_off()


def freeze_without_bmc(scene: Scene, host: Host) -> None:
    scene.lab.bmc(host.number).set_fault(Fault.UNREACHABLE)
    host.freeze()


def bring_back(scene: Scene, host: Host) -> None:
    scene.lab.bmc(host.number).set_fault(Fault.NONE)
    if host.boot is None:
        host.power_on()
    else:
        host.thaw()


def nothing(scene: Scene, host: Host) -> None:
    """It mends itself."""


def to_agent(number: signal.Signals) -> Act:
    def act(scene: Scene, host: Host) -> None:
        for pid in host.pids("agent"):
            os.kill(pid, number)

    return act


def to_servers(number: signal.Signals) -> Act:
    """NATS and PostgreSQL of the control plane."""

    def act(scene: Scene, host: Host) -> None:
        home = plane.home_of(scene.lab)
        for server in ("nats", "postgres"):
            process = embedded.status(home, server)
            if process is not None:
                os.kill(process.pid, number)

    return act


def stop_plane(scene: Scene, host: Host) -> None:
    down(plane.home_of(scene.lab), QUIET)


def start_plane(scene: Scene, host: Host) -> None:
    up(plane.home_of(scene.lab), QUIET)


def bmc(fault: Fault) -> Act:
    return lambda scene, host: scene.lab.bmc(host.number).set_fault(fault)


BMC_OFF, LEASE = ProofKind.BMC_OFF, ProofKind.LEASE_EXPIRED
FENCED_SECONDS = SILENCE_SECONDS + 15

KINDS: tuple[Kind, ...] = (
    Elsewhere(
        "plug",
        "power lost, BMC answers off",
        lambda scene, host: host.power_off(),
        lambda scene, host: host.power_on(),
        BMC_OFF,
        order_seconds=10.0,
    ),
    Elsewhere(
        "frozen",
        "host frozen, BMC on",
        lambda scene, host: host.freeze(),
        nothing,  # ha switches it on
        BMC_OFF,
        order_seconds=FENCED_SECONDS,
        share=1 / 3,
        fenced=True,
    ),
    Elsewhere(
        "cut",
        "network cut, BMC reachable",
        lambda scene, host: host.cut(),
        lambda scene, host: host.join(),
        BMC_OFF,
        order_seconds=FENCED_SECONDS,
        share=1 / 3,
        fenced=True,
    ),
    Elsewhere(
        "plug-lease",
        "power lost, BMC answers off, lease at io_timeout 10",
        lambda scene, host: host.power_off(),
        lambda scene, host: host.power_on(),
        BMC_OFF,
        order_seconds=10.0,
        share=1 / 6,
        io_timeout_seconds=10,
    ),
    Elsewhere(
        "lease2",
        "power and BMC lost, lease at io_timeout 2",
        lose_all,
        bring_back,
        LEASE,
        order_seconds=86.0,
        share=1 / 6,
        io_timeout_seconds=2,
    ),
    Elsewhere(
        "lease10",
        "power and BMC lost, lease at io_timeout 10",
        lose_all,
        bring_back,
        LEASE,
        order_seconds=150.0,
        share=0.0,
        io_timeout_seconds=10,
    ),
    Elsewhere(
        "frozen-lease2",
        "host frozen, BMC lost, lease at io_timeout 2",
        freeze_without_bmc,
        bring_back,
        LEASE,
        order_seconds=86.0,
        share=0.0,
        io_timeout_seconds=2,
    ),
    Nothing(
        "agent-paused",
        "agent paused for 30 s",
        to_agent(signal.SIGSTOP),
        to_agent(signal.SIGCONT),
        seconds=30.0,
    ),
    Nothing(
        "agent-killed",
        "agent killed",
        lambda scene, host: host.kill_agent(),
        nothing,
        seconds=5.0,
    ),
    Nothing(
        "libvirtd-killed",
        "libvirtd killed, back after 20 s",
        lambda scene, host: host.kill_libvirtd(),
        lambda scene, host: host.start_libvirtd(),
        seconds=20.0,
    ),
    Nothing(
        "short-cut",
        "network cut for 25 s",
        lambda scene, host: host.cut(),
        lambda scene, host: host.join(),
        seconds=25.0,
    ),
    Nothing(
        "liar",
        "BMC says off while its host lives",
        bmc(Fault.SAYS_OFF),
        bmc(Fault.NONE),
        seconds=20.0,
    ),
    Nothing(
        "servers-paused",
        "NATS and PostgreSQL paused for 60 s",
        to_servers(signal.SIGSTOP),
        to_servers(signal.SIGCONT),
        seconds=60.0,
        share=0.0,
    ),
    Nothing(
        "plane-away",
        "control plane, NATS and PostgreSQL gone for 10 minutes",
        stop_plane,
        start_plane,
        seconds=600.0,
        share=0.0,
    ),
)
"""`share` 0 is once."""
