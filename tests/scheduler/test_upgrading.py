"""Upgrading a cluster, computed as a whole: each host is empty at its turn, every step is legal, and most VMs move once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.policies.affinity import ClusterRules
from services.scheduler.policies.board import Board, Guest, Place
from services.scheduler.policies.upgrading import upgrade
from services.scheduler.policies.waves import PER_HOST, waves
from tests.scheduler.boards import Case, cases
from tests.scheduler.worlds import GIB


@settings(max_examples=300)
@given(case=cases(), data=st.data())
def test_each_host_has_one_turn_and_is_empty_then_but_for_those_that_are_named(
    case: Case, data: st.DataObject
) -> None:
    board = case.board()
    hosts = data.draw(st.lists(st.sampled_from(range(len(case.places))), min_size=1, max_size=4, unique=True))
    suits, replay, turns = dict(case.suits), case.replay(), list(upgrade(board, hosts))
    assert sorted(turn.host for turn in turns) == sorted(hosts)
    for turn in turns:
        out = case.places[turn.host].id
        replay.suits = {vm: [host for host in suited if host != out] for vm, suited in suits.items()}
        steps = turn.emptied.steps
        target = {case.guests[s.guest].id: case.places[s.target].id for s in steps}
        for wave in waves(turn.board, steps):
            named = [(case.guests[s.guest].id, case.places[s.target].id) for s in wave]
            assert not replay.play(named, PER_HOST, target)
        left = {vm for vm, host in replay.at.items() if host == out}
        assert left == {case.guests[s.guest].id for s in turn.emptied.stuck}
        assert all(s.reason for s in turn.emptied.stuck)
    assert (board.at == case.board().at).all()


def roomy(counts: list[int]) -> Board:
    """Hosts with so many equal VMs, each with room for all of them."""
    guests = [
        Guest(f"v{h}{n}", f"V{h}{n}", f"h{h}", GIB, 1) for h, count in enumerate(counts) for n in range(count)
    ]
    places = [
        Place(f"h{h}", f"H{h}", 100 * GIB, count * GIB, 1000, count, 64) for h, count in enumerate(counts)
    ]
    return Board(places, guests, np.ones((len(guests), len(places)), np.bool_), ClusterRules(0, ()))


@given(counts=st.lists(st.integers(0, 6), min_size=2, max_size=5))
def test_where_there_is_room_only_the_vms_of_the_emptiest_host_move_twice(counts: list[int]) -> None:
    turns = list(upgrade(roomy(counts), range(len(counts))))
    assert counts[turns[0].host] == min(counts)
    moves = sum(len(turn.emptied.steps) for turn in turns)
    assert moves == sum(counts) + min(counts)


def test_hosts_that_have_no_turn_take_vms_too() -> None:
    """They are as good as those that are done."""
    turns = list(upgrade(roomy([3, 3, 0]), [0, 1]))
    assert sum(len(turn.emptied.steps) for turn in turns) == 6
    assert {step.target for step in turns[0].emptied.steps} == {2}
