"""What is lost at a bad moment: a fact of a host's, a host in the middle of an operation, what a database knew."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from sim import letters
from sim.faults import Scene
from sim.hypervisor import FINISH_SECONDS
from sim.letters import Letters
from sim.machines import HostMachine
from sim.oracle import Wish
from sim.overtaken import (
    another,
    booted,
    domains_of,
    ended_in_time,
    run_on,
    some_vm,
    started,
    stopped,
    succeeds,
)
from sim.postgres import Snapshot
from sim.promises import (
    CRASH_SECONDS,
    NOTICED_SECONDS,
    PROMISED_SECONDS,
    busy_host,
    managed,
    on_host,
    run_again,
)
from sim.world import World
from volery.contracts.base import Call, Owner
from volery.contracts.cluster import GetById
from volery.contracts.domain_orders import MIGRATE_DOMAIN, STOP_DOMAIN
from volery.contracts.errors import Refused
from volery.contracts.operation import Operation
from volery.contracts.vm import (
    GET_VM,
    MIGRATE_VM,
    START_VM,
    STOP_VM,
    DesiredState,
    MigrateVm,
    StartVm,
    StopVm,
    VmStatus,
)
from volery.runtime.relay import stream_name

SENT_SECONDS = 0.3
"""After something happened on a host: its agent has told it."""
SAID_SECONDS = 1.0
"""After something happened on a host: inventory has written it, and said so."""
SLOW_SECONDS = 2.0
"""From the bus to a host: much less than a doubt lasts."""
SETTLED_SECONDS = 60.0
"""After a restore: hosts have reported, and whatever inventory concludes from it is done."""
STREAM = stream_name(Owner.INVENTORY)
BACK_SECONDS = 120.0
"""After a host came back: its agent was heard, and what was open there is asked for again."""
LONG_MIGRATION_SECONDS = 40.0
STOP_SECONDS = 8.0
FINISHED_SECONDS = FINISH_SECONDS + 0.001
"""After the last phase of a migration began: it has ended, and nobody was told yet."""


def crash(world: World, host: HostMachine, vm_id: str) -> None:
    domain = host.daemon.domains[vm_id]
    world.note(f"{host.name}: {domain.name()} crashes")
    world.oracle.ended_by_itself(vm_id, asked=False)
    host.daemon.crash(domain, panic=False)


async def fact_is_lost(scene: Scene) -> None:
    """The server loses what a host told of a VM's crash; the host may tell more at once, or nothing more."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    elsewhere = [vm_id for vm_id, places in world.oracle.running.items() if host.name not in places]
    more = scene.chance.random() < 0.5
    if more and len(on_host(world, host)) < 2 and elsewhere:
        vm_id = scene.chance.choice(elsewhere)
        world.guests[vm_id].migration_seconds = 0.6
        if not await succeeds(world, "migrate", MIGRATE_VM, MigrateVm(id=vm_id, host_id=host.host_id)):
            return
    vm_ids = scene.chance.sample(on_host(world, host), len(on_host(world, host)))[: 1 + more]
    with letters.held_up(world, letters.facts_of(host.host_id)) as lost:
        crash(world, host, vm_ids[0])
        await lost.came.wait()
        await asyncio.sleep(SENT_SECONDS)
        world.note(f"{len(lost.kept)} facts of {host.name} are lost")
    for vm_id in vm_ids[1:]:
        world.reached.add("more was told at once")
        crash(world, host, vm_id)
    await run_again(world, vm_ids, CRASH_SECONDS, "it crashed, and the fact of it was lost once")


