"""Transactions that meet, on the real PostgreSQL and the simulation's: who waits, what both come to, what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import asyncpg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim.postgres import Database
from tests.sim.interleaving import Statement, World, real_session, simulated_session
from tests.support.runtime import Databases
from volery.contracts.base import Entity, Fact
from volery.runtime import database as real
from volery.runtime.config import DatabaseConfig
from volery.runtime.relay import _MOVE
from volery.runtime.tables import Change, compose
from volery.setup.embedded import Embedded

KEYS = (1, 2)
TABLES = ("kv", "outbox", "log", "log_head")
FILL = """insert into kv (id, n) values (1, 10), (2, 20);
          update log_head set history = 'h', position = 0;"""
EMPTY = "delete from kv; delete from outbox; delete from log;"


def kinds(key: int, n: int) -> list[Statement]:
    """Statements that concern one row, so that two transactions that take rows in order never wait in a circle."""
    return [
        ("update kv set n = n + $2 where id = $1 returning n", (key, n)),
        ("update kv set n = n + 1 where id = $1 and n = $2 returning n", (key, 10 * key)),
        ("delete from kv where id = $1 returning n", (key,)),
        ("insert into kv (id, n) values ($1, $2)", (key, n)),
        (
            """insert into kv (id, n) values ($1, $2)
               on conflict (id) do update set n = kv.n + excluded.n where kv.n < 40 returning n""",
            (key, n),
        ),
        ("insert into kv (id, n) values ($1, $2) on conflict do nothing returning n", (key, n)),
        ("select n from kv where id = $1 for update", (key,)),
        ("select n from kv where id = $1 for share", (key,)),
        ("select sum(n), count(*) from kv", ()),
    ]


def every_meeting() -> list[list[tuple[int, Statement]]]:
    """Each kind of statement in a transaction that another one comes upon: on a row that is there, or not yet."""
    return [
        [(0, ("begin", ())), (0, first), (1, second), (0, (end, ())), (1, ("select id, n from kv", ()))]
        for key in (1, 3)
        for first in kinds(key, 5)
        for second in kinds(key, 7)
        for end in ("commit", "rollback")
    ]


def on_row(key: int) -> st.SearchStrategy[Statement]:
    return st.integers(0, 30).flatmap(lambda n: st.sampled_from(kinds(key, n)))


@st.composite
def transactions(draw: st.DrawFn, last: st.SearchStrategy[Statement]) -> list[Statement]:
    """One session's work: statements by themselves, and transactions over ascending rows."""
    work: list[Statement] = []
    for _ in range(draw(st.integers(1, 3))):
        inside = [draw(on_row(key)) for key in KEYS if draw(st.booleans())]
        if draw(st.booleans()):
            inside.append(draw(last))
        if draw(st.booleans()):
            inside = [("begin", ()), *inside, (draw(st.sampled_from(["commit", "rollback"])), ())]
        work += inside
    return work


@st.composite
def plays(draw: st.DrawFn, last: st.SearchStrategy[Statement]) -> list[tuple[int, Statement]]:
    """Both sessions' work in some order."""
    queues = [draw(transactions(last)), draw(transactions(last))]
    steps: list[tuple[int, Statement]] = []
    while any(queues):
        actor = draw(st.integers(0, 1)) if all(queues) else int(not queues[0])
        steps.append((actor, queues[actor].pop(0)))
    return steps


class Pair(Entity):
    n: int = 0


CHANGED = Fact("fact.ha.pair.{id}.changed", Pair)


def commit_of(key: int, n: int, *, guarded: bool) -> Statement:
    """What tables.commit sends for two changes with two facts."""
    text = "update kv set n = {1} where id = {0} and n < 15" + (" returning 1" if guarded else "")
    first = Change(text, (key, n), (("fact.a", b"{}"),), guarded=guarded)
    second = Change(
        "insert into kv (id, n) values ({0}, {1}) on conflict (id) do update set n = excluded.n",
        (key + 10, n),
        (("fact.b", b"{}"),),
        guarded=False,
    )
    sql, arguments = compose([first, second])
    return sql.replace("n = $2", "n = $2::int").replace("($3, $4)", "($3::int, $4::int)"), tuple(arguments)


