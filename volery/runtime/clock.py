"""The two clocks that everything reads, in one place, so that the simulation can put its own in.

Deadlines, silence and evidence use `monotonic`; what is shown or kept as a date uses `utc_now`. A third kind, the
event loop's own, is the loop's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Clock:
    monotonic: Callable[[], float] = time.monotonic
    """Seconds; never goes back."""
    utc_now: Callable[[], datetime] = _now


REAL = Clock()
CLOCK: ContextVar[Clock] = ContextVar("volery_clock", default=REAL)
"""The clock of the machine that the running task belongs to."""


def monotonic() -> float:
    return CLOCK.get().monotonic()


def utc_now() -> datetime:
    return CLOCK.get().utc_now()
