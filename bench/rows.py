"""What a row of the table is: two sides measured in turn, their medians, the goal, and whether it was met."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

PAIRS = 7
"""Least number of times that both sides are measured, in turn: what else the machine does hits both."""

Side = Callable[[], Awaitable[float]]
"""One measurement of one side: a rate, or a median of times."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of bench/results.json. `theirs` and `ratio` are null where a figure stands by itself."""

    name: str
    ours: float
    theirs: float | None
    unit: str
    ratio: float | None
    goal: str
    met: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Both sides' measurements; the first of ours was taken beside the first of theirs."""

    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratio(self) -> float:
        """Median of the pairs' own ratios: a slow minute of the machine cancels out."""
        return statistics.median(o / t for o, t in zip(self.ours, self.theirs, strict=True))

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.ours), statistics.median(self.theirs)


async def in_turn(ours: Side, theirs: Side, pairs: int = PAIRS) -> Pairs:
    """ABAB, after one round of each that isn't counted."""
    await ours()
    await theirs()
    found: list[tuple[float, float]] = []
    for _ in range(pairs):
        found.append((await ours(), await theirs()))
    return Pairs([o for o, _ in found], [t for _, t in found])


def at_least(name: str, pairs: Pairs, goal: float, unit: str, note: str = "") -> Line:
    """Our rate is at least `goal` of theirs."""
    ours, theirs = pairs.medians
    return Line(
        name=name,
        ours=ours,
        theirs=theirs,
        unit=unit,
        ratio=pairs.ratio,
        goal=f">= {goal:g} x",
        met=pairs.ratio >= goal,
        note=note,
    )


def at_most(
    name: str, pairs: Pairs, goal: float, unit: str = "ms", extra: float = 0.0, note: str = ""
) -> Line:
    """Our time is at most `goal` times theirs, and `extra` (in the same unit) on top."""
    ours, theirs = pairs.medians
    allowed = statistics.median(o - (t * goal + extra) for o, t in zip(pairs.ours, pairs.theirs, strict=True))
    return Line(
        name=name,
        ours=ours,
        theirs=theirs,
        unit=unit,
        ratio=pairs.ratio,
        goal=f"<= {goal:g} x" + (f" + {extra:g} {unit}" if extra else ""),
        met=allowed <= 0,
        note=note,
    )


def below(name: str, ours: float, goal: float, unit: str, note: str = "") -> Line:
    """A figure that stands by itself."""
    return Line(
        name=name,
        ours=ours,
        theirs=None,
        unit=unit,
        ratio=None,
        goal=f"<= {goal:g} {unit}",
        met=ours <= goal,
        note=note,
    )


def keep(file: Path, lines: Sequence[Line]) -> None:
    """Writes the lines into the file of results, in the place of those that had their names."""
    known = msgspec.json.decode(file.read_bytes(), type=list[Line]) if file.exists() else []
    names = {line.name for line in lines}
    rows = [line for line in known if line.name not in names] + list(lines)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
