"""What ten thousand hosts do: each as `bench.fleet` has one, all at the pace of one clock instead of four tasks each."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from nats.aio.client import Client

from bench.fleet import BEAT_SECONDS, CHANGE_SECONDS, SAMPLE_SECONDS, FleetHost
from bench.world import Installation
from fleet.seeds import Seeded
from fleet.wire import HostWire, connect
from volery.contracts.agent import (
    CANCEL_SUBJECT,
    COMMITTED_SUBJECT,
    ORDER_SUBJECT,
    REPORT_SUBJECT,
    DomainReport,
)
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import RUN_DOMAIN
from volery.runtime.identity import Realm, mint_agent

AT_ONCE = 50
"""Handshakes at the same time."""
SLOTS = 50
"""Parts of a beat's time among which hosts are spread."""
RETURN_AT_ONCE = 8
TRIES = 20
"""Connections that a host tries before the fleet can't be made."""
RETURN_SECONDS = 1.0
"""After which a host whose connection was lost connects again; the real agent waits for up to two seconds."""
AGAIN_SECONDS = 10.0
"""What an owner has not confirmed is said again: the real agent waits for so long, too, where an owner is busy."""
OWNERS = ("inventory", "storage", "network")

Connect = Callable[[], Awaitable[HostWire]]
"""Makes a host's connection. Raises OSError or TimeoutError."""


@dataclass
class PacedHost(FleetHost):
    """Says what it is told to say, when it is told."""

    wire: HostWire | None = None
    connect: Connect | None = None
    dead: bool = False
    """It was cut off, and never comes back."""
    returns: int = 0
    """How often it connected again."""
    returning: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.owners = OWNERS
        await self._listen()

    def cut(self) -> None:
        """As a host that loses its power."""
        self.dead = True
        if self.returning is not None:
            self.returning.cancel()
        if self.wire is not None:
            self.wire.cut()

    def come_back(self, gate: asyncio.Semaphore) -> None:
        """As an agent whose connection was lost: on a machine that is busy the server gives up who is silent for two seconds.
        Each handshake takes both sides milliseconds, so there are some at a time."""
        if not self.dead and (self.returning is None or self.returning.done()):
            self.returning = asyncio.create_task(self._come_back(gate))

    async def _come_back(self, gate: asyncio.Semaphore) -> None:
        await asyncio.sleep(RETURN_SECONDS)
        async with gate:
            if self.dead:
                return
            with suppress(OSError, TimeoutError):
                await self._connect()

    async def _connect(self) -> None:
        assert self.connect is not None
        self.wire = await self.connect()
        self.returns += 1
        await self._listen()

    async def _listen(self) -> None:
        assert self.wire is not None
        # The wire has the four methods of nats-py's client that a host uses.
        self.client = cast("Client", self.wire)
        heard = {
            ORDER_SUBJECT: self._order,
            CANCEL_SUBJECT: self._cancel,
            COMMITTED_SUBJECT: self._committed,
            REPORT_SUBJECT: self._report,
        }
        for subject, callback in heard.items():
            await self.wire.subscribe(subject.format(host_id=self.host_id), cb=cast("Any", callback))
        await self.wire.flush()
        self.does(RUN_DOMAIN, self._run_domain)
        self.reports["inventory"] = self._inventory

    async def first_words(self) -> None:
        await self.beat()
        for owner in self.owners:
            await self.report(owner)

    async def again(self) -> None:
        """All that its owners have not confirmed."""
        for spool in self.spools.values():
            for subject, body in list(spool.waiting.values()):
                assert self.client is not None
                await self.client.publish(subject, body)

    @property
    def unheard_facts(self) -> int:
        return sum(len(spool.waiting) for spool in self.spools.values())


@dataclass
class Pace:
    """Beats every half second, each host in its slot; samples, changes and what must be said again in their turns."""

    hosts: Sequence[PacedHost]
    late: float = 0.0
    """The longest that a slot began after its time: what the machine, not Volery, couldn't keep."""
    slots: list[list[PacedHost]] = field(default_factory=list)
    beat_seconds: float = BEAT_SECONDS
    changing: bool = False
    """VMs change, one after the other, each once a minute."""

    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(RETURN_AT_ONCE))

    def __post_init__(self) -> None:
        self.slots = [list(self.hosts[slot::SLOTS]) for slot in range(SLOTS)]

    async def keep(self) -> None:
        loop = asyncio.get_running_loop()
        begun, number = loop.time(), 0
        while True:
            due = begun + number * self.beat_seconds / SLOTS
            wait = due - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            else:
                self.late = max(self.late, -wait)
                await asyncio.sleep(0)
            for host in self.slots[number % SLOTS]:
                with suppress(ConnectionError):
                    await self._turn(host, number // SLOTS)
            number += 1

    async def _turn(self, host: PacedHost, beat: int) -> None:
        assert host.wire is not None
        if host.wire.lost:
            host.come_back(self.gate)
            return
        await host.beat()
        phase = hash(host.host_id)
        if self._due(beat + phase, SAMPLE_SECONDS):
            await host.sample()
        if self.changing and host.domains and self._due(beat + phase, CHANGE_SECONDS / len(host.domains)):
            await host.change()
        if host.unheard_facts and self._due(beat + phase, AGAIN_SECONDS):
            await host.again()

    def _due(self, beat: int, seconds: float) -> bool:
        return beat % max(1, round(seconds / self.beat_seconds)) == 0


def _host(seeded: Seeded, wire: HostWire, installation: str) -> PacedHost:
    host = PacedHost("", seeded.host.id, name=seeded.host.name, wire=wire)
    for vm in seeded.vms:
        host.domains[vm.id] = DomainReport(
            vm_id=vm.id,
            epoch=vm.epoch,
            order_seq=1,
            name=vm.name,
            state=DomainState.RUNNING,
            reason="booted",
            installation=installation,
            memory_bytes=vm.memory_bytes,
            vcpus=vm.vcpus,
        )
    return host


async def _started(one: Seeded, link: Connect, installation: str) -> PacedHost:
    """Tried again: a server that is busy with thousands of handshakes gives up who is late in one."""
    for left in reversed(range(TRIES)):
        try:
            host = _host(one, await link(), installation)
            host.connect = link
            await host.start()
            return host
        except (OSError, TimeoutError):
            if not left:
                raise
            await asyncio.sleep(RETURN_SECONDS)
    raise AssertionError("one try at least")


async def connected(there: Installation, seeds: Sequence[Seeded]) -> list[PacedHost]:
    """Every host on a connection of its own, signed in as itself; none has said anything yet."""
    realm = Realm.load(there.home.bus_credentials)
    bus = there.bus
    url, tls = bus.servers.split(",")[0], ssl.create_default_context(cafile=bus.ca_file)
    turns: Iterator[Seeded] = iter(seeds)
    made: list[PacedHost] = []

    async def some() -> None:
        for one in turns:
            jwt = mint_agent(realm, one.host.id, one.key.public)
            link = partial(connect, url, tls, one.host.id, jwt, one.key)
            made.append(await _started(one, link, there.home.installation))

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return made
