"""The smallest change that makes a VM fit: it is enough, and one unit less is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace as with_
from typing import Any

import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from services.scheduler.cells import CellFigures, Taken
from services.scheduler.figures import HostFigures
from services.scheduler.model import ClusterPolicy
from services.scheduler.policies.affinity import Group
from services.scheduler.policies.bound import Seat
from services.scheduler.policies.decision import decide, explain, mend, room
from tests.scheduler import oracle
from tests.scheduler.changes import applied, of_cluster, with_more_pages
from tests.scheduler.oracle import World
from tests.scheduler.worlds import CONFIG, GIB, MIB, NOW, fleet_of, places, worlds
from tests.scheduler.worlds import asked as asked_of
from volery.contracts.affinity_group import AffinityRule
from volery.contracts.cpus import PinningPolicy
from volery.contracts.domain import NumaNode
from volery.contracts.scheduling import ChangeKind, Need, Place, Purpose, Remedy
from volery.contracts.scheduling_policy import SchedulingPolicy


def remedies(world: World, place: Place) -> tuple[Remedy, ...]:
    fleet, asked = fleet_of(world), asked_of(world, place)
    return mend(fleet, asked, decide(fleet, asked))


def fitting(world: World, place: Place) -> set[str]:
    """By the oracle, so that nothing here trusts the masks that the changes were made from."""
    return {h.id for h in oracle.considered(world, place) if not oracle.refusals(world, place, h, CONFIG)}


@settings(max_examples=300, deadline=None)
@given(worlds(), places())
def test_a_remedy_is_enough_one_unit_less_is_not_and_none_means_that_nothing_helps(
    world: World, place: Place
) -> None:
    check_remedies(world, place)


def check_remedies(world: World, place: Place) -> None:
    found = remedies(world, place)
    if fitting(world, place):
        assert found == ()
        return
    assert found or hopeless(world, place)
    kinds = [r.kind for r in found]
    assert len(set(kinds)) == len(kinds)
    assert ChangeKind.MIXED not in kinds or len(kinds) == 1
    hosts = {h.id: h for h in world.hosts}
    for remedy in found:
        assert remedy.sentence
        assert remedy.kind is ChangeKind.MIXED or {c.kind for c in remedy.changes} == {remedy.kind}
        against = oracle.refusals(world, place, hosts[remedy.host_id], CONFIG)
        assert {rule for change in remedy.changes for rule in change.rules} == against
        everything = world, place
        for change in remedy.changes:
            assert change.sentence
            assert change.rules
            everything = applied(*everything, change)
        assert remedy.host_id in fitting(*everything), remedy
        asked = asked_of(*everything)
        assert decide(fleet_of(everything[0]), asked).best is not None
        for short in remedy.changes:
            almost = world, place
            for change in remedy.changes:
                almost = applied(*almost, change, less=int(change is short))
            assert not fitting(*almost), (remedy, short)


def hopeless(world: World, place: Place) -> bool:
    """By the oracle: against each host there is a rule that no change mends alone, each tried as far as REST goes."""
    for host in oracle.considered(world, place):
        left = oracle.refusals(world, place, host, CONFIG)
        for changed, asked in extremes(world, place):
            now = next(h for h in changed.hosts if h.id == host.id)
            left &= oracle.refusals(changed, asked, now, CONFIG)
        if not left:
            return False
    return True


def is_resized(place: Place) -> bool:
    return place.need.cpu_pinning.policy is PinningPolicy.RESIZE_AND_PIN


def pins(place: Place) -> bool:
    """Whether a node takes anything of a NUMA cell."""
    return is_resized(place) or any(
        node.host_cells and node.mode != "preferred" for node in place.need.numa_nodes
    )


def smallest(place: Place, fields: dict[str, Any]) -> dict[str, Any]:
    """A VM on huge pages has at least one, and giving it less memory never makes it need less of a host's ordinary memory."""
    if fields.keys() == {"hugepage_kib"} and pins(place):
        return {}
    if fields.keys() == {"memory_bytes"} and place.need.hugepage_kib:
        pages = 3 if is_resized(place) else 1  # one for each cell that a host here has
        least = max(16 * MIB, pages * place.need.hugepage_kib * 1024)
        return {"memory_bytes": min(least, place.need.memory_bytes) if is_resized(place) else least}
    return fields


