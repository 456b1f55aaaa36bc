"""In which order plans do things, and what goes together: each choice against all others, by rules of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.policies.affinity import Group
from services.scheduler.policies.balancing import LEAST_GAIN, Aims, balance, cost
from services.scheduler.policies.board import Board, Guest, Place, Step
from services.scheduler.policies.enforcing import Broken, broken, enforce
from services.scheduler.policies.evacuating import evacuate
from tests.scheduler.boards import Case, cases, crowded
from tests.scheduler.worlds import GIB
from volery.contracts.affinity_group import AffinityRule

NOTHING: Broken = (0.0, 0.0, 0.0, 0.0)

# Balances


def test_a_move_that_gains_next_to_nothing_makes_way_for_one_that_gains_much() -> None:
    """The way on which the plan was found led the first VM's room over a third VM, whose move is of no use in the end."""
    hosts = [("h0", 6, 0, 0.0), ("h1", 12, 11, 4.5), ("h2", 8, 1, 3.0), ("h3", 12, 7, 3.0)]
    places = [Place(h, h, top * GIB, used * GIB, 64, 8, 2, load) for h, top, used, load in hosts]
    guests = [
        Guest("third", "third", "h1", 2 * GIB, 1, 0.5),
        Guest("much", "much", "h1", 4 * GIB, 1, 3.0),
        Guest("way", "way", "h2", 1 * GIB, 1, 3.0),
    ]
    suits = np.array([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]], np.bool_)
    board, aims = Board(places, guests, suits), Aims(cpu=1.0, memory=1.0)
    plan = balance(board, aims, least_gain=0.01)
    assert plan.steps == (Step(2, 2, 0), Step(1, 1, 2))
    board.move(plan.steps[0])
    assert 0 < plan.before - cost(board, aims) < 0.01 * plan.before
    assert plan.after < plan.before / 5
    assert LEAST_GAIN < 0.01


# Emptied hosts


@settings(max_examples=300)
@given(case=crowded(groups=1), data=st.data())
def test_who_makes_way_lets_nobody_beside_a_rival(case: Case, data: st.DataObject) -> None:
    board = case.board()
    hosts = [data.draw(st.sampled_from(range(len(case.places))))]
    plan = evacuate(board, hosts)
    left = {case.places[host].id for host in hosts}
    case.suits = {vm: [h for h in suited if h not in left] for vm, suited in case.suits.items()}
    assert not case.played(plan.steps, board)


def test_a_host_with_room_and_a_rival_is_no_way_out() -> None:
    """Also not when the VM that is to make way is the smallest: the rival itself may be the one."""
    places = [Place("h0", "H0", 8 * GIB, 4 * GIB, 8, 1, 4), Place("h1", "H1", 8 * GIB, 8 * GIB, 8, 2, 4)]
    places.append(Place("h2", "H2", 8 * GIB, 5 * GIB, 8, 1, 4))
    guests = [
        Guest("leaver", "leaver", "h0", 4 * GIB, 1),
        Guest("rival", "rival", "h1", 5 * GIB, 1),
        Guest("small", "small", "h1", 3 * GIB, 1),
        Guest("stays", "stays", "h2", 5 * GIB, 1, kept="pinned"),
    ]
    suits = {"leaver": ["h1"], "rival": ["h1"], "small": ["h1", "h2"], "stays": ["h2"]}
    disabled, negative = AffinityRule.DISABLED, AffinityRule.NEGATIVE
    apart = Group("g", "G", 1.0, negative, True, disabled, True, frozenset(("leaver", "rival")), frozenset())
    with_rival = evacuate(Case(places, guests, suits, (apart,)).board(), [0])
    assert (with_rival.steps, [s.guest for s in with_rival.stuck]) == ((), [0])
    without = evacuate(Case(places, guests, suits, ()).board(), [0])
    # "small" leaves 3 GiB of the 4 that are needed, so that nobody makes way at all.
    assert without.steps == ()
    guests[0] = Guest("leaver", "leaver", "h0", 3 * GIB, 1)
    places[0] = Place("h0", "H0", 8 * GIB, 3 * GIB, 8, 1, 4)
    assert evacuate(Case(places, guests, suits, (apart,)).board(), [0]).steps == ()
    assert evacuate(Case(places, guests, suits, ()).board(), [0]).steps == (Step(2, 1, 2), Step(0, 0, 1))


