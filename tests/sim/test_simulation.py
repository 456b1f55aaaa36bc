"""Installations on virtual time: whatever goes wrong, no VM runs twice, nothing healthy is shot, all is well in the end."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys

import pytest

from sim import alone
from sim.loop import PROCESS, Deadlock, Process, Stuck, new_loop
from sim.mutants import MUTANTS, caught_by

SEEDS = range(1, 31)
"""Each takes a few seconds of one processor; `make sim SEEDS=1000` plays more."""
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
}
"""What at least one of these seeds must come to, or they prove little."""

pytestmark = pytest.mark.timeout(900)


def test_nothing_that_must_not_happen_happens() -> None:
    outcomes = list(alone.run_many(SEEDS, AT_ONCE))
    for outcome in outcomes:
        replay = f"replay it: make sim SEED={outcome.seed}"
        assert not outcome.violations, "\n".join([*outcome.timeline, *outcome.violations, replay])
        assert outcome.virtual_seconds >= 3600
    assert not REACHED - {state for outcome in outcomes for state in outcome.reached}


def test_a_seed_repeats_itself_in_another_process_with_other_hashes() -> None:
    script = "from sim import alone; print(alone.run_one(5).digest)"
    told = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": hashes},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hashes in ("1", "2")
    ]
    assert told[0] == told[1]
    assert len(told[0].strip()) == 64


@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant.quick])
def test_what_would_be_wrong_is_noticed(name: str) -> None:
    """The simulation can fail: a product with this mistake is caught by this seed."""
    assert caught_by(name, MUTANTS[name].seed), f"mutant {name} isn't caught by seed {MUTANTS[name].seed}"


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
