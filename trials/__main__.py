"""`python -m trials [KIND…] [-n N]`: breaks hosts of a lab, N times each way, and measures until the VM is back.

Prints each trial's timeline and writes the figures into bench/results.json. Ends with 1 when a trial did not end as
it must, or when a goal was missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from bench.rows import Line, below, keep
from lab.errors import LabError
from lab.scene import Scene, staged
from trials import ledger
from trials.blackout import blackout
from trials.company import Company
from trials.kinds import KINDS, Blackout, Elsewhere, Kind, Rack, Unkillable, settings_for
from trials.rack import rack
from trials.trial import Actors, Outcome, Wrong, elsewhere, first_record, nothing, settled
from trials.unkillable import unkillable
from volery.client import api
from volery.contracts.operation import Operation
from volery.setup.errors import SetupError

HOSTS = 3
RACK_HOSTS = 5
PLAIN_STARTS = 3
SLOWER = 1.3
"""A restart's start may take this many times as long as a plain start of the same VM."""
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def plain_start(scene: Scene, actors: Actors) -> float:
    """Seconds from the order until the guest writes, as an administrator starts it: what a restart is compared with."""
    vm = settled(scene, actors.survivor)
    known = len(actors.boots(vm.id))
    scene.act(vm.id, "stop", {"force": True})
    ask = api.VMS.act(vm.id, "start", Operation, {"host_id": vm.host_id})
    operation = scene.client.send(ask)
    wrote = first_record(actors, known, 60)
    scene.client.wait(operation)
    return (wrote - operation.created_at).total_seconds()


def tried(company: Company, kind: Kind, times: int) -> list[Line]:
    """Rows of so many trials. Raises Wrong, LabError, ledger.Torn."""
    scene = company.scene
    for host in scene.lab.hosts:
        scene.manage_power(host.number)
    if kind.io_timeout_seconds:
        scene.hold_leases(kind.io_timeout_seconds)
    cast = company.cast(kind)
    return lines(scene, kind, times, [vm.id for vm, _ in cast], {vm.id: file for vm, file in cast})


def lines(scene: Scene, kind: Kind, times: int, vm_ids: list[str], files: dict[str, Path]) -> list[Line]:
    survivor, bystander, *others = vm_ids
    actors = Actors(survivor, bystander, files)
    console.print(f"\n[bold]{kind.title}[/], {times} {'trial' if times == 1 else 'trials'}")
    if isinstance(kind, Elsewhere):
        plain = 0.0
        if kind.compared:
            plain = statistics.median(plain_start(scene, actors) for _ in range(PLAIN_STARTS))
            console.print(f"  a plain start takes {plain:.2f} s until the guest writes")
        return elsewhere_lines(kind, [shown(n, elsewhere(scene, kind, actors)) for n in range(times)], plain)
    if isinstance(kind, Rack):
        pairs = (actors, replace(actors, survivor=others[0]))
        outcomes = [shown(n, rack(scene, kind, pairs)) for n in range(times)]
        return [to_order_line(kind, outcomes)]
    if isinstance(kind, Blackout):
        for number in range(times):
            shown(number, blackout(scene, actors, number))
        name = f"{kind.title}: VMs that did not run exactly once"
        return [below(name, 0, 0, "", f"{times} rounds, on {today()}; any would have ended them")]
    if isinstance(kind, Unkillable):
        for number in range(times):
            shown(number, unkillable(scene, kind, actors))
        name = f"{kind.title}: VMs said to be down before, or started elsewhere"
        return [below(name, 0, 0, "", f"{times} trials, on {today()}; any would have ended them")]
    for number in range(times):
        shown(number, nothing(scene, kind, actors))
    name = f"{kind.title}: VMs restarted, hosts fenced or believed dead"
    return [below(name, 0, 0, "", f"{times} trials, on {today()}; any would have ended them")]


def shown(number: int, outcome: Outcome) -> Outcome:
    took = f": ordered after {outcome.to_order:.2f} s, writes {outcome.to_record:.2f} s later"
    console.print(f"  trial {number + 1}{took if outcome.to_order else ''}")
    for moment in outcome.timeline:
        console.print(f"    {moment.at:8.2f} s  {moment.what}", style="dim", soft_wrap=True)
    return outcome


