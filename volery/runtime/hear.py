"""Consuming the hosts' facts: each host's in order, each effect committed together with the position of its cause. Facts of
different hosts that wait are heard together where the service says that it can: one decision, one commit.

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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import PersistMode, StorageType, StreamConfig, StreamInfo

from volery.contracts.agent import COMMITTED_SUBJECT, REPORT_SUBJECT, CommittedWord, FromHost
from volery.contracts.base import Fact, encode, fill, wildcard
from volery.runtime import telemetry
from volery.runtime.bus import Bus
from volery.runtime.clock import monotonic
from volery.runtime.tables import Change, Stale, commit, text_columns
from volery.runtime.tail import Broken, Heard, follow, last_position
from volery.runtime.tasks import end

log = logging.getLogger(__name__)

HOST_STREAM = "FACTS_HOST"
REPLAY = 20_000
"""Facts of hosts that are read again at a start."""
COMMIT_WORD_SECONDS = 1.0
ASK_AGAIN_SECONDS = 2.0
TOGETHER = 64
"""Facts of hosts that are heard together at most."""
MORE_THAN_EVER_SAID = 2**53 - 1
"""A fact's number that no journal reaches: whoever is told that it was committed knows its journal for an old copy."""

FactHandler = Callable[[Any], Awaitable[Sequence[Change] | None]]
FactsHandler = Callable[[Sequence[Any]], Awaitable[Sequence[Change] | None]]
"""Of several hosts at once, one fact of each."""


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


class Apart(Exception):
    """What was said can't be decided about at once: each is heard by itself."""


@dataclass(frozen=True, slots=True)
class Word:
    """A fact that a host said."""

    fact: Fact[Any]
    payload: FromHost
    handler: FactsHandler
    alone: bool
    """Whether its handler takes one at a time."""


