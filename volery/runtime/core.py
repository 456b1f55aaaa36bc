"""What every service is made of while it runs: bus, database, operations, orders, and how they are committed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import msgspec
import nats.errors

from volery.contracts.base import Call, Owner, encode
from volery.contracts.errors import Kind, Problem, Refused
from volery.runtime.bus import Bus, Caller
from volery.runtime.clock import monotonic
from volery.runtime.config import BusConfig
from volery.runtime.hear import HostHearing
from volery.runtime.operations import Operations
from volery.runtime.orders import Beats, Orders
from volery.runtime.outside import SERVERS, Outside
from volery.runtime.quarantine import Quarantine
from volery.runtime.tables import Change, Taken, commit
from volery.runtime.together import Together

REQUEST_CONSTRAINT = "request_pkey"
ANSWER_FIRST_SECONDS = 0.002
"""The facts of a request are relayed when its answer is on its way: in one process they would compete."""


SHOWN_ONCE = b"!"
"""Begins what is kept instead of an answer; no JSON begins so."""


class Repeated(Exception):
    """This request id was answered already: the first answer stands."""


@dataclass(slots=True)
class Keys:
    """A set of keys to look at soon. Waking twice before it is looked at costs nothing."""

    waiting: dict[str, None] = field(default_factory=dict)
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, key: str) -> None:
        self.waiting[key] = None
        self.event.set()

    async def take(self) -> list[str]:
        await self.event.wait()
        self.event.clear()
        keys, self.waiting = list(self.waiting), {}
        return keys


@dataclass(slots=True)
class Pace:
    """Wakes a key at once, but no more often than every so many seconds: for what changes often and is shown now and then."""

    wake: Callable[[str], None]
    seconds: float
    free_at: dict[str, float] = field(default_factory=dict)
    """Key → when it may be woken again."""
    waiting: set[str] = field(default_factory=set)

    def add(self, key: str) -> None:
        if key in self.waiting:
            return
        wait = self.free_at.get(key, float("-inf")) - monotonic()
        if wait <= 0:
            self._wake(key)
        else:
            self.waiting.add(key)
            asyncio.get_running_loop().call_later(wait, self._wake, key)

    def _wake(self, key: str) -> None:
        self.waiting.discard(key)
        self.free_at[key] = monotonic() + self.seconds
        self.wake(key)


@dataclass(slots=True)
class Core:
    """Given to a service when it opens; nothing is global."""

    owner: Owner
    config: Any
    bus: Bus
    bus_config: BusConfig
    pool: asyncpg.Pool[asyncpg.Record]
    beats: Beats
    hosts: HostHearing
    orders: Orders
    outside: Outside = SERVERS
    operations: Operations = field(init=False)
    relay_wake: asyncio.Event = field(default_factory=asyncio.Event)
    reconcile_keys: Keys = field(default_factory=Keys)
    quarantine: Quarantine = field(init=False)
    answered: Together[tuple[str, str], asyncpg.Record] = field(init=False)
    """Who asked under which id → the first answer and the hash of what was asked."""

    def __post_init__(self) -> None:
        self.quarantine = Quarantine(str(self.owner), self.pool)
        self.answered = Together(self._answered)

    async def _answered(self, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], asyncpg.Record]:
        records = await self.pool.fetch(
            """select r.principal, r.key, r.hash, r.answer
               from unnest($1::text[], $2::text[]) as asked(principal, key)
               join request r on r.principal = asked.principal and r.key = asked.key""",
            [principal for principal, _ in keys],
            [key for _, key in keys],
        )
        return {(r["principal"], r["key"]): r for r in records}

    def wake(self, key: str) -> None:
        """Have the reconcile loop look at this object soon."""
        self.reconcile_keys.add(key)

    async def commit(
        self,
        *changes: Change,
        caller: Caller | None = None,
        answer: Any = None,
        answers: Sequence[tuple[Caller, Any]] = (),
    ) -> None:
        """All changes with their facts, and the answer under the caller's request id, in one statement; or `answers` to
        many callers.

        Raises Stale, Taken, or Repeated when the same request was answered meanwhile.
        """
        all_changes = list(changes)
        if caller is not None and caller.request_id:
            all_changes.append(_request(caller, answer))
        elif named := [(each, reply) for each, reply in answers if each.request_id]:
            all_changes.append(_requests(named))
        try:
            await commit(self.pool, all_changes)
        except Taken as taken:
            if taken.constraint == REQUEST_CONSTRAINT:
                raise Repeated from None
            raise
        if any(change.facts for change in changes):
            if caller is None and not answers:
                self.relay_wake.set()
            else:
                asyncio.get_running_loop().call_later(ANSWER_FIRST_SECONDS, self.relay_wake.set)
            await self.hint()

    async def commit_all(self, changes: Sequence[Change]) -> None:
        await self.commit(*changes)

    async def hint(self) -> None:
        """Tell this service's leader, if it is another process, that there is something to relay."""
        if not self.operations.leading:
            try:
                await self.bus.client.publish(f"relay.{self.owner}.wake", b"")
            except nats.errors.Error:
                return

    async def first_answer(self, caller: Caller) -> msgspec.Raw | None:
        """What this request was answered before. Raises Refused(mismatch) if it asked for something else."""
        row = await self.answered.get((caller.principal, caller.request_id))
        if row is None:
            return None
        if row["hash"] != caller.request_hash:
            raise Refused(
                Kind.MISMATCH,
                f"Idempotency-Key {caller.request_id} was used before for another request; use a new key",
                key=caller.request_id,
            )
        if row["answer"].startswith(SHOWN_ONCE):
            kept = msgspec.json.decode(row["answer"][len(SHOWN_ONCE) :], type=Problem)
            raise Refused(kept.kind, kept.message, **kept.details)
        return msgspec.Raw(row["answer"])


