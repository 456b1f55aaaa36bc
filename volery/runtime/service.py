"""A service: the table of what it answers, hears and runs, and how it is served and led.

Calls are answered by every replica. Background work (relay, hearing, operations, reconciling) is done by one
replica at a time: whoever holds the session lock of the service's schema, under a fencing token that grows.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import asyncpg

from volery.contracts.agent import OrderFinished, OrderProgressed
from volery.contracts.base import Call, Done, Fact, Owner, wildcard
from volery.contracts.health import EXCUSE_HOST, GET_HEALTH, AskHealth, ExcuseHost, Health
from volery.contracts.liveness import LIVENESS_CHANGED
from volery.contracts.operation import (
    CANCEL_OPERATION,
    GET_OPERATION,
    LIST_OPERATIONS,
    CancelOperation,
    GetOperation,
    ListQuery,
    Operation,
)
from volery.contracts.streams import REBUILD_STREAM, RebuildStream
from volery.runtime import telemetry
from volery.runtime.bus import Answers, Bus, Caller, open_bus
from volery.runtime.config import read
from volery.runtime.core import Core, once
from volery.runtime.database import SchemaTooNew
from volery.runtime.deaths import Deaths
from volery.runtime.hear import HostHearing, keep_host_stream, table_of
from volery.runtime.hear_owners import Hearing, bound, by_owner
from volery.runtime.operations import Operations, Procedure
from volery.runtime.orders import Beats, Orders
from volery.runtime.pages import page
from volery.runtime.programs import Settings
from volery.runtime.relay import Log, Relay, rebuild_stream, stream_name
from volery.runtime.signing import Signer, parse_creds
from volery.runtime.tables import Change, Stale
from volery.runtime.tasks import after, end, every, together

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])
LEADER_LOCK = "volery-leader-"
RESUME_SECONDS = 1.0
HOUSEKEEPING_SECONDS = 600.0
FOR_EVER_SECONDS = 1e7


@dataclass(slots=True)
class Part:
    """Rows of a service's table, gathered in one module per noun."""

    answers_: list[tuple[Call[Any, Any], Any]] = field(default_factory=list)
    leader_answers_: list[tuple[Call[Any, Any], Any]] = field(default_factory=list)
    hears_: list[tuple[Fact[Any], Any]] = field(default_factory=list)
    hears_together_: list[tuple[Fact[Any], Any]] = field(default_factory=list)
    hears_hosts_: list[tuple[Fact[Any], Any]] = field(default_factory=list)
    hears_hosts_together_: list[tuple[Fact[Any], Any]] = field(default_factory=list)
    procedures_: list[Procedure] = field(default_factory=list)
    every_: list[tuple[float, Any]] = field(default_factory=list)

    def answers(self, call: Call[Any, Any]) -> Callable[[F], F]:
        """`async def handler(service, question, caller)`"""
        return self._row(self.answers_, call)

    def leader_answers(self, call: Call[Any, Any]) -> Callable[[F], F]:
        """Likewise, but only the leader answers: for what needs a host, or what was heard, at once."""
        return self._row(self.leader_answers_, call)

    def hears(self, fact: Fact[Any]) -> Callable[[F], F]:
        """Another owner's fact: `async def handler(service, payload)` returns the changes of its effect, which
        are committed with the position of the fact. May run twice; must not act beyond its changes and wakes."""
        return self._row(self.hears_, fact)

    def hears_together(self, *facts: Fact[Any]) -> Callable[[F], F]:
        """The same for all that wait of these facts, in one commit: `async def handler(service, said)` gets them in their
        order, each with its fact. For what only writes down how things are, and of what comes in hundreds."""

        def add(handler: F) -> F:
            self.hears_together_ += [(fact, handler) for fact in facts]
            return handler

        return add

    def hears_hosts(self, fact: Fact[Any]) -> Callable[[F], F]:
        """A fact from the hosts, likewise."""
        return self._row(self.hears_hosts_, fact)

    def hears_hosts_together(self, fact: Fact[Any]) -> Callable[[F], F]:
        """The same for those of several hosts that wait, in one commit: `async def handler(service, facts)` gets one of each
        host. It is called again with each alone when two of them change one object."""
        return self._row(self.hears_hosts_together_, fact)

    def runs(self, kind: str, *, deadline_seconds: float = 600.0) -> Callable[[F], F]:
        """A kind of operation: `async def procedure(service, run)`."""

        def add(procedure: F) -> F:
            self.procedures_.append(Procedure(kind, procedure, deadline_seconds))
            return procedure

        return add

    def every(self, seconds: float) -> Callable[[F], F]:
        """`async def work(service)`, on the leader."""
        return self._row(self.every_, seconds)

    def _row(self, table: list[tuple[Any, Any]], key: Any) -> Callable[[F], F]:
        def add(handler: F) -> F:
            table.append((key, handler))
            return handler

        return add


