"""What is shown now and then is woken at once, then once in its time, however often it changes."""

from __future__ import annotations

import asyncio

from volery.runtime.core import Pace


async def test_the_first_change_is_shown_at_once_and_the_last_is_not_forgotten() -> None:
    woken: list[str] = []
    pace = Pace(woken.append, 0.2)
    for _ in range(50):
        pace.add("host/a")
    pace.add("host/b")
    assert woken == ["host/a", "host/b"]
    await asyncio.sleep(0.05)
    assert woken == ["host/a", "host/b"]
    await asyncio.sleep(0.3)
    assert woken == ["host/a", "host/b", "host/a"]
    await asyncio.sleep(0.25)
    pace.add("host/a")
    assert woken == ["host/a", "host/b", "host/a", "host/a"]
