"""What a process runs, one program or many, from its settings to its clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import uvloop

from volery.runtime import telemetry
from volery.runtime.config import (
    BusConfig,
    ConfigError,
    DatabaseConfig,
    TelemetryConfig,
    read,
    refuse_unknown_sections,
)
from volery.runtime.orders import Beats
from volery.runtime.outside import SERVERS, Outside
from volery.runtime.readiness import until_synced

log = logging.getLogger(__name__)

STOP_SECONDS = 30.0
EXIT_STUCK = 70


@dataclass(frozen=True, slots=True)
class Settings:
    """What every program in a process shares."""

    bus: BusConfig
    database: DatabaseConfig
    telemetry: TelemetryConfig
    environ: Mapping[str, str] | None = None
    """Where each program reads its own section; None is the process's environment."""
    outside: Outside = SERVERS
    beats: Beats | None = None
    """Those who give orders share what one of them hears. ha hears for itself: what it concludes from silence must hold for
    its own connection."""


class Program(Protocol):
    """Something `run` can run: a service, or the gateway."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> type[Any]:
        """Its section of the settings, VOLERY_{NAME}_."""

    async def main(self, settings: Settings, stop: asyncio.Event) -> None: ...


async def run_programs(programs: Sequence[Program], settings: Settings, stop: asyncio.Event) -> None:
    """Run all until `stop`, once the bus keeps what it acknowledges; if one crashes, all end with its exception."""

    async def main(program: Program) -> None:
        try:
            await program.main(settings, stop)
        finally:
            stop.set()

    await until_synced(settings.bus, stop)
    if stop.is_set():
        return
    async with asyncio.TaskGroup() as group:
        for program in programs:
            group.create_task(main(program), name=str(program.name))


def _tell_tasks() -> None:
    """SIGUSR1: where every task is, for whoever wonders why nothing moves."""
    for task in asyncio.all_tasks():
        log.warning("task %s waits at %s", task.get_name(), " > ".join(_awaits(task.get_coro())))


def _awaits(waiter: Any) -> Iterator[str]:
    """From the outermost coroutine to what it waits for in the end."""
    while waiter is not None:
        frame = getattr(waiter, "cr_frame", None) or getattr(waiter, "gi_frame", None)
        if frame is not None:
            yield f"{frame.f_code.co_filename}:{frame.f_lineno}"
        waiter = getattr(waiter, "cr_await", None) or getattr(waiter, "gi_yieldfrom", None)


def run(*programs: Program) -> None:
    """The whole of a program's `__main__`: read the settings, run until SIGTERM or SIGINT, end cleanly."""
    try:
        refuse_unknown_sections()
        settings = Settings(
            read("VOLERY_BUS_", BusConfig),
            read("VOLERY_DATABASE_", DatabaseConfig),
            read("VOLERY_TELEMETRY_", TelemetryConfig),
            beats=Beats(),
        )
        for program in programs:
            read(f"VOLERY_{program.name.upper()}_", program.config)
    except ConfigError as error:
        raise SystemExit(f"volery: {error}") from None
    telemetry.configure("-".join(str(p.name) for p in programs)[:60], settings.telemetry)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGUSR1, _tell_tasks)
        running = asyncio.create_task(run_programs(programs, settings, stop))
        await stop.wait()
        await asyncio.wait([running], timeout=STOP_SECONDS)
        if not running.done():
            log.critical("something does not end; leaving, and whoever supervises us starts us again")
            os._exit(EXIT_STUCK)
        await running

    uvloop.run(main())
