"""What is done about a host that is silent: a table of reasons to leave it alone, and the order of what follows. Pure.

Reading a BMC is harmless and is done at once. Switching off waits for the silence, for every reason in `HOLDS` to be
gone, and for the brake; then off is confirmed by two readings (evidence.py makes the proof of them), the VMs are
restarted elsewhere, and only then the host is switched on again. Never `cycle`: nobody could say when it was off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from services.ha.config import HaConfig
from services.ha.policies import soft_fencing
from services.ha.policies.evidence import Lease
from services.ha.policies.soft_fencing import SoftState
from volery.contracts.fencing import PowerState
from volery.contracts.host import HostStatus
from volery.contracts.liveness import LivenessState
from volery.contracts.power import FenceState, FencingPolicy, Identity

LOOK_SECONDS = 2.0
"""Between two readings of a BMC that says off, or that was just told to."""
ON_LOOK_SECONDS = 5.0
"""Between two readings of one that says on, or nothing."""
LONG_SILENCE_SECONDS = 600.0
"""From then on a BMC is read less often."""
FRESH_SECONDS = 12.0
"""A reading older than this is read again before anything follows from it."""
LEASE_FRESH_SECONDS = 90.0
"""A lease that was seen alive longer ago than this says nothing: it may have expired since."""


class Act(StrEnum):
    NOTHING = "nothing"
    READ = "read"
    HOLD = "hold"
    """Leave it alone, and say why."""
    WAIT = "wait"
    POWER_OFF = "power_off"
    POWER_ON = "power_on"
    CLOSE = "close"
    """The record of what was done ends: the host is up, or came back by itself."""


@dataclass(frozen=True, slots=True)
class Power:
    """What is known of its power management; ages in seconds."""

    enabled: bool
    identity: Identity
    state: PowerState = PowerState.UNKNOWN
    read_age: float | None = None
    """Since it was last asked; None: never."""
    words: str = ""
    executor: bool = True
    """Whether somebody can run its fence agent now."""


@dataclass(frozen=True, slots=True)
class Record:
    """What ha did to this boot of the host so far."""

    state: FenceState
    boot_id: str
    offs: int = 0
    """How often it was ordered off."""
    last_off_age: float = float("inf")
    proven_age: float = float("inf")
    last_on_age: float = float("inf")
    """Since it was last ordered on, in vain so far."""


@dataclass(frozen=True, slots=True)
class Silent:
    """One host that is believed silent or dead; ages in seconds by ha's monotonic clock."""

    name: str
    status: str
    state: LivenessState
    suspected: bool
    boot_id: str
    silence: float
    """Since anything at all was heard of it, or ha listens."""
    power: Power | None = None
    record: Record | None = None
    protected_vms: int = 0
    """Highly available VMs that may run there."""
    unsettled_vms: int = 0
    """VMs of which inventory has not said yet what its death means."""
    paused: str = ""
    """Fencing is switched off for it: until when, and why."""
    switched_age: float | None = None
    """Since a person switched its power, while it is not up under a new boot."""
    leaving_age: float | None = None
    """Since its agent last said that the host is being shut down, and has said nothing else."""
    leading: float = float("inf")
    """How long this ha has led."""
    storm: bool = False
    cut_off: bool = False
    """Most hosts of its cluster are silent, and no witness says that it isn't ha that is."""
    quarantine: str = ""
    ours: bool = False
    """It is the machine that this very process runs on."""
    policy: FencingPolicy | None = None
    """Its cluster's; None: the defaults, by which nobody is spared."""
    lease_alive: bool = False
    """Its storage lease was renewed, as it was read last."""
    broken_hosts: int = 0
    """Hosts of its cluster that are silent without proof of death."""
    cluster_hosts: int = 0
    """Those of its cluster that should answer."""
    peers_tried: int = 0
    """Hosts of its cluster that tried it since its last beat."""
    peers_answered: int = 0
    """Those of them that a program of it answered a short while ago."""
    soft: SoftState = SoftState.NONE
    """Of restarting its agent over SSH."""
    dump: str = ""
    """It crashed and writes its dump: until when power waits for that."""


@dataclass(frozen=True, slots=True)
class Decision:
    act: Act
    rule: str
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Hold:
    """A reason never to switch a host off."""

    rule: str
    applies: Callable[[Silent, HaConfig], bool]
    sentence: str


def _power(check: Callable[[Power], bool]) -> Callable[[Silent, HaConfig], bool]:
    return lambda s, c: s.power is not None and check(s.power)


def _spares(check: Callable[[Silent, FencingPolicy], bool]) -> Callable[[Silent, HaConfig], bool]:
    return lambda s, c: s.policy is not None and check(s, s.policy)


def is_connectivity_broken(broken: int, hosts: int, policy: FencingPolicy) -> bool:
    """Whether so many hosts of a cluster are silent that its policy takes the network for the cause."""
    share = broken * 100 >= hosts * policy.connectivity_broken_percent
    return policy.skip_if_connectivity_broken and hosts > 0 and share


