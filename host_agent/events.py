"""Every libvirt domain event that the agent hears, one row each: its id, its name, what its arguments mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import libvirt

from volery.contracts.domain import DomainState


class EventName(StrEnum):
    """`DomainEventHappened.event`, and what the hypervisor says about itself."""

    LIFECYCLE = "lifecycle"
    PANIC = "panic"
    REBOOT = "reboot"
    WATCHDOG = "watchdog"
    IO_ERROR = "io_error"
    BLOCK_JOB = "block_job"
    BLOCK_THRESHOLD = "block_threshold"
    DEVICE_ADDED = "device_added"
    DEVICE_REMOVED = "device_removed"
    DEVICE_REMOVAL_FAILED = "device_removal_failed"
    TRAY_CHANGED = "tray_changed"
    AGENT_LIFECYCLE = "agent_lifecycle"
    MIGRATION_ITERATION = "migration_iteration"
    JOB_COMPLETED = "job_completed"
    MEMORY_FAILURE = "memory_failure"
    CONTROL_ERROR = "control_error"
    METADATA_CHANGED = "metadata_changed"
    """Also what Volery keeps in the domain: its epoch."""
    CONNECTED = "connected"
    """libvirtd answers (again): events in between are lost, so list everything."""
    DISCONNECTED = "disconnected"
    UNRESPONSIVE = "unresponsive"
    """A call about this domain has not come back in time."""
    RESPONSIVE = "responsive"
    UNDYING = "undying"
    """It was sent SIGKILL and does not end."""
    GUEST_CHANGED = "guest_changed"
    """The guest's agent told something new about names or addresses."""


@dataclass(frozen=True, slots=True)
class HypervisorEvent:
    """`vm_id` is "" where the event is about the hypervisor itself."""

    name: EventName
    vm_id: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    state: DomainState | None = None
    """For lifecycle events: the state that the domain is in now. GONE: QEMU has ended."""

    @property
    def changes_report(self) -> bool:
        """Whether the domain's report differs after it."""
        return self.name in _CHANGES_REPORT

    @property
    def changes_state_only(self) -> bool:
        """Whether everything else in the domain's report stays as it was."""
        return self.name is EventName.LIFECYCLE and self.details.get("event") in ("suspended", "resumed")

    @property
    def happened(self) -> bool:
        """Whether it is told to the domain's owner as an event of its own, besides the domain's state."""
        return self.name in _HAPPENINGS


_CHANGES_REPORT = frozenset(
    {
        EventName.LIFECYCLE,
        EventName.PANIC,
        EventName.DEVICE_ADDED,
        EventName.DEVICE_REMOVED,
        EventName.AGENT_LIFECYCLE,
        EventName.METADATA_CHANGED,
        EventName.UNRESPONSIVE,
        EventName.RESPONSIVE,
        EventName.UNDYING,
        EventName.GUEST_CHANGED,
    }
)
_HAPPENINGS = frozenset(EventName) - {
    EventName.LIFECYCLE,
    EventName.DEVICE_ADDED,
    EventName.METADATA_CHANGED,
    EventName.CONNECTED,
    EventName.DISCONNECTED,
    EventName.UNRESPONSIVE,
    EventName.RESPONSIVE,
    EventName.UNDYING,
    EventName.GUEST_CHANGED,
}

Decode = Callable[..., HypervisorEvent | None]


@dataclass(frozen=True, slots=True)
class EventRow:
    """`decode(vm_id, *arguments)` is called in libvirt's event thread: no I/O; None for what nobody needs."""

    libvirt_id: int
    decode: Decode


def _names(prefix: str) -> Mapping[int, str]:
    """libvirt's constants of one enumeration, by number: `VIR_DOMAIN_RUNNING_BOOTED` becomes `booted`."""
    return {
        value: name.removeprefix(prefix).lower()
        for name, value in vars(libvirt).items()
        if name.startswith(prefix) and isinstance(value, int) and not name.endswith("_LAST")
    }


