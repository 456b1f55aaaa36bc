"""What Volery adds to libvirt: starting, migrating, and hearing of a domain, in a lab of two hosts."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import nats
from nats.js.api import StreamConfig

from bench.load import connect, request
from bench.rows import PAIRS, Line, at_most, below, in_turn, percentile
from bench.streams import Crowd, crowd
from bench.world import QUIET, Installation, Pool, World, bare_pool, free_port, seed
from lab import plane
from lab.host import Host
from lab.lab import Lab
from services.inventory.store import VMS, VmPrivate
from tests.support.nats_realm import witness_creds
from volery.client import api
from volery.contracts.operation import Operation
from volery.contracts.vm import CreateVm, VmStatus
from volery.runtime.connection import connect_options
from volery.runtime.database import open_direct
from volery.runtime.identity import Realm
from volery.runtime.relay import Log
from volery.runtime.tables import Row, commit
from volery.setup.down import down
from volery.setup.up import up

MIGRATE_FLAGS = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_ABORT_ON_ERROR
    | libvirt.VIR_MIGRATE_AUTO_CONVERGE
)
"""Those of the agent."""
MEMORY_BYTES = 256 << 20
EVENTS = 30
"""In each round: 210 in all, so that the p99 is not simply the slowest."""
OURS, THEIRS = "ours", "theirs"


@dataclass
class Libvirt:
    """Connections to the hosts' daemons, and when each domain last changed, as libvirt itself said."""

    connections: list[Any]
    heard: dict[tuple[str, int], float] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def hear(self, _connection: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
        now = time.perf_counter()
        with self.changed:
            self.heard[domain.UUIDString(), event] = now
            self.changed.notify_all()

    def forget(self) -> None:
        with self.changed:
            self.heard.clear()

    def at(self, domain_id: str, event: int, seconds: float = 60.0) -> float:
        """When the event came. Waits for it, in a thread."""
        with self.changed:
            assert self.changed.wait_for(lambda: (domain_id, event) in self.heard, seconds), event
            return self.heard[domain_id, event]


@dataclass
class Stage:
    """A lab of two hosts whose control plane knows one VM without disks, and the same domain without Volery."""

    there: Installation
    hosts: list[Host]
    host_ids: list[str]
    libvirt: Libvirt
    vm_id: str

    def stopped(self) -> None:
        """Whatever a row before left."""
        if self.there.client.send(api.VMS.get(self.vm_id)).status is not VmStatus.DOWN:
            self.act("stop", {"force": True})

    def act(self, action: str, body: dict[str, Any] | None = None) -> Operation:
        client = self.there.client
        return client.wait(client.send(api.VMS.act(self.vm_id, action, Operation, body or {})))

    def xml(self) -> str:
        """The running VM's domain under another name and id, which Volery takes for somebody else's."""
        text: str = (
            self.libvirt.connections[0]
            .lookupByUUIDString(self.vm_id)
            .XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        )
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r"<name>.*?</name>", "<name>without-volery</name>", text)
        return text.replace(self.vm_id, str(uuid.uuid4()))


def _event_loop() -> None:
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, daemon=True, name="libvirt events").start()


@contextmanager
def staged() -> Iterator[Stage]:
    """Everything of it is gone afterwards."""
    state = Path(tempfile.mkdtemp(prefix="volery-bench-lab-", dir="/tmp"))
    state.chmod(0o755)  # PostgreSQL's own user passes through
    lab = Lab(state)
    home = plane.home_of(lab)
    try:
        lab.up(2)
        home.create()
        chosen = {
            "VOLERY_SETUP_LOCAL_HOST": "no",
            "VOLERY_SETUP_PUBLIC_ADDRESS": lab.gateway,
            "VOLERY_SETUP_NAMES": f"{lab.gateway} localhost",
            "VOLERY_SETUP_GATEWAY_PORT": str(free_port()),
        }
        home.change_settings(chosen)
        running = up(home, QUIET)
        client = plane.log_in(home, running.gateway_url)
        there = Installation(home, running.gateway_url, client, client.session.token)
        cluster = plane.make_cluster(client)
        for host in lab.hosts:
            plane.enrol(client, lab, host, cluster)
        found = [plane.find(client, api.HOSTS, host.name) for host in lab.hosts]
        ask = CreateVm(name="bench", cluster_id=cluster.id, memory_bytes=MEMORY_BYTES)
        vm_id = client.wait(client.send(api.VMS.create(ask, Operation))).object_id
        _event_loop()
        daemons = Libvirt([libvirt.open(host.libvirt_uri) for host in lab.hosts])
        for connection in daemons.connections:
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, daemons.hear, None)
        yield Stage(there, lab.hosts, [h.id for h in found if h is not None], daemons, vm_id)
    finally:
        down(home, QUIET)
        lab.down()
        shutil.rmtree(state, ignore_errors=True)


