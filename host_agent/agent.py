"""The agent's life: connects the host to the bus and keeps its parts going. Its end touches no VM.

Everything but the bus is up before the bus is: with the control plane gone the host goes on, and what happens is
spooled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from host_agent import enrolment
from host_agent.action import Action, Host
from host_agent.clock import BootClock
from host_agent.config import AgentConfig
from host_agent.enrolment import Identity
from host_agent.fencing import Executor
from host_agent.ground import Ground
from host_agent.journal import Journal
from host_agent.orders import Orders
from host_agent.peers import Trier
from host_agent.reports import REPORTED_TO, Reporter, Senses
from host_agent.shutdown import end_guests
from host_agent.spool import Spool
from host_agent.tickets import Tickets
from volery.contracts.agent import (
    CANCEL_SUBJECT,
    COMMITTED_SUBJECT,
    DESCRIBE_HOST,
    ORDER_SUBJECT,
    REPORT_SUBJECT,
    AskHost,
    CommittedWord,
    HostCapabilities,
)
from volery.contracts.base import Message, Owner, encode, fill
from volery.contracts.errors import STATUS, Refused
from volery.contracts.fencing import POWER_SUBJECT
from volery.contracts.metrics import BEAT_SUBJECT, METRICS_SUBJECT, Beat, HostSample
from volery.contracts.peers import TRY_SUBJECT
from volery.runtime import connection
from volery.runtime.bus import ERROR_CODE_HEADER, ERROR_HEADER
from volery.runtime.clock import monotonic, utc_now
from volery.runtime.signing import Verifier

log = logging.getLogger(__name__)

HYPERVISOR_SECONDS: Final = 30.0
"""How long a start waits for libvirtd before it resumes orders, which then fail by themselves."""
PREPARE_RETRY_SECONDS: Final = 2.0
REACH_SECONDS: Final = 2
FLUSH_SECONDS: Final = 2
FAREWELL_SECONDS: Final = 5.0
"""How long a host that is being shut down waits until it was heard how its VMs ended."""
WATCH_SECONDS: Final = 1.0
DEAF_SECONDS: Final = 900.0
"""Without the bus and without orders: then a new process is tried, in case it is this one that can't connect."""
GAP_SECONDS: Final = 10.0
RENEW_CHECK_SECONDS: Final = 3600.0
RENEW_AGAIN_SECONDS: Final = 60.0
ENROL_AGAIN: Final = (
    "this host was removed or given a new token. To enrol it again end the agent, remove {state_dir}/identity, make a"
    " token with `volery host token` (or `volery host create`), and run `python -m host_agent enrol` with it in"
    " VOLERY_AGENT_ENROLMENT_TOKEN"
)
EXIT_STUCK: Final = 75
"""sysexits' EX_TEMPFAIL: the supervisor starts the agent again."""

_word = msgspec.json.Decoder(CommittedWord)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an agent is put together from; tests put in fewer."""

    actions: tuple[Action[Any, Any], ...]
    senses: Senses
    sample: Callable[[Host], Awaitable[HostSample]]
    background: tuple[Callable[[Host], Coroutine[Any, Any, None]], ...] = ()
    """Run for as long as the agent lives: the data server, the guests' agents."""
    restore: Callable[[Host], Awaitable[None]] | None = None
    """At start, with or without libvirt: make again what a reboot took, such as bridges."""
    prepare: Callable[[Host], Awaitable[None]] | None = None
    """Once libvirt answers, before any order about a domain: what kind of domains run here."""
    ground: Ground = field(default_factory=Ground)


@dataclass(frozen=True, slots=True)
class Core:
    """What the agent's tasks share."""

    host: Host
    clock: BootClock
    journal: Journal
    spool: Spool
    orders: Orders
    executor: Executor
    trier: Trier
    reporter: Reporter
    prepared: asyncio.Event
    """Set when it is known which domains run here."""


