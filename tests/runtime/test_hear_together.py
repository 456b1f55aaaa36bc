"""Facts that wait are heard together: in their order, in one commit with the position, and one that can't be heard takes
none of the others with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.runtime import toy
from tests.runtime.toy import BUMP_TOY, CREATE_TOY, TOY_CHANGED, TOY_DELETED, Bump, CreateToy, ToyConfig
from tests.support.runtime import running
from volery.contracts.base import Fact, Owner
from volery.runtime.bus import Bus
from volery.runtime.core import Core
from volery.runtime.hear_owners import Said, newest
from volery.runtime.programs import Settings
from volery.runtime.service import Part, Service
from volery.runtime.tables import Change, text_columns

MANY = 250


@dataclass
class Hearer:
    """Writes down what it hears, and in what company."""

    runs: list[list[int]] = field(default_factory=list)
    """Counts of the toys, as they were heard together."""
    hinders: Callable[[int], bool] = lambda count: False
    """Whether a toy of this count can't be heard now."""
    held: asyncio.Event = field(default_factory=asyncio.Event)
    core: Core | None = None

    async def hear(self, said: Sequence[Said]) -> list[Change]:
        await self.held.wait()
        counts = [each.payload.count for each in said]
        self.runs.append(counts)
        if any(self.hinders(count) for count in counts):
            raise ValueError("a test says so")
        return [
            Change(
                "insert into listened (count) select v.count::bigint from unnest({0}::text[]) as v(count)",
                text_columns((count,) for count in counts),
                guarded=False,
            )
        ]

    def service(self) -> Service:
        part = Part()

        @part.hears_together(TOY_CHANGED)
        async def heard(_: Hearer, said: Sequence[Said]) -> list[Change]:
            return await self.hear(said)

        return Service(Owner.DWH, self._open, ToyConfig, [part])

    @asynccontextmanager
    async def _open(self, core: Core) -> AsyncIterator[Hearer]:
        self.core = core
        await core.pool.execute(
            "create table if not exists listened (n bigserial primary key, count bigint not null)"
        )
        yield self

    async def listened(self) -> list[int]:
        assert self.core is not None
        return [row["count"] for row in await self.core.pool.fetch("select count from listened order by n")]

    async def position(self) -> int:
        assert self.core is not None
        found = await self.core.pool.fetchval("select position from heard where stream = 'FACTS_HA'")
        return int(found or 0)


async def bumped(bus: Bus, times: int) -> None:
    made = await bus.ask(CREATE_TOY, CreateToy(name="toy"))
    for _ in range(times - 1):
        await bus.ask(BUMP_TOY, Bump(id=made.id))


async def until_listened(hearer: Hearer, count: int) -> list[int]:
    async with asyncio.timeout(30):
        while len(found := await hearer.listened()) < count:
            await asyncio.sleep(0.02)
    return found


async def test_what_waits_is_heard_together_in_order_and_once(configured: Settings) -> None:
    hearer = Hearer()
    async with running(configured, toy.toy_service(), hearer.service()) as bus:
        await bumped(bus, MANY)
        hearer.held.set()
        assert await until_listened(hearer, MANY) == list(range(MANY))
        assert await hearer.position() == MANY
    assert len(hearer.runs) < MANY / 10


async def test_a_fact_that_cannot_be_heard_holds_up_none_before_it(configured: Settings) -> None:
    hearer = Hearer(hinders=lambda count: count == 30)
    async with running(configured, toy.toy_service(), hearer.service()) as bus:
        await bumped(bus, 60)
        hearer.held.set()
        assert await until_listened(hearer, 30) == list(range(30))
        assert await hearer.position() == 30
        hearer.hinders = lambda count: False
        assert await until_listened(hearer, 60) == list(range(60))


async def test_a_crash_amid_many_hears_none_twice_and_loses_none(configured: Settings) -> None:
    hearer = Hearer()
    async with running(configured, toy.toy_service(), hearer.service()) as bus:
        await bumped(bus, 80)
    later = Hearer()
    later.held.set()
    async with running(configured, toy.toy_service(), later.service()):
        assert await until_listened(later, 80) == list(range(80))


def test_the_newest_is_what_was_said_last_of_each_object() -> None:
    def said(fact: Fact[toy.Toy], toy_id: str, revision: int) -> Said:
        at = datetime(2026, 3, 1, tzinfo=UTC)
        return Said(fact, toy.Toy(id=toy_id, revision=revision, created_at=at, updated_at=at, name="t"))

    found = newest(
        [
            said(TOY_CHANGED, "a", 1),
            said(TOY_CHANGED, "b", 1),
            said(TOY_CHANGED, "a", 2),
            said(TOY_DELETED, "b", 2),
        ]
    )
    assert [(one.id, one.revision) for one in found] == [("a", 2), ("b", 2)]
