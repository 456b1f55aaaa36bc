"""What looks like a death and is none, and deaths that come too fast for anybody but a person to believe them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sim import people
from sim.faults import PAUSE_SECONDS, Scene
from sim.machines import HostMachine
from sim.overtaken import stopped
from sim.plane import Replica
from sim.promises import NOTICED_SECONDS, PROMISED_SECONDS, managed, on_host
from sim.world import World
from volery.contracts.fencing import PowerAction
from volery.contracts.host import HostStatus

RESETS = 3
LONGEST_CUT_SECONDS = 25.0
"""Shorter than the least silence before a fence."""
HEARD_SECONDS = (3.0, 6.0)
LOOK_SECONDS = 6.0
"""In which a BMC is asked again, and says on."""
FORWARD_SECONDS = (60.0, 600.0, 3600.0)
FOUND_SECONDS = 60.0
"""In which ha has found its error."""
MOST_CUT_SECONDS = 200.0
"""Longer than anybody waits before a fence."""
DEAF_SECONDS = (70.0, 100.0)
"""So long nobody is heard: longer than anybody waits before a fence."""
SECOND_SECONDS = 420.0
"""Longer than the hold after ha's leader changed, the silence and the fence; within the brake's window with the first."""


async def bmc_is_reset(scene: Scene) -> None:
    """A host is cut off for a moment, and its BMC, in the middle of a reset, says off once; then both are well. Again and
    again."""
    world, hosts = scene.world, managed(scene.world)
    if not hosts:
        return
    host = scene.chance.choice(hosts)
    bmc = world.bmcs[host.name]
    for _ in range(RESETS):
        bmc.wrong_offs = 1
        world.note(f"{host.name}: network cut, and its BMC will say off once")
        world.server.cut(host.link)
        end = world.loop.time() + LONGEST_CUT_SECONDS
        while bmc.wrong_offs and world.loop.time() < end:
            await asyncio.sleep(0.5)
        world.reached.add("BMC said off once" if not bmc.wrong_offs else "BMC was not asked")
        await asyncio.sleep(scene.chance.choice((0.0, 0.0, LOOK_SECONDS)))
        world.server.mend(host.link)
        bmc.wrong_offs = 0
        await asyncio.sleep(scene.chance.uniform(*HEARD_SECONDS))


async def most_are_cut(scene: Scene) -> None:
    """A switch fails: all hosts but one or none are cut off for minutes, and run. Nobody can tell who is cut off."""
    world = scene.world
    hosts = list(world.hosts.values())
    spared = scene.chance.choice([*hosts, None])
    cut = [host for host in hosts if host is not spared]
    world.note(f"{', '.join(host.name for host in cut)}: network cut")
    for host in cut:
        world.server.cut(host.link)
    await asyncio.sleep(MOST_CUT_SECONDS)
    for host in cut:
        world.server.mend(host.link)
    world.note("their network is back")


async def hang_one_after_another(scene: Scene) -> None:
    """A host hangs and is fenced, ha's leader dies, another host hangs: for that one a person is needed."""
    world, hosts = scene.world, managed(scene.world)
    if len(hosts) < 2:
        return
    first, second = scene.chance.sample(hosts, 2)
    await _hang(world, first)
    end = world.loop.time() + PROMISED_SECONDS
    while PowerAction.OFF not in world.bmcs[first.name].orders:
        if world.loop.time() > end:
            world.oracle.broken(f"{first.name} hangs, and nobody switches it off")
            return
        await asyncio.sleep(0.5)
    for replica in world.replicas.values():
        if replica.name.startswith("ha") and replica.leads and scene.chance.random() < 0.7:
            world.note(f"{replica.name} killed")
            replica.kill(scene.seconds(1, 20))
            break
    await asyncio.sleep(scene.chance.uniform(0, 30))
    await _hang(world, second)
    await asyncio.sleep(SECOND_SECONDS)
    for host in (first, second):
        if host.frozen:
            host.thaw()
        world.trouble(host.name, -1)
        host.power_on()


async def _hang(world: World, host: HostMachine) -> None:
    world.note(f"{host.name}: frozen")
    world.trouble(host.name, 1)
    host.freeze()