def shown_once(refused: Refused) -> bytes:
    """What to keep instead of an answer with a secret in it: a repeat is refused like this."""
    return SHOWN_ONCE + encode(refused.problem())


def _request(caller: Caller, answer: Any) -> Change:
    return Change(
        """insert into request (principal, key, hash, answer) values ({0}, {1}, {2}, {3}::bytea) returning 1""",
        (caller.principal, caller.request_id, caller.request_hash, _body(answer)),
    )


def _requests(answers: Sequence[tuple[Caller, Any]]) -> Change:
    return Change(
        """insert into request (principal, key, hash, answer)
           select n.principal, n.key, n.hash, n.answer
           from unnest({0}::text[], {1}::text[], {2}::text[], {3}::bytea[]) as n(principal, key, hash, answer)
           returning 1""",
        (
            [caller.principal for caller, _ in answers],
            [caller.request_id for caller, _ in answers],
            [caller.request_hash for caller, _ in answers],
            [_body(answer) for _, answer in answers],
        ),
        each_of=1,
    )


def _body(answer: Any) -> bytes:
    return bytes(answer) if isinstance(answer, msgspec.Raw | bytes) else encode(answer)


def once(
    core: Core, call: Call[Any, Any], handler: Callable[[Any, Any, Caller], Awaitable[Any]], service: Any
) -> Callable[[Any, Caller], Awaitable[Any]]:
    """A handler that gives a repeated request its first answer."""

    async def answer(question: Any, caller: Caller) -> Any:
        if not call.mutates or not caller.request_id:
            return await handler(service, question, caller)
        if not caller.fresh and (first := await core.first_answer(caller)) is not None:
            return first
        try:
            return await handler(service, question, caller)
        except (Repeated, Refused):
            # A twin of this request may have committed meanwhile and be the very reason of the refusal.
            first = await core.first_answer(caller)
            if first is None:
                raise
            return first

    return answer


def body_hash(*parts: bytes) -> str:
    """The hash that tells two requests under one key apart."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
