"""Filters and weights in columns, held against an oracle that asks one host at a time in plain Python."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.scheduler.config import SchedulerConfig
from services.scheduler.fleet import Fleet, HostFigures, NetworkReach
from services.scheduler.model import ClusterPolicy
from services.scheduler.policies.decision import decide, explain, room, sentence
from services.scheduler.policies.request import request
from volery.contracts.cluster import Balance
from volery.contracts.host import HostStatus
from volery.contracts.scheduling import Need, Place, Purpose

MIB = 1024**2
GIB = 1024**3
HOSTS = [f"host-{n}" for n in range(6)]
NETWORKS = ["lan", "wan"]
MODELS = ["Nehalem", "Skylake"]
MACHINES = ["q35", "pc"]


@dataclass(frozen=True)
class World:
    """A fleet as plain data."""

    hosts: tuple[HostFigures, ...]
    networks: tuple[NetworkReach, ...]
    cpu_percent: dict[str, float]
    fresh: dict[str, int]
    policy: ClusterPolicy

    def fleet(self) -> Fleet:
        fleet = Fleet()
        for host in self.hosts:
            fleet.put(host)
            fleet.sample(host.id, self.cpu_percent[host.id])
            fleet.use(host.id, 0, self.fresh[host.id])
            fleet.used(host.id, host.memory_used_bytes, host.vcpus_used)
        for network in self.networks:
            fleet.set_network(network)
        return fleet


def subsets(values: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), unique=True)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    ids = draw(subsets(HOSTS))
    hosts = tuple(
        HostFigures(
            id=host_id,
            name=host_id.upper(),
            cluster_id=draw(st.sampled_from(["a", "a", "a", "b"])),
            status=draw(st.sampled_from([HostStatus.UP, HostStatus.UP, *HostStatus])),
            cpus=draw(st.integers(0, 8)),
            memory_bytes=8 * GIB,
            memory_limit_bytes=draw(st.integers(0, 8)) * GIB,
            memory_used_bytes=draw(st.integers(0, 8)) * GIB,
            vcpus_limit=draw(st.integers(0, 16)),
            vcpus_used=draw(st.integers(0, 16)),
            cpu_models=frozenset(draw(subsets(MODELS))),
            machines=frozenset(draw(subsets(MACHINES))),
        )
        for host_id in ids
    )
    networks = tuple(NetworkReach(n, n, frozenset(draw(subsets(HOSTS)))) for n in draw(subsets(NETWORKS)))
    balance = draw(st.sampled_from([str(b) for b in Balance]))
    model = draw(st.sampled_from(["", *MODELS]))
    return World(
        hosts,
        networks,
        {h.id: draw(st.integers(0, 120)) * 1.0 for h in hosts},
        {h.id: draw(st.integers(0, 4)) for h in hosts},
        ClusterPolicy("a", "A", model, draw(st.sampled_from(["", *MACHINES])), balance=balance),
    )


@st.composite
def places(draw: st.DrawFn) -> Place:
    storage = draw(st.none() | subsets(HOSTS))
    need = Need(
        vm_id="vm",
        cluster_id="a",
        memory_bytes=draw(st.sampled_from([1, GIB, 4 * GIB])),
        vcpus=draw(st.integers(1, 6)),
        cpu_model=draw(st.sampled_from(["", "host-passthrough", *MODELS])),
        machine=draw(st.sampled_from(["", *MACHINES])),
        network_ids=tuple(draw(subsets(NETWORKS))),
        host_ids=tuple(draw(st.just([]) | subsets(HOSTS))),
        preferred_host_ids=tuple(draw(subsets(HOSTS))),
        storage_host_ids=None if storage is None else tuple(storage),
    )
    return Place(
        need=need,
        epoch=1,
        excluded_host_ids=tuple(draw(st.just([]) | subsets(HOSTS))),
        target_host_id=draw(st.sampled_from(["", "", "", *HOSTS])),
        preferred_host_id=draw(st.sampled_from(["", "", *HOSTS])),
        avoided_host_ids=tuple(draw(st.just([]) | subsets(HOSTS))),
    )


def oracle_refusals(world: World, place: Place, host: HostFigures, config: SchedulerConfig) -> set[str]:
    """The rules that exclude one host, written as one would say them."""
    need, policy = place.need, world.policy
    reach = {n.id: n.host_ids for n in world.networks}
    model, machine = need.cpu_model or policy.cpu_model, need.machine or policy.machine
    refused = set()
    if host.cluster_id != need.cluster_id:
        refused.add("cluster")
    if place.target_host_id and host.id != place.target_host_id:
        refused.add("target")
    if host.status != "up":
        refused.add("host_state")
    if need.host_ids and host.id not in need.host_ids:
        refused.add("pinned")
    if host.id in place.excluded_host_ids:
        refused.add("excluded")
    if need.vcpus > host.cpus:
        refused.add("cpu")
    if host.vcpus_limit - host.vcpus_used < need.vcpus:
        refused.add("cpu_overcommit")
    left = host.memory_limit_bytes - host.memory_used_bytes
    if left < need.memory_bytes + config.guest_overhead_mib * MIB:
        refused.add("memory")
    if any(host.id not in reach.get(n, ()) for n in need.network_ids):
        refused.add("network")
    if need.storage_host_ids is not None and host.id not in need.storage_host_ids:
        refused.add("storage")
    if model not in ("", "host-passthrough") and host.cpu_models and model not in host.cpu_models:
        refused.add("cpu_model")
    if machine and host.machines and machine not in host.machines:
        refused.add("machine")
    return refused


def oracle_weight(world: World, place: Place, host: HostFigures, config: SchedulerConfig) -> float:
    need = place.need
    load = world.cpu_percent[host.id] / 100
    load += 0.1 * (world.fresh[host.id] + need.vcpus) / max(host.cpus, 1)
    taken = host.memory_used_bytes + need.memory_bytes + config.guest_overhead_mib * MIB
    share = min(taken / max(host.memory_limit_bytes, 1), 1.0)
    bonus = 99.0 if host.id in need.preferred_host_ids else 0.0
    bonus += 300.0 if host.id == place.preferred_host_id else 0.0
    bonus -= 1000.0 if host.id in place.avoided_host_ids else 0.0
    if world.policy.balance == "power_saving":
        return bonus + share + (2 * load if load <= 0.8 else 0.0)
    return bonus + (1 - share) + 2 * (1 - min(load, 1.0))


@settings(max_examples=400, deadline=None)
@given(worlds(), places())
def test_the_columns_decide_as_the_oracle_does(world: World, place: Place) -> None:
    config = SchedulerConfig()
    fleet = world.fleet()
    asked = request(place, world.policy, config)
    decision = decide(fleet, asked)
    verdicts = {v.host_id: v for v in explain(fleet, asked, decision)}

    considered = {h.id: h for h in world.hosts if h.cluster_id == "a" or h.id == place.target_host_id}
    assert verdicts.keys() == considered.keys()
    for host_id, host in considered.items():
        refused = oracle_refusals(world, place, host, config)
        said = verdicts[host_id]
        assert said.fits == (not refused)
        assert {v.rule for v in said.verdicts} == refused
        assert all(v.message and v.change for v in said.verdicts)
        if said.fits:
            assert said.weight == pytest.approx(oracle_weight(world, place, host, config), abs=1e-3)
            assert sum(said.weights.values()) == pytest.approx(said.weight, abs=1e-3)

    fitting = [h for i, h in considered.items() if verdicts[i].fits]
    if fitting:
        assert decision.best is not None
        chosen = next(h for h in fitting if h.id == fleet.ids[decision.best])
        best = max(oracle_weight(world, place, h, config) for h in fitting)
        assert oracle_weight(world, place, chosen, config) == pytest.approx(best, abs=1e-6)
    else:
        assert decision.best is None


@settings(max_examples=300, deadline=None)
@given(worlds(), places())
def test_room_counts_as_the_oracle_does_and_names_the_host_that_would_have_to_change_least(
    world: World, place: Place
) -> None:
    config = SchedulerConfig()
    place = replace(place, target_host_id="")
    found = room(world.fleet(), request(place, world.policy, config))
    refused = {
        h.id: oracle_refusals(world, place, h, config)
        for h in world.hosts
        if h.cluster_id == "a" and h.id not in place.excluded_host_ids
    }
    assert found.hosts == len(refused)
    assert found.up == sum("host_state" not in rules for rules in refused.values())
    assert found.fitting == sum(not rules for rules in refused.values())
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
    asked = request(place, policy, SchedulerConfig())
    decision = decide(fleet, asked)
    hosts = explain(fleet, asked, decision)
    return (fleet.ids[decision.best] if decision.best is not None else ""), sentence(asked, hosts)


def fleet_of(*hosts: HostFigures) -> Fleet:
    fleet = Fleet()
    for host in hosts:
        fleet.put(host)
    return fleet


def place_of(**need: object) -> Place:
    made: dict = {"vm_id": "vm", "cluster_id": "a", "memory_bytes": 4 * GIB, "vcpus": 2, "name": "web"}
    return Place(need=Need(**(made | need)), epoch=1)


def test_even_distribution_takes_the_emptier_and_power_saving_the_fuller() -> None:
    hosts = (figures("empty"), figures("half", memory_used_bytes=8 * GIB))
    assert decided(fleet_of(*hosts), place_of(), ClusterPolicy("a"))[0] == "empty"
    saving = ClusterPolicy("a", balance="power_saving")
    assert decided(fleet_of(*hosts), place_of(), saving)[0] == "half"


def test_power_saving_spares_a_busy_host() -> None:
    fleet = fleet_of(figures("idle"), figures("busy"))
    fleet.sample("busy", 79.0)
    assert decided(fleet, place_of(), ClusterPolicy("a", balance="power_saving"))[0] == "idle"


def test_many_starts_between_two_samples_spread() -> None:
    fleet = fleet_of(figures("one"), figures("two"))
    chosen = []
    for _ in range(4):
        host_id, _ = decided(fleet, place_of(memory_bytes=1), ClusterPolicy("a"))
        fleet.use(host_id, 0, 2)
        chosen.append(host_id)
    assert sorted(chosen) == ["one", "one", "two", "two"]


def test_a_preferred_host_wins_unless_it_can_not() -> None:
    hosts = (figures("a1"), figures("a2", memory_used_bytes=10 * GIB))
    preferring = place_of(preferred_host_ids=("a2",))
    assert decided(fleet_of(*hosts), preferring, ClusterPolicy("a"))[0] == "a2"
    full = (figures("a1"), figures("a2", memory_used_bytes=14 * GIB))
    assert decided(fleet_of(*full), preferring, ClusterPolicy("a"))[0] == "a1"


def test_a_placement_s_own_wish_outweighs_the_vm_s_and_avoiding_outweighs_both() -> None:
    hosts = fleet_of(figures("a1"), figures("a2"), figures("a3", memory_used_bytes=10 * GIB))
    asked = place_of(preferred_host_ids=("a1",))
    cases = {
        "a1": {},
        "a3": {"preferred_host_id": "a3"},
        "a2": {"preferred_host_id": "a3", "avoided_host_ids": ("a1", "a3")},
    }
    for host_id, wish in cases.items():
        assert decided(hosts, replace(asked, **wish), ClusterPolicy("a"))[0] == host_id


def test_an_avoided_host_is_taken_when_no_other_fits() -> None:
    hosts = fleet_of(figures("a1", memory_used_bytes=14 * GIB), figures("a2"))
    avoiding = replace(place_of(), avoided_host_ids=("a2",))
    assert decided(hosts, avoiding, ClusterPolicy("a"))[0] == "a2"


def test_a_refusal_names_each_host_with_figures_and_the_smallest_change() -> None:
    fleet = fleet_of(
        figures("h1", memory_used_bytes=14 * GIB), figures("h2", status="maintenance"), figures("h3", cpus=1)
    )
    asked = request(place_of(), ClusterPolicy("a", "Default"), SchedulerConfig())
    decision = decide(fleet, asked)
    hosts = explain(fleet, asked, decision)
    text = sentence(asked, hosts)
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
        fleet = fleet_of(figures("h1", memory_used_bytes=14 * GIB, memory_limit_bytes=limit))
        assert bool(decided(fleet, place_of(), policy)[0]) is fits


def test_a_migration_says_why_its_source_is_left_out() -> None:
    place = Place(need=place_of().need, epoch=2, purpose=Purpose.MIGRATE, excluded_host_ids=("h1",))
    text = decided(fleet_of(figures("h1")), place, ClusterPolicy("a"))[1]
    assert "it is the source of this migration or was tried before" in text


def test_an_empty_cluster_says_so() -> None:
    text = decided(Fleet(), place_of(), ClusterPolicy("a", "Default"))[1]
    assert "cluster Default has no hosts" in text
