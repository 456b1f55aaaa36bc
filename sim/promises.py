"""One trouble at a time, and what is promised for it: here slowness counts as a failure, not only what ends wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from sim import people
from sim.faults import PAUSE_SECONDS, Scene, brief_pauses
from sim.letters import held_up
from sim.machines import HostMachine
from sim.oracle import Wish
from sim.world import World
from volery.contracts.base import Owner
from volery.contracts.errors import Refused
from volery.contracts.operation import LIST_OPERATIONS, Operation
from volery.contracts.vm import STOP_VM, StopVm

PROMISED_SECONDS = 480.0
"""From a host's end until its VMs run elsewhere, with all that may come before: ha's hold after it started, the longest
silence before a fence, the fence, two readings of a BMC, and the start."""
CRASH_SECONDS = 120.0
"""From a VM's crash until it runs again: the back-off is 10 s after the second, 20 s after the third."""
NOTICED_SECONDS = 40.0
"""Nobody is asked to look at a host before it is known to be silent."""
LOSSES = 3
ANSWERS = "_INBOX.gateway."
"""Where whoever asks hears them."""


def on_host(world: World, host: HostMachine) -> list[str]:
    """VMs that run there and are to run."""
    return [
        vm_id
        for vm_id, places in world.oracle.running.items()
        if host.name in places and world.oracle.wishes[vm_id] is Wish.UP
    ]


def busy_host(scene: Scene, hosts: Iterable[HostMachine]) -> HostMachine | None:
    found = [host for host in hosts if on_host(scene.world, host)]
    return scene.chance.choice(found) if found else None


def managed(world: World) -> list[HostMachine]:
    return [host for host in world.hosts.values() if host.name in world.managed]


async def run_again(world: World, vm_ids: list[str], seconds: float, why: str) -> None:
    end = world.loop.time() + seconds
    missing = vm_ids
    while missing and world.loop.time() < end:
        await asyncio.sleep(1.0)
        missing = [vm_id for vm_id in vm_ids if not world.oracle.running.get(vm_id)]
    names = sorted(name for name, vm_id in world.vms.items() if vm_id in missing)
    if names:
        world.oracle.broken(f"{', '.join(names)} should run again within {seconds:.0f} s: {why}")


async def dies_for_good(scene: Scene) -> None:
    """No power until its VMs run elsewhere: its BMC proves it."""
    world, host = scene.world, busy_host(scene, managed(scene.world))
    if host is None:
        return
    vm_ids = on_host(world, host)
    world.note(f"{host.name}: no power")
    world.trouble(host.name, 1)
    host.lose_power()
    await run_again(world, vm_ids, PROMISED_SECONDS, f"the BMC of {host.name} says off")
    world.trouble(host.name, -1)
    host.power_on()


async def hangs_for_good(scene: Scene) -> None:
    """It stands still until it is fenced; nobody but ha switches it on again."""
    world, host = scene.world, busy_host(scene, managed(scene.world))
    if host is None:
        return
    vm_ids, boots = on_host(world, host), host.boots
    world.note(f"{host.name}: frozen")
    world.trouble(host.name, 1)
    host.freeze()
    await run_again(world, vm_ids, PROMISED_SECONDS, f"{host.name} is frozen and can be fenced")
    await asyncio.sleep(2 * host.boot_seconds)
    if host.frozen:
        host.thaw()
    elif host.boots == boots:
        world.oracle.broken(f"{host.name} was fenced and stays off")
    world.trouble(host.name, -1)
    host.power_on()


async def is_looked_at(scene: Scene) -> None:
    """Neither power nor BMC: its VMs run elsewhere once a person has said so."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_ids, bmc = on_host(world, host), world.bmcs[host.name]
    world.note(f"{host.name}: no power, and nobody can ask its BMC")
    world.trouble(host.name, 1)
    bmc.reachable = False
    host.lose_power()
    await asyncio.sleep(NOTICED_SECONDS)
    await people.confirmed(world, host)
    await run_again(world, vm_ids, PROMISED_SECONDS, f"somebody said that {host.name} is off")
    bmc.reachable = True
    world.trouble(host.name, -1)
    host.power_on()


async def boots_again(scene: Scene) -> None:
    """Nobody can ask its BMC: that it beats under another boot is the proof."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_ids, bmc = on_host(world, host), world.bmcs[host.name]
    bmc.reachable = False
    host.lose_power()
    await scene.last(host.name, "no power, and nobody can ask its BMC", scene.seconds(1, 30))
    host.power_on()
    await run_again(world, vm_ids, PROMISED_SECONDS, f"{host.name} has booted again")
    bmc.reachable = True


