"""Each seed in a process of its own, forked from one that has everything loaded: nothing of a seed reaches another.

Seeds that are neighbours share an installation: one process sets it up, and each seed's process is a fork of that.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import select
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

import msgspec

from sim.loop import new_loop
from sim.plane import SERVICES
from sim.postgres import Database, Snapshot
from sim.run import Outcome, Scenario, Stage, empty, episode, furnish

PROCESSOR_SECONDS = 180
"""A seed that takes more of a processor hangs in a way that virtual time doesn't see."""
TOGETHER = 10
"""So many seeds are played on one installation."""


@dataclass(frozen=True)
class Play:
    """What is played: `focus` names what its scenes are made of, `mutant` a mistake in the product, `scenario` is what
    happens instead of scenes."""

    seed: int
    focus: str = ""
    mutant: str = ""
    scenario: Scenario | None = None

    @property
    def installation(self) -> int:
        """What it is played on, and the seed of that."""
        return self.seed if self.scenario else self.seed // TOGETHER


before: list[Callable[[Play], None]] = []
"""Called in the process of each installation before it is set up."""


@dataclass(frozen=True)
class Warm:
    """What every installation begins with."""

    database: Database
    empty: Snapshot
    """Every schema, and nothing in it."""


class _Said(msgspec.Struct, frozen=True):
    """What the process of a seed tells."""

    outcome: Outcome
    statements: list[tuple[str, str]]
    """Owners' statements that nobody had asked before."""


@cache
def warm() -> Warm:
    """Loads and compiles what every seed needs, by playing one in this process."""
    gc.disable()
    database = Database()
    new_loop().run(_migrate(database))
    made = Warm(database, database.snapshot())
    stage = empty(0, database)
    furnish(stage)
    episode(0, stage)
    database.asked_first.clear()
    gc.freeze()
    gc.enable()
    return made


async def _migrate(database: Database) -> None:
    for owner in SERVICES:
        await database.migrate(owner)


def run_one(play: Play, level: int = logging.WARNING) -> Outcome:
    """One seed; returns when it has ended."""
    return next(run_many([play], 1, level))[1]


def run_many(
    plays: Iterable[Play], at_once: int, level: int = logging.WARNING
) -> Iterator[tuple[Play, Outcome]]:
    """Outcomes in the order in which they end."""
    database = warm().database
    waiting = (list(group) for _, group in groupby(plays, lambda play: replace(play, seed=play.installation)))
    running: dict[int, tuple[list[Play], int, bytearray]] = {}
    """Pipe → what is still played there, process, what it said."""
    while True:
        while len(running) < at_once and (group := next(waiting, None)) is not None:
            pipe, process = _fork(group, level)
            running[pipe] = (group, process, bytearray())
        if not running:
            return
        ready, _, _ = select.select(list(running), [], [])
        for pipe in ready:
            group, process, said = running[pipe]
            piece = os.read(pipe, 1 << 16)
            said += piece
            *lines, rest = said.split(b"\n")
            said[:] = rest
            for line in lines:
                told = msgspec.json.decode(line, type=_Said)
                for owner, text in told.statements:
                    database.learn(owner, text)
                yield group.pop(0), told.outcome
            if not piece:
                del running[pipe]
                os.close(pipe)
                os.waitpid(process, 0)
                for play in group:
                    yield play, _silent(play.seed)


def _fork(group: list[Play], level: int) -> tuple[int, int]:
    """A process that sets up what a group is played on, and forks for each of it in turn."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return reading, process
    try:
        os.close(reading)
        _play_all(group, level, writing)
    finally:
        os._exit(0)


def _play_all(group: list[Play], level: int, pipe: int) -> None:
    first, loaded = group[0], warm()
    gc.disable()  # the dead are never collected, and a seed is short
    for act in before:
        act(first)
    began = time.process_time()
    loaded.database.reset(loaded.empty, first.installation)
    stage = empty(first.installation, loaded.database, focus=first.focus, level=level)
    if first.scenario is None:
        furnish(stage)
    share = (time.process_time() - began) / len(group)
    for play in group:
        process = os.fork()
        if not process:
            failed = 1
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
                _write(pipe, _tell(play, stage, share))
                failed = 0
            finally:
                os._exit(failed)
        _, state = os.waitpid(process, 0)
        if state:
            _write(pipe, _Said(_silent(play.seed), []))


def _tell(play: Play, stage: Stage, share: float) -> _Said:
    outcome = episode(play.seed, stage, play.scenario)
    return _Said(replace(outcome, real_seconds=outcome.real_seconds + share), warm().database.asked_first)


def _write(pipe: int, said: _Said) -> None:
    line = memoryview(msgspec.json.encode(said) + b"\n")
    while line:
        line = line[os.write(pipe, line) :]


def _silent(seed: int) -> Outcome:
    what = f"the process of seed {seed} ended without a word, or took {PROCESSOR_SECONDS} s of a processor"
    return Outcome(seed, (what,), (), "", 0.0, 0.0, 0.0, 0, 0, ())