async def stream_is_lost(scene: Scene) -> None:
    """Inventory has said that a VM crashed, and NATS loses its store before ha, which stands still, has heard it."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id = some_vm(scene, host)
    heedless = [each for each in world.replicas.values() if each.name.startswith("ha")]
    world.note("ha is paused")
    world.trouble("", 1)
    for replica in heedless:
        replica.pause()
    crash(world, host, vm_id)
    await asyncio.sleep(SAID_SECONDS)
    world.server.stop()
    world.server.jetstream.lose()
    await scene.last("", "NATS away, its store lost", scene.seconds(1, 5))
    world.server.start()
    for replica in heedless:
        replica.go_on()
    world.trouble("", -1)
    world.note("ha goes on")
    await run_again(world, [vm_id], CRASH_SECONDS, "it crashed, and inventory's stream was lost")


async def _is_told(
    world: World, asked: Callable[[str, bytes], bool], begin: Call[Any, Operation], ask: Any
) -> Operation:
    """Begins an operation; returns when its host is sent the order."""
    told = Letters(world, asked)

    def overhear(subject: str, data: bytes, headers: Any) -> None:
        told.keep(subject, data, headers)

    world.server.overhears.append(overhear)
    begun = await world.ask(begin, ask)
    await told.came.wait()
    world.server.overhears.remove(overhear)
    return begun


async def dies_in_the_middle(scene: Scene) -> None:
    """A host dies while a VM of its moves or shuts down, and stays dead."""
    await _in_the_middle(scene, busy_host(scene, managed(scene.world)), comes_back=False)


async def comes_back_with_a_new_disk(scene: Scene) -> None:
    """Likewise; nobody can ask its BMC, and it comes back with nothing on its disk: that it beats is all there is."""
    await _in_the_middle(scene, busy_host(scene, scene.world.hosts.values()), comes_back=True)


async def boots_without_libvirt(scene: Scene) -> None:
    """A host boots again, nobody can ask its BMC, and libvirtd doesn't start: it can't report, but it beats."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_ids, bmc = on_host(world, host), world.bmcs[host.name]
    bmc.reachable = False
    world.note(f"{host.name}: no power for a moment, and nobody can ask its BMC")
    world.trouble(host.name, 1)
    host.lose_power()
    host.power_on()
    while not host.on:
        await asyncio.sleep(0.01)
    world.note(f"{host.name}: booted, without libvirtd")
    host.daemon.stop()
    await run_again(world, vm_ids, PROMISED_SECONDS, f"{host.name} has booted again")
    host.daemon.start()
    bmc.reachable = True
    world.trouble(host.name, -1)


async def _in_the_middle(scene: Scene, host: HostMachine | None, *, comes_back: bool) -> None:
    world = scene.world
    if host is None:
        return
    vm_id = some_vm(scene, host)
    others = [each for each in on_host(world, host) if each != vm_id]
    stops = scene.chance.random() < 0.5
    world.guests[vm_id].shutdown_seconds = None
    world.guests[vm_id].migration_seconds = LONG_MIGRATION_SECONDS
    world.oracle.asked(vm_id, 1)
    if stops:
        ask = StopVm(id=vm_id, timeout_seconds=3000)
        begun = await _is_told(world, letters.orders(STOP_DOMAIN, vm_id), STOP_VM, ask)
    else:
        move = MigrateVm(id=vm_id, timeout_seconds=600)
        begun = await _is_told(world, letters.orders(MIGRATE_DOMAIN, vm_id), MIGRATE_VM, move)
    await asyncio.sleep(scene.chance.uniform(0, 2))
    world.bmcs[host.name].reachable = not comes_back
    world.note(f"{host.name}: no power")
    world.trouble(host.name, 1)
    host.lose_power()
    if comes_back:
        host.disk.lose()
        host.power_on()
    await ended_in_time(world, begun, f"{host.name} died in the middle")
    world.oracle.asked(vm_id, -1)
    if world.oracle.violations:
        return
    if stops:
        world.oracle.want(vm_id, Wish.DOWN)
    await run_again(world, others if stops else [vm_id, *others], PROMISED_SECONDS, f"{host.name} died")
    host.power_on()
    await booted(world, host)
    world.bmcs[host.name].reachable = True


async def _restored(
    scene: Scene, backup: Snapshot, silent: HostMachine | None = None, *, anew: bool = False
) -> None:
    """One of the hosts may be cut off meanwhile, and what the server knows of inventory's stream may be long in coming.
    `anew`: the bus has forgotten everything, too."""
    world = scene.world
    with letters.held_up(world, letters.questions_about_streams(STREAM)):
        await _back_from(scene, backup, anew=anew)
        if silent is not None:
            world.note(f"{silent.name}: network cut")
            world.trouble(silent.name, 1)
            world.server.cut(silent.link)
        await asyncio.sleep(scene.chance.choice((0.0, 0.5, 5.0)))
    if silent is not None:
        await asyncio.sleep(scene.chance.uniform(10, 25))
        world.server.mend(silent.link)
        world.trouble(silent.name, -1)


async def _back_from(scene: Scene, backup: Snapshot, *, anew: bool) -> None:
    world = scene.world
    world.database.stop()
    if anew:
        world.server.stop()
        world.server.jetstream.lose()
        world.reached.add("NATS store lost")
    what = "PostgreSQL and NATS away, their disks lost" if anew else "PostgreSQL away, its disk lost"
    await scene.last("", what, scene.seconds(1, 10))
    world.restores += 1
    world.database.restore(backup)
    world.database.start()
    if anew:
        world.server.start()
    world.note("PostgreSQL is back, as it was when it was backed up")
    world.reached.add("PostgreSQL restored")


