"""`python -m fleet --hosts 10000 --vms 200000`: simulated agents, each on its own connection, against the real services.

Makes an installation of its own in /tmp, writes the fleet's objects, connects every host, waits until all are up, watches
them for some minutes, and cuts a hundred off at once. Prints what it saw and writes it into bench/results.json.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench.__main__ import RESULTS, print_table
from bench.fleet import BEAT_SECONDS
from bench.rows import Line, below, keep
from bench.world import installed
from fleet import figures, seeds
from fleet.hosts import Pace, PacedHost, connected
from volery.runtime.database import open_pool

FILES_A_HOST = 1
"""Its socket here; the server has as many, and the same limit, as a process of its own."""
OTHER_FILES = 2000
UP_A_SECOND = 50
"""Hosts that say their first words: what a data center does that comes up rack by rack."""
PATIENCE_SECONDS = 1800.0
KILLED_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Asked:
    hosts: int
    vms: int
    minutes: float
    kill: int
    changing: bool
    beat: float


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def raise_limits(hosts: int) -> None:
    """Raises SystemExit where this user may not open so many files."""
    wanted = hosts * FILES_A_HOST + OTHER_FILES
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
        except (ValueError, OSError):
            raise SystemExit(
                f"{hosts} hosts need {wanted} open files and this user may have {most}: run as root, or "
                f"raise the limit (ulimit -Hn {wanted})"
            ) from None
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


async def run(asked: Asked) -> list[Line]:
    with ExitStack() as stack:
        tell("making an installation")
        there = await asyncio.to_thread(stack.enter_context, installed())
        async with (
            open_pool(there.database(pool_max=4), "inventory") as inventory,
            figures.tables(there) as look,
        ):
            made = await seeds.seed(inventory, asked.hosts, asked.vms, tell)
            await until_quiet(look)
            tell(f"connecting {asked.hosts:,} hosts")
            begun = time.monotonic()
            hosts = await connected(there, made)
            tell(f"connected in {time.monotonic() - begun:.0f} s")
            pace = Pace(hosts, beat_seconds=asked.beat, changing=asked.changing)
            pacing = asyncio.create_task(pace.keep())
            try:
                took = await come_up(look, hosts)
                await until_claimed(look, asked.vms)
                await until_quiet(look)
                tell(f"watching for {asked.minutes:g} minutes")
                pace.late = 0.0
                before = sum(host.returns for host in hosts)
                steady = await figures.watch(there, look, asked.minutes * 60)
                steady.returns = sum(host.returns for host in hosts) - before
                lines = [*steady_lines(asked, took, steady, pace.late), *await cut_off(asked, look, hosts)]
            finally:
                pacing.cancel()
                for host in hosts:
                    host.cut()
        await asyncio.to_thread(stack.close)
    return lines


async def until_quiet(look: figures.Tables) -> None:
    """Until every fact has left its owner."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while waiting := await look.waiting_facts():
            tell(f"{waiting:,} facts wait")
            await asyncio.sleep(2.0)


async def until_claimed(look: figures.Tables, vms: int) -> None:
    """Until the scheduler has given every VM that it found running the claim that it lacked."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (held := await look.claims()) < vms:
            tell(f"{held:,} of {vms:,} VMs hold their capacity")
            await asyncio.sleep(2.0)


async def come_up(look: figures.Tables, hosts: list[PacedHost]) -> float:
    """Seconds until every host is up."""
    begun = time.monotonic()
    for host in hosts:
        with suppress(ConnectionError):  # it comes back, and says the rest then
            await host.first_words()
        await asyncio.sleep(1 / UP_A_SECOND)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (up := await look.hosts_up()) < len(hosts):
            lost = [host.wire.lost for host in hosts if host.wire is not None and host.wire.lost]
            tell(
                f"{up:,} of {len(hosts):,} hosts are up"
                + (f"; {len(lost)} are cut off: {lost[0]}" if lost else "")
            )
            await asyncio.sleep(2.0)
    return time.monotonic() - begun


async def cut_off(asked: Asked, look: figures.Tables, hosts: list[PacedHost]) -> list[Line]:
    gone = hosts[: asked.kill]
    tell(f"cutting {len(gone)} hosts off")
    for host in gone:
        host.cut()
    seen = await figures.watch_killed(look, [host.host_id for host in gone], KILLED_PATIENCE_SECONDS)
    note = f"the last was suspected after {seen.suspected:.1f} s; of the others at most {seen.others} were suspected"
    what = f"{len(gone)} of {asked.hosts:,} hosts cut off at once: until all are non-responsive"
    return [below(what, seen.given_up, 15.0, "s", note)]


def steady_lines(asked: Asked, took: float, seen: figures.Steady, late: float) -> list[Line]:
    fleet = f"{asked.hosts:,} hosts, {asked.vms:,} VMs"
    beside = ", ".join(f"{part} {cores:.2f}" for part, cores in seen.cores.items())
    note = (
        f"{seen.seconds / 60:.1f} min; {beside}, the simulated hosts {seen.fleet_cores:.2f}; all were up after {took:.0f} s; "
        f"beats every {asked.beat:g} s, at most {late:.2f} s late before they were sent; at most {seen.waiting:,} facts waited; "
        f"{seen.returns} connections were lost and made again"
    )
    stored = f"{seen.minutes:,} of {asked.vms:,} VMs' last minute stored"
    return [
        below(f"fleet of {fleet}: processors of the services", seen.cores["services"], 1.0, "cores", note),
        below(f"fleet of {fleet}: memory of the services (RSS)", seen.most_mb, 4000.0, "MB", stored),
        below(f"fleet of {fleet}: hosts suspected at once", float(seen.suspects), 0.0, "hosts"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fleet", description=__doc__)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--vms", type=int, default=20000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kill", type=int, default=100, help="hosts that are cut off at once, at the end")
    parser.add_argument("--beat", type=float, default=BEAT_SECONDS, help="seconds between a host's beats")
    parser.add_argument("--changing", action="store_true", help="each VM changes once a minute")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the rows are written")
    given = parser.parse_args()
    if not 1 <= given.kill <= given.hosts:
        parser.error(f"--kill is 1 to {given.hosts}, not {given.kill}")
    raise_limits(given.hosts)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lines = uvloop.run(
        run(Asked(given.hosts, given.vms, given.minutes, given.kill, given.changing, given.beat))
    )
    print_table(lines)
    keep(given.output, lines)


if __name__ == "__main__":
    main()
