"""Each seed in a process of its own, forked from one that has everything loaded: nothing of a seed reaches another.

Seeds that are neighbours share an installation: one process sets it up, and each seed's process is a fork of that.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby

import msgspec

from sim.loop import new_loop
from sim.plane import SERVICES
from sim.postgres import Database, Snapshot, parse
from sim.run import Outcome, Scenario, empty, episode, furnish

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
    gc.freeze()
    gc.enable()
    return made


async def _migrate(database: Database) -> None:
    for owner in SERVICES:
        await database.migrate(owner)


@dataclass(frozen=True)
class _Word:
    """What a seed's process says in the end."""

    outcome: Outcome
    statements: tuple[str, ...]
    """That had to be parsed for it: parsed once more where the next processes come from, they cost them nothing."""


@dataclass
class _Group:
    """Seeds of one installation: what is still to be played, and what the process that plays them has said."""

    plays: list[Play]
    process: int
    said: bytearray = field(default_factory=bytearray)

    def hear(self, piece: bytes) -> Iterator[tuple[Play, Outcome]]:
        self.said += piece
        *lines, rest = self.said.split(b"\n")
        self.said = rest
        for line in lines:
            word = msgspec.json.decode(line, type=_Word)
            for text in word.statements:
                parse.statements(text)
            yield self.plays.pop(0), word.outcome

    def end(self, pipe: int) -> Iterator[tuple[Play, Outcome]]:
        os.close(pipe)
        os.waitpid(self.process, 0)
        for play in self.plays:
            yield play, _silent(play.seed)


def run_one(play: Play, level: int = logging.WARNING) -> Outcome:
    """One seed; returns when it has ended."""
    return next(run_many([play], 1, level))[1]


def run_many(
    plays: Iterable[Play], at_once: int, level: int = logging.WARNING
) -> Generator[tuple[Play, Outcome], None, None]:
    """Outcomes in the order in which they end. Whoever stops asking for them ends what still runs."""
    waiting = (list(group) for _, group in groupby(plays, lambda play: replace(play, seed=play.installation)))
    running: dict[int, _Group] = {}
    """By pipe."""
    try:
        while True:
            while len(running) < at_once and (group := next(waiting, None)) is not None:
                pipe, process = _fork(group, level)
                running[pipe] = _Group(group, process)
            if not running:
                return
            ready, _, _ = select.select(list(running), [], [])
            for pipe in ready:
                yield from running[pipe].hear(piece := os.read(pipe, 1 << 16))
                if not piece:
                    yield from running.pop(pipe).end(pipe)
    finally:
        for pipe, left in running.items():
            os.killpg(left.process, signal.SIGKILL)
            list(left.end(pipe))


def _fork(group: list[Play], level: int) -> tuple[int, int]:
    """A process that sets up what a group is played on, and forks for each of it in turn; all of them can be ended as one."""
    warm()
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.setpgid(process, process)
        os.close(writing)
        return reading, process
    try:
        os.close(reading)
        _play_all(group, level, writing)
    finally:
        os._exit(0)


def _play_all(group: list[Play], level: int, pipe: int) -> None:
    first, loaded, known = group[0], warm(), len(parse.KNOWN)
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
                outcome = episode(play.seed, stage, play.scenario)
                outcome = replace(outcome, real_seconds=outcome.real_seconds + share)
                _write(pipe, _Word(outcome, tuple(parse.KNOWN)[known:]))
                failed = 0
            finally:
                os._exit(failed)
        _, state = os.waitpid(process, 0)
        if state:
            _write(pipe, _Word(_silent(play.seed), ()))


def _write(pipe: int, said: _Word) -> None:
    line = memoryview(msgspec.json.encode(said) + b"\n")
    while line:
        line = line[os.write(pipe, line) :]


def _silent(seed: int) -> Outcome:
    what = f"the process of seed {seed} ended without a word, or took {PROCESSOR_SECONDS} s of a processor"
    return Outcome(seed, (what,), (), "", 0.0, 0.0, 0.0, 0, 0, ())