def today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"


def slowest_of(outcomes: Sequence[Outcome]) -> str:
    """It is the slowest trial that counts."""
    return f"slowest of {len(outcomes)}, on {today()}; median"


def to_order_line(kind: Elsewhere | Rack, outcomes: Sequence[Outcome]) -> Line:
    ordered = [outcome.to_order for outcome in outcomes]
    return below(
        f"{kind.title}: to the restart order",
        max(ordered),
        kind.order_seconds,
        "s",
        f"{slowest_of(outcomes)} {statistics.median(ordered):.2f} s",
    )


def elsewhere_lines(kind: Elsewhere, outcomes: Sequence[Outcome], plain: float) -> list[Line]:
    ordered = to_order_line(kind, outcomes)
    if not kind.compared:
        return [ordered]
    wrote = [outcome.to_record for outcome in outcomes]
    return [
        ordered,
        Line(
            name=f"{kind.title}: from the order until the guest writes",
            ours=max(wrote),
            theirs=plain,
            unit="s",
            ratio=max(wrote) / plain,
            goal=f"<= {SLOWER:g} x",
            met=max(wrote) <= SLOWER * plain,
            note=f"{slowest_of(outcomes)} {statistics.median(wrote):.2f} s; theirs: a plain start, median of {PLAIN_STARTS}",
        ),
    ]


@dataclass(frozen=True)
class Needs:
    """What kinds of trials have in common that take place in one lab."""

    hosts: int
    settings: tuple[tuple[str, str], ...]
    io_timeout_seconds: int
    disk: bool
    """Of the lab's own, that one host can be cut from."""


def grouped(kinds: Sequence[Kind]) -> dict[Needs, list[Kind]]:
    found: dict[Needs, list[Kind]] = {}
    for kind in sorted(kinds, key=lambda kind: kind.storage == "iscsi"):
        hosts = RACK_HOSTS if isinstance(kind, Rack) else HOSTS
        settings = tuple(settings_for(kind).items())
        needs = Needs(hosts, settings, kind.io_timeout_seconds, kind.storage == "disk")
        found.setdefault(needs, []).append(kind)
    return found


def how_often(kind: Kind, n: int, exactly: bool) -> int:
    if isinstance(kind, Rack) and kind.frozen:
        return 1  # the brake, which it is about, would hold the next one for ten minutes
    return n if exactly else max(1, round(n * kind.share))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trials", description=__doc__)
    names = [kind.name for kind in KINDS]
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"some of: {', '.join(names)}; none: all")
    parser.add_argument("-n", type=int, default=30, help="trials with the plug; of other kinds a share of it")
    parser.add_argument("--exactly", action="store_true", help="N trials of each kind; of rack-silent one")
    parser.add_argument("--output", type=Path, default=Path("bench/results.json"))
    asked = parser.parse_args()
    if unknown := [name for name in asked.kinds if name not in names]:
        parser.error(f"no such kind: {', '.join(unknown)}; kinds are {', '.join(names)}")
    if asked.n < 1:
        parser.error("-n must be 1 or more")
    chosen = [kind for kind in KINDS if not asked.kinds or kind.name in asked.kinds]
    found: list[Line] = []
    failed: list[str] = []
    for needs, kinds in grouped(chosen).items():
        while kinds:
            kind = kinds[0]
            try:
                with staged(needs.hosts, dict(needs.settings), with_disk=needs.disk) as scene:
                    company = Company(scene)
                    while kinds:
                        kind = kinds.pop(0)
                        rows = tried(company, kind, how_often(kind, asked.n, asked.exactly))
                        found += rows
                        keep(asked.output, rows)
            except (Wrong, ledger.Torn, LabError, SetupError) as error:
                kinds = [one for one in kinds if one is not kind]  # the others get a lab that is whole
                failed.append(f"{kind.title}: {error}")
                console.print(f"[bold red]{failed[-1]}[/]")
    for line in found:
        console.print(
            f"{line.name}: {line.ours:.2f} {line.unit}, {line.goal}: {'met' if line.met else 'MISSED'}"
        )
    for words in failed:
        console.print(words)
    return 0 if not failed and all(line.met for line in found) else 1


if __name__ == "__main__":
    sys.exit(main())
