"""Consuming the hosts' facts: in order, each effect committed together with the position of its cause.

Hosts' facts are numbered by their agent's journal: what was heard is told to the agent, which then forgets it; a new journal
is admitted only with its full report. A journal that a host has left is never admitted again: what the stream still holds
of it is history, and an agent that really goes back to it (an old backup of its disk) is told that it is an old copy,
whereupon it makes itself a new one. A host that was told more to be committed than the tables have heard of it proves that
they were restored from a backup.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import StorageType, StreamConfig

from volery.contracts.agent import COMMITTED_SUBJECT, REPORT_SUBJECT, CommittedWord, FromHost
from volery.contracts.base import Fact, encode, fill, wildcard
from volery.runtime import telemetry
from volery.runtime.bus import Bus
from volery.runtime.clock import monotonic
from volery.runtime.tables import Change, Stale, commit
from volery.runtime.tail import Broken, Heard, follow, last_position
from volery.runtime.tasks import end

log = logging.getLogger(__name__)

HOST_STREAM = "FACTS_HOST"
REPLAY = 20_000
"""Facts of hosts that are read again at a start."""
COMMIT_WORD_SECONDS = 1.0
ASK_AGAIN_SECONDS = 2.0
MORE_THAN_EVER_SAID = 2**53 - 1
"""A fact's number that no journal reaches: whoever is told that it was committed knows its journal for an old copy."""

FactHandler = Callable[[Any], Awaitable[Sequence[Change] | None]]


def _matches(pattern: str, subject: str) -> bool:
    wanted, given = pattern.split("."), subject.split(".")
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def wake_relay(relay: Callable[[], None], changes: Sequence[Change]) -> None:
    """Only for what is to be relayed: most of what is heard says nothing."""
    if any(change.facts for change in changes):
        relay()


@dataclass(slots=True)
class HostPosition:
    generation: str
    seq: int


