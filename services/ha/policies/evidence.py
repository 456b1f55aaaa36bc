"""What is concluded about a host from what was observed. Pure: all times are seconds of one monotonic clock.

Silence is evidence, never proof: the strongest conclusion here is `non_responsive`. Whoever could not listen has
no opinion, so silence counts only from `listening_since` on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from services.ha.config import HaConfig
from volery.contracts.liveness import LivenessState

UP, CONNECTING = LivenessState.UP, LivenessState.CONNECTING
NON_RESPONSIVE, UNKNOWN = LivenessState.NON_RESPONSIVE, LivenessState.UNKNOWN

STORM_HOSTS = 3
"""With fewer hosts one can't tell a trouble of one's own from theirs."""


class Kind(StrEnum):
    """Kinds of evidence; the newest of each is kept."""

    BEAT = "beat"
    SILENCE = "silence"
    DISCONNECTED = "disconnected"
    CONNECTED = "connected"
    NEW_BOOT = "new_boot"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known about one host."""

    state: LivenessState
    beat_at: float | None = None
    """The newest beat of the agent that inventory admitted."""
    stranger_beat_at: float | None = None
    """The newest beat of an agent under this host's name whose journal inventory has not admitted."""
    disconnected_at: float | None = None
    """The NATS server said that the agent left; None once anything was heard since."""


def judge(seen: Seen, listening_since: float, now: float, config: HaConfig) -> LivenessState:
    """The state that the evidence supports; the old one where it supports nothing new."""
    heard_from = max(seen.beat_at if seen.beat_at is not None else listening_since, listening_since)
    silence = now - heard_from
    if seen.state is UNKNOWN and seen.beat_at is None:
        return UNKNOWN
    alive = seen.stranger_beat_at is not None and now - seen.stranger_beat_at < config.suspect_seconds
    if silence >= config.silence_seconds:
        return CONNECTING if alive else NON_RESPONSIVE
    if silence >= config.suspect_seconds or _left(seen, listening_since, now, config):
        # From non-responsive only a beat leads back.
        return seen.state if seen.state is NON_RESPONSIVE and not alive else CONNECTING
    if seen.beat_at is not None and now - seen.beat_at < config.suspect_seconds:
        return UP
    return seen.state


def _left(seen: Seen, listening_since: float, now: float, config: HaConfig) -> bool:
    at = seen.disconnected_at
    if at is None or (seen.beat_at is not None and seen.beat_at > at):
        return False
    # That it came back may have been missed while nobody listened; its beats would not.
    return now - max(at, listening_since) >= config.disconnect_seconds


def is_storm(before: Iterable[LivenessState], after: Iterable[LivenessState]) -> bool:
    """Whether most of the hosts that were up are believed silent at the same moment."""
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b in (UP, CONNECTING)]
    silent = sum(a in (CONNECTING, NON_RESPONSIVE) for _, a in pairs)
    return silent >= STORM_HOSTS and silent * 2 > len(pairs)


SENTENCES: dict[LivenessState, str] = {
    UP: "it beats",
    CONNECTING: "no beat for {silence:.1f} s",
    NON_RESPONSIVE: "no beat for {silence:.1f} s; silence is no proof of death",
    UNKNOWN: "never heard of",
}
