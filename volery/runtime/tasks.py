"""Tasks that surely end.

Python 3.11's `asyncio.wait_for`, which nats-py waits with, loses a cancellation that comes together with its result;
a TaskGroup then waits for ever. Here a task is cancelled again until it has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from volery.runtime.tables import Stale

log = logging.getLogger(__name__)

AGAIN_SECONDS = 0.5


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel until every task has ended, however. Raises CancelledError afterwards if it came meanwhile."""
    pending = {task for task in tasks if not task.done()}
    cancelled = False
    while pending:
        for task in pending:
            task.cancel()
        try:
            _, pending = await asyncio.wait(pending, timeout=AGAIN_SECONDS)
        except asyncio.CancelledError:
            cancelled = True
            pending = {task for task in pending if not task.done()}
    if cancelled:
        raise asyncio.CancelledError


async def together(works: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Run all until one ends or we are cancelled; then end the rest. Raises what the first one raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end(tasks)
    for task in done:
        task.result()


async def after(event: asyncio.Event, work: Coroutine[Any, Any, Any]) -> None:
    """The work, once the event is set."""
    try:
        await event.wait()
    except BaseException:  # cancelled: what never began is closed, or Python complains that nobody awaited it
        work.close()
        raise
    await work


async def every(seconds: float, work: Callable[[Any], Awaitable[None]], made: Any) -> None:
    """Until cancelled; what went wrong once is tried again with the next time."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work(made)
        except Stale:
            continue
        except Exception:  # the runtime's own loop
            log.exception("%s failed", getattr(work, "__name__", "periodic work"))