async def _nothing(_: Operation) -> Sequence[Change]:
    return ()


@dataclass(slots=True)
class Service:
    """One owner. `open` makes what its handlers get from the Core; everything else is a table."""

    name: Owner
    open: Callable[[Core], AbstractAsyncContextManager[Any]]
    config: type[Any]
    parts: Sequence[Part]
    report: Fact[Any] | None = None
    """The full report of hosts, for a service that hears hosts; it then also gives orders."""
    order_finished: Fact[OrderFinished] | None = None
    order_progressed: Fact[OrderProgressed] | None = None
    release: Callable[[Any, Operation], Awaitable[Sequence[Change]]] | None = None
    """(service, operation) → changes that free the object of an ended operation."""
    reconcile: Callable[[Any, str], Awaitable[None]] | None = None
    """(service, key): compare desired and observed, then act. Called when woken, one call per key at a time."""
    reconcile_all: Callable[[Any], Awaitable[Sequence[str]]] | None = None
    """Keys to look at when leadership begins and now and then, having missed every event."""
    reconcile_seconds: float = 30.0
    on_death: Callable[[Any], Awaitable[None]] | None = None
    """(service): write as ended what ran under boots in `host_death`. Their orders end when it has returned."""
    on_gap: Callable[[Any, str], Awaitable[None]] | None = None
    """(service, stream): facts of this stream were lost for good; list again."""
    on_lead: Callable[[Any], Awaitable[None]] | None = None
    on_follow: Callable[[Any], Awaitable[None]] | None = None
    """Called on every replica once it is open, before it answers."""
    concurrency: int = 64
    ready: bool = False

    def rows(self, table: str) -> list[Any]:
        return [row for part in self.parts for row in getattr(part, table)]

    async def main(self, settings: Settings, stop: asyncio.Event) -> None:
        """Until `stop`. A schema that can't be migrated leaves this service unready, not the process."""
        telemetry.service_name.set(self.name)
        while not stop.is_set():
            try:
                await settings.outside.migrate(settings.database, self.name)
                break
            except (SchemaTooNew, asyncpg.PostgresError, OSError) as error:
                log.error("%s is not ready: %s", self.name, error)
                await _sleep(stop, 2.0)
        if stop.is_set():
            return
        async with self._opened(settings) as (core, made):
            await self._serve(settings, core, made, stop)

    @asynccontextmanager
    async def _opened(self, settings: Settings) -> AsyncIterator[tuple[Core, Any]]:
        async with AsyncExitStack() as stack:
            outside = settings.outside
            bus = await stack.enter_async_context(open_bus(settings.bus, self.name, outside.connect))
            pool = await stack.enter_async_context(outside.open_pool(settings.database, self.name))
            core = await self._core(settings, stack, bus, pool)
            made = await stack.enter_async_context(self.open(core))
            core.operations = Operations(
                owner=self.name,
                pool=pool,
                orders=core.orders,
                service=made,
                procedures={p.kind: p for p in self.rows("procedures_")},
                commit=core.commit_all,
                quarantine=core.quarantine,
                release=_nothing if self.release is None else self._release(made),
                hint=lambda: core.operations.spawn(core.hint()),
            )
            if self.on_follow is not None:
                await self.on_follow(made)
            yield core, made

    def _release(self, made: Any) -> Callable[[Operation], Awaitable[Sequence[Change]]]:
        release = self.release
        assert release is not None
        return lambda operation: release(made, operation)

    async def _core(
        self, settings: Settings, stack: AsyncExitStack, bus: Bus, pool: asyncpg.Pool[asyncpg.Record]
    ) -> Core:
        beats = settings.beats or Beats()
        hosts = HostHearing(bus, pool, self.name, {}, self.report or _NO_REPORT)
        client = bus.client
        sign: Callable[[str, bytes], str] = lambda subject, payload: ""  # noqa: E731
        if self.report is not None:
            client = await settings.outside.connect(
                settings.bus, self.name, never_queue=True, on_closed=_set(bus.lost)
            )
            stack.push_async_callback(client.close)
            await beats.listen(bus.client)
            if settings.bus.credentials_dir:
                sign = _signer(settings.bus.credentials_dir, self.name)
        orders = Orders(self.name, pool, client, hosts, beats, sign, Deaths(bus, pool))
        config = read(f"VOLERY_{self.name.upper()}_", self.config, settings.environ)
        return Core(self.name, config, bus, settings.bus, pool, beats, hosts, orders, settings.outside)

    async def _serve(self, settings: Settings, core: Core, made: Any, stop: asyncio.Event) -> None:
        answers = Answers(core.bus, self.concurrency)
        table = self._table(core, made, self._calls(core))
        leading = asyncio.create_task(self._lead_for_ever(settings, core, made))
        try:
            await answers.open(table)
            self.ready = True
            log.info("%s is ready", self.name)
            await _stopped(stop, core.bus.lost)
        finally:
            self.ready = False
            await answers.close()
            await end([leading])

    def _table(
        self, core: Core, made: Any, rows: list[tuple[Call[Any, Any], Any]]
    ) -> dict[str, tuple[Call[Any, Any], Any]]:
        return {call.subject: (call, once(core, call, handler, made)) for call, handler in rows}

    def _calls(self, core: Core) -> list[tuple[Call[Any, Any], Any]]:
        operations = core.operations

        async def get(_: Any, question: GetOperation, caller: Caller) -> Any:
            return await operations.table.raw(core.pool, question.id)

        async def listed(_: Any, question: ListQuery, caller: Caller) -> Any:
            return await page(core.pool, operations.table, question)

        async def cancel(_: Any, question: CancelOperation, caller: Caller) -> Any:
            return await operations.cancel(question.id)

        async def rebuild(_: Any, question: RebuildStream, caller: Caller) -> Any:
            await rebuild_stream(core.bus, self.name)
            return Done()

        async def health(_: Any, question: AskHealth, caller: Caller) -> Any:
            await core.quarantine.load()
            head = await core.pool.fetchrow("select history, position from log_head")
            assert head is not None
            return Health(
                owner=self.name,
                leader=operations.leading,
                quarantine=core.quarantine.reason,
                waits_for_hosts=tuple(sorted(core.quarantine.pending)),
                log_history=head["history"],
                log_position=head["position"],
            )

        async def excuse(_: Any, question: ExcuseHost, caller: Caller) -> Any:
            await core.quarantine.excuse(question.host_id, question.confirm)
            return Done()

        own: list[tuple[Call[Any, Any], Any]] = [
            (GET_HEALTH[self.name], health),
            (EXCUSE_HOST[self.name], excuse),
            (REBUILD_STREAM[self.name], rebuild),
            (GET_OPERATION[self.name], get),
            (LIST_OPERATIONS[self.name], listed),
            (CANCEL_OPERATION[self.name], cancel),
        ]
        return [*self.rows("answers_"), *own]

    async def _lead_for_ever(self, settings: Settings, core: Core, made: Any) -> None:
        """Compete for leadership; when it is lost with its connection, stop all of it and compete again."""
        telemetry.service_name.set(self.name)
        while True:
            try:
                async with settings.outside.open_direct(settings.database, self.name) as connection:
                    await connection.execute(
                        "select pg_advisory_lock(hashtext($1))",
                        LEADER_LOCK + self.name,
                        timeout=FOR_EVER_SECONDS,
                    )
                    token = await connection.fetchval("update leader set token = token + 1 returning token")
                    core.orders.token = token
                    log.info("%s leads under token %d", self.name, token)
                    await self._lead(settings, core, made, connection)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                log.warning("%s lost its leadership: %s", self.name, error or type(error).__name__)
            except Exception:  # the runtime's own loop: whatever ends the background work, it begins again
                log.exception("%s starts its background work again", self.name)
            await asyncio.sleep(0.2 + random.random() * 0.3)  # noqa: S311

    async def _lead(
        self, settings: Settings, core: Core, made: Any, connection: asyncpg.Connection[asyncpg.Record]
    ) -> None:
        await core.quarantine.load()
        relay = Relay(
            core.bus,
            Log(self.name, connection),
            settings.bus.replicas,
            core.relay_wake,
            core.quarantine.begin,
            on_lost=None if self.report is None else core.quarantine.begin_doubt,
        )
        core.relay_wake.set()
        hints = await core.bus.client.subscribe(f"relay.{self.name}.wake", cb=self._hinted(core))
        core.operations.leading = True
        answers = Answers(core.bus, self.concurrency)
        try:
            if self.on_lead is not None:
                await self.on_lead(made)
            await answers.open(self._table(core, made, self.rows("leader_answers_")))
            await together(self._background(settings, core, made, relay))
        finally:
            core.operations.leading = core.operations.aligned = False
            if core.bus.client.is_connected:
                await answers.close(1.0)
                await hints.unsubscribe()
            await core.operations.stop()

    def _background(
        self, settings: Settings, core: Core, made: Any, relay: Relay
    ) -> list[Coroutine[Any, Any, Any]]:
        """What the leader does all the time. Until it is known that the database isn't older than the bus, nothing is
        concluded from its tables: what hosts say then would look like what never may be."""
        works: list[Coroutine[Any, Any, Any]] = [
            self._operations(core),
            self._housekeeping(core, relay),
            *self._hear(core, made),
        ]
        if self.report is not None:
            if self.name is Owner.INVENTORY:
                works.append(keep_host_stream(core.bus, settings.bus.replicas))
            works += [
                self._hear_hosts(core, made),
                self._bury(core, made),
                core.quarantine.ask(core.hosts.ask_report),
            ]
        if self.reconcile is not None:
            works += [self._reconcile(core, made), self._reconcile_all(core, made)]
        works += [every(seconds, work, made) for seconds, work in self.rows("every_")]
        return [relay.run(), *(after(relay.aligned, work) for work in works)]

    async def _bury(self, core: Core, made: Any) -> None:
        """What ran under a boot that has ended by proof ends, and then what was ordered from it."""
        deaths, on_death = core.orders.deaths, self.on_death
        if on_death is not None:
            deaths.first = lambda: on_death(made)
        deaths.then = core.orders.end_with_their_hosts
        await deaths.run()

    def _hinted(self, core: Core) -> Callable[[Any], Awaitable[None]]:
        async def hinted(_: Any) -> None:
            core.relay_wake.set()
            await core.operations.resume()

        return hinted

    async def _operations(self, core: Core) -> None:
        core.operations.aligned = pending = True
        while True:
            if pending and not core.quarantine.holds:
                await core.operations.resume_pending()
                pending = False
            await core.operations.resume()
            await asyncio.sleep(RESUME_SECONDS)

    async def _housekeeping(self, core: Core, relay: Relay) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            await core.pool.execute("delete from request where created_at < now() - interval '24 hours'")
            await core.orders.trim()
            await core.operations.trim()
            await relay.trim()

    def _hear(self, core: Core, made: Any) -> list[Coroutine[Any, Any, Any]]:
        one_by_one = by_owner(self.rows("hears_"), made)
        runs = by_owner(self.rows("hears_together_"), made)
        if self.report is not None:
            runs.setdefault(Owner.HA, []).append((LIVENESS_CHANGED, core.orders.deaths.heard_together))
        works: list[Coroutine[Any, Any, Any]] = []
        for owner in {**one_by_one, **runs}:
            alone, several = (table_of(found.get(owner, [])) for found in (one_by_one, runs))
            gap = self._gap(made, stream_name(owner))
            hearing = Hearing(core.bus, core.pool, owner, alone, several, gap)
            hearing.committed = core.relay_wake.set
            works.append(hearing.run())
        return works

    def _gap(self, made: Any, stream: str) -> Callable[[], Awaitable[None]] | None:
        on_gap = self.on_gap
        return None if on_gap is None else lambda: on_gap(made, stream)

    def _hear_hosts(self, core: Core, made: Any) -> Coroutine[Any, Any, Any]:
        facts = [(fact, bound(made, handler)) for fact, handler in self.rows("hears_hosts_")]
        if self.order_finished is not None:
            facts.append((self.order_finished, core.orders.on_finished))
        if self.order_progressed is not None:
            facts.append((self.order_progressed, core.orders.on_progressed))
        core.hosts.handlers = table_of(facts)
        core.hosts.together = {
            wildcard(fact.subject): (fact, bound(made, handler))
            for fact, handler in self.rows("hears_hosts_together_")
        }
        core.hosts.committed = core.relay_wake.set
        core.hosts.reported = core.quarantine.reported
        core.hosts.contradicted = core.quarantine.contradicted
        return core.hosts.run()

    async def _reconcile(self, core: Core, made: Any) -> None:
        """One call per key at a time; a key woken while it is looked at is looked at again."""
        reconcile = self.reconcile
        assert reconcile is not None
        at_work: set[str] = set()
        again: set[str] = set()
        limit = asyncio.Semaphore(self.concurrency)

        async def look(key: str) -> None:
            try:
                async with limit:
                    await reconcile(made, key)
            except Stale:
                core.wake(key)
            except Exception:  # the runtime's own loop: one object's trouble must not stop the others'
                log.exception("reconciling %s failed", key)
            finally:
                at_work.discard(key)
                if key in again:
                    again.discard(key)
                    core.wake(key)

        looks: set[asyncio.Task[None]] = set()
        try:
            while True:
                for key in await core.reconcile_keys.take():
                    if key in at_work:
                        again.add(key)
                    else:
                        at_work.add(key)
                        task = asyncio.create_task(look(key))
                        looks.add(task)
                        task.add_done_callback(looks.discard)
        finally:
            await end(looks)

    async def _reconcile_all(self, core: Core, made: Any) -> None:
        while True:
            if self.reconcile_all is not None:
                for key in await self.reconcile_all(made):
                    core.wake(key)
            await asyncio.sleep(self.reconcile_seconds)


_NO_REPORT: Fact[Any] = Fact("fact.host.{host_id}.none.reported", OrderFinished)


def _signer(credentials_dir: str, name: str) -> Callable[[str, bytes], str]:
    from pathlib import Path

    _, key = parse_creds(Path(credentials_dir, f"{name}.creds").read_text())
    return Signer(key.seed).sign


def _set(event: asyncio.Event) -> Callable[[], Awaitable[None]]:
    async def closed() -> None:
        event.set()

    return closed


async def _stopped(stop: asyncio.Event, lost: asyncio.Event) -> None:
    """Until `stop`. Raises ConnectionError when the bus closed us for good: a new process begins anew."""
    waits = [asyncio.create_task(stop.wait()), asyncio.create_task(lost.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end(waits)
    if lost.is_set() and not stop.is_set():
        raise ConnectionError("the bus closed our connection for good")


async def _sleep(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
