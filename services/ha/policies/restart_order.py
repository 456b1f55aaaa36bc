"""When a VM that ended is restarted, where, and when no more. Pure: no clock, no bus."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from services.ha.config import HaConfig
from volery.contracts.liveness import LivenessState
from volery.contracts.vm import DesiredState, VmStatus

CRASHES = frozenset({"crashed", "panic", "watchdog", "io_error", "guest_shutdown"})
"""Reasons with which inventory marks a VM down whose host reported that its QEMU ended. That report is the proof that it
runs no more; whether it should run is the desired state's to say."""
WITH_HOST = frozenset({"host_died", "host_shutdown"})
"""The host is dead by proof, or was shut down by its administrator: elsewhere, at once."""
ITS_STORAGE = frozenset({"io_error"})
"""An I/O error kept it paused until its policy ended it: its host may be the only one that lost the storage."""
SAME_HOST_TRIES = 3
"""After so many restarts within the window another host is tried: it may be the host."""


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
    same_host: bool = False
    """Restarted where it ran and nowhere else."""
    cluster_id: str = ""
    placed: bool = True
    """It has a host now."""
    after_blackout: bool = False
    """Brought back after a blackout in any case. That one was is inventory's to say: it stays wanted up."""


def is_watched(vm: WatchedVm) -> bool:
    """Whether it may ever be brought back."""
    return vm.enabled or vm.after_blackout


def ended(vm: WatchedVm) -> bool:
    """Whether it should run, does not, and it is proven that it doesn't."""
    return (
        vm.status == VmStatus.DOWN
        and vm.desired == DesiredState.UP
        and ((vm.enabled and vm.reason in CRASHES) or (is_watched(vm) and vm.reason in WITH_HOST))
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
    preferred_host_id: str = ""
    avoided_host_ids: tuple[str, ...] = ()
    only_host_id: str = ""


def within(attempts: tuple[datetime, ...], now: datetime, config: HaConfig) -> tuple[datetime, ...]:
    """Attempts that still count."""
    return tuple(at for at in attempts if now - at < timedelta(seconds=config.restart_window_seconds))


def decide(
    vm: WatchedVm,
    host: LivenessState | None,
    attempts: tuple[datetime, ...],
    now: datetime,
    config: HaConfig,
    last_reason: str = "",
) -> Verdict:
    """What to do about a VM that ended. `host` is the liveness of where it ran; `attempts` are those of the window,
    oldest first; `last_reason` is what the newest was for."""
    count, how = len(attempts), _how(vm)
    if count >= config.restarts_at_most:
        return Verdict(
            Step.GIVE_UP,
            f"VM {vm.name} ended {_by(vm)} again after {count} restarts within "
            f"{config.restart_window_seconds / 60:g} minutes; it is left down. Look at {_look_at(vm)}, then start it",
        )
    if host is LivenessState.NON_RESPONSIVE and vm.reason in CRASHES:
        return Verdict(
            Step.WAIT,
            f"{how}, and its host has fallen silent since; it is restarted when the host answers, or is proven dead",
        )
    if vm.same_host and vm.host_id and host is not LivenessState.UP:
        return Verdict(
            Step.WAIT,
            f"{how}; it is restarted on its own host only, as was asked: once that is up again",
        )
    due = _due(vm, attempts, now, config, last_reason)
    if now < due:
        return Verdict(
            Step.WAIT,
            f"{how}; restart {count + 1} waits until {due:%H:%M:%S} UTC, since "
            f"{count} within {config.restart_window_seconds / 60:g} minutes didn't last",
            due,
        )
    asked = f"{how}; restart {count + 1} was asked for"
    if vm.same_host and vm.host_id:
        return Verdict(Step.ASK, asked, only_host_id=vm.host_id)
    preferred, avoided = _place(vm, host, count)
    return Verdict(Step.ASK, asked, preferred_host_id=preferred, avoided_host_ids=avoided)


def waits_for_more_important(
    vm: WatchedVm, other: WatchedVm, host_name: str, waited: float, at_most: float
) -> str:
    """Why it waits for a VM of a host that isn't back; "" when it doesn't. It has waited for so many seconds."""
    if waited >= at_most or other.id == vm.id or other.priority <= vm.priority:
        return ""
    return (
        f"it waits for host {host_name}, which isn't back since ha began, since VM {other.name} there is more important, "
        f"at most {at_most:g} s"
    )


def waits_for_place(vm: WatchedVm, other: WatchedVm, waited: float, at_most: float) -> str:
    """Why it waits for a VM whose restart was asked for before; "" when it doesn't. It has waited for so many seconds."""
    if waited >= at_most or other.id == vm.id or other.priority <= vm.priority:
        return ""
    return (
        f"it waits until VM {other.name}, which is more important, has a host, so as not to take its room, at most "
        f"{at_most / 60:g} minutes"
    )


def waits_for_trial(vm: WatchedVm, other: WatchedVm, waited: float, at_most: float) -> str:
    """Why it waits until a VM whose start failed has been tried again; "" when it doesn't. It has waited for so many seconds."""
    if waited >= at_most or other.id == vm.id or other.priority <= vm.priority:
        return ""
    return f"it waits until VM {other.name}, which is more important and found no host, has been tried again"


def _by(vm: WatchedVm) -> str:
    return "together with its host" if vm.reason in WITH_HOST else "by itself"


def _look_at(vm: WatchedVm) -> str:
    """A VM that takes one host after the other down with it must stop somewhere, too."""
    return "why its hosts died, it may be the VM" if vm.reason in WITH_HOST else "its console log"


def _how(vm: WatchedVm) -> str:
    if vm.reason in WITH_HOST:
        return f"VM {vm.name} ended with its host ({vm.reason})"
    return f"VM {vm.name} crashed ({vm.reason})"


def _due(
    vm: WatchedVm, attempts: tuple[datetime, ...], now: datetime, config: HaConfig, last_reason: str
) -> datetime:
    """A host's death is no fault of the VM's: the first restart after it never waits."""
    # One in the future was written before this machine's clock was set back: it counts, and nobody waits for it.
    if not attempts or attempts[-1] > now or (vm.reason in WITH_HOST and last_reason != vm.reason):
        return now
    return attempts[-1] + delay(1 if vm.reason in WITH_HOST else len(attempts), config)


def _place(vm: WatchedVm, host: LivenessState | None, count: int) -> tuple[str, tuple[str, ...]]:
    """(host to prefer, hosts to avoid)"""
    if not vm.host_id:
        return "", ()
    if vm.reason in WITH_HOST | ITS_STORAGE or count >= SAME_HOST_TRIES or host is LivenessState.DEAD:
        return "", (vm.host_id,)
    return vm.host_id, ()


def delay(count: int, config: HaConfig) -> timedelta:
    """How long after attempt number `count` the next one waits."""
    seconds = config.restart_first_delay_seconds * 2.0 ** (count - 1)
    return timedelta(seconds=min(seconds, config.restart_longest_delay_seconds))


def is_over(vm: WatchedVm | None, attempts: tuple[datetime, ...], gave_up: bool) -> bool:
    """Whether a restart's record says nothing any more. `attempts` are those of the window."""
    if vm is None or vm.desired != DesiredState.UP or not is_watched(vm):
        return True
    if vm.status == VmStatus.DOWN:
        return False
    # Up again after ha gave up: a person started it.
    return gave_up or not attempts
