"""Fence agents: programs that switch a host's power through its BMC. Run by a host, or by ha itself.

Not orders: nothing is journaled or repeated. Whoever doesn't hear the answer asks for the status, and decides anew.
"""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Message

POWER_SUBJECT = "host.{host_id}.power"
"""ha asks a host to run a fence agent: a NATS request, signed by ha as orders are by their owners."""


class PowerAction(StrEnum):
    STATUS = "status"
    ON = "on"
    OFF = "off"
    IDENTITY = "identity"
    """The UUID of the machine that the BMC belongs to."""


class PowerState(StrEnum):
    ON = "on"
    OFF = "off"
    UNKNOWN = "unknown"
    """The BMC could not be asked, or did not say."""


class FenceDevice(Message):
    """One fence agent and how it reaches a host's BMC."""

    agent: str
    """fence_ipmilan, fence_redfish, …: the program's name."""
    address: str
    port: int = 0
    """0: the agent's own."""
    username: str = ""
    options: dict[str, str] = {}
    """Further parameters, by the names of the agent's metadata: lanplus, ssl_insecure, plug, …"""
    timeout_seconds: float = 20.0
    """For one action."""


class AskPower(Message):
    """ha to an executor: run a fence agent against another host's BMC."""

    host_id: str
    """The executor."""
    ask_id: str
    target_host_id: str
    target_boot_id: str
    """The boot that it is about; an executor that is itself this boot refuses."""
    action: PowerAction
    device: FenceDevice
    secrets: dict[str, str]
    """Parameters that are never shown or logged: password, …"""
    beat_seq: int
    """The newest beat of the executor that ha had heard."""
    ttl_ms: int
    """Refused when that beat is older, by the executor's own clock."""
    fencing_token: int
    """Of ha's leader. The executor refuses one below the highest it has seen."""


class PowerAnswer(Message):
    """How a fence agent ended."""

    ask_id: str
    action: PowerAction
    state: PowerState = PowerState.UNKNOWN
    """For `on` and `off`: what the agent confirmed."""
    identity: str = ""
    """For `identity`: the machine's UUID, lower case; empty if the device can't say."""
    words: str = ""
    """What the device or its agent said, without secrets: for people."""
    exit_code: int = -1
    """Of the agent; -1 when it was never run or didn't end in time."""
