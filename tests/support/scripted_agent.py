"""A host's agent in memory that speaks the real protocol: beats, numbered facts, reports, a journal of orders.

What it does with an order is a table of functions given by the test. It can be killed and started again with its
journal, lose its journal, go silent, or drop facts, so that services meet what real hosts do.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from volery.contracts.agent import (
    CANCEL_SUBJECT,
    COMMITTED_SUBJECT,
    HOST_REPORTED,
    INVENTORY_ORDER_FINISHED,
    INVENTORY_ORDER_PROGRESSED,
    NETWORK_ORDER_FINISHED,
    NETWORK_ORDER_PROGRESSED,
    NETWORKS_REPORTED,
    NO_RESULT,
    ORDER_SUBJECT,
    REPORT_SUBJECT,
    STORAGE_ORDER_FINISHED,
    STORAGE_ORDER_PROGRESSED,
    STORAGE_REPORTED,
    CancelOrder,
    CommittedWord,
    HostCapabilities,
    OrderAck,
    OrderEnvelope,
    OrderState,
    Outcome,
)
from volery.contracts.base import Fact, Message, Order, encode
from volery.contracts.errors import Kind, Problem, Refused
from volery.contracts.ids import new_id
from volery.contracts.metrics import BEAT_SUBJECT, Beat

BEAT_SECONDS = 0.1
AGAIN_SECONDS = 0.5
FINISHED = {
    "inventory": INVENTORY_ORDER_FINISHED,
    "storage": STORAGE_ORDER_FINISHED,
    "network": NETWORK_ORDER_FINISHED,
}
PROGRESSED = {
    "inventory": INVENTORY_ORDER_PROGRESSED,
    "storage": STORAGE_ORDER_PROGRESSED,
    "network": NETWORK_ORDER_PROGRESSED,
}
REPORTED: dict[str, Fact[Any]] = {
    "inventory": HOST_REPORTED,
    "storage": STORAGE_REPORTED,
    "network": NETWORKS_REPORTED,
}
DEFAULT_REPORTS: dict[str, Callable[[], dict[str, Any]]] = {
    "inventory": lambda: {"capabilities": HostCapabilities(hostname="scripted"), "domains": ()},
    "storage": lambda: {"domains": ()},
    "network": lambda: {"networks": ()},
}

Act = Callable[[Any], Any]
"""(question) → answer, or an awaitable of it. Raises Refused."""


@dataclass
class Journaled:
    """An order that was accepted, and its end."""

    envelope: OrderEnvelope
    outcome: Outcome | None = None
    problem: Problem | None = None
    result: msgspec.Raw = field(default_factory=lambda: NO_RESULT)
    task: asyncio.Task[None] | None = None
    result_seq: int = 0
    """Of the fact that told its end, in the present journal."""
    sent: int = 0
    """How often it came."""


@dataclass
class Spool:
    """One owner's facts that it has not committed."""

    head: int = 0
    confirmed: int = 0
    waiting: dict[int, tuple[str, bytes]] = field(default_factory=dict)


