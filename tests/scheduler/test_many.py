"""Many VMs in one call: those of a hard group on one host or nowhere, all others as if one by one, whoever races."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from services.scheduler import many
from services.scheduler.policies.affinity import ClusterRules
from tests.scheduler.fleets import (
    GIB,
    MIB,
    OVERHEAD,
    RESERVE,
    capacities,
    host,
    hosts_known,
    placing,
    until,
)
from tests.scheduler.test_affinity_groups import APART, CALLER, TOGETHER, Place_, need, site
from tests.scheduler.test_cpus import machine
from tests.scheduler.test_rounds import caller, fetch, held
from volery.contracts.agent import HostCapabilities
from volery.contracts.cluster import CLUSTER_CHANGED, AdmissionControl
from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED
from volery.contracts.scheduling import (
    GET_DECISION,
    PLACE_MANY,
    GetDecision,
    Need,
    Place,
    PlaceMany,
    Placement,
    Purpose,
)
from volery.contracts.vm import Vm, VmStatus
from volery.runtime.bus import Caller
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings


def room(*gib: int) -> int:
    """A host's memory that has room for VMs of these sizes and no more."""
    return RESERVE + sum(each * GIB + OVERHEAD for each in gib)


async def place_many(
    at: Place_, vms: Sequence[Vm], epoch: int = 1, who: Caller | None = None, **fields: Any
) -> list[Placement]:
    places = tuple(Place(need=need(v), epoch=epoch) for v in vms)
    return await ask(at, PlaceMany(places=places, **fields), who)


async def ask(at: Place_, question: PlaceMany, who: Caller | None = None) -> list[Placement]:
    answer = await at.bus.ask(PLACE_MANY, question, who or caller())
    assert [p.vm_id for p in answer.placements] == [p.need.vm_id for p in question.places]
    return list(answer.placements)


def sized(at: Place_, *gib: int) -> list[Vm]:
    """The site's first VMs, with these sizes."""
    return [replace(v, memory_bytes=each * GIB) for v, each in zip(at.vms, gib, strict=False)]


async def test_a_group_that_fits_nowhere_together_is_refused_whole_and_placed_when_there_is_room(
    configured: Settings, database: DatabaseConfig
) -> None:
    async with site(configured, 3, 4, memory_bytes=room(2, 2)) as at:
        a, b, c, other = sized(at, 2, 2, 1, 1)
        await at.group("web", a, b, c, **TOGETHER)
        *unit, alone = await place_many(at, [a, b, c, other])
        assert alone.claimed
        assert [p.host_id for p in unit] == ["", "", ""]
        first = unit[0]
        assert "no host of cluster Default can take VM vm0 together with vm1 and vm2" in first.message
        assert "h0 has 4.1 GiB left of 4.1 GiB" in first.message or "h1 has 4.1 GiB left" in first.message
        assert (
            f"needs {(5 * GIB + 3 * OVERHEAD) / GIB:.1f} GiB ({3 * OVERHEAD // MIB} MiB of it overhead)"
            in (first.message)
        )
        assert "affinity group web keeps them on one host" in first.message
        assert first.together == (b.id, c.id)
        assert first.excluded_by == {"memory": 3}
        assert {r.kind for r in first.remedies} >= {
            "cluster"
        }  # no host is large enough: none can free so much
        assert set(await held(database)) == {alone.host_id}
        kept = await at.bus.ask(GET_DECISION, GetDecision(id=first.decision_id))
        assert len(kept.hosts) == 3
        assert kept.hosts[0].verdicts[0].rule == "memory"

        large = host(at.cluster.id, name="large", memory_bytes=room(2, 2, 1))
        await at.owner.says(HOST_CHANGED, large)
        await hosts_known(at.bus, 4)
        placed = await place_many(at, [a, b, c], epoch=2)
        assert {p.host_id for p in placed} == {large.id}
        assert all(p.claimed for p in placed)
        assert placed[0].message == (
            "VM vm0 together with vm1 and vm2 is placed on large, the only one that fits, of 4 in cluster Default; "
            "affinity group web keeps them together"
        )
        assert (await held(database))[large.id][2] == 3


