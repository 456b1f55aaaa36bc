"""What a VM may ask of its host's devices, and what it can't do since it has some. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from volery.contracts.errors import conflict, invalid, unavailable
from volery.contracts.host_devices import AskedDevice, GivenDevice
from volery.contracts.vm import Vm, VmStatus

FIELD = "host_devices"
MOST = 16
"""As many whole devices, or mediated ones, as a VM may ask for in all."""
MOST_KINDS = 8
NAME = re.compile(r"(pci|usb|scsi)(_[0-9a-z]+)+")
MODEL = re.compile(r"[0-9a-f]{4}:[0-9a-f]{4}")
TYPE = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
WHY = {
    "migrate": "which stay where they are, so it can't be moved while it runs: shut it down, and start it on another host "
    "that has such devices",
    "suspend": "whose state can't be saved: shut it down instead",
}
"""What such a VM can't do, since nobody can take out of a device what it keeps for its guest."""


def check(asks: Sequence[AskedDevice]) -> None:
    """Raises Refused(invalid). Whether there is such a host is the scheduler's to say."""
    for ask in asks:
        _check_one(ask)
    kinds = [ask.device or ask.model or ask.mdev_type for ask in asks]
    twice = [kind for kind in dict.fromkeys(kinds) if kinds.count(kind) > 1]
    if twice:
        raise invalid(
            f"{twice[0]} is asked for twice: name it once, with a count where it is a kind", field=FIELD
        )
    if len(asks) > MOST_KINDS or sum(bool(ask.mdev_type) for ask in asks) > 1:
        raise invalid(
            f"a VM asks for at most {MOST_KINDS} kinds of devices, and for one type of mediated devices",
            field=FIELD,
        )
    if (total := sum(ask.count for ask in asks)) > MOST:
        raise invalid(f"a VM has at most {MOST} devices of its host, not {total}", field=FIELD)


def _check_one(ask: AskedDevice) -> None:
    if sum(map(bool, (ask.device, ask.model, ask.mdev_type))) != 1:
        raise invalid("each of host_devices names one of device, model and mdev_type", field=FIELD)
    if ask.device and not NAME.fullmatch(ask.device):
        raise invalid(
            f"{ask.device!r} is no name of a device like pci_0000_65_00_0: `volery host devices` lists them",
            field=FIELD,
        )
    if ask.model and not MODEL.fullmatch(ask.model):
        raise invalid(
            f"{ask.model!r} is no vendor:product like 10de:1eb8, four small hexadecimal digits each",
            field=FIELD,
        )
    if ask.mdev_type and not TYPE.fullmatch(ask.mdev_type):
        raise invalid(f"{ask.mdev_type!r} is no type of mediated devices like nvidia-11", field=FIELD)
    if ask.count < 1 or (ask.device and ask.count != 1):
        raise invalid(
            f"a certain device is there once, and of a kind at least one is asked for; not {ask.count}",
            field=FIELD,
        )


def stays(vm: Vm, action: str) -> str:
    """Why a VM with devices of its host can't do this; "" when it can."""
    if not vm.host_devices or action not in WHY:
        return ""
    return f"VM {vm.name} has devices of its host ({', '.join(ask.text for ask in vm.host_devices)}), {WHY[action]}"


def check_action(vm: Vm, action: str) -> None:
    """Raises Refused(conflict) for what a VM with devices of its host can't do."""
    if why := stays(vm, action):
        raise conflict(why, rule=FIELD, vm_id=vm.id)


def check_edit(vm: Vm, new: Vm) -> None:
    """Raises Refused(conflict)."""
    if new.host_devices != vm.host_devices and vm.status is not VmStatus.DOWN:
        raise conflict(
            f"VM {vm.name} is {vm.status}: shut it down before its host devices are changed",
            rule=FIELD,
            status=vm.status,
        )


def check_given(vm: Vm, given: Sequence[GivenDevice]) -> None:
    """Raises Refused(unavailable) when it was placed by a scheduler that knows nothing of devices."""
    if vm.host_devices and not given:
        raise unavailable(
            f"VM {vm.name} asks for devices of its host, and the scheduler that placed it is of an older release: try again "
            "when all of Volery is upgraded",
            vm_id=vm.id,
        )
