"""Many changes of one kind in a commit: all of them with their facts, or nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from tests.runtime import toy
from tests.runtime.test_service import facts
from tests.runtime.toy import BUMP_TOY, CREATE_TOY, TOYS, Bump, CreateToy, Toy, ToyBox, ToyConfig
from tests.support.runtime import running
from volery.contracts.base import Owner
from volery.contracts.ids import new_id
from volery.runtime.bus import Bus
from volery.runtime.clock import utc_now
from volery.runtime.core import Core
from volery.runtime.programs import Settings
from volery.runtime.service import Service
from volery.runtime.tables import Nothing, Stale, Taken

MANY = 40


@asynccontextmanager
async def opened(configured: Settings) -> AsyncIterator[tuple[Core, Bus]]:
    cores: list[Core] = []

    @asynccontextmanager
    async def remembered(core: Core) -> AsyncIterator[ToyBox]:
        cores.append(core)
        async with toy.open_toys(core) as box:
            yield box

    async with running(configured, Service(Owner.HA, remembered, ToyConfig, [toy.part])) as bus:
        yield cores[0], bus


def new_toy(name: str) -> Toy:
    now = utc_now()
    return Toy(id=new_id(), revision=1, created_at=now, updated_at=now, name=name)


async def test_all_are_written_and_announced_in_their_order(configured: Settings) -> None:
    async with opened(configured) as (core, bus):
        await core.commit(*(TOYS.insert(new_toy(f"t{n:02}"), Nothing()) for n in range(MANY)))
        rows = await TOYS.where(core.pool)
        await core.commit(*(TOYS.update(row, replace(row.public, count=1)) for row in rows))
        said = await facts(bus, 2 * MANY)
        assert [event["data"]["name"] for event in said[:MANY]] == [f"t{n:02}" for n in range(MANY)]
        assert [event["data"]["id"] for event in said[MANY:]] == [row.id for row in rows]
        assert all(event["data"]["count"] == 1 for event in said[MANY:])


async def test_one_that_somebody_changed_leaves_all_as_they_were(configured: Settings) -> None:
    async with opened(configured) as (core, bus):
        for number in range(3):
            await bus.ask(CREATE_TOY, CreateToy(name=f"t{number}"))
        rows = await TOYS.where(core.pool)
        await bus.ask(BUMP_TOY, Bump(id=rows[1].id))
        with pytest.raises(Stale):
            await core.commit(*(TOYS.update(row, replace(row.public, count=7)) for row in rows))
        assert [row.public.count for row in await TOYS.where(core.pool)] == [0, 1, 0]
        await bus.ask(BUMP_TOY, Bump(id=rows[0].id))
        said = await facts(bus, 5)
        assert [event["data"]["count"] for event in said] == [0, 0, 0, 1, 1]


async def test_a_name_that_is_taken_leaves_all_unwritten(configured: Settings) -> None:
    async with opened(configured) as (core, _):
        with pytest.raises(Taken):
            await core.commit(*(TOYS.insert(new_toy(name), Nothing()) for name in ("a", "b", "a")))
        assert await TOYS.where(core.pool) == []