async def moved_since_the_backup(scene: Scene) -> None:
    """A VM runs on another host than the restored database says."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id = some_vm(scene, host)
    world.guests[vm_id].migration_seconds = 0.6
    backup = world.database.snapshot()
    for _ in range(scene.chance.choice((1, 2, 2, 3))):
        if not await succeeds(world, "migrate", MIGRATE_VM, MigrateVm(id=vm_id, timeout_seconds=60)):
            return
    there = next(world.hosts[name] for name in world.oracle.running[vm_id])
    domains = domains_of(world, world.vms.values())
    await _restored(scene, backup, scene.chance.choice((there, None)))
    await run_on(world, domains, SETTLED_SECONDS, "an older database ends nothing that runs")


async def started_since_the_backup(scene: Scene) -> None:
    """In the backup a VM shuts down; since then it did, and was started again elsewhere."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id = some_vm(scene, host)
    world.guests[vm_id].shutdown_seconds = STOP_SECONDS
    world.oracle.asked(vm_id, 1)
    ask = StopVm(id=vm_id, timeout_seconds=120)
    begun = await _is_told(world, letters.orders(STOP_DOMAIN, vm_id), STOP_VM, ask)
    await asyncio.sleep(scene.chance.uniform(0, STOP_SECONDS / 2))
    backup = world.database.snapshot()
    await world.ended(begun)
    world.oracle.asked(vm_id, -1)
    if not await started(world, vm_id, scene.chance.choice((host, another(scene, host)))):
        return
    domains = domains_of(world, [vm_id])
    await _restored(scene, backup)
    await run_on(world, domains, SETTLED_SECONDS, "it was started since the backup")
    vm = await world.ask(GET_VM, GetById(id=vm_id))
    if vm.status is not VmStatus.UP:
        world.oracle.broken(f"{vm.name} runs, and is shown as {vm.status}")
    world.oracle.want(vm_id, Wish.ANY)


async def made_anew_since_the_backup(scene: Scene) -> None:
    """The control plane is made anew from a backup beside an empty bus, and a VM runs elsewhere than that says: nobody but
    the hosts knows better."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id = some_vm(scene, host)
    world.guests[vm_id].migration_seconds = 0.6
    backup = world.database.snapshot()
    if scene.chance.random() < 0.5:
        done = await succeeds(world, "migrate", MIGRATE_VM, MigrateVm(id=vm_id, timeout_seconds=60))
    else:
        done = await stopped(world, vm_id) and await started(world, vm_id, another(scene, host))
    if not done:
        return
    await asyncio.sleep(SAID_SECONDS)
    there = next(world.hosts[name] for name in world.oracle.running[vm_id])
    domains = domains_of(world, world.vms.values())
    await _restored(scene, backup, scene.chance.choice((there, host, None)), anew=True)
    await run_on(
        world, domains, SETTLED_SECONDS, "an older database beside an empty bus ends nothing that runs"
    )
    if not world.database.rows(Owner.INVENTORY, "restore_base")[0]["base"]:
        world.oracle.broken("PostgreSQL was restored beside an empty bus, and inventory didn't notice it")
    vm = await world.ask(GET_VM, GetById(id=vm_id))
    if vm.host_id != there.host_id or vm.status is not VmStatus.UP:
        world.oracle.broken(f"{vm.name} runs on {there.name}, and is shown as {vm.status} on {vm.host_id}")


async def asked_for_when_made_anew(scene: Scene) -> None:
    """The same, but the VM is down in the backup, and people ask for it at once, while the way to the host where it runs is
    slow."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id, there = some_vm(scene, host), scene.chance.choice((host, another(scene, host)))
    if not await stopped(world, vm_id):
        return
    await asyncio.sleep(SAID_SECONDS)
    backup = world.database.snapshot()
    if not await started(world, vm_id, there):
        return
    await asyncio.sleep(SAID_SECONDS)
    domains = domains_of(world, [vm_id])
    there.link.delay_seconds = SLOW_SECONDS
    world.oracle.asked(vm_id, 1)
    await _back_from(scene, backup, anew=True)
    with contextlib.suppress(Refused):  # it runs, as soon as its host was heard
        await world.ended(await world.ask(START_VM, StartVm(id=vm_id)))
    world.oracle.asked(vm_id, -1)
    world.oracle.want(vm_id, Wish.ANY)
    there.link.delay_seconds = 0.0
    await run_on(world, domains, SETTLED_SECONDS, "it was started since the backup")