async def clocks_go_forward(scene: Scene) -> None:
    """A host stands still for a moment, and the clocks of the control plane are set forward meanwhile."""
    world, hosts = scene.world, managed(scene.world)
    if not hosts:
        return
    host, forward = scene.chance.choice(hosts), scene.chance.choice(FORWARD_SECONDS)
    world.note(f"{host.name}: frozen")
    host.freeze()
    await asyncio.sleep(scene.chance.uniform(5, 10))
    for machine in world.control:
        machine.clock.skew_seconds += forward
    world.note(f"the clocks of the control plane are set forward by {forward:.0f} s")
    await asyncio.sleep(PAUSE_SECONDS - 12)
    host.thaw()
    world.note(f"{host.name}: goes on")
    await asyncio.sleep(PAUSE_SECONDS)
    for machine in world.control:
        machine.clock.skew_seconds -= forward


async def confirmed_by_mistake(scene: Scene) -> None:
    """Somebody looked at the wrong machine, luckily one without VMs: when it is heard again, it counts again."""
    world, host = scene.world, scene.host()
    for vm_id in on_host(world, host):
        if not await stopped(world, vm_id):
            return
    bmc = world.bmcs[host.name]
    bmc.reachable = False
    world.trouble(host.name, 1)
    world.note(f"{host.name}: network cut, that of its BMC too")
    world.server.cut(host.link)
    await asyncio.sleep(NOTICED_SECONDS)
    await people.confirmed(world, host)
    await asyncio.sleep(scene.chance.uniform(5, 30))
    world.server.mend(host.link)
    bmc.reachable = True
    world.trouble(host.name, -1)
    await asyncio.sleep(FOUND_SECONDS)
    status = (await world.host(host)).status
    if status is not HostStatus.UP:
        world.oracle.broken(
            f"{host.name} beats for {FOUND_SECONDS:.0f} s and is {status}: it was confirmed by mistake"
        )


async def leader_stands_still(scene: Scene) -> None:
    """Whoever leads ha stands still for longer than a fence waits, and a host for the last moment of that and a little more:
    nobody knows for how long it was silent."""
    leader, hosts = _leader(scene.world), managed(scene.world)
    if leader is None or not hosts:
        return
    host = scene.chance.choice(hosts)
    scene.world.note(f"{leader.name} paused")
    leader.pause()
    await asyncio.sleep(scene.chance.uniform(*DEAF_SECONDS))
    await _at_the_end(scene, host, leader.go_on, f"{leader.name} goes on")


async def leader_hears_nothing(scene: Scene) -> None:
    """The same, but its network is cut, and the other replica is down: unlike after a pause nothing waits in a socket that
    says when hosts were heard last."""
    world, leader, hosts = scene.world, _leader(scene.world), managed(scene.world)
    if leader is None or not hosts:
        return
    for replica in world.replicas.values():
        if replica.name.startswith("ha") and replica is not leader:
            replica.kill(DEAF_SECONDS[1] + 2 * PAUSE_SECONDS)
    host, link = scene.chance.choice(hosts), leader.machine.link
    world.note(f"{leader.machine.name}: network cut")
    world.server.cut(link)
    await asyncio.sleep(scene.chance.uniform(*DEAF_SECONDS))
    mended = f"{leader.machine.name}: its network is back"
    await _at_the_end(scene, host, lambda: world.server.mend(link), mended)


def _leader(world: World) -> Replica | None:
    return next((each for each in world.replicas.values() if each.name.startswith("ha") and each.leads), None)


async def _at_the_end(scene: Scene, host: HostMachine, end: Callable[[], None], what: str) -> None:
    """A host stands still for a moment, in the beginning of which what kept ha from hearing ends."""
    world = scene.world
    world.note(f"{host.name}: frozen")
    host.freeze()
    await asyncio.sleep(scene.chance.uniform(1, 5))
    world.note(what)
    end()
    await asyncio.sleep(PAUSE_SECONDS - 8)
    host.thaw()
    world.note(f"{host.name}: goes on")
    await asyncio.sleep(PAUSE_SECONDS)