async def test_the_smallest_change_named_for_a_group_lets_it_be_placed(configured: Settings) -> None:
    """One MiB less, and it is still refused."""
    async with site(configured, 1, 3, memory_bytes=room(2, 2, 1)) as at:
        a, b, there = sized(at, 2, 2, 2)
        await at.group("web", a, b, **TOGETHER)
        (taken,) = await place_many(at, [there])
        unit = await place_many(at, [a, b])
        (remedy,) = [r for r in unit[0].remedies if r.kind == "host"]
        (change,) = remedy.changes
        assert (change.field, change.unit) == ("memory_used_bytes", "bytes")
        assert change.amount == GIB
        for less, claimed in ((1, False), (0, True)):
            small = replace(there, memory_bytes=2 * GIB - change.amount + less)
            (taken,) = await place_many(at, [small], epoch=taken.epoch + 1)
            assert taken.claimed
            unit = await place_many(at, [a, b], epoch=taken.epoch)
            assert [p.claimed for p in unit] == [claimed, claimed]


async def test_what_runs_already_pins_the_place(configured: Settings) -> None:
    async with site(configured, 3, 3, memory_bytes=room(1, 1, 1)) as at:
        a, b, c = at.vms
        await at.group("web", a, b, c, **TOGETHER)
        first = await at.place(a, target_host_id=at.hosts[2].id)
        placed = await place_many(at, [b, c])
        assert {p.host_id for p in placed} == {first.host_id}
        again = await place_many(at, [a, b, c])
        assert {p.host_id for p in again} == {first.host_id}
        assert again[0].decision_id == first.decision_id


async def test_where_they_ran_before_does_not_part_them(
    configured: Settings, database: DatabaseConfig
) -> None:
    """They are started anew, so they run nowhere, whatever was heard of them last; and their old claims are given back."""
    async with site(configured, 3, 2) as at:
        a, b = at.vms
        for v, h in ((a, at.hosts[0]), (b, at.hosts[1])):
            assert (await at.place(v, target_host_id=h.id)).claimed
            await at.says(v, status=VmStatus.UP, host_id=h.id, epoch=1)
        await at.group("web", a, b, **TOGETHER)

        async def heard() -> bool:
            rows = await at.schedulers[0].core.pool.fetch("select status from vm")
            return [r["status"] for r in rows] == ["up", "up"]

        await until(heard)
        placed = await place_many(at, [a, b], epoch=2)
        assert all(p.claimed for p in placed), placed[0].message
        assert len({p.host_id for p in placed}) == 1
        sums = await held(database)
        assert {host_id: found[2] for host_id, found in sums.items()} == {placed[0].host_id: 2}


async def test_a_dead_hosts_group_is_brought_back_on_one_host_though_one_by_one(configured: Settings) -> None:
    """As ha asks. Two hosts are emptier, and have room for two of the three."""
    async with site(configured, 2, 3, memory_bytes=room(1, 1)) as at:
        large = host(at.cluster.id, name="large", memory_bytes=room(16, 1, 1, 1))
        await at.owner.says(HOST_CHANGED, large)
        await hosts_known(at.bus, 3)
        (filler,) = await ask(at, PlaceMany(places=(placing(at.cluster.id, memory_bytes=16 * GIB),)))
        assert filler.host_id == large.id
        (lone,) = await ask(at, PlaceMany(places=(placing(at.cluster.id),), dry_run=True))
        assert lone.host_id != large.id
        await at.group("web", *at.vms, **TOGETHER)
        back = [await at.place(v, purpose=Purpose.RESTART) for v in at.vms]
        assert [p.host_id for p in back] == [large.id] * 3