@dataclass(slots=True)
class HostHearing:
    """One service listening to every host's facts that it owns."""

    bus: Bus
    pool: asyncpg.Pool[asyncpg.Record]
    owner: str
    handlers: dict[str, tuple[Fact[Any], FactHandler]]
    report: Fact[Any]
    """The full report: the only fact that admits a new journal."""
    committed: Callable[[], None] = lambda: None
    reported: Callable[[str, Sequence[str] | None], Awaitable[None]] | None = None
    """(host, what it was asked before): told after a host's full report was committed."""
    contradicted: Callable[[str, str], Awaitable[None]] | None = None
    """(host, why): told, before its fact has any effect, of a host that was told more than the tables know."""
    positions: dict[str, HostPosition] = field(default_factory=dict)
    left: set[tuple[str, str]] = field(default_factory=set)
    """(host, generation) of journals that were admitted once, and another one since."""
    unknown: set[tuple[str, str]] = field(default_factory=set)
    """(host, generation) of journals that were admitted by what the database was before it was restored."""
    asked: dict[str, float] = field(default_factory=dict)
    """Host, or host and the journal it left → when it was last asked or told."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """There is a position that its host wasn't told."""

    def has_heard(self, host_id: str, seq: int) -> bool:
        """Whether everything was heard that this host said up to there."""
        at = self.positions.get(host_id)
        return (at is not None and at.seq >= seq) or not seq

    async def run(self) -> None:
        await self._load()
        while True:
            try:
                await self._follow()
            except nats.js.errors.NotFoundError:
                await asyncio.sleep(0.25)
            except (Broken, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.info("%s follows the hosts again: %s", self.owner, error or type(error).__name__)
                await asyncio.sleep(0.25)

    async def _load(self) -> None:
        rows = await self.pool.fetch("select host_id, generation, seq from heard_host")
        self.positions = {r["host_id"]: HostPosition(r["generation"], r["seq"]) for r in rows}
        rows = await self.pool.fetch("select host_id, generation from left_journal")
        self.left = {(r["host_id"], r["generation"]) for r in rows}
        self.moved.set()

    async def _follow(self) -> None:
        subjects = [f"fact.host.*.{self.owner}.>"]
        # Only the newest: agents publish again what nobody told them to be committed.
        info = await self.bus.client.jetstream(timeout=5).stream_info(HOST_STREAM)
        after = max(info.state.last_seq - REPLAY, 0)
        async with follow(self.bus.client, HOST_STREAM, after, subjects) as tail:
            telling = asyncio.create_task(self._tell())
            try:
                async for heard in tail:
                    await self._take(heard)
            finally:
                await end([telling])

    async def _take(self, heard: Heard) -> None:
        found = next((v for p, v in self.handlers.items() if _matches(p, heard.subject)), None)
        if found is None:
            return
        fact, handler = found
        try:
            payload: FromHost = self.bus.decoder(fact.payload).decode(heard.body)
        except msgspec.DecodeError as error:
            log.warning("a fact on %s can't be read: %s", heard.subject, error)
            return
        if heard.subject.split(".")[2] != payload.host_id:
            log.warning("a fact on %s claims to be from host %s", heard.subject, payload.host_id)
            return
        await self._doubt(payload)
        if not await self._due(fact, payload):
            return
        telemetry.facts_heard.add(1, {"service": self.bus.name, "fact": fact.name})
        await self._apply(handler, payload)
        if fact is self.report and self.reported is not None:
            await self.reported(payload.host_id, getattr(payload, "asked", None))

    async def _apply(self, handler: FactHandler, payload: FromHost) -> None:
        while True:
            changes = await handler(payload) or ()
            try:
                await commit(self.pool, [*changes, *self._cursor(payload)])
                break
            except Stale:
                continue
        wake_relay(self.committed, changes)
        left = self._leaves(payload)
        self.left.update((payload.host_id, generation) for generation in left)
        self.unknown -= {(payload.host_id, generation) for generation in (*left, payload.generation)}
        self.positions[payload.host_id] = HostPosition(payload.generation, payload.seq)
        self.moved.set()

    async def _doubt(self, payload: FromHost) -> None:
        """Owners confirm what is durable. A host that was confirmed more of its journal than is known here was told so by a
        database that this one is an older copy of."""
        if self.contradicted is None or payload.confirmed <= self._known(payload):
            return
        await self._load()  # another leader may have confirmed it a moment ago
        if payload.confirmed <= (known := self._known(payload)):
            return
        host_id, generation = payload.host_id, payload.generation
        at = self.positions.get(host_id)
        if at is None or at.generation != generation:
            self.unknown.add((host_id, generation))
        await self.contradicted(
            host_id,
            f"host {host_id} was told that {self.owner} had committed its facts up to {payload.confirmed} of journal "
            f"{generation}, of which the database knows {known or 'none'}, so PostgreSQL was restored from an older state",
        )

    def _known(self, payload: FromHost) -> float:
        """How much was heard of this journal; of one that was left, everything."""
        host_id, generation = payload.host_id, payload.generation
        if (host_id, generation) in self.left:
            return math.inf
        at = self.positions.get(host_id)
        return at.seq if at is not None and at.generation == generation else 0

    async def _due(self, fact: Fact[Any], payload: FromHost) -> bool:
        """Whether this fact is the next one of its journal."""
        at = self.positions.get(payload.host_id)
        is_report = fact is self.report
        if at is None or at.generation != payload.generation:
            if (payload.host_id, payload.generation) in self.left:
                await self._disown(payload)
                return False
            if not is_report:
                await self.ask_now_and_then(payload.host_id)
            return is_report
        if payload.seq <= at.seq:
            return False
        if payload.after_seq <= at.seq or (is_report and getattr(payload, "gap", False)):
            return True
        # Something before it is missing here: lost on the way, or committed by a database that was since restored.
        await self.ask_now_and_then(payload.host_id)
        return False

    async def _disown(self, payload: FromHost) -> None:
        """A journal that this host has left speaks again. Mostly that is the stream read anew; an agent that has it on
        its disk again makes a new one at this word, and no other agent minds it."""
        if not self._now_and_then(f"{payload.host_id} {payload.generation}"):
            return
        log.info("host %s left journal %s; what it says is not heard", payload.host_id, payload.generation)
        await self._say(payload.host_id, HostPosition(payload.generation, MORE_THAN_EVER_SAID))

    async def ask_now_and_then(self, host_id: str) -> None:
        """For a report, with which the agent says again all that was not committed."""
        if self._now_and_then(host_id):
            await self.ask_report(host_id)

    def _now_and_then(self, key: str) -> bool:
        now = monotonic()
        if now - self.asked.get(key, -60.0) < ASK_AGAIN_SECONDS:
            return False
        self.asked[key] = now
        return True

    async def ask_report(self, host_id: str, ask: str = "") -> None:
        """`ask`: the host's answer names it."""
        word = CommittedWord(host_id=host_id, owner=self.owner, generation="", seq=0, ask=ask)
        await self.bus.client.publish(fill(REPORT_SUBJECT, word), encode(word))

    def _cursor(self, payload: FromHost) -> list[Change]:
        admitted = Change(
            """insert into heard_host (host_id, generation, seq) values ({0}, {1}, {2})
               on conflict (host_id) do update set generation = excluded.generation, seq = excluded.seq""",
            (payload.host_id, payload.generation, payload.seq),
            guarded=False,
        )
        left = [
            Change(
                "insert into left_journal (host_id, generation) values ({0}, {1}) on conflict do nothing",
                (payload.host_id, generation),
                guarded=False,
            )
            for generation in self._leaves(payload)
        ]
        return [admitted, *left]

    def _leaves(self, payload: FromHost) -> list[str]:
        """The journals that its host is known to have left when this fact is admitted: the one before, and those between
        that only a lost database had admitted, which the stream may hold for a day yet."""
        at = self.positions.get(payload.host_id)
        if at is not None and at.generation == payload.generation:
            return []
        known = {generation for host_id, generation in self.unknown if host_id == payload.host_id}
        if at is not None:
            known.add(at.generation)
        return sorted(known - {payload.generation})

    async def _tell(self) -> None:
        """Tell each host what was committed: at once, but not twice within a second."""
        told: dict[str, HostPosition] = {}
        while True:
            self.moved.clear()
            news = {host_id: at for host_id, at in self.positions.items() if told.get(host_id) != at}
            for host_id, at in news.items():
                await self._say(host_id, at)
            told |= news
            if news:
                await asyncio.sleep(COMMIT_WORD_SECONDS)
            await self.moved.wait()

    async def _say(self, host_id: str, at: HostPosition) -> None:
        word = CommittedWord(host_id=host_id, owner=self.owner, generation=at.generation, seq=at.seq)
        await self.bus.client.publish(fill(COMMITTED_SUBJECT, word), encode(word))


async def make_host_stream(bus: Bus, replicas: int) -> None:
    """The stream of hosts' facts: a day is enough, since agents publish again what nobody committed."""
    js = bus.client.jetstream(timeout=5)
    config = StreamConfig(
        name=HOST_STREAM,
        subjects=["fact.host.>"],
        storage=StorageType.FILE,
        num_replicas=replicas,
        max_age=86400,
        max_bytes=1024**3,
        duplicate_window=10,
    )
    try:
        await last_position(bus.client, HOST_STREAM)
    except nats.js.errors.NotFoundError:
        await js.add_stream(config)


def table_of(
    facts: Sequence[tuple[Fact[Any], FactHandler]],
) -> dict[str, tuple[Fact[Any], FactHandler]]:
    """Wildcard subject → fact and handler. A fact with several has their effects together, in this order."""
    table: dict[str, tuple[Fact[Any], FactHandler]] = {}
    for fact, handler in facts:
        subject = wildcard(fact.subject)
        table[subject] = (fact, _both(table[subject][1], handler) if subject in table else handler)
    return table


def _both(first: FactHandler, second: FactHandler) -> FactHandler:
    async def handle(payload: Any) -> Sequence[Change]:
        return [*(await first(payload) or ()), *(await second(payload) or ())]

    return handle


async def keep_host_stream(bus: Bus, replicas: int) -> None:
    """The hosts' stream exists, also after somebody deleted NATS's whole store."""
    while True:
        try:
            await make_host_stream(bus, replicas)
        except (nats.errors.Error, TimeoutError) as error:
            log.info("the hosts' stream: %s", error or type(error).__name__)
        await asyncio.sleep(1.0)