def is_lease_alive(lease: Lease | None, boot_id: str, now: float) -> bool:
    """Whether this boot renewed its storage lease, as far as that is known."""
    if lease is None or lease.expired or lease.boot_id != boot_id:
        return False
    return now - lease.at < LEASE_FRESH_SECONDS


HOLDS: tuple[Hold, ...] = (
    Hold("no_boot", lambda s, c: not s.boot_id, "nothing ever ran there as far as ha knows"),
    Hold("no_power_management", lambda s, c: s.power is None,
         "it has no power management: once it is off for sure, confirm that it was rebooted"),
    Hold("power_management_off", _power(lambda p: not p.enabled), "its power management is switched off"),
    Hold("paused", lambda s, c: bool(s.paused), "fencing is paused {paused}"),
    Hold("maintenance", lambda s, c: s.status == HostStatus.MAINTENANCE, "it is in maintenance"),
    Hold("preparing", lambda s, c: s.status == HostStatus.PREPARING_FOR_MAINTENANCE and not s.protected_vms,
         "it was going into maintenance, and no highly available VM is left on it"),
    Hold("installing", lambda s, c: s.status == HostStatus.INSTALLING, "it is being installed"),
    Hold("switched", lambda s, c: s.switched_age is not None and s.switched_age < c.reboot_quiet_seconds,
         "its power was switched by hand a short while ago; it is given time to start"),
    Hold("leaving", lambda s, c: s.leaving_age is not None and s.leaving_age < c.reboot_quiet_seconds
         and not s.protected_vms,
         "its administrator shut it down or reboots it, as its agent said before, and no highly available VM is left on "
         "it: it is given time to start"),
    Hold("quarantine", lambda s, c: bool(s.quarantine), "ha waits, since the database was restored: {quarantine}"),
    Hold("ours", lambda s, c: s.ours, "ha itself runs on it, so the machine lives; look at its agent"),
    Hold("cut_off", lambda s, c: s.cut_off,
         "most hosts of its cluster are silent, so it may be ha that is cut off: nothing is ordered. Look at the "
         "network, then confirm the hosts that are off"),
    Hold("storm", lambda s, c: s.storm, "most hosts fell silent at once: ha waits before it believes it"),
    Hold("start", lambda s, c: s.leading < c.start_hold_seconds,
         "ha, or its leader, started a short while ago: hosts may be starting, too"),
    Hold("dumping", lambda s, c: bool(s.dump), "{dump}"),
    Hold("connectivity_broken", _spares(lambda s, p: is_connectivity_broken(s.broken_hosts, s.cluster_hosts, p)),
         "{broken} of the {hosts} hosts of its cluster are silent, and its fencing policy switches nothing off from "
         "{percent} % on: look at the network, then confirm the hosts that are off"),
    Hold("lease_alive", _spares(lambda s, p: p.skip_while_lease_alive and s.lease_alive),
         "its storage lease is renewed, so the machine and its VMs run; the cluster's fencing policy spares it. Look at "
         "its network and its agent"),
    Hold("peers_answer", _spares(lambda s, p: p.skip_while_peers_answer and s.peers_answered > 0),
         "{answered} of the {tried} hosts of its cluster that tried it get an answer, so the machine runs; the cluster's "
         "fencing policy spares it. Look at its agent, and at its network to the control plane"),
    Hold("identity_mismatch", _power(lambda p: p.identity is Identity.MISMATCH),
         "its BMC belongs to another machine: correct its power management"),
    Hold("identity_unchecked", _power(lambda p: p.identity is Identity.UNCHECKED),
         "nobody has checked that its BMC is its own: test its power management while it is up"),
    Hold("no_executor", _power(lambda p: not p.executor),
         "no host on this side can run its fence agent: not enough of its cluster answers"),
    Hold("gave_up", lambda s, c: s.record is not None and s.record.boot_id == s.boot_id
         and s.record.offs >= c.off_attempts and s.record.last_off_age >= c.off_retry_seconds,
         "it was ordered off and is still on: {words}. Cut its power by hand, then confirm it"),
)  # fmt: skip
"""In the order in which a person should hear of them."""


def decide(silent: Silent, config: HaConfig) -> Decision:
    """The next thing to do about one host, and the sentence that says so."""
    if silent.state is LivenessState.DEAD:
        return _after_death(silent, config)
    if not silent.suspected:
        return Decision(Act.CLOSE if silent.record is not None else Act.NOTHING, "alive")
    if _read_due(silent):
        return Decision(Act.READ, "read", _asking(silent))
    hold = next((hold for hold in HOLDS if hold.applies(silent, config)), None)
    if hold is not None:
        return Decision(Act.HOLD, hold.rule, _say(hold.sentence, silent))
    return _towards_off(silent, config)


def is_soft_due(silent: Silent, config: HaConfig) -> bool:
    """Whether its agent is to be restarted over SSH now. A BMC that says off is on its way to a proof."""
    if silent.soft is not SoftState.DUE or not silent.suspected or silent.state is LivenessState.DEAD:
        return False
    if silent.power is not None and silent.power.state is PowerState.OFF:
        return False
    return not any(hold.rule in soft_fencing.HOLDS and hold.applies(silent, config) for hold in HOLDS)


