"""The real agent as a process of its own, enrolled by hand on a plain bus, and an owner that listens to it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import nats
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import StreamConfig

from host_agent.enrolment import Identity, Keys, store
from tests.support.plain_bus import PlainBus
from tests.support.toy_host import HOST_ID, Control, seed
from volery.contracts.agent import (
    DomainChanged,
    DomainEventHappened,
    FromHost,
    HostReported,
    NetworksReported,
    OrderAck,
    OrderEnvelope,
    OrderFinished,
    StorageChecked,
    StorageReported,
)
from volery.contracts.base import Message, Order
from volery.contracts.enrolment import Enrolled
from volery.contracts.metrics import Beat

ROOT = Path(__file__).parents[2]
TYPES: dict[str, type[FromHost]] = {
    "inventory.reported": HostReported,
    "storage.reported": StorageReported,
    "storage.check_reported": StorageChecked,
    "network.reported": NetworksReported,
    "inventory.domain_changed": DomainChanged,
    "inventory.event_happened": DomainEventHappened,
}


def enrol_by_hand(state_dir: Path, control: Control, bus_url: str) -> Identity:
    """What enrolment would have stored, for a bus that asks nobody who he is."""
    answer = Enrolled(
        host_id=HOST_ID,
        installation="test",
        user_jwt="",
        bus_servers=(bus_url,),
        owner_keys={control.owner: control.signer.public_key},
        ca_pem="",
        certificate_pem="",
    )
    return store(state_dir, Identity(keys=Keys(seed=seed(), data_key_pem=""), enrolled=answer))


@dataclass
class AgentProcess:
    """`start`, `kill` and `stop` as often as you like: the state directory stays."""

    state_dir: Path
    environment: dict[str, str] = field(default_factory=dict)
    module: str = "host_agent"
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = {
            "VOLERY_AGENT_STATE_DIR": str(self.state_dir),
            "VOLERY_AGENT_LIBVIRT_URI": "test:///default",
            "VOLERY_AGENT_BEAT_SECONDS": "0.05",
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "VOLERY_AGENT_HYPERVISOR": "qemu",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            env=settings | self.environment,
            cwd=ROOT,
            stderr=(self.state_dir / "log").open("ab"),
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self, seconds: float = 20.0) -> int:
        """Ends it as a supervisor would; its exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(seconds)
        self.process = None
        return code

    @property
    def log(self) -> str:
        return (self.state_dir / "log").read_text()


@dataclass
class Listener:
    """An owner's ear: the newest beat, and every fact in the stream in its order."""

    client: Client
    control: Control
    following: JetStreamContext.PushSubscription | None = None
    beat: Beat | None = None
    facts: list[tuple[str, FromHost]] = field(default_factory=list)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def listen(self) -> None:
        await self.client.subscribe(f"beat.host.{HOST_ID}", cb=self._hear_beat)
        await self.again()

    async def again(self) -> None:
        """From the stream's beginning, which is made when it isn't there: a bus may have forgotten it.

        After every reconnect: an ordered consumer lives in the server's memory, and its loss is noticed late.
        """
        js = self.client.jetstream(timeout=1)
        while True:
            try:
                await js.add_stream(StreamConfig(name="FACTS_HOST", subjects=["fact.host.>"]))
                if self.following is not None:
                    await self.following.unsubscribe()
                self.following = await js.subscribe(
                    f"fact.host.{HOST_ID}.>", cb=self._hear_fact, ordered_consumer=True
                )
                return
            except (nats.errors.Error, nats.js.errors.Error):
                await asyncio.sleep(0.1)

    async def _hear_beat(self, message: Msg) -> None:
        async with self.news:
            self.beat = msgspec.json.decode(message.data, type=Beat)
            self.news.notify_all()

    async def _hear_fact(self, message: Msg) -> None:
        name = message.subject.split(".", 3)[3]
        kind = OrderFinished if name.endswith("order_finished") else TYPES.get(name, FromHost)
        async with self.news:
            self.facts.append((name, msgspec.json.decode(message.data, type=kind)))
            self.news.notify_all()

    async def until(self, true: Any, seconds: float = 20.0) -> Any:
        """What `true()` returned, once it is."""
        async with asyncio.timeout(seconds), self.news:
            while not (found := true()):
                await self.news.wait()
            return found

    def of(self, name: str) -> list[Any]:
        return [fact for heard, fact in self.facts if heard == name]

    async def order(self, order: Order[Any, Any], body: Message, **change: Any) -> OrderEnvelope:
        """An order named after the newest beat."""
        beat = await self.until(lambda: self.beat)
        fields = {"object_id": getattr(body, "vm_id", "object-1")} | change
        return self.control.order(beat.generation, beat.beat_seq, body, order, **fields)

    async def send(self, order: OrderEnvelope, seconds: float = 20.0) -> OrderAck:
        """Repeated until it is answered, as an owner does."""
        subject, payload, headers = self.control.signed(order)
        deadline = time.monotonic() + seconds
        while True:
            try:
                answer = await self.client.request(subject, payload, timeout=1, headers=headers)
                return msgspec.json.decode(answer.data, type=OrderAck)
            except (nats.errors.NoRespondersError, nats.errors.TimeoutError):
                assert time.monotonic() < deadline, f"no answer to {order.kind} within {seconds} s"
                await asyncio.sleep(0.02)

    async def finished(self, order: OrderEnvelope, seconds: float = 20.0) -> OrderFinished:
        def found() -> OrderFinished | None:
            facts = self.of(f"{order.owner}.order_finished")
            return next((fact for fact in facts if fact.order_id == order.order_id), None)

        fact: OrderFinished = await self.until(found, seconds)
        return fact


@asynccontextmanager
async def listener(bus: PlainBus, control: Control) -> AsyncIterator[Listener]:
    client = Client()
    ear = Listener(client, control)
    again: set[asyncio.Task[None]] = set()

    async def reconnected() -> None:
        again.add(asyncio.create_task(ear.again()))

    await client.connect(
        bus.url, max_reconnect_attempts=-1, reconnect_time_wait=0.05, reconnected_cb=reconnected
    )
    try:
        await ear.listen()
        yield ear
    finally:
        for task in again:
            task.cancel()
        await client.close()
