"""Questions to the database that come while one is under way are asked together: many callers cost one look."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class Together(Generic[K, V]):
    """`get` answers as of its own call or later: who comes while a look is under way waits for the next."""

    look: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]]
    waiting: dict[K, asyncio.Future[V | None]] = field(default_factory=dict)
    looking: asyncio.Task[None] | None = None

    async def get(self, key: K) -> V | None:
        """None: there is nothing. Raises what the look raises."""
        answer = self.waiting.get(key)
        if answer is None:
            answer = self.waiting[key] = asyncio.get_running_loop().create_future()
        if self.looking is None:
            self.looking = asyncio.create_task(self._look())
        # One caller that is cancelled takes the answer from nobody else.
        return await asyncio.shield(answer)

    async def _look(self) -> None:
        try:
            while self.waiting:
                asked, self.waiting = self.waiting, {}
                await self._answer(asked)
        finally:
            self.looking = None

    async def _answer(self, asked: Mapping[K, asyncio.Future[V | None]]) -> None:
        try:
            found = await self.look(list(asked))
        except asyncio.CancelledError:
            for answer in asked.values():
                answer.cancel()
            raise
        except Exception as error:  # each of them is told
            for answer in asked.values():
                answer.set_exception(error)
                answer.exception()  # whoever asked may have gone
            return
        for key, answer in asked.items():
            answer.set_result(found.get(key))
