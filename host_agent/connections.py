"""The agent's four libvirt connections: who may call on which, for how long, and what happens when one hangs.

*events* listens and never makes a call; *bulk* lists and takes statistics; *work* carries out orders, one call per
domain at a time; *rescue* destroys, resets, aborts and lists when the others hang. A domain whose call does not
come back in time is unresponsive and gets rescue calls only. When libvirtd dies, everything connects again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from host_agent.config import AgentConfig
from host_agent.events import EventName, HypervisorEvent
from host_agent.lane import Lane, Opener
from host_agent.refusals import Disconnected, refused, timed_out
from host_agent.threads import CallAbandoned, Stuck, Threads
from volery.contracts.errors import Kind, Refused

T = TypeVar("T")
log = logging.getLogger("volery.agent.hypervisor")

OPEN_SECONDS = 10.0
"""To open a connection: over a cut link it would block much longer."""
RETRY_SECONDS = (0.1, 2.0)
"""First and longest pause between attempts to reach libvirtd again."""
BULK_SECONDS = 10.0
START_SECONDS = 120.0
"""libvirtd may probe QEMU's capabilities first, which takes a minute on a busy machine."""
RESCUE_SECONDS = 60.0
"""Destroying a stopped QEMU took 11 s."""


class Driver(Opener, Protocol):
    """libvirt, as far as connections need it."""

    @property
    def error(self) -> type[Exception]:
        """libvirtError: has get_error_code() and get_error_message()."""

    def listen(self, heard: Callable[[HypervisorEvent], None], closed: Callable[[], None]) -> Any:
        """Open a connection with every event registered; both callbacks come in libvirt's event thread."""


def _ignore(_vm_id: str) -> None:
    """For calls whose delay says nothing about a domain."""


