"""Which physical CPUs a VM gets: on random hosts, held against counting."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.figures import HostFigures
from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy
from services.scheduler.policies.affinity import ClusterRules
from services.scheduler.policies.compact import in_few_cells
from services.scheduler.policies.cpus import (
    NOBODY,
    Held,
    HostCpus,
    Wish,
    alone,
    capacity,
    choose,
    most_vcpus,
)
from services.scheduler.policies.decision import decide, explain, mend, sentence
from services.scheduler.policies.promise import Guest, World, lose
from services.scheduler.policies.request import request
from tests.scheduler.worlds import CONFIG, GIB
from volery.contracts.base import encode
from volery.contracts.cpus import CpuCore, CpuPinning, PinningPolicy
from volery.contracts.scheduling import Need, Place

DEDICATED, ISOLATED, MANUAL = PinningPolicy.DEDICATED, PinningPolicy.ISOLATE_THREADS, PinningPolicy.MANUAL


def machine(sockets: int, cores: int, threads: int) -> tuple[CpuCore, ...]:
    """As Linux numbers CPUs: first one thread of each core, then their siblings."""
    count = sockets * cores
    return tuple(
        CpuCore(cell=n // cores, socket=n // cores, cpus=tuple(range(n, count * threads, count)))
        for n in range(count)
    )


@st.composite
def hosts(draw: st.DrawFn) -> HostCpus:
    cores = machine(draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 4])))
    if draw(st.integers(0, 3)) == 0:  # some cores are small ones
        cores = (*cores, *(CpuCore(cell=0, socket=0, cpus=(100 + n,)) for n in range(3)))
    every = sorted(cpu for core in cores for cpu in core.cpus)
    taken = st.frozensets(st.sampled_from(every))
    exclusive = draw(taken)
    return HostCpus(cores, exclusive, draw(st.just(NOBODY) | taken) - exclusive)


@settings(max_examples=300, deadline=None)
@given(hosts(), st.integers(1, 12), st.sampled_from([1, 2, 4]))
def test_dedicated_cpus_are_nobody_elses_and_found_whenever_there_are_enough(
    host: HostCpus, vcpus: int, threads: int
) -> None:
    found = choose(host, Wish(DEDICATED, vcpus, threads))
    free = [sum(cpu in host.free for cpu in core.cpus) // threads for core in host.cores]
    assert (found is not None) == (sum(free) * threads >= vcpus)
    if found is None:
        return
    cpus = [cpu for (cpu,) in found.pins]
    assert len(set(cpus)) == len(cpus) == vcpus
    assert set(found.exclusive) == set(cpus) <= host.free
    core_of = {cpu: n for n, core in enumerate(host.cores) for cpu in core.cpus}
    for at in range(0, vcpus, threads):  # the VM's cores are cores
        assert len({core_of[cpu] for cpu in cpus[at : at + threads]}) == 1


@settings(max_examples=300, deadline=None)
@given(hosts(), st.integers(1, 12))
def test_isolated_threads_have_a_core_each_and_leave_its_other_threads_idle(
    host: HostCpus, vcpus: int
) -> None:
    found = choose(host, Wish(ISOLATED, vcpus))
    whole = [core for core in host.cores if host.free >= set(core.cpus)]
    assert (found is not None) == (len(whole) >= vcpus)
    if found is None:
        return
    used = [core for core in whole if any((cpu,) in found.pins for cpu in core.cpus)]
    assert len(used) == vcpus == len(set(found.pins))
    assert sorted(found.exclusive) == sorted(cpu for core in used for cpu in core.cpus)


@settings(max_examples=200, deadline=None)
@given(hosts(), st.integers(1, 12), st.sampled_from([DEDICATED, ISOLATED]), st.integers(0, 30))
def test_the_most_vcpus_fit_and_one_more_does_not(
    host: HostCpus, vcpus: int, policy: PinningPolicy, most: int
) -> None:
    def fits(count: int) -> bool:
        found = choose(host, Wish(policy, count))
        return found is not None and len(found.exclusive) <= most

    found = most_vcpus(host, Wish(policy, vcpus), most)
    assert found == 0 or fits(found)
    assert found == vcpus or not fits(found + 1)


@settings(max_examples=300, deadline=None)
@given(hosts(), st.integers(1, 12), st.sampled_from([DEDICATED, ISOLATED]), st.sampled_from([1, 2, 3]))
def test_what_is_counted_for_masks_is_what_would_be_given(
    host: HostCpus, vcpus: int, policy: PinningPolicy, threads: int
) -> None:
    wish = Wish(policy, vcpus, threads)
    found = choose(host, wish)
    assert (found is not None) == (capacity(host, policy, threads) >= vcpus)
    assert found is None or len(found.exclusive) == alone(host, wish)


def test_a_small_vm_leaves_whole_cores_and_whole_sockets_to_others() -> None:
    cores = machine(2, 4, 2)
    broken = HostCpus(cores, frozenset({0}))
    one = choose(broken, Wish(DEDICATED, 1))
    assert one is not None
    assert one.pins == ((8,),)  # the sibling of what is taken
    three = choose(broken, Wish(DEDICATED, 3))
    assert three is not None
    assert three.pins == ((1,), (9,), (8,))
    full = choose(broken, Wish(DEDICATED, 6))
    assert full is not None
    assert {cpu for (cpu,) in full.pins} == {1, 2, 3, 9, 10, 11}  # all of socket 0, which has just that
    larger = choose(broken, Wish(DEDICATED, 8, 2))
    assert larger is not None
    assert {cpu for (cpu,) in larger.pins} == {4, 5, 6, 7, 12, 13, 14, 15}


def test_manual_pins_are_taken_as_they_are_unless_a_cpu_is_missing_or_somebody_elses() -> None:
    host = HostCpus(machine(1, 4, 1), frozenset({0}), frozenset({1}))
    shared = choose(host, Wish(MANUAL, 2, pins=((1, 2), (3,))))
    assert shared is not None
    assert (shared.pins, shared.exclusive) == (((1, 2), (3,)), ())
    assert choose(host, Wish(MANUAL, 1, pins=((0, 2),))) is None
    assert choose(host, Wish(MANUAL, 1, pins=((4,),))) is None


FIGURES = HostFigures(
    id="h1", name="h1", cluster_id="a", status="up", cpus=8, memory_bytes=16 * GIB, memory_limit_bytes=16 * GIB,
    memory_used_bytes=0, vcpus_limit=80, vcpus_used=0, cores=encode(machine(1, 4, 2)).decode(),
)  # fmt: skip


def fleet_of(held: Held, **figures: object) -> Fleet:
    fleet = Fleet()
    fleet.clusters["a"] = ClusterPolicy("a", "Default")
    fleet.put(dataclasses.replace(FIGURES, **({"vcpus_used": held.vcpus} | figures)))  # type: ignore[arg-type]
    fleet.hold("h1", held)
    return fleet


def said(fleet: Fleet, policy: PinningPolicy, vcpus: int, pins: tuple[tuple[int, ...], ...] = ()) -> str:
    need = Need(
        vm_id="vm", cluster_id="a", memory_bytes=GIB, vcpus=vcpus, name="web",
        cpu_pinning=CpuPinning(policy=policy, pins=pins),
    )  # fmt: skip
    asked = request(Place(need=need, epoch=1), fleet.clusters["a"], CONFIG)
    decision = decide(fleet, asked)
    return sentence(fleet, asked, decision, explain(fleet, asked, decision), mend(fleet, asked, decision))


SOME = Held(3, frozenset({0, 1}), frozenset({2}), 2)


@pytest.mark.parametrize(
    ("held", "figures", "wish", "says"),
    [
        (SOME, {}, (DEDICATED, 6), "of 8 CPUs of h1 2 are others' alone and VMs are pinned to 1, VM web wants 6 CPUs of its own"),
        (SOME, {}, (DEDICATED, 6), "What would help: give VM web at most 5 vCPUs instead of 6 (h1 takes it then)"),
        (SOME, {}, (ISOLATED, 2), "VM web wants 2 whole cores of its own"),
        (SOME, {"largest_shared": 4}, (DEDICATED, 3), "the VMs that share the others need 4 of them: 2 can be given away, VM web wants 3"),
        (SOME, {"vcpus_used": 43}, (DEDICATED, 2), "move or stop VMs with 1 vCPU on h1"),
        (SOME, {}, (PinningPolicy.NONE, 7), "h1 has 6 CPUs left that VMs share, VM web has 7 vCPUs"),
        (SOME, {}, (MANUAL, 1, ((1, 2),)), "CPU 1 of h1 is another VM's alone"),
        (SOME, {}, (MANUAL, 1, ((8, 9),)), "h1 has no CPU 8, 9"),
        (Held(), {"cores": ""}, (DEDICATED, 1), "h1 has not said how its CPUs are built"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_is_missing(held: Held, figures: dict, wish: tuple, says: str) -> None:
    assert says in said(fleet_of(held, **figures), *wish)


def test_hosts_come_first_where_few_cells_have_enough_cpus_free() -> None:
    """Of eight free CPUs each: in one cell, in two, in four; and one with less in one cell than is wanted."""
    fleet = Fleet()
    fleet.clusters["a"] = ClusterPolicy("a", "Default")
    for name, sockets, cores in (("h1", 1, 8), ("h2", 2, 4), ("h3", 4, 2), ("h4", 2, 6)):
        told = encode(machine(sockets, cores, 1)).decode()
        fleet.put(dataclasses.replace(FIGURES, id=name, name=name, cores=told, cpus=sockets * cores))
    fleet.hold("h4", Held(1, frozenset({0, 1}), frozenset({6, 7}), 2))
    for policy, vcpus, wanted in (
        (DEDICATED, 8, [1, 0.5, 0, 0.5]),
        (DEDICATED, 4, [1, 1, 0.5, 1]),
        (PinningPolicy.NONE, 8, [0, 0, 0, 0]),
    ):
        need = Need(vm_id="vm", cluster_id="a", memory_bytes=GIB, vcpus=vcpus)
        need = msgspec.structs.replace(need, cpu_pinning=CpuPinning(policy=policy))
        asked = request(Place(need=need, epoch=1), fleet.clusters["a"], CONFIG)
        assert in_few_cells(fleet, asked).tolist() == wanted


def test_columns_forget_what_hosts_held_once() -> None:
    """However often CPUs are given and taken back, what is kept for the masks stays small."""
    fleet = fleet_of(Held())
    for n in range(50):
        fleet.hold("h1", Held(n, frozenset({n % 8}), NOBODY, 1))
    assert len(fleet.cpu_states.states) == 9
    fleet.forget_cpu_states()
    assert len(fleet.cpu_states.states) == 1
    assert fleet.cpus_of(0).exclusive == {49 % 8}
    part = fleet.part("a")
    part.hold("h1", Held(50, frozenset({0, 1, 2}), NOBODY, 3))
    assert (fleet.ints("vcpus_limit")[0], part.ints("vcpus_limit")[0]) == (71, 53)
    assert fleet.held("h1").revision == 49


def test_a_loss_is_survived_only_with_cpus_for_each_of_those_that_want_some_alone() -> None:
    """Two VMs of a lost host don't both count on the same ones, and what was tried is taken back."""

    def of(vcpus: int) -> World:
        fleet = fleet_of(Held(), cores=encode(machine(1, 4, 2)).decode(), largest_shared=2)
        fleet.put(dataclasses.replace(FIGURES, id="h2", name="h2"))
        guests = [
            Guest(
                Need(
                    vm_id=vm_id, cluster_id="a", memory_bytes=GIB, vcpus=vcpus, name=vm_id, high_availability=True,
                    cpu_pinning=CpuPinning(policy=DEDICATED),
                ),
                "h2", GIB, vcpus,
            )
            for vm_id in ("one", "two")
        ]  # fmt: skip
        return World(fleet, fleet.clusters["a"], CONFIG, ClusterRules(0, ()), {g.vm_id: g for g in guests})

    assert lose(of(3), ["h2"]).homeless == ()
    world = of(4)
    (homeless,) = lose(world, ["h2"]).homeless
    assert "2 can be given away" in homeless.message
    assert world.fleet.held("h1") == Held()
    assert world.fleet.ints("largest_shared").tolist() == [2, 0]
    world.put(dataclasses.replace(world.guests["one"], host_id="h1"))
    assert len(world.fleet.held("h1").exclusive) == 4
