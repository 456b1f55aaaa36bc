"""What goes wrong in the middle: between two steps of an operation, in a phase of a migration, after a backup."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from sim import people
from sim.faults import Scene, cut_network, freeze, kill_agent, kill_libvirt, lose_power, pause_agent
from sim.hypervisor import PHASES
from sim.machines import HostMachine
from sim.oracle import Wish
from sim.plane import SERVICES

Harm = Callable[[Scene, HostMachine], Awaitable[None]]

PATIENCE_SECONDS = 60.0
OLD_SECONDS = 35.0
"""More than an order is good for."""
MOST_ORDERS = 30
"""That come again."""
STRIKE_SECONDS = (0.0, 0.005, 0.05, 0.5)
"""After an order was sent: it has not arrived, is in the journal, is being carried out, or done."""
NOTICED_SECONDS = 20
"""Within which services that were restored have noticed it, or never do."""
HARMS: tuple[Harm, ...] = (lose_power, lose_power, freeze, cut_network, kill_agent, pause_agent, kill_libvirt)


async def _leader_killed(scene: Scene, service: str) -> None:
    """Whoever does the work of a service dies at this instant."""
    for replica in scene.world.replicas.values():
        if replica.name.startswith(service) and replica.leads:
            seconds = scene.seconds(0.5, 20)
            replica.kill(seconds)
            await scene.last("", f"{replica.name} killed in the middle", seconds)
            return


async def _while_asked(
    asked: Coroutine[Any, Any, None], strike: Coroutine[Any, Any, None], met: asyncio.Future[Any]
) -> None:
    """A strike that waits for its instant in what is asked, and gives up with the end of that."""
    striking = asyncio.ensure_future(strike)
    await asked
    if not met.done():
        striking.cancel()
    await asyncio.wait([striking])
    if not striking.cancelled():
        striking.result()


async def migration_cut(scene: Scene) -> None:
    """A host, or inventory, fails in one phase of a migration."""
    world, phase = scene.world, scene.chance.choice(PHASES)
    met: asyncio.Future[tuple[HostMachine, HostMachine]] = asyncio.get_running_loop().create_future()

    def at(source: HostMachine, target: HostMachine, now: str) -> None:
        if now == phase and not met.done():
            met.set_result((source, target))

    async def strike() -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                hosts = await met
        except TimeoutError:
            return
        finally:
            world.at_phase.remove(at)
        world.note(f"the migration from {hosts[0].name} to {hosts[1].name} is cut in {phase}")
        world.reached.add(f"migration cut in {phase}")
        if scene.chance.random() < 0.2:
            await _leader_killed(scene, "inventory")
        else:
            await scene.chance.choice(HARMS)(scene, scene.chance.choice(hosts))

    world.at_phase.append(at)
    await _while_asked(people.migrate(scene), strike(), met)


async def struck_between_steps(scene: Scene) -> None:
    """While something is asked for, who sends the n-th order, or the host that it is for, fails at that instant."""
    world, number = scene.world, scene.chance.randrange(1, 7)
    part = scene.chance.choice((".order", ".order", ".order", ".cancel"))
    met: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    left = number

    def overhear(subject: str, data: bytes, headers: Any) -> None:
        nonlocal left
        if subject.startswith("host.") and subject.endswith(part) and not met.done():
            left -= 1
            if left <= 0:
                met.set_result(subject.split(".")[1])

    async def strike() -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                host_id = await met
        except TimeoutError:
            return
        finally:
            world.server.overhears.remove(overhear)
        host = next(each for each in world.hosts.values() if each.host_id == host_id)
        await asyncio.sleep(scene.chance.choice(STRIKE_SECONDS))
        world.note(f"struck at {part[1:]} {number}, to {host.name}")
        world.reached.add(f"struck at an {part[1:]}" if part == ".order" else "struck at a cancel")
        if scene.chance.random() < 0.4:
            await _leader_killed(scene, scene.chance.choice(("inventory", "inventory", "storage", "network")))
        else:
            await scene.chance.choice(HARMS)(scene, host)

    world.server.overhears.append(overhear)
    asks = scene.chance.choice((people.stop, people.restart, people.migrate, people.restart))
    await _while_asked(asks(scene), strike(), met)


async def orders_come_again(scene: Scene) -> None:
    """A host's journal is lost, and then what it was told before comes once more: over a way that took long, or from
    somebody who has recorded it."""
    world, host = scene.world, scene.host()
    await asyncio.sleep(scene.seconds(10, 40))
    told = world.orders.get(host.host_id, [])
    orders = scene.chance.sample(told, min(len(told), MOST_ORDERS))
    host.kill_agent(3.0)
    host.disk.lose()
    await scene.last(host.name, "agent killed and its journal lost", OLD_SECONDS)
    world.note(f"{host.name}: {len(orders)} old orders come again")
    world.reached.add("old orders came again")
    for subject, data, headers in orders:
        await world.bus.client.publish(subject, data, headers=headers)
        await asyncio.sleep(scene.chance.uniform(0, 0.5))


async def postgres_restored(scene: Scene) -> None:
    """PostgreSQL loses its disk, and comes back with a backup from a while ago."""
    world, database = scene.world, scene.world.database
    if not database.up:
        return
    backup, wishes = database.snapshot(), dict(world.oracle.wishes)
    world.note("PostgreSQL is backed up")
    await asyncio.sleep(scene.seconds(1, 60))
    if not database.up:
        return
    database.stop()
    await scene.last("", "PostgreSQL away, its disk lost", scene.seconds(1, 30))
    for vm_id, wish in world.oracle.wishes.items():
        if wish is not wishes.get(vm_id) or world.oracle.pending.get(vm_id):
            world.oracle.want(vm_id, Wish.ANY)  # what was asked meanwhile is forgotten, or not
    world.oracle.stopped.clear()
    world.restores += 1
    database.restore(backup)
    database.start()
    world.note("PostgreSQL is back, as it was when it was backed up")
    world.reached.add("PostgreSQL restored")
    for _ in range(NOTICED_SECONDS):
        await asyncio.sleep(1.0)
        if any(database.rows(owner, "quarantine") for owner in SERVICES):
            world.reached.add("quarantine")
            return
