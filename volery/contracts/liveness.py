"""What ha knows of hosts: evidence, never more than was observed."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from volery.contracts.base import Call, Entity, Fact, Message
from volery.contracts.cluster import GetById
from volery.contracts.operation import ListQuery, Page


class LivenessState(StrEnum):
    UP = "up"
    CONNECTING = "connecting"
    """Beats are missing, or the bus said that the agent left: suspected."""
    NON_RESPONSIVE = "non_responsive"
    """Silent beyond the limit. Silence is evidence, never proof of death."""
    DEAD = "dead"
    """Proven: see `proof`. What ran under the boot that the proof names runs no more."""
    UNKNOWN = "unknown"
    """ha itself has just started, or is cut off: it has no opinion yet."""


class Evidence(Message):
    """A dated observation."""

    kind: str
    """beat, former_beat, stranger_beat, silence, disconnected, connected, new_boot, report, listening (since when ha
    hears everything), bmc_off_first, bmc, person, lease, peer (one of each host that tried it), soft_fence,
    kdump_first and kdump (the first and the newest message of its crash kernel), proof (held before)"""
    at: datetime
    """The observer's clock."""
    details: str = ""
    boot_id: str = ""
    """Of which boot, where it is known."""
    power: str = ""
    """What a BMC said: on, off, unknown."""
    trusted: bool = False
    """Of a BMC's word: it was known to be this host's when it was asked. Of a crash kernel's: no guest can have sent it."""
    by: str = ""
    """Who asked the BMC, who confirmed, or who tried it; from where a crash kernel spoke."""
    reached: str = ""
    """How far a peer got: nothing, taken (a connection without a word), answers. Of soft_fence: answers if the agent was
    restarted."""


class ProofKind(StrEnum):
    """What proves that a boot of a host has ended (docs/architecture/liveness.md)."""

    BMC_OFF = "bmc_off"
    """Its BMC, whose identity was checked, said off twice, at least 2 s apart, after the last sign of life."""
    LEASE_EXPIRED = "lease_expired"
    """Its storage lease expired and the time of its watchdog has passed."""
    NEW_BOOT = "new_boot"
    """Its authenticated agent reports another boot."""
    KDUMP = "kdump"
    """Its crash kernel said twice, at least 2 s apart and after the last sign of life, that it writes a dump, by a network
    that is closed to guests."""
    PERSON = "person"
    """An administrator confirmed that it is off, or was rebooted."""


class Proof(Message):
    """That a boot of a host has ended. A sign of life of that boot newer than the proof voids it."""

    id: str
    kind: ProofKind
    at: datetime
    boot_id: str
    """The boot that ended."""
    details: str = ""
    """What was observed, in words."""


class HostLiveness(Entity):
    """`id` is the host's."""

    host_name: str = ""
    cluster_id: str = ""
    state: LivenessState = LivenessState.UNKNOWN
    since: datetime | None = None
    boot_id: str = ""
    last_beat_at: datetime | None = None
    evidence: tuple[Evidence, ...] = ()
    """The newest of each kind, and of each peer: all that the last judgement was made of."""
    judged_at: datetime | None = None
    """When `state` and `proof` were last judged; from then evidence is dated."""
    proof: Proof | None = None
    """The newest proof that a boot of this host ended. It stays after the host came back under another boot."""
    former: tuple[Proof, ...] = ()
    """The proofs before that one, of other boots, oldest first: for whoever did not hear them. A few are kept."""
    fencing: str = ""
    """What is being done about it, or why nothing is: a sentence."""


class VmRestart(Entity):
    """An automatic restart: why, and what came of it. `id` is the VM's."""

    vm_id: str
    vm_name: str = ""
    attempts: int = 0
    reason: str = ""
    last_operation_id: str = ""
    next_attempt_at: datetime | None = None
    gave_up: bool = False
    message: str = ""


class FindRestart(Message):
    vm_id: str


GET_LIVENESS = Call("ha.host.get", GetById, HostLiveness)
LIST_LIVENESS = Call("ha.host.list", ListQuery, Page)
LIST_RESTARTS = Call("ha.restart.list", ListQuery, Page)

LIVENESS_CHANGED = Fact("fact.ha.host.{id}.changed", HostLiveness)
LIVENESS_DELETED = Fact("fact.ha.host.{id}.deleted", HostLiveness)
RESTART_CHANGED = Fact("fact.ha.restart.{id}.changed", VmRestart)
RESTART_DELETED = Fact("fact.ha.restart.{id}.deleted", VmRestart)
