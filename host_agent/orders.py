"""Takes orders in and carries them out: journaled before they are acknowledged, one at a time per object.

An order ends in one of four ways, told by a fact that was journaled together with the result: it succeeded, it
failed with a sentence, it was cancelled, or the agent died in the middle of what can't be repeated and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sqlite3
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from opentelemetry import trace

from host_agent.action import Action, Host, Running
from host_agent.clock import BootClock
from host_agent.facts import MAX_FACT_BYTES, FactClass
from host_agent.journal import Journal, JournaledOrder, progress_key
from host_agent.rules import stale
from volery.contracts.agent import (
    INVENTORY_ORDER_FINISHED,
    INVENTORY_ORDER_PROGRESSED,
    NETWORK_ORDER_FINISHED,
    NETWORK_ORDER_PROGRESSED,
    NO_RESULT,
    SIGNATURE_HEADER,
    STORAGE_ORDER_FINISHED,
    STORAGE_ORDER_PROGRESSED,
    CancelOrder,
    OrderAck,
    OrderEnvelope,
    OrderFinished,
    OrderProgressed,
    OrderState,
    Outcome,
)
from volery.contracts.base import Fact, encode
from volery.contracts.domain_orders import ADMIT_MIGRATION, RUN_DOMAIN
from volery.contracts.errors import Kind, Problem, Refused
from volery.runtime import telemetry
from volery.runtime.clock import utc_now
from volery.runtime.signing import Verifier

log = logging.getLogger(__name__)

FINISHED: Final[dict[str, Fact[OrderFinished]]] = {
    "inventory": INVENTORY_ORDER_FINISHED,
    "storage": STORAGE_ORDER_FINISHED,
    "network": NETWORK_ORDER_FINISHED,
}
PROGRESSED: Final[dict[str, Fact[OrderProgressed]]] = {
    "inventory": INVENTORY_ORDER_PROGRESSED,
    "storage": STORAGE_ORDER_PROGRESSED,
    "network": NETWORK_ORDER_PROGRESSED,
}
TAKES_IN: Final = frozenset({RUN_DOMAIN.kind, ADMIT_MIGRATION.kind})
RUNNING_AT_ONCE: Final = 64
"""Per family of orders (the first word of their kind), so that long copies never hold up domains."""
CANCEL_GRACE_SECONDS: Final = 30.0
"""How long an action may take to clean up after it was cancelled, before its outcome is called unknown."""
PROGRESS_SECONDS: Final = 1.0
RESULT_MAX_BYTES: Final = MAX_FACT_BYTES - 8192
DISK_RETRY_SECONDS: Final = 1.0
"""Between attempts to journal a result when the disk is full or read-only: a result is never dropped."""
SAFE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")

_envelope = msgspec.json.Decoder(OrderEnvelope)
_cancel = msgspec.json.Decoder(CancelOrder)


@dataclass(slots=True, eq=False)
class _Entry:
    """An accepted order on its way through its object's lane."""

    order: OrderEnvelope
    action: Action[Any, Any]
    body: Any
    trace: str
    deadline_ms: int
    """On the boot clock."""
    resumed: bool = False
    begun: bool = False
    """The action was called, in this run of the agent."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    progress: asyncio.Task[Any] | None = None
    progressed_ms: int = 0


@dataclass(frozen=True, slots=True)
class _Ending:
    outcome: Outcome
    problem: Problem | None = None
    result: msgspec.Raw = field(default_factory=lambda: NO_RESULT)


class Orders:
    """`hear` and `hear_cancel` answer at once; what they admit runs in tasks of its own."""

    def __init__(
        self,
        host: Host,
        journal: Journal,
        actions: Iterable[Action[Any, Any]],
        verifier: Verifier,
        clock: BootClock,
        cancel_grace_seconds: float = CANCEL_GRACE_SECONDS,
        gates: Mapping[str, asyncio.Event] | None = None,
        tracer: trace.Tracer = telemetry.tracer,
    ) -> None:
        """`gates`: families whose orders are accepted but not begun until their event is set."""
        self._host = host
        self._journal = journal
        self._actions = {action.order.kind: action for action in actions}
        self._verifier = verifier
        self._clock = clock
        self._cancel_grace_seconds = cancel_grace_seconds
        self._gates = dict(gates or {})
        self._tracer = tracer
        self._entries: dict[str, _Entry] = {}
        self._lanes: dict[tuple[str, str], deque[_Entry]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.leaving = False
        """The host is being shut down: no VM is taken in any more."""
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails when a lane did, which is a bug: the agent ends, and its next run resumes the orders."""
        families = {_family(kind) for kind in self._actions}
        self._families = {family: asyncio.Semaphore(RUNNING_AT_ONCE) for family in families}

    def trust(self, verifier: Verifier) -> None:
        """Whose orders are obeyed from now on: the owners' keys may be renewed."""
        self._verifier = verifier

    # Intake

    async def hear(self, subject: str, payload: bytes, headers: Mapping[str, str] | None) -> OrderAck:
        """The answer to an order that came. Nothing is awaited before the journal, so order of arrival holds."""
        try:
            order = _envelope.decode(payload)
        except msgspec.DecodeError as error:
            return _refused("", Problem(kind=Kind.INVALID, message=f"this is no order: {error}"))
        owner = self._verifier.owner_of(subject, payload, (headers or {}).get(SIGNATURE_HEADER, ""))
        if (problem := self._foreign(order, owner)) is not None:
            log.warning("refused an order: %s", problem.message)
            return _refused(order.order_id, problem)
        try:
            return await self._admit(order, payload, (headers or {}).get("traceparent", ""))
        except sqlite3.Error as error:
            return _refused(order.order_id, self._disk_problem(error))

    async def _admit(self, order: OrderEnvelope, payload: bytes, trace_parent: str) -> OrderAck:
        admitted = self._read(order)
        now_ms = self._clock.now_ms()
        if isinstance(admitted, Problem):
            return await self._journal.refuse(order, admitted, now_ms)
        old = stale(order, self._clock.beat())
        intake = await self._journal.accept(order, payload, trace_parent, now_ms, old)
        if intake.fresh:
            action, body = admitted
            deadline_ms = now_ms + int(order.deadline_seconds * 1000)
            self._enqueue(_Entry(order, action, body, trace_parent, deadline_ms))
        elif intake.ack.problem is not None:
            log.warning("refused an order: %s", intake.ack.problem.message)
        return intake.ack

    def _disk_problem(self, error: sqlite3.Error) -> Problem:
        """Nothing was journaled, so nothing will be done; the same order may be sent again."""
        message = (
            f"the host's journal in {self._host.config.state_dir} can't be written ({error}): free space on its"
            " file system"
        )
        log.error("%s", message)
        return Problem(kind=Kind.UNAVAILABLE, message=message)

    def _foreign(self, order: OrderEnvelope, owner: str | None) -> Problem | None:
        """Why an order isn't for this host, or not from who it says. Not journaled: anybody could write it."""
        what = f"order {order.order_id} ({order.kind})"
        if owner is None or owner != order.owner or owner not in FINISHED:
            return Problem(
                kind=Kind.FORBIDDEN,
                message=f"{what} is not signed by {order.owner} as this host knows it: nothing was done;"
                " if the installation's keys were made anew, enrol the host again",
            )
        if order.host_id != self._host.host_id:
            return Problem(kind=Kind.INVALID, message=f"{what} is for another host, {order.host_id}")
        if not (SAFE_ID.fullmatch(order.order_id) and SAFE_ID.fullmatch(order.object_id)):
            return Problem(kind=Kind.INVALID, message="the order's id or its object's isn't one")
        if order.agent_generation != self._journal.generation:
            return Problem(
                kind=Kind.STALE,
                message=f"{what} is for generation {order.agent_generation or '(none)'} of this host's journal,"
                f" which is now {self._journal.generation}: commit its full report, then send the order again",
                details={"generation": self._journal.generation},
            )
        return None

    def _read(self, order: OrderEnvelope) -> tuple[Action[Any, Any], Any] | Problem:
        """The action and its decoded question."""
        action = self._actions.get(order.kind)
        if action is None:
            message = f"this host doesn't know the order {order.kind}: upgrade its agent"
            return Problem(kind=Kind.INVALID, message=message)
        if self.leaving and order.kind in TAKES_IN:
            message = "this host is being shut down by its administrator: it takes in no VM"
            return Problem(kind=Kind.CONFLICT, message=message)
        try:
            body = msgspec.json.decode(order.body, type=action.order.question)
        except msgspec.DecodeError as error:
            # msgspec names the field and the type, never the value.
            message = f"order {order.order_id} ({order.kind}) can't be read: {error}"
            return Problem(kind=Kind.INVALID, message=message)
        if (named := getattr(body, "vm_id", order.object_id)) != order.object_id:
            message = f"order {order.order_id} is for {order.object_id} and speaks of {named}"
            return Problem(kind=Kind.INVALID, message=message)
        return action, body

    async def hear_cancel(self, subject: str, payload: bytes, headers: Mapping[str, str] | None) -> OrderAck:
        """How far the order is. One that has not ended will, as cancelled unless it was quicker."""
        try:
            cancel = _cancel.decode(payload)
        except msgspec.DecodeError as error:
            return _refused("", Problem(kind=Kind.INVALID, message=f"this is no cancel: {error}"))
        owner = self._verifier.owner_of(subject, payload, (headers or {}).get(SIGNATURE_HEADER, ""))
        entry = self._entries.get(cancel.order_id)
        if owner is None or (entry is not None and entry.order.owner != owner):
            message = f"the cancel of order {cancel.order_id} is not signed by the order's owner"
            return _refused(cancel.order_id, Problem(kind=Kind.FORBIDDEN, message=message))
        try:
            ack = await self._journal.cancel(cancel.order_id)
        except sqlite3.Error as error:
            return _refused(cancel.order_id, self._disk_problem(error))
        if ack.state is OrderState.ACCEPTED and (entry := self._entries.get(cancel.order_id)):
            entry.cancelled.set()
            await self._drop_waiting(entry)
        return ack

    async def _drop_waiting(self, entry: _Entry) -> None:
        """A cancelled order that has not begun ends now, not when its turn comes."""
        order = entry.order
        lane = self._lanes.get((order.owner, order.object_id))
        if lane is not None and entry in lane:
            lane.remove(entry)
            self._entries.pop(order.order_id, None)
            await self._finish(order, _Ending(Outcome.CANCELLED))

    async def resume(self) -> None:
        """After a restart: what may be repeated goes on, what may not ends as unknown. Call once, before intake."""
        for found in await self._journal.unfinished():
            entry = self._resumable(found)
            if isinstance(entry, _Ending):
                await self._finish(found.envelope, entry)
            else:
                self._enqueue(entry)

    def _resumable(self, found: JournaledOrder) -> _Entry | _Ending:
        order = found.envelope
        if found.boot_id != self._clock.boot_id:
            return _of_a_former_boot(order)
        admitted = self._read(order)
        what = f"{order.kind} for {order.object_id}"
        if isinstance(admitted, Problem):
            return _Ending(Outcome.OUTCOME_UNKNOWN, admitted)
        action, body = admitted
        if not (order.repeat_safe and action.order.repeat_safe):
            message = (
                f"the host's agent was restarted while it did {what}; whether it happened is unknown, and it is"
                " not tried again: look at the object's state"
            )
            return _Ending(Outcome.OUTCOME_UNKNOWN, Problem(kind=Kind.UNAVAILABLE, message=message))
        deadline_ms = found.accepted_ms + int(order.deadline_seconds * 1000)
        entry = _Entry(order, action, body, found.trace, deadline_ms, resumed=True)
        if found.cancelled:
            entry.cancelled.set()
        return entry

    async def close(self, grace_seconds: float = 2.0) -> None:
        """Lets running orders end for a moment, and leaves the rest as they are: the next run resumes them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_seconds)

    # Running

    @property
    def running(self) -> int:
        """Orders accepted and not ended."""
        return len(self._entries)

    def _enqueue(self, entry: _Entry) -> None:
        self._entries[entry.order.order_id] = entry
        name = (entry.order.owner, entry.order.object_id)
        lane = self._lanes.get(name)
        if lane is not None:
            lane.append(entry)
            return
        self._lanes[name] = deque([entry])
        task = asyncio.create_task(self._drain(name), name=f"lane {name[0]} {name[1]}")
        self._tasks.add(task)
        task.add_done_callback(self._lane_ended)

    def _lane_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.broken.done():
            self.broken.set_exception(error)

    async def _drain(self, name: tuple[str, str]) -> None:
        lane = self._lanes[name]
        while lane:
            entry = lane.popleft()
            async with self._families[_family(entry.order.kind)]:
                await self._carry_out(entry)
        del self._lanes[name]

    async def _carry_out(self, entry: _Entry) -> None:
        order = entry.order
        context = telemetry.extract({"traceparent": entry.trace} if entry.trace else None)
        with (
            telemetry.within_operation(order.operation_id),
            self._tracer.start_as_current_span(f"order {order.kind}", context=context) as span,
        ):
            task = asyncio.create_task(self._run(entry), name=f"order {order.order_id}")
            ending = await self._ending(entry, task)
            span.set_attribute("volery.outcome", ending.outcome)
            if ending.problem is not None:
                span.set_status(trace.StatusCode.ERROR, ending.problem.message)
                log.warning("%s for %s: %s", order.kind, order.object_id, ending.problem.message)
            if entry.progress is not None:
                await asyncio.wait([entry.progress])
            await self._finish(order, ending)
            telemetry.orders_ended.add(1, {"kind": order.kind, "outcome": ending.outcome})
        self._entries.pop(order.order_id, None)
        if not task.done():
            # What can't be stopped keeps its object, so that nothing else is done to it meanwhile.
            await asyncio.wait([task])

    async def _ending(self, entry: _Entry, task: asyncio.Task[bytes]) -> _Ending:
        """Waits for the action, stops it at its deadline or when it is cancelled, and says how it ended."""
        cancelled = asyncio.create_task(entry.cancelled.wait())
        remaining = (entry.deadline_ms - self._clock.now_ms()) / 1000
        # What was cancelled, or waited beyond its deadline, is stopped before its first step.
        if remaining > 0 and not entry.cancelled.is_set():
            await asyncio.wait((task, cancelled), timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
        cancelled.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=self._cancel_grace_seconds)
        return self._judge_end(entry, task)

    def _judge_end(self, entry: _Entry, task: asyncio.Task[bytes]) -> _Ending:
        order = entry.order
        what = f"{order.kind} for {order.object_id}"
        if not task.done():
            message = f"{what} could not be stopped within {self._cancel_grace_seconds:.0f} s; it may still be running"
            return _Ending(Outcome.OUTCOME_UNKNOWN, Problem(kind=Kind.TIMEOUT, message=message))
        if task.cancelled() and entry.resumed and not entry.begun:
            message = (
                f"the host's agent was restarted while it did {what}, too late to go on; whether it happened is"
                " unknown: look at the object's state"
            )
            return _Ending(Outcome.OUTCOME_UNKNOWN, Problem(kind=Kind.UNAVAILABLE, message=message))
        if task.cancelled():
            if entry.cancelled.is_set():
                return _Ending(Outcome.CANCELLED)
            message = f"{what} took longer than its {order.deadline_seconds:g} s and was stopped"
            return _Ending(Outcome.FAILED, Problem(kind=Kind.TIMEOUT, message=message))
        error = task.exception()
        if error is None and len(task.result()) <= RESULT_MAX_BYTES:
            return _Ending(Outcome.SUCCEEDED, result=msgspec.Raw(task.result()))
        if error is None:
            message = (
                f"{what} was done, but its result of {len(task.result())} bytes is more than the bus carries"
            )
            return _Ending(Outcome.FAILED, Problem(kind=Kind.TOO_LARGE, message=message))
        if isinstance(error, Refused):
            return _Ending(Outcome.FAILED, error.problem())
        log.error("%s ended by an error of the agent", what, exc_info=error)
        outcome = Outcome.FAILED if entry.action.order.repeat_safe else Outcome.OUTCOME_UNKNOWN
        message = f"{what} ended by an error of the agent, {type(error).__name__}: see the log of this host"
        return _Ending(outcome, Problem(kind=Kind.INTERNAL, message=message))

    async def _run(self, entry: _Entry) -> bytes:
        order = entry.order
        if (gate := self._gates.get(_family(order.kind))) is not None:
            await gate.wait()
        entry.begun = True
        running = Running(
            order_id=order.order_id,
            owner=order.owner,
            object_id=order.object_id,
            epoch=order.epoch,
            order_seq=order.order_seq,
            deadline_seconds=max(0.0, (entry.deadline_ms - self._clock.now_ms()) / 1000),
            resumed=entry.resumed,
            progress=lambda percent, details: self._progress(entry, percent, details),
        )
        return encode(await entry.action.run(self._host, entry.body, running))

    def _progress(self, entry: _Entry, percent: float, details: dict[str, Any]) -> None:
        """Newest first: at most one a second, and none while one is on its way to the disk."""
        now_ms = self._clock.now_ms()
        busy = entry.progress is not None and not entry.progress.done()
        if busy or now_ms - entry.progressed_ms < PROGRESS_SECONDS * 1000:
            return
        entry.progressed_ms = now_ms
        order = entry.order
        fact = PROGRESSED[order.owner]
        said = OrderProgressed(
            **self._from_host(),
            order_id=order.order_id,
            object_id=order.object_id,
            progress=percent,
            details=details,
        )
        key = progress_key(order.order_id)
        putting = self._journal.put(order.owner, fact.subject_for(said), encode(said), FactClass.STATE, key)
        entry.progress = asyncio.create_task(_if_the_disk_lets(putting))

    async def _finish(self, order: OrderEnvelope, ending: _Ending) -> None:
        finished = OrderFinished(
            **self._from_host(),
            order_id=order.order_id,
            kind=order.kind,
            object_id=order.object_id,
            epoch=order.epoch,
            outcome=ending.outcome,
            problem=ending.problem,
            result=ending.result,
        )
        while True:
            try:
                await self._journal.finish(order, FINISHED[order.owner], finished)
                return
            except sqlite3.Error as error:
                log.error("the end of order %s can't be journaled (%s): trying again", order.order_id, error)
                await asyncio.sleep(DISK_RETRY_SECONDS)

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


def _of_a_former_boot(order: OrderEnvelope) -> _Ending:
    """A host that comes back never goes on with anything by itself: its VMs may run elsewhere by now."""
    message = f"the host was rebooted before {order.kind} for {order.object_id} had ended; nothing of it runs any more"
    if order.repeat_safe:
        problem = Problem(kind=Kind.UNAVAILABLE, message=f"{message}: order it again")
        return _Ending(Outcome.FAILED, problem)
    # Such as a migration: nothing of it runs here, and it may have come to its end before.
    message += (
        ". Whether it had happened before is unknown, and it is not tried again: look at the object's state"
    )
    return _Ending(Outcome.OUTCOME_UNKNOWN, Problem(kind=Kind.UNAVAILABLE, message=message))


async def _if_the_disk_lets(putting: Coroutine[Any, Any, Any]) -> None:
    """For what is soon said again."""
    with contextlib.suppress(sqlite3.Error):
        await putting


def _family(kind: str) -> str:
    return kind.split(".", 1)[0]


def _refused(order_id: str, problem: Problem) -> OrderAck:
    return OrderAck(order_id=order_id, state=OrderState.REFUSED, problem=problem)
