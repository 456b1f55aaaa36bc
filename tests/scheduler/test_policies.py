"""Filters and weights in columns, held against an oracle that asks one host at a time in plain Python."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.scheduler.config import SchedulerConfig
from services.scheduler.figures import HostFigures, Measured
from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy
from services.scheduler.policies.decision import Decision, decide, explain, mend, room, sentence
from services.scheduler.policies.recipe import PACKING, Recipe
from services.scheduler.policies.request import request
from tests.scheduler import oracle
from tests.scheduler.oracle import World
from tests.scheduler.worlds import CONFIG, GIB, HOSTS, MIB, fleet_of, places, roomy_worlds, worlds
from tests.scheduler.worlds import asked as asked_of
from volery.contracts.scheduling import Need, Place, Purpose


@settings(max_examples=200, deadline=None)
@given(worlds(), places())
def test_the_columns_decide_as_the_oracle_does(world: World, place: Place) -> None:
    """The same hosts, the same rules against each, the same weights, the same choice."""
    check_decision(world, place)


@settings(max_examples=200, deadline=None)
@given(roomy_worlds(), places())
def test_policies_choose_among_hosts_that_fit_as_the_oracle_does(world: World, place: Place) -> None:
    """By sums and by ranks; what the placement itself asks for comes first whatever the factors."""
    need = replace(
        place.need,
        memory_bytes=GIB,
        vcpus=1,
        cpu_model="",
        machine="",
        network_ids=(),
        host_ids=(),
        storage_host_ids=None,
        numa_nodes=tuple(replace(node, host_cells=()) for node in place.need.numa_nodes),
    )
    place = replace(place, need=need, excluded_host_ids=(), target_host_id="")
    check_decision(world, place)
    fitting = {h.id for h in world.hosts if not oracle.refusals(world, place, h, CONFIG)}
    chosen = oracle.best(world, place, CONFIG)
    if liked := fitting - set(place.avoided_host_ids):
        assert set(chosen) <= liked
        assert place.preferred_host_id not in liked or chosen == [place.preferred_host_id]


def check_decision(world: World, place: Place) -> None:
    fleet = fleet_of(world)
    asked = asked_of(world, place)
    decision = decide(fleet, asked)
    said = {v.host_id: v for v in explain(fleet, asked, decision)}

    assert said.keys() == {h.id for h in oracle.considered(world, place)}
    for host in oracle.considered(world, place):
        refused = oracle.refusals(world, place, host, CONFIG)
        assert said[host.id].fits == (not refused)
        assert {v.rule for v in said[host.id].verdicts} == refused
        assert all(v.message and v.change for v in said[host.id].verdicts)
        if refused and oracle.ranked(world):
            continue
        row, expected = fleet.rows[host.id], oracle.weights(world, place, host, CONFIG)
        assert {name: score[row] for name, score in decision.scores.items()} == pytest.approx(
            expected, abs=1e-9
        )
        assert decision.total[row] == pytest.approx(sum(expected.values()), abs=1e-9)

    best = oracle.best(world, place, CONFIG)
    chosen = fleet.ids[decision.best] if decision.best is not None else None
    assert chosen in best if best else chosen is None
    figures = {
        h.id: oracle.weights(world, place, h, CONFIG) for h in oracle.considered(world, place) if h.id in best
    }
    if best and all(f == figures[best[0]] for f in figures.values()):
        assert chosen == best[0]


@settings(max_examples=100, deadline=None)
@given(worlds(), places())
def test_a_decision_counts_what_it_does_not_show(world: World, place: Place) -> None:
    fleet = fleet_of(world)
    decision = decide(fleet, asked_of(world, place))
    against = [oracle.refusals(world, place, h, CONFIG) for h in oracle.considered(world, place)]
    assert decision.fitting == sum(not rules for rules in against)
    assert decision.excluded_by() == Counter(rule for rules in against for rule in rules)
    order = [len(against_it) for against_it in map(set, _in_order(world, place, fleet, decision))]
    if decision.best is None:
        assert order == sorted(order) or place.target_host_id


@pytest.mark.parametrize("share", [0.0, 0.002, 0.01, 0.5, 1.0])
def test_the_first_of_many_hosts_are_those_of_the_whole_order(share: float) -> None:
    """Many have equal totals and as many rules against them."""
    dice = np.random.default_rng(int(share * 1000))
    for hosts in (1, 63, 64, 700, 3000):
        masks = {rule: dice.random(hosts) < max(share, 0.7) for rule in "abc"}
        masks["d"] = dice.random(hosts) < share
        decision = Decision(
            considered=dice.random(hosts) < 0.9,
            target=np.zeros(hosts, np.bool_),
            fits=np.logical_and.reduce(list(masks.values())),
            masks=masks,
            everyone=np.ones(hosts, np.bool_),
            total=dice.integers(-30, 30, hosts) / 7,
            scores={},
            ranks=dice.permutation(hosts),
        )
        for count in (1, 2, 5, 10, 100):
            assert decision.first(count).tolist() == decision.order[:count].tolist()


@settings(max_examples=200, deadline=None)
@given(worlds(), places())
def test_the_first_hosts_are_those_of_the_whole_order(world: World, place: Place) -> None:
    decision = decide(fleet_of(world), asked_of(world, place))
    for count in range(1, len(decision.order) + 2):
        assert decision.first(count).tolist() == decision.order[:count].tolist()
    best = decision.order[0] if len(decision.order) and decision.fits[decision.order[0]] else None
    assert decision.best == best


def _in_order(world: World, place: Place, fleet: Fleet, decision: Decision) -> list[set[str]]:
    hosts = {h.id: h for h in world.hosts}
    return [oracle.refusals(world, place, hosts[fleet.ids[row]], CONFIG) for row in decision.order]


@settings(max_examples=100, deadline=None)
@given(worlds(), places())
def test_room_counts_as_the_oracle_does_and_names_the_host_that_would_have_to_change_least(
    world: World, place: Place
) -> None:
    place = replace(place, target_host_id="")
    found = room(fleet_of(world), asked_of(world, place))
    refused = {
        h.id: oracle.refusals(world, place, h, CONFIG)
        for h in oracle.considered(world, place)
        if h.id not in place.excluded_host_ids
    }
    assert found.hosts == len(refused)
    assert found.up == sum("host_state" not in rules for rules in refused.values())
    assert found.fitting == sum(not rules for rules in refused.values())
    assert not (found.fitting and found.remedies)
    against = {host_id: rules for host_id, rules in refused.items() if rules}
    if not against:
        assert found.nearest is None
        return
    assert found.nearest is not None
    assert {v.rule for v in found.nearest.verdicts} == against[found.nearest.host_id]
    assert len(against[found.nearest.host_id]) == min(map(len, against.values()))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "remove"]), st.sampled_from(HOSTS), st.integers(0, 9))))
def test_columns_stay_right_while_hosts_come_and_go(steps: list[tuple[str, str, int]]) -> None:
    fleet, plain = Fleet(), {}
    for verb, host_id, number in steps:
        if verb == "put":
            machine = frozenset([f"m{number % 3}"])
            plain[host_id] = HostFigures(host_id, host_id, "a", "up", number, 1, 2, 3, 4, 5, machines=machine)
            fleet.put(plain[host_id])
        else:
            plain.pop(host_id, None)
            fleet.remove(host_id)
        mask = fleet.with_machine("m1")
        assert {h: int(fleet.ints("cpus")[r]) for h, r in fleet.rows.items()} == {
            h: f.cpus for h, f in plain.items()
        }
        assert {fleet.ids[r] for r in range(len(fleet)) if mask[r]} == {
            h for h, f in plain.items() if "m1" in f.machines
        }


def figures(host_id: str, **changed: int | str) -> HostFigures:
    made: dict = {
        "id": host_id, "name": host_id, "cluster_id": "a", "status": "up", "cpus": 8,
        "memory_bytes": 16 * GIB, "memory_limit_bytes": 16 * GIB - 256 * MIB, "memory_used_bytes": 0,
        "vcpus_limit": 80, "vcpus_used": 0,
    }  # fmt: skip
    return HostFigures(**(made | changed))


def decided(fleet: Fleet, place: Place, policy: ClusterPolicy) -> tuple[str, str]:
    asked = request(place, policy, CONFIG)
    decision = decide(fleet, asked)
    text = sentence(fleet, asked, decision, explain(fleet, asked, decision), mend(fleet, asked, decision))
    return (fleet.ids[decision.best] if decision.best is not None else ""), text


def hosts_of(*hosts: HostFigures) -> Fleet:
    fleet = Fleet()
    for host in hosts:
        fleet.put(host)
    return fleet


def place_of(**need: object) -> Place:
    made: dict = {"vm_id": "vm", "cluster_id": "a", "memory_bytes": 4 * GIB, "vcpus": 2, "name": "web"}
    return Place(need=Need(**(made | need)), epoch=1)


def test_even_distribution_takes_the_emptier_and_power_saving_the_fuller() -> None:
    hosts = (figures("empty"), figures("half", memory_used_bytes=8 * GIB))
    assert decided(hosts_of(*hosts), place_of(), ClusterPolicy("a"))[0] == "empty"
    saving = ClusterPolicy("a", balance="power_saving")
    assert decided(hosts_of(*hosts), place_of(), saving)[0] == "half"


def test_packing_takes_what_a_host_has_too_much_of_and_the_fuller_of_two_alike() -> None:
    recipe = Recipe.of(PACKING)

    def chosen(place: Place, *hosts: HostFigures) -> str:
        fleet = hosts_of(*hosts)
        best = decide(fleet, request(place, ClusterPolicy("a"), CONFIG, recipe=recipe)).best
        return fleet.ids[best] if best is not None else ""

    three = (
        figures("whole"),
        figures("memory to spare", vcpus_used=60),
        figures("vcpus to spare", memory_used_bytes=12 * GIB),
    )
    assert chosen(place_of(vcpus=1), *three) == "memory to spare"
    assert chosen(place_of(memory_bytes=512 * MIB, vcpus=8), *three) == "vcpus to spare"
    alike = figures("fuller", memory_used_bytes=4 * GIB)
    assert chosen(place_of(), figures("a"), alike) == "fuller"


def test_power_saving_spares_a_busy_host() -> None:
    fleet = hosts_of(figures("idle"), figures("busy"))
    fleet.sample("busy", Measured(79.0))
    assert decided(fleet, place_of(), ClusterPolicy("a", balance="power_saving"))[0] == "idle"


def test_many_starts_between_two_samples_spread() -> None:
    fleet = hosts_of(figures("one"), figures("two"))
    chosen = []
    for _ in range(4):
        host_id, _ = decided(fleet, place_of(memory_bytes=1), ClusterPolicy("a"))
        fleet.use(host_id, 0, 2)
        chosen.append(host_id)
    assert sorted(chosen) == ["one", "one", "two", "two"]


def test_a_preferred_host_wins_unless_it_can_not() -> None:
    hosts = (figures("a1"), figures("a2", memory_used_bytes=10 * GIB))
    preferring = place_of(preferred_host_ids=("a2",))
    assert decided(hosts_of(*hosts), preferring, ClusterPolicy("a"))[0] == "a2"
    full = (figures("a1"), figures("a2", memory_used_bytes=14 * GIB))
    assert decided(hosts_of(*full), preferring, ClusterPolicy("a"))[0] == "a1"


def test_a_placement_s_own_wish_outweighs_the_vm_s_and_avoiding_outweighs_both() -> None:
    hosts = hosts_of(figures("a1"), figures("a2"), figures("a3", memory_used_bytes=10 * GIB))
    asked = place_of(preferred_host_ids=("a1",))
    cases = {
        "a1": {},
        "a3": {"preferred_host_id": "a3"},
        "a2": {"preferred_host_id": "a3", "avoided_host_ids": ("a1", "a3")},
    }
    for host_id, wish in cases.items():
        assert decided(hosts, replace(asked, **wish), ClusterPolicy("a"))[0] == host_id


def test_an_avoided_host_is_taken_when_no_other_fits() -> None:
    hosts = hosts_of(figures("a1", memory_used_bytes=14 * GIB), figures("a2"))
    avoiding = replace(place_of(), avoided_host_ids=("a2",))
    assert decided(hosts, avoiding, ClusterPolicy("a"))[0] == "a2"


def test_a_refusal_names_each_host_with_figures_and_the_smallest_change() -> None:
    fleet = hosts_of(
        figures("h1", memory_used_bytes=14 * GIB), figures("h2", status="maintenance"), figures("h3", cpus=1)
    )
    asked = request(place_of(), ClusterPolicy("a", "Default"), CONFIG)
    hosts = explain(fleet, asked, decide(fleet, asked))
    text = decided(fleet, place_of(), ClusterPolicy("a", "Default"))[1]
    assert "no host of cluster Default can take VM web" in text
    assert "h1 has 1.8 GiB left of 15.8 GiB, VM web needs 4.1 GiB (65 MiB of it overhead)" in text
    assert "h2 is maintenance, not up" in text
    assert "VM web has 2 vCPUs, h3 has 1 CPU threads" in text
    memory = next(v for h in hosts if h.name == "h1" for v in h.verdicts)
    assert memory.change == "free 2.3 GiB on h1, or raise the cluster's memory over-commit from 100 to 115 %"


def test_the_over_commit_that_a_refusal_names_is_enough() -> None:
    """The change it proposes is the smallest: with one per cent less it is refused again."""
    from services.scheduler.model import limits

    config = SchedulerConfig()
    for percent, fits in ((115, True), (114, False)):
        policy = ClusterPolicy("a", memory_overcommit_percent=percent)
        limit = limits(16 * GIB, 8, policy, config).memory_bytes
        fleet = hosts_of(figures("h1", memory_used_bytes=14 * GIB, memory_limit_bytes=limit))
        assert bool(decided(fleet, place_of(), policy)[0]) is fits


def test_a_migration_says_why_its_source_is_left_out() -> None:
    place = Place(need=place_of().need, epoch=2, purpose=Purpose.MIGRATE, excluded_host_ids=("h1",))
    text = decided(hosts_of(figures("h1")), place, ClusterPolicy("a"))[1]
    assert "it is the source of this migration or was tried before" in text


def test_an_empty_cluster_says_so() -> None:
    text = decided(Fleet(), place_of(), ClusterPolicy("a", "Default"))[1]
    assert "cluster Default has no hosts" in text


def test_a_choice_says_why_it_is_not_the_runner_up() -> None:
    hosts = (figures("h1", memory_used_bytes=8 * GIB), figures("h2"), figures("h3", cpus=1))
    text = decided(hosts_of(*hosts), place_of(), ClusterPolicy("a", "Default"))[1]
    assert text == (
        "VM web is placed on h2, the best of 2 that fit (2.692 against 2.1841 of h1: memory_even +0.5079), of 3 in "
        "cluster Default"
    )
    equal = decided(hosts_of(figures("h1"), figures("h2")), place_of(), ClusterPolicy("a"))[1]
    assert "placed on h1, the best of 2 that fit (2.692 against 2.692 of h2: the lower id decides)" in equal