_LIFECYCLE = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: ("started", "VIR_DOMAIN_EVENT_STARTED_", DomainState.RUNNING),
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: ("suspended", "VIR_DOMAIN_EVENT_SUSPENDED_", DomainState.PAUSED),
    libvirt.VIR_DOMAIN_EVENT_RESUMED: ("resumed", "VIR_DOMAIN_EVENT_RESUMED_", DomainState.RUNNING),
    libvirt.VIR_DOMAIN_EVENT_STOPPED: ("stopped", "VIR_DOMAIN_EVENT_STOPPED_", DomainState.GONE),
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: (
        "shutdown",
        "VIR_DOMAIN_EVENT_SHUTDOWN_",
        DomainState.SHUTTING_DOWN,
    ),
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: (
        "pmsuspended",
        "VIR_DOMAIN_EVENT_PMSUSPENDED_",
        DomainState.PMSUSPENDED,
    ),
    libvirt.VIR_DOMAIN_EVENT_CRASHED: ("crashed", "VIR_DOMAIN_EVENT_CRASHED_", DomainState.CRASHED),
    libvirt.VIR_DOMAIN_EVENT_DEFINED: ("defined", "VIR_DOMAIN_EVENT_DEFINED_", None),
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: ("undefined", "VIR_DOMAIN_EVENT_UNDEFINED_", None),
}
_LIFECYCLE_DETAILS = {event: _names(row[1]) for event, row in _LIFECYCLE.items()}
_STATES = {
    libvirt.VIR_DOMAIN_NOSTATE: (DomainState.RUNNING, _names("VIR_DOMAIN_NOSTATE_")),
    libvirt.VIR_DOMAIN_RUNNING: (DomainState.RUNNING, _names("VIR_DOMAIN_RUNNING_")),
    libvirt.VIR_DOMAIN_BLOCKED: (DomainState.RUNNING, _names("VIR_DOMAIN_BLOCKED_")),
    libvirt.VIR_DOMAIN_PAUSED: (DomainState.PAUSED, _names("VIR_DOMAIN_PAUSED_")),
    libvirt.VIR_DOMAIN_SHUTDOWN: (DomainState.SHUTTING_DOWN, _names("VIR_DOMAIN_SHUTDOWN_")),
    libvirt.VIR_DOMAIN_SHUTOFF: (DomainState.SHUTOFF, _names("VIR_DOMAIN_SHUTOFF_")),
    libvirt.VIR_DOMAIN_CRASHED: (DomainState.CRASHED, _names("VIR_DOMAIN_CRASHED_")),
    libvirt.VIR_DOMAIN_PMSUSPENDED: (DomainState.PMSUSPENDED, _names("VIR_DOMAIN_PMSUSPENDED_")),
}
_WATCHDOG = _names("VIR_DOMAIN_EVENT_WATCHDOG_")
_IO_ACTION = _names("VIR_DOMAIN_EVENT_IO_ERROR_")
_BLOCK_JOB_TYPE = _names("VIR_DOMAIN_BLOCK_JOB_TYPE_")
_BLOCK_JOB_STATUS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_COMPLETED: "completed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_FAILED: "failed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_CANCELED: "canceled",
    libvirt.VIR_DOMAIN_BLOCK_JOB_READY: "ready",
}
_TRAY = {
    libvirt.VIR_DOMAIN_EVENT_TRAY_CHANGE_OPEN: "open",
    libvirt.VIR_DOMAIN_EVENT_TRAY_CHANGE_CLOSE: "close",
}
_AGENT_STATE = _names("VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_")
_AGENT_REASON = _names("VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_REASON_")
_MEMORY_RECIPIENT = _names("VIR_DOMAIN_EVENT_MEMORY_FAILURE_RECIPIENT_")
_MEMORY_ACTION = _names("VIR_DOMAIN_EVENT_MEMORY_FAILURE_ACTION_")


def state_of(state: int, reason: int, *, leaving: bool) -> tuple[DomainState, str]:
    """What virDomainGetState says, as state and reason.

    Paused for migration means INCOMING on the destination; the source's pause at the end of its own migration
    (`leaving`) is the same number.
    """
    known, reasons = _STATES.get(state, (DomainState.RUNNING, {}))
    word = reasons.get(reason, "unknown")
    if known is DomainState.PAUSED and word == "migration" and not leaving:
        known = DomainState.INCOMING
    return known, word


