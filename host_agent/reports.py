"""Says what is on this host: full reports to each owner, and every change of a domain in between.

A report gets its number before anything is looked at, so that whatever happens meanwhile is told after it and an
older look never hides a newer event. A host whose hypervisor can't be asked doesn't report that it has no domains, or
no LUN open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec

from host_agent.action import Host
from host_agent.clock import BootClock
from host_agent.events import EventName, HypervisorEvent
from host_agent.facts import MAX_FACT_BYTES, FactClass, Reservation
from host_agent.journal import Journal
from host_agent.shutdown import HOST_SHUTDOWN, KEEPS_ITS_REASON
from host_agent.spool import Spool
from host_agent.storage_watch import Tell
from volery.contracts.agent import (
    DOMAIN_CHANGED,
    DOMAIN_EVENT_HAPPENED,
    HOST_REPORTED,
    NETWORKS_REPORTED,
    STORAGE_CHECKED,
    STORAGE_REPORTED,
    BridgeReport,
    DomainChanged,
    DomainEventHappened,
    DomainReport,
    FromHost,
    HostCapabilities,
    HostReported,
    LunClaim,
    NetworksReported,
    OpenLun,
    StorageChecked,
    StorageDomainReport,
    StorageReported,
)
from volery.contracts.base import Fact, Owner, encode
from volery.contracts.domain import DomainState
from volery.contracts.errors import Refused
from volery.runtime.clock import utc_now

log = logging.getLogger(__name__)

REPORT_RETRY_SECONDS: Final = 2.0
ASKS: Final = 64
"""The newest of those that wait for one report; whoever isn't answered asks again."""
SETTLE_SECONDS: Final = 5.0
"""How long libvirt's event may stay away for a domain that has ended."""
ASK_LIBVIRT: Final = (Owner.INVENTORY.value, Owner.STORAGE.value)
"""Whose reports say what QEMU processes do."""
REPORTED_TO: Final = (Owner.INVENTORY.value, Owner.STORAGE.value, Owner.NETWORK.value)


@dataclass(frozen=True, slots=True)
class Senses:
    """How a host finds out about itself. Each may raise Refused, and is then asked again."""

    describe: Callable[[Host], Awaitable[HostCapabilities]]
    storage: Callable[[Host], Awaitable[tuple[StorageDomainReport, ...]]]
    networks: Callable[[Host], Awaitable[tuple[BridgeReport, ...]]]
    open_luns: Callable[[Host], Awaitable[tuple[OpenLun, ...]]]
    lun_claims: Callable[[Host], Awaitable[tuple[LunClaim, ...]]]
    watch_storage: Callable[[Host, Tell], Coroutine[Any, Any, None]] | None = None
    """Runs for as long as the agent lives, and tells of a domain that can't be read any more, or can again."""
    watch_networks: Callable[[Host, Callable[[], None]], Coroutine[Any, Any, None]] | None = None
    """Likewise, and says when the networks are not as they were."""


