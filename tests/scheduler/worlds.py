"""Random fleets and requests, and the fleet in columns that is made of one."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import msgspec
from hypothesis import strategies as st

from services.scheduler.cells import CellFigures, Taken
from services.scheduler.config import SchedulerConfig
from services.scheduler.figures import HostFigures, Measured, NetworkReach
from services.scheduler.fleet import Fleet
from services.scheduler.model import ClusterPolicy, limits
from services.scheduler.policies.affinity import ClusterRules, Group
from services.scheduler.policies.bound import FREE, Seat, resolve
from services.scheduler.policies.cpus import Held, read_cores
from services.scheduler.policies.devices import Held as DevicesHeld
from services.scheduler.policies.devices import Part
from services.scheduler.policies.outline import divides, outline, shape
from services.scheduler.policies.recipe import Recipe
from services.scheduler.policies.request import Request, request
from services.scheduler.policies.units import BY_KIND, OPTIONAL
from tests.scheduler.oracle import World
from volery.contracts.affinity_group import AffinityRule
from volery.contracts.base import encode
from volery.contracts.cluster import Balance
from volery.contracts.cpus import CpuCore, CpuPinning, PinningPolicy
from volery.contracts.domain import NumaMode, NumaNode
from volery.contracts.host import HostStatus
from volery.contracts.host_devices import AskedDevice, DeviceKind, HostDevice, MdevType
from volery.contracts.resizing import VmShape
from volery.contracts.scheduling import Need, Place, Purpose
from volery.contracts.scheduling_policy import SchedulingPolicy, Selector, UnitKind

MIB = 1024**2
GIB = 1024**3
NOW = datetime(2026, 11, 20, tzinfo=UTC)
CONFIG = SchedulerConfig(overload_seconds=120.0, swap_percent=5.0)
HOSTS = [f"host-{n}" for n in range(6)]
NETWORKS = ["lan", "wan"]
MODELS = ["Nehalem", "Skylake"]
MACHINES = ["q35", "pc"]
OTHERS = ["db", "app", "log"]
"""VMs of affinity groups beside the one that is placed."""


def fleet_of(world: World) -> Fleet:
    fleet = Fleet()
    fleet.clusters[world.policy.id] = world.policy
    if world.given is not None:
        fleet.recipes[world.given.id] = Recipe.of(world.given)
    for host in world.hosts:
        fleet.put(host)
        busy = world.busy_since.get(host.id)
        load, swapped = world.cpu_percent.get(host.id, 0.0), world.swapped.get(host.id, 0)
        fleet.sample(host.id, Measured(load, busy is not None, busy or 0.0, swapped))
        if fresh := world.fresh_vcpus.get(host.id):
            fleet.use(host.id, 0, fresh)
        held = (host.memory_used_bytes, host.vcpus_used, host.guests, host.ha_guests)
        fleet.used([(host.id, *held, host.pages_2m_used, host.pages_1g_used, host.largest_shared)])
        fleet.put_cells(host.id, world.cells.get(host.id, ()))
    for host_id, given in world.held.items():
        fleet.hold(host_id, given)
    for host_id, (devices, has) in world.devices.items():
        fleet.devices.put(host_id, encode(devices).decode() if devices else "", has)
    for network in world.networks:
        fleet.set_network(network)
    return fleet


def asked(world: World, place: Place) -> Request:
    """The question, under the policy that its cluster has."""
    recipe, rules = fleet_of(world).recipe(world.policy), ClusterRules(0, world.groups)
    around = rules.around(place.need.vm_id)
    bound = FREE if around is None else resolve(around, rules, world.seats)
    return request(place, world.policy, CONFIG, bound, recipe=recipe, now=world.now)


def subsets(values: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), unique=True)


@st.composite
def policies(draw: st.DrawFn) -> ClusterPolicy:
    return ClusterPolicy(
        "a",
        "A",
        draw(st.sampled_from(["", *MODELS])),
        draw(st.sampled_from(["", *MACHINES])),
        memory_overcommit_percent=draw(st.just(100) | st.integers(50, 400)),
        cpu_overcommit_ratio=draw(st.sampled_from([1.0, 10.0]) | st.integers(5, 40).map(lambda n: n / 10)),
        balance=draw(st.sampled_from([str(b) for b in Balance])),
        reserve_host_failures=draw(st.integers(0, 1)),
    )


PARAMETER_VALUES = {
    "HighUtilization": [50, 80, 99], "CpuOverCommitDurationMinutes": [0, 1.0, 2.0], "MaximumAllowedSwapUsage": [0, 5, 199],
    "VCpuToPhysicalCpuRatio": [0, 0.5, 2.0], "ScaleDown": [1, 4],
}  # fmt: skip


@st.composite
def given_policies(draw: st.DrawFn) -> SchedulingPolicy:
    """Of any units; what can't be left out is there whatever it says."""
    weights = draw(subsets(list(BY_KIND[UnitKind.WEIGHT])))
    parameters = draw(subsets(list(PARAMETER_VALUES)))
    return SchedulingPolicy(
        id="own",
        revision=draw(st.integers(1, 9)),
        created_at=NOW,
        updated_at=NOW,
        name="own",
        filters=tuple(draw(subsets(list(OPTIONAL)))),
        weights={unit: draw(st.sampled_from([0.1, 1, 2, 99, 1000])) for unit in weights},
        parameters={name: draw(st.sampled_from(PARAMETER_VALUES[name])) for name in parameters},
        selector=draw(st.sampled_from(Selector)),
    )


