"""What people ask for and do meanwhile: start, stop, migrate, maintenance, a look at a dead host. What they wish is told to the oracle."""

from __future__ import annotations

import asyncio
from typing import Any

from sim.faults import Scene
from sim.machines import HostMachine
from sim.oracle import Wish
from sim.world import World
from volery.contracts.base import Call
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import ACTIVATE_HOST, MAINTAIN_HOST, ActivateHost, HostStatus, MaintainHost
from volery.contracts.operation import Operation, OperationState
from volery.contracts.power import CONFIRM_HOST_REBOOTED, ConfirmHostRebooted
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

CONFIRMATIONS, AGAIN_SECONDS = 3, 10.0
"""So often does a person try whom ha tells to confirm again."""


async def _asked(world: World, what: str, call: Call[Any, Operation], question: Any) -> Operation | None:
    """The ended operation, or None when it was refused."""
    try:
        begun = await world.ask(call, question)
    except Refused as refused:
        world.note(f"people: {what} was refused: {refused.message[:100]}")
        return None
    world.note(f"people: {what}")
    try:
        operation = await world.ended(begun)
    except Refused as refused:
        if refused.kind is not Kind.NOT_FOUND or not world.restores:
            raise
        world.note(f"people: {what} is forgotten, since PostgreSQL was restored")
        return None
    world.note(f"people: {what} {operation.state}")
    world.reached.add(f"{operation.kind} {operation.state}")
    return operation


def _vm(scene: Scene) -> tuple[str, str]:
    return scene.chance.choice(list(scene.world.vms.items()))


async def stop(scene: Scene) -> None:
    name, vm_id = _vm(scene)
    ask = StopVm(id=vm_id, force=scene.chance.random() < 0.5, timeout_seconds=40)
    operation = await _about(scene.world, vm_id, f"stop {name}", STOP_VM, ask)
    if operation is None:
        return
    if operation.state is OperationState.SUCCEEDED:
        scene.world.oracle.has_stopped(vm_id)
    else:
        scene.world.oracle.want(vm_id, await _promised(scene.world, vm_id, ask.force))


async def _promised(world: World, vm_id: str, force: bool) -> Wish:
    """What became of a stop that failed: a VM that is shown as wanted down must come to be it, unless it is asked in vain."""
    vm = await world.ask(GET_VM, GetById(id=vm_id))
    listens = force or world.guests[vm_id].shutdown_seconds is not None
    return Wish.DOWN if listens and vm.desired is DesiredState.DOWN else Wish.ANY


async def restart(scene: Scene) -> None:
    """Down and up again, at once: whatever the first left undone meets the second."""
    world, (name, vm_id) = scene.world, _vm(scene)
    ask = StopVm(id=vm_id, force=True, timeout_seconds=40)
    await _about(world, vm_id, f"stop {name}", STOP_VM, ask)
    operation = await _about(world, vm_id, f"start {name} again", START_VM, StartVm(id=vm_id))
    runs = operation is not None and operation.state is OperationState.SUCCEEDED
    world.oracle.want(vm_id, Wish.UP if runs and world.oracle.is_up(vm_id) else Wish.ANY)


async def start(scene: Scene) -> None:
    world = scene.world
    stopped = [n for n, vm_id in world.vms.items() if world.oracle.wishes[vm_id] is not Wish.UP]
    if not stopped:
        return
    await start_one(world, scene.chance.choice(stopped))


async def start_one(world: World, name: str) -> None:
    vm_id = world.vms[name]
    operation = await _about(world, vm_id, f"start {name}", START_VM, StartVm(id=vm_id))
    if operation is not None:
        runs = operation.state is OperationState.SUCCEEDED and world.oracle.is_up(vm_id)
        world.oracle.want(vm_id, Wish.UP if runs else Wish.ANY)


async def _about(
    world: World, vm_id: str, what: str, call: Call[Any, Operation], question: Any
) -> Operation | None:
    world.oracle.asked(vm_id, 1)
    try:
        return await _asked(world, what, call, question)
    finally:
        world.oracle.asked(vm_id, -1)


async def migrate(scene: Scene) -> None:
    world = scene.world
    running = [each for each in world.vms.items() if world.oracle.running.get(each[1])]
    name, vm_id = scene.chance.choice(running) if running else _vm(scene)
    ask = MigrateVm(id=vm_id, timeout_seconds=60)
    await _asked(world, f"migrate {name}", MIGRATE_VM, ask)


async def maintain(scene: Scene) -> None:
    world, host = scene.world, scene.host()
    what = f"maintain {host.name}"
    await _asked(world, what, MAINTAIN_HOST, MaintainHost(id=host.host_id))
    await activate_all(world)


async def activate_all(world: World) -> None:
    """No host stays in maintenance."""
    for host in world.hosts.values():
        if (await world.host(host)).status is HostStatus.MAINTENANCE:
            ask = ActivateHost(id=host.host_id)
            await _asked(world, f"activate {host.name}", ACTIVATE_HOST, ask)


async def confirm(scene: Scene) -> None:
    """A host loses its power and its BMC with it: somebody goes and looks, says so, and plugs it in again later."""
    world, host = scene.world, scene.host()
    bmc = world.bmcs[host.name]
    if not host.on or host.frozen or not bmc.honest:
        return
    host.lose_power()
    bmc.reachable = False
    world.note(f"{host.name}: no power, and nobody can ask its BMC")
    world.trouble(host.name, 1)
    await asyncio.sleep(scene.seconds(5, 90))
    if not host.on:
        await confirmed(world, host)
        await asyncio.sleep(scene.seconds(1, 90))
    world.trouble(host.name, -1)
    bmc.reachable = True
    host.power_on()


async def confirmed(world: World, host: HostMachine) -> None:
    """Again while ha can't tell yet whether the host lives, as a person does who is told so."""
    ask = ConfirmHostRebooted(id=host.host_id, confirm=host.name, reason="somebody looked")
    for _ in range(CONFIRMATIONS):
        try:
            await world.ask(CONFIRM_HOST_REBOOTED, ask)
        except Refused as refused:
            world.note(f"people: {host.name} is off, but that was refused: {refused.message[:100]}")
            if refused.details.get("rule") != "listening":
                return
        else:
            world.note(f"people: {host.name} is off")
            return
        await asyncio.sleep(AGAIN_SECONDS)