class Reporter:
    """`ask` and `hear` return at once; `run` does the work for as long as the agent lives."""

    def __init__(
        self,
        host: Host,
        journal: Journal,
        spool: Spool,
        clock: BootClock,
        senses: Senses,
        going_down: Callable[[], Awaitable[bool]],
    ) -> None:
        self._host = host
        self._journal = journal
        self._spool = spool
        self._clock = clock
        self._senses = senses
        self._going_down = going_down
        self._wanted: dict[str, bool] = {}
        self._asked: dict[str, list[str]] = {}
        """Owner → what its next report answers."""
        self._answering: dict[str, tuple[str, ...]] = {}
        """Owner → what the report that is being put together answers."""
        self._wake = {owner: asyncio.Event() for owner in REPORTED_TO}
        self._dirty: dict[str, HypervisorEvent] = {}
        self._unread: set[str] = set()
        """Domains of which more than the state may have changed since they were looked at."""
        self._gone = asyncio.Event()
        """Set whenever a domain's end is told."""
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._telling: set[asyncio.Task[Any]] = set()
        self._seen: dict[str, DomainReport] = {}
        """What its owner was told last of each domain."""
        self._told: dict[str, int] = {}
        """Domains that were told since the last report was begun, by the number of the fact."""
        self._make: dict[str, Callable[[Reservation], Awaitable[FromHost]]] = {
            Owner.INVENTORY: self._host_report,
            Owner.STORAGE: self._storage_report,
            Owner.NETWORK: self._network_report,
        }
        self._facts: dict[str, Fact[Any]] = {
            Owner.INVENTORY: HOST_REPORTED,
            Owner.STORAGE: STORAGE_REPORTED,
            Owner.NETWORK: NETWORKS_REPORTED,
        }

    def ask(self, owner: str, rebase: bool = False, ask: str = "") -> None:
        """A full report to this owner is wanted; asking twice before it is made gives one, which names both (`ask`)."""
        if owner in self._wake:
            self._wanted[owner] = self._wanted.get(owner, False) or rebase
            asked = self._asked.setdefault(owner, [])
            if ask and ask not in asked:
                self._asked[owner] = [*asked, ask][-ASKS:]
            self._wake[owner].set()

    def hear(self, event: HypervisorEvent) -> None:
        """The hypervisor's events, in order."""
        if event.name is EventName.CONNECTED:
            self.ask(Owner.INVENTORY)
            self.ask(Owner.NETWORK)
        if event.changes_report:
            self._dirty[event.vm_id] = event
            if not event.changes_state_only:
                self._unread.add(event.vm_id)
            if event.vm_id not in self._looks:
                self._looks[event.vm_id] = asyncio.create_task(self._look(event.vm_id))
        if event.happened and event.vm_id:
            self._keep(asyncio.create_task(self._tell_event(event)))

    async def run(self) -> None:
        """Reports at start, whenever one is asked for, and from time to time; and what the watches see in between."""
        async with asyncio.TaskGroup() as group:
            if self._senses.watch_storage is not None:
                group.create_task(self._senses.watch_storage(self._host, self._tell_check))
            if self._senses.watch_networks is not None:
                ask = partial(self.ask, Owner.NETWORK)
                group.create_task(self._senses.watch_networks(self._host, ask))
            for owner in REPORTED_TO:
                self.ask(owner)
                group.create_task(self._serve(owner), name=f"reports to {owner}")

    async def _serve(self, owner: str) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._host.config.report_seconds):
                    await self._wake[owner].wait()
            self._wake[owner].clear()
            rebase = self._wanted.pop(owner, False)
            self._answering[owner] = tuple(self._asked.pop(owner, ()))
            try:
                await self._report(owner, rebase)
            except (Refused, sqlite3.Error) as problem:
                log.warning("the report to %s waits: %s", owner, problem)
                await asyncio.sleep(REPORT_RETRY_SECONDS)
                self._asked[owner] = [*self._answering[owner], *self._asked.get(owner, ())][-ASKS:]
                self.ask(owner, rebase)

    async def _report(self, owner: str, rebase: bool) -> None:
        if owner in ASK_LIBVIRT:  # before a number is kept, since what follows it waits
            await self._host.hypervisor.wait_connected(60.0)
        async with self._spool.report(owner, rebase) as reservation:
            report = await self._make[owner](reservation)
            body = encode(report)
            if len(body) > MAX_FACT_BYTES:
                log.error(
                    "the report to %s has %d bytes, more than the bus carries: it is not sent",
                    owner,
                    len(body),
                )
                return
            await self._journal.put_report(reservation, self._facts[owner].subject_for(report), body)

    async def _host_report(self, reservation: Reservation) -> HostReported:
        capabilities = await self._senses.describe(self._host)
        domains = await self._host.hypervisor.list_domains()
        ours = [(d.vm_id, d.epoch, d.order_seq) for d in domains if d.installation]
        await self._journal.learn(Owner.INVENTORY, ours)
        self._report_seen(domains, reservation.seq)
        await self._journal.remember_domains(tuple(self._seen.values()), no_others=True)
        return HostReported(
            **self._from_host(),
            capabilities=capabilities,
            domains=tuple(domains),
            orders=await self._journal.orders_of(Owner.INVENTORY),
            gap=reservation.gap,
            asked=self._answering.get(Owner.INVENTORY, ()),
            storage_work=await self._journal.at_work(Owner.STORAGE),
        )

    def _report_seen(self, domains: Collection[DomainReport], seq: int) -> None:
        """The report tells all of them; of a domain that was told meanwhile its owner hears that after the report."""
        self._told = {vm_id: told for vm_id, told in self._told.items() if told > seq}
        listed = {domain.vm_id: domain for domain in domains if domain.vm_id not in self._told}
        later = {vm_id: domain for vm_id, domain in self._seen.items() if vm_id in self._told}
        self._seen = listed | later

    async def _storage_report(self, reservation: Reservation) -> StorageReported:
        return StorageReported(
            **self._from_host(),
            domains=await self._senses.storage(self._host),
            open_luns=await self._senses.open_luns(self._host),
            lun_claims=await self._senses.lun_claims(self._host),
            orders=await self._journal.orders_of(Owner.STORAGE),
            gap=reservation.gap,
            asked=self._answering.get(Owner.STORAGE, ()),
        )

    async def _network_report(self, reservation: Reservation) -> NetworksReported:
        capabilities = await self._senses.describe(self._host)
        return NetworksReported(
            **self._from_host(),
            networks=await self._senses.networks(self._host),
            nics=capabilities.nics,
            orders=await self._journal.orders_of(Owner.NETWORK),
            gap=reservation.gap,
            asked=self._answering.get(Owner.NETWORK, ()),
        )

    async def _look(self, vm_id: str) -> None:
        """One look per change, one at a time per domain: the last look is later than the last change."""
        try:
            while (event := self._dirty.pop(vm_id, None)) is not None:
                whole = vm_id in self._unread
                self._unread.discard(vm_id)
                try:
                    domain = await self._domain(event, whole)
                    if not _is_known(event, domain, self._seen.get(vm_id)):
                        await self._tell_domain(domain)
                except (Refused, sqlite3.Error) as problem:
                    # libvirtd went away or hangs, or the disk is full: then everything is listed.
                    log.warning("VM %s changed and could not be looked at: %s", vm_id, problem)
                    self._unread.add(vm_id)
                    self.ask(Owner.INVENTORY)
        finally:
            del self._looks[vm_id]

    async def _domain(self, event: HypervisorEvent, whole: bool) -> DomainReport:
        """`whole`: all of it is looked at, not its state alone."""
        vm_id = event.vm_id
        before = self._seen.get(vm_id)
        if event.name is EventName.UNRESPONSIVE and before is not None:
            # Not asked: it would hang as well.
            return msgspec.structs.replace(before, responsive=False)
        now = await self._host.hypervisor.domain(vm_id, None if whole else before)
        if now.state is DomainState.GONE and before is not None:
            # libvirt has forgotten it; its owner wants to know which placement has ended, and how.
            now = msgspec.structs.replace(
                before,
                state=DomainState.GONE,
                reason=await self._why_gone(str(event.details.get("reason", ""))),
                agent_connected=False,
            )
        return now

    async def _why_gone(self, reason: str) -> str:
        """On a host that is going down guests are shut down, or killed, for that alone."""
        if reason in KEEPS_ITS_REASON or not await self._going_down():
            return reason
        return HOST_SHUTDOWN

    async def settle(self, ended: Collection[str]) -> None:
        """Returns when the end of these VMs is spooled, and whatever else is being looked at. Each is told once, by
        libvirt's own event: a second look finds nothing any more, and would take the place of the first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                while any(vm_id in self._seen for vm_id in ended):
                    self._gone.clear()
                    await self._gone.wait()
        while looks := list(self._looks.values()):
            await asyncio.wait(looks)

    async def _tell_domain(self, domain: DomainReport) -> None:
        said = DomainChanged(**self._from_host(), domain=domain)
        spooled = await self._journal.put(
            Owner.INVENTORY,
            DOMAIN_CHANGED.subject_for(said),
            encode(said),
            FactClass.STATE,
            f"domain:{domain.vm_id}",
        )
        await self._journal.remember_domains((domain,))
        self._told[domain.vm_id] = spooled.seq
        if domain.state is DomainState.GONE:
            self._seen.pop(domain.vm_id, None)
            self._gone.set()
        else:
            self._seen[domain.vm_id] = domain

    async def _tell_event(self, event: HypervisorEvent) -> None:
        before = self._seen.get(event.vm_id)
        said = DomainEventHappened(
            **self._from_host(),
            vm_id=event.vm_id,
            epoch=before.epoch if before is not None else 0,
            event=event.name.value,
            details=dict(event.details),
        )
        subject = DOMAIN_EVENT_HAPPENED.subject_for(said)
        try:
            await self._journal.put(Owner.INVENTORY, subject, encode(said), FactClass.EVENT)
        except sqlite3.Error as error:
            log.error("event %s of VM %s is lost: %s", event.name, event.vm_id, error)

    async def _tell_check(self, domain_id: str, problem: str) -> None:
        said = StorageChecked(**self._from_host(), domain_id=domain_id, readable=not problem, problem=problem)
        subject = STORAGE_CHECKED.subject_for(said)
        try:
            await self._journal.put(
                Owner.STORAGE, subject, encode(said), FactClass.STATE, f"check:{domain_id}"
            )
        except sqlite3.Error as error:
            log.error("what a read of storage domain %s came to is lost: %s", domain_id, error)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def _from_host(self) -> dict[str, Any]:
        """The numbers are stamped when the fact is published."""
        return {
            "host_id": self._host.host_id,
            "generation": self._journal.generation,
            "seq": 0,
            "after_seq": 0,
            "boot_id": self._clock.boot_id,
            "at": utc_now(),
        }


def _is_known(event: HypervisorEvent, now: DomainReport, before: DomainReport | None) -> bool:
    """Whether nothing has changed: also for a domain that was never seen and still isn't here."""
    if before is None:
        return now.state is DomainState.GONE and event.state is not DomainState.GONE
    return now == before
