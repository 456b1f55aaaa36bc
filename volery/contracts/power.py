"""Power management of hosts: which BMCs switch them, what was done with them, and when it must not be done.

Secrets go in and never come out: they are in no answer, no fact and no log.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from msgspec import UNSET, UnsetType

from volery.contracts.base import Call, Done, Entity, Fact, Message
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.fencing import FenceDevice, PowerAction, PowerState
from volery.contracts.liveness import HostLiveness
from volery.contracts.operation import ListQuery, Page


class Identity(StrEnum):
    """Whether a host's BMCs are known to be its own."""

    UNCHECKED = "unchecked"
    """Not asked yet, could not be asked, or the device can't say: nothing is proven by it and nothing fenced."""
    CHECKED = "checked"
    """The UUID that every device says is the one that the host's own firmware says."""
    MISMATCH = "mismatch"
    """A device belongs to another machine."""


class NewFenceDevice(Message):
    """A fence agent and how it reaches a host's BMC."""

    agent: str
    """fence_ipmilan, fence_redfish, …"""
    address: str
    port: int = 0
    """0: the agent's own."""
    username: str = ""
    options: dict[str, str] = {}
    """Further parameters by the names of the agent's metadata: lanplus, ssl_insecure, plug, …"""
    secrets: dict[str, str] | UnsetType = UNSET
    """password, …: never shown. Unset keeps those of the same agent at the same address and port."""
    timeout_seconds: float = 20.0


class PowerManagement(Entity):
    """`id` is the host's."""

    host_name: str = ""
    cluster_id: str = ""
    enabled: bool = True
    """False: the host is never switched by ha, and its BMC proves nothing."""
    together: bool = False
    """True: the host has several power supplies, and is off when every device says so. False: the devices are several
    ways to one machine, tried in order."""
    devices: tuple[FenceDevice, ...] = ()
    identity: Identity = Identity.UNCHECKED
    identity_checked_at: datetime | None = None
    power: PowerState = PowerState.UNKNOWN
    """As the last test read it."""
    tested_at: datetime | None = None
    """Tested when it is set, daily, and when asked."""
    test_passed: bool = False
    test_words: str = ""
    """What the devices, or the agents that asked them, said."""
    kdump_addresses: tuple[str, ...] = ()
    """IP addresses from which its crash kernel sends `fence_kdump` messages: while they come power waits."""
    kdump_proves: bool = False
    """No guest can send from these addresses: a dump that is told twice proves that the boot has ended."""


class SetPowerManagement(Message):
    """Replaces what there was. It is tested at once, in the background."""

    id: str
    devices: tuple[NewFenceDevice, ...]
    if_revision: int = 0
    enabled: bool = True
    together: bool = False
    kdump_addresses: tuple[str, ...] = ()
    kdump_proves: bool = False
    """Say so only of a network that no VM and no stranger can send by: whoever can fakes a death, and VMs run twice."""


class TestPowerManagement(Message):
    """Ask every device whose machine it is and whether that is on. Switches nothing."""

    __test__ = False
    id: str


class SwitchPower(Message):
    """By hand. `off` needs the host's name in `confirm` unless it is in maintenance. Between two switches of a host
    three minutes pass, since a machine that starts looks dead."""

    id: str
    action: PowerAction
    confirm: str = ""
    reason: str = ""


class PowerSwitched(Message):
    """What became of it."""

    id: str
    action: PowerAction
    state: PowerState
    words: str = ""


class OrderPower(Message):
    """inventory to ha: switch a host that nothing runs on off to save power, or on again. May be asked again and again: what
    is done already is answered as done."""

    id: str
    revision: int
    """The host's. ha carries out nothing that was decided before what it carried out last."""
    boot_id: str = ""
    """To switch off: the boot that it is about."""
    dry_run: bool = False
    """Whether it would be refused now for what inventory doesn't know."""


class PowerOrdered(Message):
    """`state` is certain: after two readings off, or on and no order to switch it off can still come true. What isn't certain
    yet is refused as `unavailable`."""

    id: str
    state: PowerState
    was: PowerState = PowerState.UNKNOWN
    """Before it was switched."""
    words: str = ""


class ConfirmHostRebooted(Message):
    """A person's word that a host is off, or was rebooted: proof of death for what ran there. Refused while there is a
    sign of life."""

    id: str
    confirm: str
    """The host's name, typed."""
    reason: str = ""


class FencingScope(StrEnum):
    GLOBAL = "global"
    CLUSTER = "cluster"
    HOST = "host"


class FencingPause(Entity):
    """No host of this scope is switched off by ha until then. Proofs of death count all the same."""

    scope: FencingScope
    until: datetime
    object_id: str = ""
    """Of the cluster or the host."""
    reason: str = ""
    paused_by: str = ""


class PauseFencing(Message):
    scope: FencingScope = FencingScope.GLOBAL
    object_id: str = ""
    seconds: float = 3600.0
    """At most a week: a pause that nobody ends must end."""
    reason: str = ""


class ResumeFencing(Message):
    scope: FencingScope = FencingScope.GLOBAL
    object_id: str = ""


class FencingPolicy(Entity):
    """Which silent hosts of a cluster are spared though everything else says to switch them off. `id` is the cluster's.
    Proofs of death count all the same. To switch fencing off for a while, pause it."""

    skip_while_lease_alive: bool = False
    """A host whose storage lease is renewed runs, whatever its network does: its VMs are left where they are."""
    skip_if_connectivity_broken: bool = False
    connectivity_broken_percent: int = 50
    """With `skip_if_connectivity_broken`: nothing is switched off while at least this share of the cluster's hosts is
    silent without proof of death, the host itself included."""
    skip_while_peers_answer: bool = False
    """A host whose programs answer another host of the cluster runs, though ha doesn't hear its agent."""


