"""Plans as they are computed, each played back by rules of its own: every step legal, never worse on the way."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.cells import CellFigures, Taken
from services.scheduler.config import SchedulerConfig
from services.scheduler.figures import HostFigures
from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy
from services.scheduler.pages import Pages
from services.scheduler.policies.affinity import ClusterRules, Group
from services.scheduler.policies.balancing import Aims, balance
from services.scheduler.policies.board import Board, Guest, Place, Step
from services.scheduler.policies.boarding import Standing, board_of
from services.scheduler.policies.enforcing import broken, enforce
from services.scheduler.policies.evacuating import evacuate
from services.scheduler.policies.survival import Survival
from services.scheduler.policies.waves import waves
from tests.scheduler.boards import Case, cases
from tests.scheduler.replay import Replay
from tests.scheduler.worlds import GIB
from volery.contracts.affinity_group import AffinityRule
from volery.contracts.domain import NumaNode
from volery.contracts.scheduling import Need

AIMS = {
    "even": (Aims(cpu=1.0, memory=1.0), {"load": 1.0, "memory": 1.0}),
    "guests": (Aims(guests=1.0), {"guests": 1.0}),
}


def unprotected(case: Case, replay: Replay, kept: list[bool]) -> list[str]:
    """Hosts that had room for their VMs elsewhere and have it no more."""
    return [p.id for p, had in zip(case.places, kept, strict=True) if had and not replay.survives(p)]


@settings(max_examples=400)
@given(case=cases(), aims=st.sampled_from(sorted(AIMS)), reserved=st.booleans())
def test_each_step_of_a_balance_is_legal_and_makes_it_better(case: Case, aims: str, reserved: bool) -> None:
    board, (aim, weights) = case.board(), AIMS[aims]
    kept = Survival(board.copy()).kept.tolist()
    plan = balance(board, aim, reserved=reserved)
    assert not case.played(plan.steps, board)
    replay = case.replay()
    cost = replay.cost(weights)
    assert cost == pytest.approx(plan.before)
    for step in plan.steps:
        replay.at[case.guests[step.guest].id] = case.places[step.target].id
        assert replay.cost(weights) < cost
        cost = replay.cost(weights)
        assert not reserved or not unprotected(case, replay, kept)
    assert cost == pytest.approx(plan.after)
    assert (board.at == case.board().at).all()


@settings(max_examples=200)
@given(case=cases(with_groups=False))
def test_what_a_balance_leaves_no_single_move_mends(case: Case) -> None:
    """Unless it would gain next to nothing."""
    plan = balance(case.board(), Aims(cpu=1.0, memory=1.0))
    replay = case.replay()
    for step in plan.steps:
        replay.at[case.guests[step.guest].id] = case.places[step.target].id
    weights = {"load": 1.0, "memory": 1.0}
    at, cost = dict(replay.at), replay.cost(weights)
    closed = {place.id for place in case.places if not place.open}
    for guest, place in product(case.guests, case.places):
        replay.at = dict(at)
        if at[guest.id] in closed:
            continue
        if not replay.play([(guest.id, place.id)], 2, {}):
            # A move that was given up had gained less than the least gain with all the others made.
            assert cost - replay.cost(weights) <= plan.before * 0.01 + 1e-9


@settings(max_examples=400)
@given(case=cases(), data=st.data())
def test_each_step_of_an_evacuation_is_legal_and_who_stays_is_named(case: Case, data: st.DataObject) -> None:
    board = case.board()
    hosts = data.draw(st.lists(st.sampled_from(range(len(case.places))), min_size=1, max_size=2, unique=True))
    names = {case.places[host].id for host in hosts}
    case.suits = {vm: [h for h in suited if h not in names] for vm, suited in case.suits.items()}
    plan = evacuate(board, hosts)
    assert not case.played(plan.steps, board)
    board.open[hosts] = True
    at = {g.id: g.host_id for g in case.guests} | {
        case.guests[s.guest].id: case.places[s.target].id for s in plan.steps
    }
    stuck = {case.guests[s.guest].id for s in plan.stuck}
    assert stuck == {vm for vm, host in at.items() if host in names}
    assert all(s.reason for s in plan.stuck)
    assert len(plan.stuck) == len(stuck)
    replay = case.replay()
    replay.at = at
    for vm in stuck:
        block = [case.guests[n].id for n in board.block(board.number[vm])]
        if len(block) == 1:
            # Nobody who has no place fits anywhere at the end.
            assert all(replay.play([(vm, p.id)], 2, {}) for p in case.places), vm
            replay.at = dict(at)


@settings(max_examples=400)
@given(case=cases(), reserved=st.booleans())
def test_each_step_that_mends_groups_is_legal_and_breaks_nothing_that_matters_more(
    case: Case, reserved: bool
) -> None:
    board = case.board()
    kept = Survival(board.copy()).kept.tolist()
    plan = enforce(board, reserved=reserved)
    assert not case.played(plan.steps, board)
    end = board.copy()
    for step in plan.steps:
        end.move(step)
    assert plan.before == broken(board, case.groups)
    assert plan.after == broken(end, case.groups)
    assert plan.after < plan.before if plan.steps else plan.after == plan.before
    replay = case.replay()
    for step in plan.steps:
        replay.at[case.guests[step.guest].id] = case.places[step.target].id
    assert not reserved or not unprotected(case, replay, kept)


def single_mends(case: Case, end: Board) -> bool:
    """Whether moving one VM by itself would break less."""
    before = broken(end, case.groups)
    for guest, place in product(range(len(case.guests)), range(len(case.places))):
        if guest in end.blocks or not end.open[end.at[guest]]:
            continue
        replay = case.replay()
        replay.at = {g.id: case.places[int(end.at[n])].id for n, g in enumerate(case.guests)}
        if replay.play([(case.guests[guest].id, case.places[place].id)], 2, {}):
            continue
        tried = end.copy()
        tried.move(tried.step(guest, place))
        if broken(tried, case.groups) < before:
            return True
    return False


@settings(max_examples=200)
@given(case=cases())
def test_what_stays_broken_no_single_move_mends(case: Case) -> None:
    board = case.board()
    plan = enforce(board)
    for step in plan.steps:
        board.move(step)
    assert not single_mends(case, board)


def test_who_must_be_with_a_vm_that_stays_stays_too() -> None:
    guests = [Guest("a", "A", "h0", GIB, 1), Guest("b", "B", "h0", GIB, 1, kept="pinned")]
    places = [Place(f"h{n}", f"H{n}", 8 * GIB, (2 - 2 * n) * GIB, 8, 2 - 2 * n, 4) for n in range(2)]
    disabled, positive = AffinityRule.DISABLED, AffinityRule.POSITIVE
    pair = Group("g", "G", 1.0, positive, True, disabled, True, frozenset("ab"), frozenset())
    plan = evacuate(Case(places, guests, {"a": ["h1"], "b": ["h1"]}, (pair,)).board(), [0])
    assert plan.steps == ()
    assert [s.reason for s in plan.stuck] == ["it must be with VM B, which no plan moves", "pinned"]


def test_a_vm_waits_for_the_huge_pages_of_the_one_before_it() -> None:
    """Both may move one after the other; together they would have to be there twice."""
    pages = Pages(512)
    guests = [Guest("b", "B", "h1", GIB, 1, pages=pages), Guest("a", "A", "h0", GIB, 1, pages=pages)]
    places = [
        Place(f"h{n}", f"H{n}", 16 * GIB, GIB, 16, 1, 8, pages_left=Pages(left))
        for n, left in enumerate((0, 0, 512))
    ]
    board = Board(places, guests, np.ones((2, 3), np.bool_))
    steps = [Step(0, 1, 2), Step(1, 0, 1)]
    assert waves(board, steps) == [[steps[0]], [steps[1]]]
    free = Board([replace(p, pages_left=Pages(512)) for p in places], guests, np.ones((2, 3), np.bool_))
    assert waves(free, steps) == [steps]


def test_the_board_knows_huge_pages_and_leaves_nodes_that_are_pinned_where_they_are() -> None:
    fleet, config, policy = Fleet(), SchedulerConfig(), ClusterPolicy("a", "A")
    fleet.clusters["a"] = policy
    for host_id, left in (("h0", 0), ("h1", 512), ("h2", 511)):
        fleet.put(
            HostFigures(
                id=host_id, name=host_id, cluster_id="a", status="up", cpus=8, memory_bytes=64 * GIB,
                memory_limit_bytes=64 * GIB, memory_used_bytes=0, vcpus_limit=80, vcpus_used=0,
                pages_2m=1024, pages_2m_used=1024 - left,
            )
        )  # fmt: skip
        fleet.put_cells(host_id, [CellFigures(0, 8, Taken(8 * GIB))])
    node = NumaNode(memory_bytes=GIB, vcpus=(0,), host_cells=(0,))
    needs = [
        Need(vm_id="paged", cluster_id="a", memory_bytes=GIB, vcpus=1, hugepage_kib=2048),
        Need(vm_id="plain", cluster_id="a", memory_bytes=GIB, vcpus=1),
        Need(vm_id="pinned", cluster_id="a", memory_bytes=GIB, vcpus=1, numa_nodes=(node,)),
    ]
    board = board_of(fleet, policy, [Standing(need, "h0") for need in needs], ClusterRules(), config)
    assert board.fits(0).tolist() == [False, True, False]
    assert board.fits(1).tolist() == [False, True, True]
    assert [bool(g.kept) for g in board.guests] == [False, False, True]
    assert [g.memory == config.guest_overhead_mib << 20 for g in board.guests] == [True, False, False]
    emptied = evacuate(board, [0])
    assert {(s.guest, board.places[s.target].id) for s in emptied.steps} >= {(0, "h1")}
    assert [s.guest for s in emptied.stuck] == [2]
    short = evacuate(
        board_of(fleet, policy, [Standing(replace_need(needs[0], 2 * GIB), "h0")], ClusterRules(), config),
        [0],
    )
    assert "has its huge pages left: 1024 of 2 MiB" in short.stuck[0].reason


def replace_need(need: Need, memory_bytes: int) -> Need:
    return msgspec.structs.replace(need, memory_bytes=memory_bytes)
