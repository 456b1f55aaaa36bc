"""One operation being carried out, as its procedure sees it: named steps and orders, undone in reverse order.

A step that has completed gives its recorded answer, so that a procedure can begin anew after a crash. An end with nothing
else to write is written with what comes next: should it get lost, the step is done again, as it is idempotent.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec.structs import replace

from volery.contracts.agent import OrderProgressed
from volery.contracts.base import Message, Order, encode
from volery.contracts.errors import Problem, Refused
from volery.contracts.operation import ENDED, Operation, OperationState, Step
from volery.runtime.bus import LOST, Caller
from volery.runtime.clock import monotonic
from volery.runtime.tables import Change, Row, Stale

if TYPE_CHECKING:
    from volery.runtime.operations import Operations

log = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Message)
A = TypeVar("A")
V = TypeVar("V")

Then = Callable[[Any], tuple[str, str] | None]
"""Answer → name and title of the step that comes next."""

PROGRESS_SECONDS = 0.5
LATE_SECONDS = 0.05
"""An end is written after this when nothing else was to be written that it could go with."""


class OperationPrivate(Message):
    """What only the service knows of an operation."""

    input: msgspec.Raw = msgspec.Raw(b"{}")
    results: dict[str, msgspec.Raw] = {}
    """Step → its recorded answer."""
    failed: Problem | None = None
    """Set before undoing begins, so that a crash in between goes on undoing."""
    cancelled: bool = False
    only_forward: bool = False
    """What was asked for has happened: see `Run.only_forward`."""
    traceparent: str = ""


class CancelRequested(Exception):
    """The operation was cancelled, or its deadline passed, at a checkpoint."""


@dataclass(slots=True)
class Run:
    """One operation being carried out, as its procedure sees it."""

    operations: Operations
    row: Row[Operation, OperationPrivate]
    cancelling: asyncio.Event = field(default_factory=asyncio.Event)
    reason: Problem | None = None
    undos: list[tuple[str, Callable[[], Awaitable[None]]]] = field(default_factory=list)
    host_at_work: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while only a host can say what became of it, which may be silent for ever."""
    undoing: bool = False
    _progress_at: float = 0.0
    _late: dict[str, msgspec.Raw] = field(default_factory=dict)
    """Answers of steps whose end is not written yet."""
    _announced: set[str] = field(default_factory=set)
    """Steps whose begin was written with the end of the one before, and that nobody has tried yet."""
    _saving: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def operation(self) -> Operation:
        return self.row.public

    @property
    def id(self) -> str:
        return self.row.public.id

    @property
    def caller(self) -> Caller:
        """For calls to other services on behalf of whoever asked; each step gets its own request id."""
        return Caller(self.operation.principal or f"operation:{self.id}")

    def caller_for(self, step: str) -> Caller:
        return Caller(self.operation.principal or f"operation:{self.id}", f"{self.id}/{step}", step)

    def input(self, type_: type[Q]) -> Q:
        return msgspec.json.decode(self.row.private.input, type=type_)

    def undo(self, name: str, action: Callable[[], Awaitable[None]]) -> None:
        """Do this, in reverse order of registration, if the operation does not succeed."""
        if not self.goes_only_forward:
            self.undos.append((name, action))

    def undone(self, name: str) -> None:
        """Forget an undo that must no longer happen."""
        self.undos = [(n, a) for n, a in self.undos if n != name]

    @property
    def from_backup(self) -> bool:
        """Whether it was under way in a backup that was restored since: then more may have happened than its steps say,
        and hosts may remember its orders."""
        return self.id in self.operations.quarantine.restored

    @property
    def goes_only_forward(self) -> bool:
        return self.row.private.only_forward

    async def only_forward(self, *changes: Change) -> None:
        """What was asked for has happened, and taking it back would do harm: from here on nothing is undone, also after a
        crash; whoever cancels is told that it is too late, and a cancellation under way has no effect any more. The
        deadline stops nothing either, so what follows must end by itself. Raises Stale when the changes that say so don't
        hold any more."""
        await self.save(_running_again, private=lambda p: replace(p, only_forward=True), changes=changes)
        self.undos.clear()
        self.cancelling.clear()
        self.reason = None

    async def step(
        self,
        name: str,
        title: str,
        action: Callable[[], Awaitable[V]],
        type_: Any = None,
        *,
        changes: Sequence[Change] = (),
        follows: Callable[[V], Awaitable[Sequence[Change]]] | None = None,
        then: Then | None = None,
    ) -> V:
        """Do a step once: its answer is recorded, and given again after a crash.

        `type_` is what the answer decodes to (None: the step has no answer worth keeping). What `follows` from the answer
        is written with it, and decided again when somebody changed a row first; then the begin of the step that comes next,
        if any, is written with this one's end: `then` says which, as name and title.
        """
        recorded = self._recorded(name)
        if recorded is not None:
            kept: V = msgspec.json.decode(recorded, type=type_) if type_ is not None else None  # type: ignore[assignment]
            return kept
        await self._enter(name, title, changes)
        answer = await self.surely(action)
        kept_answer = answer if type_ is not None else None
        if follows is None:
            self._end_later(name, kept_answer)
            return answer
        while name not in self.row.private.results:
            try:
                await self._end(name, kept_answer, await follows(answer), then=then and then(answer))
            except Stale:
                continue
            return answer
        return await self.step(name, title, action, type_)

    async def _enter(self, name: str, title: str, changes: Sequence[Change]) -> None:
        """The step is begun, durably. Raises what ended the operation when nothing of it can have been done."""
        if name in self._announced:
            self._announced.discard(name)
            self.checkpoint()
            return
        if not self._may_be_done(name):
            self.checkpoint()
        await self._begin(name, title, changes)

    async def write(
        self,
        name: str,
        title: str,
        decide: Callable[[], Awaitable[tuple[V, Sequence[Change]]]],
        type_: type[V],
        then: Then | None = None,
    ) -> V:
        """A step that is one commit: its answer and what it changes. Decided again when somebody changed a row first. `then`
        as for `step`."""
        if (recorded := self.recorded(name, type_)) is not None:
            return recorded
        if not self._may_be_done(name):
            self.checkpoint()
        while (recorded := self.recorded(name, type_)) is None:
            answer, changes = await decide()
            try:
                await self._end(name, answer, changes, title, then and then(answer))
            except Stale:
                continue
            return answer
        return recorded

    def recorded(self, name: str, type_: type[V]) -> V | None:
        """What a step answered, if it has ended."""
        found = self._recorded(name)
        return None if found is None else msgspec.json.decode(found, type=type_)

    def _recorded(self, name: str) -> msgspec.Raw | None:
        return self.row.private.results.get(name) or self._late.get(name)

    def _may_be_done(self, name: str) -> bool:
        """Whether the step was begun and nobody knows what came of it: then it is asked about before anything is undone,
        or the question that is still under way would be carried out after its undo."""
        return self.row.private.failed is None and any(s.name == name for s in self.operation.steps)

    async def surely(self, action: Callable[[], Awaitable[V]]) -> V:
        """The action's answer; done again, under the same request ids, when a question or answer got lost. Also when the
        operation is cancelled meanwhile: what can be undone is known only with the answer."""
        pause = 0.1
        while True:
            try:
                return await action()
            except Refused as refused:
                if not refused.details.get(LOST):
                    raise
                log.info("asking again: %s", refused.message)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)

    async def order(
        self,
        name: str,
        title: str,
        order: Order[Q, A],
        question: Q | Callable[[], Awaitable[Q]],
        *,
        host_id: str,
        object_id: str = "",
        epoch: int = 0,
        on_progress: Callable[[OrderProgressed], None] | None = None,
    ) -> A:
        """Order a host to do something and wait for its answer. Raises Refused with the host's sentence.

        A question that must be made is made once: an order that was given before a crash needs none.
        """
        order_id = self.order_id(name)
        given, result = await self.operations.orders.given(order_id)
        if result is None:
            result = await self._carry_out(
                given, order_id, name, title, order, question, host_id, object_id, epoch, on_progress
            )
        if self.cancelling.is_set() and not self.undoing and result.outcome != "succeeded":
            self.checkpoint()
        answer: A = result.answer(order)
        self._end_later(name, None)
        return answer

    def order_id(self, name: str) -> str:
        """The id of this operation's order `name`: the same after a crash."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.id}/{name}"))

    async def _carry_out(
        self,
        given: bool,
        order_id: str,
        name: str,
        title: str,
        order: Order[Q, A],
        question: Q | Callable[[], Awaitable[Q]],
        host_id: str,
        object_id: str,
        epoch: int,
        on_progress: Callable[[OrderProgressed], None] | None,
    ) -> Any:
        orders = self.operations.orders
        if not given:
            self.checkpoint()
            written = orders.give(
                order,
                question if isinstance(question, Message) else await question(),
                order_id=order_id,
                host_id=host_id,
                object_id=object_id or self.operation.object_id,
                epoch=epoch,
                operation_id=self.id,
            )
            await self._begin(name, title, written)
        orders.progress[order_id] = on_progress or (lambda fact: self.say_progress(name, fact.progress))
        try:
            with self.waiting_for_host():
                return await orders.result(order_id, None if self.undoing else self.cancelling)
        finally:
            orders.progress.pop(order_id, None)

    @contextmanager
    def waiting_for_host(self) -> Iterator[None]:
        """Past its deadline the operation ends meanwhile, and its object is kept until the host has spoken."""
        self.host_at_work.set()
        try:
            yield
        finally:
            self.host_at_work.clear()

    def checkpoint(self) -> None:
        """Raises what ended the operation: a failure before a crash, a cancellation, the deadline."""
        if self.undoing:
            return
        if self.row.private.failed is not None:
            problem = self.row.private.failed
            raise Refused(problem.kind, problem.message, **problem.details)
        if self.cancelling.is_set():
            raise CancelRequested

    async def commit(self, *changes: Change) -> None:
        """Changes of the service's own, in one statement. Raises Stale."""
        await self.operations.commit(changes)

    def say_progress(self, name: str, percent: float) -> None:
        """Show how far a step is, at most twice a second."""
        now = monotonic()
        if now - self._progress_at >= PROGRESS_SECONDS:
            self._progress_at = now
            self.operations.spawn(self._save_progress(name, percent))

    async def _save_progress(self, name: str, percent: float) -> None:
        def progressed(op: Operation) -> Operation:
            steps = tuple(replace(s, progress=percent) if s.name == name else s for s in op.steps)
            done = sum(s.progress for s in steps if s.name != name)
            return replace(op, steps=steps, progress=round((done + percent) / max(len(steps), 1), 1))

        await self.save(progressed)

    async def _begin(self, name: str, title: str, changes: Sequence[Change]) -> None:
        await self.save(lambda op: self._with_step(op, name, title), changes=changes)

    def _with_step(self, op: Operation, name: str, title: str) -> Operation:
        steps = tuple(s for s in op.steps if s.name != name)
        running = OperationState.CANCELLING if self.cancelling.is_set() else OperationState.RUNNING
        # One whose deadline and grace are over has ended, though it is still undone.
        state = op.state if op.state in ENDED else running
        return replace(op, state=state, steps=(*steps, Step(name=name, title=title)))

    async def _end(
        self,
        name: str,
        answer: Any,
        changes: Sequence[Change],
        title: str = "",
        then: tuple[str, str] | None = None,
    ) -> None:
        """With a title: of a step whose begin nobody wrote."""

        def ended(op: Operation) -> Operation:
            op = _with_ended(self._with_step(op, name, title) if title else op, (name,))
            return self._with_step(op, *then) if then is not None else op

        await self.save(ended, results={name: msgspec.Raw(encode(answer))}, changes=changes)
        if then is not None:
            self._announced.add(then[0])

    def _end_later(self, name: str, answer: Any) -> None:
        if name in self.row.private.results:
            return
        self._late[name] = msgspec.Raw(encode(answer))
        asyncio.get_running_loop().call_later(LATE_SECONDS, self._write_late, name)

    def drop_late(self) -> None:
        """The procedure was left: whoever takes it up does again what isn't written."""
        self._late.clear()

    def _write_late(self, name: str) -> None:
        if name in self._late:
            self.operations.spawn(self.save(lambda op: op))

    async def save(
        self,
        public: Callable[[Operation], Operation],
        *,
        results: dict[str, msgspec.Raw] | None = None,
        changes: Sequence[Change] = (),
        private: Callable[[OperationPrivate], OperationPrivate] | None = None,
    ) -> None:
        """Write the operation, whoever else (a cancellation) wrote it meanwhile. Raises Stale when the changes don't hold
        any more, or another leader has recorded one of these results: what it decided counts."""
        async with self._saving:
            late = dict(self._late)
            new = late | (results or {})

            def written(op: Operation) -> Operation:
                return public(_with_ended(op, late))

            await self._save(written, new, changes, private or (lambda kept: kept))
            for name in late:
                self._late.pop(name, None)

    async def _save(
        self,
        public: Callable[[Operation], Operation],
        results: dict[str, msgspec.Raw],
        changes: Sequence[Change],
        private: Callable[[OperationPrivate], OperationPrivate],
    ) -> None:
        table, pool = self.operations.table, self.operations.pool
        while True:
            row = self.row
            kept = private(replace(row.private, results=row.private.results | results))
            update = table.update(row, public(row.public), kept)
            try:
                await self.operations.commit([update, *changes])
            except Stale:
                fresh = await table.get(pool, self.id)
                if fresh.public.revision == row.public.revision:
                    raise
                self.row = fresh
                others = fresh.private.results.keys() - row.private.results.keys()
                if results.keys() & others:
                    self._late.clear()  # what the other leader recorded counts
                    raise
                continue
            self.row = Row(replace(public(row.public), revision=row.public.revision + 1), kept)
            return


def _with_ended(op: Operation, names: Collection[str]) -> Operation:
    """The operation once these steps have succeeded."""
    if not names:
        return op
    done = OperationState.SUCCEEDED
    steps = tuple(replace(s, state=done, progress=100.0) if s.name in names else s for s in op.steps)
    return replace(op, steps=steps)


def _running_again(op: Operation) -> Operation:
    return replace(op, state=OperationState.RUNNING) if op.state not in ENDED else op
