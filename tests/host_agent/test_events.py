"""Every row of the event table decodes what libvirt passes, and names stay what the contract says."""

from __future__ import annotations

from typing import Any

import libvirt
import pytest

from host_agent.events import EVENTS, EventName, state_of
from volery.contracts.domain import DomainState

VM = "0192f0c4-1111-7abc-8def-000000000001"
ROWS = {row.libvirt_id: row.decode for row in EVENTS}


def test_each_event_has_one_row() -> None:
    assert len(ROWS) == len(EVENTS)


@pytest.mark.parametrize(
    ("libvirt_id", "arguments", "name", "details"),
    [
        (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, (), EventName.REBOOT, {}),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_WATCHDOG,
            (libvirt.VIR_DOMAIN_EVENT_WATCHDOG_RESET,),
            EventName.WATCHDOG,
            {"action": "reset"},
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
            ("/x", "ua-1", libvirt.VIR_DOMAIN_EVENT_IO_ERROR_PAUSE, "enospc"),
            EventName.IO_ERROR,
            {"path": "/x", "device": "ua-1", "action": "pause", "reason": "enospc"},
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,
            ("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT, libvirt.VIR_DOMAIN_BLOCK_JOB_READY),
            EventName.BLOCK_JOB,
            {"disk": "vda", "type": "commit", "status": "ready"},
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD,
            ("vda", None, 100, 7),
            EventName.BLOCK_THRESHOLD,
            {"device": "vda", "path": "", "threshold_bytes": 100, "excess_bytes": 7},
        ),
        (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, ("ua-1",), EventName.DEVICE_REMOVED, {"device": "ua-1"}),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE,
            (
                libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED,
                libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_REASON_CHANNEL,
            ),
            EventName.AGENT_LIFECYCLE,
            {"state": "connected", "reason": "channel"},
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION,
            (3,),
            EventName.MIGRATION_ITERATION,
            {"iteration": 3},
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED,
            ({"time_elapsed": 5},),
            EventName.JOB_COMPLETED,
            {"time_elapsed": 5},
        ),
    ],
)
def test_arguments_become_details(
    libvirt_id: int, arguments: tuple[Any, ...], name: EventName, details: dict[str, Any]
) -> None:
    event = ROWS[libvirt_id](VM, *arguments)
    assert event is not None
    assert (event.name, event.vm_id, event.details) == (name, VM, details)
    assert event.happened


@pytest.mark.parametrize(
    ("event", "detail", "state", "reason"),
    [
        (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED, "running", "booted"),
        (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED, "incoming", "migrated"),
        (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_IOERROR, "paused", "ioerror"),
        (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED, "gone", "crashed"),
        (libvirt.VIR_DOMAIN_EVENT_STOPPED, 99, "gone", "unknown"),
    ],
)
def test_lifecycle_says_the_state(event: int, detail: int, state: str, reason: str) -> None:
    heard = ROWS[libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE](VM, event, detail)
    assert heard is not None
    assert heard.state == DomainState(state)
    assert heard.details["reason"] == reason
    assert heard.changes_report
    assert not heard.happened


def test_a_panic_is_an_event_and_a_state() -> None:
    heard = ROWS[libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE](
        VM, libvirt.VIR_DOMAIN_EVENT_CRASHED, libvirt.VIR_DOMAIN_EVENT_CRASHED_PANICKED
    )
    assert heard is not None
    assert (heard.name, heard.state) == (EventName.PANIC, DomainState.CRASHED)
    assert heard.happened
    assert heard.changes_report


def test_the_second_threshold_event_is_left_out() -> None:
    decode = ROWS[libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD]
    assert decode(VM, "vda[2]", "/x", 100, 7) is None


def test_an_unknown_event_number_is_ignored() -> None:
    assert ROWS[libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE](VM, 99, 0) is None


def test_paused_for_migration_is_incoming_only_where_it_arrives() -> None:
    numbers = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION)
    assert state_of(*numbers, leaving=False) == (DomainState.INCOMING, "migration")
    assert state_of(*numbers, leaving=True) == (DomainState.PAUSED, "migration")
    assert state_of(libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED, leaving=False) == (
        DomainState.RUNNING,
        "booted",
    )


def test_event_names_are_the_contracts() -> None:
    said = {"reboot", "watchdog", "io_error", "block_threshold", "agent_lifecycle", "device_removed"}
    said |= {
        "device_removal_failed",
        "block_job",
        "job_completed",
        "migration_iteration",
        "memory_failure",
        "panic",
    }
    assert said <= {name.value for name in EventName}