def _lifecycle(vm_id: str, event: int, detail: int) -> HypervisorEvent | None:
    if event not in _LIFECYCLE:
        return None
    word, _, state = _LIFECYCLE[event]
    reason = _LIFECYCLE_DETAILS[event].get(detail, "unknown")
    if (word, reason) == ("started", "migrated"):
        state = DomainState.INCOMING
    name = EventName.PANIC if state is DomainState.CRASHED else EventName.LIFECYCLE
    return HypervisorEvent(name, vm_id, {"event": word, "reason": reason}, state)


def _plain(name: EventName, *fields: str) -> Decode:
    """An event whose arguments are told as they are, under these names."""

    def decode(vm_id: str, *arguments: Any) -> HypervisorEvent:
        return HypervisorEvent(name, vm_id, dict(zip(fields, arguments, strict=True)))

    return decode


def _worded(name: EventName, **fields: Mapping[int, str] | None) -> Decode:
    """An event whose arguments have these names, numbers translated by their enumeration where there is one."""

    def decode(vm_id: str, *arguments: Any) -> HypervisorEvent:
        details = {
            label: value if words is None else words.get(value, str(value))
            for (label, words), value in zip(fields.items(), arguments, strict=True)
        }
        return HypervisorEvent(name, vm_id, details)

    return decode


def _block_threshold(
    vm_id: str, device: str, path: str, threshold: int, excess: int
) -> HypervisorEvent | None:
    """libvirt says it twice, for `vda` and for the node `vda[2]`; the second is left out."""
    if "[" in device:
        return None
    details = {"device": device, "path": path or "", "threshold_bytes": threshold, "excess_bytes": excess}
    return HypervisorEvent(EventName.BLOCK_THRESHOLD, vm_id, details)


def _job_completed(vm_id: str, params: Mapping[str, Any]) -> HypervisorEvent:
    return HypervisorEvent(EventName.JOB_COMPLETED, vm_id, dict(params))


EVENTS: tuple[EventRow, ...] = (
    EventRow(libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, _lifecycle),
    EventRow(libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, _plain(EventName.REBOOT)),
    EventRow(libvirt.VIR_DOMAIN_EVENT_ID_WATCHDOG, _worded(EventName.WATCHDOG, action=_WATCHDOG)),
    EventRow(
        libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
        _worded(EventName.IO_ERROR, path=None, device=None, action=_IO_ACTION, reason=None),
    ),
    EventRow(
        libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,
        _worded(EventName.BLOCK_JOB, disk=None, type=_BLOCK_JOB_TYPE, status=_BLOCK_JOB_STATUS),
    ),
    EventRow(libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD, _block_threshold),
    EventRow(libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, _plain(EventName.DEVICE_ADDED, "device")),
    EventRow(libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, _plain(EventName.DEVICE_REMOVED, "device")),
    EventRow(
        libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, _plain(EventName.DEVICE_REMOVAL_FAILED, "device")
    ),
    EventRow(
        libvirt.VIR_DOMAIN_EVENT_ID_TRAY_CHANGE, _worded(EventName.TRAY_CHANGED, device=None, tray=_TRAY)
    ),
    EventRow(
        libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE,
        _worded(EventName.AGENT_LIFECYCLE, state=_AGENT_STATE, reason=_AGENT_REASON),
    ),
    EventRow(
        libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION,
        _plain(EventName.MIGRATION_ITERATION, "iteration"),
    ),
    EventRow(libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, _job_completed),
    EventRow(
        libvirt.VIR_DOMAIN_EVENT_ID_MEMORY_FAILURE,
        _worded(EventName.MEMORY_FAILURE, recipient=_MEMORY_RECIPIENT, action=_MEMORY_ACTION, flags=None),
    ),
    EventRow(libvirt.VIR_DOMAIN_EVENT_ID_CONTROL_ERROR, _plain(EventName.CONTROL_ERROR)),
    EventRow(
        libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, _plain(EventName.METADATA_CHANGED, "kind", "namespace")
    ),
)
"""Left out: BALLOON_CHANGE, TUNABLE, RTC_CHANGE, GRAPHICS and DISK_CHANGE (nobody acts on them);
PMSUSPEND and PMWAKEUP, which come as LIFECYCLE too; BLOCK_JOB and IO_ERROR, which have newer forms above."""