def _say(sentence: str, silent: Silent) -> str:
    words = silent.power.words if silent.power is not None else ""
    text = sentence.format(
        paused=silent.paused,
        quarantine=silent.quarantine,
        dump=silent.dump,
        words=words or "no reason given",
        broken=silent.broken_hosts,
        hosts=silent.cluster_hosts,
        answered=silent.peers_answered,
        tried=silent.peers_tried,
        percent=silent.policy.connectivity_broken_percent if silent.policy is not None else 0,
    )
    return f"host {silent.name}: {text}"


def _read_due(silent: Silent) -> bool:
    """Whether its BMC should be asked now, whatever else holds: asking is harmless."""
    power = silent.power
    if power is None or not power.enabled or power.identity is Identity.MISMATCH or not power.executor:
        return False
    hurried = power.state is PowerState.OFF or (
        silent.record is not None and silent.record.state is FenceState.RUNNING
    )
    between = LOOK_SECONDS if hurried else ON_LOOK_SECONDS
    if silent.silence > LONG_SILENCE_SECONDS:
        between *= 6
    return power.read_age is None or power.read_age >= between


def _asking(silent: Silent) -> str:
    """Of the first reading only, which may take many seconds: what was read before says more."""
    if silent.power is not None and silent.power.read_age is not None:
        return ""
    return f"host {silent.name}: its BMC is asked whether it is on"


def _towards_off(silent: Silent, config: HaConfig) -> Decision:
    power, record = silent.power, silent.record
    assert power is not None
    if power.state is PowerState.OFF:
        return Decision(Act.WAIT, "off_once", f"host {silent.name}: its BMC says off; it is asked again")
    if silent.silence < config.silence_before_fence_seconds:
        until = f"once it was silent for {config.silence_before_fence_seconds:g} s"
        return Decision(
            Act.WAIT, "silence", f"host {silent.name}: its BMC says {power.state}; it is fenced {until}"
        )
    if power.state is PowerState.UNKNOWN:
        words = power.words or "it does not answer"
        return Decision(
            Act.HOLD,
            "bmc_unreachable",
            f"host {silent.name}: its BMC can't be asked ({words}), and silence proves nothing: cut its power by hand, "
            "then confirm it",
        )
    if power.read_age is None or power.read_age > FRESH_SECONDS:
        return Decision(Act.READ, "read", _asking(silent))
    if silent.soft is not SoftState.NONE:
        return Decision(
            Act.WAIT,
            "soft_fence",
            f"host {silent.name}: its agent is restarted over SSH before it is ordered off",
        )
    if record is not None and record.offs and record.last_off_age < config.off_retry_seconds:
        return Decision(
            Act.WAIT, "ordered_off", f"host {silent.name}: it was ordered off; its BMC says on so far"
        )
    return Decision(Act.POWER_OFF, "fence", f"host {silent.name}: it is ordered off")


def _after_death(silent: Silent, config: HaConfig) -> Decision:
    """Only what ha switched off does it switch on again."""
    record = silent.record
    if record is None or record.boot_id != silent.boot_id:
        return Decision(Act.NOTHING, "dead")
    early = record.proven_age < config.on_wait_seconds
    if silent.unsettled_vms and early:
        return Decision(Act.WAIT, "settling", f"host {silent.name}: it is off; its VMs are dealt with first")
    power = silent.power
    if power is not None and power.enabled and not power.executor and early:
        return Decision(
            Act.WAIT, "no_executor", f"host {silent.name}: it is off; nobody can switch it on at the moment"
        )
    if power is None or not power.enabled or not power.executor:
        return Decision(
            Act.CLOSE, "left_off", f"host {silent.name}: it is off, and nobody can switch it on again"
        )
    if record.last_on_age < config.off_retry_seconds:
        return Decision(
            Act.WAIT, "ordered_on", f"host {silent.name}: it was ordered on and has not started yet"
        )
    return Decision(
        Act.POWER_ON, "on", f"host {silent.name}: it is off, its VMs were dealt with; it is switched on again"
    )


def brake_limit(hosts: int, config: HaConfig) -> int:
    """How many hosts of a cluster may be ordered off within the window."""
    return max(1, int(hosts * config.brake_percent / 100))


def brake_sentence(name: str, limit: int, hosts: int, config: HaConfig) -> str:
    return (
        f"host {name}: {limit} of the {hosts} hosts of its cluster were ordered off within "
        f"{config.brake_window_seconds / 60:g} minutes, which is the most without a person: look at the network, then "
        "confirm that it was rebooted, or switch it off by hand"
    )


def is_majority(answering: int, hosts: int) -> bool:
    """Whether the hosts that ha hears are the side that goes on. Half is enough: of two hosts one is dead."""
    return answering > 0 and answering * 2 >= hosts
