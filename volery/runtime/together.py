"""Commits that are made at the same time, in one statement.

A dead host's VMs are brought back by the dozen: each is decided by itself and answered by itself, but what is written
becomes durable together. Whoever comes while nothing is being written doesn't wait for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import asyncpg

from volery.runtime.tables import Change, Stale, Taken

Write: TypeAlias = Callable[[Sequence[Change]], Awaitable[None]]

MOST = 32
"""Writers that share a statement at most."""
SOMEBODYS_FAULT = (Stale, Taken, asyncpg.CardinalityViolationError)
"""One of several was refused, or two of them change the same row: nothing was written."""


@dataclass(slots=True)
class Together:
    """`write` commits changes, all or none, or raises."""

    write: Write
    _waiting: list[tuple[Sequence[Change], asyncio.Future[None]]] = field(default_factory=list)
    _writing: asyncio.Task[None] | None = None

    async def commit(self, changes: Sequence[Change]) -> None:
        """These changes, all or none. Raises what `write` raises for them alone."""
        if not all(change.guarded for change in changes):
            # Two of these may change one row, of which a single statement would silently leave out the second.
            await self.write(changes)
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((changes, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_on())
        await done

    async def _write_on(self) -> None:
        try:
            while self._waiting:
                some, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                error = await self._failed([change for changes, _ in some for change in changes])
                if len(some) > 1 and isinstance(error, SOMEBODYS_FAULT):
                    for changes, done in some:
                        _tell(done, await self._failed(changes))
                else:
                    for _, done in some:
                        _tell(done, error)
        finally:
            self._writing = None

    async def _failed(self, changes: Sequence[Change]) -> Exception | None:
        try:
            await self.write(changes)
        except Exception as error:  # the runtime's own loop: whoever waits is told
            return error
        return None


def _tell(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return  # its caller was cancelled
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
