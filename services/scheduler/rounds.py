"""Rounds: questions that come while others are at work wait and are worked on together.

What they do is not known here. Two questions with a key in common (an affinity group) are never in two rounds at once;
two about one VM not even in the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

MOST = 64
"""Questions of one round. A round's decisions take some 10 ms, for which nobody else gets a turn."""
AT_ONCE = 2
"""Rounds: while one is committed, the next is decided."""


@dataclass(slots=True, eq=False)
class Waiting:
    """One question."""

    vm_id: str
    keys: frozenset[str] = frozenset()
    mates: frozenset[str] = frozenset()
    """Other VMs that it is about, too."""
    alone: bool = False
    """It made others lose, or they it: its next round is its own."""
    tries: int = 0
    answer: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def vm_ids(self) -> frozenset[str]:
        return self.mates | {self.vm_id}

    def resolve(self, answer: Any) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


W = TypeVar("W", bound=Waiting)


@dataclass(slots=True, eq=False)
class Rounds(Generic[W]):
    play: Callable[[Sequence[W]], Awaitable[Sequence[W]]]
    """Answers each, or returns those that want another round."""
    waiting: deque[W] = field(default_factory=deque)
    busy: set[str] = field(default_factory=set)
    """VMs and keys of the questions at work."""
    at_work: set[asyncio.Task[None]] = field(default_factory=set)
    resting: set[asyncio.Task[None]] = field(default_factory=set)

    async def ask(self, one: W) -> Any:
        """The answer; raises what it was refused with."""
        self.join(one)
        return await one.answer

    def join(self, one: W) -> None:
        self.waiting.append(one)
        self._begin()

    def join_after(self, one: W, rest: Coroutine[Any, Any, None]) -> None:
        """It wants its next round when that is over."""
        task = asyncio.create_task(self._rest(one, rest))
        self.resting.add(task)
        task.add_done_callback(self.resting.discard)

    async def _rest(self, one: W, rest: Coroutine[Any, Any, None]) -> None:
        try:
            await rest
        except Exception as error:  # who waits is told
            one.fail(error)
        else:
            self.join(one)

    def _begin(self) -> None:
        if self.waiting and len(self.at_work) < AT_ONCE:
            task = asyncio.create_task(self._work())
            self.at_work.add(task)
            task.add_done_callback(self.at_work.discard)

    async def _work(self) -> None:
        """Rounds until nobody waits who could have one."""
        while members := self._next():
            keys = set[str]().union(*(m.vm_ids | m.keys for m in members))
            self.busy |= keys
            try:
                again = await self.play(members)
            except asyncio.CancelledError:
                for member in members:
                    member.answer.cancel()
                raise
            except Exception as error:  # each of them is told
                again = ()
                for member in members:
                    member.fail(error)
            finally:
                self.busy -= keys
            self.waiting.extendleft(reversed(again))
            self._begin()

    def _next(self) -> list[W]:
        """Takes them out of those that wait, the first first."""
        members: list[W] = []
        vm_ids: set[str] = set()
        left: deque[W] = deque()
        while self.waiting and len(members) < MOST:
            one = self.waiting.popleft()
            free = vm_ids.isdisjoint(one.vm_ids) and self.busy.isdisjoint(one.vm_ids | one.keys)
            if not free or (one.alone and members):
                left.append(one)
                continue
            members.append(one)
            vm_ids |= one.vm_ids
            if one.alone:
                break
        left.extend(self.waiting)
        self.waiting = left
        return members

    async def close(self) -> None:
        tasks = [*self.at_work, *self.resting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
