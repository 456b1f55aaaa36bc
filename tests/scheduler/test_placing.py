"""Placing on a real bus and database: claims, repeats, races, explanations."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import asyncpg
import msgspec
import pytest
from msgspec.structs import replace

from services.scheduler.policies.decision import NAMED_HOSTS
from tests.scheduler.fleets import (
    GIB,
    OVERHEAD,
    RESERVE,
    capacities,
    cluster,
    host,
    hosts_known,
    inventory,
    network,
    network_owner,
    placing,
    scheduler,
    until,
)
from tests.support.runtime import running
from volery.contracts.base import encode
from volery.contracts.cluster import CLUSTER_CHANGED
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, HostStatus
from volery.contracts.metrics import HostSample
from volery.contracts.network import NETWORK_CHANGED
from volery.contracts.operation import ListQuery
from volery.contracts.scheduling import (
    CONFIRM_CLAIM,
    FIND_ROOM,
    GET_DECISION,
    LIST_CLAIMS,
    LIST_DECISIONS,
    PLACE,
    RELEASE_CLAIM,
    RELEASE_VM_CLAIMS,
    Claim,
    ClaimKey,
    FindRoom,
    GetDecision,
    PastDecision,
    Purpose,
    ReleaseVm,
    RoomFor,
)
from volery.runtime.bus import Bus, Caller
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings


async def claims(bus: Bus) -> list[Claim]:
    page = await bus.ask(LIST_CLAIMS, ListQuery(limit=1000))
    return [msgspec.json.decode(item, type=Claim) for item in page.items]


async def test_a_vm_is_placed_claimed_confirmed_and_released(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    h1, h2 = host(c.id, name="h1"), host(c.id, name="h2", memory_bytes=32 * GIB)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1, h2)
        known = await hosts_known(bus, 2)
        assert known[h1.id].memory_bytes == 16 * GIB - RESERVE
        assert known[h1.id].vcpus_limit == 80

        ask = placing(c.id, vcpus=2)
        placed = await bus.ask(PLACE, ask)
        assert placed.claimed
        assert placed.host_id == h2.id, placed.message
        assert "VM web is placed on h2, the best of 2 that fit" in placed.message
        assert [h.fits for h in placed.hosts] == [True, True]

        (claim,) = await claims(bus)
        assert (claim.vm_id, claim.epoch, claim.host_id) == (ask.need.vm_id, 1, h2.id)
        assert claim.state == "tentative"
        assert claim.memory_bytes == GIB + OVERHEAD
        key = ClaimKey(vm_id=ask.need.vm_id, epoch=1)
        await bus.ask(CONFIRM_CLAIM, key)
        await bus.ask(CONFIRM_CLAIM, key)
        (claim,) = await claims(bus)
        assert claim.state == "confirmed"
        assert claim.revision == 2
        used = (await capacities(bus))[h2.id]
        assert (used.memory_used_bytes, used.vcpus_used) == (GIB + OVERHEAD, 2)

        await bus.ask(RELEASE_CLAIM, key)
        await bus.ask(RELEASE_CLAIM, key)
        assert await claims(bus) == []
        used = (await capacities(bus))[h2.id]
        assert (used.memory_used_bytes, used.vcpus_used) == (0, 0)
        with pytest.raises(Refused) as refused:
            await bus.ask(CONFIRM_CLAIM, key)
        assert refused.value.kind is Kind.NOT_FOUND


async def test_a_repeat_gets_the_first_answer_with_or_without_its_request_id(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *(host(c.id, name=f"h{n}") for n in range(3)))
        await hosts_known(bus, 3)
        ask, caller = placing(c.id), Caller("service:inventory", "op-1/claim", "x")
        first = await bus.ask(PLACE, ask, caller)
        answers = await asyncio.gather(
            *(bus.ask(PLACE, ask, caller if n % 2 else None) for n in range(20)),
        )
        assert all(a == first for a in answers)
        assert len(await claims(bus)) == 1

        moved = replace(ask, epoch=2, purpose=Purpose.MIGRATE, excluded_host_ids=(first.host_id,))
        second = await bus.ask(PLACE, moved)
        assert second.host_id not in ("", first.host_id)
        assert len(await claims(bus)) == 2
        await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=ask.need.vm_id, keep_epochs=(2,)))
        assert [c.epoch for c in await claims(bus)] == [2]

        with pytest.raises(Refused) as refused:
            await bus.ask(PLACE, replace(moved, excluded_host_ids=(second.host_id,)))
        assert refused.value.kind is Kind.CONFLICT
        assert "higher epoch" in refused.value.message


async def test_a_restart_takes_over_what_its_vm_held_and_a_late_question_is_refused(
    configured: Settings,
) -> None:
    """On a host that has room for the VM only once."""
    owner, c = inventory(), cluster()
    h1 = host(c.id, name="h1", memory_bytes=RESERVE + GIB + OVERHEAD + GIB // 2)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        first = placing(c.id, epoch=1)
        assert (await bus.ask(PLACE, first)).claimed
        moving = replace(first, epoch=2, purpose=Purpose.MIGRATE)
        assert not (await bus.ask(PLACE, moving)).claimed
        again = await bus.ask(PLACE, replace(first, epoch=3, purpose=Purpose.RESTART))
        assert again.claimed
        assert [x.epoch for x in await claims(bus)] == [3]
        assert (await capacities(bus))[h1.id].memory_used_bytes == GIB + OVERHEAD
        with pytest.raises(Refused) as refused:
            await bus.ask(PLACE, replace(first, epoch=2))
        assert refused.value.kind is Kind.CONFLICT
        assert "comes too late" in refused.value.message


async def test_measured_load_decides_where_memory_does_not(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    busy, idle = host(c.id, name="busy"), host(c.id, name="idle")
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, busy, idle)
        await hosts_known(bus, 2)
        measured = HostSample(host_id=busy.id, boot_id="b", at=datetime.now(UTC), cpu_percent=60.0)
        await bus.client.publish(f"metrics.host.{busy.id}", encode(measured))

        async def known() -> bool:
            return (await capacities(bus))[busy.id].cpu_percent == 60.0

        await until(known)
        placed = await bus.ask(PLACE, placing(c.id))
        assert placed.host_id == idle.id
        assert placed.hosts[0].weights["cpu_even"] > placed.hosts[1].weights["cpu_even"]


async def test_racing_placements_of_one_vm_claim_once(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    async with running(configured, owner.service(), scheduler(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *(host(c.id, name=f"h{n}") for n in range(3)))
        await hosts_known(bus, 3)
        ask = placing(c.id)
        answers = await asyncio.gather(*(bus.ask(PLACE, ask) for _ in range(40)))
        assert len({a.host_id for a in answers}) == 1
        assert len({a.decision_id for a in answers}) == 1
        assert len(await claims(bus)) == 1


async def test_two_schedulers_never_promise_more_than_there_is(
    configured: Settings, database: DatabaseConfig
) -> None:
    """Room for 3 × 7 VMs, 60 asked for at once through two replicas; counted from the claims themselves."""
    owner, c = inventory(), cluster(cpu_overcommit_ratio=100.0)
    room = RESERVE + 7 * (GIB + OVERHEAD) + GIB // 2
    hosts = [host(c.id, name=f"h{n}", memory_bytes=room) for n in range(3)]
    async with running(configured, owner.service(), scheduler(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, 3)
        asks = [placing(c.id) for _ in range(60)]
        answers = await asyncio.gather(*(bus.ask(PLACE, ask) for ask in asks))
        placed = [a for a in answers if a.host_id]
        assert len(placed) == 21
        assert all(a.claimed for a in placed)
        refused = [a for a in answers if not a.host_id]
        assert all("no host of cluster Default can take VM web" in a.message for a in refused)

        connection = await asyncpg.connect(
            database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
        )
        rows = await connection.fetch(
            "select (doc::json->>'host_id') as h, sum((doc::json->>'memory_bytes')::bigint) as m from claim group by 1"
        )
        await connection.close()
        assert {r["h"] for r in rows} == {h.id for h in hosts}
        assert all(r["m"] <= room - RESERVE for r in rows)
        used = await capacities(bus)
        assert {r["h"]: r["m"] for r in rows} == {h: u.memory_used_bytes for h, u in used.items()}

        # What one gives back, another gets.
        gone = placed[0]
        await bus.ask(RELEASE_CLAIM, ClaimKey(vm_id=gone.vm_id, epoch=1))
        again = await bus.ask(PLACE, placing(c.id))
        assert again.host_id == gone.host_id


async def test_a_dry_run_explains_and_claims_nothing(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    up, small = host(c.id, name="up"), host(c.id, name="small", memory_bytes=GIB)
    down = host(c.id, name="down", status=HostStatus.MAINTENANCE)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, up, small, down)
        await hosts_known(bus, 3)
        seen = await bus.ask(PLACE, placing(c.id, memory_bytes=2 * GIB, place={"dry_run": True}))
        assert not seen.claimed
        assert seen.host_id == up.id
        assert await claims(bus) == []
        by_name = {h.name: h for h in seen.hosts}
        assert [v.rule for v in by_name["small"].verdicts] == ["memory"]
        assert [v.rule for v in by_name["down"].verdicts] == ["host_state"]
        assert by_name["up"].weights.keys() == {
            "cpu_even",
            "memory_even",
            "preferred_hosts",
            "wished_host",
            "avoided_hosts",
            "affinity_vms_wish",
            "affinity_hosts_wish",
            "affinity_room",
            "numa_match",
            "cpus_together",
            "ha_reservation",
        }

        nowhere = await bus.ask(PLACE, placing(c.id, place={"dry_run": True, "target_host_id": down.id}))
        assert nowhere.host_id == ""
        assert "down is maintenance, not up" in nowhere.message
        unknown = await bus.ask(PLACE, placing(c.id, place={"dry_run": True, "target_host_id": "nobody"}))
        assert "there is no host nobody" in unknown.message


async def test_a_decision_is_readable_later_as_it_was_explained(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *(host(c.id, name=f"h{n}") for n in range(120)))
        await hosts_known(bus, 120)
        placed = await bus.ask(PLACE, placing(c.id))
        assert (len(placed.hosts), placed.considered, placed.fitting) == (NAMED_HOSTS, 120, 120)
        kept = await bus.ask(GET_DECISION, GetDecision(id=placed.decision_id))
        assert kept == placed
        refused = await bus.ask(PLACE, placing(c.id, memory_bytes=GIB * 100))
        kept = await bus.ask(GET_DECISION, GetDecision(id=refused.decision_id))
        assert (kept.host_id, len(kept.hosts)) == ("", 100)
        assert all(h.verdicts[0].rule == "memory" for h in kept.hosts)
        assert kept.excluded_by == {"memory": 120}
        assert [r.kind for r in kept.remedies] == ["vm"]
        assert "115 more were excluded by: memory 115" in kept.message
        assert "What would help: give VM web at most 15.7 GiB of memory instead of 100.0 GiB" in kept.message
        with pytest.raises(Refused) as missing:
            await bus.ask(GET_DECISION, GetDecision(id="nothing"))
        assert missing.value.kind is Kind.NOT_FOUND


async def test_where_a_vm_was_placed_is_listed_the_newest_first_in_pages(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, host(c.id, name="h1"))
        await hosts_known(bus, 1)
        ask = placing(c.id)
        made = [await bus.ask(PLACE, replace(ask, epoch=epoch)) for epoch in (1, 2)]
        made.append(await bus.ask(PLACE, replace(ask, epoch=3, need=replace(ask.need, vcpus=100))))
        await bus.ask(PLACE, placing(c.id, name="other"))
        await bus.ask(PLACE, replace(ask, epoch=4, dry_run=True))

        listed, query = [], ListQuery(limit=2, filter={"vm_id": ask.need.vm_id})
        for pages in (1, 2):
            page = await bus.ask(LIST_DECISIONS, query)
            listed += [msgspec.json.decode(item, type=PastDecision) for item in page.items]
            assert bool(page.next) == (pages == 1)
            query = replace(query, page=page.next)
        assert [d.id for d in listed] == [p.decision_id for p in reversed(made)]
        assert [d.host_name for d in listed] == ["", "h1", "h1"]
        assert [(d.vm_name, d.epoch, d.purpose) for d in listed[:1]] == [("web", 3, Purpose.START)]
        assert listed[0].message == made[2].message
        whole = await bus.ask(LIST_DECISIONS, ListQuery(order_by="id"))
        assert [msgspec.json.decode(i, type=PastDecision).vm_name for i in whole.items] == [
            *["web"] * 3,
            "other",
        ]


async def test_the_fleet_follows_hosts_clusters_and_networks(configured: Settings) -> None:
    owner, networks, c = inventory(), network_owner(), cluster()
    h1, h2 = host(c.id, name="h1"), host(c.id, name="h2")
    lan = network("lan", ready_host_ids=(h1.id,))
    async with running(configured, owner.service(), networks.service(), scheduler(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1, h2)
        await networks.says(NETWORK_CHANGED, lan)

        async def chosen(**need: object) -> str:
            """What both replicas say, once they agree."""
            ask = placing(c.id, place={"dry_run": True}, **need)
            return ",".join(sorted({(await bus.ask(PLACE, ask)).host_id for _ in range(8)}))

        async def becomes(expected: str, **need: object) -> None:
            async def same() -> bool:
                return await chosen(**need) == expected

            await until(same)

        await becomes(h1.id, network_ids=(lan.id,))
        await networks.says(NETWORK_CHANGED, replace(lan, revision=2, ready_host_ids=(h2.id,)))
        await becomes(h2.id, network_ids=(lan.id,))
        await owner.says(HOST_CHANGED, replace(h2, revision=2, status=HostStatus.MAINTENANCE))
        await becomes("", network_ids=(lan.id,))
        await becomes(h1.id)
        await becomes("", memory_bytes=20 * GIB)
        await owner.says(CLUSTER_CHANGED, replace(c, revision=2, memory_overcommit_percent=200))
        await becomes(h1.id, memory_bytes=20 * GIB)
        await owner.says(HOST_DELETED, replace(h1, revision=2))
        await becomes("")


async def test_a_scheduler_that_missed_every_fact_lists_its_owners(configured: Settings) -> None:
    owner, networks, c = inventory(), network_owner(), cluster()
    h1 = host(c.id, name="h1")
    lan = network("lan", ready_host_ids=(h1.id,))
    owner.knows(c, h1)
    networks.knows(lan)
    async with running(configured, owner.service(), networks.service(), scheduler()) as bus:

        async def placed() -> bool:
            ask = placing(c.id, network_ids=(lan.id,), place={"dry_run": True})
            return (await bus.ask(PLACE, ask)).host_id == h1.id

        await until(placed)


async def test_a_restarted_scheduler_knows_its_fleet_and_claims(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    h1 = host(c.id, name="h1", memory_bytes=RESERVE + 2 * GIB)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1)
        await hosts_known(bus, 1)
        first = placing(c.id)
        assert (await bus.ask(PLACE, first)).host_id == h1.id
    async with running(configured, scheduler()) as bus:
        refused = await bus.ask(PLACE, placing(c.id))
        assert refused.host_id == ""
        assert "h1 has 959 MiB left" in refused.message
        assert (await bus.ask(PLACE, first)).host_id == h1.id


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"vcpus": 0}, "0 vCPUs"),
        ({"memory_bytes": -1}, "-1 bytes"),
        ({"memory_bytes": 1 << 62}, "bytes of memory"),
        ({"vm_id": ""}, "names its VM"),
    ],
)
async def test_impossible_needs_are_refused(configured: Settings, wrong: dict, says: str) -> None:
    async with running(configured, scheduler()) as bus:
        with pytest.raises(Refused) as refused:
            await bus.ask(PLACE, placing("c", **wrong))
        assert refused.value.kind is Kind.INVALID
        assert says in refused.value.message


async def test_room_is_found_for_many_and_nothing_is_claimed(configured: Settings) -> None:
    owner, c = inventory(), cluster()
    h1, h2 = host(c.id, name="h1"), host(c.id, name="h2", memory_bytes=4 * GIB)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1, h2)
        await hosts_known(bus, 2)
        small, large = placing(c.id).need, placing(c.id, memory_bytes=8 * GIB).need
        asks = (RoomFor(need=small), RoomFor(need=large, excluded_host_ids=(h1.id,)))
        first, second = (await bus.ask(FIND_ROOM, FindRoom(asks=asks))).rooms
        assert (first.vm_id, first.hosts, first.fitting, first.nearest) == (small.vm_id, 2, 2, None)
        assert (second.hosts, second.up, second.fitting) == (1, 1, 0)
        assert second.nearest is not None
        assert [v.rule for v in second.nearest.verdicts] == ["memory"]
        assert await claims(bus) == []
        with pytest.raises(Refused, match="at most 200"):
            await bus.ask(FIND_ROOM, FindRoom(asks=asks * 101))


async def test_a_host_that_has_less_than_it_promised_keeps_its_vms_and_says_so(
    configured: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    owner, c = inventory(), cluster()
    h1, other = host(c.id, name="h1"), host(c.id, name="h2", memory_bytes=8 * GIB)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, h1, other)
        await hosts_known(bus, 2)
        asks = [
            placing(c.id, memory_bytes=4 * GIB, vcpus=2, place={"target_host_id": h1.id}) for _ in range(3)
        ]
        for ask in asks:
            assert (await bus.ask(PLACE, ask)).claimed
        assert {k.problem for k in (await capacities(bus)).values()} == {""}

        less = replace(h1.capabilities, memory_bytes=8 * GIB, cpus=8)
        await owner.says(HOST_CHANGED, replace(h1, revision=2, capabilities=less))
        problem = (
            "h1 has promised more than it has: 12.2 GiB of memory, of 7.8 GiB (4.4 GiB too much). Its VMs run on, and it gets no "
            "further ones; move some away"
        )

        async def said() -> bool:
            return (await capacities(bus))[h1.id].problem.startswith(problem)

        await until(said)
        await until(lambda: _is_logged(caplog, problem))
        assert len(await claims(bus)) == 3
        assert (await bus.ask(PLACE, placing(c.id))).host_id == other.id
        for ask in asks[:2]:
            await bus.ask(RELEASE_CLAIM, ClaimKey(vm_id=ask.need.vm_id, epoch=1))
        assert (await capacities(bus))[h1.id].problem == ""
        assert (await bus.ask(PLACE, placing(c.id, place={"target_host_id": h1.id}))).claimed


async def _is_logged(caplog: pytest.LogCaptureFixture, line: str) -> bool:
    return any(record.getMessage().startswith(line) for record in caplog.records)
