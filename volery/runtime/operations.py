"""Operations as durable procedures: a coroutine made of named steps, run again from the start after a crash.

A step that has completed gives its recorded answer; one that hasn't is done again, so every step is idempotent
under (operation, step). Undo functions registered on the way run in reverse order when the procedure fails or
is cancelled. Every operation ends by its deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import asyncpg
import msgspec
from msgspec.structs import replace
from opentelemetry import trace

from volery.contracts.base import Entity, Message, Owner, encode
from volery.contracts.errors import Kind, Problem, Refused, conflict
from volery.contracts.ids import new_id
from volery.contracts.operation import ENDED, OPERATION_CHANGED, Operation, OperationState
from volery.runtime import telemetry
from volery.runtime.bus import LOST, Caller
from volery.runtime.clock import utc_now
from volery.runtime.database import AWAY
from volery.runtime.orders import Orders
from volery.runtime.quarantine import Quarantine
from volery.runtime.run import CancelRequested, OperationPrivate, Run
from volery.runtime.tables import Change, Row, Stale, Table
from volery.runtime.tasks import end

log = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Message)
A = TypeVar("A")
V = TypeVar("V")

CANCEL_GRACE_SECONDS = 15.0
AGAIN_SECONDS = 1.0
ANSWER_FIRST_SECONDS = 0.005
"""An operation begins when the answer to its request is on its way: in one process they would compete."""
LEFT_OPEN: tuple[type[BaseException], ...] = (Stale, *AWAY)
"""An operation that meets one of these is taken up again later."""


def operation_table(owner: Owner) -> Table[Operation, OperationPrivate]:
    return Table(
        "operation",
        Operation,
        OperationPrivate,
        columns={
            "kind": "kind",
            "state": "state",
            "object_id": "object_id",
            "principal": "principal",
            "created_at": "created_at",
        },
        changed=OPERATION_CHANGED[owner],
        noun="operation",
    )


Release = Callable[[Operation], Awaitable[Sequence[Change]]]


@dataclass(frozen=True, slots=True)
class Procedure:
    """A kind of operation: what runs it, how long it may take, and what is done with its object at the end."""

    kind: str
    run: Callable[[Any, Run], Awaitable[None]]
    deadline_seconds: float = 600.0


@dataclass(slots=True)
class Operations:
    """The operations of one service; they run on its leader."""

    owner: Owner
    pool: asyncpg.Pool[asyncpg.Record]
    orders: Orders
    service: Any
    procedures: dict[str, Procedure]
    commit: Callable[[Sequence[Change]], Awaitable[None]]
    release: Release
    """What becomes of the object when its operation ended, e.g. `busy_with` cleared."""
    quarantine: Quarantine
    leading: bool = False
    aligned: bool = False
    """Whether this leader's log was compared with its stream: nothing is carried out before, since what says that the
    database is older than the world, or may be, would come too late."""
    hint: Callable[[], object] = lambda: None
    """Tells the leader, if it is another process, that there is work."""
    table: Table[Operation, OperationPrivate] = field(init=False)
    runs: dict[str, tuple[Run, asyncio.Task[None]]] = field(default_factory=dict)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.table = operation_table(self.owner)

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._spawned)
        return task

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("background work failed: %r", error)

    def begin(
        self,
        kind: str,
        *,
        object_kind: str,
        object_id: str,
        object_name: str = "",
        question: Message | None = None,
        caller: Caller,
        deadline_seconds: float | None = None,
    ) -> tuple[Operation, Change]:
        """A new operation and the change that writes it; it starts once that is committed."""
        self.quarantine.check()
        now = utc_now()
        seconds = deadline_seconds or self.procedures[kind].deadline_seconds
        context = trace.get_current_span().get_span_context()
        operation = Operation(
            id=f"{self.owner}-{new_id()}",
            revision=1,
            created_at=now,
            updated_at=now,
            kind=kind,
            object_kind=object_kind,
            object_id=object_id,
            deadline=now + timedelta(seconds=seconds),
            object_name=object_name,
            principal=caller.principal,
            trace_id=trace.format_trace_id(context.trace_id) if context.is_valid else "",
        )
        private = OperationPrivate(
            input=msgspec.Raw(encode(question)) if question is not None else msgspec.Raw(b"{}"),
            traceparent=telemetry.inject({}).get("traceparent", ""),
        )
        insert = self.table.insert(operation, private)
        return operation, replace_then(insert, lambda: self._started(Row(operation, private)))

    def _started(self, row: Row[Operation, OperationPrivate]) -> None:
        if not self.leading:
            self.hint()
        elif self.aligned and not self.quarantine.holds:
            self._launch(row, ANSWER_FIRST_SECONDS)

    def _launch(self, row: Row[Operation, OperationPrivate], after_seconds: float = 0.0) -> None:
        if row.id in self.runs:
            return
        run = Run(self, row)
        cancelling = row.public.state is OperationState.CANCELLING or row.public.outcome_pending
        if cancelling and not run.goes_only_forward:
            run.reason = row.public.problem
            run.cancelling.set()
        task = asyncio.create_task(self._drive(run, after_seconds))
        self.runs[row.id] = (run, task)
        task.add_done_callback(lambda _: self.runs.pop(row.id, None))

    async def resume(self) -> None:
        """Take up every operation that has not ended: after a crash, a change of leader, a lost hint."""
        if self.quarantine.holds or not self.aligned:
            return
        open_states = ("pending", "running", "cancelling")
        for row in await self.table.where(self.pool, "state = any($1::text[])", list(open_states)):
            known = self.runs.get(row.id)
            if known is None:
                self._launch(row)
            elif row.public.state is OperationState.CANCELLING and not known[0].cancelling.is_set():
                self._cancel_run(known[0], None)

    async def resume_pending(self) -> None:
        """Take up what ended by its deadline while a host was at work: its object is freed once the host says how
        that ended. Looked for when leadership begins; later ones are still being driven."""
        for row in await self.table.where(
            self.pool, "state = 'failed' and position('\"outcome_pending\":true' in doc) > 0"
        ):
            self._launch(row)

    async def cancel(self, operation_id: str) -> Operation:
        """Ask an operation to stop; it ends as cancelled once nothing is left behind."""
        while True:
            row = await self.table.get(self.pool, operation_id)
            op = row.public
            if op.state in ENDED:
                raise conflict(f"operation {operation_id} has already {op.state}; nothing to cancel")
            if row.private.only_forward:
                raise conflict(
                    f"it is too late to cancel operation {operation_id}: {op.kind} of {op.object_kind} "
                    f"{op.object_name or op.object_id} has happened, and is being completed"
                )
            wanted = replace(op, state=OperationState.CANCELLING)
            try:
                if op.state is not OperationState.CANCELLING:
                    await self.commit([self.table.update(row, wanted)])
            except Stale:
                continue
            known = self.runs.get(operation_id)
            if known is not None:
                self._cancel_run(known[0], None)
            else:
                self.hint()
            return wanted

    def _cancel_run(self, run: Run, reason: Problem | None) -> None:
        if run.goes_only_forward:
            return
        run.reason = run.reason or reason
        run.cancelling.set()

    async def _drive(self, run: Run, after_seconds: float) -> None:
        """Run the procedure to its end; what leaves it open is only a lost leadership, or a database that is away."""
        try:
            await asyncio.sleep(after_seconds)
            await self._run(run)
        except LEFT_OPEN as error:
            log.warning("operation %s will be taken up again: %s", run.id, error or type(error).__name__)
        finally:
            run.drop_late()

    async def _run(self, run: Run) -> None:
        procedure = self.procedures.get(run.operation.kind)
        telemetry.service_name.set(self.owner)
        context = telemetry.extract({"traceparent": run.row.private.traceparent})
        with (
            telemetry.within_operation(run.id),
            telemetry.tracer.start_as_current_span(run.operation.kind, context=context),
        ):
            watch = asyncio.create_task(self._watch_deadline(run))
            try:
                if procedure is None:
                    raise Refused(Kind.INTERNAL, f"this version can't carry out {run.operation.kind}")
                await self._carried_out(procedure, run)
                await self._finish(run, OperationState.SUCCEEDED, None)
            except CancelRequested:
                await self._fail(run, run.reason or _cancelled(run), by_person=run.reason is None)
            except Refused as refused:
                await self._fail(run, refused.problem(), by_person=False)
            except LEFT_OPEN:
                # Somebody changed the object under an exclusive operation, leadership or the database was lost.
                raise
            except Exception as error:  # the runtime's own loop: a bug ends the operation, never the service
                log.exception("operation %s (%s) failed", run.id, run.operation.kind)
                await self._fail(run, _bug(run, error), by_person=False)
            finally:
                watch.cancel()

    async def _carried_out(self, procedure: Procedure, run: Run) -> None:
        """The procedure to its end; from the beginning, as after a crash, when an answer between its steps got lost."""
        while True:
            try:
                await procedure.run(self.service, run)
                return
            except Refused as refused:
                if not refused.details.get(LOST):
                    raise
                log.info("operation %s goes on from its last step: %s", run.id, refused.message)
            run.undos.clear()
            await asyncio.sleep(AGAIN_SECONDS)

    async def _watch_deadline(self, run: Run) -> None:
        if run.operation.outcome_pending:
            return
        left = (run.operation.deadline - utc_now()).total_seconds()
        await asyncio.sleep(max(left, 0.0))
        op = run.operation
        running = next((s.title for s in reversed(op.steps) if s.state is OperationState.RUNNING), "starting")
        problem = Problem(
            kind=Kind.TIMEOUT,
            message=f"{op.kind} of {op.object_kind} {op.object_name or op.object_id} did not finish by its "
            f"deadline while: {running}",
        )
        self._cancel_run(run, problem)
        await asyncio.sleep(CANCEL_GRACE_SECONDS)
        await run.host_at_work.wait()  # or it ends by itself before
        await self._end_pending(run, problem)

    async def _end_pending(self, run: Run, problem: Problem) -> None:
        """The deadline and its grace are over and a host is still at work: end, and keep the object busy."""
        await run.save(lambda op: _ended(op, OperationState.FAILED, problem, outcome_pending=True))
        self._count(run)

    async def _fail(self, run: Run, problem: Problem, *, by_person: bool) -> None:
        if run.row.private.failed is None:
            await run.save(lambda op: op, private=lambda p: replace(p, failed=problem, cancelled=by_person))
        run.undoing = True
        for name, action in reversed(run.undos):
            try:
                await run.surely(action)
            except Refused as refused:
                log.warning("undoing %s of %s: %s", name, run.id, refused.message)
        by_person = by_person or run.row.private.cancelled
        await self._finish(run, OperationState.CANCELLED if by_person else OperationState.FAILED, problem)

    async def _finish(self, run: Run, state: OperationState, problem: Problem | None) -> None:
        already = run.operation.state in ENDED
        while True:
            changes = await self.release(run.operation)
            try:
                if already:
                    await run.save(lambda op: replace(op, outcome_pending=False), changes=changes)
                else:
                    await run.save(lambda op: _ended(op, state, problem), changes=changes)
                break
            except Stale:
                continue
        if not already:
            self._count(run)

    def _count(self, run: Run) -> None:
        op = run.operation
        telemetry.operations_ended.add(1, {"kind": op.kind, "state": str(op.state)})
        log.info("%s of %s %s %s", op.kind, op.object_kind, op.object_id, op.state)

    async def stop(self) -> None:
        """Leave everything as it is; whoever leads next takes it up. What is begun while the rest ends, such as the late
        write of a step's end, ends as well: left alone it would keep its connection for as long as a lock is held."""
        self.leading = self.aligned = False
        while left := [
            task for task in (*(t for _, t in self.runs.values()), *self.tasks) if not task.done()
        ]:
            await end(left)

    async def trim(self, days: int = 30) -> None:
        await self.pool.execute(
            """delete from operation where state in ('succeeded', 'failed', 'cancelled')
               and created_at < now() - make_interval(days => $1)""",
            days,
        )
        await self.pool.execute(
            """delete from restored_operation r where not exists (select 1 from operation o where o.id = r.operation_id)"""
        )


