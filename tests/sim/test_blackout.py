"""Blackouts, twenty of them: whatever comes back first, all that is to come back runs once, in its order."""

from __future__ import annotations

import pytest

from sim import alone, blackout

SEEDS = range(1, 6)
"""Each has four blackouts; each of them catches something: 1 and 5 priorities, 2 the missing host that is not yet known to
be silent, 3 start groups, 4 those of a VM that isn't highly available."""
AT_ONCE = 2
REACHED = {
    "database first",
    "database missing",
    "priorities",
    "proven by it boots",
    "proven by a person",
    "proven by its BMC",
    "proof new_boot",
    "proof bmc_off",
    "proof person",
}

pytestmark = pytest.mark.timeout(600)


def test_everything_that_is_to_come_back_does_once_and_in_its_order() -> None:
    plays = [alone.Play(seed, scenario=blackout.play) for seed in SEEDS]
    outcomes = [outcome for _, outcome in alone.run_many(plays, AT_ONCE)]
    for outcome in outcomes:
        assert not outcome.violations, "\n".join([*outcome.timeline, *outcome.violations])
    assert not REACHED - {state for outcome in outcomes for state in outcome.reached}
