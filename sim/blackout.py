"""Blackouts: all machines lose their power at one instant, BMCs and storage too, and come back in any order but for one host.

Until something proves that the missing host's boot has ended, nothing of it runs anywhere; everything else that ran and
is to come back does, in its order. Then the proof comes in one of three ways.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from sim import people, run
from sim.machines import HostMachine, Machine
from sim.oracle import Wish
from sim.world import Plan, World
from volery.contracts.liveness import LIST_LIVENESS, HostLiveness
from volery.contracts.start_group import CREATE_START_GROUP, CreateStartGroup
from volery.contracts.vm import UPDATE_VM, HighAvailability, UpdateVm

HOSTS = 4
ROUNDS = 4
"""Per seed."""
GROUP_SECONDS = 120.0
"""Later start groups wait for this one so long."""
PRIORITY_SECONDS = 50.0
"""Less than ha waits for the VMs of a host that isn't back."""
BACK_SECONDS = 400.0
"""After the last machine came back, all that can run does within this."""
SAID_SECONDS = 30.0
"""ha believes the silence of many hosts, has a BMC asked and says what a host is waited for within this."""

DATABASE, WEB, IMPORTANT, MINOR, WAIVED, WANTED, *PLAIN = [f"vm-{n}" for n in range(1, 9)]
HIGHLY_AVAILABLE = (True, True, True, True, True, False, False, False)
COME_BACK = (DATABASE, WEB, IMPORTANT, MINOR, WANTED)


async def play(world: World, chance: random.Random) -> None:
    world.environ["VOLERY_HA_START_HOLD_SECONDS"] = "300"
    async with asyncio.timeout(run.FURNISH_SECONDS):
        await world.open()
        await world.furnish(Plan(HOSTS, len(HIGHLY_AVAILABLE), HIGHLY_AVAILABLE))
        await _say_what_comes_back(world)
    await run.settled(world)
    for number in range(ROUNDS):
        world.note(f"blackout {number + 1}")
        await _blackout(world, chance)
        await run.settled(world)
        if world.oracle.violations:
            return
        await _start_the_others(world)
        world.time.skip(chance.uniform(200, 900))


async def _say_what_comes_back(world: World) -> None:
    ids = world.vms
    for name, priority in ((IMPORTANT, 90), (MINOR, 10)):
        available = HighAvailability(enabled=True, priority=priority)
        await world.ask(UPDATE_VM, UpdateVm(id=ids[name], high_availability=available))
    for name, back in ((WAIVED, False), (WANTED, True)):
        await world.ask(UPDATE_VM, UpdateVm(id=ids[name], start_after_blackout=back))
    first = await world.ask(
        CREATE_START_GROUP,
        CreateStartGroup(
            name="databases",
            cluster_id=world.cluster_id,
            vm_ids=(ids[DATABASE],),
            wait_seconds=GROUP_SECONDS,
        ),
    )
    await world.ask(
        CREATE_START_GROUP,
        CreateStartGroup(
            name="web", cluster_id=world.cluster_id, vm_ids=(ids[WEB], ids[WANTED]), after=(first.id,)
        ),
    )


async def _blackout(world: World, chance: random.Random) -> None:
    names = {vm_id: name for name, vm_id in world.vms.items()}
    where = {names[vm_id]: next(iter(at)) for vm_id, at in world.oracle.running.items() if at}
    missing = world.hosts[where[chance.choice(COME_BACK)]] if chance.random() < 0.7 else _any(world, chance)
    _lose_everything(world)
    for name, vm_id in world.vms.items():
        world.oracle.want(vm_id, Wish.UP if name in COME_BACK else Wish.DOWN)
    await asyncio.sleep(5)
    world.time.skip(chance.choice((0.0, 600.0, 40_000.0)))
    began = world.loop.time()
    await _come_back(world, chance, missing)
    here = [name for name in COME_BACK if where[name] != missing.name]
    await _all_run(world, here)
    _check_order(world, where, missing, began)
    await _check_missing(world, missing, where)
    await _prove(world, chance, missing)
    await _all_run(world, list(COME_BACK))
    for host in world.hosts.values():
        world.bmcs[host.name].reachable = True
        host.power_on()


def _any(world: World, chance: random.Random) -> HostMachine:
    return chance.choice(list(world.hosts.values()))


def _lose_everything(world: World) -> None:
    for host in world.hosts.values():
        world.trouble(host.name, 1)
        host.lose_power()
        world.bmcs[host.name].reachable = False
    for machine in world.control:
        machine.lose_power()
    world.server.stop()
    world.database.stop()
    world.shelf.up = False


