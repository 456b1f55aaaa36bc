"""What a change costs: with its event against a bare update, and until it is accepted against one commit."""

from __future__ import annotations

import itertools

from msgspec.structs import replace

from bench.load import connect, median_ms, rate, request
from bench.rows import Line, at_least, at_most, in_turn
from bench.world import World, seed
from services.inventory.store import VMS, VmPrivate
from volery.runtime.tables import Row, commit

WRITERS = 8
SECONDS = 1.0
STARTS = 60
PAUSE_SECONDS = 0.03
"""Between two requests, so that what follows a 202 in the background isn't taken for the next one's time."""


async def state_change(world: World) -> list[Line]:
    """`commit` of `Table.update` with its fact, against `update … where id = $1` of the same document."""
    pool = await world.bare_pool()
    plain = await world.plain_pool()
    rows = [Row(vm, VmPrivate()) for vm in await seed(pool, 2 * WRITERS)]
    documents = await pool.fetch("select id, doc from vm order by id limit $1", WRITERS)
    await pool.execute("create table if not exists bare (like vm including all)")
    await pool.execute("truncate bare; insert into bare select * from vm")
    counter = itertools.count(2)

    async def change(number: int) -> None:
        row = rows[number]
        new = replace(row.public, description=f"revision {row.public.revision}")
        made = VMS.update(row, new)
        await commit(pool, [made])
        rows[number] = Row(made.document, row.private)

    async def bare(number: int) -> None:
        record = documents[number]
        await plain.execute(
            "update bare set revision = $2, doc = $3 where id = $1",
            record["id"],
            next(counter),
            record["doc"],
        )

    found = []
    for writers in (1, WRITERS):

        async def ours(writers: int = writers) -> float:
            await pool.execute("truncate outbox")
            return await rate(change, writers, SECONDS)

        async def theirs(writers: int = writers) -> float:
            return await rate(bare, writers, SECONDS)

        pairs = await in_turn(ours, theirs)
        name = f"state change with its event, {writers} writer{'s' * (writers > 1)}"
        found.append(at_least(name, pairs, 0.8, "changes/s", "theirs: a bare single-row update"))
    return found


async def accepted(world: World) -> list[Line]:
    """POST …/start until 202, each of another VM, against one commit of a bare update."""
    there = await world.installation()
    vms = iter(await world.vms())
    pool = await world.plain_pool()
    await pool.execute("create table if not exists one_commit (id int primary key, value bigint)")
    await pool.execute("insert into one_commit values (1, 0) on conflict do nothing")
    http = await connect(there.url, there.tls)

    async def start(_number: int) -> None:
        path = f"/api/v1/vms/{next(vms).id}/start"
        await http.ask(request("POST", path, there.token, b"{}"), 202)

    async def update(_number: int) -> None:
        await pool.execute("update one_commit set value = value + 1 where id = 1")

    async def ours() -> float:
        await there.quiet()
        return await median_ms(start, STARTS, PAUSE_SECONDS)

    async def theirs() -> float:
        return await median_ms(update, STARTS, PAUSE_SECONDS)

    try:
        pairs = await in_turn(ours, theirs)
    finally:
        http.close()
    return [at_most("mutation accepted (202), p50", pairs, 4, note="theirs: one PostgreSQL commit")]
