"""Each seed in a process of its own, forked from one that has everything loaded: nothing of a seed reaches another."""

from __future__ import annotations

import gc
import logging
import os
import resource
import select
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache

import msgspec

from sim.loop import new_loop
from sim.plane import SERVICES
from sim.postgres import Database, Snapshot
from sim.run import Outcome, Scenario, episode

PROCESSOR_SECONDS = 180
"""A seed that takes more of a processor hangs in a way that virtual time doesn't see."""


@dataclass(frozen=True)
class Play:
    """What is played: `focus` names what its scenes are made of, `mutant` a mistake in the product, `scenario` is what
    happens instead of scenes."""

    seed: int
    focus: str = ""
    mutant: str = ""
    scenario: Scenario | None = None


before: list[Callable[[Play], None]] = []
"""Called in the process of each seed before it begins."""


@dataclass(frozen=True)
class Warm:
    """What every seed begins with."""

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
    episode(0, database)
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
    warm()
    waiting = iter(plays)
    running: dict[int, tuple[Play, int, bytearray]] = {}
    """Pipe → what is played, process, what it said."""
    while True:
        while len(running) < at_once and (play := next(waiting, None)) is not None:
            pipe, process = _fork(play, level)
            running[pipe] = (play, process, bytearray())
        if not running:
            return
        ready, _, _ = select.select(list(running), [], [])
        for pipe in ready:
            play, process, said = running[pipe]
            if piece := os.read(pipe, 1 << 16):
                said += piece
            else:
                del running[pipe]
                yield play, _ended(play.seed, pipe, process, bytes(said))


def _fork(play: Play, level: int) -> tuple[int, int]:
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return reading, process
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
        gc.disable()  # the dead are never collected, and a seed is short
        for act in before:
            act(play)
        loaded = warm()
        loaded.database.reset(loaded.empty, play.seed)
        outcome = episode(play.seed, loaded.database, focus=play.focus, scenario=play.scenario, level=level)
        said = msgspec.json.encode(asdict(outcome))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(said)
    finally:
        os._exit(0)


def _ended(seed: int, pipe: int, process: int, said: bytes) -> Outcome:
    os.close(pipe)
    os.waitpid(process, 0)
    if said:
        return msgspec.json.decode(said, type=Outcome)
    what = f"the process of seed {seed} ended without a word, or took {PROCESSOR_SECONDS} s of a processor"
    return Outcome(seed, (what,), (), "", 0.0, 0.0, 0.0, 0, 0, ())
