"""Orders to hosts: durable in their owner's PostgreSQL, sent until the agent has journaled them, their result kept.

A result comes as a fact, or, when that is behind what was heard of the host, as the answer to sending the order again. An order
is given up only when the agent refused or finished it, or journaled its cancellation, or when the boot that it was sent
to has ended by proof: an order names a beat, so no other boot than that beat's ever takes it. An operation's order to a
host none of whose boots lives ends so without being sent; one of a reconcile loop waits for the next boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import asyncpg
import msgspec
import nats.errors
from nats.aio.client import Client

from volery.contracts.agent import (
    CANCEL_SUBJECT,
    ORDER_SUBJECT,
    SIGNATURE_HEADER,
    CancelOrder,
    OrderAck,
    OrderEnvelope,
    OrderFinished,
    OrderProgressed,
    OrderState,
    Outcome,
)
from volery.contracts.base import Message, Order, encode, fill
from volery.contracts.errors import Kind, Problem, Refused
from volery.contracts.ids import random_id
from volery.contracts.metrics import BEAT_SUBJECT, Beat
from volery.runtime import telemetry
from volery.runtime.bus_client import hear_often
from volery.runtime.clock import monotonic
from volery.runtime.deaths import Deaths
from volery.runtime.hear import HostHearing
from volery.runtime.tables import Change, commit

log = logging.getLogger(__name__)

A = TypeVar("A")
Q = TypeVar("Q", bound=Message)

TTL_MS = 30_000
"""How old the newest beat may be, by the agent's own clock, when an order arrives."""
SEND_SECONDS = 2.0
AGAIN_SECONDS = 5.0
SILENT_SECONDS = 3.0
"""Six beats: as long as ha takes to suspect a host. Nothing is started where nobody has beaten for so long, and that isn't
room either."""
TRY_AGAIN = {Kind.STALE, Kind.EXHAUSTED, Kind.UNAVAILABLE}

Sign = Callable[[str, bytes], str]


@dataclass(frozen=True, slots=True)
class Result:
    """How an order ended."""

    outcome: Outcome
    problem: Problem | None
    body: bytes | None
    boot_id: str = ""
    """Of the host when it ended; "" when that isn't known."""

    def answer(self, order: Order[Any, A]) -> A:
        """The decoded answer, or Refused with the host's own sentence."""
        if self.outcome is Outcome.SUCCEEDED:
            made: A = msgspec.json.decode(self.body or b"{}", type=order.answer)
            return made
        problem = self.problem or Problem(
            kind=Kind.INTERNAL, message=f"the host ended {order.kind}: {self.outcome}"
        )
        raise Refused(problem.kind, problem.message, **problem.details, outcome=str(self.outcome))


BEAT_OF = BEAT_SUBJECT.format(host_id="").encode()

_ORDER = """select host_id, object_id, kind, epoch, order_seq, operation_id, body, fencing_token, deadline_seconds,
                   repeat_safe, boot_id, state, outcome, problem, result, ended_boot_id
            from host_order where order_id = $1"""


def _result(row: asyncpg.Record) -> Result | None:
    """How an order of the table ended, if it has."""
    if row["state"] != "finished":
        return None
    problem = msgspec.json.decode(row["problem"], type=Problem) if row["problem"] else None
    return Result(Outcome(row["outcome"]), problem, row["result"], row["ended_boot_id"])


@dataclass(slots=True)
class Beats:
    """The newest beat of every host, by this process's monotonic clock."""

    newest: dict[str, tuple[Beat, float]] = field(default_factory=dict)
    boots: dict[str, set[str]] = field(default_factory=dict)
    """Host → its boots that this process has heard beat."""
    since: float = field(default_factory=monotonic)
    """When this process began to listen."""
    client: Client | None = None
    """The connection on which they are heard, once they are."""
    decoder: msgspec.json.Decoder[Beat] = field(default_factory=lambda: msgspec.json.Decoder(Beat))
    listeners: list[Callable[[Beat, float], None]] = field(default_factory=list)

    async def listen(self, client: Client) -> None:
        """Unless another program of this process does, which shares this."""
        if self.client is not None:
            return
        self.client, self.since = client, monotonic()
        await hear_often(client, BEAT_SUBJECT.format(host_id="*"), self.hear)

    def hear(self, subject: bytes, data: bytes) -> None:
        try:
            beat = self.decoder.decode(data)
        except msgspec.DecodeError:
            return
        if subject == BEAT_OF + beat.host_id.encode():
            now = monotonic()
            before = self.newest.get(beat.host_id)
            self.newest[beat.host_id] = (beat, now)
            if before is None or before[0].boot_id != beat.boot_id:
                self.boots.setdefault(beat.host_id, set()).add(beat.boot_id)
            for listener in self.listeners:
                listener(beat, now)

    def seq(self, host_id: str) -> int | None:
        found = self.newest.get(host_id)
        return None if found is None else found[0].beat_seq

    def silent_seconds(self, host_id: str) -> float:
        """How long nothing was heard of a host; what nobody could have heard counts as heard."""
        found = self.newest.get(host_id)
        return monotonic() - (self.since if found is None else max(found[1], self.since))

    def boot(self, host_id: str) -> str:
        """The boot that beat last; "" when none was heard."""
        found = self.newest.get(host_id)
        return "" if found is None else found[0].boot_id


