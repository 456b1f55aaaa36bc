"""What a running ha holds in memory: what it heard of each host, and since when it has been listening."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from nats.aio.client import Client
from nats.aio.msg import Msg

from services.ha.config import HaConfig
from services.ha.policies.kdump import Ignored, Source
from services.ha.policies.leases import Watched
from services.ha.watch import HostFacts, Watch
from volery.contracts.metrics import Beat
from volery.runtime.clock import monotonic
from volery.runtime.connection import read_presence
from volery.runtime.core import Core
from volery.runtime.vault import Vault

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Unjudged:
    """Whose protection is to be judged anew. Times are monotonic."""

    vm_ids: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    """VMs of which something is written."""
    all_due: float = 0.0
    """When all of them are judged again."""
    all_at: float = float("-inf")
    settings: frozenset[tuple[str, int]] = frozenset()
    """How power management and pauses of fencing were when it was last looked."""
    leases: dict[str, str] = field(default_factory=dict)
    """Host → storage domain whose lease could prove its death, as storage said last."""

    def mark_all(self, within: float, between: float) -> None:
        """All of them are due within so many seconds, but not twice within `between`."""
        self.all_due = min(self.all_due, max(monotonic() + within, self.all_at + between))


@dataclass(slots=True)
class LeaseWatch:
    """What was read of a silent host's leases."""

    watched: dict[str, Watched] = field(default_factory=dict)
    """By storage domain."""
    next_at: float = 0.0
    reading: bool = False


class WaitsFor(StrEnum):
    """What a start failed for that passes."""

    ROOM = "room"
    HOSTS = "hosts"
    """That are coming back after a blackout."""
    LOCK = "lock"
    """Of a disk, or the lease of the host before."""


@dataclass(slots=True)
class Wait:
    """A VM whose last start failed. Times are monotonic."""

    what: WaitsFor
    refused_at: float
    """When it was last tried, or asked about, in vain."""
    until: float
    """When it is tried again in any case."""


@dataclass(slots=True)
class Dumps:
    """What this replica hears of crash kernels."""

    sources: dict[str, Source | None] = field(default_factory=dict)
    """By address; None: two hosts name it."""
    heard: int = 0
    """Messages that counted."""
    ignored: Counter[Ignored] = field(default_factory=Counter)
    last_ignored: str = ""
    problem: str = ""
    """Why none is heard."""


@dataclass(slots=True)
class Ha:
    core: Core
    vault: Vault
    orders: Client
    """The connection for what must not be sent late: publishing while it is disconnected fails at once."""
    sign: Callable[[str, bytes], str]
    watches: dict[str, Watch] = field(default_factory=dict)
    clusters: defaultdict[str, dict[str, Watch]] = field(default_factory=lambda: defaultdict(dict))
    """Cluster → its hosts, as inventory said: each silent host is asked about those around it, of ten thousand."""
    leading_since: float = 0.0
    listening_since: float = 0.0
    ticked_at: float = 0.0
    reconnects: int = -1
    storm_since: float | None = None
    listed: bool = False
    """Whether inventory was listed since this process leads."""
    at_power: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    """One action per host at a time."""
    read_at: dict[str, float] = field(default_factory=dict)
    """Host → when its BMC last answered, or failed to."""
    identified_at: dict[str, float] = field(default_factory=dict)
    """Host → when its BMC last said whose it is, and it was right."""
    ordering: set[str] = field(default_factory=set)
    """Hosts whose power is being ordered to save power."""
    acted_at: dict[str, float] = field(default_factory=dict)
    """Host → when a person last switched its power."""
    ordered_off: list[tuple[str, str, float]] = field(default_factory=list)
    """(cluster, host, when) of this process's own orders: the brake's window, should the database's clock jump."""
    capacity_at: float = float("-inf")
    """When there may last have come room for VMs."""
    room_found: dict[str, float] = field(default_factory=dict)
    """VM that fitted nowhere → when room was found for it, which has not gone since."""
    room_asked_at: float = float("-inf")
    silent: frozenset[str] = frozenset()
    """Hosts that no start would have reached when it was last looked at VMs that ended."""
    waits: dict[str, Wait] = field(default_factory=dict)
    """VM whose last start failed for what passes → what it waits for."""
    called: set[str] = field(default_factory=set)
    """VMs that wait, and are tried before less important ones that could be started now."""
    turns: dict[str, float] = field(default_factory=dict)
    """VM that ended → since when only more important ones keep it from being started."""
    unjudged: Unjudged = field(default_factory=Unjudged)
    opened_at: float = field(default_factory=monotonic)
    lease_watches: dict[str, LeaseWatch] = field(default_factory=dict)
    """Silent host → what is read of its leases."""
    witnessed: tuple[float, bool] = (float("-inf"), True)
    """When witnesses were last asked, and whether they answered."""
    dumps: Dumps = field(default_factory=Dumps)

    @property
    def config(self) -> HaConfig:
        config: HaConfig = self.core.config
        return config

    def watch(self, host_id: str) -> Watch:
        found = self.watches.get(host_id)
        if found is None:
            found = self.watches[host_id] = Watch()
        return found

    def learn(self, facts: HostFacts) -> None:
        """What inventory says of a host, unless it is older than what is known."""
        watch = self.watch(facts.id)
        if facts.revision >= watch.facts.revision:
            if watch.facts.cluster_id != facts.cluster_id:
                self.clusters[watch.facts.cluster_id].pop(facts.id, None)
            watch.facts = facts
            self.clusters[facts.cluster_id][facts.id] = watch

    def forget(self, host_id: str) -> None:
        watch = self.watches.pop(host_id, None)
        if watch is not None:
            self.clusters[watch.facts.cluster_id].pop(host_id, None)

    def hear_beat(self, beat: Beat, now: float) -> None:
        self.watch(beat.host_id).hear(beat, now)

    async def hear_presence(self, message: Msg) -> None:
        """The NATS server's word that a user came or went. Never log the message: it carries the user's token."""
        try:
            presence = read_presence(message.data)
        except ValueError:
            return
        watch = self.watches.get(presence.name)
        if watch is None:
            return
        if message.subject.endswith(".DISCONNECT"):
            watch.disconnected_at, watch.disconnect_reason = monotonic(), presence.reason
        else:
            watch.connected_at, watch.disconnected_at = monotonic(), None