@st.composite
def affinity(draw: st.DrawFn) -> tuple[tuple[Group, ...], dict[str, Seat]]:
    """Groups of any rules, also such that contradict each other, and where their other VMs are."""
    groups = tuple(
        Group(
            id=f"g{n}",
            name=f"G{n}",
            priority=draw(st.sampled_from([1.0, 2.0, 3.0])),
            vm_rule=draw(st.sampled_from(AffinityRule)),
            vm_enforcing=draw(st.booleans()),
            host_rule=draw(st.sampled_from(AffinityRule)),
            host_enforcing=draw(st.booleans()),
            vms=frozenset(draw(subsets(["vm", *OTHERS]))),
            hosts=frozenset(draw(subsets(HOSTS))),
        )
        for n in range(draw(st.integers(0, 4)))
    )
    seats = {
        vm: Seat(vm, frozenset(draw(subsets(HOSTS))[:places]), draw(st.sampled_from([GIB, 4 * GIB])), 2)
        for vm in OTHERS
        if (places := draw(st.sampled_from([-1, 0, 1, 1, 2]))) >= 0
    }
    return groups, seats


@st.composite
def holdings(draw: st.DrawFn, cpus: int) -> Held:
    """Of a host with so many CPUs."""
    alone = draw(st.frozensets(st.integers(0, cpus - 1)))
    pinned = draw(st.frozensets(st.integers(0, cpus - 1), max_size=2)) - alone
    return Held(draw(st.integers(1, 9)), alone, pinned, draw(st.integers(0, len(alone))))