async def stage_of(world: World) -> Stage:
    if "stage" not in world.made:
        world.made["stage"] = await asyncio.to_thread(world.sync.enter_context, staged())
    found: Stage = world.made["stage"]
    await asyncio.to_thread(found.stopped)
    return found


async def start(world: World) -> list[Line]:
    """From the POST until libvirt says that the domain has started, against createXML of the same domain."""
    stage = await stage_of(world)
    daemons, http = stage.libvirt, await connect(stage.there.url, stage.there.tls)
    here = {"host_id": stage.host_ids[0]}
    await asyncio.to_thread(stage.act, "start", here)
    xml = stage.xml()
    await asyncio.to_thread(stage.act, "stop", {"force": True})
    body = b'{"host_id":"' + stage.host_ids[0].encode() + b'"}'
    ask = request("POST", f"/api/v1/vms/{stage.vm_id}/start", stage.there.token, body)

    async def ours() -> float:
        daemons.forget()
        started = time.perf_counter()
        operation = await http.ask(ask, 202)
        at = await asyncio.to_thread(daemons.at, stage.vm_id, libvirt.VIR_DOMAIN_EVENT_STARTED)
        await asyncio.to_thread(_finish, stage, operation)
        await asyncio.to_thread(stage.act, "stop", {"force": True})
        return (at - started) * 1000

    def create() -> float:
        started = time.perf_counter()
        domain = daemons.connections[0].createXML(xml)
        taken = (time.perf_counter() - started) * 1000
        domain.destroy()
        return taken

    async def theirs() -> float:
        return await asyncio.to_thread(create)

    pairs = await in_turn(ours, theirs)
    http.close()
    return [at_most("POST …/start until QEMU runs", pairs, 1.3, extra=100, note="theirs: createXML")]


def _finish(stage: Stage, answer: bytes) -> None:
    stage.there.client.wait(msgspec.json.decode(answer, type=Operation))


async def migrate(world: World) -> list[Line]:
    """From the POST until the operation has succeeded, against migrateToURI3 of an equal domain."""
    stage = await stage_of(world)
    await asyncio.to_thread(stage.act, "start", {"host_id": stage.host_ids[0]})
    other = stage.libvirt.connections[0].createXML(stage.xml())
    identity = other.UUIDString()
    places = iter([1, 0] * 100)

    def ask() -> float:
        started = time.perf_counter()
        stage.act("migrate")
        return (time.perf_counter() - started) * 1000

    def move() -> float:
        to = next(places)
        domain = stage.libvirt.connections[1 - to].lookupByUUIDString(identity)
        started = time.perf_counter()
        parameters = {"migrate_uri": f"tcp://{stage.hosts[to].ip}"}
        domain.migrateToURI3(stage.hosts[to].libvirt_uri, parameters, MIGRATE_FLAGS)
        return (time.perf_counter() - started) * 1000

    async def ours() -> float:
        return await asyncio.to_thread(ask)

    async def theirs() -> float:
        return await asyncio.to_thread(move)

    pairs = await in_turn(ours, theirs)
    for connection in stage.libvirt.connections:
        for domain in connection.listAllDomains():
            if domain.UUIDString() == identity:
                domain.destroy()
    await asyncio.to_thread(stage.act, "stop", {"force": True})
    note = "theirs: migrateToURI3; 256 MB, no disks"
    return [at_most("live migration, request to finished", pairs, 1.2, extra=100, note=note)]


