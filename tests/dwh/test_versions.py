"""Configuration versions from facts: every revision once, at a time, through repeats, losses and restarts."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from services.dwh.gaps import LISTS, list_noun
from services.dwh.state import Dwh
from services.dwh.store import VersionRow, versions_said
from services.dwh.versions import FACTS, KNOWN_NOUNS
from tests.dwh.world import connected, dwh, until
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.base import Owner
from volery.contracts.cluster import (
    CLUSTER_CHANGED,
    CLUSTER_DELETED,
    LIST_CLUSTERS,
    LIST_DATA_CENTERS,
    Cluster,
    DataCenter,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.history import LIST_GAPS, LIST_VERSIONS, AskGaps, ListVersions, Version
from volery.contracts.host import LIST_HOSTS, Host
from volery.contracts.ids import new_id
from volery.contracts.vm import LIST_VMS, VM_CHANGED, Vm, VmStatus
from volery.runtime.bus import Bus
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings
from volery.runtime.relay import rebuild_stream
from volery.runtime.tables import commit

T0 = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


def hours(count: float) -> datetime:
    return T0 + timedelta(hours=count)


def cluster(revision: int = 1, **fields: Any) -> Cluster:
    made = {"id": new_id(), "revision": revision, "created_at": T0, "updated_at": hours(revision)}
    return Cluster(**(made | {"name": "Default", "data_center_id": "dc"} | fields))


def row(object_id: str, revision: int) -> VersionRow:
    return VersionRow("cluster", object_id, revision, hours(revision), False, f'{{"name":"{revision}"}}')


def inventory() -> Speaker:
    lists = [(LIST_CLUSTERS, Cluster), (LIST_DATA_CENTERS, DataCenter), (LIST_HOSTS, Host), (LIST_VMS, Vm)]
    return Speaker(Owner.INVENTORY, lists)


async def kept(bus: Bus, noun: str = "cluster", **asked: Any) -> list[Version]:
    return list((await bus.ask(LIST_VERSIONS, ListVersions(noun=noun, **asked))).items)


async def have(bus: Bus, count: int, **asked: Any) -> list[Version]:
    async def enough() -> list[Version] | None:
        found = await kept(bus, **asked)
        return found if len(found) == count else None

    return await until(enough)


def name_of(one: Version) -> str:
    return msgspec.json.decode(one.doc)["name"]


async def test_every_revision_is_kept_with_the_time_it_was_valid(configured: Settings) -> None:
    owner, one = inventory(), cluster(name="first")
    two = replace(one, revision=2, name="second", updated_at=hours(2))
    async with running(configured, owner.service(), dwh()) as bus:
        await owner.says(CLUSTER_CHANGED, one, two)
        await owner.says(CLUSTER_DELETED, replace(two, revision=3, updated_at=hours(3)))
        versions = await have(bus, 3, id=one.id)
        assert [(v.revision, v.valid_from, v.valid_to, v.deleted) for v in versions] == [
            (1, hours(1), hours(2), False),
            (2, hours(2), hours(3), False),
            (3, hours(3), None, True),
        ]
        assert [name_of(v) for v in await kept(bus, at=hours(1.5))] == ["first"]
        assert [name_of(v) for v in await kept(bus, at=hours(2))] == ["second"]
        assert await kept(bus, at=hours(0.5)) == []
        assert await kept(bus, at=hours(4)) == []


async def test_repeats_and_any_order_end_the_same(configured: Settings, database: DatabaseConfig) -> None:
    opened: list[Dwh] = []
    async with running(configured, dwh(opened)) as bus:
        for order in ([1, 2, 3], [3, 2, 1], [2, 3, 1, 2], [1, 1, 3, 3, 2, 1]):
            object_id = new_id()
            for revision in order:
                await commit(opened[0].core.pool, versions_said([row(object_id, revision)]))
            found = await kept(bus, id=object_id)
            assert [(v.revision, v.valid_from, v.valid_to) for v in found] == [
                (1, hours(1), hours(2)),
                (2, hours(2), hours(3)),
                (3, hours(3), None),
            ], order


async def test_versions_that_are_kept_together_end_as_one_by_one(
    configured: Settings, database: DatabaseConfig
) -> None:
    opened: list[Dwh] = []
    chance = random.Random(7)
    async with running(configured, dwh(opened)) as bus:
        for _ in range(60):
            ids = [new_id(), new_id()]
            said = [(object_id, revision) for object_id in ids for revision in range(1, 6)]
            said += chance.sample(said, 3)
            chance.shuffle(said)
            while said:
                some, said = said[: (size := chance.randint(1, 6))], said[size:]
                await commit(opened[0].core.pool, versions_said([row(*each) for each in some]))
            for object_id in ids:
                found = await kept(bus, id=object_id)
                assert [(v.revision, v.valid_from, v.valid_to) for v in found] == [
                    *((revision, hours(revision), hours(revision + 1)) for revision in range(1, 5)),
                    (5, hours(5), None),
                ]


async def test_a_rebuilt_stream_and_a_restarted_dwh_keep_each_revision_once(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, one = inventory(), cluster()
    async with running(configured, owner.service()) as bus:
        async with running(configured, dwh()):
            await owner.says(
                CLUSTER_CHANGED, *(replace(one, revision=n, updated_at=hours(n)) for n in range(1, 6))
            )
            await have(bus, 5, id=one.id)
            await rebuild_stream(bus, Owner.INVENTORY)
            await owner.says(CLUSTER_CHANGED, replace(one, revision=6, updated_at=hours(6)))
            await have(bus, 6, id=one.id)
        await owner.says(CLUSTER_CHANGED, replace(one, revision=7, updated_at=hours(7)))
        async with running(configured, dwh()):
            found = await have(bus, 7, id=one.id)
            assert [v.revision for v in found] == list(range(1, 8))
            assert (await bus.ask(LIST_GAPS, AskGaps())).items == ()


async def test_facts_lost_for_good_are_a_marked_gap_and_what_is_there_is_listed(
    configured: Settings, database: DatabaseConfig
) -> None:
    owner, stays, goes = inventory(), cluster(name="stays"), cluster(name="goes")
    async with running(configured, owner.service()) as bus:
        async with running(configured, dwh()):
            await owner.says(CLUSTER_CHANGED, stays, goes)
            await have(bus, 2)
        newer = replace(stays, revision=5, name="newer", updated_at=hours(5))
        fresh = cluster(name="fresh")
        owner.knows(newer, fresh)
        del owner.objects[goes.id]
        assert owner.core is not None
        # A history that dwh never heard: PostgreSQL of the owner was restored.
        await owner.core.pool.execute("update log_head set history = 'another', position = position + 10")
        await owner.core.pool.execute("delete from log")
        await rebuild_stream(bus, Owner.INVENTORY)
        async with running(configured, dwh()):
            found = await have(bus, 5)
            by_name = {(name_of(v), v.revision): v for v in found}
            assert by_name.keys() == {
                ("stays", 1), ("newer", 5), ("fresh", 1), ("goes", 1), ("goes", 2),
            }  # fmt: skip
            assert by_name["stays", 1].valid_to == hours(5)
            assert by_name["goes", 2].deleted
            (gap,) = (await bus.ask(LIST_GAPS, AskGaps())).items
            assert gap.stream == "FACTS_INVENTORY"


async def test_a_dwh_that_comes_late_lists_what_is_there(configured: Settings) -> None:
    owner = inventory()
    made = [cluster(name=f"c{n}") for n in range(3)]
    owner.knows(*made)
    opened: list[Dwh] = []
    async with running(configured, owner.service(), dwh(opened)) as bus:
        await list_noun(opened[0], "cluster", LIST_CLUSTERS)
        assert {name_of(v) for v in await kept(bus)} == {"c0", "c1", "c2"}


async def test_pages_walk_every_version_once(configured: Settings) -> None:
    owner = inventory()
    made = [cluster(name=f"c{n}") for n in range(7)]
    async with running(configured, owner.service(), dwh()) as bus:
        await owner.says(CLUSTER_CHANGED, *made)
        await have(bus, 7)
        seen, page = [], ""
        while True:
            answer = await bus.ask(LIST_VERSIONS, ListVersions(noun="cluster", limit=3, page=page))
            seen += [v.id for v in answer.items]
            page = answer.next
            if not page:
                break
        assert seen == sorted(c.id for c in made)
        for wrong in (
            ListVersions(noun="nothing"),
            ListVersions(noun="vm", limit=0),
            ListVersions(noun="vm", page="!"),
            ListVersions(noun="vm", page="e30"),
        ):
            with pytest.raises(Refused) as refused:
                await bus.ask(LIST_VERSIONS, wrong)
            assert refused.value.kind is Kind.INVALID


def test_every_noun_that_has_facts_has_versions_and_can_be_listed() -> None:
    assert {"data_center", "cluster", "host", "vm", "storage_domain", "disk", "network"} <= set(KNOWN_NOUNS)
    assert set(LISTS) == set(KNOWN_NOUNS)
    assert all(fact.name.endswith((".changed", ".deleted")) for fact in FACTS.values())


async def test_views_answer_reports(configured: Settings, database: DatabaseConfig) -> None:
    owner = inventory()
    one = Vm(
        id=new_id(), revision=1, created_at=T0, updated_at=hours(1), name="web", cluster_id="c",
        data_center_id="dc", status=VmStatus.DOWN, memory_bytes=1024, vcpus=2,
    )  # fmt: skip
    up = replace(one, revision=2, status=VmStatus.UP, updated_at=hours(2))
    tagged = replace(up, revision=3, tags=("x",), updated_at=hours(3))
    down = replace(tagged, revision=4, status=VmStatus.DOWN, updated_at=hours(5))
    async with running(configured, owner.service(), dwh()) as bus, connected(database) as connection:
        await owner.says(VM_CHANGED, one, up, tagged, down)
        await have(bus, 4, noun="vm")
        periods = await connection.fetch("select status, since, until from status_period order by since")
        assert [tuple(p) for p in periods] == [
            ("down", hours(1), hours(2)),
            ("up", hours(2), hours(5)),
            ("down", hours(5), None),
        ]
        uptime = await connection.fetchrow("select up_seconds from vm_uptime where id = $1", one.id)
        assert uptime["up_seconds"] == 3 * 3600
        row = await connection.fetchrow("select name, vcpus from vm_configuration where valid_to is null")
        assert tuple(row) == ("web", 2)
        views = await connection.fetch("select viewname from pg_views where schemaname = 'dwh'")
        for view in views:
            await connection.fetch(f"select * from {view['viewname']} limit 1")
        assert len(views) >= 15


async def test_views_are_made_anew_when_they_changed_and_foreign_ones_stay(
    configured: Settings, database: DatabaseConfig
) -> None:
    async with running(configured, dwh()):
        pass
    async with connected(database) as connection:
        await connection.execute("create view mine as select 1 as one")
        await connection.execute("update views set hash = 'another'")
        await connection.execute("drop view host_uptime")
    async with running(configured, dwh()), connected(database) as connection:
        assert await connection.fetchval("select one from mine") == 1
        assert await connection.fetch("select * from host_uptime") == []
