"""`python -m sim --seeds N [--first K]`, or `--seed K` for one with its timeline: what `make sim` runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter

from sim import alone, mutants
from sim.run import Outcome


def told(outcome: Outcome) -> str:
    state = "violated" if outcome.violations else "ok"
    return (
        f"seed {outcome.seed}: {state}; {outcome.virtual_seconds:.0f} virtual seconds, of which"
        f" {outcome.active_seconds:.0f} were lived through, in {outcome.real_seconds:.2f} s;"
        f" {outcome.steps} steps; trace {outcome.digest[:12]}"
    )


def one(seed: int, verbose: bool) -> int:
    outcome = alone.run_one(seed, logging.INFO if verbose else logging.WARNING)
    print("\n".join(outcome.timeline))
    print(told(outcome))
    for violation in outcome.violations:
        print(f"  {violation}")
    return 1 if outcome.violations else 0


def many(first: int, count: int, at_once: int) -> int:
    """The first violation's timeline, and how many seeds reached what."""
    began, bad = time.monotonic(), list[Outcome]()
    reached: Counter[str] = Counter()
    lived = 0.0
    for number, outcome in enumerate(alone.run_many(range(first, first + count), at_once), 1):
        reached.update(outcome.reached)
        lived += outcome.virtual_seconds
        if outcome.violations:
            if not bad:
                print("\n".join(outcome.timeline))
            bad.append(outcome)
            print(told(outcome))
            for violation in outcome.violations:
                print(f"  {violation}")
            print(f"  replay it: make sim SEED={outcome.seed}", flush=True)
        if number % 50 == 0:
            print(f"{number} seeds, {time.monotonic() - began:.0f} s", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{count} seeds, {lived / 3600:.0f} virtual hours in {seconds:.0f} s ({seconds / count:.2f} s per seed),"
        f" {len(bad)} violated{': ' + ', '.join(str(o.seed) for o in bad) if bad else ''}"
    )
    print("seeds that reached: " + ", ".join(f"{name} {n}" for name, n in sorted(reached.items())))
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone, with its timeline")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true", help="everything that programs log")
    asked = parser.parse_args()
    if (mutant := os.environ.get(mutants.VARIABLE)) and mutant not in mutants.MUTANTS:
        parser.error(f"there is no mutant {mutant!r}; there are: {', '.join(mutants.MUTANTS)}")
    alone.warm()
    if asked.seed is not None:
        return one(asked.seed, asked.verbose)
    return many(asked.first, asked.seeds, asked.at_once)


if __name__ == "__main__":
    sys.exit(main())