# Mended groups


@dataclass(frozen=True)
class Mend:
    """VMs that move together to a host, and what it does to the groups."""

    block: frozenset[int]
    target: int
    change: Broken


def mends(case: Case, board: Board) -> Iterator[Mend]:
    """All that are legal, by trying each VM with all that must be with it on every host."""
    before = broken(board, case.groups)
    tried = set()
    for guest, target in product(range(len(case.guests)), range(len(case.places))):
        block = frozenset(g for g in board.block(guest) if board.at[g] != target)
        if not block or (block, target) in tried or not board.open[board.at[list(block)]].all():
            continue
        tried.add((block, target))
        if not _legal(case, board, block, target):
            continue
        end = board.copy()
        for each in block:
            end.move(end.step(each, target))
        after = broken(end, case.groups)
        first, second, third, fourth = (round(a - b, 9) for a, b in zip(after, before, strict=True))
        yield Mend(block, target, (first, second, third, fourth))


def _legal(case: Case, board: Board, block: frozenset[int], target: int) -> bool:
    replay, host = case.replay(), case.places[target].id
    replay.at = {g.id: case.places[int(board.at[n])].id for n, g in enumerate(case.guests)}
    planned = {case.guests[g].id: host for g in block}
    return not any(replay.play([(case.guests[g].id, host)], 2, planned) for g in sorted(block))


@settings(max_examples=300)
@given(case=crowded() | cases())
def test_what_matters_most_is_mended_first_and_by_all_that_must_be_together(case: Case) -> None:
    board = case.board()
    steps = list(enforce(board).steps)
    while steps:
        target = steps[0].target
        block = frozenset(g for g in board.block(steps[0].guest) if board.at[g] != target)
        together, steps = steps[: len(block)], steps[len(block) :]
        assert {s.guest for s in together} == block, "of a union some moved and some didn't"
        assert {s.target for s in together} == {target}, "a union moved to several hosts"
        possible = list(mends(case, board))
        made = next(m for m in possible if (m.block, m.target) == (block, target))
        best = min((m.change, len(m.block)) for m in possible)
        assert (made.change, len(made.block)) == best, (made, best)
        for step in together:
            board.move(step)
    assert all(mend.change >= NOTHING for mend in mends(case, board)), "a mend was left"


def test_a_wish_of_a_vm_whose_other_wish_cannot_be_met_waits_its_turn() -> None:
    """Of wishes between VMs the one that matters most goes first, whoever's hosts are wrong, too."""
    positive, negative, disabled = AffinityRule.POSITIVE, AffinityRule.NEGATIVE, AffinityRule.DISABLED
    guests = [Guest(vm, vm, "h0" if vm in "ab" else "h1", 2 * GIB, 1) for vm in "abcd"]
    places = [
        Place(f"h{n}", f"H{n}", (6, 6, 1)[n] * GIB, (4, 4, 0)[n] * GIB, 8, (2, 2, 0)[n], 4) for n in range(3)
    ]
    groups = (
        Group("w", "W", 1.0, disabled, False, positive, False, frozenset("a"), frozenset({"h2"})),
        Group("p", "P", 1.0, negative, False, disabled, False, frozenset("ab"), frozenset()),
        Group("q", "Q", 2.0, negative, False, disabled, False, frozenset("cd"), frozenset()),
    )
    case = Case(places, guests, {vm: ["h0", "h1", "h2"] for vm in "abcd"}, groups)
    assert enforce(case.board()).steps[0].guest in (2, 3)
