"""Orders on domains on libvirt's test driver: what a repeat, an older order and a stranger's domain come to."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import libvirt
import pytest

from host_agent.domains import ACTIONS
from host_agent.events import EventName
from tests.support.vms import VmHost, new_uuid, nic, tiny_spec
from volery.contracts import domain_orders
from volery.contracts.base import Done, Order
from volery.contracts.domain import DomainDisk, DomainSpec, DomainState, FileSource, ImageFormat
from volery.contracts.domain_orders import (
    ACT_ON_DOMAIN,
    ADMIT_MIGRATION,
    ATTACH_DISK,
    FORGET_DOMAIN,
    MIGRATE_DOMAIN,
    OPEN_CONSOLE,
    SAVE_DOMAIN,
    STOP_DOMAIN,
    ActOnDomain,
    AdmitMigration,
    AttachDisk,
    DomainAction,
    ForgetDomain,
    MigrateDomain,
    MigrationAdmitted,
    SaveDomain,
    StopDomain,
    StopMethod,
)
from volery.contracts.errors import Kind, Refused


def spec(**changes: object) -> DomainSpec:
    disk = DomainDisk(
        disk_id=new_uuid(), source=FileSource(path="/d.qcow2", format=ImageFormat.QCOW2), target="vda"
    )
    return tiny_spec(**{"disks": (disk,), "nics": (nic("br0"),)} | changes)


def test_every_order_about_domains_has_its_action() -> None:
    orders = {o.kind for o in vars(domain_orders).values() if isinstance(o, Order)}
    assert {a.order.kind for a in ACTIONS} == orders - {OPEN_CONSOLE.kind}


async def test_running_twice_starts_one_domain(driver: VmHost) -> None:
    vm = spec()
    first, again = await driver.run(vm), await driver.run(vm)
    assert first == again
    report = await driver.hypervisor.domain(vm.vm_id)
    assert (report.epoch, report.order_seq, report.installation) == (1, 1, vm.installation)
    assert (report.disk_ids, report.nic_ids) == ((vm.disks[0].disk_id,), (vm.nics[0].nic_id,))
    await driver.power_off(vm.vm_id)
    await driver.until(lambda e: e.vm_id == vm.vm_id and e.state is DomainState.GONE)
    started = [e for e in driver.heard if e.vm_id == vm.vm_id and e.details.get("event") == "started"]
    assert len(started) == 1


async def test_a_later_epoch_takes_a_living_domain_over(driver: VmHost) -> None:
    vm = spec()
    await driver.run(vm, epoch=3)
    await driver.run(vm, epoch=5, order_seq=9)
    report = await driver.hypervisor.domain(vm.vm_id)
    assert (report.epoch, report.order_seq, report.state) == (5, 9, DomainState.RUNNING)
    assert not [e for e in driver.heard if e.state is DomainState.GONE]


async def test_a_domain_that_is_to_go_on_is_never_started_anew(driver: VmHost) -> None:
    """As the source of a migration that failed: it may have been reset since, and the VM be brought back elsewhere."""
    vm = spec()
    with pytest.raises(Refused, match="doesn't run on this host any more") as refused:
        await driver.run(vm, epoch=2, goes_on=True)
    assert refused.value.kind is Kind.CONFLICT
    assert (await driver.hypervisor.domain(vm.vm_id)).state is DomainState.GONE
    await driver.run(vm, epoch=3)
    await driver.run(vm, epoch=4, order_seq=2, goes_on=True)
    assert (await driver.hypervisor.domain(vm.vm_id)).epoch == 4


@pytest.mark.parametrize(
    "order",
    [
        (STOP_DOMAIN, StopDomain),
        (FORGET_DOMAIN, ForgetDomain),
    ],
)
async def test_an_order_of_an_earlier_epoch_is_stale(driver: VmHost, order: tuple) -> None:  # type: ignore[type-arg]
    vm = spec()
    await driver.run(vm, epoch=4)
    with pytest.raises(Refused) as refusal:
        await driver.order(order[0], order[1](vm_id=vm.vm_id), epoch=3)
    assert refusal.value.kind is Kind.STALE
    with pytest.raises(Refused) as refusal:
        await driver.run(vm, epoch=3)
    assert refusal.value.kind is Kind.STALE
    assert (await driver.hypervisor.domain(vm.vm_id)).state is DomainState.RUNNING


async def test_another_installations_domain_is_left_alone(driver: VmHost) -> None:
    theirs = spec(installation="other1")
    await driver.run(theirs)
    ours = tiny_spec(vm_id=theirs.vm_id, name=theirs.name)
    with pytest.raises(Refused, match="other1"):
        await driver.run(ours, epoch=9)
    await driver.power_off(theirs.vm_id)


async def test_a_domain_volery_did_not_make_is_left_alone(driver: VmHost) -> None:
    (stranger,) = [d for d in await driver.hypervisor.list_domains() if d.name == "test"]
    assert (stranger.installation, stranger.epoch) == ("", 0)
    for order, body in (
        (STOP_DOMAIN, StopDomain(vm_id=stranger.vm_id, methods=(StopMethod.DESTROY,))),
        (FORGET_DOMAIN, ForgetDomain(vm_id=stranger.vm_id)),
        (ACT_ON_DOMAIN, ActOnDomain(vm_id=stranger.vm_id, action=DomainAction.RESET)),
    ):
        with pytest.raises(Refused) as refusal:
            await driver.order(order, body, epoch=5)
        assert refusal.value.kind is Kind.CONFLICT
        assert "left alone" in refusal.value.message
    assert (await driver.hypervisor.domain(stranger.vm_id)).state is DomainState.RUNNING


async def test_paused_is_paused_and_pause_and_resume_repeat(driver: VmHost) -> None:
    vm = spec()
    assert (await driver.run(vm, paused=True)).state is DomainState.PAUSED
    for action, state in (
        (DomainAction.RESUME, DomainState.RUNNING),
        (DomainAction.RESUME, DomainState.RUNNING),
        (DomainAction.PAUSE, DomainState.PAUSED),
        (DomainAction.PAUSE, DomainState.PAUSED),
    ):
        assert await driver.order(ACT_ON_DOMAIN, ActOnDomain(vm_id=vm.vm_id, action=action)) == Done()
        assert (await driver.hypervisor.domain(vm.vm_id)).state is state


async def test_save_and_restore(driver: VmHost, tmp_path: Path) -> None:
    vm, path = spec(), tmp_path / "memory"
    await driver.run(vm)
    await driver.order(SAVE_DOMAIN, SaveDomain(vm_id=vm.vm_id, path=str(path)))
    assert (await driver.hypervisor.domain(vm.vm_id)).state is DomainState.GONE
    await driver.run(vm, epoch=2, restore_path=str(path))
    assert (await driver.hypervisor.domain(vm.vm_id)).epoch == 2
    assert not path.exists()
    path.write_text("left by an agent that died before it could remove it")
    await driver.run(vm, epoch=2, restore_path=str(path))
    assert not path.exists()


async def test_stopping_and_forgetting_what_is_not_here_succeeds(driver: VmHost) -> None:
    vm_id = new_uuid()
    assert (await driver.order(STOP_DOMAIN, StopDomain(vm_id=vm_id))).method is None
    assert await driver.order(FORGET_DOMAIN, ForgetDomain(vm_id=vm_id)) == Done()


async def test_forgetting_ends_an_earlier_placement(driver: VmHost) -> None:
    vm = spec()
    await driver.run(vm, epoch=2)
    assert await driver.order(FORGET_DOMAIN, ForgetDomain(vm_id=vm.vm_id), epoch=3) == Done()
    assert (await driver.hypervisor.domain(vm.vm_id)).state is DomainState.GONE


async def test_what_needs_a_running_vm_says_so(driver: VmHost) -> None:
    vm_id = new_uuid()
    for order, body in (
        (ACT_ON_DOMAIN, ActOnDomain(vm_id=vm_id, action=DomainAction.RESET)),
        (SAVE_DOMAIN, SaveDomain(vm_id=vm_id, path="/nowhere")),
        (ATTACH_DISK, AttachDisk(vm_id=vm_id, disk=DomainDisk(disk_id="d"))),
        (
            MIGRATE_DOMAIN,
            MigrateDomain(
                vm_id=vm_id,
                destination_uri="qemu+tcp://nowhere/system",
                destination_address="",
                destination_epoch=2,
                destination_order_seq=1,
            ),
        ),
    ):
        with pytest.raises(Refused) as refusal:
            await driver.order(order, body)
        assert refusal.value.kind is Kind.CONFLICT, order.kind
        assert vm_id in refusal.value.message


async def test_a_vm_that_is_here_can_not_arrive(driver: VmHost) -> None:
    vm = spec()
    assert await driver.order(ADMIT_MIGRATION, AdmitMigration(vm_id=vm.vm_id, spec=vm)) == MigrationAdmitted()
    await driver.run(vm)
    with pytest.raises(Refused, match="already on this host"):
        await driver.order(ADMIT_MIGRATION, AdmitMigration(vm_id=vm.vm_id, spec=vm), epoch=2)


async def test_a_name_that_is_taken_is_a_conflict(driver: VmHost) -> None:
    vm = spec()
    await driver.run(vm)
    with pytest.raises(Refused) as refusal:
        await driver.run(spec(name=vm.name))
    assert refusal.value.kind is Kind.CONFLICT
    assert vm.name in refusal.value.message


async def test_hostile_names_are_text_to_libvirt(driver: VmHost) -> None:
    title = "</title><devices/>\"&'\x00\x1b"
    vm = spec(title=title, hostname="'; rm -rf /")
    await driver.run(vm)
    xml = await driver.hypervisor.domain_xml(vm.vm_id)
    assert xml.count("<devices>") == 1


async def test_autostart_of_ours_is_switched_off(driver: VmHost) -> None:
    vm = spec()
    await driver.run(vm)
    connection = libvirt.open("test:///default")
    domain = connection.lookupByUUIDString(vm.vm_id)
    connection.defineXML(domain.XMLDesc(0)).setAutostart(1)
    assert await driver.hypervisor.forbid_autostart(vm.installation) == [vm.name]
    assert not domain.autostart()
    domain.undefine()
    connection.close()


async def test_a_cancelled_start_leaves_nothing_behind(driver: VmHost) -> None:
    vm = spec()
    starting = asyncio.create_task(driver.run(vm))
    await driver.until(lambda e: e.vm_id == vm.vm_id)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
        assert (await driver.hypervisor.domain(vm.vm_id)).state is DomainState.RUNNING
        return
    assert (await driver.hypervisor.domain(vm.vm_id)).state is DomainState.GONE


async def test_events_reach_every_listener_until_it_stops(driver: VmHost) -> None:
    vm = spec()
    heard: list[EventName] = []
    stop = driver.hypervisor.on_event(lambda e: heard.append(e.name))
    await driver.run(vm)
    await driver.until(lambda e: e.vm_id == vm.vm_id)
    assert heard
    stop()
    count = len(heard)
    await driver.power_off(vm.vm_id)
    await driver.until(lambda e: e.vm_id == vm.vm_id and e.state is DomainState.GONE)
    assert len(heard) == count
