"""`python -m bench [ROW…] [--full]`: measures, prints a table, writes its rows into bench/results.json."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from bench import (
    calls,
    decisions,
    leader,
    machines,
    many_placements,
    memory,
    nova,
    openstack,
    packing,
    placements,
    plans,
    reads,
    restarts,
    streams,
    writes,
)
from bench.rows import PAIRS, Line, keep
from bench.world import World

Row = Callable[[World], Awaitable[list[Line]]]

ROWS: dict[str, Row] = {
    "state-change": writes.state_change,
    "call": calls.call,
    "get": reads.get_one,
    "accepted": writes.accepted,
    "walk": reads.walk,
    "fan-out": streams.fan_out,
    "event": machines.event,
    "start": machines.start,
    "migrate": machines.migrate,
    "restarts": restarts.ordered,
    "leader": leader.killed,
    "decisions": decisions.decisions,
    "plans": plans.plans,
    "hbal": plans.against_hbal,
    "placements": placements.placements,
    "many": many_placements.many,
    "placement": openstack.placement,
    "nova": nova.decided,
    "packing": packing.packing,
    "idle": memory.idle,
    "fleet": memory.under_load,
}
RESULTS = Path(__file__).with_name("results.json")


async def measure(names: list[str], full: bool) -> tuple[list[Line], list[str]]:
    """Lines of every row, and which rows broke."""
    world = World(full)
    lines: list[Line] = []
    broken: list[str] = []
    try:
        for name in names:
            started = time.perf_counter()
            print(f"measuring {name} …", file=sys.stderr, flush=True)
            try:
                found = await ROWS[name](world)
                for line in found:  # a run that is cut short has still said what it measured
                    print(f"  {line.name}: {shown(line.ours)} / {shown(line.theirs)}", file=sys.stderr)
                lines += found
            except Exception as error:  # one row's trouble must not lose the others' figures
                print(f"{name} broke: {error!r}", file=sys.stderr)
                traceback.print_exc()
                broken.append(name)
            print(f"  {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    finally:
        await world.close()
    return lines, broken


def shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def print_table(lines: list[Line]) -> None:
    table = Table(title="Volery against the raw parts", title_justify="left")
    for column in ("what", "ours", "theirs", "unit", "ratio", "goal", "met"):
        table.add_column(column, justify="right" if column in ("ours", "theirs", "ratio") else "left")
    for line in lines:
        ratio = "–" if line.ratio is None else f"{line.ratio:.2f}"
        met = "yes" if line.met else "NO"
        table.add_row(line.name, shown(line.ours), shown(line.theirs), line.unit, ratio, line.goal, met)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for line in lines:
        if line.note:
            console.print(f"  {line.name}: {line.note}", highlight=False)
    console.print(
        f"Both sides in turn, {PAIRS} pairs or more: medians, and the median of the pairs' ratios. Loads and servers "
        "share this machine's processors, so absolute figures are low; only ratios compare.",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of: {', '.join(ROWS)}; none: all")
    parser.add_argument(
        "--full", action="store_true", help="the fleet of the memory row for its whole 10 minutes"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the rows are written")
    asked = parser.parse_args()
    unknown = [name for name in asked.rows if name not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; rows are {', '.join(ROWS)}")
    # An installation and a lab may be standing: also whoever is told to end takes them down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lines, broken = uvloop.run(measure(asked.rows or list(ROWS), asked.full))
    print_table(lines)
    keep(asked.output, lines)
    if broken:
        raise SystemExit(f"not measured: {', '.join(broken)}")


if __name__ == "__main__":
    main()
