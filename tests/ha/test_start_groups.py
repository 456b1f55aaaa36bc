"""Start groups: what order makes sense, who waits for whom, and VMs that are brought back in that order."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.ha.policies.start_groups import Member, before, check, circle_of, waits_for
from tests.ha.places import Place, place
from tests.ha.site import caller
from tests.ha.test_restarts import down, restarts
from tests.ha.world import until, vm
from volery.contracts.base import Done
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.start_group import (
    CREATE_START_GROUP,
    DELETE_START_GROUP,
    GET_START_GROUP,
    UPDATE_START_GROUP,
    CreateStartGroup,
    StartGroup,
    UpdateStartGroup,
    WaitFor,
)
from volery.contracts.vm import VM_CHANGED, GuestInfo, Vm, VmStatus
from volery.runtime.programs import Settings

NOW = datetime.now(UTC)


def group(name: str, *vm_ids: str, after: tuple[str, ...] = (), **fields: Any) -> StartGroup:
    made = {"id": name, "revision": 1, "created_at": NOW, "updated_at": NOW, "name": name, "cluster_id": "c"}
    return StartGroup(**(made | {"vm_ids": vm_ids, "after": after} | fields))


def member(**fields: Any) -> Member:
    made = {"name": "db", "status": "down", "desired": "up", "enabled": True, "agent": False}
    return Member(**(made | fields))


BACK = {"status": "up", "brought_back": True}
AWAITED: dict[str, tuple[WaitFor, Member, bool]] = {
    "is down": (WaitFor.RUNS, member(), True),
    "is on its way": (WaitFor.RUNS, member(status="wait_for_launch"), True),
    "its host is silent": (WaitFor.RUNS, member(status="unknown"), True),
    "runs": (WaitFor.RUNS, member(**BACK), False),
    "runs, its agent doesn't answer yet": (WaitFor.GUEST_AGENT, member(**BACK), True),
    "its agent answers": (WaitFor.GUEST_AGENT, member(**BACK, agent=True), False),
    "has run all along without an agent": (WaitFor.GUEST_AGENT, member(status="up"), False),
    "runs, the time isn't over": (WaitFor.TIME, member(**BACK), True),
    "has run all along": (WaitFor.TIME, member(status="up"), False),
    "is wanted down": (WaitFor.RUNS, member(desired="down"), False),
    "isn't highly available": (WaitFor.RUNS, member(enabled=False), False),
    "ha gave up": (WaitFor.RUNS, member(gave_up=True), False),
}


@pytest.mark.parametrize("case", AWAITED)
def test_who_is_awaited(case: str) -> None:
    wait_for, first, awaited = AWAITED[case]
    groups = {
        "db": group("db", "a", wait_for=wait_for, wait_seconds=60),
        "mid": group("mid", after=("db",)),
        "web": group("web", "b", after=("mid",)),
    }
    sentence = waits_for("b", groups, {"a": first}, 59)
    assert bool(sentence) is awaited
    assert not awaited or "VM db of start group db" in sentence
    assert waits_for("b", groups, {"a": first}, 60) == ""
    assert waits_for("a", groups, {"a": first}, 0) == ""


def test_what_is_said_to_run_on_a_host_that_may_be_dead_is_awaited() -> None:
    groups = {"db": group("db", "a"), "web": group("web", "b", after=("db",))}
    members = {"a": member(status="up", host_id="h1")}
    assert waits_for("b", groups, members, 1.0, {"h2"}) == ""
    assert "VM db of start group db" in waits_for("b", groups, members, 1.0, {"h1"})
    assert waits_for("b", groups, members, 600.0, {"h1"}) == ""


NAMES = "abcde"
graphs = st.fixed_dictionaries(
    {name: st.sets(st.sampled_from(NAMES)).map(lambda names: tuple(sorted(names))) for name in NAMES}
)


@settings(max_examples=300, deadline=None)
@given(graphs)
def test_a_circle_is_found_and_named_exactly_when_there_is_one(graph: dict[str, tuple[str, ...]]) -> None:
    known = {name: group(name, name, after=after) for name, after in graph.items()}
    for name, one in known.items():
        reached, open_ = set[str](), list(one.after)
        while open_:
            at = open_.pop()
            if at not in reached:
                reached.add(at)
                open_ += graph[at]
        assert {g.id for g in before(name, known)} == reached - {name}
        circle = circle_of(one, known)
        assert bool(circle) is (name in reached)
        if circle:
            assert circle[0] == circle[-1] == name
            assert all(later in graph[earlier] for earlier, later in itertools.pairwise(circle))
            with pytest.raises(Refused, match="would wait for itself"):
                check(one, list(known.values()))
        else:
            check(one, list(known.values()))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"wait_seconds": 601}, "0 to 600 s"),
        ({"wait_seconds": -1}, "0 to 600 s"),
        ({"wait_seconds": float("nan")}, "0 to 600 s"),
        ({"vm_ids": ("a", "a")}, "twice"),
        ({"after": ("nowhere",)}, "no such start group"),
        ({"after": ("g",)}, "g → g"),
    ],
)
def test_what_can_not_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        check(replace(group("g"), **fields), [])


async def make(at: Place, name: str, *vms: Vm, **fields: Any) -> StartGroup:
    ask = CreateStartGroup(name=name, cluster_id=at.cluster.id, vm_ids=tuple(v.id for v in vms), **fields)
    return await at.bus.ask(CREATE_START_GROUP, ask, caller("make"))


async def asked_for(at: Place, *vms: Vm) -> None:
    wanted = {v.id for v in vms}

    async def all_asked() -> bool:
        return {ask.vm_id for ask, _, _ in at.owner.asked} == wanted

    await until(all_asked)


async def said_to_wait(at: Place, one: Vm, words: str) -> None:
    async def said() -> bool:
        return any(r.vm_id == one.id and words in r.message for r in await restarts(at.bus))

    await until(said)


async def test_a_group_waits_for_the_agents_of_the_one_before(configured: Settings, tmp_path: Path) -> None:
    async with place(configured, tmp_path) as at:
        db, web = (vm(name=n, host_id=at.hosts[0].id, cluster_id=at.cluster.id) for n in ("db", "web"))
        await at.owner.says(VM_CHANGED, db, web)
        first = await make(at, "first", db, wait_for=WaitFor.GUEST_AGENT)
        await make(at, "second", web, after=(first.id,))
        died = [down(each, status_reason="host_died") for each in (web, db)]
        await at.owner.says(VM_CHANGED, *died)
        await said_to_wait(at, web, "it waits for VM db of start group first (guest_agent), at most 600 s")
        await asked_for(at, db)
        up = await at.says_vm(died[1], status=VmStatus.UP, host_id=at.hosts[1].id, epoch=2)
        await at.says_vm(died[0], tags=("looked at again",))
        await asyncio.sleep(1.2)  # a look comes every second
        await asked_for(at, db)
        await at.says_vm(up, guest=GuestInfo(agent_connected=True))
        await asked_for(at, db, web)


async def test_it_waits_no_longer_than_the_group_says(configured: Settings, tmp_path: Path) -> None:
    async with place(configured, tmp_path) as at:
        at.owner.ends_with = Refused(Kind.EXHAUSTED, "no room")
        db, web = (vm(name=n, host_id=at.hosts[0].id, cluster_id=at.cluster.id) for n in ("db", "web"))
        await at.owner.says(VM_CHANGED, db, web)
        first = await make(at, "first", db, wait_seconds=4)
        await make(at, "second", web, after=(first.id,))
        await at.owner.says(VM_CHANGED, *(down(v, status_reason="host_died") for v in (web, db)))
        await said_to_wait(at, web, "at most 4 s")
        await asked_for(at, db)
        await asked_for(at, db, web)


async def test_circles_strangers_and_two_administrators_at_once(configured: Settings, tmp_path: Path) -> None:
    async with place(configured, tmp_path) as at:
        a, b = await make(at, "a"), await make(at, "b")

        async def after(one: StartGroup, other: StartGroup) -> object:
            ask = UpdateStartGroup(id=one.id, after=(other.id,))
            return await at.bus.ask(UPDATE_START_GROUP, ask, caller("after"))

        both = await asyncio.gather(after(a, b), after(b, a), return_exceptions=True)
        (refused,) = [each for each in both if isinstance(each, Refused)]
        assert refused.kind is Kind.CONFLICT
        assert "would wait for itself: " in refused.message
        first = a if isinstance(both[0], Refused) else b
        with pytest.raises(Refused, match="comes before"):
            await at.bus.ask(DELETE_START_GROUP, DeleteById(id=first.id), caller("delete"))
        with pytest.raises(Refused, match="named 'a' already"):
            await make(at, "a")
        with pytest.raises(Refused, match="it is not there"):
            await make(at, "c", vm())
        stranger = vm(cluster_id=new_id())
        at.owner.knows(stranger)
        with pytest.raises(Refused, match="of another cluster"):
            await make(at, "c", stranger)
        second = b if first is a else a
        assert await at.bus.ask(DELETE_START_GROUP, DeleteById(id=second.id), caller("d")) == Done()
        with pytest.raises(Refused, match="there is no start group"):
            await at.bus.ask(GET_START_GROUP, GetById(id=second.id))
