"""Installations on virtual time: whatever goes wrong, no VM runs twice, nothing healthy is shot, all is well in the end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sim import alone
from sim.__main__ import STATES, rare
from sim.alone import Play
from sim.faults import PAUSES
from sim.focus import FOCUSES, PROMISES
from sim.loop import PROCESS, Deadlock, Process, Stuck, new_loop
from sim.mutants import MUTANTS

SEEDS = range(1, 201)
"""Each takes about a second of one processor; `make sim SEEDS=1000` plays more."""
RESTORES = (28, 29, 33, 40, 54)
"""Scenes in which a restored database once ended VMs that it had forgotten, or took another placement's end for theirs."""
AT_ONCE = 2
REACHED = {
    "BMC told off",
    "BMC told on",
    "proof bmc_off",
    "proof new_boot",
    "ha cut off",
    "leader_killed_in_mid_fence",
    "NATS store lost",
    "vm.migrate failed",
    "vm.migrate succeeded",
    "migration cut in copy",
    "struck at an order",
}
"""What at least one of these seeds must come to, or they prove little."""

pytestmark = pytest.mark.timeout(1800)


def test_nothing_that_must_not_happen_happens() -> None:
    outcomes = [outcome for _, outcome in alone.run_many([Play(seed) for seed in SEEDS], AT_ONCE)]
    for outcome in outcomes:
        replay = f"replay it: make sim SEED={outcome.seed}"
        assert not outcome.violations, "\n".join([*outcome.timeline, *outcome.violations, replay])
        assert outcome.virtual_seconds >= 3600
    missed = REACHED - {state for outcome in outcomes for state in outcome.reached}
    assert not missed


def test_an_older_database_ends_nothing_that_runs() -> None:
    reached: set[str] = set()
    for play, outcome in alone.run_many([Play(seed, "restores") for seed in RESTORES], AT_ONCE):
        replay = f"replay it: make sim SEED={play.seed} FOCUS={play.focus}"
        assert not outcome.violations, "\n".join([*outcome.timeline, *outcome.violations, replay])
        assert "PostgreSQL restored" in outcome.reached
        reached.update(outcome.reached)
    assert "quarantine" in reached


@pytest.mark.parametrize("focus", [*PROMISES, "late"])
def test_what_is_promised_is_kept(focus: str) -> None:
    outcome = alone.run_one(Play(1, focus))
    assert not outcome.violations, "\n".join([*outcome.timeline, *outcome.violations])
    assert FOCUSES[focus].faults[0][0].__name__ in outcome.reached


@pytest.mark.parametrize("focus", ["servers", "pauses"])
def test_nothing_comes_of_what_passes(focus: str) -> None:
    """NATS and PostgreSQL away for an hour; hosts that stand still, again and again, for less than a fence waits."""
    outcome = alone.run_one(Play(1, focus))
    assert not outcome.violations, "\n".join([*outcome.timeline, *outcome.violations])
    assert not {state for state in outcome.reached if state.startswith(("BMC told", "proof"))}
    assert outcome.pauses == 24 * PAUSES or focus == "servers"


def test_hosts_that_try_silent_ones_change_nothing() -> None:
    for _, outcome in alone.run_many([Play(seed, "peers") for seed in (1, 2, 3)], AT_ONCE):
        assert not outcome.violations, "\n".join([*outcome.timeline, *outcome.violations])
        assert any("tried it: " in line for line in outcome.timeline)


def test_states_that_are_seldom_reached_are_told_of_a_long_run() -> None:
    often = Counter(dict.fromkeys(STATES, 2))
    assert rare(often, 200) == []
    assert rare(often, 201) == list(STATES)
    assert rare(Counter(), 199) == []


def test_what_neighbours_do_is_nothing_to_a_seed() -> None:
    """They share what was set up, and each goes on from there by itself."""
    plays = [Play(seed, "steps") for seed in (4, 5)]
    together = [outcome.digest for _, outcome in alone.run_many(plays, 1)]
    assert together == [alone.run_one(play).digest for play in plays]
    assert together[0] != together[1]


def test_whoever_stops_asking_leaves_nobody_playing() -> None:
    before = _children()
    outcomes = alone.run_many([Play(seed, "dead") for seed in (1, 2, 10)], AT_ONCE)
    next(outcomes)
    assert _children() > before
    outcomes.close()
    assert _children() == before


def _children() -> set[str]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.add(stat.parent.name)
    return found


@pytest.mark.parametrize("play", ["alone.Play(5, 'dead')", "alone.Play(1, scenario=blackout.play)"])
def test_a_seed_repeats_itself_in_another_process(play: str) -> None:
    """Whatever Python hashes like: no program walks a set of words."""
    script = f"from sim import alone, blackout; print(alone.run_one({play}).digest)"
    told = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": hashes},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hashes in ("0", "1", "2")
    ]
    assert told[0] == told[1] == told[2]
    assert len(told[0].strip()) == 64


@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant.quick])
def test_what_would_be_wrong_is_noticed(name: str) -> None:
    """The simulation can fail: a product with this mistake is caught by this seed."""
    play = MUTANTS[name].play(name)
    assert alone.run_one(play).violations, f"{play} isn't caught any more"


def test_a_mistake_that_is_caught_needs_no_excuse() -> None:
    assert [name for name, mutant in MUTANTS.items() if mutant.seed and mutant.guarded] == []
    assert sum(bool(mutant.seed) for mutant in MUTANTS.values()) >= 60


def test_nothing_left_to_do_is_told_at_once() -> None:
    loop = new_loop()

    async def waits() -> None:
        await loop.create_future()

    with pytest.raises(Deadlock):
        loop.run(waits())


def test_time_that_does_not_go_on_is_told() -> None:
    loop = new_loop()

    async def spins() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Stuck):
        loop.run(spins())


def test_a_stopped_process_catches_up_and_a_killed_one_never_runs_again() -> None:
    loop = new_loop()
    ticks: dict[str, list[float]] = {"stopped": [], "killed": []}
    cleaned: list[str] = []

    async def tick(name: str) -> None:
        try:
            while True:
                await asyncio.sleep(1)
                ticks[name].append(loop.time())
        finally:
            cleaned.append(name)

    def start(name: str) -> Process:
        process = Process(name)
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        context.run(loop.create_task, tick(name))
        loop.graves.append(process)
        return process

    async def main() -> None:
        stopped, killed = start("stopped"), start("killed")
        await asyncio.sleep(2.5)
        loop.stop_process(stopped)
        loop.kill(killed)
        await asyncio.sleep(3)
        loop.continue_process(stopped)
        await asyncio.sleep(1.2)

    loop.run(main())
    assert ticks == {"stopped": [1, 2, 5.5, 6.5], "killed": [1, 2]}
    assert cleaned == []
