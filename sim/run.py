"""One seed: a world, faults in scenes with quiet time between them, and what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from sim import people
from sim.faults import Scene
from sim.focus import FOCUSES, Focus
from sim.loop import Deadlock, OutOfTime, Stuck, new_loop
from sim.nats import MemoryClient
from sim.postgres import Database
from sim.world import Plan, World
from volery.contracts.base import Owner
from volery.contracts.errors import Refused
from volery.contracts.host import LIST_HOSTS, Host, HostStatus
from volery.contracts.liveness import LIST_LIVENESS, LIST_RESTARTS, HostLiveness, VmRestart
from volery.contracts.operation import ENDED, LIST_OPERATIONS, Operation
from volery.contracts.scheduling import LIST_CLAIMS, Claim
from volery.contracts.vm import LIST_VMS, Vm

LEAST_SECONDS = 3600.0
LEAST_FAULTS = 10
SETTLE_SECONDS = 900.0
"""So long after the last fault of a scene was mended everything must be as it should."""
QUIET_SECONDS = (2000.0, 2700.0)
"""Between scenes, skipped."""
MOST_SECONDS = 40_000.0
FURNISH_SECONDS = 120.0


kept: list[World] = []
"""What was simulated in this process: were it collected, the clean-up of the dead would run."""


@dataclass(frozen=True)
class Outcome:
    """What became of a seed."""

    seed: int
    violations: tuple[str, ...]
    reached: tuple[str, ...]
    digest: str
    virtual_seconds: float
    active_seconds: float
    """Without the time that was skipped."""
    real_seconds: float
    """Of one processor."""
    steps: int
    pauses: int
    """Of hosts that stood still for a moment, where that is what goes wrong."""
    timeline: tuple[str, ...]


class Log(logging.Handler):
    """The programs' own words, into the timeline."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.lines: list[tuple[float, logging.LogRecord]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((self.world.time.elapsed, record))


@dataclass(frozen=True)
class Stage:
    """An installation that runs and has come to rest. What happens to it is played in forks of the process that has it, so
    that many seeds need it to be set up only once."""

    world: World
    log: Log
    focus: Focus


def plan_of(chance: random.Random, focus: Focus) -> Plan:
    hosts = focus.hosts or min(30, 3 + int(chance.expovariate(0.5)))
    vms = max(2, round(hosts * chance.uniform(*focus.vms_per_host)))
    return Plan(hosts, vms, tuple(chance.random() < focus.highly_available for _ in range(vms)))


Scenario = Callable[[World, random.Random], Coroutine[Any, Any, None]]
"""What happens in an empty world, instead of faults in scenes."""


def empty(seed: int, database: Database, *, focus: str = "", level: int = logging.WARNING) -> Stage:
    """A world with nothing in it. Once per process: see `alone`."""
    MemoryClient.made = 0
    random.seed(seed)  # what the programs draw from
    world = World(new_loop(MOST_SECONDS), random.Random(seed), database)
    log = Log(world)
    logging.basicConfig(handlers=[log], level=level, force=True)
    kept.append(world)
    return Stage(world, log, FOCUSES[focus])


def furnish(stage: Stage) -> None:
    """Never raises for what the programs did: the oracle has it."""
    _lived(stage.world, _furnished(stage.world, stage.focus))


def episode(seed: int, stage: Stage, scenario: Scenario | None = None) -> Outcome:
    """Runs a seed to its end. Never raises for what the programs did. Once per process: see `alone`."""
    began, world, log = time.process_time(), stage.world, stage.log
    loop, chance = world.loop, random.Random(seed)
    if scenario is not None:
        random.seed(seed)  # a fork draws from what nobody knows
        _lived(world, scenario(world, world.chance))
    elif not world.oracle.violations:
        random.seed(chance.getrandbits(64))
        world.go_on_with(random.Random(chance.getrandbits(64)))
        _lived(world, _play(world, chance, stage.focus))
    for failed in loop.failed:
        world.oracle.broken(f"nobody caught {failed!r}")
    words = [(at, _word(record)) for at, record in log.lines]
    lines = sorted([*world.timeline, *words], key=lambda line: line[0])
    return Outcome(
        seed=seed,
        violations=tuple(world.oracle.violations),
        reached=tuple(sorted(world.reached)),
        digest=world.digest.hexdigest(),
        virtual_seconds=world.time.elapsed,
        active_seconds=loop.time(),
        real_seconds=time.process_time() - began,
        steps=loop.steps,
        pauses=world.oracle.pauses,
        timeline=tuple(f"{at:10.3f}  {what}" for at, what in lines),
    )


def _lived(world: World, work: Coroutine[Any, Any, None]) -> None:
    try:
        world.loop.run(work)
    except (Deadlock, OutOfTime, Stuck, TimeoutError) as error:
        world.oracle.broken(f"{type(error).__name__}: {error}")
    except Exception as error:  # an episode's own failure is a finding like any other
        logging.getLogger("sim").exception("the episode ended")
        world.oracle.broken(f"the episode ended by {type(error).__name__}: {error}")


def _word(record: logging.LogRecord) -> str:
    text = f"    {record.levelname.lower()} {record.name}: {record.getMessage()}"
    if record.exc_info and record.exc_info[1] is not None:
        import traceback

        text += "\n" + "".join(traceback.format_exception(record.exc_info[1]))
    return text