@dataclass
class ScriptedAgent:
    """`orders` maps an Order to what is done with it; `reports` an owner to the fields of its full report."""

    url: str
    host_id: str = field(default_factory=new_id)
    orders: dict[str, tuple[Order[Any, Any], Act]] = field(default_factory=dict)
    reports: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)
    owners: tuple[str, ...] = ("storage", "network")
    generation: str = field(default_factory=new_id)
    boot_id: str = field(default_factory=new_id)
    journal: dict[str, Journaled] = field(default_factory=dict)
    spools: dict[str, Spool] = field(default_factory=dict)
    order_seqs: dict[tuple[str, str], int] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    at_work: dict[str, OrderEnvelope] = field(default_factory=dict)
    """Object → the order for it that was begun last."""
    log: list[tuple[str, Any]] = field(default_factory=list)
    """(kind, question) of every order that was begun, in that order."""
    drop: Callable[[str], bool] = lambda subject: False
    """Facts whose subject it is true for are spooled but not published the first time."""
    muted: bool = False
    """Facts are spooled and not published: JetStream is away."""
    beating: bool = True
    deaf: bool = False
    """Orders are counted in `unheard` and get lost."""
    unheard: int = 0
    heeds_cancels: bool = True
    """False: what is under way is quicker than its cancellation."""
    beats: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    client: Client | None = None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    lanes: dict[tuple[str, str], asyncio.Lock] = field(default_factory=dict)
    beat_seq: int = 0

    def does(self, order: Order[Any, Any], act: Act) -> None:
        self.orders[order.kind] = (order, act)

    # Its life

    async def start(self) -> None:
        """Connect, say a full report to every owner, go on with what the journal has open."""
        self.client = await nats.connect(self.url)
        subscriptions: dict[str, Callable[[Msg], Awaitable[None]]] = {
            ORDER_SUBJECT: self._order,
            CANCEL_SUBJECT: self._cancel,
            COMMITTED_SUBJECT: self._committed,
            REPORT_SUBJECT: self._report,
        }
        for subject, heard in subscriptions.items():
            await self.client.subscribe(subject.format(host_id=self.host_id), cb=heard)
        await self.client.flush()
        self._spawn(self._beat())
        self._spawn(self._again())
        for owner in self.owners:
            await self.report(owner)
        for entry in self.journal.values():
            if entry.outcome is None:
                entry.task = self._spawn(self._run(entry))

    async def kill(self) -> None:
        """As kill -9: nothing more is said; the journal stays."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.client is not None:
            await self.client.close()
        self.client = None

    def lose_journal(self) -> None:
        self.generation = new_id()
        self.journal.clear()
        self.spools.clear()
        self.order_seqs.clear()

    async def renew_journal(self) -> None:
        """It turned out to be an old copy of itself. Results that nobody heard are told when their order is sent again."""
        self.generation = new_id()
        self.spools.clear()
        for entry in self.journal.values():
            entry.result_seq = 0
        for owner in self.owners:
            await self.report(owner)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _beat(self) -> None:
        while True:
            if self.beating:
                assert self.client is not None
                self.beat_seq = next(self.beats)
                beat = Beat(
                    host_id=self.host_id,
                    generation=self.generation,
                    boot_id=self.boot_id,
                    beat_seq=self.beat_seq,
                    clock_ms=int(time.time() * 1000),
                )
                await self.client.publish(BEAT_SUBJECT.format(host_id=self.host_id), encode(beat))
            await asyncio.sleep(BEAT_SECONDS)

    # Facts

    async def say(self, owner: str, fact: Fact[Any], *, first: bool = False, **fields: Any) -> int:
        """Number a fact, spool it, publish it. `first`: it follows nothing (a report)."""
        spool = self.spools.setdefault(owner, Spool())
        after = 0 if first else spool.head
        spool.head += 1
        payload = fact.payload(
            host_id=self.host_id,
            generation=self.generation,
            seq=spool.head,
            boot_id=self.boot_id,
            at=datetime.now(UTC),
            after_seq=after,
            confirmed=spool.confirmed,
            **fields,
        )
        subject = fact.subject_for(payload)
        spool.waiting[spool.head] = (subject, encode(payload))
        if self.client is not None and not self.muted and not self.drop(subject):
            await self.client.publish(subject, encode(payload))
        return spool.head

    async def report(self, owner: str, *asked: str) -> int:
        fields = self.reports.get(owner, DEFAULT_REPORTS[owner])() | {"asked": asked}
        return await self.say(owner, REPORTED[owner], first=True, **fields)

    async def _again(self) -> None:
        """What the owner has not committed is published again, in order."""
        while True:
            await asyncio.sleep(AGAIN_SECONDS)
            for spool in self.spools.values() if not self.muted else ():
                for subject, body in list(spool.waiting.values()):
                    assert self.client is not None
                    await self.client.publish(subject, body)

    async def _committed(self, message: Msg) -> None:
        word = msgspec.json.decode(message.data, type=CommittedWord)
        spool = self.spools.get(word.owner, Spool())
        if word.generation != self.generation:
            return
        if word.seq > spool.head:
            await self.renew_journal()
        else:
            spool.confirmed = max(spool.confirmed, word.seq)
            spool.waiting = {seq: said for seq, said in spool.waiting.items() if seq > word.seq}

    async def _report(self, message: Msg) -> None:
        word = msgspec.json.decode(message.data, type=CommittedWord)
        await self.report(word.owner, *([word.ask] if word.ask else []))

    async def until_committed(self, owner: str, seconds: float = 10.0) -> None:
        """Until the owner has committed all that was said so far."""
        deadline = time.monotonic() + seconds
        while self.spools.get(owner, Spool()).waiting:
            assert time.monotonic() < deadline, f"{owner} did not commit within {seconds} s"
            await asyncio.sleep(0.02)

    # Orders

    async def _order(self, message: Msg) -> None:
        if self.deaf:
            self.unheard += 1
            return
        envelope = msgspec.json.decode(message.data, type=OrderEnvelope)
        await message.respond(encode(self._accept(envelope)))

    def _accept(self, envelope: OrderEnvelope) -> OrderAck:
        known = self.journal.get(envelope.order_id)
        if known is not None:
            known.sent += 1
            return self._ack(known)
        if (problem := self._refusal(envelope)) is not None:
            return OrderAck(order_id=envelope.order_id, state=OrderState.REFUSED, problem=problem)
        self.order_seqs[envelope.owner, envelope.object_id] = envelope.order_seq
        entry = self.journal[envelope.order_id] = Journaled(envelope, sent=1)
        entry.task = self._spawn(self._run(entry))
        return self._ack(entry)

    def _refusal(self, envelope: OrderEnvelope) -> Problem | None:
        if envelope.agent_generation != self.generation:
            return Problem(kind=Kind.STALE, message="this order is for another journal")
        if envelope.beat_seq > self.beat_seq:
            return Problem(kind=Kind.STALE, message="this order names a beat that was never sent")
        if envelope.order_id in self.cancelled:
            return Problem(kind=Kind.CONFLICT, message="this order was cancelled")
        if envelope.order_seq <= self.order_seqs.get((envelope.owner, envelope.object_id), 0):
            return Problem(kind=Kind.CONFLICT, message="this order is out of date: a later one was seen")
        if envelope.kind not in self.orders:
            return Problem(kind=Kind.INVALID, message=f"this host can't do {envelope.kind}")
        return None

    def _ack(self, entry: Journaled) -> OrderAck:
        return OrderAck(
            order_id=entry.envelope.order_id,
            state=OrderState.ACCEPTED if entry.outcome is None else OrderState.FINISHED,
            problem=entry.problem,
            outcome=entry.outcome,
            result=entry.result,
            result_seq=entry.result_seq,
        )

    async def _cancel(self, message: Msg) -> None:
        cancel = msgspec.json.decode(message.data, type=CancelOrder)
        self.cancelled.add(cancel.order_id)
        entry = self.journal.get(cancel.order_id)
        if entry is None:
            state = OrderState.UNKNOWN
            await message.respond(encode(OrderAck(order_id=cancel.order_id, state=state)))
            return
        if entry.outcome is None and entry.task is not None and self.heeds_cancels:
            entry.task.cancel()
            await asyncio.gather(entry.task, return_exceptions=True)
            await self._end(entry, Outcome.CANCELLED)
        await message.respond(encode(self._ack(entry)))

    async def _run(self, entry: Journaled) -> None:
        envelope = entry.envelope
        order, act = self.orders[envelope.kind]
        lane = self.lanes.setdefault((envelope.owner, envelope.object_id), asyncio.Lock())
        async with lane:
            question = msgspec.json.decode(envelope.body, type=order.question)
            self.log.append((envelope.kind, question))
            self.at_work[envelope.object_id] = envelope
            try:
                answer = act(question)
                if asyncio.iscoroutine(answer):
                    answer = await answer
            except Refused as refused:
                await self._end(entry, Outcome.FAILED, refused.problem())
                return
            await self._end(entry, Outcome.SUCCEEDED, None, answer)

    async def _end(
        self,
        entry: Journaled,
        outcome: Outcome,
        problem: Problem | None = None,
        answer: Message | None = None,
    ) -> None:
        if entry.outcome is not None:
            return
        entry.outcome, entry.problem = outcome, problem
        entry.result = NO_RESULT if answer is None else msgspec.Raw(encode(answer))
        envelope = entry.envelope
        entry.result_seq = await self.say(
            envelope.owner,
            FINISHED[envelope.owner],
            order_id=envelope.order_id,
            kind=envelope.kind,
            object_id=envelope.object_id,
            epoch=envelope.epoch,
            outcome=outcome,
            problem=problem,
            result=entry.result,
        )

    async def fail_after_reboot(self, entry: Journaled) -> None:
        """As the real agent ends what it accepted under a former boot."""
        kind = entry.envelope.kind
        problem = Problem(kind=Kind.UNAVAILABLE, message=f"the host was restarted before {kind} had ended")
        await self._end(entry, Outcome.FAILED, problem)

    def begun(self, kind: str) -> list[Any]:
        """The questions of every order of this kind that was begun."""
        return [question for had, question in self.log if had == kind]


@asynccontextmanager
async def scripted(agent: ScriptedAgent) -> AsyncIterator[ScriptedAgent]:
    await agent.start()
    try:
        yield agent
    finally:
        with contextlib.suppress(Exception):
            await agent.kill()