async def test_groups_that_share_a_vm_are_one_and_rivals_stay_apart(configured: Settings) -> None:
    async with site(configured, 3, 6) as at:
        a, b, c, x, y, z = at.vms
        await at.group("web", a, b, **TOGETHER)
        await at.group("app", b, c, **TOGETHER)
        await at.group("other", x, y, **TOGETHER)
        await at.group("apart", c, y, z, **APART)
        hosts = {p.vm_id: p.host_id for p in await place_many(at, [z, a, x, b, y, c])}
        assert len({hosts[v.id] for v in (a, b, c)}) == 1
        assert len({hosts[v.id] for v in (x, y)}) == 1
        assert len({hosts[v.id] for v in (c, y, z)}) == 3


async def test_members_filters_count_each_for_itself(configured: Settings) -> None:
    """One is pinned to two hosts, another to two: the one host that both have takes them."""
    async with site(configured, 4, 3) as at:
        a, b, c = at.vms
        await at.group("web", a, b, c, **TOGETHER)
        ids = [h.id for h in at.hosts]
        needs = [
            replace(need(a), host_ids=(ids[0], ids[1])),
            replace(need(b), host_ids=(ids[1], ids[2])),
            need(c),
        ]
        places = tuple(Place(need=each, epoch=1) for each in needs)
        placed = await ask(at, PlaceMany(places=places))
        assert {p.host_id for p in placed} == {ids[1]}
        needs[1] = replace(needs[1], host_ids=(ids[2],))
        places = tuple(Place(need=each, epoch=2) for each in needs)
        refused = await ask(at, PlaceMany(places=places))
        assert not any(p.host_id for p in refused)
        assert "VM vm0 is pinned to 2 other hosts" in refused[0].message
        assert "VM vm1 is pinned to 1 other host" in refused[0].message


async def test_a_repeat_has_the_first_answer_with_or_without_its_id(
    configured: Settings, database: DatabaseConfig
) -> None:
    async with site(configured, 2, 3, memory_bytes=room(1, 1, 1)) as at:
        await at.group("web", *at.vms, **TOGETHER)
        who = caller()
        first, second = await asyncio.gather(place_many(at, at.vms, who=who), place_many(at, at.vms, who=who))
        assert first == second
        assert await place_many(at, at.vms, who=who) == first
        assert await place_many(at, at.vms) == first
        assert sum(found[2] for found in (await held(database)).values()) == 3
        huge, who = PlaceMany(places=(placing(at.cluster.id, memory_bytes=64 * GIB),)), caller()
        refused = await ask(at, huge, who)
        assert not refused[0].host_id
        assert await ask(at, huge, who) == refused  # the same decision


async def test_a_dry_run_says_what_would_be_and_claims_nothing(
    configured: Settings, database: DatabaseConfig
) -> None:
    async with site(configured, 2, 4, memory_bytes=room(1, 1)) as at:
        a, b, *others = at.vms
        await at.group("web", a, b, **TOGETHER)
        vms = [*others, a, b]
        tried = await place_many(at, vms, dry_run=True)
        assert await held(database) == {}
        assert not any(p.claimed for p in tried)
        assert Counter(bool(p.host_id) for p in tried) == {
            True: 2,
            False: 2,
        }  # one on each host, and then no room for two
        placed = await place_many(at, vms)
        assert [p.host_id for p in placed] == [p.host_id for p in tried]


async def test_all_or_nothing(configured: Settings, database: DatabaseConfig) -> None:
    async with site(configured, 2, 5, memory_bytes=room(1, 1)) as at:
        for dry_run in (True, False):
            refused = await place_many(at, at.vms, all_or_nothing=True, dry_run=dry_run)
            assert not any(p.host_id for p in refused)
            assert await held(database) == {}
            assert "isn't placed, though a host would take it" in refused[0].message
            assert "no host of cluster Default can take VM vm4" in refused[0].message
        placed = await place_many(at, at.vms[:4], all_or_nothing=True)
        assert all(p.claimed for p in placed)
        # Who was placed before keeps its place when the others find none.
        again = await place_many(at, at.vms, all_or_nothing=True)
        assert [p.host_id for p in again[:4]] == [p.host_id for p in placed]
        assert again[4].host_id == ""