@dataclass(slots=True)
class HostHearing:
    """One service listening to every host's facts that it owns."""

    bus: Bus
    pool: asyncpg.Pool[asyncpg.Record]
    owner: str
    handlers: dict[str, tuple[Fact[Any], FactHandler]]
    """Wildcard subject → fact and handler, of facts that are heard one by one."""
    report: Fact[Any]
    """The full report: the only fact that admits a new journal."""
    together: dict[str, tuple[Fact[Any], FactsHandler]] = field(default_factory=dict)
    """The same of facts that are heard with those of other hosts."""
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
    stood: tuple[object, int] = (None, 0)
    """When the stream was created, and how far it was heard."""
    asked: dict[str, float] = field(default_factory=dict)
    """Host, or host and the journal it left → when it was last asked or told."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """There is a position that its host wasn't told."""

    def has_heard(self, host_id: str, seq: int) -> bool:
        """Whether everything was heard that this host said up to there."""
        at = self.positions.get(host_id)
        return (at is not None and at.seq >= seq) or not seq

    async def run(self) -> None:
        self.stood = (None, 0)  # the database may be an older one now: what it hasn't heard is in the stream
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
        info = await self.bus.client.jetstream(timeout=5).stream_info(HOST_STREAM)
        after = self._after(info)
        async with follow(self.bus.client, HOST_STREAM, after, subjects) as tail:
            telling = asyncio.create_task(self._tell())
            try:
                async for heard in tail:
                    several = [heard, *await tail.at_hand(TOGETHER - 1)]
                    words = map(self._read, several)
                    for run in _runs(word for word in words if word is not None):
                        await self._take(run)
                    self.stood = (info.created, several[-1].position)
            finally:
                await end([telling])

    def _after(self, info: StreamInfo) -> int:
        """Where to begin: where it stood in this very stream, but only with the newest: agents publish again what nobody
        told them to be committed."""
        last = info.state.last_seq
        created, position = self.stood
        known = position if created == info.created and position <= last else 0
        return max(known, last - REPLAY, 0)

    def _read(self, heard: Heard) -> Word | None:
        """None: it can't be read, or nobody here hears it."""
        alone = next((v for p, v in self.handlers.items() if _matches(p, heard.subject)), None)
        several = next((v for p, v in self.together.items() if _matches(p, heard.subject)), None)
        found = alone or several
        if found is None:
            return None
        try:
            payload: FromHost = self.bus.decoder(found[0].payload).decode(heard.body)
        except msgspec.DecodeError as error:
            log.warning("a fact on %s can't be read: %s", heard.subject, error)
            return None
        if heard.subject.split(".")[2] != payload.host_id:
            log.warning("a fact on %s claims to be from host %s", heard.subject, payload.host_id)
            return None
        if several is not None:
            return Word(several[0], payload, several[1], alone=False)
        assert alone is not None
        return Word(alone[0], payload, _of_one(alone[1]), alone=True)

    async def _take(self, run: Sequence[Word]) -> None:
        """Facts of different hosts that one handler hears."""
        if len(run) > 1:
            try:
                await self._hear(run, again=False)
                return
            # Any: the trouble of one, whatever it is, holds up none before it, and is raised below when its turn comes.
            except Exception as error:
                log.info("%s hears %d hosts one by one: %r", self.owner, len(run), error)
        for word in run:
            await self._hear([word], again=True)

    async def _hear(self, run: Sequence[Word], *, again: bool) -> None:
        """Those that are due, with their effect. Raises Stale, Apart unless `again`."""
        due: list[Word] = []
        for word in run:
            await self._doubt(word.payload)
            if await self._due(word.fact, word.payload):
                due.append(word)
        if not due:
            return
        telemetry.facts_heard.add(len(due), {"service": self.bus.name, "fact": due[0].fact.name})
        await self._apply(due[0].handler, [word.payload for word in due], again)
        for word in due:
            if word.fact is self.report and self.reported is not None:
                await self.reported(word.payload.host_id, getattr(word.payload, "asked", None))

    async def _apply(self, handler: FactsHandler, said: Sequence[FromHost], again: bool) -> None:
        while True:
            changes = await handler(said) or ()
            if not again and _change_the_same(changes):
                raise Apart
            try:
                await commit(self.pool, [*changes, *self._cursors(said)])
                break
            except Stale:
                if not again:
                    raise
        wake_relay(self.committed, changes)
        for payload in said:
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

    def _cursors(self, said: Sequence[FromHost]) -> list[Change]:
        heard = text_columns((payload.host_id, payload.generation, payload.seq) for payload in said)
        admitted = Change(
            """insert into heard_host (host_id, generation, seq)
               select n.host_id, n.generation, n.seq::bigint
               from unnest({0}::text[], {1}::text[], {2}::text[]) as n(host_id, generation, seq)
               on conflict (host_id) do update set generation = excluded.generation, seq = excluded.seq""",
            heard,
            guarded=False,
        )
        left = [
            Change(
                "insert into left_journal (host_id, generation) values ({0}, {1}) on conflict do nothing",
                (payload.host_id, generation),
                guarded=False,
            )
            for payload in said
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


def _of_one(handler: FactHandler) -> FactsHandler:
    async def handle(said: Sequence[Any]) -> Sequence[Change] | None:
        return await handler(said[0])

    return handle


def _runs(words: Iterable[Word]) -> Iterator[list[Word]]:
    """Neighbours that one handler hears, at most one of each host."""
    run: list[Word] = []
    for word in words:
        if run and (
            word.alone
            or word.handler is not run[0].handler
            or any(word.payload.host_id == other.payload.host_id for other in run)
        ):
            yield run
            run = []
        run.append(word)
    if run:
        yield run


def _change_the_same(changes: Sequence[Change]) -> bool:
    """Whether two of them change one object: of one statement's changes of a row only one takes place."""
    ids = [change.document.id for change in changes if change.document is not None]
    return len(ids) != len(set(ids))


async def make_host_stream(bus: Bus, replicas: int) -> None:
    """The stream of hosts' facts: a day is enough, since agents publish again what nobody committed. For the same reason NATS
    need not have a fact on its disk before it passes it on: of those that it did so it takes 500 a second, of others 18,000.
    (With replicas it takes no such streams.)"""
    js = bus.client.jetstream(timeout=5)
    config = StreamConfig(
        name=HOST_STREAM,
        subjects=["fact.host.>"],
        storage=StorageType.FILE,
        num_replicas=replicas,
        max_age=86400,
        max_bytes=1024**3,
        duplicate_window=10,
        persist_mode=PersistMode.ASYNC if replicas == 1 else None,
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
