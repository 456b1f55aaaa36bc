"""Since when hosts have done little, by their samples. Times are monotonic."""

from __future__ import annotations

from dataclasses import dataclass, field

NEVER = float("inf")


@dataclass(slots=True)
class Idle:
    _since: dict[str, float] = field(default_factory=dict)
    _heard: dict[str, float] = field(default_factory=dict)

    def note(self, host_id: str, percent: float, low: float, now: float, apart: float) -> None:
        """How busy its CPUs are, in %. `apart`: of the time between samples that are further apart nothing is known, as the
        host may have been off; in seconds."""
        if self.heard(host_id, now) > apart:
            self._since.pop(host_id, None)
        self._heard[host_id] = now
        if percent < low:
            self._since.setdefault(host_id, now)
        else:
            self._since.pop(host_id, None)

    def lasts(self, host_id: str, now: float) -> float:
        """For how many seconds its CPUs have been below the low utilisation; -1: they aren't."""
        since = self._since.get(host_id)
        return -1.0 if since is None else now - since

    def heard(self, host_id: str, now: float) -> float:
        """How long ago its last sample came, in seconds; infinite when none has."""
        at = self._heard.get(host_id)
        return NEVER if at is None else now - at

    def forget(self, host_id: str) -> None:
        self._since.pop(host_id, None)
        self._heard.pop(host_id, None)
