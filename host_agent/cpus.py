"""Physical CPUs that one guest has alone: all others leave them before it runs, and may use them again when it has ended.

The order that starts or admits such a guest makes room for it first, and fails when it can't. What domains may use is
compared with what they should after each change of who is there, so that nothing depends on what this process remembers.
Domains that Volery did not make are left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping
from contextlib import asynccontextmanager

from host_agent import cell_pins, runningxml
from host_agent.action import Host
from host_agent.cpu_room import CpuSeat
from host_agent.events import EventName, HypervisorEvent
from host_agent.refusals import LibvirtError, is_libvirt
from volery.contracts.cpus import GivenCpus
from volery.contracts.domain import DomainState
from volery.contracts.errors import Kind, Refused, conflict

log = logging.getLogger("volery.agent.cpus")

AGAIN_SECONDS = 5.0
"""After domains could not be moved."""


async def learn(host: Host) -> None:
    """Which CPUs there are and who has some of them alone, from libvirt; before any order."""
    root = runningxml.parsed(await host.hypervisor.capabilities_xml())
    found = root.findall("host/topology/cells/cell/cpus/cpu")
    host.hypervisor.cpus.every = frozenset(int(cpu.get("id", "0")) for cpu in found)
    host.hypervisor.cpus.cells = cell_pins.cells_of(root)
    await settle(host)


async def settle(host: Host) -> None:
    """Every domain that isn't pinned may use the CPUs that nobody has alone, all of those, and no other; vCPUs of a node in
    some cells only those of these cells. Raises Refused when one can't be moved."""
    room = host.hypervisor.cpus
    async with room.turn:
        seats = await host.hypervisor.cpu_seats()
        room.held = {seat.vm_id: seat.exclusive for seat in seats if seat.exclusive}
        for vm_id in room.held:
            room.promised.pop(vm_id, None)
        for seat in seats:
            await _seat(host, seat)


async def arrived(host: Host, vm_id: str) -> None:
    """The same for one domain: who sent it knows nothing of this host's cells."""
    async with host.hypervisor.cpus.turn:
        try:
            xml = await host.hypervisor.domain_xml(vm_id)
        except Refused as problem:
            if not is_libvirt(problem, LibvirtError.NO_DOMAIN):
                raise
            return
        await _seat(host, runningxml.cpu_seat(xml, vm_id))


async def _seat(host: Host, seat: CpuSeat) -> None:
    room = host.hypervisor.cpus
    if not seat.ours or seat.pinned:
        return
    wanted = room.every if room.shared is None else room.shared
    vcpus = {vcpu: cell_pins.near(cells, room.cells, wanted) for vcpu, cells in seat.bound.items()}
    elsewhere = any((seat.vcpus.get(n, seat.allowed) or room.every) != vcpus[n] for n in vcpus)
    if elsewhere or (seat.allowed or room.every) != wanted:
        await _move(host, seat.vm_id, wanted, vcpus)


async def _move(host: Host, vm_id: str, cpus: Collection[int], vcpus: Mapping[int, Collection[int]]) -> None:
    if not cpus:
        raise _none_left(vm_id)
    try:
        await host.hypervisor.pin(vm_id, cpus, vcpus)
    except Refused as problem:
        if not is_libvirt(problem, LibvirtError.NO_DOMAIN):
            raise


def _none_left(vm_id: str) -> Refused:
    return conflict(
        f"VM {vm_id} has no CPUs of its own, and every CPU of this host is, or is to be, another VM's alone: move one of them away",
        vm_id=vm_id,
    )


async def make_room(host: Host, vm_id: str, cpus: GivenCpus | None) -> None:
    """Nobody else uses the CPUs that this VM is to have alone, and nobody who starts from now on will. Raises Refused when
    they can't be had; then it has none of them."""
    room = host.hypervisor.cpus
    wanted = frozenset(cpus.exclusive) if cpus is not None else frozenset[int]()
    if not wanted:
        return
    if room.owner_of(wanted, but=vm_id):
        await _try(host)  # it may have ended just now
    if other := room.owner_of(wanted, but=vm_id):
        raise conflict(
            f"VM {vm_id} is to have CPUs {sorted(wanted)} of this host alone, but VM {other} has some of them: it has to"
            " end first",
            vm_id=other,
        )
    room.promised[vm_id] = wanted
    try:
        if room.beginning:  # they were told before that these CPUs are shared
            await asyncio.wait(set(room.beginning))
        await settle(host)
    except BaseException as problem:  # also when it is cancelled: nobody is promised anything then
        room.promised.pop(vm_id, None)
        if not isinstance(problem, Refused):
            raise
        raise Refused(
            Kind.UNAVAILABLE,
            f"CPUs {sorted(wanted)} of this host can't be cleared for VM {vm_id}: {problem.message}",
            **problem.details,
        ) from problem


@asynccontextmanager
async def placed(host: Host, vm_id: str, cpus: GivenCpus | None) -> AsyncIterator[frozenset[int] | None]:
    """While a domain is made: it has its CPUs, or is told which are shared."""
    room = host.hypervisor.cpus
    if cpus is not None and cpus.exclusive:
        await make_room(host, vm_id, cpus)
        try:
            yield None
            async with room.turn:  # who looks now and has not seen it yet still finds the promise
                room.held[vm_id] = frozenset(cpus.exclusive)
                room.promised.pop(vm_id, None)
        finally:
            if vm_id not in room.held:
                room.promised.pop(vm_id, None)
                await _try(host)
        return
    shared, made = room.shared, asyncio.get_running_loop().create_future()
    if cpus is None and shared is not None and not shared:
        raise _none_left(vm_id)
    room.beginning.add(made)
    try:
        yield shared
    finally:
        room.beginning.discard(made)
        made.set_result(None)
    if cpus is None and room.shared != shared:
        await _try(host)


async def let_go(host: Host, vm_id: str) -> None:
    """A VM that was to come won't."""
    if host.hypervisor.cpus.promised.pop(vm_id, None):
        await _try(host)


async def watch(host: Host) -> None:
    """For as long as the agent lives: whoever ended gives its CPUs back, and whoever arrived leaves those of others."""
    room, again = host.hypervisor.cpus, False
    with host.hypervisor.events() as events:
        while True:
            try:
                async with asyncio.timeout(AGAIN_SECONDS if again else None):
                    event = await events.get()
            except TimeoutError:
                again = not await _try(host)
                continue
            if room.given and _matters(event):
                again = not await _try(host)
            elif room.cells and event.state is DomainState.RUNNING:
                again = not await _done(arrived(host, event.vm_id)) or again


def _matters(event: HypervisorEvent) -> bool:
    return event.name in (EventName.LIFECYCLE, EventName.CONNECTED, EventName.RESPONSIVE)


async def _try(host: Host) -> bool:
    return await _done(settle(host))


async def _done(moving: Awaitable[None]) -> bool:
    try:
        await moving
    except Refused as problem:
        log.warning("not every VM is on the CPUs that it may use: %s", problem.message)
        return False
    return True
