"""Rounds: many placements and releases in one statement, by several replicas at once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import asyncpg
import pytest

from services.scheduler.rounds import AT_ONCE, MOST, Rounds, Waiting
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import (
    GIB,
    OVERHEAD,
    RESERVE,
    cluster,
    host,
    hosts_known,
    inventory,
    placing,
    scheduler,
    until,
)
from tests.support.runtime import running
from volery.contracts.cluster import CLUSTER_CHANGED
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED
from volery.contracts.ids import new_id
from volery.contracts.scheduling import (
    CONFIRM_CLAIM,
    PLACE,
    RELEASE_CLAIM,
    RELEASE_VM_CLAIMS,
    ClaimKey,
    Place,
    Placement,
    ReleaseVm,
)
from volery.runtime.bus import Bus, Caller
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings

HELD = """
    select host_id, sum((doc::json->>'memory_bytes')::bigint)::bigint as memory, sum((doc::json->>'vcpus')::integer)::integer as vcpus,
           count(*)::integer as guests, count(*) filter (where (doc::json->>'high_availability')::boolean)::integer as ha_guests
    from claim group by 1"""


async def fetch(database: DatabaseConfig, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(
        database.dsn, user="scheduler", password="secret", server_settings={"search_path": "scheduler"}
    )
    try:
        return list(await connection.fetch(query))
    finally:
        await connection.close()


async def held(database: DatabaseConfig) -> dict[str, tuple[int, ...]]:
    """Host → what the claims' documents say, which is what the counters must say."""
    sums = {r["host_id"]: tuple(r)[1:] for r in await fetch(database, HELD)}
    counters = await fetch(
        database, "select id, memory_used_bytes, vcpus_used, guests, ha_guests from host_capacity"
    )
    assert {r["id"]: tuple(r)[1:] for r in counters} == {
        r["id"]: sums.get(r["id"], (0, 0, 0, 0)) for r in counters
    }
    return sums


def caller() -> Caller:
    return Caller("service:inventory", new_id(), "x")


async def place(bus: Bus, ask: Place, who: Caller) -> Placement:
    """As every client does on a machine that has too much to do: again under the same id."""
    while True:
        try:
            return await bus.ask(PLACE, ask, who)
        except Refused as refused:
            if refused.kind is not Kind.TIMEOUT:
                raise


@pytest.mark.parametrize(("replicas", "ratio"), [(1, 3.0), (3, 3.0), (3, 100.0)])
async def test_500_parallel_starts_and_their_ends_never_exceed_any_host(
    configured: Settings, database: DatabaseConfig, replicas: int, ratio: float
) -> None:
    """Each start is asked for twice under one id, half of those that were placed are confirmed, and a third end meanwhile."""
    dice, owner, c = random.Random(replicas), inventory(), cluster(cpu_overcommit_ratio=ratio)
    hosts = [
        host(c.id, name=f"h{n}", memory_bytes=dice.randrange(8, 40) * GIB, cpus=dice.choice((4, 8)))
        for n in range(9)
    ]
    opened: list[Scheduler] = []
    programs = [scheduler(opened) for _ in range(replicas)]
    async with running(configured, owner.service(), *programs) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, len(hosts))

        async def life(number: int) -> Placement | None:
            memory, ha = dice.choice((1, 2, 3)) * GIB, number % 2 == 0
            ask, who = (
                placing(c.id, memory_bytes=memory, vcpus=dice.choice((1, 2)), high_availability=ha),
                caller(),
            )
            first, second = await asyncio.gather(place(bus, ask, who), place(bus, ask, who))
            assert first == second
            key = ClaimKey(vm_id=ask.need.vm_id, epoch=1)
            if first.claimed and number % 2:
                await bus.ask_raw(CONFIRM_CLAIM.subject, CONFIRM_CLAIM.encode(key), caller(), 120.0)
            if first.claimed and number % 3 == 0:
                await bus.ask_raw(RELEASE_CLAIM.subject, RELEASE_CLAIM.encode(key), caller(), 120.0)
                return None
            return first

        placed = [
            p for p in await asyncio.gather(*(life(n) for n in range(500))) if p is not None and p.claimed
        ]
        sums = await held(database)
        assert Counter(p.host_id for p in placed) == {host_id: found[2] for host_id, found in sums.items()}
        for each in hosts:
            memory, vcpus, *_ = sums.get(each.id, (0, 0))
            assert memory <= each.capabilities.memory_bytes - RESERVE
            assert vcpus <= each.capabilities.cpus * ratio
        states = await fetch(
            database,
            "select state, (doc::json->>'state') as said, revision, (doc::json->>'revision')::integer as told from claim",
        )
        assert {(r["state"] == r["said"], r["revision"] == r["told"]) for r in states} == {(True, True)}
        assert {(r["state"], r["revision"]) for r in states} == {("tentative", 1), ("confirmed", 2)}
        full = sum(m for m, *_ in sums.values()) / sum(h.capabilities.memory_bytes - RESERVE for h in hosts)
        assert full > 0.5  # there were more of them than room
        for each in opened:
            await each.read_used()
            fleet = each.fleet
            known = {
                i: (int(m), int(v))
                for i, m, v in zip(
                    fleet.ids, fleet.ints("memory_used"), fleet.ints("vcpus_used"), strict=True
                )
            }
            assert known == {h.id: sums.get(h.id, (0, 0))[:2] for h in hosts}


