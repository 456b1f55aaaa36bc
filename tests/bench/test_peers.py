"""The benches beside peers keep running: small fleets, few pairs. What they measure here decides nothing.

A peer that isn't installed yet is installed by its row, outside the repository: a minute for all of them.
"""

from __future__ import annotations

import random
import re

from bench import packing
from bench.nova import beside_nova
from bench.openstack import beside_placement
from bench.plans import beside_hbal


async def test_placements_beside_openstack_placement() -> None:
    [line] = await beside_placement(40, pairs=1, requests=4)
    assert line.theirs is not None
    assert min(line.ours, line.theirs) > 0
    assert "ours 0, theirs 0" in line.note, "a host was promised more than it has"


def test_decisions_beside_novas() -> None:
    [line] = beside_nova(120, rounds=6)
    assert line.theirs is not None
    assert min(line.ours, line.theirs) > 0
    assert "Of 7 choices 0 were worth less to Nova than its own" in line.note


async def test_packing_through_the_service() -> None:
    """One seed. That `packing` is better is what it is for, so here it is decided, and by no clock."""
    ours, over = await packing.through_the_service(1, level=0.5, turnover=0.2)
    assert over == 0
    dice = random.Random(0)
    most_free = packing.Heuristic(packing.HEURISTICS[packing.MOST_FREE], dice)
    theirs = await packing.packed(0, most_free, level=0.5, turnover=0.2)
    assert ours[0].used > theirs.used


async def test_a_plan_beside_hbals() -> None:
    """What it plans is no matter of time: no worse by hbal's own score, no more moves, room kept for every node."""
    [line] = await beside_hbal(8, 80, rounds=1)
    assert line.theirs is not None
    assert min(line.ours, line.theirs) > 0
    assert "0 at the beginning, ours 0, hbal's 0" in line.note
    found = re.search(r"ours ([\d.]+) after (\d+) moves, hbal's ([\d.]+) after (\d+)", line.note)
    assert found is not None
    assert float(found[1]) <= float(found[3])
    assert int(found[2]) <= int(found[4])
