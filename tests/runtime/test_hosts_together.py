"""What several hosts said is heard together: each host's in its order, in one commit with the positions, and one that can't
be heard takes none of the others with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import asyncpg

from tests.support.runtime import open_bus
from volery.contracts.agent import (
    DOMAIN_EVENT_HAPPENED,
    HOST_REPORTED,
    DomainEventHappened,
    HostCapabilities,
    HostReported,
)
from volery.contracts.base import Entity, encode
from volery.contracts.ids import new_id
from volery.runtime.bus import Bus
from volery.runtime.database import migrate, open_pool
from volery.runtime.hear import HOST_STREAM, Apart, HostHearing, make_host_stream, table_of
from volery.runtime.programs import Settings
from volery.runtime.tables import Change, text_columns
from volery.runtime.tasks import end

MANY = 120


@dataclass
class Hosts:
    """What hosts say, and how it is heard."""

    bus: Bus
    pool: asyncpg.Pool
    runs: list[list[str]] = field(default_factory=list)
    """Hosts whose reports were heard together."""
    decides: Callable[[Sequence[HostReported]], None] = lambda said: None
    shared: str = ""
    """An object that each of them changes."""
    seqs: dict[str, int] = field(default_factory=dict)

    async def hear_reports(self, said: Sequence[HostReported]) -> list[Change]:
        self.decides(said)
        self.runs.append([fact.host_id for fact in said])
        now = datetime.now(UTC)
        same = Entity(id=self.shared, revision=1, created_at=now, updated_at=now)
        return [
            Change(
                "insert into told (host_id, seq) select n.h, n.s::bigint from unnest({0}::text[], {1}::text[]) as n(h, s)",
                text_columns([(fact.host_id, fact.seq)]),
                guarded=False,
                document=same if self.shared else None,
            )
            for fact in said
        ]

    async def hear_event(self, fact: DomainEventHappened) -> list[Change]:
        return await self.hear_reports([fact])  # type: ignore[list-item]

    async def report(self, host_id: str) -> None:
        await self._say(
            HOST_REPORTED, HostReported, host_id, capabilities=HostCapabilities(hostname="h"), domains=()
        )

    async def event(self, host_id: str) -> None:
        await self._say(DOMAIN_EVENT_HAPPENED, DomainEventHappened, host_id, vm_id="v", epoch=1, event="x")

    async def _say(self, fact: Any, payload: Any, host_id: str, **fields: Any) -> None:
        seq = self.seqs[host_id] = self.seqs.get(host_id, 0) + 1
        said = payload(
            host_id=host_id,
            generation="g",
            boot_id="b",
            seq=seq,
            after_seq=seq - 1,
            at=datetime.now(UTC),
            **fields,
        )
        await self.bus.client.jetstream().publish(fact.subject_for(said), encode(said))

    @asynccontextmanager
    async def heard(self) -> AsyncIterator[HostHearing]:
        hearing = HostHearing(self.bus, self.pool, "inventory", {}, HOST_REPORTED)
        hearing.handlers = table_of([(DOMAIN_EVENT_HAPPENED, self.hear_event)])
        hearing.together = {"fact.host.*.inventory.reported": (HOST_REPORTED, self.hear_reports)}
        task = asyncio.create_task(hearing.run())
        try:
            yield hearing
        finally:
            await end([task])

    async def told(self, count: int) -> list[tuple[str, int]]:
        """What had its effect, in that order, once it is so much."""
        async with asyncio.timeout(20):
            while True:
                rows = await self.pool.fetch("select host_id, seq from told order by n")
                if len(rows) >= count:
                    return [(row["host_id"], row["seq"]) for row in rows]
                await asyncio.sleep(0.02)

    async def positions(self) -> dict[str, int]:
        rows = await self.pool.fetch("select host_id, seq from heard_host")
        return {row["host_id"]: row["seq"] for row in rows}


@asynccontextmanager
async def hosts(configured: Settings) -> AsyncIterator[Hosts]:
    await migrate(configured.database, "inventory")
    async with (
        open_bus(configured.bus, "inventory") as bus,
        open_pool(configured.database, "inventory") as pool,
    ):
        await pool.execute(
            "create table told (n bigserial primary key, host_id text, seq bigint, unique (host_id, seq))"
        )
        await make_host_stream(bus, 1)
        yield Hosts(bus, pool)


async def test_many_hosts_reports_are_a_few_commits_and_each_counts_once(configured: Settings) -> None:
    async with hosts(configured) as at:
        ids = [new_id() for _ in range(MANY)]
        for host_id in ids:
            await at.report(host_id)
        async with at.heard():
            assert sorted(await at.told(MANY)) == sorted((host_id, 1) for host_id in ids)
        assert await at.positions() == dict.fromkeys(ids, 1)
        assert len(at.runs) <= MANY / 10


async def test_each_hosts_facts_keep_their_order(configured: Settings) -> None:
    """Whatever others say between them: a second report of one host is not heard with its first."""
    async with hosts(configured) as at:
        ids = [new_id() for _ in range(6)]
        for _ in range(3):
            for host_id in ids:
                await at.report(host_id)
                await at.event(host_id)
            for host_id in ids:
                await at.report(host_id)
        async with at.heard():
            told = await at.told(9 * len(ids))
        for host_id in ids:
            assert [seq for host, seq in told if host == host_id] == list(range(1, 10))
        assert all(len(run) == len(set(run)) for run in at.runs)
        assert max(len(run) for run in at.runs) > 1


async def test_one_that_cannot_be_heard_takes_none_of_the_others_with_it(configured: Settings) -> None:
    async with hosts(configured) as at:
        ids = [new_id() for _ in range(10)]

        def hindered(said: Sequence[HostReported]) -> None:
            if any(fact.host_id == ids[6] for fact in said):
                raise TimeoutError("a test says so")

        at.decides = hindered
        for host_id in ids:
            await at.report(host_id)
        async with at.heard():
            assert [host_id for host_id, _ in await at.told(6)][:6] == ids[:6]
            at.decides = lambda said: None
            assert sorted(await at.told(10)) == sorted((host_id, 1) for host_id in ids)


async def test_two_that_change_one_object_are_heard_one_after_the_other(configured: Settings) -> None:
    """One statement's second change of a row would get lost."""
    async with hosts(configured) as at:
        at.shared = new_id()
        ids = [new_id() for _ in range(5)]
        for host_id in ids:
            await at.report(host_id)
        async with at.heard():
            assert await at.told(5) == [(host_id, 1) for host_id in ids]
        assert at.runs[-5:] == [[host_id] for host_id in ids]


