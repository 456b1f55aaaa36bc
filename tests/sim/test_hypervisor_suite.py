"""The hypervisor in memory behaves as libvirt and QEMU do: one suite for both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from host_agent import domxml
from host_agent.domxml import Placement
from host_agent.events import EventName
from host_agent.migration_parameters import MigrationStats
from host_agent.refusals import Disconnected, LibvirtError
from tests.sim.stage import STARTED, UNNOTICED, Case, Side, Stage, real_stage, simulated
from tests.support.bare_guest import AtButton
from tests.support.libvirt_host import LibvirtHost, join_networks, new_host
from tests.support.vms import new_uuid
from volery.contracts.domain import DomainDisk, DomainSpec, DomainState, FileSource, ImageFormat
from volery.contracts.domain_orders import StopMethod
from volery.contracts.errors import Kind, Refused

pytestmark = pytest.mark.timeout(120)

RUNS, PAUSED, INCOMING, GONE = (
    DomainState.RUNNING,
    DomainState.PAUSED,
    DomainState.INCOMING,
    DomainState.GONE,
)
ENDED = (GONE, "")
SYSTEM_ERROR, INTERNAL_ERROR = 38, 1
"""Of libvirt's numbers those that have no meaning of their own for the agent."""
STARTED_PAUSED = ("started/booted/running", "suspended/paused/paused")
DESTROYED = ("?shutdown/host/shutting_down", "stopped/destroyed/gone")
"""QEMU mostly gets to say that it was told to end."""
PANICKED = ("?suspended/paused/paused", "crashed/panicked/crashed", "stopped/crashed/gone")
POWERED_OFF = ("shutdown/guest/shutting_down", "stopped/shutdown/gone")
ARRIVES = "started/migrated/incoming"


async def refused(call: Awaitable[Any], kind: Kind, code: int, words: str | None = None) -> None:
    with pytest.raises(Refused, match=words) as refusal:
        await call
    assert (refusal.value.kind, refusal.value.details["libvirt_code"]) == (kind, code)


async def invalid(call: Awaitable[Any], words: str) -> None:
    """Refused since the domain isn't in a state for it."""
    await refused(call, Kind.CONFLICT, LibvirtError.OPERATION_INVALID, words)


async def breaks_off(move: Awaitable[Any]) -> None:
    """Its destination's QEMU has ended: libvirt says so by whichever of its two lines to that breaks first."""
    with pytest.raises(Refused, match=r"Unable to write to socket|closed the monitor") as refusal:
        await move
    code = refusal.value.details["libvirt_code"]
    assert code in (LibvirtError.OPERATION_FAILED, INTERNAL_ERROR)


async def is_aborted(move: Awaitable[Any]) -> None:
    """In its first moments libvirt mostly says why the destination's QEMU has ended, which is the same."""
    with pytest.raises(Refused, match=r"canceled by client|load of migration failed") as refusal:
        await move
    code = refusal.value.details["libvirt_code"]
    assert code in (LibvirtError.OPERATION_ABORTED, INTERNAL_ERROR)


def metadata(epoch: int) -> str:
    return domxml.metadata_xml("a test's VM", "testing", Placement(epoch, 1))


# One host


async def what_is_started_runs_and_is_listed(stage: Stage) -> None:
    vm, hypervisor = stage.vm(), stage.here.vms.hypervisor
    await stage.here.start(vm, epoch=3)
    assert await stage.here.state(vm) == (RUNS, "booted")
    await stage.here.hears(vm, *STARTED)
    (report,) = await hypervisor.list_domains()
    assert (report.vm_id, report.name, report.epoch, report.order_seq) == (vm.vm_id, vm.name, 3, 1)
    assert (report.installation, report.responsive, report.state) == ("testing", True, RUNS)
    assert (report.memory_bytes, report.vcpus) == (vm.memory_bytes, vm.vcpus)
    assert vm.vm_id in await hypervisor.domain_xml(vm.vm_id)
    await hypervisor.destroy(vm.vm_id)
    assert await stage.here.state(vm) == ENDED
    assert await hypervisor.list_domains() == []
    await stage.here.hears(vm, *STARTED, *DESTROYED)
    await refused(hypervisor.destroy(vm.vm_id), Kind.NOT_FOUND, LibvirtError.NO_DOMAIN)