async def is_silent(scene: Scene) -> None:
    """Cut off together with its BMC: it lives, and nobody may believe anything else."""
    world, host = scene.world, scene.host()
    bmc = world.bmcs[host.name]
    bmc.reachable = False
    world.server.cut(host.link)
    await scene.last(host.name, "network cut, that of its BMC too", scene.seconds(90, 180))
    world.server.mend(host.link)
    bmc.reachable = True


async def clock_set_back(scene: Scene) -> None:
    """A VM crashes twice, the control plane's clocks go back by an hour, and it crashes again."""
    world = scene.world
    host = busy_host(scene, world.hosts.values())
    if host is None:
        return
    vm_id = on_host(world, host)[0]
    await _crashed(world, vm_id)
    await _crashed(world, vm_id)
    for machine in world.control:
        machine.clock.skew_seconds -= 3600.0
    world.note("the clocks of the control plane are set back by an hour")
    await _crashed(world, vm_id)
    for machine in world.control:
        machine.clock.skew_seconds += 3600.0


async def _crashed(world: World, vm_id: str) -> None:
    places = world.oracle.running.get(vm_id, {})
    for name, domain in list(places.items()):
        world.note(f"{name}: {domain.name()} crashes")
        world.oracle.ended_by_itself(vm_id, asked=False)
        world.hosts[name].daemon.crash(domain, panic=False)
    await run_again(world, [vm_id], CRASH_SECONDS, "it crashed")


async def answers_are_lost(scene: Scene) -> None:
    """Inventory's answer to a stop gets lost, and inventory dies: asked again, it must give the answer that got lost."""
    world = scene.world
    for _ in range(LOSSES):
        asked = asyncio.Event()

        def overhear(subject: str, data: bytes, headers: Any, asked: asyncio.Event = asked) -> None:
            if subject == STOP_VM.subject:
                asked.set()

        async def strike(asked: asyncio.Event = asked) -> None:
            with held_up(world, lambda subject, data: asked.is_set() and subject.startswith(ANSWERS)) as lost:
                await lost.came.wait()
                world.replicas["inventory"].kill(1.0)
            await scene.last("", "an answer of inventory's is lost, and it is killed", 1.0)

        world.server.overhears.append(overhear)
        await asyncio.gather(strike(), _stopped_once(scene))
        world.server.overhears.remove(overhear)


async def _stopped_once(scene: Scene) -> None:
    """What was begun is never refused to whoever asked for it, and what was asked for once is begun once."""
    world = scene.world
    name, vm_id = scene.chance.choice(list(world.vms.items()))
    before = await _stops(world, vm_id)
    world.oracle.asked(vm_id, 1)
    refusal = ""
    try:
        ended = await world.ended(await world.ask(STOP_VM, StopVm(id=vm_id, force=True, timeout_seconds=40)))
    except Refused as refused:
        refusal = refused.message
    else:
        world.note(f"people: stop {name} {ended.state}")
    world.oracle.asked(vm_id, -1)
    begun = len(await _stops(world, vm_id) - before)
    if begun > 1:
        world.oracle.broken(f"the stop of {name} was asked for once and begun {begun} times")
    if begun and refusal:
        world.oracle.broken(f"the stop of {name} was begun, and refused to whoever asked: {refusal}")
    if not refusal:
        world.oracle.has_stopped(vm_id)


async def _stops(world: World, vm_id: str) -> set[str]:
    found = await world.listed(LIST_OPERATIONS[Owner.INVENTORY], Operation)
    return {each.id for each in found if (each.object_id, each.kind) == (vm_id, "vm.stop")}


async def stands_still_for_a_moment(scene: Scene) -> None:
    """As `paused_again_and_again`, for one host and a few times, each near the longest that must pass."""
    await brief_pauses(scene, scene.host(), 4, (PAUSE_SECONDS / 2, PAUSE_SECONDS))