async def test_whoever_decides_may_ask_for_them_one_by_one(configured: Settings) -> None:
    async with hosts(configured) as at:

        def apart(said: Sequence[HostReported]) -> None:
            if len(said) > 1:
                raise Apart

        at.decides = apart
        ids = [new_id() for _ in range(5)]
        for host_id in ids:
            await at.report(host_id)
        async with at.heard():
            assert await at.told(5) == [(host_id, 1) for host_id in ids]


async def test_after_a_loss_of_the_connection_it_goes_on_where_it_stood(configured: Settings) -> None:
    """Reading the stream anew would mean tens of thousands of facts that are known; a stream that was made anew is."""
    async with hosts(configured) as at, at.heard() as hearing:
        ids = [new_id() for _ in range(3)]
        for host_id in ids:
            await at.report(host_id)
        await at.told(3)
        js = at.bus.client.jetstream()
        info = await js.stream_info(HOST_STREAM)
        async with asyncio.timeout(5):
            while hearing._after(info) != 3:
                await asyncio.sleep(0.02)
        await js.delete_stream(HOST_STREAM)
        await make_host_stream(at.bus, 1)
        for host_id in ids * 2:
            await at.report(host_id)
        assert hearing._after(await js.stream_info(HOST_STREAM)) == 0
        assert len(await at.told(9)) == 9


async def test_whoever_begins_anew_hears_again_what_a_restored_database_has_not(configured: Settings) -> None:
    """Also in the process that had heard it before."""
    async with hosts(configured) as at:
        host_id = new_id()
        async with at.heard() as hearing:
            await at.report(host_id)
            await at.event(host_id)
            await at.told(2)
        await at.pool.execute("update heard_host set seq = 1")
        await at.pool.execute("delete from told where seq = 2")
        again = asyncio.create_task(hearing.run())
        try:
            assert await at.told(2) == [(host_id, 1), (host_id, 2)]
        finally:
            await end([again])
