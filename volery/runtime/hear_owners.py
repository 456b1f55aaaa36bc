"""Consuming owners' facts: in order, each effect committed together with the position of its cause.

A stream is followed by position. Facts that wait while one is heard are heard together where the service says that it can:
one decision, one commit, one position.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import asyncpg
import msgspec
import nats.errors
import nats.js.errors

from volery.contracts.base import Fact, Owner
from volery.contracts.errors import Refused
from volery.contracts.health import GET_HEALTH, AskHealth
from volery.runtime import telemetry
from volery.runtime.bus import Bus
from volery.runtime.database import AWAY
from volery.runtime.hear import FactHandler, wake_relay
from volery.runtime.relay import stream_name
from volery.runtime.tables import Change, Stale, commit
from volery.runtime.tail import Broken, Heard, Standing, Tail, follow
from volery.runtime.tasks import end

log = logging.getLogger(__name__)

CURSOR_SECONDS = 1.0
"""How often a position is written that came without an effect: one that is lost only means hearing facts again."""
TOGETHER = 100
"""Facts that are heard together at most: a few hundred kilobytes of arguments."""


class Said(NamedTuple):
    """One of several facts that are heard together."""

    fact: Fact[Any]
    payload: Any


RunHandler = Callable[[Sequence[Said]], Awaitable[Sequence[Change] | None]]


def newest(said: Sequence[Said]) -> list[Any]:
    """What was said last of each object: all that matters to who only keeps how things are."""
    return list({each.payload.id: each.payload for each in said}.values())


class Envelope(msgspec.Struct, frozen=True):
    """What the runtime reads of a CloudEvent."""

    id: str
    type: str
    data: msgspec.Raw


_envelope = msgspec.json.Decoder(Envelope)


def _pattern(subject: str) -> str:
    """Under which an owner's fact is declared: `fact.{owner}.{noun}.*.{verb}`."""
    fact, owner, noun, _, verb = subject.split(".", 4)
    return f"{fact}.{owner}.{noun}.*.{verb}"


_FORWARD = "where heard.history = excluded.history and heard.position < excluded.position"