async def what_is_paused_stands_still_until_it_is_resumed(stage: Stage) -> None:
    vm, hypervisor = stage.vm(AtButton.POWERS_OFF), stage.here.vms.hypervisor
    await stage.here.start(vm, paused=True)
    assert await stage.here.state(vm) == (PAUSED, "user")
    await stage.here.hears(vm, *STARTED_PAUSED)
    await hypervisor.pause(vm.vm_id)
    await invalid(hypervisor.shutdown(vm.vm_id, StopMethod.ACPI), "domain is not running")
    await invalid(hypervisor.shutdown(vm.vm_id, StopMethod.GUEST_AGENT), "domain is not running")
    await hypervisor.resume(vm.vm_id)
    assert await stage.here.state(vm) == (RUNS, "unpaused")
    await invalid(hypervisor.resume(vm.vm_id), "domain is already running")
    await hypervisor.pause(vm.vm_id)
    assert await stage.here.state(vm) == (PAUSED, "user")
    await hypervisor.destroy(vm.vm_id)
    turns = ("resumed/unpaused/running", "suspended/paused/paused")
    await stage.here.hears(vm, *STARTED_PAUSED, *turns, *DESTROYED)


async def an_id_and_a_name_are_taken_once(stage: Stage) -> None:
    vm = stage.vm()
    await stage.here.start(vm)
    await invalid(stage.here.start(vm, epoch=2), f"domain '{vm.name}' is already active")
    namesake = stage.vm(name=vm.name)
    taken = stage.here.start(namesake)
    await refused(taken, Kind.CONFLICT, LibvirtError.OPERATION_FAILED, f"already exists with uuid {vm.vm_id}")
    assert await stage.here.state(namesake) == ENDED
    assert [one.epoch for one in await stage.here.vms.hypervisor.list_domains()] == [1]
    await stage.here.hears(vm, *STARTED)
    assert stage.here.heard(namesake) == []


async def a_guest_hears_its_power_button_or_doesnt(stage: Stage) -> None:
    hears, deaf = stage.vm(AtButton.POWERS_OFF), stage.vm()
    hypervisor = stage.here.vms.hypervisor
    for vm in (hears, deaf):
        await stage.here.start(vm)
        await stage.here.hears(vm, *STARTED)
        agent = hypervisor.shutdown(vm.vm_id, StopMethod.GUEST_AGENT)
        await refused(agent, Kind.UNAVAILABLE, LibvirtError.AGENT_UNRESPONSIVE)
    await hypervisor.shutdown(deaf.vm_id, StopMethod.ACPI)
    await stage.here.at_last(hears, lambda: hypervisor.shutdown(hears.vm_id, StopMethod.ACPI))
    await stage.here.hears(hears, *STARTED, *POWERED_OFF)
    assert await stage.here.state(hears) == ENDED
    gone = hypervisor.shutdown(hears.vm_id, StopMethod.ACPI)
    await refused(gone, Kind.NOT_FOUND, LibvirtError.NO_DOMAIN)
    assert await stage.here.state(deaf) == (RUNS, "booted")
    assert stage.here.heard(deaf) == list(STARTED)


async def a_guest_powers_off_or_panics_by_itself(stage: Stage) -> None:
    off, panics = stage.vm(AtButton.POWERS_OFF), stage.vm(AtButton.PANICS)
    for vm in (off, panics):
        await stage.here.start(vm)
        await stage.here.hears(vm, *STARTED)
        await stage.here.at_last(vm, lambda vm=vm: stage.here.trouble.guest_acts(vm.vm_id))
    await stage.here.hears(off, *STARTED, *POWERED_OFF)
    await stage.here.hears(panics, *STARTED, *PANICKED)
    panic = await stage.here.vms.until(lambda e: e.vm_id == panics.vm_id and e.state is DomainState.CRASHED)
    assert (panic.name, panic.happened) == (EventName.PANIC, True)
    for vm in (off, panics):
        assert await stage.here.state(vm) == ENDED


async def a_qemu_dies(stage: Stage) -> None:
    vm = stage.vm()
    await stage.here.start(vm)
    await stage.here.trouble.qemu_dies(vm.vm_id)
    await stage.here.hears(vm, *STARTED, "stopped/failed/gone")
    assert await stage.here.state(vm) == ENDED


async def a_reset_is_the_machines_and_a_reboot_the_guests(stage: Stage) -> None:
    hears, deaf = stage.vm(AtButton.POWERS_OFF), stage.vm()
    hypervisor = stage.here.vms.hypervisor
    for vm in (hears, deaf):
        await stage.here.start(vm)
        await stage.here.hears(vm, *STARTED)
    await hypervisor.reboot(deaf.vm_id)
    await stage.here.at_last(hears, lambda: hypervisor.reboot(hears.vm_id))
    assert stage.here.heard(deaf) == list(STARTED)
    await hypervisor.reset(deaf.vm_id)
    await stage.here.vms.until(lambda e: e.vm_id == deaf.vm_id and e.name is EventName.REBOOT)
    for vm in (hears, deaf):
        assert await stage.here.state(vm) == (RUNS, "booted")
        assert set(stage.here.heard(vm)) == {*STARTED, "reboot"}  # as often as the chipset says so