@pytest.mark.parametrize("wrong", ["full", "leaving"])
async def test_a_round_that_believed_too_much_decides_again(
    configured: Settings, database: DatabaseConfig, wrong: str
) -> None:
    """The replica thinks that both hosts are empty and up."""
    owner, c = inventory(), cluster(cpu_overcommit_ratio=100.0)
    room = RESERVE + 20 * (GIB + OVERHEAD)
    bad, good = (host(c.id, name=name, memory_bytes=room) for name in (wrong, "free"))
    opened: list[Scheduler] = []
    async with running(configured, owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, bad, good)
        await hosts_known(bus, 2)
        (mine,) = opened
        await mine.core.pool.execute("alter table host_capacity disable trigger all")  # nobody is told
        if wrong == "full":
            there = [placing(c.id, place={"target_host_id": bad.id}) for _ in range(20)]
            assert all(p.claimed for p in await asyncio.gather(*(bus.ask(PLACE, ask) for ask in there)))
            mine.fleet.ints("memory_used")[:] = 0
        else:
            await mine.core.pool.execute(
                "update host_capacity set status = 'maintenance' where name = $1", wrong
            )
        placed = await asyncio.gather(*(bus.ask(PLACE, placing(c.id)) for _ in range(20)))
        assert {p.host_id for p in placed} == {good.id}
        sums = await held(database)
        assert {h: found[2] for h, found in sums.items()} == {good.id: 20} | (
            {bad.id: 20} if wrong == "full" else {}
        )


async def test_a_vm_ends_and_another_takes_its_place_in_one_round(
    configured: Settings, database: DatabaseConfig
) -> None:
    """On a host with room for one. Whoever is refused because of a claim that is given back later gets it then."""
    owner, c = inventory(), cluster()
    only = host(c.id, name="only", memory_bytes=RESERVE + GIB + OVERHEAD)
    async with running(configured, owner.service(), scheduler()) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, only)
        await hosts_known(bus, 1)
        before = placing(c.id)
        assert (await bus.ask(PLACE, before)).claimed
        for _ in range(10):
            after = placing(c.id)
            release = ReleaseVm(vm_id=before.need.vm_id)
            placed, _ = await asyncio.gather(
                bus.ask(PLACE, after), bus.ask(RELEASE_VM_CLAIMS, release, caller())
            )
            assert placed.claimed, placed.message
            before = after
        assert await held(database) == {only.id: (GIB + OVERHEAD, 1, 1, 0)}


async def test_who_can_never_fit_is_told_at_once_and_who_might_waits_for_room(configured: Settings) -> None:
    configured = replace(configured, environ={"VOLERY_SCHEDULER_REFUSAL_WAIT_SECONDS": "0.5"})
    owner, c = inventory(), cluster()
    only = host(c.id, name="only", memory_bytes=RESERVE + 2 * (GIB + OVERHEAD))
    opened: list[Scheduler] = []
    async with running(configured, owner.service(), scheduler(opened)) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, only)
        await hosts_known(bus, 1)
        first = placing(c.id, memory_bytes=2 * GIB)
        assert (await bus.ask(PLACE, first)).claimed
        (mine,) = opened
        hopeless, hopeful = placing(c.id, memory_bytes=64 * GIB), placing(c.id)
        waits = asyncio.create_task(bus.ask(PLACE, hopeful))
        await until(lambda: _answer(bool(mine.rounds.resting)))
        refused = await bus.ask(PLACE, hopeless)
        assert not refused.claimed
        assert not refused.hopeful
        assert not waits.done()
        await bus.ask(RELEASE_CLAIM, ClaimKey(vm_id=first.need.vm_id, epoch=1))
        assert (await waits).claimed
        assert (await bus.ask(PLACE, placing(c.id, memory_bytes=2 * GIB))).hopeful