async def test_too_many_and_the_same_twice_are_refused(configured: Settings) -> None:
    async with site(configured, 1, 1) as at:
        many_of_them = tuple(placing(at.cluster.id) for _ in range(many.MOST + 1))
        cases = [
            (PlaceMany(places=many_of_them), "at most 500 VMs are placed in one call, not 501"),
            (PlaceMany(places=(many_of_them[0],) * 2), "is named twice"),
            (PlaceMany(places=(placing(at.cluster.id, vcpus=0),)), "has 0 vCPUs"),
        ]
        for question, words in cases:
            with pytest.raises(Refused, match=words) as refused:
                await at.bus.ask(PLACE_MANY, question, CALLER)
            assert refused.value.kind is Kind.INVALID
        assert (await at.bus.ask(PLACE_MANY, PlaceMany(places=()), CALLER)).placements == ()


async def test_500_vms_in_one_call_never_exceed_any_host(
    configured: Settings, database: DatabaseConfig
) -> None:
    """More than there is room for, some of them in groups; spread as one by one."""
    async with site(configured, 8, 60, replicas=2, memory_bytes=room(*[1] * 40)) as at:
        for n in range(0, 60, 6):
            await at.group(f"g{n}", *at.vms[n : n + 6], **TOGETHER)
        others = [placing(at.cluster.id) for _ in range(440)]
        places = [*others, *(Place(need=need(v), epoch=1) for v in at.vms)]
        random.Random(1).shuffle(places)
        placed = await ask(at, PlaceMany(places=tuple(places)))
        sums = await held(database)
        limit = room(*[1] * 40) - RESERVE
        assert {h: m <= limit for h, (m, *_) in sums.items()} == dict.fromkeys(sums, True)
        assert Counter(p.host_id for p in placed if p.claimed) == {h: found[2] for h, found in sums.items()}
        assert sum(found[2] for found in sums.values()) > 300
        by_vm = {p.vm_id: p.host_id for p in placed}
        for n in range(0, 60, 6):
            assert len({by_vm[v.id] for v in at.vms[n : n + 6]}) == 1


@pytest.mark.parametrize("grouped", [False, True])
async def test_500_refusals_are_one_answer(configured: Settings, grouped: bool) -> None:
    """Each with its sentence and what would help, on a bus whose messages have an end."""
    async with site(configured, 12, 500 if grouped else 0, memory_bytes=room(4)) as at:
        needs = [need(v) for v in at.vms] or [placing(at.cluster.id).need for _ in range(500)]
        needs = [
            replace(each, memory_bytes=64 * GIB, name=f"a-name-of-some-length-{n}")
            for n, each in enumerate(needs)
        ]
        if grouped:
            await at.group("all", *at.vms, **TOGETHER)
        answers = await ask(at, PlaceMany(places=tuple(Place(need=each, epoch=1) for each in needs)))
        assert not any(p.host_id for p in answers)
        assert all("What would help" in p.message or grouped for p in answers)


async def test_few_of_them_are_spread_as_if_they_came_one_after_the_other(configured: Settings) -> None:
    async with site(configured, 5, 0) as at:
        placed = await ask(at, PlaceMany(places=tuple(placing(at.cluster.id) for _ in range(50))))
        assert set(Counter(p.host_id for p in placed).values()) == {10}


