"""An agent's core with toy actions: what a journal, orders and a spool need to be tried without a hypervisor."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec

from host_agent.action import Action, Host, Running, whole
from host_agent.clock import BootClock, boottime_ms
from host_agent.config import AgentConfig
from host_agent.journal import Journal
from host_agent.orders import Orders
from host_agent.tickets import Tickets
from volery.contracts.agent import SIGNATURE_HEADER, CancelOrder, OrderAck, OrderEnvelope
from volery.contracts.base import Message, Order, encode
from volery.contracts.errors import Kind, Refused
from volery.runtime.signing import Key, Signer, Verifier

HOST_ID = "0192f0c4-0000-7000-8000-000000000001"


class Toy(Message):
    """Appends `mark` to the file at `path` when it begins, and `mark.` when it has ended."""

    path: str
    mark: str = "x"
    seconds: float = 0.0
    refuse: str = ""
    stubborn_seconds: float = 0.0
    """How long it goes on after it was cancelled."""


class ToyDone(Message):
    mark: str
    resumed: bool
    epoch: int


TOY = Order("toy.work", Toy, ToyDone)
TOY_ONCE = Order("toy.once", Toy, ToyDone, repeat_safe=False)
TOY_OTHER = Order("other.work", Toy, ToyDone)
TOY_WHOLE = Order("toy.whole", Toy, ToyDone)


async def work(host: Host, order: Toy, running: Running) -> ToyDone:
    with Path(order.path).open("a") as file:
        file.write(order.mark)
    if order.refuse:
        raise Refused(Kind.CONFLICT, order.refuse, mark=order.mark)
    running.progress(50.0, {"mark": order.mark})
    try:
        await asyncio.sleep(order.seconds)
    except asyncio.CancelledError:
        if order.stubborn_seconds:
            await asyncio.sleep(order.stubborn_seconds)
        raise
    with Path(order.path).open("a") as file:
        file.write(order.mark + ".")
    return ToyDone(mark=order.mark, resumed=running.resumed, epoch=running.epoch)


TOYS = (*(Action(order, work) for order in (TOY, TOY_ONCE, TOY_OTHER)), Action(TOY_WHOLE, whole(work)))


def seed() -> str:
    return Key.new("user").seed


@dataclass
class Control:
    """The owner's side of one host: numbers orders per object and signs them."""

    owner: str = "inventory"
    signer: Signer = field(default_factory=lambda: Signer(seed()))
    host_id: str = HOST_ID
    sequences: dict[str, int] = field(default_factory=dict)

    def order(
        self,
        journal_generation: str,
        beat_seq: int,
        body: Message | bytes,
        order: Order[Any, Any] = TOY,
        **change: Any,
    ) -> OrderEnvelope:
        object_id = change.pop("object_id", "object-1")
        seq = change.pop("order_seq", None)
        if seq is None:
            seq = self.sequences[object_id] = self.sequences.get(object_id, 0) + 1
        fields: dict[str, Any] = {
            "order_id": str(uuid.uuid4()),
            "host_id": self.host_id,
            "agent_generation": journal_generation,
            "owner": self.owner,
            "kind": order.kind,
            "object_id": object_id,
            "order_seq": seq,
            "beat_seq": beat_seq,
            "ttl_ms": 30_000,
            "body": msgspec.Raw(body if isinstance(body, bytes) else encode(body)),
            "repeat_safe": order.repeat_safe,
        }
        return OrderEnvelope(**(fields | change))

    def signed(
        self, message: OrderEnvelope | CancelOrder, verb: str = "order"
    ) -> tuple[str, bytes, dict[str, str]]:
        subject = f"host.{message.host_id}.{verb}"
        payload = encode(message)
        return subject, payload, {SIGNATURE_HEADER: self.signer.sign(subject, payload)}


@dataclass
class Core:
    """Journal and orders of a toy host, with a clock that a test may move."""

    journal: Journal
    orders: Orders
    clock: BootClock
    control: Control
    skipped_ms: list[int]

    def pass_ms(self, milliseconds: int) -> None:
        self.skipped_ms[0] += milliseconds

    def make(self, body: Message | bytes, order: Order[Any, Any] = TOY, **change: Any) -> OrderEnvelope:
        change = {"beat_seq": self.clock.beat()} | change
        generation = change.pop("agent_generation", self.journal.generation)
        return self.control.order(generation, change.pop("beat_seq"), body, order, **change)

    async def give(self, order: OrderEnvelope, control: Control | None = None) -> OrderAck:
        return await self.orders.hear(*(control or self.control).signed(order))

    async def cancel(self, order_id: str) -> OrderAck:
        cancel = CancelOrder(host_id=HOST_ID, order_id=order_id)
        return await self.orders.hear_cancel(*self.control.signed(cancel, "cancel"))


@asynccontextmanager
async def core(
    directory: Path,
    control: Control | None = None,
    *,
    boot_id: str = "boot-1",
    resume: bool = True,
    **options: Any,
) -> AsyncIterator[Core]:
    control = control or Control()
    skipped_ms = [0]
    journal = await Journal.open(directory / "journal.sqlite", boot_id, **options.pop("journal", {}))
    clock = BootClock(boot_id, journal.boot_ordinal, lambda: boottime_ms() + skipped_ms[0])
    # The toys touch no hypervisor, so there is none.
    host = Host(AgentConfig(state_dir=str(directory)), cast("Any", None), Tickets(), HOST_ID)
    verifier = Verifier({control.owner: control.signer.public_key})
    orders = Orders(host, journal, TOYS, verifier, clock, **options)
    if resume:
        await orders.resume()
    try:
        yield Core(journal, orders, clock, control, skipped_ms)
    finally:
        await orders.close(grace_seconds=0.0)
        for task in orders._tasks:
            task.cancel()
        await journal.close()


async def until(true: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What `true` returned, once it is. For what announces itself to nobody, such as a file."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.005)
    return found