async def what_isnt_here_is_gone_and_not_found(stage: Stage) -> None:
    hypervisor, vm_id = stage.here.vms.hypervisor, new_uuid()
    report = await hypervisor.domain(vm_id)
    assert (report.state, report.epoch, report.name) == (GONE, 0, "")
    calls = (
        hypervisor.domain_xml(vm_id),
        hypervisor.destroy(vm_id),
        hypervisor.reset(vm_id),
        hypervisor.reboot(vm_id),
        hypervisor.shutdown(vm_id, StopMethod.ACPI),
        hypervisor.pause(vm_id),
        hypervisor.resume(vm_id),
        hypervisor.set_metadata(vm_id, metadata(2)),
        hypervisor.abort_job(vm_id),
        hypervisor.job_stats(vm_id),
        hypervisor.set_max_downtime(vm_id, 300),
    )
    for call in calls:
        await refused(call, Kind.NOT_FOUND, LibvirtError.NO_DOMAIN)


async def a_domain_keeps_its_epoch(stage: Stage) -> None:
    vm, hypervisor = stage.vm(), stage.here.vms.hypervisor
    await stage.here.start(vm)
    for epoch in (5, 7):
        await hypervisor.set_metadata(vm.vm_id, metadata(epoch))
        assert (await hypervisor.domain(vm.vm_id)).epoch == epoch
    await stage.here.hears(vm, *STARTED, "metadata_changed", "metadata_changed")
    told = await stage.here.vms.until(lambda e: e.name is EventName.METADATA_CHANGED)
    assert told.details == {"kind": 2, "namespace": domxml.NAMESPACE}


async def without_a_job_there_is_none_to_end(stage: Stage) -> None:
    vm, hypervisor = stage.vm(), stage.here.vms.hypervisor
    await stage.here.start(vm)
    await invalid(hypervisor.abort_job(vm.vm_id), "no job is active")
    assert await hypervisor.job_stats(vm.vm_id) == MigrationStats()
    await hypervisor.set_max_downtime(vm.vm_id, 300)


async def a_disk_that_isnt_there_is_refused_before_anything_starts(stage: Stage) -> None:
    source = FileSource(path=f"{stage.directory}/none/disk.qcow2", format=ImageFormat.QCOW2)
    vm = stage.vm(disks=(DomainDisk(disk_id=new_uuid(), source=source, target="vda"),))
    missing = f"Path '{source.path}' is not accessible"
    await refused(stage.here.start(vm), Kind.INTERNAL, SYSTEM_ERROR, missing)
    assert await stage.here.state(vm) == ENDED
    assert stage.here.heard(vm) == []


async def libvirtd_dies_and_qemu_goes_on(stage: Stage) -> None:
    lives, dies, hypervisor = stage.vm(), stage.vm(), stage.here.vms.hypervisor
    for vm in (lives, dies):
        await stage.here.start(vm)
        await stage.here.hears(vm, *STARTED)
    stage.here.forget()
    await stage.here.trouble.libvirtd_dies()
    for call in (stage.here.state(lives), hypervisor.pause(lives.vm_id), stage.here.start(stage.vm())):
        with pytest.raises(Disconnected):
            await call
    await stage.here.vms.until(lambda e: e.name is EventName.DISCONNECTED)
    assert not hypervisor.connected
    await stage.here.trouble.qemu_dies(dies.vm_id)
    await stage.here.trouble.libvirtd_starts()
    await stage.here.vms.until(lambda e: e.name is EventName.CONNECTED)
    await stage.here.hears(dies, UNNOTICED)
    assert await stage.here.state(dies) == ENDED
    assert await stage.here.state(lives) == (RUNS, "booted")
    assert stage.here.heard(lives) == []


# Two hosts


async def nothing_is_left(side: Side, vm: DomainSpec) -> None:
    async with asyncio.timeout(20):
        while await side.state(vm) != ENDED:
            await asyncio.sleep(0.05)


async def a_move_arrives(stage: Stage) -> None:
    vm = stage.vm()
    await stage.here.start(vm)
    await stage.move(vm)
    assert await stage.here.state(vm) == ENDED
    assert await stage.there.state(vm) == (RUNS, "migrated")
    assert (await stage.there.vms.hypervisor.domain(vm.vm_id)).epoch == 2
    left = ("suspended/migrated/paused", "stopped/migrated/gone", "job_completed")
    await stage.here.hears(vm, *STARTED, *left)
    await stage.there.hears(vm, ARRIVES, "resumed/migrated/running")