class SetFencingPolicy(Message):
    """Replaces what there was; what is left out is the default."""

    id: str
    if_revision: int = 0
    skip_while_lease_alive: bool = False
    skip_if_connectivity_broken: bool = False
    connectivity_broken_percent: int = 50
    skip_while_peers_answer: bool = False


class FenceState(StrEnum):
    RUNNING = "running"
    OFF = "off"
    """Proven off; it is to be switched on again."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """A person is needed."""
    CANCELLED = "cancelled"
    """It showed signs of life before anything was switched, or after."""


class FenceStep(Message):
    at: datetime
    step: str
    """peers, ordered_off, off, proven, ordered_on, on, failed, …"""
    words: str = ""
    """What the device, or the agent that asked it, said; what peers found that tried the host."""


class FenceRecord(Entity):
    """One time that a host's power was switched, by ha or by hand."""

    host_id: str
    host_name: str = ""
    cluster_id: str = ""
    boot_id: str = ""
    """The boot that it is about."""
    state: FenceState = FenceState.RUNNING
    reason: str = ""
    requested_by: str = ""
    """`service:ha`, or who asked."""
    steps: tuple[FenceStep, ...] = ()
    ended_at: datetime | None = None


class Brake(Message):
    """How many hosts of a cluster ha ordered off lately, and how many it may."""

    cluster_id: str
    hosts: int
    ordered_off: int
    limit: int
    window_seconds: float


class KdumpListener(Message):
    """What the replica that answers heard of crash kernels, since it began."""

    port: int
    heard: int = 0
    """Messages that counted."""
    ignored: dict[str, int] = {}
    """By reason: wrong_size, wrong_magic, unknown_version, unknown_address, address_of_two_hosts."""
    last_ignored: str = ""
    """From where, and why."""
    problem: str = ""
    """Why none is heard: the port is taken, …; tried again every 2 s."""


class AskFencing(Message):
    """How things are with fencing."""


class Fencing(Message):
    pauses: tuple[FencingPause, ...] = ()
    brakes: tuple[Brake, ...] = ()
    """Of clusters in which something was ordered off lately."""
    held: tuple[HostLiveness, ...] = ()
    """Silent hosts without proof of death; `fencing` says what is being done, or why nothing is."""
    kdump: KdumpListener | None = None
    """None where ha hears no crash kernels (VOLERY_HA_KDUMP_PORT)."""


GET_POWER_MANAGEMENT = Call("ha.power.get", GetById, PowerManagement)
LIST_POWER_MANAGEMENT = Call("ha.power.list", ListQuery, Page)
SET_POWER_MANAGEMENT = Call("ha.power.set", SetPowerManagement, PowerManagement, mutates=True)
DELETE_POWER_MANAGEMENT = Call("ha.power.delete", DeleteById, Done, mutates=True)
TEST_POWER_MANAGEMENT = Call(
    "ha.power.test", TestPowerManagement, PowerManagement, mutates=True, timeout_seconds=120
)
SWITCH_POWER = Call("ha.power.switch", SwitchPower, PowerSwitched, mutates=True, timeout_seconds=120)
POWER_DOWN = Call("ha.power.down", OrderPower, PowerOrdered, mutates=True, timeout_seconds=15)
POWER_UP = Call("ha.power.up", OrderPower, PowerOrdered, mutates=True, timeout_seconds=15)
"""A BMC may take longer; whoever asks again meanwhile is told that it isn't certain yet."""
CONFIRM_HOST_REBOOTED = Call("ha.host.confirm_rebooted", ConfirmHostRebooted, HostLiveness, mutates=True)
GET_FENCING = Call("ha.fencing.get", AskFencing, Fencing)
PAUSE_FENCING = Call("ha.fencing.pause", PauseFencing, FencingPause, mutates=True)
RESUME_FENCING = Call("ha.fencing.resume", ResumeFencing, Done, mutates=True)
LIST_FENCING_PAUSES = Call("ha.fencing.list", ListQuery, Page)
GET_FENCING_POLICY = Call("ha.fencing_policy.get", GetById, FencingPolicy)
LIST_FENCING_POLICIES = Call("ha.fencing_policy.list", ListQuery, Page)
SET_FENCING_POLICY = Call("ha.fencing_policy.set", SetFencingPolicy, FencingPolicy, mutates=True)
LIST_FENCE_RECORDS = Call("ha.fence.list", ListQuery, Page)

POWER_MANAGEMENT_CHANGED = Fact("fact.ha.power_management.{id}.changed", PowerManagement)
POWER_MANAGEMENT_DELETED = Fact("fact.ha.power_management.{id}.deleted", PowerManagement)
FENCING_PAUSE_CHANGED = Fact("fact.ha.fencing_pause.{id}.changed", FencingPause)
FENCING_PAUSE_DELETED = Fact("fact.ha.fencing_pause.{id}.deleted", FencingPause)
FENCING_POLICY_CHANGED = Fact("fact.ha.fencing_policy.{id}.changed", FencingPolicy)
FENCING_POLICY_DELETED = Fact("fact.ha.fencing_policy.{id}.deleted", FencingPolicy)
FENCE_RECORD_CHANGED = Fact("fact.ha.fence_record.{id}.changed", FenceRecord)
FENCE_RECORD_DELETED = Fact("fact.ha.fence_record.{id}.deleted", FenceRecord)