def _ended(
    op: Operation, state: OperationState, problem: Problem | None, *, outcome_pending: bool = False
) -> Operation:
    open_to = OperationState.SUCCEEDED if state is OperationState.SUCCEEDED else OperationState.FAILED
    return replace(
        op,
        state=state,
        problem=problem,
        outcome_pending=outcome_pending,
        ended_at=utc_now(),
        progress=100.0 if state is OperationState.SUCCEEDED else op.progress,
        steps=tuple(s if s.state in ENDED else replace(s, state=open_to) for s in op.steps),
    )


def _cancelled(run: Run) -> Problem:
    return Problem(
        kind=Kind.CONFLICT, message=f"{run.operation.kind} was cancelled by request; it left nothing behind"
    )


def _bug(run: Run, error: Exception) -> Problem:
    return Problem(
        kind=Kind.INTERNAL,
        message=f"{run.operation.kind} failed inside Volery ({type(error).__name__}); the log has it under "
        f"operation {run.id}",
    )


def replace_then(change: Change, then: Callable[[], None]) -> Change:
    return change.and_then(then)


def busy(entity: Entity, noun: str, busy_with: str) -> None:
    """Refuse a second exclusive operation, naming the one at work."""
    if busy_with:
        raise conflict(
            f"{noun} {getattr(entity, 'name', entity.id)} is busy with operation {busy_with}; wait for it or cancel it",
            operation=busy_with,
        )
