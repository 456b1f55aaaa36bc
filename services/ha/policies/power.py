"""What several devices say about one machine, and which power management makes sense. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from msgspec import UNSET

from volery.contracts.errors import conflict, invalid
from volery.contracts.fencing import FenceDevice, PowerAnswer, PowerState
from volery.contracts.host import HostStatus
from volery.contracts.power import Identity, NewFenceDevice
from volery.fencing.identity import normal, same_machine

W = TypeVar("W")
MAX_DEVICES = 8


def state_of(states: Sequence[PowerState], *, together: bool) -> PowerState:
    """Of the machine. Together (several supplies): off when all are off. In order (several ways to one machine): what
    the first that knows says."""
    if together:
        if any(state is PowerState.ON for state in states):
            return PowerState.ON
        return PowerState.OFF if states and all(s is PowerState.OFF for s in states) else PowerState.UNKNOWN
    return next((state for state in states if state is not PowerState.UNKNOWN), PowerState.UNKNOWN)


def in_turn(ways: Sequence[W], tried: int) -> Sequence[W]:
    """The ways to a machine's power, for one more order after so many that came to nothing: it begins with another."""
    first = tried % max(len(ways), 1)
    return (*ways[first:], *ways[:first])


def is_over(ordered: PowerAnswer, seen: PowerAnswer) -> bool:
    """Whether no other way may be ordered now, since this one did it, or may have. `seen` is the status by the same way,
    read after an order that got no clear answer."""
    if seen.state is not PowerState.UNKNOWN:
        return seen.state.value == ordered.action.value or is_lost(ordered)
    return is_lost(seen)


def is_lost(answer: PowerAnswer) -> bool:
    """Nobody heard how it ended. An agent that ended by itself said that it could not, or could not reach its device."""
    return answer.exit_code < 0


def identity_of(answers: Sequence[PowerAnswer], hardware_uuid: str) -> Identity:
    """Whether every device belongs to the machine with this DMI UUID; one stranger is enough for a mismatch."""
    if any(
        a.identity and normal(hardware_uuid) and not same_machine(a.identity, hardware_uuid) for a in answers
    ):
        return Identity.MISMATCH
    if answers and all(a.identity and same_machine(a.identity, hardware_uuid) for a in answers):
        return Identity.CHECKED
    return Identity.UNCHECKED


def identity_words(identity: Identity, answers: Sequence[PowerAnswer], hardware_uuid: str) -> str:
    if identity is Identity.CHECKED:
        return ""
    said = ", ".join(a.identity or (a.words or "nothing") for a in answers)
    if identity is Identity.MISMATCH:
        return (
            f"the machine's UUID is {hardware_uuid}, but its BMC says {said}: it belongs to another machine"
        )
    if not normal(hardware_uuid):
        return "the host's firmware names no UUID of its own, so nobody can tell whether this is its BMC"
    return f"whose BMC it is could not be found out: {said}"


def device_of(new: NewFenceDevice) -> FenceDevice:
    return FenceDevice(
        agent=new.agent,
        address=new.address.strip(),
        port=new.port,
        username=new.username,
        options=new.options,
        timeout_seconds=new.timeout_seconds,
    )


def same_place(one: FenceDevice, other: FenceDevice) -> bool:
    """Whether a secret of the one may be used for the other."""
    return (one.agent, one.address, one.port) == (other.agent, other.address, other.port)


def secrets_for(
    new: NewFenceDevice, device: FenceDevice, old: Sequence[tuple[FenceDevice, Mapping[str, str]]]
) -> Mapping[str, str] | None:
    """Sealed secrets that are kept; None when new ones were given. A secret never follows to another address."""
    if new.secrets is not UNSET:
        return None
    return next((sealed for known, sealed in old if same_place(known, device)), {})


def check_devices(devices: Sequence[FenceDevice]) -> None:
    """Raises Refused(invalid) for none, too many, or two that are one."""
    if not 1 <= len(devices) <= MAX_DEVICES:
        raise invalid(f"power management has 1 to {MAX_DEVICES} devices, not {len(devices)}", rule="devices")
    seen: set[tuple[str, str, int, str]] = set()
    for device in devices:
        plug = device.options.get("plug", device.options.get("systems_uri", ""))
        key = (device.agent, device.address.lower(), device.port, plug)
        if key in seen:
            raise invalid(
                f"two devices are the same {device.agent} at {device.address}"
                + (f", plug {plug}" if plug else "")
                + ": name each way to the machine's power once",
                rule="same_device",
            )
        seen.add(key)


def check_confirmed(name: str, typed: str, what: str) -> None:
    """Raises Refused(invalid) unless the host's name was typed."""
    if typed != name:
        raise invalid(f"{what}: type the host's name, {name}, as `confirm`", rule="confirm", name=name)


def check_quiet(name: str, age: float | None, quiet: float) -> None:
    """Raises Refused(conflict) when its power was switched by hand a moment ago."""
    if age is not None and age < quiet:
        raise conflict(
            f"host {name} was switched {age:.0f} s ago; between two switches {quiet:g} s pass, since a machine that "
            f"starts looks dead. Ask again in {quiet - age:.0f} s",
            rule="quiet_time",
            seconds=round(quiet - age),
        )


def needs_confirmation(status: str) -> bool:
    """Whether switching it off may end VMs."""
    return status not in (HostStatus.MAINTENANCE, HostStatus.INSTALLING)
