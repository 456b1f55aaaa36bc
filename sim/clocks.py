"""Time in a simulation: one virtual time, and a clock per machine that may be wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sim.loop import SimLoop
from volery.runtime.clock import Clock

BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class Time:
    """`skip` lets quiet time pass at once: wall clocks and the database's move, timers and monotonic clocks don't, as
    if everything periodic had gone on unchanged."""

    loop: SimLoop
    skipped: float = 0.0

    def skip(self, seconds: float) -> None:
        self.skipped += seconds

    @property
    def elapsed(self) -> float:
        """Virtual seconds since the beginning, the skipped ones included."""
        return self.loop.time() + self.skipped

    def utc_now(self) -> datetime:
        return BEGINNING + timedelta(seconds=self.elapsed)


@dataclass(slots=True)
class MachineClock:
    """A machine's: its wall clock is off by `skew_seconds`, which may jump; its monotonic clock only begins elsewhere."""

    time: Time
    booted_at: float = 0.0
    skew_seconds: float = 0.0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.monotonic, self.utc_now)

    def monotonic(self) -> float:
        """Seconds since it was booted, and a few."""
        return self.time.loop.time() - self.booted_at + 10.0

    def utc_now(self) -> datetime:
        return self.time.utc_now() + timedelta(seconds=self.skew_seconds)

    def unix_ms(self) -> int:
        return int(self.utc_now().timestamp() * 1000)

    def boot_ms(self) -> int:
        return int(self.monotonic() * 1000)
