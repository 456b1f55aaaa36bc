"""Bounded threads for calls that can block: a call that outlives its deadline is left behind, and counted.

Threads can't be cancelled. A call that is given up keeps its thread until it returns; another thread takes its
place, so that the others' calls go on. How many are left behind is a health figure (`Stuck.count`).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class CallAbandoned(Exception):
    """The call did not come back in time. It may still take effect: its outcome is unknown."""


@dataclass(slots=True)
class Stuck:
    """How many threads sit in a call that was given up."""

    count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, number: int) -> None:
        with self._lock:
            self.count += number


@dataclass(slots=True, eq=False)
class _Job(Generic[T]):
    work: Callable[[], T]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[T]
    returned: Callable[[], None]
    """Called in the event loop when a call that was given up returns after all."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    finished: bool = False
    abandoned: bool = False

    def run(self) -> bool:
        """Do the work and hand over its result; False if nobody waits for it any more."""
        outcome: Callable[[], None]
        try:
            result = self.work()
        except BaseException as error:  # carried over to the waiting coroutine, whatever it is
            failure = error
            outcome = lambda: self._settle(lambda: self.future.set_exception(failure))  # noqa: E731
        else:
            outcome = lambda: self._settle(lambda: self.future.set_result(result))  # noqa: E731
        with self.lock:
            self.finished = True
            if self.abandoned:
                outcome = self.returned
        _call_soon(self.loop, outcome)
        return not self.abandoned

    def abandon(self) -> bool:
        """Give the call up; False if it came back at this very moment."""
        with self.lock:
            self.abandoned = not self.finished
            return self.abandoned

    def _settle(self, act: Callable[[], None]) -> None:
        if not self.future.done():
            act()


def _call_soon(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(act)
    except RuntimeError:
        if not loop.is_closed():
            raise


def nothing() -> None:
    """For who doesn't care."""


class Threads:
    """At most `size` calls at once; the rest wait their turn, which is not counted against their deadline."""

    def __init__(self, name: str, size: int, stuck: Stuck) -> None:
        self.name = name
        self._turns = asyncio.Semaphore(size)
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._stuck = stuck
        self._idle = 0
        self._closed = False

    async def call(
        self,
        work: Callable[[], T],
        seconds: float,
        abandoned: Callable[[], None] = nothing,
        returned: Callable[[], None] = nothing,
    ) -> T:
        """Run `work` in a thread. Raises CallAbandoned when it takes longer, else what `work` raises.

        A call that is given up calls `abandoned` at once and `returned` when its thread comes back after all, both
        in the event loop. A coroutine that is cancelled meanwhile still waits for the call, within the same time,
        so that nobody acts beside a call that is still running.
        """
        async with self._turns:
            loop = asyncio.get_running_loop()
            end = loop.time() + seconds
            job: _Job[T] = _Job(work, loop, loop.create_future(), returned)
            self._start(job)
            try:
                await asyncio.wait({job.future}, timeout=seconds)
            except asyncio.CancelledError:
                try:
                    await asyncio.wait({job.future}, timeout=max(0.0, end - loop.time()))
                finally:
                    self._give_up(job, abandoned)
                raise
            if self._give_up(job, abandoned):
                raise CallAbandoned
            return await job.future

    def close(self) -> None:
        """Idle threads end; stuck ones are daemons and hold nothing up."""
        self._closed = True
        for _ in range(self._idle):
            self._jobs.put(None)
        self._idle = 0

    def _start(self, job: _Job[Any]) -> None:
        if self._idle:
            self._idle -= 1
        else:
            threading.Thread(
                target=self._worker, args=(job,), name=f"libvirt-{self.name}", daemon=True
            ).start()
            return
        self._jobs.put(job)

    def _give_up(self, job: _Job[Any], abandoned: Callable[[], None]) -> bool:
        given_up = job.abandon()
        if given_up:
            self._stuck.add(1)
            abandoned()
        return given_up

    def _worker(self, job: _Job[Any] | None) -> None:
        while job is not None:
            loop = job.loop
            if not job.run():
                self._stuck.add(-1)
                return
            _call_soon(loop, self._became_idle)
            job = self._jobs.get()

    def _became_idle(self) -> None:
        if self._closed:
            self._jobs.put(None)
        else:
            self._idle += 1
