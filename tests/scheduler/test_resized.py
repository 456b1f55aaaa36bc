"""VMs that are resized to their hosts: what each host would give, held against striking out cores one by one."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.scheduler.cells import CellFigures, Taken
from services.scheduler.figures import HostFigures
from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy
from services.scheduler.policies.affinity import ClusterRules
from services.scheduler.policies.boarding import RESIZED, Standing, board_of
from services.scheduler.policies.bound import Bound, room_for_all
from services.scheduler.policies.cpus import NOBODY, Held, HostCpus, Wish, choose
from services.scheduler.policies.decision import decide, explain, mend, sentence
from services.scheduler.policies.outline import divides, outline, shape
from services.scheduler.policies.promise import Guest, World, lose
from services.scheduler.policies.request import request
from services.scheduler.policies.resized import shape_at
from tests.scheduler import oracle
from tests.scheduler.test_cpus import machine
from tests.scheduler.test_policies import check_decision
from tests.scheduler.test_remedies import check_remedies
from tests.scheduler.worlds import CONFIG, GIB, MIB, places, shapes, worlds
from volery.contracts.base import encode
from volery.contracts.cpus import CpuCore, CpuPinning, PinningPolicy
from volery.contracts.resizing import VmShape
from volery.contracts.scheduling import Need, Place

RESIZE = CpuPinning(policy=PinningPolicy.RESIZE_AND_PIN)


@st.composite
def resized_worlds(draw: st.DrawFn) -> oracle.World:
    """Hosts that would give something, with room for most of it."""
    world = draw(worlds())
    hosts = tuple(
        dataclasses.replace(
            host, cluster_id="a", status="up", cpus=8, vcpus_limit=80, vcpus_used=draw(st.sampled_from([0, 8, 74, 78])),
            memory_limit_bytes=8 * GIB, memory_bytes=8 * GIB, memory_used_bytes=draw(st.sampled_from([0, 5 * GIB])),
            cores=host.cores or encode(machine(2, 2, 2)).decode(),
        )
        for host in world.hosts
    )  # fmt: skip
    policy = dataclasses.replace(world.policy, cpu_overcommit_ratio=10.0, memory_overcommit_percent=100)
    roomy = tuple(CellFigures(n, 8, Taken(4 * GIB, 4096, 8)) for n in range(3))
    cells = {h.id: draw(st.just(roomy) | st.just(world.cells[h.id])) for h in hosts}
    held = {h: each for h, each in world.held.items() if draw(st.integers(0, 2)) == 0}
    return dataclasses.replace(world, hosts=hosts, policy=policy, cells=cells, held=held)


@st.composite
def resized_places(draw: st.DrawFn) -> Place:
    place = draw(places())
    memory = draw(st.sampled_from([16 * MIB, 17 * MIB, GIB, 5 * GIB]) | st.integers(16 * MIB, 8 * GIB))
    need = replace(
        place.need,
        cpu_pinning=RESIZE,
        numa_nodes=(),
        memory_bytes=memory,
        shape=draw(shapes(memory)),
        network_ids=(),
        storage_host_ids=None,
        host_ids=(),
    )
    return replace(place, need=need, target_host_id="", excluded_host_ids=())


@settings(max_examples=300, deadline=None)
@given(resized_worlds(), resized_places())
def test_the_columns_decide_as_the_oracle_does(world: oracle.World, place: Place) -> None:
    check_decision(world, place)


@settings(max_examples=300, deadline=None)
@given(resized_worlds(), resized_places())
def test_a_remedy_is_enough_and_one_unit_less_is_not(world: oracle.World, place: Place) -> None:
    check_remedies(world, place)


@st.composite
def machines(draw: st.DrawFn) -> tuple[CpuCore, ...]:
    """Of one or two sockets, each of one or two cells."""
    cores = machine(draw(st.integers(1, 2)), draw(st.integers(2, 6)), draw(st.sampled_from([1, 2, 4])))
    if draw(st.booleans()):
        return cores
    return tuple(replace(core, cell=2 * core.socket + min(core.cpus) % 2) for core in cores)


@settings(max_examples=300, deadline=None)
@given(machines(), st.integers(16 * MIB, 8 * GIB), st.sampled_from([0, 2048, 1048576]))
def test_a_vm_is_built_as_its_host_is_but_for_one_core_of_each_socket(
    cores: tuple[CpuCore, ...], memory: int, hugepage_kib: int
) -> None:
    memory -= memory % (hugepage_kib * 1024 or MIB)
    found = outline(cores)
    if not divides(found, memory, hugepage_kib):
        assert memory < len(found.cells) * hugepage_kib * 1024
        return
    given_ = choose(HostCpus(cores), Wish(PinningPolicy.RESIZE_AND_PIN, 0))
    made = shape(found, memory, hugepage_kib)
    assert given_ is not None
    assert given_.exclusive == ()
    assert made.sockets * made.cores * made.threads == made.vcpus == len(given_.pins)
    of = {cpu: core for core in cores for cpu in core.cpus}
    here = [of[cpu] for (cpu,) in given_.pins]
    for socket in {core.socket for core in cores}:
        whole = [core for core in cores if core.socket == socket]
        mine = {core.cpus for core in here if core.socket == socket}
        assert {core.cpus for core in whole} - mine == {min(core.cpus for core in whole)}
    for number in range(made.vcpus):  # QEMU numbers threads of a core, cores of a socket, sockets
        first = number - number % made.threads
        assert here[number] == here[first]
        assert here[number].socket == here[number - number % (made.threads * made.cores)].socket
    if made.numa_nodes:
        assert sum(node.memory_bytes for node in made.numa_nodes) == memory
        sizes = [node.memory_bytes for node in made.numa_nodes]
        assert max(sizes) - min(sizes) <= (hugepage_kib * 1024 or MIB)
        assert sorted(v for node in made.numa_nodes for v in node.vcpus) == list(range(made.vcpus))
        for node in made.numa_nodes:
            assert {here[v].cell for v in node.vcpus} == set(node.host_cells)
    else:
        assert len({core.cell for core in cores}) == 1


FIGURES = HostFigures(
    id="h1", name="h1", cluster_id="a", status="up", cpus=16, memory_bytes=16 * GIB, memory_limit_bytes=16 * GIB,
    memory_used_bytes=0, vcpus_limit=160, vcpus_used=0, cores=encode(machine(2, 4, 2)).decode(),
)  # fmt: skip
CELLS = tuple(CellFigures(n, 8, Taken(8 * GIB)) for n in range(2))


def fleet_of(*hosts: HostFigures) -> Fleet:
    fleet = Fleet()
    fleet.clusters["a"] = ClusterPolicy("a", "Default")
    for host in hosts:
        fleet.put(host)
        fleet.put_cells(host.id, CELLS)
    return fleet


def of_host(**figures: object) -> HostFigures:
    return dataclasses.replace(FIGURES, **figures)


def need_of(**fields: object) -> Need:
    made = {"vm_id": "vm", "cluster_id": "a", "memory_bytes": GIB, "vcpus": 3, "name": "web"}
    return Need(**(made | {"cpu_pinning": RESIZE} | fields))


def said(fleet: Fleet, need: Need) -> str:
    asked = request(Place(need=need, epoch=1), fleet.clusters["a"], CONFIG)
    decision = decide(fleet, asked)
    return sentence(fleet, asked, decision, explain(fleet, asked, decision), mend(fleet, asked, decision))


UNEVEN = (*machine(1, 2, 2), CpuCore(cell=0, socket=0, cpus=(9,)))
LOPSIDED = (*machine(1, 3, 1), *(CpuCore(cell=1, socket=1, cpus=(n,)) for n in (8, 9)))
OTHER = VmShape(vcpus=6, sockets=1, cores=3, threads=2)


@pytest.mark.parametrize(
    ("figures", "need", "says"),
    [
        ({"cores": ""}, {}, "h1 has not said how its CPUs are built"),
        ({"cores": encode(machine(2, 1, 2)).decode()}, {}, "VM web can't be resized to h1, which has one core in a socket, and that is left"),
        ({"cores": encode(UNEVEN).decode()}, {}, "which has cores with different numbers of threads"),
        ({"cores": encode(LOPSIDED).decode()}, {}, "which has sockets with different numbers of cores"),
        ({"vcpus_used": 150}, {}, "150 of the 160 vCPUs that h1 may promise are taken, VM web needs 12"),
        ({"vcpus_used": 150}, {}, "What would help: move or stop VMs with 2 vCPUs on h1; or raise the CPU over-commit"),
        ({}, {"shape": OTHER}, "h1 would give VM web 12 vCPUs (2 x 3 x 2, in NUMA cells 0, 1), and VM web runs with 6 vCPUs (1 x 3 x 2), which can't change while it runs"),
        ({"pages_1g": 8}, {"hugepage_kib": 1048576}, "in 2 NUMA nodes, and its memory can't be divided among so many"),
        ({"memory_limit_bytes": 64 * GIB}, {"memory_bytes": 18 * GIB}, "nodes pinned to NUMA cell 0 of h1 leave 8.0 GiB of memory, VM web needs 9.0 GiB of memory there"),
        ({"memory_limit_bytes": 64 * GIB}, {"memory_bytes": 18 * GIB}, "give VM web at most 16.0 GiB of memory instead of 18.0 GiB"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_the_host_would_give_and_why_not(figures: dict, need: dict, says: str) -> None:
    assert says in said(fleet_of(of_host(**figures)), need_of(**need))


def test_cpus_that_one_vm_has_alone_are_in_the_way_unless_they_are_left_over() -> None:
    fleet = fleet_of(FIGURES)
    fleet.hold("h1", Held(1, frozenset({0, 8}), NOBODY, 2))  # the first core of socket 0
    assert "is placed on h1" in said(fleet, need_of())
    fleet.hold("h1", Held(1, frozenset({0, 1}), NOBODY, 2))
    assert "12 vCPUs (2 x 3 x 2, in NUMA cells 0, 1), but CPU 1 of it is another VM's alone" in said(
        fleet, need_of()
    )


def test_hosts_give_what_they_have_and_their_own_vcpus_count_for_nothing() -> None:
    fleet = fleet_of(FIGURES, of_host(id="h2", name="h2", cpus=8, cores=encode(machine(1, 4, 2)).decode()))
    asked = request(Place(need=need_of(vcpus=100), epoch=1), fleet.clusters["a"], CONFIG)
    assert decide(fleet, asked).fitting == 2
    first, second = (shape_at(fleet, asked, fleet.rows[host]) for host in ("h1", "h2"))
    assert first is not None
    assert second is not None
    assert (first.vcpus, first.sockets, first.cores, first.threads) == (12, 2, 3, 2)
    assert [(node.memory_bytes, node.host_cells, len(node.vcpus)) for node in first.numa_nodes] == [
        (GIB // 2, (0,), 6),
        (GIB // 2, (1,), 6),
    ]
    assert (second.vcpus, second.sockets, second.cores, second.threads) == (6, 1, 3, 2)
    assert second.numa_nodes == ()


def test_a_loss_is_survived_with_as_many_vcpus_as_the_other_host_gives() -> None:
    """Two VMs with one vCPU of their own, each resized to twelve, don't both fit where twenty may be promised."""

    def of(promised: int) -> World:
        fleet = fleet_of(FIGURES, of_host(id="h2", name="h2", vcpus_limit=promised))
        guests = [
            Guest(need_of(vm_id=vm_id, name=vm_id, vcpus=1, high_availability=True), "h1", GIB, 12)
            for vm_id in ("one", "two")
        ]
        return World(fleet, fleet.clusters["a"], CONFIG, ClusterRules(0, ()), {g.vm_id: g for g in guests})

    assert lose(of(24), ["h1"]).homeless == ()
    world = of(23)
    (homeless,) = lose(world, ["h1"]).homeless
    assert (
        "12 of the 23 vCPUs that h2 may promise are taken" in homeless.message
        or "needs 12" in homeless.message
    )
    assert world.fleet.ints("vcpus_used").tolist() == [0, 0]
    assert world.fleet.ints("cell_memory_bytes_used")[:, :2].sum() == 0


def test_who_must_follow_it_finds_room_beside_what_it_gets() -> None:
    fleet = fleet_of(of_host(vcpus_used=145))
    policy, place = fleet.clusters["a"], Place(need=need_of(), epoch=1)
    scores = [room_for_all(fleet, request(place, policy, CONFIG, Bound(room=(0, n))))[0] for n in (3, 4)]
    assert scores == [1.0, 0.0], "of 160, 12 are its own"


def test_plans_leave_it_where_it_is_and_say_so() -> None:
    fleet = fleet_of(FIGURES, of_host(id="h2", name="h2"))
    board = board_of(fleet, fleet.clusters["a"], [Standing(need_of(), "h1")], ClusterRules(0, ()), CONFIG)
    (guest,) = board.guests
    assert guest.kept == RESIZED
    assert guest.vcpus == 12