async def what_was_paused_arrives_paused(stage: Stage) -> None:
    vm = stage.vm()
    await stage.here.start(vm, paused=True)
    await stage.move(vm)
    assert await stage.here.state(vm) == ENDED
    assert await stage.there.state(vm) == (PAUSED, "user")
    await stage.here.hears(vm, *STARTED_PAUSED, "stopped/migrated/gone", "job_completed")
    await stage.there.hears(vm, ARRIVES, "suspended/paused/paused")


async def a_move_that_is_aborted_leaves_it_where_it_was(stage: Stage) -> None:
    vm = stage.writing()
    move = await stage.moving(vm)
    assert 0.0 < (await stage.here.vms.hypervisor.job_stats(vm.vm_id)).percent < 100.0
    await invalid(stage.move(vm), "another migration job is already running")
    await invalid(stage.there.start(vm, epoch=3), "is already active")
    await stage.here.vms.hypervisor.abort_job(vm.vm_id)
    await is_aborted(move)
    assert await stage.here.state(vm) == (RUNS, "booted")
    assert (await stage.here.vms.hypervisor.domain(vm.vm_id)).epoch == 1
    await stage.there.hears(vm, ARRIVES, "stopped/failed/gone")
    assert await stage.there.state(vm) == ENDED
    assert stage.here.heard(vm) == []


async def a_move_to_where_nothing_can_arrive_is_refused(stage: Stage) -> None:
    vm = stage.vm()
    await stage.here.start(vm)
    nowhere = stage.move(vm, uri="qemu+unix:///system?socket=/nowhere")
    await refused(nowhere, Kind.INTERNAL, SYSTEM_ERROR)
    await stage.there.start(vm, epoch=2)
    await invalid(stage.move(vm), "is already active")
    for side in (stage.here, stage.there):
        assert await side.state(vm) == (RUNS, "booted")
        await side.hears(vm, *STARTED)


async def what_waits_at_the_destination_dies_or_is_ended(stage: Stage) -> None:
    dies, is_ended = stage.writing(), stage.writing()
    move = await stage.moving(dies)
    await stage.there.trouble.qemu_dies(dies.vm_id)
    await breaks_off(move)
    await stage.there.hears(dies, ARRIVES, "stopped/failed/gone")
    move = await stage.moving(is_ended)
    await stage.there.vms.hypervisor.destroy(is_ended.vm_id)
    await breaks_off(move)
    await stage.there.hears(is_ended, ARRIVES, *DESTROYED)
    for vm in (dies, is_ended):
        assert await stage.here.state(vm) == (RUNS, "booted")
        assert await stage.there.state(vm) == ENDED
        assert stage.here.heard(vm) == []


async def what_is_moved_ends(stage: Stage) -> None:
    async def powers_off(vm: DomainSpec) -> None:
        await stage.here.at_last(vm, lambda: stage.here.trouble.guest_acts(vm.vm_id))

    async def dies(vm: DomainSpec) -> None:
        await stage.here.trouble.qemu_dies(vm.vm_id)

    ways: tuple[tuple[Callable[[DomainSpec], Awaitable[None]], tuple[str, ...]], ...] = (
        (powers_off, POWERED_OFF),
        (dies, ("stopped/failed/gone",)),
    )
    for end, words in ways:
        vm = stage.writing()
        move = await stage.moving(vm)
        await end(vm)
        await refused(move, Kind.CONFLICT, LibvirtError.OPERATION_FAILED, "domain is not running")
        await stage.here.hears(vm, *words)
        await stage.there.hears(vm, ARRIVES, "stopped/failed/gone")
        for side in (stage.here, stage.there):
            assert await side.state(vm) == ENDED


async def what_is_paused_while_it_is_moved_runs_on_where_the_move_ends(stage: Stage) -> None:
    aborted, arrives = stage.writing(), stage.writing()
    hypervisor = stage.here.vms.hypervisor
    move = await stage.moving(aborted)
    await hypervisor.pause(aborted.vm_id)
    assert await stage.here.state(aborted) == (PAUSED, "migration")
    await hypervisor.abort_job(aborted.vm_id)
    await is_aborted(move)
    assert await stage.here.state(aborted) == (RUNS, "migration_canceled")
    await stage.here.hears(aborted, "suspended/migrated/paused", "resumed/migrated/running")
    move = await stage.moving(arrives)
    await hypervisor.pause(arrives.vm_id)
    await move
    assert await stage.there.state(arrives) == (RUNS, "migrated")
    left = ("suspended/migrated/paused", "stopped/migrated/gone", "job_completed")
    await stage.here.hears(arrives, *left)
    await stage.there.hears(arrives, ARRIVES, "resumed/migrated/running")


