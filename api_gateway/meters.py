"""What the gateway counts about itself, as OpenMetrics text."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_SECONDS) + 1))
    total: float = 0.0

    def record(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self.total += seconds


@dataclass(slots=True)
class Meters:
    requests: dict[tuple[str, str, int], int] = field(default_factory=dict)
    """(method, path template, status) → how many."""
    seconds: dict[str, Histogram] = field(default_factory=dict)
    """Method → how long requests took that were not streams."""
    streams: int = 0
    """Clients that follow events now."""
    streams_lost: int = 0
    """Clients that were disconnected because they lagged."""
    transfer_bytes: dict[str, int] = field(default_factory=lambda: {"upload": 0, "download": 0})

    def answered(self, method: str, path: str, status: int, seconds: float | None) -> None:
        key = (method, path, status)
        self.requests[key] = self.requests.get(key, 0) + 1
        if seconds is not None:
            found = self.seconds.get(method)
            if found is None:
                found = self.seconds[method] = Histogram()
            found.record(seconds)
