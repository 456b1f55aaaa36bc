"""The simulation's PostgreSQL against the real one: what statements mean, what they answer, how they interleave."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from services.network.store import NETWORKS
from services.scheduler import capacity_store
from services.scheduler.store import CLAIMS
from sim.postgres import Database, Unsupported
from tests.sim.scripts import SCRIPTS
from tests.sim.statements import OWNERS, statements
from tests.sim.twins import Twins, outcome
from volery.contracts.errors import Refused
from volery.contracts.operation import ListQuery
from volery.runtime import database as real
from volery.runtime.pages import page


@asynccontextmanager
async def pooled(twins: Twins, owner: str) -> AsyncIterator[Any]:
    await twins.migrate(twins.config, owner)
    async with twins.open_pool(twins.config, owner) as pool:
        yield pool


async def test_every_statement_of_the_product_has_the_same_arguments_and_columns(twins: Twins) -> None:
    found = statements()
    assert sum(map(len, found.values())) > 250
    for owner in OWNERS:
        await twins.migrate(twins.config, owner)
        async with real.open_direct(twins.config, owner) as connection:
            for text in sorted(found[owner]):
                plan = twins.simulated.plan(owner, text)
                prepared = await connection.prepare(text)
                assert [t.name for t in prepared.get_parameters()] == list(plan.kinds), text
                columns = [(a.name, a.type.name) for a in prepared.get_attributes()]
                assert columns == list(plan.columns), text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
async def test_scripts_come_to_the_same(twins: Twins, script: Any) -> None:
    """What a script must come to is what PostgreSQL says."""
    async with pooled(twins, "ha") as pool:
        for text, *args in script.statements:
            rows = text.lstrip().startswith(("select", "with")) or "returning" in text
            failed = await outcome((pool.fetch if rows else pool.execute)(text, *args))
            assert failed.error is None or script.fails, text
        assert len(twins.texts) >= len({text for text, *_ in script.statements})


async def test_pages_are_the_same(twins: Twins) -> None:
    async with pooled(twins, "scheduler") as pool:
        for i, name in enumerate(["b", "A", "ä", "a", "", "B"]):
            await pool.execute(
                """insert into host_capacity (id, revision, name, cluster_id, status, cpus, memory_bytes, cpu_models,
                   machines, memory_limit_bytes, vcpus_limit) values ($1, 1, $2, $3, 'up', 4, 5, '{}', '{}', 6, 7)""",
                f"h{i}",
                name,
                f"c{i % 2}",
            )
        for order in ("", "id", "-id", "name", "-name", "status", "-cluster_id"):
            query = ListQuery(limit=2, order_by=order)
            for _ in range(4):
                items, following = await capacity_store.page_of_hosts(pool, query)
                assert items
                if not following:
                    break
                query = ListQuery(limit=2, order_by=order, page=following)
        await page(pool, CLAIMS, ListQuery(filter={"state": "held", "epoch": "4"}, order_by="created_at"))
        await page(pool, CLAIMS, ListQuery(filter={"created_at": "2026-11-29 00:00:00+00"}))
        await capacity_store.page_of_hosts(pool, ListQuery(search="A", filter={"cluster_id": "c1"}))
    async with pooled(twins, "network") as pool:
        await page(pool, NETWORKS, ListQuery(search="%", order_by="-vlan"))
        with pytest.raises(Refused):
            await page(pool, NETWORKS, ListQuery(order_by="doc"))


async def test_what_is_not_there_is_refused_with_its_text() -> None:
    database = Database()
    await database.migrate("ha")
    async with database.pool("ha") as pool:
        for text in (
            "select id from vm union select id from liveness",
            "select string_agg(id, ',') from vm",
            "select id from vm order by id nulls first",
            "truncate vm",
            "select id from vm tablesample system (10)",
            "select array_agg(id) from vm",
            "select * from vm natural join liveness",
            "select id from vm for update skip locked",
            "select substring(id from 'a.*') from vm",
            "select id ~ 'x' from vm",
            "select id from vm where id ilike 'x'",
            "select date_trunc('day', now())",
            "with recursive r as (select 1) select * from r",
            "insert into vm select * from vm as of system time x",
            "create table x (a varchar(3))",
            'create table x (a text collate "C")',
            "alter table vm drop column name",
            "set search_path = x",
        ):
            with pytest.raises(Exception, match=r"(?s)does not have|can't be parsed") as refused:
                await pool.execute(text)
            assert isinstance(refused.value, Unsupported) is ("can't be parsed" not in str(refused.value)), (
                text
            )
            if isinstance(refused.value, Unsupported):
                assert text in str(refused.value)


async def test_migrations_run_once_and_in_order() -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    database = Database(clock=lambda: at)
    for owner in OWNERS:
        await database.migrate(owner)
        done = database.rows(owner, "migration")
        await database.migrate(owner)
        assert database.rows(owner, "migration") == done
        assert done[0]["name"] == "runtime/0001_runtime.sql"
        assert {row["at"] for row in done} == {at}
