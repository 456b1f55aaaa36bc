"""The rules of affinity groups, held against the plainest thing that says the same: trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.config import SchedulerConfig
from services.scheduler.figures import HostFigures, Measured
from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy, SeenVm
from services.scheduler.policies.affinity import (
    NEGATIVE,
    POSITIVE,
    ClusterRules,
    Group,
    Runs,
    broken,
    conflicts,
    warnings,
)
from services.scheduler.policies.bound import Seat, resolve
from services.scheduler.policies.decision import decide, explain
from services.scheduler.policies.request import request
from services.scheduler.seats import hosts_of
from tests.scheduler import oracle
from tests.scheduler.fleets import GIB, NOW
from volery.contracts.affinity_group import AffinityRule
from volery.contracts.scheduling import Claim, Need, Place

VMS = "abcd"
HOSTS = ("A", "B", "X")
NAMED_HOSTS = ("A", "B")
RULES = list(AffinityRule)


def group(name: str, vms: str = "", hosts: str = "", **fields: Any) -> Group:
    made: dict[str, Any] = {
        "id": name,
        "name": name,
        "priority": 1.0,
        "vm_rule": AffinityRule.DISABLED,
        "vm_enforcing": True,
        "host_rule": AffinityRule.DISABLED,
        "host_enforcing": True,
        "vms": frozenset(vms),
        "hosts": frozenset(hosts),
    }
    return Group(**(made | fields))


def together(name: str, vms: str) -> Group:
    return group(name, vms, vm_rule=POSITIVE)


def apart(name: str, vms: str) -> Group:
    return group(name, vms, vm_rule=NEGATIVE)


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    return [
        group(
            f"g{n}",
            "".join(draw(st.sets(st.sampled_from(VMS), min_size=1))),
            "".join(draw(st.sets(st.sampled_from(NAMED_HOSTS), min_size=1))),
            vm_rule=draw(st.sampled_from(RULES)),
            vm_enforcing=draw(st.sampled_from([True, True, False])),
            host_rule=draw(st.sampled_from(RULES)),
            host_enforcing=draw(st.sampled_from([True, True, False])),
            priority=draw(st.sampled_from([1.0, 2.0, 3.0])),
        )
        for n in range(draw(st.integers(1, 5)))
    ]


def keeps(found: Sequence[Group], at: dict[str, tuple[str, int]]) -> bool:
    """Whether these places keep every enforcing rule. A place is a host and which of many like it."""
    for g in found:
        places = [at[v] for v in g.vms]
        if g.vm_enforcing and g.vm_rule is POSITIVE and len(set(places)) > 1:
            return False
        if g.vm_enforcing and g.vm_rule is NEGATIVE and len(set(places)) < len(places):
            return False
        inside = [host in g.hosts for host, _ in places]
        if g.host_enforcing and g.host_rule is POSITIVE and not all(inside):
            return False
        if g.host_enforcing and g.host_rule is NEGATIVE and any(inside):
            return False
    return True


def every_way() -> Iterator[dict[str, tuple[str, int]]]:
    """Every VM on every host, of which there are as many as needed. The nth VM needs no more than n of a kind."""
    choices = [list(itertools.product(HOSTS, range(n + 1))) for n in range(len(VMS))]
    for places in itertools.product(*choices):
        yield dict(zip(VMS, places, strict=True))


EVERY_WAY = list(every_way())


@settings(max_examples=100, deadline=None)
@given(groups())
def test_groups_contradict_each_other_exactly_when_nothing_keeps_them_all(found: list[Group]) -> None:
    said = conflicts(found)
    assert bool(said) is not any(keeps(found, at) for at in EVERY_WAY)
    for conflict in said:
        assert not any(keeps(conflict.groups, at) for at in EVERY_WAY), conflict
        assert all(g.name in conflict.why for g in conflict.groups)


def test_a_contradiction_names_the_way() -> None:
    found = [together("web", "ab"), together("app", "bc"), together("other", "d"), apart("spread", "acd")]
    (only,) = conflicts(found)
    assert [g.name for g in only.groups] == ["web", "app", "spread"]
    assert only.why == (
        "VM {a} must be on one host with VM {c} and on another: VM {a} is kept together by group web with VM {b}, "
        "group app with VM {c}; group spread keeps the two apart"
    )


def test_a_union_without_a_host_names_only_the_groups_that_take_it() -> None:
    found = [
        group("licence", "a", "A", host_rule=POSITIVE),
        group("wide", "ab", "AB", host_rule=POSITIVE),
        group("broken", "b", "A", host_rule=NEGATIVE),
        together("pair", "ab"),
    ]
    (only,) = conflicts(found)
    assert [g.name for g in only.groups] == ["pair", "broken", "licence"]
    assert only.why == (
        "no host is left for VM {b}: group broken keeps VM {b} off its host; group licence lets VM {a} run on its host "
        "only, and group pair keeps them together"
    )


def test_more_vms_apart_than_hosts_is_said_and_no_contradiction() -> None:
    spread = apart("spread", "abcd")
    assert conflicts([spread]) == []
    (said,) = warnings(spread, ClusterRules(0, (spread,)), {"A", "B", "X"})
    assert said.startswith("it keeps 4 VMs apart, and its cluster has 3 hosts for them: 1 can't run")
    assert warnings(spread, ClusterRules(0, (spread,)), {"A", "B", "X", "Y"}) == ()
    bound = group("bound", "abcd", "AB", host_rule=POSITIVE)
    (said,) = warnings(spread, ClusterRules(0, (spread, bound)), {"A", "B", "X", "Y"})
    assert "has 2 hosts for them: 2 can't run" in said
    (said,) = warnings(bound, ClusterRules(0, (bound,)), {"X"})
    assert said.startswith("none of its hosts is left")


# What one placement is asked


def allowed(found: Sequence[Group], seats: dict[str, Seat], host: str) -> tuple[bool, bool]:
    """Whether VM a may run on this host, by VMs and by hosts."""
    return oracle.allowed(found, seats, "a", host)


def word(found: Sequence[Group], seats: dict[str, Seat], host: str) -> list[float]:
    """The priorities of the wishes of VM a between VMs that this host breaks, highest first."""
    said = []
    for g in found:
        if "a" in g.vms and not g.vm_enforcing and g.vm_rule is not AffinityRule.DISABLED:
            at = {h for v in g.vms - {"a"} if v in seats for h in seats[v].host_ids}
            if at and (host in at) is not (g.vm_rule is POSITIVE):
                said.append(g.priority)
    return sorted(said, reverse=True)


def fleet(hosts: Sequence[str] = HOSTS, memory: int = 8 * GIB) -> Fleet:
    made = Fleet()
    for host in hosts:
        made.put(HostFigures(host, f"h{host}", "c", "up", 8, memory, memory, 0, 80, 0))
    return made


def place(vm_id: str = "a") -> Place:
    return Place(need=Need(vm_id=vm_id, cluster_id="c", memory_bytes=GIB, vcpus=1, name=vm_id), epoch=1)


@st.composite
def seated(draw: st.DrawFn) -> dict[str, Seat]:
    some = draw(st.sets(st.sampled_from(VMS[1:])))
    where = st.frozensets(st.sampled_from(HOSTS), max_size=2)
    return {v: Seat(v, draw(where), GIB, 1) for v in sorted(some)}


@settings(max_examples=120, deadline=None)
@given(groups(), seated())
def test_hosts_are_left_as_one_would_say_it(found: list[Group], seats: dict[str, Seat]) -> None:
    rules, hosts = ClusterRules(0, tuple(found)), fleet()
    around = rules.around("a")
    if around is None:
        assert not any("a" in g.vms for g in found)
        return
    asked = request(place(), ClusterPolicy("c"), SchedulerConfig(), resolve(around, rules, seats))
    decision = decide(hosts, asked)
    for row, host in enumerate(hosts.ids):
        said = decision.masks["affinity_vms"][row], decision.masks["affinity_hosts"][row]
        assert said == allowed(found, seats, host), host
    for verdict in explain(hosts, asked, decision):
        assert verdict.fits or all(v.message and v.change for v in verdict.verdicts)
    scores, words = decision.scores["affinity_vms_wish"], [word(found, seats, h) for h in hosts.ids]
    if any(words):
        for one, other in itertools.product(range(len(words)), repeat=2):
            assert bool(scores[one] > scores[other]) is (words[one] < words[other])
    needed = {v for v in VMS[1:] if v in seats and seats[v].host_ids}
    for v in needed - around.others:  # whose places are not even read
        without = {w: s for w, s in seats.items() if w != v}
        assert [allowed(found, seats, h) for h in HOSTS] == [allowed(found, without, h) for h in HOSTS]


@settings(max_examples=80, deadline=None)
@given(groups())
def test_vms_whose_places_depend_on_each_other_share_a_guard(found: list[Group]) -> None:
    rules = ClusterRules(0, tuple(found))
    for v, w in itertools.combinations(VMS, 2):
        one, other = rules.around(v), rules.around(w)
        if one is not None and w in (one.union | one.rivals.keys()):
            assert other is not None
            assert v in other.union | other.rivals.keys()
            assert set(one.seats) & set(other.seats)


SENTENCES: dict[str, tuple[list[Group], dict[str, Seat], str, str]] = {
    "with": (
        [together("pair", "ab")],
        {"b": Seat("db", frozenset("B"))},
        "affinity group pair keeps VM a on one host with VM db, which is on hB",
        "move VM db to hA, or take VM a out of affinity group pair",
    ),
    "with one that moves": (
        [together("pair", "ab")],
        {"b": Seat("db", frozenset("AB"))},
        "affinity group pair keeps VM a on one host with VM db, which is moving",
        "try again when VM db has arrived",
    ),
    "apart": (
        [apart("spread", "ab")],
        {"b": Seat("db", frozenset("A"))},
        "affinity group spread keeps VM a off the host of VM db, which is on hA",
        "move VM db away from hA, or take VM a out of affinity group spread",
    ),
    "apart from the one that its mate is kept apart from": (
        [apart("spread", "bc"), together("pair", "ab")],
        {"c": Seat("db", frozenset("A"))},
        "affinity groups pair and spread keep VM a off the host of VM db, which is on hA",
        "move VM db away from hA, or take VM a out of affinity groups pair and spread",
    ),
    "only some hosts": (
        [group("licence", "a", "BX", host_rule=POSITIVE)],
        {},
        "affinity group licence lets VM a run on hB, hX only",
        "add hA to the hosts of affinity group licence",
    ),
    "its mate's hosts": (
        [group("licence", "b", "B", host_rule=POSITIVE), together("pair", "ab")],
        {"b": Seat("db")},
        "affinity groups pair and licence let VM a, which must be with VM db, run on hB only",
        "add hA to the hosts of affinity group licence",
    ),
    "off some": (
        [group("old", "a", "A", host_rule=NEGATIVE)],
        {},
        "affinity group old keeps VM a off hA",
        "take hA out of the hosts of affinity group old",
    ),
    "no host left": (
        [group("licence", "a", "", host_rule=POSITIVE)],
        {},
        "affinity group licence lets VM a run on its hosts, of which none is left, only",
        "add hA to the hosts of affinity group licence",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_a_refusal_says_who_and_what_would_help(case: str) -> None:
    found, seats, message, change = SENTENCES[case]
    rules, hosts = ClusterRules(0, tuple(found)), fleet()
    around = rules.around("a")
    assert around is not None
    asked = request(place(), ClusterPolicy("c"), SchedulerConfig(), resolve(around, rules, seats))
    verdicts = {v.host_id: v for v in explain(hosts, asked, decide(hosts, asked))}
    (said,) = verdicts["A"].verdicts
    assert (said.message, said.change) == (message, change)


def test_the_first_of_a_union_goes_where_all_of_it_has_room() -> None:
    hosts = fleet(["A", "B"])
    hosts.put(HostFigures("S", "small", "c", "up", 64, 3 * GIB, 3 * GIB, 0, 640, 0))
    for busy in ("A", "B"):
        hosts.sample(busy, Measured(99.0))
    rules = ClusterRules(0, (together("pair", "abc"),))
    around = rules.around("a")
    assert around is not None
    nowhere = {v: Seat(v, memory=GIB, vcpus=1) for v in "bc"}

    def best(seats: dict[str, Seat]) -> str:
        bound = resolve(around, rules, seats)
        return hosts.ids[
            decide(hosts, request(place(), ClusterPolicy("c"), SchedulerConfig(), bound)).order[0]
        ]

    assert best({}) == "S"
    assert best(nowhere) == "A"
    assert best(nowhere | {"b": Seat("b", frozenset("S"), GIB, 1)}) == "S"


def test_wishes_are_scored_by_the_highest_priority_that_is_broken() -> None:
    hosts = fleet()
    wishes = [
        group("low", "a", "A", host_rule=POSITIVE, host_enforcing=False, priority=1.0),
        group("low2", "a", "A", host_rule=POSITIVE, host_enforcing=False, priority=1.0),
        group("high", "a", "B", host_rule=POSITIVE, host_enforcing=False, priority=2.0),
    ]
    rules = ClusterRules(0, tuple(wishes))
    around = rules.around("a")
    assert around is not None
    asked = request(place(), ClusterPolicy("c"), SchedulerConfig(), resolve(around, rules, {}))
    scores = decide(hosts, asked).scores["affinity_hosts_wish"]
    assert np.argmax(scores) == hosts.rows["B"]
    assert scores[hosts.rows["B"]] == 20.0
    assert scores[hosts.rows["X"]] == 0.0
    assert 0 < scores[hosts.rows["A"]] < 20.0


# What is broken, and where VMs are


def test_what_is_broken_is_said() -> None:
    running = {"a": Runs("app", "A"), "b": Runs("base", "A"), "c": Runs("cron", "B")}
    names = {"A": "alpha", "B": "beta"}
    assert broken(together("g", "ab"), running, names) == ()
    assert broken(together("g", "abcd"), running, names) == (
        "its VMs should run on one host and run on 2: VMs app, base on alpha; VM cron on beta",
    )
    assert broken(apart("g", "abcd"), running, names) == ("VMs app, base run together on alpha",)
    assert broken(apart("g", "acd"), running, names) == ()
    only = group("g", "abc", "B", host_rule=POSITIVE, host_enforcing=False)
    assert broken(only, running, names) == ("VMs app, base on alpha, which is none of its hosts",)
    never = group("g", "abc", "B", host_rule=NEGATIVE)
    assert broken(never, running, names) == ("VM cron on beta, one of its hosts, which it keeps them off",)


def claim(host_id: str, epoch: int, state: str = "confirmed") -> Claim:
    made = datetime.now(UTC)
    return Claim(
        id=f"{host_id}{epoch}",
        revision=1,
        created_at=made,
        updated_at=made,
        vm_id="a",
        epoch=epoch,
        host_id=host_id,
        memory_bytes=GIB,
        vcpus=1,
        state=state,
    )


def seen(status: str, epoch: int, host_id: str = "", *, deleted: bool = False) -> SeenVm:
    return SeenVm("a", epoch, status, host_id, GIB, 1, "a", deleted, NOW)


PLACES: dict[str, tuple[list[Claim], SeenVm | None, str]] = {
    "nobody knows it": ([], None, ""),
    "claimed before inventory was heard": ([claim("A", 1, "tentative")], None, "A"),
    "on its way": ([claim("A", 1, "tentative")], seen("wait_for_launch", 1), "A"),
    "placed, not heard of since": ([claim("A", 2, "tentative")], seen("down", 1), "A"),
    "runs": ([claim("A", 1)], seen("up", 1, "A"), "A"),
    "runs without a claim": ([], seen("up", 1, "A"), "A"),
    "moves": ([claim("A", 1), claim("B", 2, "tentative")], seen("migrating", 1, "A"), "AB"),
    "has moved, its old claim is still there": ([claim("A", 1), claim("B", 2)], seen("up", 2, "B"), "B"),
    "its move failed": ([claim("A", 1), claim("B", 2, "tentative")], seen("up", 3, "A"), "A"),
    "ended, its claim is still there": ([claim("A", 1)], seen("down", 1), ""),
    "is started anew, its claim is still there": ([claim("A", 1)], seen("wait_for_launch", 2), ""),
    "started anew and placed": ([claim("A", 1), claim("B", 2, "tentative")], seen("wait_for_launch", 2), "B"),
    "confirmed before its start was heard": ([claim("A", 2)], seen("wait_for_launch", 2), "A"),
    "its host is silent": ([claim("A", 1)], seen("unknown", 1, "A"), "A"),
    "deleted": ([claim("A", 1)], seen("down", 1, deleted=True), ""),
}


@pytest.mark.parametrize("case", PLACES)
def test_where_a_vm_is(case: str) -> None:
    held, vm, where = PLACES[case]
    assert hosts_of(held, vm) == frozenset(where)