def all_the_pages(host: HostFigures, world: World, place: Place) -> HostFigures:
    """As many as the VM lacks, where the ordinary memory has room for these and for what the VM takes of it besides."""
    name = {2048: "pages_2m", 1048576: "pages_1g"}.get(place.need.hugepage_kib)
    if name is None:
        return host
    size = place.need.hugepage_kib * 1024
    lacking = -(-place.need.memory_bytes // size) + getattr(host, f"{name}_used") - getattr(host, name)
    if lacking <= 0 or host.memory_bytes < lacking * size:
        return host
    new = with_more_pages(with_(world, hosts=(host,)), host.id, name, getattr(host, name) + lacking).hosts[0]
    return host if "memory" in oracle.refusals(world, place, new, CONFIG) else new


def extremes(world: World, place: Place) -> Iterator[tuple[World, Place]]:
    yield with_(world, hosts=tuple(with_(h, status="up") for h in world.hosts)), place
    yield with_(world, hosts=tuple(with_(h, memory_used_bytes=0) for h in world.hosts)), place
    yield with_(world, hosts=tuple(with_(h, vcpus_used=0) for h in world.hosts)), place
    yield with_(world, hosts=tuple(with_(h, pages_2m_used=0, pages_1g_used=0) for h in world.hosts)), place
    yield with_(world, hosts=tuple(all_the_pages(h, world, place) for h in world.hosts)), place
    unpinned = tuple(replace(node, host_cells=()) for node in place.need.numa_nodes)
    yield world, replace(place, need=replace(place.need, numa_nodes=unpinned))
    yield with_(world, busy_since={}), place
    yield with_(world, swapped={}), place
    yield of_cluster(world, balance="evenly_distributed"), place
    yield with_(world, groups=()), place
    if world.given is not None:
        yield with_(world, given=replace(world.given, filters=("cpu",))), place
    yield of_cluster(world, memory_overcommit_percent=400), place
    yield of_cluster(world, cpu_overcommit_ratio=100.0), place
    everywhere = tuple(h.id for h in world.hosts)
    for fields in (
        {"memory_bytes": 16 * MIB}, {"vcpus": 1}, {"network_ids": ()}, {"storage_host_ids": None}, {"host_ids": ()},
        {"host_devices": ()}, {"cpu_model": "host-model"}, {"machine": "q35"}, {"machine": "pc"}, {"hugepage_kib": 0},
    ):  # fmt: skip
        yield world, replace(place, need=replace(place.need, **smallest(place, fields)))
    for kib in (2048, 1048576):
        if place.need.hugepage_kib and place.need.memory_bytes % (kib * 1024) == 0 and not pins(place):
            yield world, replace(place, need=replace(place.need, hugepage_kib=kib))
    yield world, replace(place, target_host_id="")
    if place.purpose is not Purpose.MIGRATE:
        yield world, replace(place, excluded_host_ids=())
    yield (
        with_(world, networks=tuple(with_(n, host_ids=frozenset(everywhere)) for n in world.networks)),
        place,
    )


def figures(host_id: str, **changed: Any) -> HostFigures:
    made: dict[str, Any] = {
        "id": host_id, "name": host_id, "cluster_id": "a", "status": "up", "cpus": 8,
        "memory_bytes": 16 * GIB, "memory_limit_bytes": 16 * GIB - 256 * MIB, "memory_used_bytes": 0,
        "vcpus_limit": 80, "vcpus_used": 0,
    }  # fmt: skip
    return HostFigures(**(made | changed))


def world_of(*hosts: HostFigures) -> World:
    return World(hosts, ClusterPolicy("a", "Default"))


def place_of(**need: Any) -> Place:
    made: dict[str, Any] = {
        "vm_id": "vm",
        "cluster_id": "a",
        "memory_bytes": 4 * GIB,
        "vcpus": 2,
        "name": "web",
    }
    return Place(need=Need(**(made | need)), epoch=1)


def said(world: World, place: Place) -> dict[str, str]:
    return {r.kind: r.sentence for r in remedies(world, place)}


def test_each_kind_of_change_names_its_own_best_host() -> None:
    hosts = (
        figures("full", memory_used_bytes=14 * GIB),
        figures("fuller", memory_used_bytes=15 * GIB),
        figures("resting", status="maintenance"),
    )
    assert said(world_of(*hosts), place_of()) == {
        "host": "move or stop VMs with 2.3 GiB of memory on full",
        "vm": "give VM web at most 1.7 GiB of memory instead of 4.0 GiB (full takes it then)",
        "cluster": "raise the memory over-commit of cluster Default from 100 to 115 % (full takes it then)",
    }


def test_rules_that_fail_only_together_are_named_together() -> None:
    both = world_of(figures("h1", memory_used_bytes=14 * GIB, vcpus_used=79))
    (of_cluster_,) = [r for r in remedies(both, place_of()) if r.kind is ChangeKind.CLUSTER]
    assert [c.rules for c in of_cluster_.changes] == [("cpu_overcommit",), ("memory",)]
    assert of_cluster_.sentence == (
        "raise the CPU over-commit of cluster Default from 10 to 10.2 vCPUs per thread and raise the memory "
        "over-commit of cluster Default from 100 to 115 % (h1 takes it then)"
    )
    threads = world_of(figures("h1", cpus=1, vcpus_limit=10, vcpus_used=9))
    (of_vm,) = remedies(threads, place_of(vcpus=3))[:1]
    assert [(c.rules, c.field, c.wanted) for c in of_vm.changes] == [(("cpu", "cpu_overcommit"), "vcpus", 1)]


def test_what_no_kind_alone_mends_is_mended_by_the_smallest_mixture() -> None:
    hosts = (
        figures("far", status="down", cpus=1, memory_used_bytes=15 * GIB),
        figures("near", status="maintenance", cpus=1),
    )
    (found,) = remedies(world_of(*hosts), place_of())
    assert (found.kind, found.host_id) == ("mixed", "near")
    assert found.sentence == "activate near and give VM web at most 1 vCPU instead of 2"


def test_a_field_that_must_change_anyway_is_changed_further_before_another_is() -> None:
    world = world_of(figures("h1", status="maintenance", cpus=2, vcpus_limit=20, vcpus_used=19))
    (found,) = remedies(world, place_of(vcpus=3))
    assert [(c.field, c.wanted) for c in found.changes] == [("status", "up"), ("vcpus", 1)]


def test_memory_that_is_left_is_proposed_in_whole_mib() -> None:
    world = world_of(figures("h1", memory_limit_bytes=2 * GIB + 65 * MIB + 10))
    (of_vm,) = [r for r in remedies(world, place_of(memory_bytes=4 * GIB + 1)) if r.kind is ChangeKind.VM]
    assert [(c.wanted, c.amount) for c in of_vm.changes] == [(2 * GIB, 2049)]


@pytest.mark.parametrize(
    ("changed", "place", "expected"),
    [
        ({"machines": frozenset({"pc"})}, place_of(machine="q35"), {"vm": "machine"}),
        ({"cpu_models": frozenset({"Nehalem"})}, place_of(cpu_model="Skylake"), {"vm": "cpu_model"}),
        ({"cpus": 0, "vcpus_limit": 0}, place_of(), {}),
        ({}, place_of(storage_host_ids=()), {"connections": "storage_host_ids"}),
        ({}, place_of(network_ids=("nobody-knows-it",)), {"vm": "nics"}),
        ({}, place_of(host_ids=("gone",)), {"vm": "affinity.host_ids"}),
        ({"vcpus_used": 79}, place_of(), {"host": "vcpus_used", "vm": "vcpus", "cluster": "cpu_overcommit_ratio"}),
        ({"memory_bytes": GIB, "memory_limit_bytes": 768 * MIB}, place_of(), {"vm": "memory_bytes"}),
        ({"cluster_id": "b"}, replace(place_of(), target_host_id="h1"), {}),
    ],
)  # fmt: skip
def test_only_what_can_be_done_is_proposed(
    changed: dict[str, Any], place: Place, expected: dict[str, str]
) -> None:
    """A host without known threads, one of another cluster, an over-commit beyond 400 %: nobody can do that."""
    found = remedies(world_of(figures("h1", **changed)), place)
    assert {r.kind: r.changes[0].field for r in found} == expected


BACKED = {"memory_bytes": 4 * GIB, "hugepage_kib": 2048}


@pytest.mark.parametrize(
    ("changed", "fields", "expected"),
    [
        (
            {"pages_2m": 2048, "pages_2m_used": 48}, BACKED,
            {
                "host": "move or stop VMs with 48 huge pages of 2 MiB on h1",
                "vm": "give VM web at most 3.9 GiB of memory instead of 4.0 GiB, 48 fewer huge pages of 2 MiB (h1 takes it then)",
            },
        ),
        (
            {"pages_2m": 1000}, BACKED,
            {
                "host": "set 1048 more huge pages of 2 MiB (2.0 GiB) aside on h1",
                "vm": "give VM web at most 2.0 GiB of memory instead of 4.0 GiB, 1048 fewer huge pages of 2 MiB (h1 takes it then)",
            },
        ),
        (
            {"pages_1g": 4}, BACKED,
            {
                "host": "set 2048 more huge pages of 2 MiB (4.0 GiB) aside on h1",
                "vm": "back VM web by huge pages of 1 GiB instead of huge pages of 2 MiB (h1 takes it then)",
            },
        ),
        (
            {"memory_used_bytes": 15 * GIB}, BACKED, {},
        ),
        (
            {"memory_used_bytes": 4 * GIB}, {"memory_bytes": 4 * GIB, "hugepage_kib": 1048576},
            {
                "host": "set 4 more huge pages of 1 GiB (4.0 GiB) aside on h1",
                "vm": "back VM web by ordinary memory instead of huge pages of 1 GiB (h1 takes it then)",
            },
        ),
    ],
)  # fmt: skip
def test_huge_pages_are_freed_set_aside_or_done_without(
    changed: dict[str, Any], fields: dict[str, Any], expected: dict[str, str]
) -> None:
    assert said(world_of(figures("h1", **changed)), place_of(**fields)) == expected


def test_a_cell_that_is_taken_is_freed_or_the_node_is_let_go() -> None:
    node = NumaNode(memory_bytes=4 * GIB, vcpus=(0, 1), host_cells=(1,))
    full = CellFigures(1, 4, Taken(8 * GIB), Taken(6 * GIB))
    world = with_(world_of(figures("h1"), figures("h2")), cells={"h1": (full,), "h2": ()})
    place = place_of(numa_nodes=(node,))
    assert said(world, place) == {
        "host": "move or stop VMs whose nodes hold 2.0 GiB of memory of NUMA cell 1 of h1",
        "vm": "let the NUMA nodes of VM web be in any cell (h1 takes it then)",
    }
    told = explain(fleet_of(world), asked_of(world, place), decide(fleet_of(world), asked_of(world, place)))
    assert [v.message for host in told for v in host.verdicts] == [
        "nodes pinned to NUMA cell 1 of h1 leave 2.0 GiB of memory, VM web needs 4.0 GiB of memory there",
        "h2 has no NUMA cell 1",
    ]
    narrow = with_(world, cells={"h1": (CellFigures(1, 1, Taken(8 * GIB)),), "h2": ()})
    assert said(narrow, place).keys() == {"vm"}
    both = replace(place.need, hugepage_kib=2048, numa_nodes=(node,))
    paged = CellFigures(1, 4, Taken(8 * GIB, 2048, 0), Taken(0, 1, 0))
    short = with_(world_of(figures("h1", pages_2m=4096)), cells={"h1": (paged,)})
    assert said(short, replace(place, need=both))["host"] == (
        "move or stop VMs whose nodes hold 1 huge pages of 2 MiB of NUMA cell 1 of h1"
    )


def test_less_memory_is_no_help_for_the_overhead_of_a_vm_on_huge_pages() -> None:
    full = figures("h1", pages_2m=4096, memory_used_bytes=16 * GIB - 256 * MIB)
    assert said(world_of(full), place_of(**BACKED)).keys() == {"host", "cluster"}
    nearly = figures("h1", pages_2m=4096, memory_used_bytes=16 * GIB - 256 * MIB - 64 * MIB)
    assert said(world_of(nearly), place_of(**BACKED)).keys() == {"host", "cluster"}


def test_a_migration_s_source_is_never_proposed() -> None:
    place = replace(place_of(), purpose=Purpose.MIGRATE, excluded_host_ids=("h1",))
    assert remedies(world_of(figures("h1")), place) == ()
    start = replace(place, purpose=Purpose.START)
    assert said(world_of(figures("h1")), start) == {"request": "try again without leaving out h1"}


def test_another_host_that_fits_is_proposed_for_the_one_that_was_asked_for() -> None:
    hosts = (figures("h1", status="maintenance"), figures("h2", cpus=1), figures("h3"))
    place = replace(place_of(), target_host_id="h1")
    assert said(world_of(*hosts), place) == {
        "host": "activate h1",
        "request": "ask for h3 or for no host in particular",
    }


def test_room_names_the_smallest_change_without_the_excluded_hosts() -> None:
    hosts = (figures("source"), figures("other", memory_used_bytes=14 * GIB))
    world, place = world_of(*hosts), replace(place_of(), excluded_host_ids=("source",))
    found = room(fleet_of(world), asked_of(world, place))
    assert {r.host_id for r in found.remedies} == {"other"}
    assert [r.kind for r in found.remedies] == ["host", "vm", "cluster"]


OWN = SchedulingPolicy(
    id="own",
    revision=3,
    created_at=NOW,
    updated_at=NOW,
    name="own",
    filters=("swap", "cpu_overload"),
    weights={},
)


def test_an_own_policy_can_do_without_a_filter_and_a_built_in_one_can_not() -> None:
    busy = World((figures("h1"),), ClusterPolicy("a", "A"), busy_since={"h1": 1.0}, cpu_percent={"h1": 90.0})
    swapping = World((figures("h1"),), ClusterPolicy("a", "A"), swapped={"h1": 8 * GIB})
    for world, rule in ((busy, "cpu_overload"), (swapping, "swap")):
        assert said(world, place_of()).keys() == {"host"}
        own = with_(world, policy=with_(world.policy, policy_id="own"), given=OWN)
        assert said(own, place_of())["cluster"] == (
            f"leave the filter {rule} out of scheduling policy own (h1 takes it then)"
        )


def group(name: str, vms: str, hosts: str = "", **fields: Any) -> Group:
    made: dict[str, Any] = {
        "id": name, "name": name, "priority": 1.0, "vms": frozenset(vms.split()), "hosts": frozenset(hosts.split()),
        "vm_rule": AffinityRule.DISABLED, "vm_enforcing": True,
        "host_rule": AffinityRule.DISABLED, "host_enforcing": True,
    }  # fmt: skip
    return Group(**(made | fields))


APART: dict[str, Any] = {"vm_rule": AffinityRule.NEGATIVE}
TOGETHER: dict[str, Any] = {"vm_rule": AffinityRule.POSITIVE}
ONLY: dict[str, Any] = {"host_rule": AffinityRule.POSITIVE}
NEVER_ON: dict[str, Any] = {"host_rule": AffinityRule.NEGATIVE}
ON_H1 = Seat("db", frozenset({"h1"}))
TIED: dict[str, tuple[tuple[Group, ...], dict[str, Seat], str, str]] = {
    "apart": (
        (group("spread", "vm db", **APART),),
        {"db": ON_H1},
        "take VM web out of affinity group spread",
        "make the VM rule of affinity group spread a wish",
    ),
    "through its mate": (
        (group("pair", "vm app", **TOGETHER), group("spread", "app db", **APART)),
        {"db": ON_H1},
        "take VM web out of affinity group pair",
        "make the VM rule of affinity group pair a wish",
    ),
    "twice apart": (
        (group("spread", "vm db", **APART), group("wide", "vm db app", **APART)),
        {"db": ON_H1},
        "take VM web out of affinity group spread and take VM web out of affinity group wide",
        "make the VM rule of affinity group spread a wish and make the VM rule of affinity group wide a wish",
    ),
    "thrice apart": (
        tuple(group(f"s{n}", "vm db", **APART) for n in range(3)),
        {"db": ON_H1},
        " and ".join(f"take VM web out of affinity group s{n}" for n in range(3)),
        " and ".join(f"make the VM rule of affinity group s{n} a wish" for n in range(3)),
    ),
    "elsewhere only": (
        (group("licence", "vm", "h9", **ONLY),),
        {},
        "take VM web out of affinity group licence",
        "add h1 to the hosts of affinity group licence",
    ),
    "never here": (
        (group("old", "vm", "h1", **NEVER_ON),),
        {},
        "take VM web out of affinity group old",
        "take h1 out of the hosts of affinity group old",
    ),
    "with one that is moving": (
        (group("pair", "vm db", **TOGETHER),),
        {"db": Seat("db", frozenset({"h1", "h9"}))},
        "take VM web out of affinity group pair",
        "make the VM rule of affinity group pair a wish",
    ),
}


@pytest.mark.parametrize("case", TIED)
def test_what_a_group_could_let_go_of_is_the_smallest_set(case: str) -> None:
    groups, seats, of_vm, of_cluster = TIED[case]
    world = World((figures("h1"),), ClusterPolicy("a", "A"), groups=groups, seats=seats)
    then = " (h1 takes it then)"
    assert said(world, place_of()) == {"vm": of_vm + then, "cluster": of_cluster + then}


def test_groups_and_other_rules_are_mended_together_and_the_host_with_fewer_changes_wins() -> None:
    groups = (group("spread", "vm db app", **APART), group("more", "vm db", **APART))
    seats = {"db": ON_H1, "app": Seat("app", frozenset({"h2"}))}
    hosts = (figures("h1"), figures("h2"), figures("h3", status="maintenance"))
    world = World(hosts, ClusterPolicy("a", "A"), groups=groups, seats=seats)
    assert said(world, place_of()) == {
        "host": "activate h3",
        "vm": "take VM web out of affinity group spread (h2 takes it then)",
        "cluster": "make the VM rule of affinity group spread a wish (h2 takes it then)",
    }
    full = with_(world, hosts=(figures("h1", status="maintenance"),))
    (mixed,) = remedies(full, place_of())
    assert [(c.object_kind, c.field, c.rules) for c in mixed.changes] == [
        ("host", "status", ("host_state",)),
        ("affinity_group", "vm_ids", ("affinity_vms",)),
        ("affinity_group", "vm_ids", ("affinity_vms",)),
    ]
