"""What was ordered and taken back, or ordered from a boot that has ended, arrives after all: nothing may come of it.

Everything else is well meanwhile, so whatever people ask for must succeed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from sim import letters
from sim.faults import Scene
from sim.letters import Letters
from sim.machines import HostMachine
from sim.oracle import Wish
from sim.promises import PROMISED_SECONDS, busy_host, managed, on_host
from sim.qemu import Domain
from sim.world import World
from volery.contracts.base import Call, Owner
from volery.contracts.cluster import GetById
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import MIGRATE_DOMAIN, RUN_DOMAIN, STOP_DOMAIN
from volery.contracts.operation import (
    CANCEL_OPERATION,
    ENDED,
    GET_OPERATION,
    CancelOperation,
    GetOperation,
    Operation,
    OperationState,
)
from volery.contracts.vm import (
    GET_VM,
    MIGRATE_VM,
    START_VM,
    STOP_VM,
    DesiredState,
    MigrateVm,
    StartVm,
    StopVm,
)

LATE_SECONDS = 5.0
"""In which something would come of it."""
HEALTHY_AGAIN_SECONDS = 65.0
"""Longer than the oracle waits until a host counts as healthy."""
AGAIN_SECONDS = 3.0


async def succeeds(world: World, what: str, call: Call[Any, Operation], question: Any) -> bool:
    """Nothing is in its way."""
    operation = await world.ended(await world.ask(call, question))
    world.note(f"people: {what} {operation.state}")
    if operation.state is not OperationState.SUCCEEDED:
        why = operation.problem.message if operation.problem else "no reason given"
        world.oracle.broken(f"{what} {operation.state} though nothing is in its way: {why}")
    return operation.state is OperationState.SUCCEEDED


async def stopped(world: World, vm_id: str) -> bool:
    world.oracle.asked(vm_id, 1)
    ask = StopVm(id=vm_id, force=True, timeout_seconds=40)
    done = await succeeds(world, "stop", STOP_VM, ask)
    world.oracle.asked(vm_id, -1)
    if done:
        world.oracle.has_stopped(vm_id)
    return done


async def started(world: World, vm_id: str, host: HostMachine | None = None) -> bool:
    """On this host, or anywhere."""
    world.oracle.asked(vm_id, 1)
    ask = StartVm(id=vm_id, host_id=host.host_id if host else "")
    done = await succeeds(world, "start", START_VM, ask)
    world.oracle.asked(vm_id, -1)
    world.oracle.want(vm_id, Wish.UP if done else Wish.ANY)
    return done


async def cancelled(world: World, operation: Operation) -> Operation:
    await world.ask(CANCEL_OPERATION[Owner.INVENTORY], CancelOperation(id=operation.id))
    ended = await world.ended(operation)
    world.note(f"people: {operation.kind} {ended.state}")
    return ended


def domains_of(world: World, vm_ids: Iterable[str]) -> list[Domain]:
    """That run now."""
    return [domain for vm_id in vm_ids for domain in world.oracle.running.get(vm_id, {}).values()]


async def run_on(world: World, domains: list[Domain], seconds: float, why: str) -> None:
    """Nobody had a reason to end them."""
    for _ in range(int(seconds)):
        await asyncio.sleep(1.0)
        names = [domain.name() for domain in domains if domain.state is not DomainState.RUNNING]
        if names:
            world.oracle.broken(f"{', '.join(names)} should have run on: {why}")
            return


def some_vm(scene: Scene, host: HostMachine) -> str:
    return scene.chance.choice(on_host(scene.world, host))


def another(scene: Scene, host: HostMachine) -> HostMachine:
    return scene.chance.choice([each for each in scene.world.hosts.values() if each is not host])


async def start_overtaken(scene: Scene) -> None:
    """A start is taken back before its host heard of it, and the VM is started elsewhere."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id, there = some_vm(scene, host), another(scene, host)
    if not await stopped(world, vm_id):
        return
    world.oracle.asked(vm_id, 1)
    with letters.held_up(world, letters.orders(RUN_DOMAIN, vm_id)) as late:
        begun = await world.ask(START_VM, StartVm(id=vm_id, host_id=host.host_id))
        await late.came.wait()
        await asyncio.sleep(scene.chance.uniform(0, 3))
        await cancelled(world, begun)
    world.oracle.asked(vm_id, -1)
    if await started(world, vm_id, there):
        await late.deliver()
        await asyncio.sleep(LATE_SECONDS)