async def _come_back(world: World, chance: random.Random, missing: HostMachine) -> None:
    acts: list[Callable[[], None]] = [world.server.start, world.database.start, lambda: _mend_storage(world)]
    acts += [_switches_on(world, machine) for machine in world.control]
    acts += [_boots(world, host) for host in world.hosts.values() if host is not missing]
    chance.shuffle(acts)
    within = chance.choice((1.0, 30.0, 120.0))

    async def later(act: Callable[[], None], seconds: float) -> None:
        await asyncio.sleep(seconds)
        act()

    await asyncio.gather(*(later(act, chance.uniform(0, within)) for act in acts))


def _mend_storage(world: World) -> None:
    world.shelf.up = True


def _switches_on(world: World, machine: Machine) -> Callable[[], None]:
    def act() -> None:
        machine.on = True
        for replica in world.replicas.values():
            if replica.machine is machine:
                replica.start()

    return act


def _boots(world: World, host: HostMachine) -> Callable[[], None]:
    def act() -> None:
        host.power_on()
        world.trouble(host.name, -1)

    return act


async def _all_run(world: World, names: list[str]) -> None:
    end = world.loop.time() + BACK_SECONDS
    while waiting := [name for name in names if not world.oracle.running.get(world.vms[name])]:
        if world.loop.time() > end:
            await run.explain(world)
            raise TimeoutError(f"{', '.join(waiting)} should run again")
        if world.oracle.violations:
            return
        await asyncio.sleep(0.5)


def _check_order(world: World, where: dict[str, str], missing: HostMachine, began: float) -> None:
    """Of what runs again: start groups, and priorities of VMs whose hosts came back nearly together."""
    begun = {name: world.oracle.begun[world.vms[name]] - began for name in COME_BACK}
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in begun.items() if seconds > 0)
    world.note(f"{missing.name} is missing; seconds until they ran again: {told}")
    world.reached.add("database missing" if where[DATABASE] == missing.name else "database first")
    for later in (WEB, WANTED):
        waited = world.oracle.begun[world.vms[later]] - world.hosts[where[later]].clock.booted_at
        if where[later] == missing.name or waited >= GROUP_SECONDS:
            continue
        if where[DATABASE] == missing.name:
            world.oracle.broken(f"{later} did not wait for {DATABASE}, whose host is missing")
        elif begun[later] < begun[DATABASE]:
            world.oracle.broken(f"{later} was started before {DATABASE}, which comes before it")
    if missing.name in (where[IMPORTANT], where[MINOR]):
        return
    boots = {name: world.hosts[where[name]].clock.booted_at for name in (IMPORTANT, MINOR)}
    if boots[IMPORTANT] < boots[MINOR] + PRIORITY_SECONDS:
        world.reached.add("priorities")
        if begun[IMPORTANT] > begun[MINOR] + 1:
            world.oracle.broken(f"{MINOR} was started before {IMPORTANT}, which is more important")


async def _check_missing(world: World, missing: HostMachine, where: dict[str, str]) -> None:
    """Nothing that ran there runs anywhere, and ha says why soon."""
    for name, host in where.items():
        if host == missing.name and world.oracle.running.get(world.vms[name]):
            world.oracle.broken(f"{name} runs, and nothing proves that {missing.name} is dead")
    end = world.loop.time() + SAID_SECONDS
    while not (told := await _liveness(world, missing)).fencing:
        if world.loop.time() > end:
            world.oracle.broken(f"ha doesn't say what {missing.name} is waited for: {told.state}")
            return
        await asyncio.sleep(0.5)


async def _liveness(world: World, host: HostMachine) -> HostLiveness:
    return next(
        each for each in await world.listed(LIST_LIVENESS, HostLiveness) if each.host_name == host.name
    )


async def _prove(world: World, chance: random.Random, missing: HostMachine) -> None:
    ways = ("it boots", "a person", "its BMC") if missing.name in world.managed else ("it boots", "a person")
    way = chance.choice(ways)
    world.note(f"{missing.name} is proven dead: {way}")
    world.reached.add(f"proven by {way}")
    world.trouble(missing.name, -1)
    if way == "it boots":
        missing.power_on()
    elif way == "a person":
        await people.confirmed(world, missing)
    else:
        world.bmcs[missing.name].reachable = True


async def _start_the_others(world: World) -> None:
    for name, vm_id in world.vms.items():
        if world.oracle.wishes[vm_id] is not Wish.UP:
            await people.start_one(world, name)