@st.composite
def built(draw: st.DrawFn, cpus: int) -> str:
    """Cores of one kind in one or two sockets and cells, or nothing known."""
    threads = draw(st.sampled_from([0, 1, 2, 2, 4]))
    sockets, cells = draw(st.sampled_from([(2, 2), (2, 2), (1, 2), (2, 1), (1, 1), (1, 3)]))
    if not cpus or not threads or cpus % threads:
        return ""
    count = cpus // threads
    cores = (
        CpuCore(cell=n * cells // count, socket=n * sockets // count, cpus=tuple(range(n, cpus, count)))
        for n in range(count)
    )
    return encode(tuple(cores)).decode()


@st.composite
def pinnings(draw: st.DrawFn, vcpus: int) -> CpuPinning:
    policy = draw(st.sampled_from([PinningPolicy.NONE, PinningPolicy.NONE, *PinningPolicy]))
    if policy is not PinningPolicy.MANUAL:
        return CpuPinning(policy=policy)
    pins = st.sets(st.integers(0, 8), min_size=1, max_size=3).map(lambda cpus: tuple(sorted(cpus)))
    return CpuPinning(policy=policy, pins=tuple(draw(st.lists(pins, min_size=vcpus, max_size=vcpus))))


@st.composite
def shapes(draw: st.DrawFn, memory: int) -> VmShape | None:
    """What a VM runs with that was resized to some host, or nothing: it starts."""
    found = outline(read_cores(draw(built(draw(st.sampled_from([4, 8, 8]))))))
    if draw(st.booleans()) or found.why_not or not divides(found, memory, 0):
        return None
    return shape(found, memory, 0)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Hosts whose limits are those of their cluster, small enough for a VM not to fit for each of many reasons."""
    policy, given = draw(policies()), draw(st.none() | given_policies())
    groups, seats = draw(st.just(((), {})) | affinity())
    if given is not None:
        policy = dataclasses.replace(policy, policy_id=given.id)
    hosts, held = [], {}
    for host_id in draw(subsets(HOSTS)):
        cpus = draw(st.sampled_from([8, 8]) | st.integers(0, 8))
        memory = draw(st.sampled_from([8 * GIB, 8 * GIB, 16 * GIB]) | st.integers(0, 8 * GIB))
        limit = limits(memory, cpus, policy, CONFIG)
        if cpus and draw(st.booleans()):
            held[host_id] = draw(holdings(cpus))
        given_vcpus = held[host_id].vcpus if host_id in held else 0
        hosts.append(
            HostFigures(
                id=host_id,
                name=host_id.upper(),
                cluster_id=draw(st.sampled_from(["a", "a", "a", "b"])),
                status=draw(st.sampled_from([HostStatus.UP, HostStatus.UP, HostStatus.UP, *HostStatus])),
                cpus=cpus,
                memory_bytes=memory,
                memory_limit_bytes=limit.memory_bytes,
                memory_used_bytes=draw(st.just(0) | st.integers(0, 8 * GIB)),
                vcpus_limit=limit.vcpus,
                vcpus_used=draw(st.just(0) | st.integers(0, 32)) + given_vcpus,
                guests=draw(st.integers(0, 5)),
                ha_guests=draw(st.integers(0, 3)),
                cpu_models=frozenset(draw(subsets(MODELS))),
                machines=frozenset(draw(subsets(MACHINES))),
                pages_2m=draw(st.just(0) | st.integers(0, 4096)),
                pages_2m_used=draw(st.just(0) | st.integers(0, 4096)),
                pages_1g=draw(st.integers(0, 8)),
                pages_1g_used=draw(st.just(0) | st.integers(0, 8)),
                cores=draw(built(cpus)),
                largest_shared=draw(st.just(0) | st.integers(0, 8)),
            )
        )
    return World(
        tuple(hosts),
        policy,
        tuple(NetworkReach(n, n, frozenset(draw(subsets(HOSTS)))) for n in draw(subsets(NETWORKS))),
        {h.id: draw(st.floats(0, 120)) for h in hosts},
        {h.id: draw(st.integers(0, 4)) for h in hosts},
        {
            h.id: draw(st.sampled_from([1.0, 880.0, 881.0, 999.0]))
            for h in hosts
            if draw(st.integers(0, 3)) == 0
        },
        {h.id: draw(st.integers(0, GIB)) for h in hosts if draw(st.integers(0, 4)) == 0},
        given=given,
        groups=groups,
        seats=seats,
        cells={h.id: draw(cells()) for h in hosts},
        held=held,
        devices={h.id: draw(devices()) for h in hosts},
    )


DEVICES = [f"pci_0000_0{n}_00_0" for n in range(5)]
DEVICE_MODELS = ["10de:1eb8", "8086:10ca"]


@st.composite
def devices(draw: st.DrawFn) -> tuple[tuple[HostDevice, ...], DevicesHeld]:
    """None, or up to five; what can be divided is alone in its IOMMU group, as such devices are."""
    found, whole, parts = list[HostDevice](), set[str](), list[Part]()
    for number, name in enumerate(DEVICES[: draw(st.sampled_from([0, 0, 3, 5]))]):
        kinds = tuple(
            MdevType(id=kind, available=draw(st.integers(0, 3)), made=draw(st.integers(0, 2)))
            for kind in draw(st.just([]) | subsets(["vgpu-1", "vgpu-2"]))
        )
        vendor, product = draw(st.sampled_from(DEVICE_MODELS)).split(":")
        found.append(
            HostDevice(
                name=name,
                kind=draw(st.sampled_from([DeviceKind.PCI, DeviceKind.PCI, DeviceKind.USB])),
                vendor_id=vendor,
                product_id=product,
                iommu_group=draw(
                    st.sampled_from([10 + number, -1]) if kinds else st.sampled_from([1, 1, 2, -1])
                ),
                in_use=draw(st.sampled_from(["", "", "", "its disk sda is mounted"])),
                mdev_types=kinds,
            )
        )
        if draw(st.integers(0, 3)) == 0:
            whole.add(name)
        elif kinds and draw(st.booleans()):
            parts.append(Part(name, draw(st.sampled_from(["vgpu-1", "vgpu-2"])), draw(st.integers(1, 3))))
    return tuple(found), DevicesHeld(draw(st.integers(1, 9)), frozenset(whole), tuple(parts))


@st.composite
def device_asks(draw: st.DrawFn) -> tuple[AskedDevice, ...]:
    asks = [
        AskedDevice(device=name)
        for name in draw(st.just([]) | st.lists(st.sampled_from(DEVICES), unique=True, max_size=2))
    ]
    asks += [
        AskedDevice(model=model, count=draw(st.integers(1, 3)))
        for model in draw(st.just([]) | subsets(DEVICE_MODELS))
    ]
    if draw(st.integers(0, 3)) == 0:
        asks.append(
            AskedDevice(mdev_type=draw(st.sampled_from(["vgpu-1", "vgpu-2"])), count=draw(st.integers(1, 4)))
        )
    return tuple(asks)


@st.composite
def cells(draw: st.DrawFn) -> tuple[CellFigures, ...]:
    """None, or some of cells 0 to 2."""
    return tuple(
        CellFigures(
            cell,
            draw(st.sampled_from([0, 4, 8])),
            Taken(
                draw(st.sampled_from([0, 4 * GIB, 8 * GIB])),
                draw(st.sampled_from([0, 4096])),
                draw(st.integers(0, 8)),
            ),
            Taken(
                draw(st.sampled_from([0, GIB, 6 * GIB])),
                draw(st.sampled_from([0, 3000])),
                draw(st.integers(0, 8)),
            ),
        )
        for cell in draw(st.just([]) | st.lists(st.integers(0, 2), unique=True))
    )


@st.composite
def nodes(draw: st.DrawFn, memory: int, vcpus: int) -> tuple[NumaNode, ...]:
    """Two of a VM that has enough for two, pinned or not."""
    if vcpus < 2 or draw(st.booleans()):
        return ()
    first = draw(st.integers(1, vcpus - 1))
    made = []
    for numbers in (range(first), range(first, vcpus)):
        mode = draw(st.sampled_from(NumaMode))
        most = 3 if mode is NumaMode.INTERLEAVE else 1
        pins = draw(st.lists(st.integers(0, 2), unique=True, max_size=most))
        made.append(
            NumaNode(memory_bytes=memory // 2, vcpus=tuple(numbers), host_cells=tuple(pins), mode=mode)
        )
    return tuple(made)


@st.composite
def roomy_worlds(draw: st.DrawFn) -> World:
    """Hosts of one cluster with room for everything, so that weights decide, under an administrator's policy."""
    world = draw(worlds())
    given = dataclasses.replace(world.policy, policy_id="own", balance="none")
    hosts = [
        HostFigures(
            id=host_id, name=host_id.upper(), cluster_id="a", status="up", cpus=8, memory_bytes=64 * GIB,
            memory_limit_bytes=64 * GIB, memory_used_bytes=draw(st.sampled_from([0, GIB, 8 * GIB])), vcpus_limit=80,
            vcpus_used=draw(st.sampled_from([0, 2, 16])), guests=draw(st.integers(0, 3)), ha_guests=draw(st.integers(0, 3)),
            pages_2m=4096, pages_1g=16,
        )
        for host_id in HOSTS[: draw(st.integers(2, 6))]
    ]  # fmt: skip
    loads = {h.id: draw(st.sampled_from([0.0, 20.0, 20.0 + 1e-12, 70.0])) for h in hosts}
    policy = msgspec.structs.replace(
        draw(given_policies()), filters=("cpu",), selector=draw(st.sampled_from(Selector))
    )
    return dataclasses.replace(
        world,
        hosts=tuple(hosts),
        policy=given,
        given=policy,
        cpu_percent=loads,
        fresh_vcpus={},
        busy_since={},
        swapped={},
    )


@st.composite
def places(draw: st.DrawFn) -> Place:
    storage = draw(st.none() | subsets(HOSTS))
    memory = draw(st.sampled_from([16 * MIB, GIB, 4 * GIB]) | st.integers(16 * MIB, 8 * GIB))
    vcpus = draw(st.integers(1, 9))
    pinning = draw(pinnings(vcpus))
    resized = pinning.policy is PinningPolicy.RESIZE_AND_PIN
    need = Need(
        vm_id="vm",
        cluster_id="a",
        memory_bytes=memory,
        vcpus=vcpus,
        numa_nodes=() if resized else draw(nodes(memory, vcpus)),
        cpu_pinning=pinning,
        shape=draw(shapes(memory)) if resized else None,
        threads=draw(st.sampled_from([0, 0, 1, 2])),
        name="web",
        cpu_model=draw(st.sampled_from(["", "host-passthrough", *MODELS])),
        machine=draw(st.sampled_from(["", *MACHINES])),
        network_ids=tuple(draw(st.just([]) | subsets(NETWORKS))),
        host_ids=tuple(draw(st.just([]) | subsets(HOSTS))),
        preferred_host_ids=tuple(draw(subsets(HOSTS))),
        storage_host_ids=None if storage is None else tuple(storage),
        high_availability=draw(st.booleans()),
        hugepage_kib=draw(st.sampled_from([0, 0, 2048, 1048576])),
        host_devices=draw(st.just(()) | st.just(()) | device_asks()),
    )
    return Place(
        need=need,
        epoch=1,
        purpose=draw(st.sampled_from([Purpose.START, Purpose.START, Purpose.MIGRATE, Purpose.RESTART])),
        excluded_host_ids=tuple(draw(st.just([]) | subsets(HOSTS))),
        target_host_id=draw(st.sampled_from(["", "", "", *HOSTS])),
        preferred_host_id=draw(st.sampled_from(["", "", *HOSTS])),
        avoided_host_ids=tuple(draw(st.just([]) | subsets(HOSTS))),
    )