async def event(world: World) -> list[Line]:
    """From libvirt's own event until an SSE client has inventory's fact, against the five raw hops in between."""
    stage = await stage_of(world)
    there = stage.there
    await asyncio.to_thread(stage.act, "start", {"host_id": stage.host_ids[0]})
    domain = stage.libvirt.connections[0].lookupByUUIDString(stage.vm_id)
    hops = await raw_hops(world, there)
    all_ours: list[float] = []
    path = f"/api/v1/events?subject=vm/{stage.vm_id}"
    async with crowd(there.url, there.tls, request("GET", path, there.token), 1) as client:

        async def ours() -> float:
            times = [await _heard(stage, client, domain, number) for number in range(EVENTS)]
            all_ours.extend(times)
            return statistics.median(times)

        pairs = await in_turn(ours, hops.total)
    await asyncio.to_thread(stage.act, "stop", {"force": True})
    note = "theirs: the sum of " + ", ".join(
        f"{name} {statistics.median(times):.2f}" for name, times in hops.times.items()
    )
    p99 = percentile(all_ours[EVENTS:], 99)
    return [
        at_most("libvirt event until an SSE client has the fact, p50", pairs, 2, note=note),
        below(
            "libvirt event until an SSE client has the fact, p99", p99, 50, "ms", f"{PAIRS * EVENTS} events"
        ),
    ]


async def _heard(stage: Stage, client: Crowd, domain: Any, number: int) -> float:
    pausing = number % 2 == 0
    event = libvirt.VIR_DOMAIN_EVENT_SUSPENDED if pausing else libvirt.VIR_DOMAIN_EVENT_RESUMED
    stage.libvirt.forget()
    reached = client.expect(b'"status":"paused"' if pausing else b'"status":"up"')
    await asyncio.to_thread(domain.suspend if pausing else domain.resume)
    async with asyncio.timeout(20):
        ended = await reached
    began = await asyncio.to_thread(stage.libvirt.at, stage.vm_id, event)
    await asyncio.sleep(0.1)
    return (ended - began) * 1000


@dataclass
class Hops:
    """What a fact must go through whoever carries it, each step as bare as it can be made."""

    pool: Pool
    log: Log
    stream: Any
    journal: sqlite3.Connection
    row: Row[Any, Any]
    body: bytes = b"x" * 1200
    times: dict[str, list[float]] = field(default_factory=dict)

    async def journal_write(self) -> None:
        with self.journal:
            self.journal.execute("insert into facts (body) values (?)", (self.body,))

    async def publish(self) -> None:
        await self.stream.publish("bench.hop", self.body)

    async def change(self) -> None:
        change = VMS.update(self.row)
        await commit(self.pool, [change])
        self.row = Row(change.document, self.row.private)

    async def move(self) -> None:
        assert len(await self.log.move()) == 1

    async def total(self) -> float:
        steps = (
            ("agent's journal", self.journal_write),
            ("stream", self.publish),
            ("commit", self.change),
            ("log", self.move),
            ("owner's stream", self.publish),
        )
        taken: dict[str, list[float]] = {name: [] for name, _ in steps}
        for _ in range(EVENTS):
            for name, step in steps:
                started = time.perf_counter()
                await step()
                taken[name].append((time.perf_counter() - started) * 1000)
            await asyncio.sleep(0.1)
        for name, times in taken.items():
            self.times.setdefault(name, []).extend(times)
        return sum(statistics.median(times) for times in taken.values())


async def raw_hops(world: World, there: Installation) -> Hops:
    pool = await world.stack.enter_async_context(bare_pool(there))
    connection = await world.stack.enter_async_context(open_direct(there.database("bench"), "inventory"))
    (vm,) = await seed(pool, 1)
    log = Log("inventory", connection)
    await log.move()
    journal = sqlite3.connect(there.home.run / "hop.sqlite")
    journal.executescript(
        "pragma journal_mode = wal; pragma synchronous = full; create table facts (id integer primary key, body blob)"
    )
    creds = await witness_creds(Realm.create(there.home.bus_credentials), there.home.run)
    bus = there.bus
    options = connect_options(creds, "witness", bus.servers.split(","), ca=Path(bus.ca_file))
    client = await nats.connect(**options)
    world.stack.push_async_callback(client.close)
    stream = client.jetstream()
    await stream.add_stream(StreamConfig(name="BENCH", subjects=["bench.hop"]))
    return Hops(pool, log, stream, journal, Row(vm, VmPrivate()))
