"""When the agent of a silent host is restarted over SSH: once, before its power is touched. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from services.ha.config import HaConfig

AGAIN_SECONDS = 600.0
"""An agent that falls silent soon after it was restarted needs a person, or its host a fence."""
SETTLE_SECONDS = 5.0
"""After a restart that worked the agent has this long to beat before power is touched."""
HOLDS = frozenset(
    {
        "no_boot",
        "paused",
        "maintenance",
        "preparing",
        "installing",
        "switched",
        "leaving",
        "quarantine",
        "cut_off",
        "storm",
        "start",
        "dumping",
    }
)
"""Rules of `policies/fencing.py` that keep ha away altogether; the others are about power only."""


class SoftState(StrEnum):
    NONE = "none"
    """Not allowed, or done."""
    DUE = "due"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of it."""

    at: float
    """When it ended."""
    worked: bool
    words: str


@dataclass(frozen=True, slots=True)
class Soft:
    """How it is with one host; ages in seconds."""

    enabled: bool = False
    running: bool = False
    begun_age: float | None = None
    """Since it was tried last; None: never."""
    worked_age: float | None = None
    """Since a restart ended that worked."""


def state_of(soft: Soft, silence: float, config: HaConfig) -> SoftState:
    """Whether it is to be tried, and whether power waits for it. It ends by itself within `soft_fence_seconds`."""
    if soft.running or (soft.worked_age is not None and soft.worked_age < SETTLE_SECONDS):
        return SoftState.RUNNING
    if not soft.enabled or silence < config.silence_seconds:
        return SoftState.NONE
    if soft.begun_age is not None and soft.begun_age < AGAIN_SECONDS:
        return SoftState.NONE
    return SoftState.DUE