@pytest.mark.parametrize("replicas", [1, 3])
async def test_racing_calls_place_no_group_by_half_and_exceed_no_host(
    configured: Settings, database: DatabaseConfig, replicas: int
) -> None:
    """Forty calls at once, each of some groups and some lone VMs, of which half find room."""
    dice = random.Random(replicas)
    async with site(configured, 4, 80, replicas=replicas, memory_bytes=room(*[1] * 28)) as at:
        groups = [at.vms[n : n + 4] for n in range(0, 80, 4)]
        for n, vms in enumerate(groups):
            await at.group(f"g{n}", *vms, **TOGETHER)

        async def one(vms: Sequence[Vm]) -> None:
            lone = [placing(at.cluster.id, memory_bytes=dice.choice((1, 2)) * GIB) for _ in range(2)]
            own = [Place(need=need(v), epoch=1) for v in vms]
            await ask(at, PlaceMany(places=(*own[:2], *lone, *own[2:])))

        await asyncio.gather(*(one(vms) for vms in groups), *(one(vms) for vms in groups))
        sums = await held(database)
        assert all(memory <= room(*[1] * 28) - RESERVE for memory, *_ in sums.values())
        rows = await fetch(database, "select vm_id, host_id from claim")
        hosts: dict[str, set[str]] = {}
        for row in rows:
            hosts.setdefault(row["vm_id"], set()).add(row["host_id"])
        whole = 0
        for vms in groups:
            found = [hosts.get(v.id, set()) for v in vms]
            assert all(each == found[0] for each in found), (
                "a group is on several hosts, or only half of it is placed"
            )
            whole += bool(found[0])
        assert 0 < whole < len(groups)


async def test_halves_of_a_group_that_race_on_several_replicas_meet_on_one_host(configured: Settings) -> None:
    async with site(configured, 4, 48, replicas=3, memory_bytes=64 * GIB) as at:
        groups = [at.vms[n : n + 4] for n in range(0, 48, 4)]
        for n, vms in enumerate(groups):
            await at.group(f"g{n}", *vms, **TOGETHER)
        halves = [half for vms in groups for half in (vms[:2], vms[2:])]
        placed = [p for each in await asyncio.gather(*(place_many(at, h) for h in halves)) for p in each]
        assert [p.message for p in placed if not p.claimed] == []
        hosts = {p.vm_id: p.host_id for p in placed}
        assert [len({hosts[v.id] for v in vms}) for vms in groups] == [1] * len(groups)


@pytest.mark.parametrize("seed", range(6))
async def test_a_group_is_placed_exactly_when_some_host_takes_all_of_it(
    configured: Settings, database: DatabaseConfig, seed: int
) -> None:
    """Against trying every host by plain sums of what the claims' documents say, in twenty calls."""
    dice = random.Random(seed)
    async with site(configured, 3, 60) as at:
        ratio = dice.choice((1.0, 2.0, 100.0))
        hosts = [
            replace(
                old,
                revision=2,
                capabilities=replace(
                    old.capabilities,
                    memory_bytes=room(*[1] * dice.randrange(2, 9)),
                    cpus=dice.choice((2, 4)),
                ),
            )
            for old in at.hosts
        ]
        await at.owner.says(CLUSTER_CHANGED, replace(at.cluster, revision=2, cpu_overcommit_ratio=ratio))
        await at.owner.says(HOST_CHANGED, *hosts)

        async def limited() -> bool:
            known = {c.host_id: (c.memory_bytes, c.vcpus_limit) for c in (await capacities(at.bus)).values()}
            fleet = at.schedulers[0].fleet
            seen = zip(fleet.ids, fleet.ints("memory_limit"), fleet.ints("vcpus_limit"), strict=True)
            expected = {
                h.id: (h.capabilities.memory_bytes - RESERVE, int(h.capabilities.cpus * ratio)) for h in hosts
            }
            return known == expected == {i: (int(m), int(v)) for i, m, v in seen}

        await until(limited)
        at_once = list(at.vms)
        verdicts = Counter[bool]()
        for number in range(20):
            vms = [at_once.pop() for _ in range(dice.randrange(1, 4))]
            await at.group(f"g{number}", *vms, **TOGETHER)
            needs = [
                replace(
                    need(v),
                    memory_bytes=dice.choice((1, 1, 2)) * GIB,
                    vcpus=dice.choice((1, 1, 2)),
                    host_ids=tuple(h.id for h in dice.sample(hosts, 2)) if dice.random() < 0.3 else (),
                )
                for v in vms
            ]
            sums = await held(database)
            possible = [h.id for h in hosts if takes(h, needs, sums.get(h.id, (0, 0)), ratio)]
            placed = await ask(at, PlaceMany(places=tuple(Place(need=each, epoch=1) for each in needs)))
            found = {p.host_id for p in placed}
            assert len(found) == 1
            assert (found.pop() in possible) if possible else found == {""}, placed[0].message
            verdicts[bool(possible)] += 1
        assert len(verdicts) == 2, "the fleet was never full, or always"