async def everywhere_since_the_backup(scene: Scene) -> None:
    """A VM was started on each host since the backup: whatever it is told after a restore must be newer than all that."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id = some_vm(scene, host)
    if not await stopped(world, vm_id):
        return
    backup = world.database.snapshot()
    for each in (*world.hosts.values(), *world.hosts.values()):  # more often than a start tries hosts
        if not (await started(world, vm_id, each) and await stopped(world, vm_id)):
            return
    await _restored(scene, backup)
    world.oracle.asked(vm_id, 1)
    await asyncio.sleep(SETTLED_SECONDS)
    done = await succeeds(world, "start", START_VM, StartVm(id=vm_id))
    world.oracle.asked(vm_id, -1)
    world.oracle.want(vm_id, Wish.UP if done else Wish.ANY)


async def source_dies_after_the_move(scene: Scene) -> None:
    """A VM has just arrived when its source dies, which never says so: it runs on where it is."""
    world, host = scene.world, busy_host(scene, managed(scene.world))
    if host is None:
        return
    vm_id = some_vm(scene, host)
    world.guests[vm_id].migration_seconds = 0.6
    finishes: asyncio.Future[HostMachine] = world.loop.create_future()

    def at(source: HostMachine, target: HostMachine, phase: str) -> None:
        if phase == "finish" and not finishes.done():
            finishes.set_result(target)

    others = [each for each in on_host(world, host) if each != vm_id]
    world.at_phase.append(at)
    begun = await world.ask(MIGRATE_VM, MigrateVm(id=vm_id, timeout_seconds=60))
    await finishes
    world.at_phase.remove(at)
    await asyncio.sleep(FINISHED_SECONDS)
    domains = domains_of(world, [vm_id])
    world.note(f"{host.name}: no power")
    world.trouble(host.name, 1)
    host.lose_power()
    await run_again(world, others, PROMISED_SECONDS, f"{host.name} died")
    await ended_in_time(world, begun, f"{host.name} died")
    if world.oracle.violations:
        return
    await run_on(world, domains, STOP_SECONDS, f"it had left {host.name} when that died")
    host.power_on()
    await booted(world, host)


async def destination_ends(scene: Scene) -> None:
    """QEMU ends on the destination while memory is copied: the VM runs on at its source."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id = some_vm(scene, host)
    world.guests[vm_id].migration_seconds = LONG_MIGRATION_SECONDS
    copies: asyncio.Future[HostMachine] = world.loop.create_future()

    def at(source: HostMachine, target: HostMachine, phase: str) -> None:
        if phase == "copy" and not copies.done():
            copies.set_result(target)

    world.at_phase.append(at)
    begun = await world.ask(MIGRATE_VM, MigrateVm(id=vm_id, timeout_seconds=60))
    target = await copies
    world.at_phase.remove(at)
    await asyncio.sleep(scene.chance.uniform(0, 3))
    domains = domains_of(world, [vm_id])
    world.note(f"{target.name}: what waits there for the migration ends")
    target.daemon.end(target.daemon.domains[vm_id], "failed")
    await ended_in_time(world, begun, "its destination ended it")
    await run_on(world, domains, STOP_SECONDS, "a migration that fails leaves it where it was")


async def stop_of_a_silent_host(scene: Scene) -> None:
    """A VM is asked to stop while nobody can reach its host; that comes back when the request has long failed."""
    world, host = scene.world, busy_host(scene, scene.world.hosts.values())
    if host is None:
        return
    vm_id, bmc = some_vm(scene, host), world.bmcs[host.name]
    bmc.reachable = False
    world.trouble(host.name, 1)
    world.note(f"{host.name}: network cut, that of its BMC too")
    world.server.cut(host.link)
    await asyncio.sleep(NOTICED_SECONDS)
    world.oracle.asked(vm_id, 1)
    begun = await world.ask(STOP_VM, StopVm(id=vm_id, force=True, timeout_seconds=10))
    await ended_in_time(world, begun, "it has a deadline")
    world.oracle.asked(vm_id, -1)
    wanted = (await world.ask(GET_VM, GetById(id=vm_id))).desired
    world.note(f"the stop failed, and the VM is wanted {wanted}")
    world.oracle.want(vm_id, Wish.DOWN if wanted is DesiredState.DOWN else Wish.UP)
    world.server.mend(host.link)
    bmc.reachable = True
    world.trouble(host.name, -1)
    await asyncio.sleep(BACK_SECONDS)
    vm = await world.ask(GET_VM, GetById(id=vm_id))
    if wanted is DesiredState.DOWN and world.oracle.running[vm_id]:
        world.oracle.broken(
            f"{vm.name} is {vm.status} and wanted {vm.desired}, busy with {vm.busy_with or 'nothing'}, and runs"
            f" {BACK_SECONDS:.0f} s after {host.name} came back"
        )
