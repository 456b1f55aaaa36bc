"""What a running scheduler holds: its fleet in memory, kept in step with the tables by every replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from nats.aio.msg import Msg

from services.scheduler import (
    affinity_store,
    capacity_store,
    cell_store,
    cpu_store,
    device_store,
    policy_store,
    store,
)
from services.scheduler.cells import needs_from
from services.scheduler.config import SchedulerConfig
from services.scheduler.figures import Measured
from services.scheduler.fleet import Fleet
from services.scheduler.looks import Looks
from services.scheduler.model import Audit, ClusterPolicy, Looked
from services.scheduler.pages import Pages
from services.scheduler.policies.affinity import ClusterRules
from services.scheduler.policies.idle import Idle
from services.scheduler.policies.promise import Guest
from services.scheduler.policies.units import HIGH_UTILIZATION, LOW_UTILIZATION, PARAMETERS
from services.scheduler.rounds import Rounds
from volery.contracts.metrics import METRICS_SUBJECT, HostSample
from volery.contracts.scheduling import Claim
from volery.runtime.clock import monotonic
from volery.runtime.core import Core
from volery.runtime.together import Together

log = logging.getLogger(__name__)

USED_SECONDS = 1.0
"""How old the other replicas' claims may be in this one's fleet; a guard in the database has the last word."""
FEW_HOSTS = 100
"""So many are read by themselves; of more the whole table is."""
RETRY_SECONDS = 0.5
LOW_PERCENT = PARAMETERS[LOW_UTILIZATION].default
CPU_STATES = 1000
"""So many that no host has any more are kept beside those that some have."""


@dataclass(slots=True)
class Scheduler:
    core: Core
    fleet: Fleet = field(default_factory=Fleet)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever the fleet followed a change; whoever waits for news clears it first."""
    listed: set[str] = field(default_factory=set)
    """Streams whose owners were listed since this process leads."""
    rules: dict[str, ClusterRules] = field(default_factory=dict)
    """Cluster → its affinity groups; a guard in the database has the last word here, too."""
    guests: dict[str, tuple[int, dict[str, Guest]]] = field(default_factory=dict)
    """Cluster that promises to survive losses → the VMs there, as of a count of what changes that; guarded the same way."""
    audits: dict[str, Audit] = field(default_factory=dict)
    """The leader's last look at each promise."""
    looked: Looked = field(default_factory=Looked)
    """The leader's last look at the groups."""
    loads: dict[str, dict[str, float]] = field(default_factory=dict)
    """Host → its VMs → how many CPUs' worth of work each does, by the host's last sample."""
    moving: dict[str, asyncio.Event] = field(default_factory=dict)
    """VM that a plan moves → set when inventory says something of it."""
    planned_at: dict[str, float] = field(default_factory=dict)
    """Cluster → when the leader last looked whether it needs a plan."""
    rested_at: dict[str, float] = field(default_factory=dict)
    """Cluster → when the leader last looked whether hosts may sleep there, or are to be woken."""
    idle: Idle = field(default_factory=Idle)
    looks: Looks = field(default_factory=Looks)
    short: dict[str, str] = field(default_factory=dict)
    """Host that has promised more than it has → what was said of that."""
    used_as_of: int = 0
    """Up to which of the database's transactions this replica has read what claims hold; 0: it begins anew."""
    following: bool = False
    """Each change of the tables is told to this replica."""
    rounds: Rounds[Any] = field(init=False)
    """Placements and releases on their way (granting.py)."""
    _turns: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    _readings: Together[str, bool] = field(init=False)
    _samples: msgspec.json.Decoder[HostSample] = field(
        default_factory=lambda: msgspec.json.Decoder(HostSample)
    )

    def __post_init__(self) -> None:
        self._readings = Together(self._read)

    @property
    def config(self) -> SchedulerConfig:
        config: SchedulerConfig = self.core.config
        return config

    def policy(self, cluster_id: str) -> ClusterPolicy:
        """The cluster's own, or the defaults for one not heard of yet."""
        return self.fleet.clusters.get(cluster_id) or ClusterPolicy(cluster_id)

    def turn(self, group_id: str) -> asyncio.Lock:
        """Held by the one placement of this process that depends on where this group's VMs are."""
        return self._turns.setdefault(group_id, asyncio.Lock())

    async def read_rules(self, cluster_id: str) -> None:
        """A cluster with its affinity groups and its scheduling policy. The groups' revision, which guards a placement
        that is decided under all of them, is read first: what is read after it is at least as new."""
        pool = self.core.pool
        while True:
            found = await affinity_store.rules_of(pool, cluster_id)
            clusters = await store.clusters(pool, "id = $1", cluster_id)
            recipes = await policy_store.recipes_of(pool, cluster_id)
            known = self.rules.get(cluster_id)
            if found is None or known is None or known.revision <= found.revision:
                break
        if found is None:
            self.rules.pop(cluster_id, None)
        elif known is None or known.revision < found.revision:
            self.rules[cluster_id] = found
        self.fleet.clusters.pop(cluster_id, None)
        self.fleet.clusters.update({c.id: c for c in clusters})
        self.fleet.recipes.update({r.id: r for r in recipes})

    def took(self, claim: Claim) -> None:
        """In this replica's memory, ahead of the next reading."""
        self._hold(claim, 1)
        if claim.cpus is None:
            self.fleet.share(claim.host_id, claim.vcpus)
        elif self.fleet.held(claim.host_id).revision == claim.cpus.revision:
            more = self.fleet.held(claim.host_id).with_more(claim.cpus, claim.vcpus)
            self.fleet.hold(claim.host_id, more)

    def gave_back(self, claim: Claim) -> None:
        self._hold(claim, -1)

    def _hold(self, claim: Claim, times: int) -> None:
        memory, vcpus, guests, available, *pages = store.held(claim, times)
        self.fleet.use(claim.host_id, memory, vcpus, guests, available, Pages(*pages))
        self.fleet.use_cells(claim.host_id, needs_from(claim.cells), times)

    async def reload(self) -> None:
        """The whole fleet anew from the tables, as of now or later. Those who ask together share one reading."""
        await self._readings.get("all")

    async def _read(self, asked: Collection[str]) -> dict[str, bool]:
        if "all" in asked:
            await self._reload()
        else:
            await self._read_used()
        return {}

    async def _reload(self) -> None:
        self.used_as_of = 0
        hosts = await store.hosts(self.core.pool)
        cells = await cell_store.cells(self.core.pool)
        rules = await affinity_store.rules(self.core.pool)
        clusters = await store.clusters(self.core.pool)
        recipes = await policy_store.recipes(self.core.pool)
        self.rules = rules
        self.fleet.clusters = {c.id: c for c in clusters}
        self.fleet.recipes = {r.id: r for r in recipes}
        for network in (networks := await store.networks(self.core.pool)):
            self.fleet.set_network(network)
        for gone in self.fleet.networks.keys() - {n.id for n in networks}:
            self.fleet.drop_network(gone)
        self.fleet.keep_only(host.id for host in hosts)
        for host in hosts:
            self.fleet.put(host)
            self.fleet.put_cells(host.id, cells.get(host.id, ()))
        await self._read_cpus()
        await self._read_devices()
        self.changed.set()

    async def read_used(self) -> None:
        """The same of what claims hold, which changes most."""
        await self._readings.get("used")

    async def _read_used(self) -> None:
        guessed, self.fleet.guessed = self.fleet.guessed, set()
        try:
            found = await capacity_store.used(self.core.pool, self.used_as_of, guessed)
        except BaseException:  # also when it is cancelled: the next reading corrects them
            self.fleet.guessed |= guessed
            raise
        self.fleet.used(found.hosts)
        self.used_as_of = found.as_of
        self.fleet.used_cells(await cell_store.used(self.core.pool))
        await self._read_cpus()
        uses = await device_store.uses(self.core.pool)
        changed = [h for h in uses if uses[h] != self.fleet.devices.held(h).uses]
        if changed:
            await self._read_devices(changed)

    async def read_hosts(self, host_ids: Collection[str]) -> None:
        """These hosts as the tables have them, with what claims hold of them. Thousands change when a data center comes up."""
        if not host_ids:
            return
        found = await store.hosts(self.core.pool, "id = any($1::text[]) and not gone", list(host_ids))
        cells = await cell_store.cells(self.core.pool, list(host_ids))
        for host in found:
            self.fleet.put(host)
            self.fleet.put_cells(host.id, cells.get(host.id, ()))
        there = {host.id for host in found}
        for gone in [host_id for host_id in host_ids if host_id not in there]:
            self.fleet.remove(gone)
            self.idle.forget(gone)
        await self._read_cpus()
        await self._read_devices(host_ids)

    async def _read_devices(self, host_ids: Collection[str] | None = None) -> None:
        """Of these hosts, or of all: what they have, and who has what of it."""
        found = await device_store.listed(self.core.pool, host_ids)
        for host_id, listed in found.items():
            self.fleet.devices.put(host_id, listed.devices, listed.held)

    async def _read_cpus(self) -> None:
        """Of the hosts where CPUs were given or taken back since; what is read is at least as new as that is known."""
        now = await cpu_store.revisions(self.core.pool)
        changed = [host_id for host_id in now if now[host_id] != self.fleet.held(host_id).revision]
        if changed:
            for host_id, held in (await cpu_store.held(self.core.pool, changed)).items():
                self.fleet.hold(host_id, held)
        if len(self.fleet.cpu_states.states) > 2 * len(self.fleet) + CPU_STATES:
            self.fleet.forget_cpu_states()

    async def hear_more(self, host_ids: Sequence[str] = ()) -> None:
        """What would make room, on these hosts or on any, may be on its way: give facts a moment to arrive. Claims are told to
        nobody, so they are read; and so is everything while nothing is followed."""
        self.changed.clear()
        try:
            async with asyncio.timeout(self.config.refusal_wait_seconds):
                await self.changed.wait()
        except TimeoutError:
            await self._read_what_may_have(host_ids)

    async def _read_what_may_have(self, host_ids: Sequence[str]) -> None:
        if not self.following:
            await self.reload()
        elif 0 < len(host_ids) <= FEW_HOSTS:
            await self.read_hosts(host_ids)
        else:
            await self.read_used()

    async def _read_row(self, table: str, row_id: str) -> None:
        pool = self.core.pool
        if table == "cluster":
            await self.read_rules(row_id)
        elif table == "scheduling_policy":
            recipes = await policy_store.recipes(pool, "id = $1", row_id)
            self.fleet.recipes.pop(row_id, None)
            self.fleet.recipes.update({r.id: r for r in recipes})
        elif table == "network":
            networks = await store.networks(pool, "id = $1", row_id)
            self.fleet.drop_network(row_id)
            for network in networks:
                self.fleet.set_network(network)

    async def follow(self) -> None:
        """Keep the fleet in step with the tables, for ever."""
        while True:
            try:
                async with store.fleet_changes(self.core.pool) as changes:
                    await self.reload()
                    self.following = True
                    await self._follow(changes)
            except store.LOST as error:
                log.info("the fleet is read anew: %s", error or type(error).__name__)
            finally:
                self.following = False
            await asyncio.sleep(RETRY_SECONDS)

    async def _follow(self, changes: asyncio.Queue[str]) -> None:
        read_at = monotonic()
        while True:
            if (left := read_at + USED_SECONDS - monotonic()) <= 0:
                await self.read_used()
                read_at = monotonic()
                continue
            try:
                async with asyncio.timeout(left):
                    told = [await changes.get()]
            except TimeoutError:
                continue
            while not changes.empty():
                told.append(changes.get_nowait())
            if "" in told:
                return
            tables: dict[str, list[str]] = {}
            for change in dict.fromkeys(told):  # each once, in the order in which they came
                table, row_id = change.split(" ", 1)
                tables.setdefault(table, []).append(row_id)
            await self.read_hosts(tables.pop("host_capacity", []))
            for table, row_ids in tables.items():
                for row_id in row_ids:
                    await self._read_row(table, row_id)
            self.changed.set()

    async def hear_sample(self, message: Msg) -> None:
        try:
            sample = self._samples.decode(message.data)
        except msgspec.DecodeError:
            return
        if message.subject == METRICS_SUBJECT.format(host_id=sample.host_id):
            self.fleet.sample(sample.host_id, self._measured(sample))
            low = self.fleet.recipe_of(sample.host_id).parameters.get(LOW_UTILIZATION, LOW_PERCENT)
            apart = self.config.saving_heard_seconds
            self.idle.note(sample.host_id, sample.cpu_percent, low, monotonic(), apart)
            self.loads[sample.host_id] = {vm.vm_id: vm.cpu_percent / 100 for vm in sample.vms}

    def _measured(self, sample: HostSample) -> Measured:
        available = sample.memory_bytes - sample.memory_used_bytes
        high = self.fleet.recipe_of(sample.host_id).parameters.get(HIGH_UTILIZATION)
        return Measured(
            cpu_percent=sample.cpu_percent,
            busy=sample.cpu_percent >= (self.config.high_utilization_percent if high is None else high),
            at=monotonic(),
            swapped_bytes=max(sample.swap_used_bytes - available, 0),
        )
