"""The oracle's rules about parts of a host that one VM has for itself: physical CPUs, a whole host's shape, devices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from typing import TYPE_CHECKING

from services.scheduler.figures import HostFigures
from services.scheduler.policies import devices as d
from services.scheduler.policies.cpus import FREE, read_cores
from volery.contracts.cpus import CpuCore
from volery.contracts.host_devices import HostDevice
from volery.contracts.scheduling import Need

if TYPE_CHECKING:
    from tests.scheduler.oracle import World

MIB = 1024**2


def amount(memory: float, hugepage_kib: int) -> float:
    return memory / (hugepage_kib * 1024) if hugepage_kib else memory


# Physical CPUs


def shared_limit(world: World, host: HostFigures) -> int:
    """vCPUs that the host may promise: its shared CPUs as often as the over-commit says, and those of VMs with their own."""
    held = world.held.get(host.id, FREE)
    if not held.exclusive:
        return host.vcpus_limit
    return host.vcpus_limit * (host.cpus - len(held.exclusive)) // host.cpus + held.vcpus


def cpus_alone(world: World, need: Need, host: HostFigures) -> int | None:
    """How many CPUs of the host the VM would have alone; None when it can't have what it wants. By counting."""
    held, cores = world.held.get(host.id, FREE), read_cores(host.cores)
    everything = {cpu for core in cores for cpu in core.cpus}
    free = [[cpu for cpu in c.cpus if cpu not in held.exclusive | held.pinned] for c in cores]
    match need.cpu_pinning.policy:
        case "manual":
            wanted = {cpu for pins in need.cpu_pinning.pins for cpu in pins}
            return 0 if wanted <= everything and not wanted & held.exclusive else None
        case "dedicated":
            threads = max(need.threads, 1)
            groups = sum(len(left) // threads for left in free)
            return need.vcpus if groups * threads >= need.vcpus else None
        case "isolate_threads":
            whole = [left for left, core in zip(free, cores, strict=True) if len(left) == len(core.cpus)]
            return len(cores[0].cpus) * need.vcpus if len(whole) >= need.vcpus else None
    return 0


def lacks_cpus(world: World, need: Need, host: HostFigures) -> bool:
    held, policy = world.held.get(host.id, FREE), need.cpu_pinning.policy
    left = host.cpus - len(held.exclusive)
    if policy == "none":
        return bool(held.exclusive) and need.vcpus > left
    if policy == "resize_and_pin":
        return cant_be_resized(world, need, host)
    alone = cpus_alone(world, need, host)
    if policy == "manual" or alone is None:
        return alone is None
    left -= alone
    sharing = host.vcpus_used - held.vcpus
    return left < host.largest_shared or sharing * host.cpus > host.vcpus_limit * left


# VMs that are resized to their hosts


def resized(world: World, need: Need, host: HostFigures) -> tuple[int, dict[int, int]] | None:
    """How many vCPUs it gets of the host, and how many of each cell; None when it can't be resized. By striking out."""
    sockets: dict[int, list[CpuCore]] = {}
    for core in read_cores(host.cores):
        sockets.setdefault(core.socket, []).append(core)
    counts, threads = {len(s) for s in sockets.values()}, {len(c.cpus) for s in sockets.values() for c in s}
    if len(counts) != 1 or counts == {1} or len(threads) != 1:
        return None
    for cores in sockets.values():
        cores.remove(min(cores, key=lambda core: min(core.cpus)))
    left = [core for cores in sockets.values() for core in cores]
    by_cell = {core.cell: 0 for core in left}
    for core in left:
        by_cell[core.cell] += len(core.cpus)
    several = len({core.cell for core in read_cores(host.cores)}) > 1
    return sum(by_cell.values()), by_cell if several else {}


def vcpus(world: World, need: Need, host: HostFigures) -> int:
    """Of the VM on this host."""
    if need.cpu_pinning.policy != "resize_and_pin":
        return need.vcpus
    found = resized(world, need, host)
    return 0 if found is None else found[0]


def resized_shares(need: Need, count: int) -> list[float]:
    """Of its memory, in whole MiB or huge pages, one after the other dealt out to each cell in turn."""
    if need.shape is not None:
        return [amount(node.memory_bytes, need.hugepage_kib) for node in need.shape.numa_nodes]
    unit = need.hugepage_kib * 1024 or MIB
    dealt = [unit * len(range(n, need.memory_bytes // unit, count)) for n in range(count)]
    dealt[0] += need.memory_bytes % unit
    return [amount(share, need.hugepage_kib) for share in dealt]


def cant_be_resized(world: World, need: Need, host: HostFigures) -> bool:
    found, held = resized(world, need, host), world.held.get(host.id, FREE)
    if found is None:
        return True
    firsts: dict[int, CpuCore] = {}
    for core in sorted(read_cores(host.cores), key=lambda core: min(core.cpus)):
        firsts.setdefault(core.socket, core)
    given = {cpu for core in read_cores(host.cores) if core not in firsts.values() for cpu in core.cpus}
    if given & held.exclusive:
        return True
    if need.shape is not None:
        nodes = {node.host_cells[0]: len(node.vcpus) for node in need.shape.numa_nodes}
        sockets, threads = len(firsts), len(next(iter(firsts.values())).cpus)
        return (need.shape.vcpus, nodes, need.shape.sockets, need.shape.threads) != (*found, sockets, threads)
    return any(share <= 0 for share in resized_shares(need, len(found[1]))) if found[1] else False


# Devices


def gives_devices(world: World, need: Need, host: HostFigures) -> bool:
    """Whether any set of IOMMU groups that are wholly free, given away, leaves what a VM asks for: by trying them all."""
    devices, held = world.devices.get(host.id, ((), d.NOTHING))
    divided = {part.device for part in held.parts}
    groups: dict[object, list[HostDevice]] = {}
    for one in devices:
        groups.setdefault(one.iommu_group if one.iommu_group >= 0 else one.name, []).append(one)
    free = [
        group
        for group in groups.values()
        if all(
            not one.in_use
            and one.name not in held.whole | divided
            and (one.kind != "pci" or one.iommu_group >= 0)
            for one in group
        )
    ]
    gone = {
        one.name for group in groups.values() if any(o.name in held.whole for o in group) for one in group
    }
    tries = (
        [one for group, taken in zip(free, choice, strict=True) if taken for one in group]
        for choice in product((False, True), repeat=len(free))
    )
    return any(_suffices(need, given, devices, gone, held) for given in tries)


def _suffices(
    need: Need,
    given: Sequence[HostDevice],
    devices: Sequence[HostDevice],
    gone: Collection[str],
    held: d.Held,
) -> bool:
    named = {ask.device for ask in need.host_devices if ask.device}
    if not named <= {one.name for one in given}:
        return False
    for ask in need.host_devices:
        if ask.model and sum(o.model == ask.model and o.name not in named for o in given) < ask.count:
            return False
        if ask.mdev_type:
            room = 0
            for one in devices:
                made = [part for part in held.parts if part.device == one.name]
                if (
                    one.in_use
                    or one in given
                    or one.name in gone
                    or any(p.mdev_type != ask.mdev_type for p in made)
                ):
                    continue
                most = sum(kind.available + kind.made for kind in one.mdev_types if kind.id == ask.mdev_type)
                room += max(most - sum(part.made for part in made), 0)
            if room < ask.count:
                return False
    return True
