"""The stop table: what is wanted of a VM once its QEMU has ended, by how it ended. Pure.

Who asked for a stop has it, whatever ended the VM first, also a host that died before it said so. What a guest or an
administrator did on purpose stays; what happened to a VM is put right, if it is highly available. Only ends of the VM's
own placement are judged here: a late word of an earlier epoch, or of a migration that failed to arrive, ends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from volery.contracts.vm import DesiredState, Vm


class End(StrEnum):
    """How a VM's QEMU ended; also why the VM is down, as it is shown."""

    GUEST_SHUTDOWN = "guest_shutdown"
    """The guest switched itself off."""
    CRASHED = "crashed"
    """QEMU crashed, was killed, ran out of memory, or the guest's kernel panicked."""
    DESTROYED = "destroyed"
    """Somebody ended it on its host, past Volery."""
    WATCHDOG = "watchdog"
    """The VM's own watchdog, set to power it off, did."""
    IO_ERROR = "io_error"
    """An I/O error had paused it, and its policy ended it."""
    SAVED = "saved"
    MIGRATED = "migrated"
    """It left by a migration that wasn't Volery's."""
    HOST_SHUTDOWN = "host_shutdown"
    """The host's administrator shut the host down, and it stopped its guests."""
    HOST_DIED = "host_died"
    """The boot of the host under which it ran has ended, by proof or by the host's own next report."""


class Wish(StrEnum):
    """What was asked of the VM when it ended."""

    RUN = "run"
    STOP = "stop"
    """A stop was asked for, and perhaps not confirmed; or it isn't wanted to run."""


class Where(StrEnum):
    """Where a VM that is wanted up again belongs. ha chooses by the reason; the last word is the scheduler's."""

    NOWHERE = "nowhere"
    SAME_HOST = "same_host"
    """There first: with back-off, elsewhere after some tries."""
    ELSEWHERE = "elsewhere"


USER = "user"
"""The reason of an end that was asked for."""


@dataclass(frozen=True, slots=True)
class After:
    """What follows from an end."""

    reason: str
    desired: DesiredState
    where: Where


WITH_HOST = frozenset({End.HOST_DIED, End.HOST_SHUTDOWN})
"""Ends together with the host. In a blackout (the control plane was down, too) `start_after_blackout` decides."""

PUT_RIGHT: dict[End, Where] = {
    End.CRASHED: Where.SAME_HOST,
    End.HOST_DIED: Where.ELSEWHERE,
    End.IO_ERROR: Where.ELSEWHERE,
    End.HOST_SHUTDOWN: Where.ELSEWHERE,
}
"""Ends that nobody wanted → where a highly available VM is brought back. All others leave it down."""

END_OF: dict[str, End] = {
    "shutdown": End.GUEST_SHUTDOWN,
    "crashed": End.CRASHED,
    "failed": End.CRASHED,
    "panicked": End.CRASHED,
    "daemon": End.CRASHED,
    "destroyed": End.DESTROYED,
    "saved": End.SAVED,
    "migrated": End.MIGRATED,
    "host_shutdown": End.HOST_SHUTDOWN,
    "host_died": End.HOST_DIED,
}
"""libvirt's reason for a stop, or the agent's own → ours. One that isn't here means that QEMU ended and nobody saw how."""


def end_of(reason: str, shown: str) -> End:
    """How a domain ended. `shown` is the VM's reason until now: a watchdog speaks before it acts."""
    end = END_OF.get(reason, End.CRASHED)
    return End.WATCHDOG if end is End.GUEST_SHUTDOWN and shown == "watchdog" else end


def wish(vm: Vm, stop_asked: bool) -> Wish:
    return Wish.STOP if stop_asked or vm.desired is DesiredState.DOWN else Wish.RUN


def after(
    end: End,
    asked: Wish,
    *,
    protected: bool,
    restart_after_guest_shutdown: bool = False,
    start_after_blackout: bool | None = None,
    blackout: bool = False,
) -> After:
    """`protected`: it is highly available. `blackout`: its host ended while the control plane was down."""
    if asked is Wish.STOP:
        return After(USER, DesiredState.DOWN, Where.NOWHERE)
    if blackout and end in WITH_HOST and start_after_blackout is not None:
        protected = start_after_blackout
    if not protected:
        return After(end, DesiredState.DOWN, Where.NOWHERE)
    if end is End.GUEST_SHUTDOWN and restart_after_guest_shutdown:
        return After(end, DesiredState.UP, Where.SAME_HOST)
    if end in PUT_RIGHT:
        return After(end, DesiredState.UP, PUT_RIGHT[end])
    return After(end, DesiredState.DOWN, Where.NOWHERE)