async def _answer(value: bool) -> bool:
    return value


# The rounds by themselves


class Toy:
    """Plays rounds when it is told to, and notes who was in which."""

    def __init__(self) -> None:
        self.rounds: list[tuple[str, ...]] = []
        self.go = asyncio.Event()
        self.loses: set[str] = set()
        self.fails: set[str] = set()

    async def play(self, members: Sequence[Waiting]) -> list[Waiting]:
        self.rounds.append(tuple(m.vm_id for m in members))
        await self.go.wait()
        if any(m.vm_id in self.fails for m in members):
            raise OSError("the database is away")
        lost = [m for m in members if m.vm_id in self.loses]
        for member in lost:
            self.loses.discard(member.vm_id)
            member.alone = True
        for member in members:
            if member not in lost:
                member.resolve(member.vm_id)
        return lost


async def ask_all(rounds: Rounds[Waiting], *asked: Waiting) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(rounds.ask(one)) for one in asked]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


async def test_those_who_come_meanwhile_go_together_in_the_order_in_which_they_came() -> None:
    toy = Toy()
    rounds = Rounds(toy.play)
    tasks = await ask_all(rounds, *(Waiting(vm_id=str(n)) for n in range(MOST + 10)))
    assert len(toy.rounds) <= AT_ONCE
    toy.go.set()
    assert await asyncio.gather(*tasks) == [str(n) for n in range(MOST + 10)]
    assert [vm for members in toy.rounds for vm in members] == [str(n) for n in range(MOST + 10)]
    assert max(map(len, toy.rounds)) <= MOST
    assert len(toy.rounds) <= 3


async def test_two_about_one_vm_or_one_group_are_never_at_work_at_once() -> None:
    toy = Toy()
    rounds = Rounds(toy.play)
    group = frozenset({"g"})
    tasks = await ask_all(rounds, Waiting(vm_id="a", keys=group))
    tasks += await ask_all(
        rounds, Waiting(vm_id="b", keys=group), Waiting(vm_id="a"), Waiting(vm_id="c"), Waiting(vm_id="c")
    )
    assert toy.rounds == [("a",), ("c",)]
    toy.go.set()
    assert await asyncio.gather(*tasks) == ["a", "b", "a", "c", "c"]
    assert sorted(vm for members in toy.rounds[2:] for vm in members) == ["a", "b", "c"]


async def test_who_lost_goes_again_before_the_others_and_alone() -> None:
    toy = Toy()
    rounds, toy.loses = Rounds(toy.play), {"b"}
    tasks = await ask_all(rounds, *(Waiting(vm_id=vm) for vm in "abc"))
    toy.go.set()
    assert await asyncio.gather(*tasks) == ["a", "b", "c"]
    assert ("b",) in toy.rounds


async def test_a_round_that_fails_tells_its_own_members_only_and_a_closed_one_nobody_waits_for() -> None:
    toy = Toy()
    rounds, toy.fails = Rounds(toy.play), {"a"}
    tasks = await ask_all(rounds, Waiting(vm_id="a"))
    tasks += await ask_all(rounds, Waiting(vm_id="b"))
    toy.go.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(each) for each in found] == ["the database is away", "b"]
    toy.go.clear()
    (left,) = await ask_all(rounds, Waiting(vm_id="d"))
    await rounds.close()
    with pytest.raises(asyncio.CancelledError):
        await left


async def test_who_rests_is_told_when_that_fails() -> None:
    toy = Toy()
    rounds = Rounds(toy.play)

    async def refuse() -> None:
        raise OSError("gone")

    one = Waiting(vm_id="a")
    rounds.join_after(one, refuse())
    with pytest.raises(OSError, match="gone"):
        await one.answer