async def _furnished(world: World, focus: Focus) -> None:
    if focus.peers:
        world.environ["VOLERY_HA_TRY_PEERS_SECONDS"] = "10"
    async with asyncio.timeout(FURNISH_SECONDS):
        await world.open()
        await world.furnish(plan_of(world.chance, focus))
    await settled(world)


async def _play(world: World, chance: random.Random, focus: Focus) -> None:
    world.oracle.harmless = focus.harmless
    faults = scenes = 0
    while _goes_on(world, focus, faults, scenes):
        faults += await _scene(world, chance, focus)
        scenes += 1
        await settled(world)
        if world.oracle.violations:
            return
        quiet = chance.uniform(*QUIET_SECONDS)
        world.note(f"{quiet:.0f} s pass in peace")
        world.time.skip(quiet)


def _goes_on(world: World, focus: Focus, faults: int, scenes: int) -> bool:
    if focus.scenes:
        return scenes < focus.scenes
    return faults < LEAST_FAULTS or world.time.elapsed < LEAST_SECONDS


async def _scene(world: World, chance: random.Random, focus: Focus) -> int:
    """Some faults and requests that overlap. How many faults there were."""
    count = chance.choice(focus.faults_at_once)
    acts = chance.choices([f for f, _ in focus.faults], [w for _, w in focus.faults], k=count)
    if focus.requests:
        requests, weights = [r for r, _ in focus.requests], [w for _, w in focus.requests]
        acts += chance.choices(requests, weights, k=chance.choice(focus.requests_at_once))
    await asyncio.gather(*[_later(chance, act, world) for act in acts])
    return count


async def _later(chance: random.Random, act: Any, world: World) -> None:
    scene = Scene(world, random.Random(chance.getrandbits(64)))
    await asyncio.sleep(scene.chance.uniform(0, 20))
    world.reached.add(act.__name__)
    await act(scene)


async def settled(world: World) -> None:
    """Until everything is as it should; what isn't in time is a violation that names it."""
    end = world.loop.time() + SETTLE_SECONDS
    wrong: list[str] = []
    while world.loop.time() < end:
        await asyncio.sleep(3.0)
        if world.oracle.violations:
            return
        wrong = _machines(world) or world.oracle.unmet()
        if wrong:
            continue
        try:
            async with asyncio.timeout(60.0):
                await people.activate_all(world)
                wrong = await _told(world)
        except Exception as error:  # while services come back; one that stays is a violation
            wrong = [f"the services can't be asked: {error}"]
        if not wrong:
            return
    await explain(world)
    for what in wrong:
        world.oracle.broken(f"{SETTLE_SECONDS:.0f} s after the last fault was mended: {what}")


async def explain(world: World) -> None:
    """What the services believe, for whoever reads the timeline."""
    with contextlib.suppress(Refused, TimeoutError):
        async with asyncio.timeout(30.0):
            for vm in await world.listed(LIST_VMS, Vm):
                world.note(
                    f"VM {vm.name}: {vm.status} wanted {vm.desired} ({vm.status_reason}) epoch {vm.epoch} on"
                    f" {vm.host_id or 'no host'} busy with {vm.busy_with or 'nothing'} HA {vm.high_availability.enabled}"
                )
            for restart in await world.listed(LIST_RESTARTS, VmRestart):
                world.note(f"restart of {restart.vm_name}: {restart.message}")
            for host in await world.listed(LIST_HOSTS, Host):
                world.note(f"{host.name}: {host.status} {host.reasons} boot {host.boot_id} {host.id}")
            for live in await world.listed(LIST_LIVENESS, HostLiveness):
                world.note(f"{live.host_name} is {live.state}, proof {live.proof}, fencing {live.fencing!r}")


def _machines(world: World) -> list[str]:
    found = [
        f"{replica.name} isn't ready" for replica in world.replicas.values() if not replica.service.ready
    ]
    for host in world.hosts.values():
        if not host.on and host.booting is None:
            host.power_on()  # whoever was switched off by a fence is switched on again by its administrator
        if not host.on:
            found.append(f"{host.name} is off")
    return found


async def _told(world: World) -> list[str]:
    """What the services themselves say is not settled."""
    found = []
    for owner in (Owner.INVENTORY, Owner.STORAGE, Owner.NETWORK, Owner.SCHEDULER, Owner.HA):
        for op in await world.listed(LIST_OPERATIONS[owner], Operation):
            if op.state not in ENDED:
                found.append(f"{op.kind} {op.id} of {op.object_name} is {op.state}")
    for host in await world.listed(LIST_HOSTS, Host):
        if host.status is not HostStatus.UP:
            found.append(f"host {host.name} is {host.status} {host.reasons}")
    running = {
        (vm_id, places) for vm_id in world.vms.values() for places in world.oracle.running.get(vm_id, {})
    }
    names = {host.host_id: host.name for host in world.hosts.values()}
    for claim in await world.listed(LIST_CLAIMS, Claim):
        if (claim.vm_id, names.get(claim.host_id, "")) not in running:
            found.append(
                f"claim of VM {claim.vm_id} on {names.get(claim.host_id)} epoch {claim.epoch}: it doesn't run there"
            )
    return found
