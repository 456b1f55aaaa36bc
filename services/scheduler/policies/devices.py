"""Devices of hosts: which ones a VM gets on a host, given those that others have. Pure.

An IOMMU group goes to one VM as a whole, with every device in it. A device that mediated devices are made of is given to
nobody whole meanwhile, and makes those of one type at a time, as most drivers demand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import msgspec

from volery.contracts.host_devices import AskedDevice, DeviceKind, GivenDevice, HostDevice

Asks = tuple[AskedDevice, ...]
Unit = tuple[HostDevice, ...]
"""Devices that go to one VM together."""


class Part(NamedTuple):
    """Mediated devices of one type that VMs hold of a device."""

    device: str
    mdev_type: str
    made: int


@dataclass(frozen=True, slots=True)
class Held:
    """What claims hold of one host's devices."""

    uses: int = 0
    """Counts how often some were given or taken back; what is said here is as of then."""
    whole: frozenset[str] = frozenset()
    parts: tuple[Part, ...] = ()
    """In order."""
    holders: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """Device → ids and names of the VMs that have it, or a part of it."""

    def with_more(self, given: Iterable[GivenDevice], vm_id: str, vm_name: str) -> Held:
        """One VM more; if nobody else was given any since, as the tables say now."""
        whole, parts = set(self.whole), {(p.device, p.mdev_type): p.made for p in self.parts}
        holders = dict(self.holders)
        for device in given:
            if device.mdev_type:
                key = (device.name, device.mdev_type)
                parts[key] = parts.get(key, 0) + 1
            else:
                whole.add(device.name)
            others = tuple(each for each in holders.get(device.name, ()) if each[0] != vm_id)
            holders[device.name] = (*others, (vm_id, vm_name))
        counted = tuple(Part(*key, parts[key]) for key in sorted(parts))
        return Held(self.uses + 1, frozenset(whole), counted, holders)


NOTHING = Held()


@dataclass(frozen=True, slots=True, eq=False)
class HostState:
    """A host's devices, and which are held. Kept one of a kind: hosts of a kind have the same."""

    devices: tuple[HostDevice, ...] = ()
    whole: frozenset[str] = frozenset()
    parts: tuple[Part, ...] = ()
    named: Mapping[str, HostDevice] = field(init=False)
    units: Mapping[str, Unit] = field(init=False)
    """Device → all that go with it, itself included."""

    def __post_init__(self) -> None:
        groups: dict[int, Unit] = {}
        for device in self.devices:
            if device.iommu_group >= 0:
                groups[device.iommu_group] = (*groups.get(device.iommu_group, ()), device)
        object.__setattr__(self, "named", {device.name: device for device in self.devices})
        units = {d.name: groups.get(d.iommu_group, (d,)) for d in self.devices}
        object.__setattr__(self, "units", units)

    def parts_of(self, device: str) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.device == device)

    def obstacle(self, device: HostDevice) -> str:
        """Why no VM can be given it whole, as far as itself goes: "" if one can. `held` and `divided` by VMs."""
        if device.in_use:
            return device.in_use
        if device.kind is DeviceKind.PCI and device.iommu_group < 0:
            return "it is in no IOMMU group"
        return "held" if device.name in self.whole else "divided" if self.parts_of(device.name) else ""

    def is_free(self, device: HostDevice) -> bool:
        """Whether it can be given whole, with all that goes with it."""
        return not any(self.obstacle(each) for each in self.units[device.name])

    def room_for(self, device: HostDevice, mdev_type: str) -> int:
        """How many mediated devices of a type could still be made of it."""
        if device.in_use or any(each.name in self.whole for each in self.units[device.name]):
            return 0
        parts = self.parts_of(device.name)
        most = next((kind.most for kind in device.mdev_types if kind.id == mdev_type), 0)
        if any(part.mdev_type != mdev_type for part in parts):
            return 0
        return max(most - sum(part.made for part in parts), 0)


KEPT_TEXTS = 1024
"""What a host says of its devices changes with each VM that gets one, or gives it back."""


@lru_cache(maxsize=KEPT_TEXTS)
def read_devices(text: str) -> tuple[HostDevice, ...]:
    """Devices as the table has them."""
    return msgspec.json.decode(text, type=tuple[HostDevice, ...]) if text else ()


def choose(host: HostState, asks: Asks) -> tuple[GivenDevice, ...] | None:
    """The same for the same question; None when the host hasn't got them."""
    taken: dict[str, HostDevice] = {}
    for name in (ask.device for ask in asks if ask.device):
        device = host.named.get(name)
        if device is None or not host.is_free(device):
            return None
        taken |= {each.name: each for each in host.units[name]}
    spoken_for = {ask.device for ask in asks}
    divided = {ask.mdev_type for ask in asks if ask.mdev_type}
    for ask in asks:
        if ask.model and not _take_model(host, ask, divided, taken, spoken_for):
            return None
    parts = list[GivenDevice]()
    for ask in asks:
        if ask.mdev_type and not _take_parts(host, ask, taken, parts):
            return None
    whole = (GivenDevice(name=d.name, kind=d.kind, address=d.address) for d in taken.values())
    return (*sorted(whole, key=lambda device: device.name), *parts)


