"""Who has lost what others have: a thing that nobody has is lost by nobody, and short outages count for nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volery.runtime.losses import Losses, Patience

PATIENCE = Patience(lost_after=120.0, back_after=60.0)
GROUPS = {"a": "c1", "b": "c1", "c": "c2", "x": "", "y": ""}
WHY = "it hangs"


def story(*steps: tuple[float, str, str], lost: str = "") -> str:
    """The hosts that have lost it after these steps of (time, who has it, who lacks it)."""
    losses, now = Losses(), dict.fromkeys(lost, WHY)
    for at, has, lacks in steps:
        now = losses.decide(at, PATIENCE, now, tuple(has), dict.fromkeys(lacks, WHY), GROUPS)
    return "".join(now)


@pytest.mark.parametrize(
    ("steps", "lost"),
    [
        ([(0, "a", "b"), (119.9, "a", "b")], ""),
        ([(0, "a", "b"), (120, "a", "b")], "b"),
        ([(0, "a", "b"), (60, "ab", ""), (120, "a", "b"), (239, "a", "b")], ""),
        ([(0, "a", "b"), (60, "ab", ""), (120, "a", "b"), (240, "a", "b")], "b"),
        ([(0, "", "ab"), (9999, "", "ab")], ""),
        (
            [(0, "", "ab"), (9999, "a", "b"), (10118, "a", "b")],
            "",
        ),  # those that come back later are waited for
        ([(0, "", "ab"), (9999, "a", "b"), (10119, "a", "b")], "b"),
        ([(0, "c", "ab"), (9999, "c", "ab")], ""),  # only a host of its own cluster stands in for it
        ([(0, "a", "bx"), (120, "a", "bx")], "b"),  # nobody has said yet which cluster x is of
        ([(0, "x", "by"), (120, "x", "by")], ""),
        ([(0, "a", "b"), (120, "a", "")], ""),  # it isn't spoken of any more
    ],
)
def test_it_is_lost_after_a_time_for_which_a_peer_had_it(
    steps: list[tuple[float, str, str]], lost: str
) -> None:
    assert story(*steps) == lost


@pytest.mark.parametrize(
    ("steps", "lost"),
    [
        ([(0, "ab", ""), (59.9, "ab", "")], "b"),
        ([(0, "ab", ""), (60, "ab", "")], ""),
        ([(0, "ab", ""), (50, "a", "b"), (60, "ab", ""), (119, "ab", "")], "b"),
        ([(0, "ab", ""), (50, "a", "b"), (60, "ab", ""), (120, "ab", "")], ""),
        ([(0, "", "ab"), (9999, "", "ab")], "b"),  # the others losing it, too, doesn't give it back
        ([(0, "a", "")], ""),
    ],
)
def test_it_is_back_after_a_time(steps: list[tuple[float, str, str]], lost: str) -> None:
    assert story(*steps, lost="b") == lost


def test_a_reason_is_kept_and_times_are_forgotten() -> None:
    losses = Losses()
    assert losses.decide(0, PATIENCE, {"b": "first"}, "a", {"b": "second"}, GROUPS) == {"b": "first"}
    assert not losses.waits
    losses.decide(1, PATIENCE, {"b": "first"}, "ab", {}, GROUPS)
    assert losses.waits
    losses.decide(2, PATIENCE, {}, "ab", {}, GROUPS)
    assert not losses.waits


STATES = st.fixed_dictionaries({host: st.sampled_from(["has", "lacks", "silent"]) for host in GROUPS})


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 90), STATES), max_size=30))
def test_whoever_loses_it_was_without_it_all_the_while_and_a_peer_was_not(
    steps: list[tuple[float, dict[str, str]]],
) -> None:
    losses, lost, now, history = Losses(), dict[str, str](), 0.0, []
    for seconds, state in steps:
        now += seconds
        history.append((now, state))
        has = [host for host, how in state.items() if how == "has"]
        lacks = {host: WHY for host, how in state.items() if how == "lacks"}
        before, lost = lost, losses.decide(now, PATIENCE, lost, has, lacks, GROUPS)
        for host in lost.keys() - before.keys():
            recent = [seen for at, seen in history if at >= now - PATIENCE.lost_after]
            assert history[0][0] <= now - PATIENCE.lost_after
            for seen in recent:
                assert seen[host] == "lacks"
                assert any(seen[p] == "has" for p in GROUPS if p != host and GROUPS[p] == GROUPS[host] != "")
        for host in before.keys() - lost.keys():
            if state[host] == "has":
                recent = [seen for at, seen in history if at >= now - PATIENCE.back_after]
                assert all(seen[host] == "has" for seen in recent)
