"""What is done, and what must come of it: the VM elsewhere by a proof within a time, or nothing at all."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

from lab import disk
from lab.board import Fault
from lab.host import Host
from trials import faults
from trials.faults import Act, nothing
from volery.contracts.liveness import ProofKind

SILENCE_SECONDS = 35.0
"""`VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS` in trials: the least that ha accepts."""
START_HOLD = "VOLERY_HA_START_HOLD_SECONDS"
BRAKE_WINDOW = "VOLERY_HA_BRAKE_WINDOW_SECONDS"
SETTINGS = {
    "VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": f"{SILENCE_SECONDS:.0f}",
    # Trials follow each other within minutes: the holds that they would run into have tests of their own.
    START_HOLD: "5",
    "VOLERY_HA_SWITCH_QUIET_SECONDS": "1",
    BRAKE_WINDOW: "10",
    # Longer than `storage-cut` lasts, and short enough to be waited for.
    "VOLERY_STORAGE_LOST_AFTER_SECONDS": "70",
    "VOLERY_STORAGE_BACK_AFTER_SECONDS": "5",
    "VOLERY_HA_RESTARTS_AT_MOST": "1000",
}


Storage = Literal["shared", "iscsi", "disk"]
"""The storage domain where the ledgers are: the hosts' shared directory, LUNs, or a directory that one host can lose."""


@dataclass(frozen=True)
class Elsewhere:
    """The VM must run on another host, and the restart be ordered within `order_seconds` after the fault."""

    name: str
    title: str
    fault: Act
    mend: Act
    """After the VM runs elsewhere. The host is then waited for."""
    proof: ProofKind | None
    """None: the host lives, and its agent has said that the VM's QEMU ended."""
    order_seconds: float
    share: float = 1.0
    """Of the trials that were asked for; at least one is done."""
    fenced: bool = False
    """ha must have ordered the host off."""
    io_timeout_seconds: int = 0
    """Leases, at this io_timeout; 0 is none."""
    storage: Storage = "shared"
    first: Act = nothing
    """Before the clock starts."""
    compared: bool = True
    """With a plain start: not while a host boots beside the guest, on the same processors."""


@dataclass(frozen=True)
class Nothing:
    """The fault lasts for so long, then it is mended: no VM is restarted, no host is switched or believed dead, and the
    guest writes all the time, in one boot."""

    name: str
    title: str
    fault: Act
    mend: Act
    seconds: float
    share: float = 1 / 10
    io_timeout_seconds: int = 0
    storage: Storage = "shared"
    first: Act = nothing
    still: bool = False
    """The guest can't write while the fault lasts; it goes on afterwards."""
    says: str = ""
    """What a person must have been told about the host meanwhile."""
    fence_tried: bool = False
    """ha orders the host off, which comes to nothing."""
    may_move: bool = False
    """A live migration is under way: it may end on either side."""


@dataclass(frozen=True)
class Blackout:
    """Everything is dead at one moment and comes back: every VM runs exactly once, those of the late host once it is
    back."""

    name: str
    title: str
    share: float = 1 / 10
    io_timeout_seconds: int = 0
    storage: Storage = "shared"


@dataclass(frozen=True)
class Rack:
    """Two of five hosts break at one moment, a guest on each. Off by their BMCs: both guests are elsewhere. Frozen with
    their BMCs on: ha orders one of them off, then its brake holds, and the other is a person's."""

    name: str
    title: str
    frozen: bool
    order_seconds: float
    share: float = 1 / 10
    io_timeout_seconds: int = 0
    storage: Storage = "shared"


@dataclass(frozen=True)
class Unkillable:
    """A VM is forced off while its host is cut from its disk, so that its QEMU can't be ended: it is not taken for down
    before it is, and then it stays down."""

    name: str
    title: str
    share: float = 1 / 10
    io_timeout_seconds: int = 0
    storage: Storage = "disk"


Kind = Elsewhere | Nothing | Blackout | Rack | Unkillable


def settings_for(kind: Kind) -> dict[str, str]:
    """What a kind is about is as in an installation that nobody has changed."""
    own = ""
    if isinstance(kind, Rack) and kind.frozen:
        own = BRAKE_WINDOW
    if isinstance(kind, Blackout):
        own = START_HOLD
    return {name: value for name, value in SETTINGS.items() if name != own}


