"""Hosts that only talk: they beat, report, sample and carry out orders as agents do, over one connection."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import nats
from nats.aio.client import Client

from bench.load import connect, request
from bench.world import Installation
from host_agent.enrolment import Keys, make_csr
from tests.support.nats_realm import witness_creds
from tests.support.plane import new_data_key
from tests.support.scripted_agent import ScriptedAgent
from volery.contracts.agent import (
    CANCEL_SUBJECT,
    COMMITTED_SUBJECT,
    DOMAIN_CHANGED,
    ORDER_SUBJECT,
    REPORT_SUBJECT,
    DomainReport,
    HostCapabilities,
)
from volery.contracts.base import encode
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import RUN_DOMAIN, DomainRunning, RunDomain
from volery.contracts.enrolment import ENROL_HOST, Enrol, read_token
from volery.contracts.host import CREATE_HOST, CreateHost
from volery.contracts.metrics import BEAT_SUBJECT, METRICS_SUBJECT, Beat, HostSample, VmSample
from volery.contracts.operation import Operation
from volery.runtime.bus import Bus, open_bus
from volery.runtime.connection import connect_options
from volery.runtime.identity import Realm
from volery.runtime.signing import Key

HOSTS, VMS = 100, 1000
BEAT_SECONDS = 0.5
SAMPLE_SECONDS = 15.0
CHANGE_SECONDS = 60.0
"""Each VM says something once in this time."""
CALLERS = 8
GIB = 1 << 30


@dataclass
class FleetHost(ScriptedAgent):
    """A scripted agent on a connection that it shares, with the real agent's pace."""

    shared: Client | None = None
    name: str = ""
    domains: dict[str, DomainReport] = field(default_factory=dict)
    ordered: dict[str, datetime] = field(default_factory=dict)
    """VM → when it was last ordered to run it."""
    changes: int = 0

    async def start(self) -> None:
        self.client = self.shared
        assert self.client is not None
        heard = {
            ORDER_SUBJECT: self._order,
            CANCEL_SUBJECT: self._cancel,
            COMMITTED_SUBJECT: self._committed,
            REPORT_SUBJECT: self._report,
        }
        for subject, callback in heard.items():
            await self.client.subscribe(subject.format(host_id=self.host_id), cb=callback)
        await self.client.flush()
        self.does(RUN_DOMAIN, self._run_domain)
        self.reports["inventory"] = self._inventory
        for work in (self._beat(), self._again(), self._sample(), self._change()):
            self._spawn(work)
        for owner in self.owners:
            await self.report(owner)

    async def leave(self) -> None:
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def _inventory(self) -> dict[str, Any]:
        capabilities = HostCapabilities(hostname=self.name, memory_bytes=64 * GIB, cpus=32, machines=("q35",))
        return {"capabilities": capabilities, "domains": tuple(self.domains.values())}

    async def _run_domain(self, asked: RunDomain) -> DomainRunning:
        self.ordered[asked.vm_id] = datetime.now(UTC)
        order = next(e for e in reversed(self.journal.values()) if e.envelope.object_id == asked.vm_id)
        self.domains[asked.vm_id] = DomainReport(
            vm_id=asked.vm_id,
            epoch=order.envelope.epoch,
            order_seq=order.envelope.order_seq,
            name=asked.spec.name,
            state=DomainState.RUNNING,
            reason="booted",
            installation=asked.spec.installation,
            memory_bytes=asked.spec.memory_bytes,
            vcpus=1,
        )
        await self.say("inventory", DOMAIN_CHANGED, domain=self.domains[asked.vm_id])
        return DomainRunning(vm_id=asked.vm_id, state=DomainState.RUNNING)

    async def _beat(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(BEAT_SECONDS)

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS * random.uniform(0.9, 1.1))
            await self.sample()

    async def _change(self) -> None:
        while True:
            await asyncio.sleep(CHANGE_SECONDS / max(1, len(self.domains)))
            await self.change()

    async def beat(self) -> None:
        self.beat_seq = next(self.beats)
        beat = Beat(
            host_id=self.host_id,
            generation=self.generation,
            boot_id=self.boot_id,
            beat_seq=self.beat_seq,
            clock_ms=int(time.time() * 1000),
        )
        assert self.client is not None
        await self.client.publish(BEAT_SUBJECT.format(host_id=self.host_id), encode(beat))

    async def sample(self) -> None:
        vms = tuple(VmSample(vm_id=vm_id, cpu_percent=3.0, memory_bytes=GIB) for vm_id in self.domains)
        sample = HostSample(
            host_id=self.host_id, boot_id=self.boot_id, at=datetime.now(UTC), cpu_percent=5.0, vms=vms
        )
        assert self.client is not None
        await self.client.publish(METRICS_SUBJECT.format(host_id=self.host_id), encode(sample))

    async def change(self) -> None:
        """One domain after the other gets another address, which its owner must write and announce."""
        if not self.domains:
            return
        self.changes += 1
        vm_id = list(self.domains)[self.changes % len(self.domains)]
        now = msgspec.structs.replace(
            self.domains[vm_id], agent_connected=True, ip_addresses=(f"10.0.0.{self.changes % 250}",)
        )
        self.domains[vm_id] = now
        await self.say("inventory", DOMAIN_CHANGED, domain=now)


async def _enrolled(bus: Bus, name: str, cluster_id: str) -> str:
    made = await bus.ask(CREATE_HOST, CreateHost(name=name, cluster_id=cluster_id))
    keys = Keys(seed=Key.new("user").seed, data_key_pem=new_data_key())
    ask = Enrol(
        token=read_token(made.enrolment_token).secret,
        public_key=Key(keys.seed).public,
        csr_pem=make_csr(keys, name, ("127.0.0.1",)),
        hostname=name,
        addresses=("127.0.0.1",),
    )
    return (await bus.ask(ENROL_HOST, ask)).host_id


@asynccontextmanager
async def fleet(there: Installation, cluster_id: str, count: int = HOSTS) -> AsyncIterator[list[FleetHost]]:
    creds = await witness_creds(Realm.create(there.home.bus_credentials), there.home.run)
    bus = there.bus
    options = connect_options(creds, "witness", bus.servers.split(","), ca=Path(bus.ca_file))
    client = await nats.connect(**options)
    hosts: list[FleetHost] = []
    try:
        async with open_bus(bus, "gateway") as asking:
            for number in range(count):
                host_id = await _enrolled(asking, f"host{number:03d}", cluster_id)
                host = FleetHost("", host_id, shared=client, name=f"host{number:03d}")
                host.owners = ("inventory", "storage", "network")
                await host.start()
                hosts.append(host)
        yield hosts
    finally:
        for host in hosts:
            await host.leave()
        await client.close()


async def run_vms(there: Installation, cluster_id: str, hosts: list[FleetHost]) -> None:
    """Create and start every VM through REST; returns when all of them run."""
    numbers = iter(range(VMS))

    async def caller() -> None:
        http = await connect(there.url, there.tls)
        for number in numbers:
            body = {"name": f"vm{number:04d}", "cluster_id": cluster_id, "memory_bytes": GIB, "start": True}
            ask = request("POST", "/api/v1/vms", there.token, msgspec.json.encode(body), Prefer="wait=30")
            msgspec.json.decode(await http.ask(ask, 0), type=Operation)
        http.close()

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    async with asyncio.timeout(300):
        while sum(len(host.domains) for host in hosts) < VMS:
            await asyncio.sleep(0.5)
