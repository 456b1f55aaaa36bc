"""Random boards for tests of plans: few hosts, so full and so different that much is illegal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from services.scheduler.pages import NO_PAGES, Pages
from services.scheduler.policies.affinity import ClusterRules, Group, conflicts
from services.scheduler.policies.board import Board, Guest, Place, Step
from services.scheduler.policies.waves import PER_HOST, waves
from tests.scheduler.oracle import allowed
from tests.scheduler.replay import Replay
from tests.scheduler.worlds import GIB, subsets
from volery.contracts.affinity_group import AffinityRule


@dataclass
class Case:
    places: list[Place]
    guests: list[Guest]
    suits: dict[str, list[str]]
    groups: tuple[Group, ...]

    def board(self) -> Board:
        mask = np.zeros((len(self.guests), len(self.places)), np.bool_)
        for n, guest in enumerate(self.guests):
            for m, place in enumerate(self.places):
                bound = allowed(self.groups, {}, guest.id, place.id)[1]
                mask[n, m] = place.id in self.suits[guest.id] and bound and place.open
        return Board(self.places, self.guests, mask, ClusterRules(0, self.groups))

    def replay(self) -> Replay:
        return Replay(self.places, self.guests, self.suits, self.groups)

    def played(self, steps: tuple[Step, ...], board: Board) -> list[str]:
        """What is wrong with the plan, carried out in waves; several steps of a VM are several places on its way."""
        replay, wrong = self.replay(), []
        target = {self.guests[s.guest].id: self.places[s.target].id for s in steps}
        for wave in waves(board, steps):
            named = [(self.guests[s.guest].id, self.places[s.target].id) for s in wave]
            wrong += replay.play(named, PER_HOST, target)
        return wrong


@st.composite
def cases(draw: st.DrawFn, *, with_groups: bool = True) -> Case:
    hosts = [f"h{n}" for n in range(draw(st.integers(2, 5)))]
    vms = [f"v{n}" for n in range(draw(st.integers(1, 9)))]
    guests = [
        Guest(
            id=vm,
            name=vm.upper(),
            host_id=draw(st.sampled_from(hosts)),
            memory=draw(st.sampled_from([1, 2, 3, 5])) * GIB,
            vcpus=draw(st.integers(1, 4)),
            load=draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
            high_availability=draw(st.booleans()),
            priority=draw(st.integers(0, 2)),
            pages=draw(st.sampled_from([NO_PAGES, NO_PAGES, Pages(512), Pages(0, 2)])),
            kept=draw(st.sampled_from(["", "", "", "", "its migration policy forbids to move it"])),
        )
        for vm in vms
    ]
    places = []
    for host in hosts:
        here = [g for g in guests if g.host_id == host]
        foreign = draw(st.sampled_from([0, 0, 1]))
        places.append(
            Place(
                id=host,
                name=host.upper(),
                memory_limit=draw(st.integers(4, 20)) * GIB,
                memory_used=sum(g.memory for g in here) + foreign * GIB,
                vcpus_limit=draw(st.sampled_from([8, 16, 32])),
                vcpus_used=sum(g.vcpus for g in here) + foreign,
                cpus=draw(st.sampled_from([4, 8])),
                load=sum(g.load for g in here) + foreign * 0.25,
                open=draw(st.sampled_from([True, True, True, False])),
                pages_left=Pages(draw(st.sampled_from([-8, 0, 512, 2048])), draw(st.integers(0, 4))),
            )
        )
    suits = {vm: draw(st.just(hosts) | subsets(hosts)) for vm in vms}
    groups = tuple(
        Group(
            id=f"g{n}",
            name=f"G{n}",
            priority=draw(st.sampled_from([1.0, 2.0])),
            vm_rule=draw(st.sampled_from(AffinityRule)),
            vm_enforcing=draw(st.booleans()),
            host_rule=draw(st.sampled_from(AffinityRule)),
            host_enforcing=draw(st.booleans()),
            vms=frozenset(draw(subsets(vms))),
            hosts=frozenset(draw(subsets(hosts))),
        )
        for n in range(draw(st.integers(0, 3)) if with_groups else 0)
    )
    assume(not conflicts(groups))
    return Case(places, guests, suits, groups)


@st.composite
def crowded(draw: st.DrawFn, *, groups: int = 3) -> Case:
    """Hosts that suit nearly all VMs, with room for one or two more, and rules about most VMs: what is legal depends on who
    went before."""
    hosts = [f"h{n}" for n in range(draw(st.integers(2, 4)))]
    vms = [f"v{n}" for n in range(draw(st.integers(2, 6)))]
    guests = [
        Guest(vm, vm.upper(), draw(st.sampled_from(hosts)), draw(st.integers(1, 4)) * GIB, 1) for vm in vms
    ]
    places = []
    for host in hosts:
        used = sum(g.memory for g in guests if g.host_id == host)
        limit = used + draw(st.integers(0, 4)) * GIB
        count = sum(g.host_id == host for g in guests)
        places.append(Place(host, host.upper(), max(limit, GIB), used, 16, count, 4))
    rules = st.sampled_from(AffinityRule)
    made = tuple(
        Group(
            id=f"g{n}",
            name=f"G{n}",
            priority=1.0,
            vm_rule=draw(rules),
            vm_enforcing=draw(st.sampled_from([True, True, False])),
            host_rule=draw(rules),
            host_enforcing=draw(st.booleans()),
            vms=frozenset(draw(st.lists(st.sampled_from(vms), min_size=2, unique=True))),
            hosts=frozenset(draw(st.lists(st.sampled_from(hosts), min_size=1, unique=True))),
        )
        for n in range(draw(st.integers(1, groups)))
    )
    assume(not conflicts(made))
    return Case(places, guests, dict.fromkeys(vms, hosts), made)
