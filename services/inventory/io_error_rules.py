"""What is done about a VM that an I/O error paused, by its policy and how long that has lasted. Pure."""

from __future__ import annotations

from enum import StrEnum

from services.inventory.config import InventoryConfig
from volery.contracts.vm import IoErrorPolicy


class Step(StrEnum):
    WAIT = "wait"
    RESUME = "resume"
    KILL = "kill"


def step(
    policy: IoErrorPolicy, paused_seconds: float, untried_seconds: float, tries: int, config: InventoryConfig
) -> Step:
    """`untried_seconds`: since it was told to go on, or was paused. Telling it so is harmless: QEMU repeats what failed,
    and pauses it again if it fails again."""
    if policy is IoErrorPolicy.LEAVE:
        return Step.WAIT
    if policy is IoErrorPolicy.KILL and paused_seconds >= config.io_error_kill_seconds:
        return Step.KILL if untried_seconds >= config.io_error_first_seconds else Step.WAIT
    return Step.RESUME if untried_seconds >= pause(tries, config) else Step.WAIT


def pause(tries: int, config: InventoryConfig) -> float:
    """Seconds until it is told the next time."""
    return min(config.io_error_first_seconds * 2.0 ** min(tries, 16), config.io_error_longest_seconds)
