"""Which host may sleep: played back by rules of its own, and looked for by trying everything on small fleets."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.policies.board import Guest, Place
from services.scheduler.policies.idle import Idle
from services.scheduler.policies.saving import Limits, Sleeper, save, wake
from tests.scheduler.boards import Case, cases, crowded
from tests.scheduler.replay import Replay
from tests.scheduler.test_plans_pure import unprotected
from tests.scheduler.worlds import GIB

APART = 120.0
LIMITS = st.builds(Limits, st.integers(0, 2), st.sampled_from([0.5, 0.8, 1.0]), st.booleans())


def empty(case: Case, replay: Replay) -> set[str]:
    """Hosts that are up with nothing on them or on its way to them."""
    return {
        place.id
        for place in case.places
        if place.open and not replay.taken(place, "memory") and not replay.taken(place, "vcpus")
    }


@settings(max_examples=600)
@given(case=st.one_of(cases(), crowded()), limits=LIMITS)
def test_a_host_is_emptied_legally_and_what_is_reserved_stays(case: Case, limits: Limits) -> None:
    board, replay = case.board(), case.replay()
    before = empty(case, replay)
    had = [replay.survives(place) for place in case.places]
    saved = save(board, range(len(case.places)), limits)
    assert (board.at == case.board().at).all()
    if saved.host is None:
        assert saved.reason
        return
    assert not case.played(saved.steps, board)
    asleep = case.places[saved.host]
    assert asleep.open
    assert all(case.places[step.source].id == asleep.id for step in saved.steps)
    targets = {case.places[step.target].id for step in saved.steps}
    assert not targets & before  # to fill an empty host saves nothing
    replay = case.replay()
    others = [place for place in case.places if place.id != asleep.id]
    alone = Case(others, case.guests, case.suits, case.groups)
    for step in saved.steps:
        replay.at[case.guests[step.guest].id] = case.places[step.target].id
        if limits.reserved:
            # As if it were off already: nothing counts on it.
            left = Replay(others, case.guests, case.suits, case.groups)
            left.at = dict(replay.at)
            kept = [h for h, p in zip(had, case.places, strict=True) if p.id != asleep.id]
            assert not unprotected(alone, left, kept)
    assert not [vm for vm, host in replay.at.items() if host == asleep.id]
    assert not replay.taken(asleep, "memory")
    after = {*before} - {asleep.id}
    assert len(after) >= limits.reserve
    for place in case.places:
        if place.id in targets:
            assert replay.taken(place, "load") <= limits.high * max(place.cpus, 1) + 1e-9


@settings(max_examples=300)
@given(case=cases(with_groups=False), limits=LIMITS)
def test_where_one_move_is_enough_a_host_is_found(case: Case, limits: Limits) -> None:
    """A host with at most one VM, whose every destination is tried by brute force."""
    saved = save(case.board(), range(len(case.places)), Limits(limits.reserve, limits.high))
    if saved.host is not None:
        return
    replay = case.replay()
    spare = empty(case, replay)
    for place in case.places:
        here = [guest for guest in case.guests if guest.host_id == place.id]
        foreign = replay.foreign(place, "memory") or replay.foreign(place, "vcpus")
        if not place.open or len(here) > 1 or foreign or len(spare - {place.id}) < limits.reserve:
            continue
        if not any(other.open for other in case.places if other is not place):
            continue
        assert here, f"{place.id} is empty and could sleep: {saved.reason}"
        # It goes to the host that would be least full; another one may be less busy.
        fits = [
            other
            for other, guest in product(case.places, here)
            if other.id not in spare and not case.replay().play([(guest.id, other.id)], 2, {})
        ]
        loads = [(replay.taken(other, "load") + here[0].load) / max(other.cpus, 1) for other in fits]
        assert not fits or max(loads) > limits.high, f"{place.id} could sleep: {saved.reason}"


def test_the_host_with_the_fewest_vms_sleeps_and_of_two_empty_ones_one_stays() -> None:
    guests = [Guest(f"v{n}", f"V{n}", f"h{n // 2}", GIB, 1, 0.1) for n in range(4)]
    used = {"h0": 2, "h1": 2, "h2": 0, "h3": 0}
    places = [Place(h, h.upper(), 16 * GIB, n * GIB, 32, n, 8, n * 0.1) for h, n in used.items()]
    case = Case(places, guests, {g.id: list(used) for g in guests}, ())
    board = case.board()
    assert save(board, range(4), Limits(1)).host == 2
    assert save(board, [0, 1], Limits(2)).host == 0
    assert "would be too busy without" in save(board, [0, 1], Limits(2, 0.04)).reason
    none = save(board, range(4), Limits(3))
    assert none.host is None
    assert "without H2 1 empty hosts would be left, and 3 stay in reserve" in none.reason


def test_who_is_woken_and_why() -> None:
    small, large = Sleeper("a", "A", 1), Sleeper("b", "B", 2)
    proven = Sleeper("c", "C", 1, proven=True)
    assert wake([], spare=0, kept=1, over="h1").host_id == ""
    assert wake([small, large], spare=0, kept=0, over="").host_id == ""
    assert wake([small, large], spare=0, kept=1, over="").host_id == "b"
    assert wake([small, large, proven], spare=0, kept=1, over="").host_id == "c"
    assert (
        wake([small, large], spare=1, kept=1, over="h1").reason
        == "h1 has too much, and no other host has room"
    )
    wanted = Sleeper("d", "D", 1, wanted_by="web")
    found = wake([proven, wanted], spare=9, kept=0, over="")
    assert (found.host_id, found.reason) == ("d", "VM web found no place")


def test_idleness_begins_with_the_first_low_sample_and_ends_with_a_high_one() -> None:
    idle = Idle()
    assert (idle.lasts("h", 5.0), idle.heard("h", 5.0)) == (-1.0, float("inf"))
    idle.note("h", 10.0, 20.0, 5.0, APART)
    idle.note("h", 19.0, 20.0, 9.0, APART)
    assert (idle.lasts("h", 10.0), idle.heard("h", 10.0)) == (5.0, 1.0)
    idle.note("h", 20.0, 20.0, 11.0, APART)
    assert idle.lasts("h", 12.0) == -1.0


def test_a_host_that_was_away_has_not_been_idle_meanwhile() -> None:
    """It may have slept, and somebody who wants it has just woken it."""
    idle = Idle()
    idle.note("h", 1.0, 20.0, 5.0, APART)
    idle.note("h", 1.0, 20.0, 5.0 + APART, APART)
    assert idle.lasts("h", 5.0 + APART) == APART
    idle.note("h", 1.0, 20.0, 6.0 + 2 * APART, APART)
    assert idle.lasts("h", 7.0 + 2 * APART) == 1.0
    idle.forget("h")
    assert (idle.lasts("h", 8.0), idle.heard("h", 8.0)) == (-1.0, float("inf"))
