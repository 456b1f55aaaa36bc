"""`python -m sim --seeds N [--first K]`, `--seed K` for one with its timeline, `--mutants` for the recorded catch of each
mistake: what `make sim` runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter

from sim import alone, mutants
from sim.alone import Play
from sim.focus import FOCUSES
from sim.run import Outcome

MANY = 200
"""From so many seeds on each state in `STATES` must be reached by one of a hundred."""
STATES = (
    "BMC told off",
    "fence failed",
    "leader changed in mid-fence",
    "brake held",
    "quarantine",
    "proof person",
    "many_lose_power",
    "NATS store lost",
    "ha cut off",
    "migration cut in prepare",
    "migration cut in copy",
    "migration cut in switch",
    "migration cut in finish",
    "struck at an order",
)


def told(play: Play, outcome: Outcome) -> str:
    state = "violated" if outcome.violations else "ok"
    what = "".join(f" {word}" for word in (play.focus, play.mutant and f"with {play.mutant!r}") if word)
    return (
        f"seed {outcome.seed}{what}: {state}; {outcome.virtual_seconds:.0f} virtual seconds, of which"
        f" {outcome.active_seconds:.0f} were lived through, in {outcome.real_seconds:.2f} s;"
        f" {outcome.steps} steps; trace {outcome.digest[:12]}"
    )


def one(play: Play, verbose: bool) -> int:
    outcome = alone.run_one(play, logging.INFO if verbose else logging.WARNING)
    print("\n".join(outcome.timeline))
    print(told(play, outcome))
    for violation in outcome.violations:
        print(f"  {violation}")
    return 1 if outcome.violations else 0


def rare(reached: Counter[str], count: int) -> list[str]:
    """States that fewer than one seed of a hundred came to, of a run that is long enough to say so."""
    return [state for state in STATES if reached[state] * 100 < count] if count >= MANY else []


def many(plays: list[Play], at_once: int) -> int:
    """The first violation's timeline, and how many seeds reached what."""
    began, bad, count = time.monotonic(), list[Outcome](), len(plays)
    reached: Counter[str] = Counter()
    lived, processor, pauses = 0.0, 0.0, 0
    for number, (play, outcome) in enumerate(alone.run_many(plays, at_once), 1):
        reached.update(outcome.reached)
        lived += outcome.virtual_seconds
        pauses += outcome.pauses
        processor += outcome.real_seconds
        if outcome.violations:
            if not bad:
                print("\n".join(outcome.timeline))
            bad.append(outcome)
            print(told(play, outcome))
            for violation in outcome.violations:
                print(f"  {violation}")
            focus = f" FOCUS={play.focus}" if play.focus else ""
            print(f"  replay it: make sim SEED={outcome.seed}{focus}", flush=True)
        if number % 50 == 0:
            print(f"{number} seeds, {time.monotonic() - began:.0f} s", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{count} seeds, {lived / 3600:.0f} virtual hours in {seconds:.0f} s ({processor / count:.2f} s of a processor"
        f" per seed), {len(bad)} violated{': ' + ', '.join(str(o.seed) for o in bad) if bad else ''}"
    )
    if pauses:
        print(
            f"{pauses} pauses of hosts, and nobody was switched off or believed dead"
            if not bad
            else f"{pauses} pauses of hosts"
        )
    print("seeds that reached: " + ", ".join(f"{name} {n}" for name, n in sorted(reached.items())))
    if seldom := rare(reached, count) if not plays[0].focus else []:
        print(f"reached by less than 1 % of the seeds: {', '.join(seldom)}")
    return 1 if bad or seldom else 0


def caught(at_once: int) -> int:
    """Every recorded catch again."""
    plays = [mutant.play(name) for name, mutant in mutants.MUTANTS.items() if mutant.seed]
    missed = 0
    for play, outcome in alone.run_many(plays, at_once):
        first = outcome.violations[0] if outcome.violations else "NOT CAUGHT"
        missed += not outcome.violations
        print(f"{play.mutant} (seed {play.seed} {play.focus}): {first[:120]}", flush=True)
    rest = {name: mutant for name, mutant in mutants.MUTANTS.items() if not mutant.seed}
    for name, mutant in rest.items():
        if mutant.guarded:
            print(f"{name}: does no harm alone, for {mutant.guarded}")
    unknown = [name for name, mutant in rest.items() if not mutant.guarded]
    print(f"{len(plays) - missed} of {len(mutants.MUTANTS)} mistakes are caught", end="")
    print(f", {len(rest) - len(unknown)} do no harm alone", end="")
    print(f"; of these nothing is known: {', '.join(unknown)}" if unknown else "")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone, with its timeline")
    parser.add_argument("--focus", default="", choices=list(FOCUSES), help="what the scenes are made of")
    parser.add_argument(
        "--mutant", default="", choices=["", *mutants.MUTANTS], help="a mistake put into the product"
    )
    parser.add_argument("--mutants", action="store_true", help="replay the catch of each mistake")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true", help="everything that programs log")
    asked = parser.parse_args()
    alone.warm()
    if asked.mutants:
        return caught(asked.at_once)
    if asked.seed is not None:
        return one(Play(asked.seed, asked.focus, asked.mutant), asked.verbose)
    seeds = range(asked.first, asked.first + asked.seeds)
    return many([Play(seed, asked.focus, asked.mutant) for seed in seeds], asked.at_once)


if __name__ == "__main__":
    sys.exit(main())