class Connections:
    """`start` once, `close` at the end. Every method may raise Refused; `Disconnected` when libvirtd is away."""

    def __init__(self, config: AgentConfig, driver: Driver) -> None:
        self.config = config
        self.uri = config.libvirt_uri
        self.stuck = Stuck()
        """How many threads sit in calls that were given up: a health figure."""
        self._driver = driver
        self._bulk = Lane("bulk", 2, driver, self.stuck)
        self._work = Lane("work", config.work_threads, driver, self.stuck)
        self._rescue = Lane("rescue", 3, driver, self.stuck)
        self._listening = Threads("events", 1, self.stuck)
        self._long_turns = asyncio.Semaphore(max(1, config.work_threads // 2))
        self._guest_turns = asyncio.Semaphore(1)
        self._one_call: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._late: dict[str, int] = {}
        self._listeners: list[Callable[[HypervisorEvent], None]] = []
        self._connected = asyncio.Event()
        self._problem = "it was not tried yet"
        self._token: object = None
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connects, and keeps connecting whenever libvirtd went away. Returns without waiting for it."""
        self._loop = asyncio.get_running_loop()
        self._supervisor = asyncio.create_task(self._supervise(), name="hypervisor")

    async def close(self) -> None:
        self._token = None
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._listening.close()
        for lane in (self._bulk, self._work, self._rescue):
            lane.close()

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    @property
    def problem(self) -> str:
        """Why it isn't connected; "" when it is."""
        return "" if self.connected else self._problem

    @property
    def unresponsive(self) -> frozenset[str]:
        """VMs with a call that has not come back in time."""
        return frozenset(self._late)

    async def wait_connected(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._connected.wait(), seconds)
        except TimeoutError:
            raise Disconnected(f"connect to {self.uri}", self._problem) from None

    def on_event(self, listener: Callable[[HypervisorEvent], None]) -> Callable[[], None]:
        """Every event, in order, in the event loop's thread. Returns how to stop listening."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    @contextlib.contextmanager
    def events(self) -> Iterator[asyncio.Queue[HypervisorEvent]]:
        """A queue of every event from now on: `with hypervisor.events() as queue: await queue.get()`."""
        queue: asyncio.Queue[HypervisorEvent] = asyncio.Queue()
        stop = self.on_event(queue.put_nowait)
        try:
            yield queue
        finally:
            stop()

    def emit(self, event: HypervisorEvent) -> None:
        """Tell every listener."""
        for listener in tuple(self._listeners):
            listener(event)

    async def _supervise(self) -> None:
        pause = RETRY_SECONDS[0]
        while True:
            self._token = token = object()
            lost = asyncio.Event()
            try:
                connection = await self._listening.call(
                    functools.partial(self._listen, token, lost), OPEN_SECONDS
                )
            except (CallAbandoned, self._driver.error) as error:
                self._problem = str(error) or f"no answer within {OPEN_SECONDS:g} s"
                log.warning("libvirt at %s can't be reached: %s", self.uri, self._problem)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS[1])
                continue
            pause = RETRY_SECONDS[0]
            self._connected.set()
            self.emit(HypervisorEvent(EventName.CONNECTED))
            try:
                await lost.wait()
            finally:
                self._connected.clear()
                self._driver.close(connection)
            self._problem = "the connection was lost"
            log.warning("libvirt at %s went away", self.uri)
            self.emit(HypervisorEvent(EventName.DISCONNECTED))

    def _listen(self, token: object, lost: asyncio.Event) -> Any:
        """In a thread. An attempt that was given up may still succeed: its events are not heard."""

        def forward(event: HypervisorEvent) -> None:
            if self._token is token:
                self.emit(event)

        return self._driver.listen(
            lambda event: self._from_thread(functools.partial(forward, event)),
            lambda: self._from_thread(lost.set),
        )

    def _from_thread(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended: so has our interest
            self._loop.call_soon_threadsafe(act)

    async def _call(self, lane: Lane, doing: str, work: Callable[[Any], T], seconds: float) -> T:
        """A call that is about no single domain."""
        try:
            return await lane.call(self._checked(doing, work), seconds)
        except CallAbandoned:
            raise timed_out(doing, seconds) from None
        except self._driver.error as error:
            raise Disconnected(doing, str(error)) from error

    async def _listing(self, doing: str, work: Callable[[Any], T]) -> T:
        """On the bulk connection; when that hangs, on the rescue connection."""
        try:
            return await self._call(self._bulk, doing, work, BULK_SECONDS)
        except Refused as problem:
            if problem.kind is not Kind.TIMEOUT:
                raise
        return await self._call(self._rescue, doing, work, BULK_SECONDS)

    def _checked(self, doing: str, work: Callable[[Any], T]) -> Callable[[Any], T]:
        """In the thread: tells a refusal from a lost connection. What escapes as libvirtError is an open that failed."""

        def run(connection: Any) -> T:
            try:
                return work(connection)
            except self._driver.error as error:
                if not self._driver.is_alive(connection):
                    raise Disconnected(doing, str(error)) from error
                raise self._refused(doing, error) from error

        return run

    def _refused(self, doing: str, error: Any) -> Refused:
        return refused(doing, error.get_error_code(), error.get_error_message())

    async def _on(
        self, vm_id: str, doing: str, work: Callable[[Any], T], seconds: float = 0.0, *, long: bool = False
    ) -> T:
        """An order's call on one domain: one at a time, none while it is unresponsive.

        `long` calls (migrate, save) may take their time: they leave half of the threads to the others.
        """
        doing = f"{doing} VM {vm_id}"
        if vm_id in self._late:
            raise Refused(
                Kind.UNAVAILABLE,
                f"could not {doing}: an earlier call has been stuck in its QEMU for more than"
                f" {self.config.domain_call_seconds:g} s; wait, or power the VM off",
                vm_id=vm_id,
            )
        lock = self._one_call.setdefault(vm_id, asyncio.Lock())
        async with contextlib.AsyncExitStack() as turns:
            await turns.enter_async_context(self._long_turns if long else lock)
            return await self._domain_call(self._work, vm_id, doing, work, seconds, marks=not long)

    async def _rescue_call(
        self, vm_id: str, doing: str, work: Callable[[Any], T], seconds: float = RESCUE_SECONDS
    ) -> T:
        return await self._domain_call(self._rescue, vm_id, f"{doing} VM {vm_id}", work, seconds, marks=False)

    async def _domain_call(
        self, lane: Lane, vm_id: str, doing: str, work: Callable[[Any], T], seconds: float, *, marks: bool
    ) -> T:
        limit = seconds or self.config.domain_call_seconds
        checked = self._checked(doing, lambda connection: work(connection.lookupByUUIDString(vm_id)))
        late = functools.partial(self._became_late if marks else _ignore, vm_id)
        back = functools.partial(self._came_back if marks else _ignore, vm_id)
        try:
            return await lane.call(checked, limit, late, back)
        except CallAbandoned:
            raise timed_out(doing, limit) from None
        except self._driver.error as error:
            raise Disconnected(doing, str(error)) from error

    def _became_late(self, vm_id: str) -> None:
        self._late[vm_id] = self._late.get(vm_id, 0) + 1
        if self._late[vm_id] == 1:
            self.emit(HypervisorEvent(EventName.UNRESPONSIVE, vm_id))

    def _came_back(self, vm_id: str) -> None:
        self._late[vm_id] -= 1
        if not self._late[vm_id]:
            del self._late[vm_id]
            self.emit(HypervisorEvent(EventName.RESPONSIVE, vm_id))
