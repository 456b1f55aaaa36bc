"""The host's boot and its clock: what orders' ages and deadlines are counted with, never compared with another's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from host_agent.rules import BOOT_SHIFT


def read_boot_id(path: Path) -> str:
    """The id of this run of the machine. Raises OSError when the kernel (or the lab) has none."""
    return path.read_text().strip()


def boottime_ms() -> int:
    """Milliseconds since the machine started, also those it slept."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


@dataclass(frozen=True, slots=True)
class BootClock:
    """A beat's number *is* the time it was sent, so that orders keep their age over a restart of the agent.

    `ordinal` counts the host's boots in the journal: a beat of a former boot can't look young.
    """

    boot_id: str
    ordinal: int
    now_ms: Callable[[], int] = boottime_ms

    def beat(self) -> int:
        return self.ordinal << BOOT_SHIFT | self.now_ms()
