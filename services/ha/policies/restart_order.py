"""When a crashed VM is restarted, and when no more. Pure: no clock, no bus."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from services.ha.config import HaConfig
from volery.contracts.liveness import LivenessState
from volery.contracts.vm import DesiredState, VmStatus

CRASHES = frozenset({"crashed", "panic", "watchdog", "io_error"})
"""Reasons with which inventory marks a VM down whose host reported that its QEMU ended, unasked. That report is
the proof that it runs no more."""


@dataclass(frozen=True, slots=True)
class WatchedVm:
    """A VM as inventory last said."""

    id: str
    name: str
    epoch: int
    status: str
    desired: str
    reason: str
    host_id: str
    """Where it runs, or ran last."""
    enabled: bool
    """Highly available."""
    priority: int
    busy: bool


def crashed(vm: WatchedVm) -> bool:
    """Whether it should run, does not, and its host said that it ended by itself."""
    return (
        vm.enabled
        and vm.status == VmStatus.DOWN
        and vm.desired == DesiredState.UP
        and vm.reason in CRASHES
        and not vm.busy
    )


class Step(StrEnum):
    ASK = "ask"
    WAIT = "wait"
    GIVE_UP = "give_up"


@dataclass(frozen=True, slots=True)
class Verdict:
    step: Step
    message: str
    due: datetime | None = None


def within(attempts: tuple[datetime, ...], now: datetime, config: HaConfig) -> tuple[datetime, ...]:
    """Attempts that still count."""
    return tuple(at for at in attempts if now - at < timedelta(seconds=config.restart_window_seconds))


def decide(
    vm: WatchedVm, host: LivenessState | None, attempts: tuple[datetime, ...], now: datetime, config: HaConfig
) -> Verdict:
    """What to do about a crashed VM. `host` is the liveness of where it ran; `attempts` are those of the window,
    oldest first."""
    count = len(attempts)
    if count >= config.restarts_at_most:
        return Verdict(
            Step.GIVE_UP,
            f"VM {vm.name} ended by itself again after {count} restarts within "
            f"{config.restart_window_seconds / 60:g} minutes; it is left down. Look at its console log, then start it",
        )
    if host is LivenessState.NON_RESPONSIVE:
        return Verdict(
            Step.WAIT,
            f"VM {vm.name} crashed ({vm.reason}), and its host has fallen silent since; it is restarted when the "
            "host answers",
        )
    # One in the future was written before this machine's clock was set back: it counts, and nobody waits for it.
    due = attempts[-1] + delay(count, config) if attempts and attempts[-1] <= now else now
    if now < due:
        return Verdict(
            Step.WAIT,
            f"VM {vm.name} crashed ({vm.reason}); restart {count + 1} waits until {due:%H:%M:%S} UTC, since "
            f"{count} within {config.restart_window_seconds / 60:g} minutes didn't last",
            due,
        )
    return Verdict(Step.ASK, f"VM {vm.name} crashed ({vm.reason}); restart {count + 1} was asked for")


def delay(count: int, config: HaConfig) -> timedelta:
    """How long after attempt number `count` the next one waits."""
    seconds = config.restart_first_delay_seconds * 2.0 ** (count - 1)
    return timedelta(seconds=min(seconds, config.restart_longest_delay_seconds))


def is_over(vm: WatchedVm | None, attempts: tuple[datetime, ...], gave_up: bool) -> bool:
    """Whether a restart's record says nothing any more. `attempts` are those of the window."""
    if vm is None or vm.desired != DesiredState.UP or not vm.enabled:
        return True
    if vm.status == VmStatus.DOWN:
        return False
    # Up again after ha gave up: a person started it.
    return gave_up or not attempts