@dataclass(slots=True)
class Hearing:
    """One service listening to another owner's stream."""

    bus: Bus
    pool: asyncpg.Pool[asyncpg.Record]
    owner: Owner
    handlers: dict[str, tuple[Fact[Any], FactHandler]]
    """Wildcard subject → fact and handler, of facts that are heard one by one."""
    together: dict[str, tuple[Fact[Any], RunHandler]] = field(default_factory=dict)
    """The same of facts that are heard with others of this handler that wait."""
    on_gap: Callable[[], Awaitable[None]] | None = None
    """Called when facts were lost for good: behind the retention, or another history."""
    committed: Callable[[], None] = lambda: None
    """Told after an effect was committed that said facts."""
    position: int = 0
    history: str = ""
    written: int = 0
    """The position in the database."""
    stream: str = field(init=False)

    def __post_init__(self) -> None:
        self.stream = stream_name(self.owner)
        both = self.handlers.keys() & self.together.keys()
        assert not both, f"{self.bus.name} hears {both} both one by one and together"

    async def run(self) -> None:
        while True:
            try:
                await self._load()
                async with follow(self.bus.client, self.stream, self.position, self._subjects()) as tail:
                    await self._trust(tail.standing)
                    await self._follow(tail)
            except nats.js.errors.NotFoundError:
                await asyncio.sleep(0.25)
            except (Broken, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.info("%s follows %s again: %s", self.bus.name, self.stream, error or type(error).__name__)
                await asyncio.sleep(0.25)

    def _subjects(self) -> list[str]:
        return [*self.handlers, *self.together]

    async def _trust(self, standing: Standing) -> None:
        """A stream is never ahead of its owner's log, unless PostgreSQL was restored to an older state: what it says
        then never happened, and must have no effect before the owner has made it anew."""
        try:
            owner = await self.bus.ask(GET_HEALTH[self.owner], AskHealth())
        except Refused as refused:
            raise Broken(f"whether it is true can't be asked: {refused.message}") from refused
        if owner.log_history != standing.history or owner.log_position < standing.last:
            raise Broken(f"it is ahead of the log of {self.owner}, whose database was restored")

    async def _load(self) -> None:
        row = await self.pool.fetchrow("select history, position from heard where stream = $1", self.stream)
        self.history, self.position = (row["history"], row["position"]) if row else ("", 0)
        self.written = self.position

    async def _follow(self, tail: Tail) -> None:
        if self.history != tail.standing.history or self.position + 1 < tail.standing.first:
            if self.history and self.on_gap is not None:
                await self.on_gap()
            self.history = tail.standing.history
            self.position = min(self.position, tail.standing.first - 1) if self.position else 0
            await commit(self.pool, [self._cursor(tail.standing.first - 1)])
            if self.position != 0:
                raise Broken("the stream begins anew")
        self.written = self.position
        writing = asyncio.create_task(self._write_positions())
        try:
            async for heard in tail:
                waiting = [heard, *await tail.at_hand(TOGETHER - 1)]
                for handler, run in itertools.groupby(waiting, self._run_handler):
                    await self._take_run(handler, list(run))
        finally:
            await end([writing])

    async def _write_positions(self) -> None:
        """Of facts that had no effect: seldom, since every fact has a dozen hearers and most of them don't mind it."""
        while True:
            await asyncio.sleep(CURSOR_SECONDS)
            if (position := self.position) > self.written:
                with contextlib.suppress(Stale, *AWAY):
                    await commit(self.pool, [self._cursor(position, _FORWARD)])
                    self.written = max(self.written, position)

    def _cursor(self, position: int, guard: str = "") -> Change:
        return Change(
            f"""insert into heard (stream, history, position) values ({{0}}, {{1}}, {{2}})
               on conflict (stream) do update set history = excluded.history, position = excluded.position
               {guard}""",
            (self.stream, self.history, position),
            guarded=False,
        )

    def _run_handler(self, heard: Heard) -> RunHandler | None:
        """Who hears it together with its neighbours; None: it is heard alone."""
        found = self.together.get(_pattern(heard.subject))
        return None if found is None else found[1]

    async def _take_run(self, handler: RunHandler | None, run: Sequence[Heard]) -> None:
        if handler is not None and len(run) > 1:
            try:
                await self._take(run[-1].position, lambda: self._decide_together(handler, run))
                return
            # Any: the trouble of one, whatever it is, holds up none before it, and is raised below when its turn comes.
            except Exception as error:
                log.info("%s hears %d facts one by one: %r", self.bus.name, len(run), error)
        for heard in run:
            await self._take(heard.position, partial(self._decide, heard))

    async def _take(self, position: int, decide: Callable[[], Awaitable[Sequence[Change]]]) -> None:
        """The effect of what was said up to there, and then the position."""
        if position <= self.position:
            return
        while changes := await decide():
            try:
                await commit(self.pool, [*changes, self._cursor(position)])
            except Stale:
                continue
            self.written = position
            wake_relay(self.committed, changes)
            break
        self.position = position

    async def _decide(self, heard: Heard) -> Sequence[Change]:
        pattern = _pattern(heard.subject)
        if (several := self.together.get(pattern)) is not None:
            return await self._decide_together(several[1], [heard])
        if (one := self.handlers.get(pattern)) is None:
            return ()
        fact, handler = one
        return await handler(self._payload(fact, heard)) or ()

    async def _decide_together(self, handler: RunHandler, run: Sequence[Heard]) -> Sequence[Change]:
        said = []
        for heard in run:
            fact, _ = self.together[_pattern(heard.subject)]
            said.append(Said(fact, self._payload(fact, heard)))
        return await handler(said) or ()

    def _payload(self, fact: Fact[Any], heard: Heard) -> Any:
        telemetry.facts_heard.add(1, {"service": self.bus.name, "fact": fact.name})
        return self.bus.decoder(fact.payload).decode(_envelope.decode(heard.body).data)


def by_owner(
    rows: list[tuple[Fact[Any], Any]], made: Any
) -> dict[Owner, list[tuple[Fact[Any], FactHandler]]]:
    """A service's handlers, bound to it: the same one stays the same, whatever facts it hears."""
    handlers = {handler: bound(made, handler) for _, handler in rows}
    found: dict[Owner, list[tuple[Fact[Any], FactHandler]]] = {}
    for fact, handler in rows:
        found.setdefault(Owner(fact.owner), []).append((fact, handlers[handler]))
    return found


def bound(made: Any, handler: Callable[[Any, Any], Awaitable[Sequence[Change] | None]]) -> FactHandler:
    async def handle(payload: Any) -> Sequence[Change] | None:
        return await handler(made, payload)

    return handle
