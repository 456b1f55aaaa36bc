"""An event loop on virtual time: the same seed gives the same order of everything, and waiting costs nothing.

Whatever is scheduled belongs to the `Process` in whose context that happened. A process may be stopped (its work
waits), thawed (it catches up) or killed (it never runs again, also not its clean-up, as with SIGKILL).

The overrides that mypy is told to ignore leave out what nobody on virtual time asks for (readers, signals, subprocesses), or
give a process's context, which asyncio's own types keep private.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from asyncio import events
from collections import deque
from collections.abc import Coroutine
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, TypeVar

T = TypeVar("T")
MOST_STEPS = 200_000
"""At one instant."""
THREAD_SECONDS = 0.001
"""What work in another thread takes."""


class Deadlock(Exception):
    """Nothing is ready and no timer runs, but somebody still waits."""


class Stuck(Exception):
    """So much happens at one instant that time doesn't go on."""


class OutOfTime(Exception):
    """The virtual time that was allowed has passed."""


@dataclass(slots=True, eq=False)
class Process:
    """One program on one machine."""

    name: str
    machine: Any = None
    stopped: bool = False
    dead: bool = False
    held: list[Handle] = field(default_factory=list)
    """What became ready while it was stopped."""
    buried: list[Any] = field(default_factory=list)
    """Tasks that must neither run nor be collected: their clean-up would be done."""
    failure: BaseException | None = None
    """What ended it."""


PROCESS: ContextVar[Process | None] = ContextVar("sim_process", default=None)


class SimFuture(asyncio.Future[Any]):
    """Hashed by a number, so that sets of futures are walked in the same order in every run. Only a SimLoop makes them, and
    only that has `numbers`."""

    number = 0

    def __hash__(self) -> int:
        if not self.number:
            self.number = next(self.get_loop().numbers)  # type: ignore[attr-defined]
        return self.number


class SimTask(asyncio.Task[Any]):
    def __init__(self, coro: Coroutine[Any, Any, Any], *, loop: SimLoop, **options: Any) -> None:
        self.number = next(loop.numbers)
        self.process = PROCESS.get()
        super().__init__(coro, loop=loop, **options)

    def __hash__(self) -> int:
        return self.number


class Handle:
    """As asyncio's, with nothing that a simulation doesn't need: there are some hundred thousand per seed."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "time")

    def __init__(self, callback: Any, args: tuple[Any, ...], context: Any, time: float) -> None:
        self.callback: Any = callback
        self.args: Any = args
        self.context = copy_context() if context is None else context
        self.is_cancelled = False
        self.time = time

    def cancel(self) -> None:
        self.is_cancelled = True
        self.callback = self.args = None

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.time


def _make_task(loop: Any, coro: Any, **options: Any) -> Any:
    return SimTask(coro, loop=loop, **options)


class SimLoop(asyncio.AbstractEventLoop):
    """`run(coroutine)` until it ends. `time()` is virtual seconds since the beginning."""

    def __init__(self, most_seconds: float = 1e9) -> None:
        self.numbers = itertools.count(1)
        self.most_seconds = most_seconds
        self.steps = 0
        self.failed: list[BaseException] = []
        """Exceptions that nobody caught."""
        self.graves: list[Process] = []
        """The dead are kept: were they collected, their clean-up would run."""
        self._time = 0.0
        self._most_steps = MOST_STEPS
        """Until time goes on."""
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._running = False
        self._closed = False

    # Time and order. `Any` where typeshed has overloads: callbacks are only stored, and run in their context.

    def time(self) -> float:
        return self._time

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        handle = Handle(callback, args, context, 0.0)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        when = self._time + delay
        handle = Handle(callback, args, context, when)
        heappush(self._timers, (when, next(self.numbers), handle))
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        handle = Handle(callback, args, context, when)
        heappush(self._timers, (when, next(self.numbers), handle))
        return handle

    def next_timer(self) -> float | None:
        """When something happens next, if nothing is ready now."""
        timers = self._timers
        while timers and timers[0][2].is_cancelled:
            heappop(timers)
        return timers[0][0] if timers else None

    @property
    def idle(self) -> bool:
        return not self._ready

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises Deadlock, OutOfTime, or what `work` raises."""
        events._set_running_loop(self)
        self._running = True
        try:
            task: Any = self.create_task(work)
            ready, process_of = self._ready, PROCESS
            while not task.done():
                if not ready:
                    self._go_on()
                handle = ready.popleft()
                if handle.is_cancelled:
                    continue
                context = handle.context
                process = context.get(process_of)
                if process is not None and (process.stopped or process.dead):
                    (process.buried if process.dead else process.held).append(handle)
                    continue
                self.steps += 1
                if self.steps > self._most_steps:
                    raise Stuck(f"{MOST_STEPS} steps at {self._time:.3f} s, and no end")
                try:
                    context.run(handle.callback, *handle.args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # as asyncio's loop: one callback's end is nobody else's
                    self.failed.append(error)
            return task.result()  # type: ignore[no-any-return]
        finally:
            self._running = False
            events._set_running_loop(None)

    def _go_on(self) -> None:
        """To the next instant at which something happens."""
        when = self.next_timer()
        if when is None:
            raise Deadlock(f"at {self._time:.3f} s nothing is ready and no timer runs")
        if when > self.most_seconds:
            raise OutOfTime(f"{self.most_seconds:g} virtual seconds have passed")
        if when > self._time:
            self._time, self._most_steps = when, self.steps + MOST_STEPS
        timers = self._timers
        while timers and timers[0][0] <= self._time:
            timer = heappop(timers)[2]
            if not timer.is_cancelled:
                self._ready.append(timer)

    # Processes

    def kill(self, process: Process) -> None:
        """Nothing of it runs any more. May be called by itself: the present step is its last."""
        process.dead = True
        process.buried += [
            task
            for task in sorted(asyncio.all_tasks(self), key=hash)
            if isinstance(task, SimTask) and task.process is process
        ]
        process.buried += process.held
        process.held = []

    def stop_process(self, process: Process) -> None:
        process.stopped = True

    def continue_process(self, process: Process) -> None:
        """It catches up with what became due meanwhile."""
        process.stopped = False
        held, process.held = process.held, []
        if process.dead:
            process.buried += held
        else:
            self._ready.extend(held)

    # What asyncio asks of a loop

    def create_future(self) -> Any:
        return SimFuture(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        if context is None:
            task = SimTask(coro, loop=self, name=name)
        else:
            task = SimTask(coro, loop=self, name=name, context=context)
        return task

    def get_task_factory(self) -> Any:
        return _make_task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        future = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = func(*args)
            except Exception as error:  # the waiter gets it, as from a thread
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_later(THREAD_SECONDS, work)
        return future

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """There is one way to run."""

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True

    def stop(self) -> None:
        raise RuntimeError("a simulation ends with its main coroutine")

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.failed.append(error if error is not None else RuntimeError(str(context.get("message"))))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.default_exception_handler(context)

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:  # type: ignore[override]
        raise RuntimeError(f"{signal.Signals(sig).name} has no meaning in a simulation")

    async def shutdown_asyncgens(self) -> None:
        """Nothing is shared with another loop."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There are no threads."""


def new_loop(most_seconds: float = 1e9) -> SimLoop:
    """A loop that doesn't let more virtual time pass. What it has not, such as sockets, a simulation doesn't use."""
    return SimLoop(most_seconds)  # type: ignore[abstract]