def _take_model(
    host: HostState, ask: AskedDevice, divided: set[str], taken: dict[str, HostDevice], spoken_for: set[str]
) -> bool:
    """Those first that come along anyhow, then such as take least with them, and least of what is to be divided."""

    def order(device: HostDevice) -> tuple[bool, int, int, str]:
        lost = sum(host.room_for(device, mdev_type) for mdev_type in divided)
        return device.name not in taken, lost, len(host.units[device.name]), device.name

    suited = [d for d in host.devices if d.model == ask.model and d.name not in spoken_for]
    wanted = sorted((d for d in suited if d.name in taken or host.is_free(d)), key=order)[: ask.count]
    for device in wanted:
        taken |= {each.name: each for each in host.units[device.name]}
    return len(wanted) == ask.count


def _take_parts(
    host: HostState, ask: AskedDevice, taken: Mapping[str, HostDevice], parts: list[GivenDevice]
) -> bool:
    """Of devices that are divided already first, so that others stay whole."""

    def order(device: HostDevice) -> tuple[bool, str]:
        return not host.parts_of(device.name), device.name

    busy = {part.name for part in parts}
    left = ask.count
    for device in sorted((d for d in host.devices if d.mdev_types and d.name not in busy), key=order):
        if any(each.name in taken for each in host.units[device.name]):
            continue
        api = next((kind.api for kind in device.mdev_types if kind.id == ask.mdev_type), "")
        for _ in range(min(left, host.room_for(device, ask.mdev_type))):
            parts.append(
                GivenDevice(
                    name=device.name,
                    kind=DeviceKind.MDEV,
                    mdev_type=ask.mdev_type,
                    api=api,
                    number=len(parts),
                )
            )
            left -= 1
    return not left


# Why not.


def missing(host: HostState, held: Held, asks: Asks) -> Iterator[tuple[str, str]]:
    """For each that can't be had there by itself: what stands against it, and what would change that. What several ask
    for that is there only once is told as one."""
    found = False
    for ask in asks:
        if choose(host, (ask,)) is None:
            found = True
            yield _EXPLAINED[bool(ask.device), bool(ask.model)](host, held, ask)
    if not found and choose(host, asks) is None:
        listed = ", ".join(ask.text for ask in asks)
        yield f"of {listed} it has each, but not all for one VM", "ask for fewer"


def _without_device(host: HostState, held: Held, ask: AskedDevice) -> tuple[str, str]:
    device = host.named.get(ask.device)
    if device is None:
        return f"it has no device {ask.device}", f"put {ask.device} in"
    for each in (device, *host.units[device.name]):
        if obstacle := host.obstacle(each):
            along = (
                "" if each is device else f", which is in IOMMU group {each.iommu_group} with {device.name},"
            )
            return _told(each, obstacle, held, along)
    raise AssertionError("some device of its group stands against it")


def _told(device: HostDevice, obstacle: str, held: Held, along: str) -> tuple[str, str]:
    if obstacle in ("held", "divided"):
        owners = _owners(held, [device])
        how = "is held by" if obstacle == "held" else "is divided among"
        return f"{device.name}{along} {how} {owners}", f"stop {owners}"
    return f"{device.name}{along} is kept by the host: {obstacle}", f"have the host let go of {device.name}"


def _without_model(host: HostState, held: Held, ask: AskedDevice) -> tuple[str, str]:
    suited = [d for d in host.devices if d.model == ask.model]
    if not suited:
        return f"it has no device {ask.model}", f"put a device {ask.model} in"
    free = sum(host.is_free(device) for device in suited)
    return (
        f"{free} of its {len(suited)} devices {ask.model} {'is' if free == 1 else 'are'} free{_why(host, held, suited)}",
        _owned(host, held, suited),
    )


def _without_type(host: HostState, held: Held, ask: AskedDevice) -> tuple[str, str]:
    suited = [d for d in host.devices if any(kind.id == ask.mdev_type for kind in d.mdev_types)]
    if not suited:
        return (
            f"it can make no mediated device {ask.mdev_type}",
            f"use a type that it has instead of {ask.mdev_type}",
        )
    room = sum(host.room_for(device, ask.mdev_type) for device in suited)
    return (
        f"it can make {room} more mediated device{'' if room == 1 else 's'} {ask.mdev_type}{_why(host, held, suited)}",
        _owned(host, held, suited),
    )


_EXPLAINED = {
    (True, False): _without_device,
    (False, True): _without_model,
    (False, False): _without_type,
}
"""By whether a device is named, or a model."""


def _why(host: HostState, held: Held, suited: Sequence[HostDevice]) -> str:
    """Who has the others, and why the host keeps some."""
    units = [each for device in suited for each in host.units[device.name]]
    said = []
    if owners := _owners(held, units):
        said.append(f"held by {owners}")
    obstacles = dict.fromkeys(
        o for each in units if (o := host.obstacle(each)) not in ("", "held", "divided")
    )
    if obstacles:
        said.append(f"kept by the host: {next(iter(obstacles))}")
    return f" ({'; '.join(said)})" if said else ""


def _owned(host: HostState, held: Held, suited: Sequence[HostDevice]) -> str:
    owners = _owners(held, [each for device in suited for each in host.units[device.name]])
    return f"stop {owners}, or ask for fewer" if owners else "ask for fewer"


def _owners(held: Held, devices: Iterable[HostDevice]) -> str:
    found = dict.fromkeys(each for device in devices for each in held.holders.get(device.name, ()))
    return ", ".join(f"VM {name or vm_id}" for vm_id, name in found)