BMC_OFF, LEASE = ProofKind.BMC_OFF, ProofKind.LEASE_EXPIRED
FENCED_SECONDS = SILENCE_SECONDS + 15
LEADER_SECONDS = 20.0
"""A control plane that was killed leads again within this, and has heard its hosts."""

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
        compared=False,
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
        compared=False,
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
        faults.lose_all,
        faults.bring_back,
        LEASE,
        order_seconds=86.0,
        share=1 / 6,
        io_timeout_seconds=2,
    ),
    Elsewhere(
        "lease10",
        "power and BMC lost, lease at io_timeout 10",
        faults.lose_all,
        faults.bring_back,
        LEASE,
        order_seconds=150.0,
        share=0.0,
        io_timeout_seconds=10,
    ),
    Elsewhere(
        "frozen-lease2",
        "host frozen, BMC lost, lease at io_timeout 2",
        faults.freeze_without_bmc,
        faults.bring_back,
        LEASE,
        order_seconds=86.0,
        share=0.0,
        io_timeout_seconds=2,
    ),
    Elsewhere(
        "home-alone",
        "power lost, and it is back while the control plane is gone",
        lambda scene, host: host.power_off(),
        faults.power_on_alone,
        BMC_OFF,
        order_seconds=10.0,
        share=0.0,
        compared=False,
    ),
    Elsewhere(
        "fence-interrupted",
        "host frozen, BMC on, and ha killed as soon as it has ordered the host off",
        faults.freeze_and_kill_ha,
        nothing,
        BMC_OFF,
        order_seconds=FENCED_SECONDS + LEADER_SECONDS,
        share=0.0,
        fenced=True,
        compared=False,
    ),
    Elsewhere(
        "maintenance",
        "power lost in the middle of maintenance",
        lambda scene, host: host.power_off(),
        faults.end_maintenance,
        BMC_OFF,
        order_seconds=10.0,
        share=0.0,
        first=faults.begin_maintenance,
        compared=False,
    ),
    Elsewhere(
        "frozen-cut-lease2",
        "host frozen with its network cut in the middle of a write, BMC lost, thawed later; lease at io_timeout 2",
        faults.then(lambda scene, host: host.cut(), faults.freeze_without_bmc),
        faults.then(lambda scene, host: host.join(), faults.bring_back),
        LEASE,
        order_seconds=86.0,
        share=0.0,
        io_timeout_seconds=2,
        storage="iscsi",
        compared=False,
    ),
    Elsewhere(
        "storage-lost",
        "a host has lost its iSCSI storage for good, then its guest's QEMU ends",
        faults.kill_qemu,
        lambda scene, host: host.join_storage(),
        None,
        order_seconds=5.0,
        share=0.0,
        storage="iscsi",
        first=faults.lose_storage,
        compared=False,
    ),
    Elsewhere(
        "unkillable-off",
        "a QEMU that SIGKILL doesn't end, then its host switched off by hand",
        faults.switch_off,
        lambda scene, host: host.power_on(),
        BMC_OFF,
        order_seconds=10.0,
        share=0.0,
        io_timeout_seconds=2,
        storage="disk",
        first=faults.kill_in_vain,
        compared=False,
    ),
    Nothing(
        "agent-paused",
        "agent paused for 30 s",
        faults.to_agent(signal.SIGSTOP),
        faults.to_agent(signal.SIGCONT),
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
        faults.bmc(Fault.SAYS_OFF),
        faults.bmc(Fault.NONE),
        seconds=20.0,
    ),
    Nothing(
        "servers-paused",
        "NATS and PostgreSQL paused for 60 s",
        faults.to_servers(signal.SIGSTOP),
        faults.to_servers(signal.SIGCONT),
        seconds=60.0,
        share=0.0,
    ),
    Nothing(
        "plane-away",
        "control plane, NATS and PostgreSQL gone for 10 minutes",
        faults.stop_plane,
        faults.start_plane,
        seconds=600.0,
        share=0.0,
    ),
    Nothing(
        "short-freeze",
        "host frozen for 25 s",
        lambda scene, host: host.freeze(),
        lambda scene, host: host.thaw(),
        seconds=25.0,
        share=0.0,
        still=True,
    ),
    Nothing(
        "frozen-unproven",
        "host frozen for two minutes, BMC lost, no watchdog, no lease",
        faults.then(faults.bmc(Fault.UNREACHABLE), faults.freeze_without_watchdog),
        faults.thaw_then_bmc,
        seconds=120.0,
        share=0.0,
        still=True,
        says="its BMC can't be asked",
    ),
    Nothing(
        "says-on",
        "host frozen, its BMC says on for ever",
        faults.then(faults.bmc(Fault.SAYS_ON), faults.freeze_without_watchdog),
        faults.thaw_then_bmc,
        seconds=120.0,
        share=0.0,
        still=True,
        says="Cut its power by hand",
        fence_tried=True,
    ),
    Nothing(
        "swapped",
        "host frozen, its BMC is another host's",
        faults.then(faults.bmc(Fault.SWAPPED), faults.freeze_without_watchdog),
        faults.thaw_then_bmc,
        seconds=70.0,
        share=0.0,
        still=True,
    ),
    Nothing(
        "storage-cut",
        "a host's way to its iSCSI storage cut for 60 s",
        lambda scene, host: host.cut_storage(),
        lambda scene, host: host.join_storage(),
        seconds=60.0,
        share=0.0,
        storage="iscsi",
        still=True,
    ),
    Nothing(
        "storage-away",
        "a host's way to its iSCSI storage cut for two minutes, in which it is non-operational",
        lambda scene, host: host.cut_storage(),
        lambda scene, host: host.join_storage(),
        seconds=120.0,
        share=0.0,
        storage="iscsi",
        still=True,
        may_move=True,
    ),
    Nothing(
        "directory-cut",
        "a host cut from the shared directory for 60 s",
        faults.cut_directory,
        lambda scene, host: disk.join(host),
        seconds=60.0,
        share=0.0,
        io_timeout_seconds=2,
        storage="disk",
        still=True,
    ),
    Nothing(
        "two-cut",
        "two hosts of three cut for a minute, in the middle of a migration between them",
        faults.both(Host.cut),
        faults.both(Host.join),
        seconds=60.0,
        share=0.0,
        first=faults.begin_migration,
        may_move=True,
    ),
    Unkillable(
        "unkillable",
        "a VM is forced off while its QEMU can't be ended",
        share=0.0,
        io_timeout_seconds=2,
    ),
    Rack("rack-off", "two hosts of five lose power, BMCs answer off", False, order_seconds=10.0, share=0.0),
    Rack("rack-silent", "two hosts of five frozen, BMCs on", True, order_seconds=FENCED_SECONDS, share=0.0),
    Blackout(
        "blackout",
        "all hosts, BMCs and the control plane killed at one moment, back in any order, one host and its BMC late",
        share=0.0,
    ),
)
"""`share` 0 is once."""