async def a_call_waits_for_the_move_and_is_given_up(stage: Stage) -> None:
    """What was given up still happens."""
    vm, hypervisor = stage.writing(), stage.here.vms.hypervisor
    move = await stage.moving(vm)
    with pytest.raises(Refused, match="Whether it still will is unknown") as refusal:
        await hypervisor.set_metadata(vm.vm_id, metadata(4))
    assert refusal.value.kind is Kind.TIMEOUT
    assert hypervisor.unresponsive == {vm.vm_id}
    assert not (await hypervisor.domain(vm.vm_id)).responsive
    with pytest.raises(Refused, match="power the VM off"):
        await hypervisor.resume(vm.vm_id)
    await hypervisor.abort_job(vm.vm_id)
    await is_aborted(move)
    for name in (EventName.METADATA_CHANGED, EventName.RESPONSIVE):
        await stage.here.vms.until(lambda e, name=name: e.name is name)
    assert set(stage.here.heard(vm)) == {"unresponsive", "metadata_changed", "responsive"}
    assert (await hypervisor.domain(vm.vm_id)).epoch == 4
    assert hypervisor.unresponsive == frozenset()


async def the_sources_libvirtd_dies(stage: Stage) -> None:
    vm = stage.writing()
    move = await stage.moving(vm)
    await stage.here.trouble.libvirtd_dies()
    with pytest.raises(Disconnected):
        await move
    await stage.there.hears(vm, ARRIVES, *DESTROYED)
    await stage.here.trouble.libvirtd_starts()
    await stage.here.vms.hypervisor.wait_connected(20)
    assert await stage.here.state(vm) == (RUNS, "booted")
    assert await stage.there.state(vm) == ENDED


async def the_destinations_libvirtd_dies(stage: Stage) -> None:
    vm = stage.writing()
    move = await stage.moving(vm)
    await stage.there.trouble.libvirtd_dies()
    await refused(move, Kind.INTERNAL, INTERNAL_ERROR, "client socket is closed")
    assert await stage.here.state(vm) == (RUNS, "booted")
    await stage.there.trouble.libvirtd_starts()
    await stage.there.vms.hypervisor.wait_connected(20)
    await nothing_is_left(stage.there, vm)
    await stage.there.hears(vm, ARRIVES, UNNOTICED)
    assert stage.here.heard(vm) == []


SUITE: tuple[Case, ...] = (
    what_is_started_runs_and_is_listed,
    what_is_paused_stands_still_until_it_is_resumed,
    an_id_and_a_name_are_taken_once,
    a_guest_hears_its_power_button_or_doesnt,
    a_guest_powers_off_or_panics_by_itself,
    a_qemu_dies,
    a_reset_is_the_machines_and_a_reboot_the_guests,
    what_isnt_here_is_gone_and_not_found,
    a_domain_keeps_its_epoch,
    without_a_job_there_is_none_to_end,
    a_disk_that_isnt_there_is_refused_before_anything_starts,
    libvirtd_dies_and_qemu_goes_on,
    a_move_arrives,
    what_was_paused_arrives_paused,
    a_move_that_is_aborted_leaves_it_where_it_was,
    a_move_to_where_nothing_can_arrive_is_refused,
    what_waits_at_the_destination_dies_or_is_ended,
    what_is_moved_ends,
    what_is_paused_while_it_is_moved_runs_on_where_the_move_ends,
    a_call_waits_for_the_move_and_is_given_up,
    the_sources_libvirtd_dies,
    the_destinations_libvirtd_dies,
)


@pytest.fixture(scope="module")
def cabled() -> Iterator[tuple[tuple[LibvirtHost, LibvirtHost], str]]:
    """Two hosts with a cable between them, and the second one's address."""
    machines = (new_host(), new_host())
    try:
        _, address = join_networks(*machines)
        yield machines, address
    finally:
        for machine in machines:
            machine.stop()


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.__name__)
def test_the_hypervisor_in_memory(case: Case, tmp_path: Path) -> None:
    simulated(case, tmp_path)


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.__name__)
async def test_the_real_hypervisor(
    case: Case, cabled: tuple[tuple[LibvirtHost, LibvirtHost], str], tmp_path: Path
) -> None:
    machines, address = cabled
    async with real_stage(machines, address, tmp_path) as stage:
        await case(stage)
