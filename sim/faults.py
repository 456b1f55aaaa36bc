"""What goes wrong, one row per kind: each begins, lasts, and is mended by the time its coroutine ends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sim.bmc import Bmc
from sim.machines import HostMachine
from sim.plane import Replica
from sim.qemu import Domain
from sim.world import World
from volery.contracts.domain import DomainState


@dataclass(frozen=True)
class Scene:
    """One fault in a world, with the chance that decides it."""

    world: World
    chance: random.Random

    def host(self) -> HostMachine:
        return self.chance.choice(list(self.world.hosts.values()))

    def seconds(self, least: float, most: float) -> float:
        """Short ones more often than long ones."""
        return float(least * (most / least) ** self.chance.random())

    async def last(self, where: str, what: str, seconds: float) -> None:
        """The trouble lasts."""
        self.world.note(f"{where or 'the servers'}: {what} for {seconds:.1f} s")
        self.world.trouble(where, 1)
        await asyncio.sleep(seconds)
        self.world.trouble(where, -1)
        self.world.note(f"{where or 'the servers'}: {what} is over")


Fault = Callable[[Scene], Awaitable[None]]


LONGEST_SILENCE_SECONDS = 60.0
"""Whoever is silent for longer is fenced, if anybody can."""


async def power_lost(scene: Scene) -> None:
    await lose_power(scene, scene.host())


async def lose_power(scene: Scene, host: HostMachine) -> None:
    host.lose_power()
    await scene.last(host.name, "no power", scene.seconds(1, 120))
    host.power_on()


async def host_frozen(scene: Scene) -> None:
    await freeze(scene, scene.host())


async def freeze(scene: Scene, host: HostMachine, at_most: float = 120.0, at_least: float = 1.0) -> None:
    if not host.on or host.frozen:
        return
    host.freeze()
    boot = host.boot_id
    await scene.last(host.name, "frozen", scene.seconds(at_least, at_most))
    if host.boot_id == boot and host.frozen:
        host.thaw()


async def network_cut(scene: Scene) -> None:
    await cut_network(scene, scene.host())


async def cut_network(scene: Scene, host: HostMachine, at_most: float = 120.0, at_least: float = 0.5) -> None:
    if host.link.cut:
        return
    scene.world.server.cut(host.link)
    await scene.last(host.name, "network cut", scene.seconds(at_least, at_most))
    scene.world.server.mend(host.link)


async def slow_network(scene: Scene) -> None:
    host = scene.host()
    if host.link.delay_seconds:
        return
    host.link.delay_seconds = scene.chance.uniform(0.1, 0.8)
    await scene.last(host.name, f"network slow by {host.link.delay_seconds:.2f} s", scene.seconds(5, 120))
    host.link.delay_seconds = 0.0


async def agent_killed(scene: Scene) -> None:
    await kill_agent(scene, scene.host())


async def kill_agent(scene: Scene, host: HostMachine) -> None:
    seconds = scene.seconds(0.5, 60)
    host.kill_agent(seconds)
    await scene.last(host.name, "agent killed", seconds)


async def agent_paused(scene: Scene) -> None:
    await pause_agent(scene, scene.host())


async def pause_agent(scene: Scene, host: HostMachine, at_most: float = 120.0, at_least: float = 1.0) -> None:
    process = host.agent_process
    if process is None or process.dead or process.stopped:
        return
    host.stop(process)
    await scene.last(host.name, "agent paused", scene.seconds(at_least, at_most))
    host.go_on(process)


async def journal_lost(scene: Scene) -> None:
    host = scene.host()
    host.kill_agent(3.0)
    host.disk.lose()
    await scene.last(host.name, "agent killed and its journal lost", 3.0)


async def libvirt_killed(scene: Scene) -> None:
    await kill_libvirt(scene, scene.host())


async def kill_libvirt(scene: Scene, host: HostMachine) -> None:
    if not host.on or not host.daemon.up or host.frozen:
        return
    host.daemon.stop()
    boot = host.boot_id
    await scene.last(host.name, "libvirtd away", scene.seconds(1, 60))
    if host.boot_id == boot and host.on:
        host.daemon.start()


def _some_domain(scene: Scene) -> tuple[HostMachine, Domain] | None:
    found = [
        (host, domain)
        for host in scene.world.hosts.values()
        if host.on and not host.frozen
        for domain in host.daemon.domains.values()
        if domain.state is DomainState.RUNNING
    ]
    return scene.chance.choice(found) if found else None


async def vm_crashed(scene: Scene) -> None:
    found = _some_domain(scene)
    if found is not None:
        host, domain = found
        scene.world.note(f"{host.name}: {domain.name()} crashes")
        scene.world.oracle.ended_by_itself(domain.vm_id, asked=False)
        host.daemon.crash(domain, panic=scene.chance.random() < 0.5)


async def guest_powers_off(scene: Scene) -> None:
    found = _some_domain(scene)
    if found is not None:
        host, domain = found
        scene.world.note(f"{host.name}: the guest of {domain.name()} powers off")
        scene.world.oracle.ended_by_itself(domain.vm_id, asked=True)
        host.daemon.spawn(host.daemon.power_off(domain, 0.5))


def _replica(scene: Scene) -> Replica:
    return scene.chance.choice(list(scene.world.replicas.values()))


async def service_killed(scene: Scene) -> None:
    replica, seconds = _replica(scene), scene.seconds(0.5, 60)
    replica.kill(seconds)
    await scene.last("", f"{replica.name} killed", seconds)


async def service_paused(scene: Scene) -> None:
    replica = _replica(scene)
    process = replica.process
    if process is None or process.dead or process.stopped:
        return
    replica.pause()
    await scene.last("", f"{replica.name} paused", scene.seconds(1, 90))
    replica.machine.go_on(process)


async def nats_gone(scene: Scene) -> None:
    server = scene.world.server
    if not server.up:
        return
    server.stop()
    lost = scene.chance.random() < 0.3
    if lost:
        server.jetstream.lose()
        scene.world.reached.add("NATS store lost")
    await scene.last("", "NATS away" + (", its store lost" if lost else ""), scene.seconds(1, 100))
    server.start()


async def postgres_gone(scene: Scene) -> None:
    database = scene.world.database
    if not database.up:
        return
    database.stop()
    await scene.last("", "PostgreSQL away", scene.seconds(1, 100))
    database.start()


async def both_gone(scene: Scene) -> None:
    await asyncio.gather(nats_gone(scene), postgres_gone(scene))


async def bmc_troubled(scene: Scene) -> None:
    host = scene.host()
    bmc = scene.world.bmcs[host.name]
    if not bmc.honest:
        return
    kind = scene.chance.choice(("unreachable", "deaf", "lying off"))
    bmc.reachable, bmc.obeys, bmc.lies_off = kind != "unreachable", kind != "deaf", kind == "lying off"
    seconds = scene.seconds(10, 150)
    scene.world.note(f"{host.name}: BMC {kind} for {seconds:.1f} s")
    await asyncio.sleep(seconds)
    bmc.reachable = bmc.obeys = True
    bmc.lies_off = False


async def leader_killed_in_mid_fence(scene: Scene) -> None:
    """Whoever orders the next power off dies at that instant."""
    world = scene.world

    def kill(bmc: Bmc) -> None:
        for replica in world.replicas.values():
            if replica.name.startswith("ha") and replica.leads:
                world.note(f"{replica.name} dies while {bmc.host.name} is switched off")
                world.reached.add("leader changed in mid-fence")
                replica.kill(2.0)
                world.at_off.remove(kill)
                return

    world.at_off.append(kill)
    await freeze(scene, scene.host(), at_least=LONGEST_SILENCE_SECONDS, at_most=90.0)
    if kill in world.at_off:
        world.at_off.remove(kill)


async def clock_jumped(scene: Scene) -> None:
    machines = [*scene.world.hosts.values(), *scene.world.control]
    machine = scene.chance.choice(machines)
    jump = scene.chance.choice((-3600.0, -30.0, 5.0, 60.0, 3600.0))
    scene.world.note(f"{machine.name}: clock jumps by {jump:g} s")
    machine.clock.skew_seconds += jump
    await asyncio.sleep(scene.seconds(10, 120))
    machine.clock.skew_seconds -= jump
    scene.world.note(f"{machine.name}: clock is right again")


async def many_lose_power(scene: Scene) -> None:
    await asyncio.gather(*(lose_power(scene, host) for host in _many(scene)))


async def many_are_cut(scene: Scene) -> None:
    await asyncio.gather(*(cut_network(scene, host) for host in _many(scene)))


def _many(scene: Scene) -> list[HostMachine]:
    hosts = list(scene.world.hosts.values())
    return scene.chance.sample(hosts, max(2, int(len(hosts) * scene.chance.choice((0.4, 0.7, 1.0)))))


PAUSES = 15
"""Of each host, in one fault."""
PAUSE_SECONDS = 30.0
"""The longest: shorter than the least silence before a fence."""
BETWEEN_SECONDS = (5.0, 25.0)
"""Two of three hosts are heard at any moment, so nothing else holds a fence back."""


async def paused_again_and_again(scene: Scene) -> None:
    """Every host stands still, or is cut off, for a moment, many times: nothing may come of it."""
    world = scene.world
    scenes = [Scene(world, random.Random(scene.chance.getrandbits(64))) for _ in world.hosts]
    pauses = [brief_pauses(own, host, PAUSES) for own, host in zip(scenes, world.hosts.values(), strict=True)]
    await asyncio.gather(*pauses)


async def brief_pauses(
    scene: Scene, host: HostMachine, times: int, seconds: tuple[float, float] = (1.0, PAUSE_SECONDS)
) -> None:
    for _ in range(times):
        await asyncio.sleep(scene.chance.uniform(*BETWEEN_SECONDS))
        await scene.chance.choice((freeze, cut_network, pause_agent))(scene, host, seconds[1], seconds[0])
        scene.world.oracle.pauses += 1


async def servers_gone_for_an_hour(scene: Scene) -> None:
    """NATS and PostgreSQL: hosts go on without them."""
    world = scene.world
    world.server.stop()
    world.database.stop()
    await scene.last("", "NATS and PostgreSQL away", 3600.0)
    world.database.start()
    world.server.start()
