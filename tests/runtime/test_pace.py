"""What is shown now and then is woken at once, then once in its time, however often it changes."""

from __future__ import annotations

import asyncio

from volery.runtime.clock import monotonic
from volery.runtime.core import Pace

SECONDS = 0.2


async def test_the_first_change_is_shown_at_once_and_the_last_is_not_forgotten() -> None:
    woken: asyncio.Queue[str] = asyncio.Queue()
    pace, began = Pace(woken.put_nowait, SECONDS), monotonic()
    for _ in range(50):
        pace.add("host/a")
    pace.add("host/b")
    assert [woken.get_nowait(), woken.get_nowait()] == ["host/a", "host/b"]
    for times in (1, 2):
        assert woken.empty()
        async with asyncio.timeout(10):
            assert await woken.get() == "host/a"
        assert monotonic() - began > times * SECONDS * 0.95  # a timer may be a moment early
        pace.add("host/a")
    assert woken.empty()
