"""Commits that are made at the same time: one statement, and nobody pays for another's fault."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volery.runtime.database import open_pool
from volery.runtime.hear import in_one
from volery.runtime.programs import Settings
from volery.runtime.tables import Change, Stale, commit
from volery.runtime.tail import Heard
from volery.runtime.together import Together


def change(name: str, *, guarded: bool = True) -> Change:
    return Change(name, (), guarded=guarded)


class Written:
    """What was written in which statement. A statement with a change named `stale` is refused."""

    def __init__(self) -> None:
        self.statements: list[list[str]] = []
        self.free = asyncio.Event()

    async def write(self, changes: Sequence[Change]) -> None:
        await self.free.wait()
        names = [change.sql for change in changes]
        if "stale" in names:
            raise Stale
        self.statements.append(names)


async def test_who_comes_while_others_are_written_shares_the_next_statement() -> None:
    written = Written()
    together = Together(written.write)
    first = asyncio.create_task(together.commit([change("first")]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    others = [asyncio.create_task(together.commit([change(f"a{n}"), change(f"b{n}")])) for n in range(3)]
    await asyncio.sleep(0)
    written.free.set()
    await asyncio.gather(first, *others)
    assert written.statements == [["first"], ["a0", "b0", "a1", "b1", "a2", "b2"]]


async def test_one_that_is_stale_fails_alone_and_what_is_unguarded_is_written_alone() -> None:
    written = Written()
    written.free.set()
    together = Together(written.write)
    asked = [["a"], ["b", "stale"], ["c"]]
    results = await asyncio.gather(
        *(together.commit([change(name) for name in names]) for names in asked),
        together.commit([change("d", guarded=False)]),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), Stale, type(None), type(None)]
    assert sorted(written.statements) == [["a"], ["c"], ["d"]]


async def test_two_that_change_one_row_both_do(configured: Settings) -> None:
    """PostgreSQL refuses a statement that writes one row twice."""
    async with open_pool(configured.database, "ha") as pool:
        await pool.execute("create table counted (id text primary key, n int not null)")
        together = Together(lambda changes: commit(pool, changes))
        sql = """insert into counted (id, n) values ({0}, 1)
                 on conflict (id) do update set n = counted.n + 1 returning 1"""
        counting = [together.commit([Change(sql, (name,))]) for name in "abab"]
        await asyncio.gather(*counting)
        found = await pool.fetch("select id, n from counted order by id")
        assert [tuple(row) for row in found] == [("a", 2), ("b", 2)]


SUBJECTS = st.sampled_from(
    ["fact.ha.toy.a.changed", "fact.ha.toy.b.changed", "fact.ha.toy.c.changed", "fact.ha.toy.a.deleted"]
)


@given(st.lists(SUBJECTS, max_size=40))
def test_facts_that_share_a_commit_are_in_order_and_of_different_objects(subjects: list[str]) -> None:
    heard = [Heard(position, subject, b"") for position, subject in enumerate(subjects)]
    shared = list(in_one(heard, {"fact.ha.toy.*.changed"}))
    assert [each for some in shared for each in some] == heard
    for some in shared:
        assert len({each.subject.split(".")[3] for each in some}) == len(some)
        assert len(some) == 1 or all(each.subject.endswith(".changed") for each in some)


def test_many_facts_share_few_commits() -> None:
    heard = [Heard(n, f"fact.ha.toy.{n}.changed", b"") for n in range(100)]
    assert [len(some) for some in in_one(heard, {"fact.ha.toy.*.changed"})] == [64, 32, 4]


@pytest.mark.parametrize("together", [(), ("fact.ha.other.*.changed",)])
def test_facts_that_may_not_share_are_heard_one_by_one(together: tuple[str, ...]) -> None:
    heard = [Heard(n, f"fact.ha.toy.{n}.changed", b"") for n in range(3)]
    assert [len(some) for some in in_one(heard, together)] == [1, 1, 1]
