"""What ten thousand hosts do: each as `bench.fleet` has one, all at the pace of one clock instead of four tasks each."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
AGAIN_SECONDS = 10.0
"""What an owner has not confirmed is said again: the real agent waits for so long, too, where an owner is busy."""
OWNERS = ("inventory", "storage", "network")


@dataclass
class PacedHost(FleetHost):
    """Says what it is told to say, when it is told."""

    wire: HostWire | None = None

    async def start(self) -> None:
        assert self.wire is not None
        self.owners = OWNERS
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
    changing: bool = False
    """VMs change, one after the other, each once a minute."""

    def __post_init__(self) -> None:
        self.slots = [list(self.hosts[slot::SLOTS]) for slot in range(SLOTS)]

    async def keep(self) -> None:
        loop = asyncio.get_running_loop()
        begun, number = loop.time(), 0
        while True:
            due = begun + number * BEAT_SECONDS / SLOTS
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
            return
        await host.beat()
        phase = hash(host.host_id)
        if _due(beat + phase, SAMPLE_SECONDS):
            await host.sample()
        if self.changing and host.domains and _due(beat + phase, CHANGE_SECONDS / len(host.domains)):
            await host.change()
        if host.unheard_facts and _due(beat + phase, AGAIN_SECONDS):
            await host.again()


def _due(beat: int, seconds: float) -> bool:
    return beat % max(1, round(seconds / BEAT_SECONDS)) == 0


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
            wire = await connect(url, tls, one.host.id, jwt, one.key)
            host = _host(one, wire, there.home.installation)
            await host.start()
            made.append(host)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return made