COMMITS = st.one_of(
    st.builds(commit_of, st.sampled_from(KEYS[-1:]), st.integers(0, 20), guarded=st.booleans()),
    st.just((_MOVE, (2, "ha"))),
)


async def both_worlds(config: DatabaseConfig, body: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Gives `body` a function that plays steps on both and compares."""
    simulated = Database()
    await simulated.migrate("ha")
    await real.migrate(config, "ha")
    table = "create table kv (id integer primary key, n integer not null)"
    async with (
        real.open_direct(config, "ha") as one,
        real.open_direct(config, "ha") as two,
        real.open_direct(config, "ha") as watcher,
        simulated.connect("ha") as three,
        simulated.connect("ha") as four,
    ):
        await watcher.execute(table)
        await three.execute(table)

        async def compare(steps: list[tuple[int, Statement]]) -> None:
            await watcher.execute(EMPTY + FILL)
            await three.execute(EMPTY + FILL)
            expected = await World([real_session(c, watcher) for c in (one, two)]).play(steps)
            assert await World([simulated_session(c) for c in (three, four)]).play(steps) == expected
            for name in TABLES:
                columns = {"outbox": "subject, body", "log": "position, subject, body"}.get(name, "*")
                rows = [dict(r) for r in await watcher.fetch(f"select {columns} from {name}")]
                twin = [dict(r) for r in await four.fetch(f"select {columns} from {name}")]
                assert sorted(map(repr, rows)) == sorted(map(repr, twin)), name

        await body(compare)


def run_worlds(postgres: Embedded, body: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    databases = Databases(postgres)
    with asyncio.Runner() as runner:
        if not databases.passwords.exists():
            runner.run(databases.make_template())
        config = runner.run(databases.fresh())
        try:
            runner.run(both_worlds(config, body))
        finally:
            runner.run(databases.drop(config))


def run_plays(postgres: Embedded, strategy: st.SearchStrategy[list[tuple[int, Statement]]]) -> None:
    async def body(compare: Any) -> None:
        loop = asyncio.get_running_loop()

        @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def play(steps: list[tuple[int, Statement]]) -> None:
            asyncio.run_coroutine_threadsafe(compare(steps), loop).result(timeout=60)

        await asyncio.to_thread(play)

    run_worlds(postgres, body)


def test_each_statement_meets_each_other(postgres: Embedded) -> None:
    async def body(compare: Any) -> None:
        for steps in every_meeting():
            await compare(steps)

    run_worlds(postgres, body)


def test_two_sessions_over_rows(postgres: Embedded) -> None:
    run_plays(postgres, plays(st.just(("select id, n from kv", ()))))


def test_two_sessions_commit_changes_and_move_facts(postgres: Embedded) -> None:
    run_plays(postgres, plays(COMMITS))


async def test_a_circle_of_waiting_ends_with_a_deadlock() -> None:
    database = Database()
    await database.migrate("ha")
    async with database.connect("ha") as one, database.connect("ha") as two:
        await one.execute("create table kv (id integer primary key, n integer not null)")
        await one.execute("insert into kv values (1, 0), (2, 0)")
        async with one.transaction():
            await one.execute("update kv set n = 1 where id = 1")
            try:
                async with two.transaction():
                    await two.execute("update kv set n = 2 where id = 2")
                    waiting = asyncio.create_task(one.execute("update kv set n = 1 where id = 2"))
                    while not one.is_waiting():  # type: ignore[attr-defined]
                        await asyncio.sleep(0)
                    await two.execute("update kv set n = 2 where id = 1")
            except asyncpg.DeadlockDetectedError:
                pass
            else:
                raise AssertionError("both went on")
            assert await waiting == "UPDATE 1"
        assert [row["n"] for row in database.rows("ha", "kv")] == [1, 1]
