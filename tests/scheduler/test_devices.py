"""Devices of hosts, without I/O: which ones a VM gets, held against trying all; and what is said when it gets none."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from msgspec.structs import replace

from services.scheduler.figures import HostFigures
from services.scheduler.fleet_devices import FleetDevices
from services.scheduler.model import ClusterPolicy
from services.scheduler.policies.device_levers import fewer, fitting
from services.scheduler.policies.devices import (
    KEPT_TEXTS,
    NOTHING,
    Held,
    HostState,
    Part,
    choose,
    missing,
    read_devices,
)
from tests.scheduler import oracle
from tests.scheduler.oracle import World
from tests.scheduler.worlds import asked, device_asks, devices, fleet_of, places, worlds
from volery.contracts.base import encode
from volery.contracts.host_devices import AskedDevice, DeviceKind, GivenDevice, HostDevice, MdevType
from volery.contracts.scheduling import Need, Place


def device(slot: int, *, group: int = -2, model: str = "10de:1eb8", **fields: object) -> HostDevice:
    """Alone in a group of its own, unless one is named; -1 is none."""
    vendor, product = model.split(":")
    made = HostDevice(
        name=f"pci_0000_0{slot}_00_0",
        kind=DeviceKind.PCI,
        address=f"0000:0{slot}:00.0",
        vendor_id=vendor,
        product_id=product,
        iommu_group=100 + slot if group == -2 else group,
    )
    return replace(made, **fields)


def names(given_: tuple[GivenDevice, ...] | None) -> list[str]:
    assert given_ is not None
    return [one.name for one in given_]


def model(count: int = 1, which: str = "10de:1eb8") -> AskedDevice:
    return AskedDevice(model=which, count=count)


HOST = HostFigures("h", "H", "a", "up", 1, 1, 1, 0, 1, 0)
VGPU = (MdevType(id="vgpu-1", api="vfio-pci", available=3, made=1), MdevType(id="vgpu-2", available=1))


@settings(max_examples=1500, deadline=None)
@given(devices(), device_asks())
def test_a_vm_gets_what_it_asks_for_exactly_where_trying_all_finds_a_way(
    has: tuple[tuple[HostDevice, ...], Held], asks: tuple[AskedDevice, ...]
) -> None:
    listed, held = has
    host = HostState(listed, held.whole, held.parts)
    found = choose(host, asks)
    world = World((HOST,), ClusterPolicy("a"), devices={HOST.id: has})
    need = Need(vm_id="vm", cluster_id="a", memory_bytes=1, vcpus=1, host_devices=asks)
    assert (found is not None) is oracle.gives_devices(world, need, HOST)
    if found is None:
        assert not asks or list(missing(host, held, asks))
        return
    whole = [one for one in found if not one.mdev_type]
    taken = {one.name for one in whole}
    assert len(taken) == len(whole)
    for one in whole:  # with its whole group, all of it free
        mates = {d.name for d in host.units[one.name]}
        assert mates <= taken
        assert not mates & held.whole
        assert not any(host.named[name].in_use for name in mates)
        assert not any(part.device in mates for part in held.parts)
    for ask in asks:
        if ask.device:
            assert ask.device in taken
        if ask.model:
            of_it = [d for d in listed if d.name in taken and d.model == ask.model]
            assert len(of_it) - sum(a.device == d.name for a in asks for d in of_it) >= ask.count
    made = Counter((one.name, one.mdev_type) for one in found if one.mdev_type)
    assert sum(made.values()) == sum(ask.count for ask in asks if ask.mdev_type)
    assert sorted(one.number for one in found if one.mdev_type) == list(range(sum(made.values())))
    assert not taken & {name for name, _ in made}
    for (name, kind), count in made.items():
        assert count <= host.room_for(host.named[name], kind)
    after = held.with_more(found, "vm", "web")
    again = choose(HostState(listed, after.whole, after.parts), asks)
    assert not taken & set(names(again) if again else [])


@settings(max_examples=100, deadline=None)
@given(worlds(), places())
def test_in_a_fleet_hosts_of_a_kind_are_looked_at_once_and_found_all(world: World, place: Place) -> None:
    """Twice as many hosts, each with a twin."""
    fleet = fleet_of(world)
    for host_id, (listed, held) in world.devices.items():
        fleet.devices.put(f"{host_id}-twin", encode(listed).decode() if listed else "", held)
    having = set(fleet.devices.having(place.need.host_devices)) if place.need.host_devices else set()
    assert {f"{host}-twin" for host in having if not host.endswith("-twin")} == {
        host for host in having if host.endswith("-twin")
    }
    for host in world.hosts:
        if place.need.host_devices:
            assert (host.id in having) is oracle.gives_devices(world, place.need, host)
    assert asked(world, place).need.host_devices == place.need.host_devices


@settings(max_examples=200, deadline=None)
@given(devices(), device_asks())
def test_what_a_host_could_give_of_it_is_the_most_that_trying_all_finds(
    has: tuple[tuple[HostDevice, ...], Held], asks: tuple[AskedDevice, ...]
) -> None:
    listed, held = has
    host = HostState(listed, held.whole, held.parts)
    tried = next(some for some in fewer(asks, [ask.count for ask in asks]) if choose(host, some) is not None)
    found = fitting(host, asks)
    assert choose(host, found) is not None
    assert sum(ask.count for ask in found) == sum(ask.count for ask in tried)


def test_many_kinds_that_a_host_lacks_are_not_tried_in_all_mixtures() -> None:
    """The scheduler does nothing else meanwhile: all mixtures of these are 6,561 questions, a seventh of a second, for each
    kind of host."""
    asks = tuple(model(2, f"10de:100{number}") for number in range(8))
    state = Counting(tuple(device(slot, model="10de:1000" if slot < 2 else "10de:2222") for slot in range(9)))
    assert fitting(state, asks) == (model(2, "10de:1000"),)
    assert state.looks < 200


class Counting(HostState):
    """How often it is asked which devices go together."""

    __slots__ = ("looks",)

    def __init__(self, listed: tuple[HostDevice, ...]) -> None:
        super().__init__(listed)
        object.__setattr__(self, "looks", 0)

    def is_free(self, one: HostDevice) -> bool:
        object.__setattr__(self, "looks", self.looks + 1)
        return super().is_free(one)


def test_what_hosts_said_once_is_not_kept_for_ever() -> None:
    for number in range(KEPT_TEXTS + 10):
        read_devices(encode((device(1, driver=str(number)),)).decode())
    assert read_devices.cache_info().currsize == KEPT_TEXTS


def test_a_group_goes_as_a_whole_or_not_at_all() -> None:
    gpu, sound = device(1, group=7), device(2, group=7, model="10de:10f8")
    host = HostState((gpu, sound, device(3, group=8)))
    assert names(choose(host, (AskedDevice(device=gpu.name),))) == [gpu.name, sound.name]
    assert names(choose(host, (model(which="10de:10f8"),))) == [gpu.name, sound.name]
    held = HostState((gpu, sound), frozenset({sound.name}))
    assert choose(held, (AskedDevice(device=gpu.name),)) is None
    kept = HostState((gpu, replace(sound, in_use="its disk sda is mounted")))
    assert choose(kept, (AskedDevice(device=gpu.name),)) is None


def test_of_a_kind_those_are_taken_that_cost_least() -> None:
    lone, paired = device(3), (device(1, group=7), device(2, group=7, model="1b73:1100"))
    host = HostState((*paired, lone))
    assert names(choose(host, (model(),))) == [lone.name]
    both = names(choose(host, (model(which="1b73:1100"), model())))
    assert both == [d.name for d in paired], "what comes along counts"
    divisible = HostState((device(1, mdev_types=VGPU), device(2)))
    assert names(choose(divisible, (model(), AskedDevice(mdev_type="vgpu-1", count=4)))) == [
        "pci_0000_02_00_0", *["pci_0000_01_00_0"] * 4,
    ]  # fmt: skip


def test_mediated_devices_are_counted_and_keep_the_whole_device_from_others() -> None:
    gpu = device(1, mdev_types=VGPU)
    asks = (AskedDevice(mdev_type="vgpu-1", count=3),)
    given_ = choose(HostState((gpu,)), asks)
    assert given_ is not None
    assert [(one.kind, one.api, one.number) for one in given_] == [
        (DeviceKind.MDEV, "vfio-pci", n) for n in range(3)
    ]
    held = NOTHING.with_more(given_, "vm-1", "web")
    now = HostState((gpu,), held.whole, held.parts)
    assert held.parts == (Part(gpu.name, "vgpu-1", 3),)
    assert choose(now, (AskedDevice(mdev_type="vgpu-1"),)) is not None, "four are made in all"
    assert choose(now, (AskedDevice(mdev_type="vgpu-1", count=2),)) is None
    assert choose(now, (AskedDevice(mdev_type="vgpu-2"),)) is None, "one type at a time"
    assert choose(now, (model(),)) is None


def test_what_is_in_no_group_is_not_given_whole_unless_it_needs_none() -> None:
    host = HostState((device(1, group=-1), device(2, group=-1, kind=DeviceKind.USB)))
    assert choose(host, (AskedDevice(device="pci_0000_01_00_0"),)) is None
    assert names(choose(host, (model(),))) == ["pci_0000_02_00_0"]


def test_each_refusal_names_what_is_missing_who_has_it_and_why_the_host_keeps_it() -> None:
    gpu, sound = device(1, group=7), device(2, group=7, model="10de:10f8")
    disk, divisible = (
        device(3, in_use="its disk sda is mounted"),
        device(4, mdev_types=VGPU, model="10de:2230"),
    )
    listed = (gpu, sound, disk, divisible)
    held = NOTHING.with_more([GivenDevice(name=sound.name, kind=DeviceKind.PCI)], "vm-1", "web")
    parts = (
        GivenDevice(name=divisible.name, kind=DeviceKind.MDEV, mdev_type="vgpu-1", number=n) for n in range(3)
    )
    held = held.with_more(parts, "vm-2", "db")
    host = HostState(listed, held.whole, held.parts)

    def said(*asks: AskedDevice) -> list[tuple[str, str]]:
        return list(missing(host, held, asks))

    assert said(AskedDevice(device="pci_0000_09_00_0")) == [
        ("it has no device pci_0000_09_00_0", "put pci_0000_09_00_0 in")
    ]
    assert said(AskedDevice(device=gpu.name)) == [
        (
            "pci_0000_02_00_0, which is in IOMMU group 7 with pci_0000_01_00_0, is held by VM web",
            "stop VM web",
        )
    ]
    assert said(AskedDevice(device=disk.name)) == [
        (
            "pci_0000_03_00_0 is kept by the host: its disk sda is mounted",
            "have the host let go of pci_0000_03_00_0",
        )
    ]
    assert said(model(2), AskedDevice(mdev_type="vgpu-1", count=2)) == [
        (
            "0 of its 2 devices 10de:1eb8 are free (held by VM web; kept by the host: its disk sda is mounted)",
            "stop VM web, or ask for fewer",
        ),
        ("it can make 1 more mediated device vgpu-1 (held by VM db)", "stop VM db, or ask for fewer"),
    ]
    assert said(model(which="1234:5678")) == [("it has no device 1234:5678", "put a device 1234:5678 in")]
    assert said(AskedDevice(mdev_type="vgpu-9")) == [
        ("it can make no mediated device vgpu-9", "use a type that it has instead of vgpu-9")
    ]
    whole = AskedDevice(device=divisible.name)
    assert said(whole) == [(f"{divisible.name} is divided among VM db", "stop VM db")]


def test_a_host_whose_devices_are_gone_is_forgotten_and_another_of_its_kind_is_not() -> None:
    fleet, text = FleetDevices(), encode((device(1),)).decode()
    for host_id in ("a", "b"):
        fleet.put(host_id, text, NOTHING)
    ask = (model(),)
    assert set(fleet.having(ask)) == {"a", "b"}
    before = fleet.seat("a", ask)
    assert set(fleet.having(ask)) == {"b"}
    fleet.hold("a", before)
    assert set(fleet.having(ask)) == {"a", "b"}
    fleet.drop("a")
    assert set(fleet.having(ask)) == {"b"}
    assert set(fleet.part(["b", "c"]).having(ask)) == {"b"}
    fleet.put("b", "", NOTHING)
    assert not list(fleet.having(ask))
    assert not list(fleet.kinds())
