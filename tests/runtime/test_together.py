"""Looks that are asked for while one is under way are taken together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from volery.runtime.together import Together


class Table:
    """Answers with what it holds when it is looked at; each look takes until it is let go."""

    def __init__(self, **rows: int) -> None:
        self.rows = rows
        self.looks: list[tuple[str, ...]] = []
        self.go = asyncio.Event()
        self.fails = False

    async def look(self, keys: Sequence[str]) -> Mapping[str, int]:
        self.looks.append(tuple(keys))
        found = {key: self.rows[key] for key in keys if key in self.rows}
        await self.go.wait()
        if self.fails:
            raise OSError("the database is away")
        return found


async def ask(together: Together[str, int], *keys: str) -> list[asyncio.Task[int | None]]:
    tasks = [asyncio.create_task(together.get(key)) for key in keys]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_those_who_ask_meanwhile_share_the_next_look_and_see_what_is_true_then() -> None:
    table = Table(a=1)
    together = Together(table.look)
    first = await ask(together, "a")
    table.rows["a"] = 2
    later = await ask(together, "a", "b", "a")
    assert table.looks == [("a",)]
    table.go.set()
    assert await asyncio.gather(*first, *later) == [1, 2, None, 2]
    assert table.looks == [("a",), ("a", "b")]


async def test_a_look_that_fails_tells_all_who_asked_and_no_one_else() -> None:
    table = Table(a=1)
    together = Together(table.look)
    table.fails = True
    asked = await ask(together, "a", "b")
    table.go.set()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [str(each) for each in found] == ["the database is away"] * 2
    table.fails = False
    assert await together.get("a") == 1


async def test_who_stops_asking_takes_the_answer_from_nobody() -> None:
    table = Table(a=1)
    together = Together(table.look)
    one, other = await ask(together, "a", "a")
    one.cancel()
    table.go.set()
    assert await other == 1
    with pytest.raises(asyncio.CancelledError):
        await one