def takes(h: Any, needs: Sequence[Need], used: Sequence[int], ratio: float) -> bool:
    memory = used[0] + sum(n.memory_bytes + OVERHEAD for n in needs)
    vcpus = used[1] + sum(n.vcpus for n in needs)
    return (
        memory <= h.capabilities.memory_bytes - RESERVE
        and vcpus <= int(h.capabilities.cpus * ratio)
        and all(n.vcpus <= h.capabilities.cpus for n in needs)
        and all(h.id in n.host_ids or not n.host_ids for n in needs)
    )


async def test_a_group_that_this_replica_has_not_heard_of_is_kept(
    configured: Settings, database: DatabaseConfig
) -> None:
    """It knows the rules of before: the guard says so, and who must be together is asked again."""
    async with site(configured, 4, 4, memory_bytes=room(1, 1)) as at:
        await at.group("web", *at.vms, **TOGETHER)
        (mine,) = at.schedulers
        known = mine.rules[at.cluster.id]
        mine.rules[at.cluster.id] = ClusterRules(known.revision - 1, ())
        placed = await place_many(at, at.vms)
        assert not any(p.host_id for p in placed), "four fit on no host together"
        assert await held(database) == {}


DEDICATED = CpuPinning(policy=PinningPolicy.DEDICATED)


@pytest.mark.parametrize("why", ["own CPUs", "a promise"])
async def test_those_that_are_claimed_one_by_one_are_given_back_when_one_does_not_fit(
    configured: Settings, database: DatabaseConfig, why: str
) -> None:
    """Three need six CPUs of four; or under a promise more memory than a host has."""
    built = HostCapabilities(
        memory_bytes=room(8 if why == "own CPUs" else 1, 1), cpus=4, machines=("q35",), cores=machine(1, 4, 1)
    )
    async with site(configured, 2, 3, capabilities=built) as at:
        if why == "a promise":
            promise: dict[str, Any] = {
                "reserve_host_failures": 1,
                "admission_control": AdmissionControl.WARN,
            }
            await at.owner.says(CLUSTER_CHANGED, replace(at.cluster, revision=2, **promise))
            (mine,) = at.schedulers

            async def promised() -> bool:
                return mine.policy(at.cluster.id).promises

            await until(promised)
        await at.group("web", *at.vms, **TOGETHER)

        def question(count: int, epoch: int, **fields: Any) -> PlaceMany:
            alone = {"vcpus": 2, "cpu_pinning": DEDICATED} if why == "own CPUs" else {}
            needs = [replace(need(v), **alone) for v in at.vms[:count]]
            return PlaceMany(places=tuple(Place(need=n, epoch=epoch) for n in needs), **fields)

        refused = await ask(at, question(3, 1))
        assert not any(p.host_id for p in refused)
        assert (await fetch(database, "select * from claim")) == []
        assert [c.memory_used_bytes for c in (await capacities(at.bus)).values()] == [0, 0]
        placed = await ask(at, question(2, 2))
        assert all(p.claimed for p in placed), placed[0].message
        assert len({p.host_id for p in placed}) == 1
        with pytest.raises(Refused, match="placed one after the other, so all or none"):
            await ask(at, question(2, 3, all_or_nothing=True))
        assert len(await fetch(database, "select * from claim")) == 2