@dataclass(slots=True)
class Orders:
    """The orders of one service. Only its leader sends them."""

    owner: str
    pool: asyncpg.Pool[asyncpg.Record]
    client: Client
    """A connection that never queues: publishing while disconnected fails."""
    hosts: HostHearing
    beats: Beats
    sign: Sign
    deaths: Deaths
    token: int = 0
    waiting: dict[str, asyncio.Future[Result]] = field(default_factory=dict)
    progress: dict[str, Callable[[OrderProgressed], None]] = field(default_factory=dict)
    lanes: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = field(
        default_factory=weakref.WeakValueDictionary
    )
    """(host, object) → who may give an order outside operations."""
    hindered: dict[str, str] = field(default_factory=dict)
    """Host → why the last order to it was not taken."""

    def give(
        self,
        order: Order[Q, Any],
        question: Q,
        *,
        order_id: str,
        host_id: str,
        object_id: str,
        epoch: int = 0,
        operation_id: str = "",
    ) -> list[Change]:
        """The changes that write an order; it is sent by `result`. Its sequence counts per object."""
        count = Change(
            """insert into order_seq (object_id, seq) select {0}, base + 1 from restore_base
               on conflict (object_id) do update set seq = greatest(order_seq.seq + 1, excluded.seq)
               returning seq""",
            (object_id,),
        )
        write = Change(
            """insert into host_order (order_id, host_id, object_id, kind, epoch, order_seq, operation_id, body,
                   state, fencing_token, deadline_seconds, repeat_safe, boot_id)
               select {0}, {1}, {2}, {3}, {4}::bigint, s.seq, {5}, {6}::bytea, 'waiting', l.token,
                      {7}::float8, {8}::bool, {10}
               from {prev} s, leader l where l.token = {9}::bigint returning 1""",
            (
                order_id,
                host_id,
                object_id,
                order.kind,
                epoch,
                operation_id,
                order.encode(question),
                order.deadline_seconds,
                order.repeat_safe,
                self.token,
                self._living_boot(host_id),
            ),
        )
        return [count, write]

    def _living_boot(self, host_id: str) -> str:
        boot_id = self.beats.boot(host_id)
        return "" if self.deaths.has_ended(host_id, boot_id) else boot_id

    async def exists(self, order_id: str) -> bool:
        return bool(await self.pool.fetchval("select 1 from host_order where order_id = $1", order_id))

    async def epoch_of(self, order_id: str) -> int | None:
        """Under which epoch of its object it was given; None when it wasn't."""
        found: int | None = await self.pool.fetchval(
            "select epoch from host_order where order_id = $1", order_id
        )
        return found

    async def host_of(self, order_id: str) -> str:
        return str(await self.pool.fetchval("select host_id from host_order where order_id = $1", order_id))

    async def stored(self, order_id: str) -> Result | None:
        """The result, if the order has ended."""
        return (await self.given(order_id))[1]

    async def given(self, order_id: str) -> tuple[bool, Result | None]:
        """Whether it was given, and the result, if it has ended."""
        row = await self.pool.fetchrow(
            "select state, outcome, problem, result, ended_boot_id from host_order where order_id = $1",
            order_id,
        )
        return row is not None, None if row is None else _result(row)

    async def ended_under(self, order_id: str) -> str:
        """The boot under which the host said how the order ended; "" when that isn't known."""
        found = "select ended_boot_id from host_order where order_id = $1"
        return str(await self.pool.fetchval(found, order_id) or "")

    async def result(self, order_id: str, cancelling: asyncio.Event | None = None) -> Result:
        """Send the order until its end is known. With `cancelling` set, its cancellation is sent instead."""
        future = self.waiting.setdefault(order_id, asyncio.get_running_loop().create_future())
        try:
            while True:
                row = await self.pool.fetchrow(_ORDER, order_id)
                assert row is not None
                if (found := _result(row)) is not None:
                    return found
                stop = cancelling is not None and cancelling.is_set()
                acknowledged = await (self._cancel(order_id) if stop else self._send(order_id, row))
                pause = AGAIN_SECONDS if acknowledged else 0.25
                try:
                    return await self._either(future, cancelling, pause)
                except TimeoutError:
                    continue
        finally:
            self.waiting.pop(order_id, None)

    async def carry_out(
        self, order: Order[Q, A], question: Q, *, host_id: str, object_id: str, timeout_seconds: float
    ) -> A:
        """An order outside any operation, for reconcile loops: given, sent, and its answer decoded.

        One at a time per host and object: what an earlier call (or leader) left open must end first, so that a
        later order is never overtaken by an earlier one. Raises Refused with the host's sentence, or of kind
        `timeout` when the host has not said how it ended; then it may still be carried out.
        """
        lane = self.lanes.setdefault((host_id, object_id), asyncio.Lock())
        try:
            async with asyncio.timeout(timeout_seconds), lane:
                for left in await self.left_open(host_id, object_id):
                    await self.result(left)
                order_id = random_id()
                given = self.give(order, question, order_id=order_id, host_id=host_id, object_id=object_id)
                await commit(self.pool, given)
                result = await self.result(order_id)
        except TimeoutError:
            raise Refused(
                Kind.TIMEOUT,
                f"host {host_id} did not say within {timeout_seconds:g} s how {order.kind} ended: "
                + self.hindered.get(host_id, "it has the order"),
                host_id=host_id,
            ) from None
        return result.answer(order)

    async def abandoned(self, older_seconds: float) -> list[str]:
        """Orders outside any operation that nobody waits for any more: whoever gave them was refused an answer in time."""
        rows = await self.pool.fetch(
            """select order_id from host_order where operation_id = '' and state <> 'finished'
               and created_at < now() - make_interval(secs => $1)""",
            older_seconds,
        )
        return [row["order_id"] for row in rows]

    async def give_up(self, order_id: str) -> Result:
        """How it ended; cancelled, unless the host was quicker. Waits for the host's word."""
        cancelling = asyncio.Event()
        cancelling.set()
        return await self.result(order_id, cancelling)

    async def left_open(self, host_id: str, object_id: str) -> list[str]:
        """Orders outside operations that have not ended, oldest first."""
        rows = await self.pool.fetch(
            """select order_id from host_order where host_id = $1 and object_id = $2 and operation_id = ''
               and state <> 'finished' order by order_seq""",
            host_id,
            object_id,
        )
        return [row["order_id"] for row in rows]

    async def _either(
        self, future: asyncio.Future[Result], cancelling: asyncio.Event | None, pause: float
    ) -> Result:
        """The result, or TimeoutError after the pause or as soon as cancelling begins."""
        waits: list[asyncio.Future[Any]] = [future]
        if cancelling is not None and not cancelling.is_set():
            waits.append(asyncio.ensure_future(cancelling.wait()))
        await asyncio.wait(waits, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        for extra in waits[1:]:
            extra.cancel()
        if future.done():
            return future.result()
        raise TimeoutError

    async def _send(self, order_id: str, row: asyncpg.Record) -> bool:
        """Whether the agent has it."""
        at = self.hosts.positions.get(row["host_id"])
        beat_seq, boot_id = self.beats.seq(row["host_id"]), self.beats.boot(row["host_id"])
        proof = self.deaths.ended.get((row["host_id"], boot_id))
        if proof is not None:
            self.hindered[row["host_id"]] = f"it died ({proof.kind}), and has not come back"
        if row["host_id"] in self.deaths.down and (row["operation_id"] or row["boot_id"]):
            await self.end_with_their_hosts()  # given at the moment of its death
            return False
        if proof is not None:
            return False
        if at is None or beat_seq is None:
            missing = "report" if at is None else "beat"
            self.hindered[row["host_id"]] = f"no {missing} of it was heard yet, so no order can be sent to it"
            return False
        if row["boot_id"] != boot_id:
            await self._sent_to(order_id, boot_id)
        envelope = OrderEnvelope(
            order_id=order_id,
            host_id=row["host_id"],
            agent_generation=at.generation,
            owner=self.owner,
            kind=row["kind"],
            object_id=row["object_id"],
            order_seq=row["order_seq"],
            epoch=row["epoch"],
            beat_seq=beat_seq,
            ttl_ms=TTL_MS,
            body=msgspec.Raw(row["body"]),
            # Of whoever sends it now: an order that a former leader wrote is this leader's once it took over.
            fencing_token=max(row["fencing_token"], self.token),
            operation_id=row["operation_id"],
            deadline_seconds=row["deadline_seconds"],
            repeat_safe=row["repeat_safe"],
        )
        ack = await self._request(fill(ORDER_SUBJECT, envelope), encode(envelope))
        taken = await self._take_ack(order_id, envelope.host_id, ack)
        if taken:
            self.hindered.pop(envelope.host_id, None)
        else:
            problem = ack.problem.message if ack is not None and ack.problem is not None else ""
            self.hindered[envelope.host_id] = problem or "it does not answer on the bus"
        return taken

    async def _sent_to(self, order_id: str, boot_id: str) -> None:
        """Written before it is sent: that boot's journal may have it from now on."""
        sent = "update host_order set boot_id = {1} where order_id = {0} and state <> 'finished'"
        await commit(self.pool, [Change(sent, (order_id, boot_id), guarded=False)])

    async def end_with_their_hosts(self) -> None:
        """Orders end that a boot had which has ended by proof, and those of operations that no boot is left to have."""
        rows = await self.pool.fetch(
            """select o.order_id, o.host_id, o.boot_id, o.kind, o.object_id from host_order o
               where o.state <> 'finished' and (
                   exists (select 1 from host_death d where d.host_id = o.host_id and d.boot_id = o.boot_id)
                   or (o.boot_id = '' and o.operation_id <> '' and o.host_id = any($1::text[])))""",
            list(self.deaths.down),
        )
        for row in rows:
            host_id, what = row["host_id"], f"{row['kind']} for {row['object_id']}"
            proof = self.deaths.ended.get((host_id, row["boot_id"])) or self.deaths.down.get(host_id)
            if proof is not None:
                problem = self.deaths.problem(host_id, what, proof)
                await commit(
                    self.pool, [self.finish(row["order_id"], Result(Outcome.HOST_DIED, problem, None))]
                )

    async def _cancel(self, order_id: str) -> bool:
        cancel = CancelOrder(host_id=await self.host_of(order_id), order_id=order_id)
        ack = await self._request(fill(CANCEL_SUBJECT, cancel), encode(cancel))
        return await self._take_ack(order_id, cancel.host_id, ack)

    async def _request(self, subject: str, body: bytes) -> OrderAck | None:
        headers = telemetry.inject({SIGNATURE_HEADER: self.sign(subject, body)})
        try:
            answer = await self.client.request(subject, body, timeout=SEND_SECONDS, headers=headers)
            return msgspec.json.decode(answer.data, type=OrderAck)
        except (nats.errors.Error, TimeoutError) as error:
            log.debug("%s: %s", subject, error or type(error).__name__)
        except msgspec.DecodeError as error:
            log.warning("the answer to %s can't be read: %s", subject, error)
        return None

    async def _take_ack(self, order_id: str, host_id: str, ack: OrderAck | None) -> bool:
        """Whether the agent has it. An end that a fact tells, too, never overtakes what the host said before: a report on
        its way, made before a VM was started, would end that VM."""
        if ack is None:
            return False
        if ack.state is OrderState.ACCEPTED:
            return True
        if not self.hosts.has_heard(host_id, ack.result_seq):
            with contextlib.suppress(nats.errors.Error):
                await self.hosts.ask_now_and_then(host_id)
            return True
        if ack.state is OrderState.REFUSED and ack.problem is not None and ack.problem.kind in TRY_AGAIN:
            return False
        outcome = ack.outcome or (Outcome.FAILED if ack.state is OrderState.REFUSED else Outcome.CANCELLED)
        result = Result(outcome, ack.problem, bytes(ack.result))
        change = self.finish(order_id, result)
        await commit(self.pool, [change])
        return True

    def finish(self, order_id: str, result: Result) -> Change:
        """The change that ends an order; whoever waits for it is told once it is committed."""

        def tell() -> None:
            telemetry.orders_ended.add(1, {"owner": self.owner, "outcome": str(result.outcome)})
            future = self.waiting.get(order_id)
            if future is not None and not future.done():
                future.set_result(result)

        return Change(
            # The question isn't needed any more; it may hold secrets.
            """update host_order set state = 'finished', outcome = {1}, problem = {2}, result = {3}, body = '',
                   ended_boot_id = {4}
               where order_id = {0} and state <> 'finished'""",
            (
                order_id,
                str(result.outcome),
                encode(result.problem).decode() if result.problem else "",
                result.body,
                result.boot_id,
            ),
            guarded=False,
            then=tell,
        )

    async def on_finished(self, fact: OrderFinished) -> Sequence[Change]:
        body = bytes(fact.result)
        return [self.finish(fact.order_id, Result(fact.outcome, fact.problem, body, fact.boot_id))]

    async def on_progressed(self, fact: OrderProgressed) -> Sequence[Change]:
        listener = self.progress.get(fact.order_id)
        if listener is not None:
            listener(fact)
        return ()

    async def trim(self, days: int = 7) -> None:
        await self.pool.execute(
            """delete from host_order where state = 'finished'
               and created_at < now() - make_interval(days => $1)""",
            days,
        )