async def stop_overtaken(scene: Scene) -> None:
    """A stop is taken back before its host heard of it."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id = some_vm(scene, host)
    with letters.held_up(world, letters.orders(STOP_DOMAIN, vm_id)) as late:
        begun = await world.ask(STOP_VM, StopVm(id=vm_id, force=True, timeout_seconds=40))
        await late.came.wait()
        await asyncio.sleep(scene.chance.uniform(0, 3))
        await cancelled(world, begun)
    if (await world.ask(GET_VM, GetById(id=vm_id))).desired is not DesiredState.UP:
        world.oracle.broken("a stop was cancelled before its host heard of it, and the VM is wanted down")
        return
    await late.deliver()
    await run_on(
        world, domains_of(world, [vm_id]), LATE_SECONDS, "its stop was cancelled before its host heard of it"
    )


async def move_overtaken(scene: Scene) -> None:
    """A migration is taken back before its source heard of it; the source goes on under a later epoch."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id = some_vm(scene, host)
    with letters.held_up(world, letters.orders(MIGRATE_DOMAIN, vm_id)) as late:
        begun = await world.ask(MIGRATE_VM, MigrateVm(id=vm_id, timeout_seconds=60))
        await late.came.wait()
        await asyncio.sleep(scene.chance.uniform(0, 3))
        await cancelled(world, begun)
    await late.deliver()
    await asyncio.sleep(world.guests[vm_id].migration_seconds + LATE_SECONDS)
    if host.name not in world.oracle.running[vm_id]:
        world.oracle.broken(f"a migration was cancelled before {host.name} heard of it, and the VM left it")


async def _dies_while_starting(
    scene: Scene, host: HostMachine, vm_id: str, late: Letters, after: float
) -> None:
    """A host that loses its power with a start of this VM on its way; the VM runs elsewhere when this returns."""
    world, there = scene.world, another(scene, host)
    world.oracle.asked(vm_id, 1)
    begun = await world.ask(START_VM, StartVm(id=vm_id, host_id=host.host_id))
    await late.came.wait()
    await asyncio.sleep(after)
    world.note(f"{host.name}: no power")
    world.trouble(host.name, 1)
    host.lose_power()
    await ended_in_time(world, begun, f"{host.name} died before it said how it ended")
    world.oracle.asked(vm_id, -1)
    await started(world, vm_id, there)


async def ended_in_time(world: World, begun: Operation, why: str) -> None:
    end = world.loop.time() + PROMISED_SECONDS
    while world.loop.time() < end:
        now = await world.ask(GET_OPERATION[Owner.INVENTORY], GetOperation(id=begun.id))
        if now.state in ENDED:
            return
        await asyncio.sleep(1.0)
    world.oracle.broken(f"{begun.kind} should have ended within {PROMISED_SECONDS:.0f} s: {why}")


async def start_of_a_former_boot(scene: Scene) -> None:
    """It arrives when the host has booted again, its clock being where it was when it was sent."""
    world, host = scene.world, busy_host(scene, managed(scene.world))
    if host is None:
        return
    vm_id = some_vm(scene, host)
    if not await stopped(world, vm_id):
        return
    sent_at = host.clock.monotonic()
    with letters.held_up(world, letters.orders(RUN_DOMAIN, vm_id, host.host_id)) as late:
        await _dies_while_starting(scene, host, vm_id, late, 0.0)
    host.power_on()
    await booted(world, host)
    while host.clock.monotonic() < sent_at + 2 * AGAIN_SECONDS and not world.oracle.violations:
        await late.deliver()
        await asyncio.sleep(AGAIN_SECONDS)


async def start_of_a_former_boot_journaled(scene: Scene) -> None:
    """The host had it in its journal; when it boots again its storage is there at once."""
    world, host = scene.world, busy_host(scene, managed(scene.world))
    if host is None:
        return
    vm_id, mounts = some_vm(scene, host), set(host.daemon.mounts)
    if not await stopped(world, vm_id):
        return
    heard = Letters(world, letters.orders(RUN_DOMAIN, vm_id))

    def overhear(subject: str, data: bytes, headers: Any) -> None:
        heard.keep(subject, data, headers)

    world.server.overhears.append(overhear)
    await _dies_while_starting(scene, host, vm_id, heard, scene.chance.uniform(0.01, 0.1))
    world.server.overhears.remove(overhear)
    host.power_on()
    while not host.on:
        await asyncio.sleep(0.01)
    host.daemon.mounts |= mounts
    await booted(world, host)
    await asyncio.sleep(LATE_SECONDS)


async def booted(world: World, host: HostMachine) -> None:
    """Until its agent is heard again."""
    while not host.audible:
        await asyncio.sleep(1.0)
    world.trouble(host.name, -1)
    await asyncio.sleep(AGAIN_SECONDS)


async def fence_overtaken(scene: Scene) -> None:
    """A host stands still until it is to be switched off, and goes on before whoever is to do it hears of it."""
    world, host = scene.world, busy_host(scene, managed(scene.world))
    if host is None:
        return
    world.note(f"{host.name}: frozen")
    world.trouble(host.name, 1)
    host.freeze()
    with letters.held_up(world, letters.powers_off(host.host_id)) as late:
        try:
            async with asyncio.timeout(PROMISED_SECONDS):
                await late.came.wait()
        except TimeoutError:
            world.oracle.broken(f"{host.name} stands still, and nobody switches it off")
        world.note(f"{host.name}: goes on")
        host.thaw()
        world.trouble(host.name, -1)
        await asyncio.sleep(HEALTHY_AGAIN_SECONDS)
    await late.deliver()
    await asyncio.sleep(LATE_SECONDS)
