"""Physical CPUs on a real bus and database: given to one VM at a time, whoever races."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from msgspec.structs import replace

from services.scheduler import cpu_store, licence_store, store
from tests.scheduler.fleets import (
    GIB,
    capacities,
    cluster,
    host,
    hosts_known,
    inventory,
    placing,
    scheduler,
    until,
)
from tests.scheduler.test_cpus import machine
from tests.scheduler.test_placing import claims
from tests.support.runtime import running
from volery.contracts.agent import HostCapabilities
from volery.contracts.cluster import CLUSTER_CHANGED, Cluster
from volery.contracts.cpus import CpuPinning, GivenCpus, PinningPolicy
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, Host
from volery.contracts.ids import new_id
from volery.contracts.licence import LICENCE_REPORT, AskLicenceReport, as_csv
from volery.contracts.scheduling import (
    PLACE,
    RELEASE_VM_CLAIMS,
    Claim,
    Place,
    Placement,
    Purpose,
    ReleaseVm,
)
from volery.runtime.bus import Bus
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings
from volery.runtime.tables import Change, Stale, commit

DEDICATED = CpuPinning(policy=PinningPolicy.DEDICATED)
ISOLATED = CpuPinning(policy=PinningPolicy.ISOLATE_THREADS)


def built(c: Cluster, name: str, sockets: int = 1, cores: int = 4, threads: int = 2, **fields: Any) -> Host:
    count = sockets * cores * threads
    capabilities = HostCapabilities(
        memory_bytes=1024 * GIB, cpus=count, machines=("q35",), cores=machine(sockets, cores, threads)
    )
    return host(c.id, name=name, capabilities=capabilities, **fields)


@asynccontextmanager
async def fleet(configured: Settings, c: Cluster, *hosts: Host, replicas: int = 1) -> AsyncIterator[Bus]:
    owner = inventory()
    async with running(configured, owner.service(), *(scheduler() for _ in range(replicas))) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, len(hosts))
        yield bus


async def given_twice(database: DatabaseConfig) -> list[asyncpg.Record]:
    """Physical CPUs that two claims hold and one of them alone, by a query that knows nothing of how they are guarded."""
    connection = await asyncpg.connect(
        database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
    )
    rows = await connection.fetch(
        """with alone as (select id, doc::json->>'host_id' as host, x.cpu
                          from claim, json_array_elements_text(doc::json->'cpus'->'exclusive') as x(cpu)
                          where doc::json->>'cpus' is not null),
                used as (select id, doc::json->>'host_id' as host, x.cpu
                         from claim, json_array_elements(doc::json->'cpus'->'pins') as p(cpus),
                              json_array_elements_text(p.cpus) as x(cpu)
                         where doc::json->>'cpus' is not null)
           select a.host, a.cpu, a.id, b.id from alone a
           join (select * from alone union select * from used) b on a.host = b.host and a.cpu = b.cpu and a.id <> b.id"""
    )
    await connection.close()
    return list(rows)


async def left_to_share(database: DatabaseConfig) -> list[asyncpg.Record]:
    """Hosts whose VMs without CPUs of their own find fewer than the largest of them has vCPUs."""
    connection = await asyncpg.connect(
        database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
    )
    rows = await connection.fetch(
        """select h.id, h.cpus, sum(json_array_length(coalesce(c.doc::json->'cpus'->'exclusive', '[]'::json))) as alone,
                  max(case when c.doc::json->>'cpus' is null then (c.doc::json->>'vcpus')::int else 0 end) as largest
           from host_capacity h join claim c on c.doc::json->>'host_id' = h.id group by h.id, h.cpus
           having sum(json_array_length(coalesce(c.doc::json->'cpus'->'exclusive', '[]'::json))) > 0
              and h.cpus - sum(json_array_length(coalesce(c.doc::json->'cpus'->'exclusive', '[]'::json)))
                  < max(case when c.doc::json->>'cpus' is null then (c.doc::json->>'vcpus')::int else 0 end)"""
    )
    await connection.close()
    return list(rows)


async def test_a_dedicated_vm_gets_cpus_a_repeat_the_same_and_what_is_given_back_is_given_again(
    configured: Settings, database: DatabaseConfig
) -> None:
    c = cluster()
    async with fleet(configured, c, built(c, "h1")) as bus:
        first = placing(c.id, vcpus=4, cpu_pinning=DEDICATED)
        placed = await bus.ask(PLACE, first)
        assert placed.cpus is not None, placed.message
        assert placed.cpus.exclusive == (0, 1, 4, 5)
        (claim,) = await claims(bus)
        assert (claim.cpus, claim.cpu_pinning, claim.exclusive_cpus) == (placed.cpus, "dedicated", 4)
        assert (await bus.ask(PLACE, first)).cpus == placed.cpus

        other = await bus.ask(PLACE, placing(c.id, vcpus=3, cpu_pinning=DEDICATED))
        assert other.cpus is not None
        assert other.cpus.exclusive == (2, 3, 6)
        refused = await bus.ask(PLACE, placing(c.id, vcpus=2))
        assert "h1 has 1 CPUs left that VMs share, VM web has 2 vCPUs" in refused.message
        small = await bus.ask(PLACE, placing(c.id, vcpus=1))
        assert small.host_id
        nothing = await bus.ask(PLACE, placing(c.id, vcpus=1, cpu_pinning=DEDICATED))
        assert "the VMs that share the others need 1 of them: 0 can be given away" in nothing.message

        await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=first.need.vm_id))
        again = await bus.ask(PLACE, placing(c.id, vcpus=2, cpu_pinning=ISOLATED))
        assert again.cpus is not None, again.message
        assert again.cpus.pins == ((0,), (1,))
        assert again.cpus.exclusive == (0, 1, 4, 5)
        assert await given_twice(database) == []


async def test_the_database_refuses_what_would_be_too_much_whatever_was_decided(
    configured: Settings, database: DatabaseConfig
) -> None:
    """The guards alone: claims as they would be written by a scheduler whose memory is old. 8 CPUs, twice promised."""
    c = cluster(cpu_overcommit_ratio=2.0)
    h1 = built(c, "h1")
    async with fleet(configured, c, h1) as bus:
        placed = await bus.ask(PLACE, placing(c.id, vcpus=4, cpu_pinning=DEDICATED))
        assert placed.cpus is not None
        (held,) = await claims(bus)
        pool = await asyncpg.create_pool(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        )

        def sharing(vcpus: int) -> Claim:
            return replace(held, id=new_id(), vcpus=vcpus, cpu_pinning="", cpus=None, exclusive_cpus=0)

        def alone(cpus: int, revision: int) -> Claim:
            given = GivenCpus(pins=(tuple(range(cpus)),), exclusive=tuple(range(cpus)), revision=revision)
            return replace(held, id=new_id(), vcpus=cpus, cpus=given, exclusive_cpus=cpus)

        async def fails(change: Change) -> None:
            with pytest.raises(Stale):
                await commit(pool, [change])

        await fails(store.take_capacity(sharing(5)))  # 4 CPUs are shared
        await fails(cpu_store.take_cpus(alone(1, placed.cpus.revision)))  # that was before
        now = placed.cpus.revision + 1
        await commit(pool, [store.take_capacity(sharing(3))])
        await fails(cpu_store.take_cpus(alone(2, now)))  # 2 would be left for 3 vCPUs
        await commit(pool, [store.take_capacity(sharing(3))])
        await fails(store.take_capacity(sharing(3)))  # 4 CPUs are promised twice: 8
        await fails(cpu_store.take_cpus(alone(2, now)))
        await fails(cpu_store.take_cpus(alone(1, now + 1)))
        await commit(pool, [store.take_capacity(sharing(2))])
        await fails(cpu_store.take_cpus(alone(1, now)))  # 3 CPUs could promise 6
        await pool.close()


async def test_the_answer_is_rebuilt_from_the_claim_when_its_decision_is_gone(
    configured: Settings, database: DatabaseConfig
) -> None:
    c = cluster()
    async with fleet(configured, c, built(c, "h1")) as bus:
        ask = placing(c.id, vcpus=2, cpu_pinning=DEDICATED)
        placed = await bus.ask(PLACE, ask)
        connection = await asyncpg.connect(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        )
        await connection.execute("delete from decision")
        await connection.close()
        again = await bus.ask(PLACE, ask)
        assert (again.host_id, again.cpus) == (placed.host_id, placed.cpus)


async def test_manual_pins_are_shared_with_others_but_not_with_who_has_cpus_alone(
    configured: Settings,
) -> None:
    c = cluster()
    async with fleet(configured, c, built(c, "h1")) as bus:
        pins = CpuPinning(policy=PinningPolicy.MANUAL, pins=((0,), (1, 2)))
        both = [await bus.ask(PLACE, placing(c.id, vcpus=2, cpu_pinning=pins)) for _ in range(2)]
        assert [p.cpus.pins for p in both if p.cpus] == [pins.pins] * 2
        alone = await bus.ask(PLACE, placing(c.id, vcpus=5, cpu_pinning=DEDICATED))
        assert alone.cpus is not None, alone.message
        assert not {0, 1, 2} & set(alone.cpus.exclusive)
        mine = CpuPinning(policy=PinningPolicy.MANUAL, pins=((alone.cpus.exclusive[0],),))
        refused = await bus.ask(PLACE, placing(c.id, vcpus=1, cpu_pinning=mine))
        assert "is another VM's alone" in refused.message


async def test_a_migration_holds_cpus_at_both_ends_and_a_larger_vm_that_left_is_forgotten(
    configured: Settings, database: DatabaseConfig
) -> None:
    c = cluster()
    h1, h2 = built(c, "h1"), built(c, "h2")
    async with fleet(configured, c, h1, h2) as bus:
        first = placing(c.id, vcpus=4, cpu_pinning=DEDICATED)
        at = await bus.ask(PLACE, first)
        other = h2.id if at.host_id == h1.id else h1.id
        large = placing(c.id, vcpus=8, place={"target_host_id": other})
        assert (await bus.ask(PLACE, large)).host_id == other
        moving = replace(first, epoch=2, purpose=Purpose.MIGRATE, excluded_host_ids=(at.host_id,))
        assert "0 can be given away, VM web wants 4" in (await bus.ask(PLACE, moving)).message
        await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=large.need.vm_id))
        moved = await bus.ask(PLACE, moving)
        assert moved.host_id == other, moved.message
        assert moved.cpus is not None
        assert len(await claims(bus)) == 2
        assert await given_twice(database) == []


async def test_500_starts_at_once_never_give_a_cpu_twice_nor_too_many(
    configured: Settings, database: DatabaseConfig
) -> None:
    """Through two replicas, a third of them without pinning; counted from the claims themselves."""
    c = cluster()
    hosts = [built(c, f"h{n}", sockets=2, cores=4, threads=2) for n in range(12)]
    kinds: list[dict[str, Any]] = [
        {"vcpus": 2, "cpu_pinning": DEDICATED},
        {"vcpus": 3, "cpu_pinning": DEDICATED},
        {"vcpus": 1, "cpu_pinning": ISOLATED},
        {"vcpus": 2, "cpu_pinning": CpuPinning(policy=PinningPolicy.MANUAL, pins=((14,), (15,)))},
        {"vcpus": 4},
        {"vcpus": 1},
    ]
    async with fleet(configured, c, *hosts, replicas=2) as bus:
        asks = [placing(c.id, memory_bytes=GIB // 64, **kinds[n % len(kinds)]) for n in range(500)]
        answers: list[Placement] = await asyncio.gather(*(_placed(bus, ask) for ask in asks))
        placed = [a for a in answers if a.host_id]
        held = await claims(bus)
        assert {a.vm_id for a in placed} == {claim.vm_id for claim in held}
        assert await given_twice(database) == []
        assert await left_to_share(database) == []
        alone = sum(claim.exclusive_cpus for claim in held)
        assert 12 * 16 - alone <= 12 * 6, "most CPUs were given away"
        used = await capacities(bus)
        sums = {h.id: sum(x.vcpus for x in held if x.host_id == h.id) for h in hosts}
        assert sums == {host_id: u.vcpus_used for host_id, u in used.items()}

        for claim in held:
            await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=claim.vm_id))

        async def whole() -> bool:
            ask = placing(
                c.id, vcpus=16, memory_bytes=GIB // 64, cpu_pinning=DEDICATED, place={"dry_run": True}
            )
            return (await bus.ask(PLACE, ask)).fitting == 12

        await until(whole)


async def _placed(bus: Bus, ask: Place) -> Placement:
    """Asked again under the same epoch when the answer is late: the machine is busy."""
    while True:
        try:
            return await bus.ask(PLACE, ask)
        except Refused as refused:
            if refused.kind is not Kind.TIMEOUT:
                raise


async def test_a_host_heard_of_by_the_previous_release_is_taken_over_with_the_same_revision(
    configured: Settings, database: DatabaseConfig
) -> None:
    c = cluster()
    h1 = built(c, "h1")
    owner = inventory()
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        connection = await asyncpg.connect(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        )
        await connection.execute("update host_capacity set cores = ''")

        ask = placing(c.id, cpu_pinning=DEDICATED, place={"dry_run": True})

        async def says(part: str) -> bool:
            return part in (await bus.ask(PLACE, ask)).message

        await until(lambda: says("has not said how its CPUs are built"))
        await owner.says(HOST_CHANGED, h1)
        await until(lambda: says("is placed on h1"))
        cores = await connection.fetchval("select cores from host_capacity")
        assert len(msgspec.json.decode(cores)) == 4
        await connection.close()


async def test_the_licence_report_says_who_held_which_cpus_and_closes_what_is_given_back(
    configured: Settings,
) -> None:
    c = cluster()
    h1, h2 = built(c, "h1", sockets=2), built(c, "h2")
    async with fleet(configured, c, h1, h2) as bus:
        began = datetime.now(UTC)
        to = {"target_host_id": h1.id}
        first = placing(c.id, vcpus=2, cpu_pinning=ISOLATED, place=to)
        pins = CpuPinning(policy=PinningPolicy.MANUAL, pins=((2, 3), (7,)))
        second = placing(c.id, vcpus=2, cpu_pinning=pins, name="=SUM(A1)", place={"target_host_id": h2.id})
        for ask in (first, second, placing(c.id)):
            assert (await bus.ask(PLACE, ask)).host_id
            await bus.ask(PLACE, ask)  # repeated, it is written once
        isolated, manual = (await bus.ask(LICENCE_REPORT, AskLicenceReport())).items
        assert (isolated.vm_id, isolated.host_name, isolated.policy) == (
            first.need.vm_id,
            "h1",
            "isolate_threads",
        )
        assert (isolated.cpus, isolated.exclusive) == ((0, 1), (0, 1, 8, 9))
        assert (isolated.cores, isolated.sockets) == (2, 1)
        assert (manual.cpus, manual.exclusive, manual.cores) == ((2, 3, 7), (), 2)
        assert began - timedelta(seconds=60) < isolated.since < datetime.now(UTC) + timedelta(seconds=60)
        assert isolated.until is None

        moved = replace(first, epoch=2, purpose=Purpose.MIGRATE, target_host_id=h2.id)
        assert (await bus.ask(PLACE, moved)).host_id == h2.id
        await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=first.need.vm_id, keep_epochs=(2,)))
        of_vm = AskLicenceReport(vm_id=first.need.vm_id)
        at_first, now = (await bus.ask(LICENCE_REPORT, of_vm)).items
        assert at_first.until is not None
        assert at_first.since <= now.since <= at_first.until  # both hold it while it moves
        assert (now.host_name, now.until) == ("h2", None)

        later = replace(of_vm, since=at_first.until)
        assert [use.id for use in (await bus.ask(LICENCE_REPORT, later)).items] == [now.id]
        earlier = replace(of_vm, until=now.since)
        assert [use.id for use in (await bus.ask(LICENCE_REPORT, earlier)).items] == [at_first.id]
        page = await bus.ask(LICENCE_REPORT, AskLicenceReport(limit=2))
        rest = await bus.ask(LICENCE_REPORT, AskLicenceReport(limit=2, page=page.next))
        assert [use.host_name for use in (*page.items, *rest.items)] == ["h1", "h2", "h2"]
        assert rest.next == ""
        text = as_csv(page.items).splitlines()
        assert text[0].startswith(
            "id,vm_id,vm_name,epoch,host_id,host_name,policy,cpus,exclusive,cores,sockets,since,until"
        )
        assert "'=SUM(A1)" in text[2]
        assert ",2 3 7,," in text[2]
        for wrong in (
            AskLicenceReport(limit=0),
            AskLicenceReport(since=at_first.until, until=at_first.since),
        ):
            with pytest.raises(Refused) as refused:
                await bus.ask(LICENCE_REPORT, wrong)
            assert refused.value.kind is Kind.INVALID


async def test_what_the_previous_release_did_to_a_claim_is_put_right(
    configured: Settings, database: DatabaseConfig
) -> None:
    """It confirms a claim without knowing of CPUs, and gives one back without closing its record."""
    c = cluster()
    async with fleet(configured, c, built(c, "h1")) as bus:
        confirmed = placing(c.id, vcpus=2, cpu_pinning=DEDICATED)
        released = placing(c.id, vcpus=2, cpu_pinning=DEDICATED)
        for ask in (confirmed, released):
            assert (await bus.ask(PLACE, ask)).cpus is not None
        pool = await asyncpg.create_pool(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        )
        await pool.execute(
            "update claim set doc = (doc::jsonb - 'cpus' - 'cpu_pinning' - 'exclusive_cpus')::text where vm_id = $1",
            confirmed.need.vm_id,
        )
        await pool.execute("delete from claim where vm_id = $1", released.need.vm_id)
        await pool.execute("update host_capacity set vcpus_used = vcpus_used - 2, guests = guests - 1")
        await licence_store.close_uses(pool)
        await store.correct_counters(pool)
        host_id, held = next(
            iter((await cpu_store.held(pool, list(await cpu_store.revisions(pool)))).items())
        )
        assert (len(held.exclusive), held.vcpus) == (2, 2)
        row = await pool.fetchrow(
            "select cpus_exclusive, vcpus_exclusive from host_capacity where id = $1", host_id
        )
        assert tuple(row) == (2, 2)
        open_ones = [
            use.vm_id for use in (await bus.ask(LICENCE_REPORT, AskLicenceReport())).items if not use.until
        ]
        assert open_ones == [confirmed.need.vm_id]
        others = await bus.ask(PLACE, placing(c.id, vcpus=6, cpu_pinning=DEDICATED))
        assert others.cpus is not None, others.message
        assert not held.exclusive & set(others.cpus.exclusive)
        await pool.close()