class _Ended(Exception):
    """The agent must end with this exit code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def connect_options(identity: Identity, *, at_once: bool = False) -> dict[str, Any]:
    """How this host connects to the bus. `at_once`: publishing while disconnected fails at once."""
    servers = identity.enrolled.bus_servers
    tls = any(server.startswith("tls://") for server in servers)
    if identity.creds_path is not None:
        return connection.connect_options(
            identity.creds_path,
            identity.host_id,
            servers,
            ca=identity.ca_path if tls else None,
            at_once=at_once,
        )
    options: dict[str, Any] = {
        "servers": list(servers),
        "name": identity.host_id,
        "inbox_prefix": f"_INBOX.{identity.host_id}",
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.25,
        "connect_timeout": 2,
        "ping_interval": 2,
    }
    return options | ({"pending_size": 0} if at_once else {})


@dataclass(slots=True)
class Agent:
    """One host. `run` returns the process's exit code."""

    config: AgentConfig
    identity: Identity
    parts: Parts
    client: Client = field(init=False)
    beats: Client = field(init=False)
    _closed: asyncio.Event = field(default_factory=asyncio.Event)
    _handling: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        advice = ENROL_AGAIN.format(state_dir=self.config.state_dir)
        connection = self.parts.ground.client
        self.client, self.beats = connection(advice), connection(advice)

    async def run(self, stop: asyncio.Event) -> int:
        """Until `stop` is set, or something says that only a new process helps.

        Raises AlreadyRunning when another agent uses this state directory.
        """
        async with self.parts.ground.alone(Path(self.config.state_dir)):
            core = await self._assemble()
            log.info("host %s starts, generation %s", core.host.host_id, core.journal.generation)
            if libvirt_guests_enabled():
                log.warning(
                    "libvirt-guests is enabled on this host: it may suspend or start VMs behind Volery's back; run"
                    " `systemctl disable --now libvirt-guests`"
                )
            await core.host.hypervisor.start()
            ended = await self._live(core, stop)
            log.log(logging.INFO if ended.code == 0 else logging.ERROR, "the agent ends: %s", ended)
            await self._leave(core)
            return ended.code

    async def _assemble(self) -> Core:
        if not self.config.installation:
            installation = self.identity.enrolled.installation
            self.config = msgspec.structs.replace(self.config, installation=installation)
        ground = self.parts.ground
        boot_id = ground.boot_id(Path(self.config.boot_id_path))
        journal = await Journal.open(
            Path(self.config.state_dir) / "journal.sqlite",
            boot_id,
            self.config.spool_max_bytes,
            self.config.max_waiting_orders,
            ground.database,
            self.identity.host_id,
        )
        hypervisor = ground.hypervisor(self.config)
        epochs, told = await journal.open_objects(Owner.INVENTORY), await journal.last_told()
        hypervisor.expect(epochs, told, self.config.installation)
        host = Host(self.config, hypervisor, Tickets(), self.identity.host_id, self._reachable)
        clock = BootClock(boot_id, journal.boot_ordinal, ground.now_ms)
        spool = Spool(journal, self.client)
        await spool.open()
        prepared = asyncio.Event()
        verifier = Verifier(self.identity.enrolled.owner_keys)
        orders = Orders(host, journal, self.parts.actions, verifier, clock, gates={"domain": prepared})
        executor = Executor(host.host_id, journal, verifier, clock, ground.fence)
        trier = Trier(host.host_id, verifier, ground.knock)
        reporter = Reporter(host, journal, spool, clock, self.parts.senses, self._going_down)
        hypervisor.on_event(reporter.hear)
        return Core(host, clock, journal, spool, orders, executor, trier, reporter, prepared)

    async def _live(self, core: Core, stop: asyncio.Event) -> _Ended:
        ended: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for work in (
                    self._until(core, stop),
                    self._watch(core),
                    core.reporter.run(),
                    self._prepare(core),
                    self._serve(core),
                    self._beat(core),
                    self._sample(core.host),
                    self._mind_gaps(core),
                    self._renew(core),
                    *(background(core.host) for background in self.parts.background),
                ):
                    group.create_task(work)
        except* _Ended as reasons:
            ended = reasons.exceptions[0]
        assert isinstance(ended, _Ended)
        return ended

    async def _until(self, core: Core, stop: asyncio.Event) -> None:
        await stop.wait()
        if not await self._going_down():
            raise _Ended(0, "it was asked to")
        log.warning("this host is being shut down: its VMs are, too")
        core.orders.leaving = True
        await self._say_that_it_lives(core)
        ended = await end_guests(core.host.hypervisor, self.config.shutdown_guests_seconds)
        await core.reporter.settle(ended)
        if not await core.spool.wait_committed(Owner.INVENTORY, FAREWELL_SECONDS):
            log.warning("nobody took note yet of how the VMs ended: it is told after the next boot")
        raise _Ended(0, f"its host is being shut down; {len(ended)} VMs were ended before")

    async def _going_down(self) -> bool:
        return await self.parts.ground.going_down(self.config)

    async def _watch(self, core: Core) -> None:
        """What only a new process can mend."""
        heard_at = monotonic()
        orders, stuck = core.orders, core.host.hypervisor.stuck
        while True:
            await asyncio.wait([orders.broken], timeout=WATCH_SECONDS)
            if orders.broken.done():
                log.critical("an order's lane broke", exc_info=orders.broken.exception())
                raise _Ended(EXIT_STUCK, "an order's lane broke; the next run resumes it")
            if self._closed.is_set():
                raise _Ended(
                    EXIT_STUCK, "the server closed a connection for good; a new process opens another"
                )
            if (self.client.is_connected and self.beats.is_connected) or orders.running:
                heard_at = monotonic()
            elif monotonic() - heard_at > DEAF_SECONDS:
                raise _Ended(
                    EXIT_STUCK, f"no bus for {DEAF_SECONDS:.0f} s, and nothing to lose by starting anew"
                )
            if stuck.count > self.config.max_abandoned_calls:
                raise _Ended(
                    EXIT_STUCK,
                    f"{stuck.count} threads are stuck in libvirt calls; a new process gets rid of them",
                )

    async def _mind_gaps(self, core: Core) -> None:
        """Whoever lost facts because the spool was full gets a full report, as soon as the bus can carry it."""
        async for _ in _every(GAP_SECONDS):
            if self.client.is_connected:
                for owner, at in (await core.journal.positions()).items():
                    if at.gap:
                        core.reporter.ask(owner)

    async def _renew(self, core: Core) -> None:
        """Keeps the data server's certificate good, and what else the control plane may have changed."""
        while True:
            pause = RENEW_CHECK_SECONDS
            if enrolment.is_due(self.identity, utc_now().timestamp()):
                try:
                    self.identity = await enrolment.renew(Path(self.config.state_dir), self.identity)
                except enrolment.EnrolmentError as problem:
                    log.warning("the certificate and the owners' keys can't be renewed: %s", problem)
                    pause = RENEW_AGAIN_SECONDS
                else:
                    verifier = Verifier(self.identity.enrolled.owner_keys)
                    core.orders.trust(verifier)
                    core.executor.trust(verifier)
                    core.trier.trust(verifier)
                    log.info("the host's certificate, and whom it obeys, were renewed")
            await asyncio.sleep(pause)

    async def _leave(self, core: Core) -> None:
        if self.client.is_connected:
            for subscription in list(self.client._subs.values()):
                if subscription.subject.startswith("host."):
                    await subscription.unsubscribe()
        await core.orders.close()
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self.client.flush(FLUSH_SECONDS)
        for client in (self.client, self.beats):
            await client.close()
        await core.journal.close()

    async def _reachable(self) -> bool:
        """One round trip to the bus."""
        try:
            await self.client.flush(REACH_SECONDS)
        except (nats.errors.Error, TimeoutError):
            return False
        return True

    async def _prepare(self, core: Core) -> None:
        """Until it is known which domains run here, orders about domains wait."""
        while not core.prepared.is_set():
            try:
                await core.host.hypervisor.wait_connected(HYPERVISOR_SECONDS)
                if self.parts.prepare is not None:
                    await self.parts.prepare(core.host)
                core.prepared.set()
            except Refused as problem:
                log.error("no domain can run here: %s", problem.message)
                await asyncio.sleep(PREPARE_RETRY_SECONDS)

    async def _was_closed(self) -> None:
        self._closed.set()

    # The bus

    async def _serve(self, core: Core) -> None:
        with contextlib.suppress(Refused):
            await core.host.hypervisor.wait_connected(HYPERVISOR_SECONDS)
        if self.parts.restore is not None:
            try:
                await self.parts.restore(core.host)
            except Refused as problem:
                log.error("this host could not be made as it was: %s", problem.message)
        await core.orders.resume()

        async def reconnected() -> None:
            log.info("the bus is back")
            core.spool.reconnected()

        await self.client.connect(
            **connect_options(self.identity),
            reconnected_cb=reconnected,
            closed_cb=self._was_closed,
            error_cb=_bus_problem,
        )
        await self._listen(core)
        log.info("host %s hears its orders", core.host.host_id)
        await core.spool.run()

    async def _listen(self, core: Core) -> None:
        host = core.host

        async def hear_word(message: Msg) -> None:
            if (word := _read_word(message, host.host_id)) is not None and not await core.spool.committed(
                word
            ):
                generation = await core.journal.renew_generation()
                log.warning(
                    "%s has committed more than this journal ever said, so it is an old copy: it goes on as %s",
                    word.owner,
                    generation,
                )
                for owner in REPORTED_TO:
                    core.reporter.ask(owner, rebase=True)

        async def hear_report(message: Msg) -> None:
            if (word := _read_word(message, host.host_id)) is not None:
                core.reporter.ask(word.owner, rebase=True, ask=word.ask)

        async def describe(*_: object) -> HostCapabilities:
            return await self.parts.senses.describe(host)

        me = AskHost(host_id=host.host_id)
        for subject, hear in (
            (ORDER_SUBJECT, self._answering(core.orders.hear)),
            (CANCEL_SUBJECT, self._answering(core.orders.hear_cancel)),
            (COMMITTED_SUBJECT, hear_word),
            (REPORT_SUBJECT, hear_report),
            (DESCRIBE_HOST.subject, self._answering(describe)),
            (POWER_SUBJECT, self._answering(core.executor.hear)),
            (TRY_SUBJECT, self._answering(core.trier.hear)),
        ):
            await self.client.subscribe(fill(subject, me), cb=hear)

    def _answering(
        self, hear: Callable[[str, bytes, dict[str, str] | None], Awaitable[Message]]
    ) -> Callable[[Msg], Awaitable[None]]:
        """Orders wait for the disk together, not one after the other."""

        async def handle(message: Msg) -> None:
            headers = None
            try:
                answer = encode(await hear(message.subject, message.data, message.headers))
            except Refused as problem:
                headers = {ERROR_HEADER: problem.kind.value, ERROR_CODE_HEADER: str(STATUS[problem.kind])}
                answer = encode(problem.problem())
            if message.reply:
                with contextlib.suppress(nats.errors.Error):
                    await self.client.publish(message.reply, answer, headers=headers)

        return self._in_a_task(handle)

    def _in_a_task(
        self, handle: Callable[[Msg], Coroutine[Any, Any, None]]
    ) -> Callable[[Msg], Awaitable[None]]:
        async def start(message: Msg) -> None:
            task = asyncio.create_task(handle(message))
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)

        return start

    async def _beat(self, core: Core) -> None:
        """On a connection of its own that never queues: a beat that comes late would be a lie."""
        await self.beats.connect(
            **connect_options(self.identity, at_once=True),
            closed_cb=self._was_closed,
            error_cb=_bus_problem,
        )
        async for _ in _every(self.config.beat_seconds):
            await self._say_that_it_lives(core)

    async def _say_that_it_lives(self, core: Core) -> None:
        beat = Beat(
            host_id=self.identity.host_id,
            generation=core.journal.generation,
            boot_id=core.clock.boot_id,
            beat_seq=core.clock.beat(),
            clock_ms=int(utc_now().timestamp() * 1000),
            hypervisor_ok=core.host.hypervisor.connected,
            stuck_threads=core.host.hypervisor.stuck.count,
            leaving=core.orders.leaving,
        )
        with contextlib.suppress(nats.errors.Error):
            await self.beats.publish(fill(BEAT_SUBJECT, beat), encode(beat))

    async def _sample(self, host: Host) -> None:
        async for _ in _every(self.config.sample_seconds):
            try:
                sample = await self.parts.sample(host)
                await self.beats.publish(fill(METRICS_SUBJECT, sample), encode(sample))
            except (Refused, nats.errors.Error) as problem:
                log.debug("a sample is missing: %s", problem or type(problem).__name__)


def libvirt_guests_enabled(root: Path = Path("/")) -> bool:
    """Whether systemd would start libvirt-guests on this machine."""
    return any(root.glob("etc/systemd/system/*.wants/libvirt-guests.service"))


async def _every(seconds: float) -> AsyncIterator[None]:
    """At a steady rate, without making up for what was missed."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        yield
        due = max(due + seconds, loop.time())
        await asyncio.sleep(due - loop.time())


async def _bus_problem(error: Exception) -> None:
    log.info("the bus: %s", error or type(error).__name__)


def _read_word(message: Msg, host_id: str) -> CommittedWord | None:
    try:
        word = _word.decode(message.data)
    except msgspec.DecodeError as error:
        log.warning("ignored on %s: %s", message.subject, error)
        return None
    return word if word.host_id == host_id else None
