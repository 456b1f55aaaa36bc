"""The whole agent as a process, on libvirt's test driver and a real bus."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sqlite3
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from host_agent.__main__ import ACTIONS
from host_agent.action import Action, Host
from host_agent.agent import Agent, libvirt_guests_enabled
from host_agent.config import AgentConfig
from host_agent.domxml import Placement, metadata_xml
from host_agent.events import EventName
from host_agent.facts import FactClass
from host_agent.journal import Journal
from tests.host_agent.test_killing import process_of
from tests.support import toy_agent
from tests.support.agent_process import AgentProcess, Listener, enrol_by_hand, listener
from tests.support.libvirt_host import LibvirtHost
from tests.support.plain_bus import PlainBus
from tests.support.toy_host import HOST_ID, TOY, Control, Toy, ToyDone, work
from volery.contracts import domain_orders, leases, network_orders, volume_orders
from volery.contracts.agent import (
    DESCRIBE_HOST,
    AskHost,
    CommittedWord,
    DomainReport,
    HostCapabilities,
    HostReported,
    OrderState,
    Outcome,
)
from volery.contracts.base import Order, encode, fill
from volery.contracts.domain import DomainDisk, DomainSpec, DomainState, FileSource, ImageFormat
from volery.contracts.domain_orders import (
    ACT_ON_DOMAIN,
    RUN_DOMAIN,
    STOP_DOMAIN,
    UNKILLABLE,
    ActOnDomain,
    DomainAction,
    RunDomain,
    StopDomain,
    StopMethod,
)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[PlainBus]:
    server = PlainBus(tmp_path / "bus")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def control() -> Control:
    return Control()


@pytest.fixture
def agent(tmp_path: Path, bus: PlainBus, control: Control) -> Iterator[AgentProcess]:
    enrol_by_hand(tmp_path / "state", control, bus.url)
    process = AgentProcess(tmp_path / "state")
    yield process
    process.kill()


@pytest.fixture
async def ear(bus: PlainBus, control: Control) -> AsyncIterator[Listener]:
    async with listener(bus, control) as heard:
        yield heard


def spec(vm_id: str) -> DomainSpec:
    return DomainSpec(
        vm_id=vm_id, name=f"vm-{vm_id[:8]}", title="a VM", memory_bytes=64 << 20, installation="test"
    )


def domains_told(ear: Listener, vm_id: str) -> list[DomainReport]:
    """By changes of the domain, or by reports that were under way."""
    return [
        domain
        for _, fact in ear.facts
        for domain in (*getattr(fact, "domains", ()), getattr(fact, "domain", None))
        if getattr(domain, "vm_id", "") == vm_id
    ]


async def test_it_reports_to_every_owner_and_beats(agent: AgentProcess, ear: Listener) -> None:
    agent.start()
    await ear.until(lambda: ear.of("storage.reported") and ear.of("network.reported"))
    report: HostReported = (await ear.until(lambda: ear.of("inventory.reported")))[0]
    assert report.host_id == HOST_ID
    assert (report.seq, report.after_seq, report.gap) == (1, 0, False)
    assert [domain.name for domain in report.domains] == ["test"]
    assert report.capabilities.cpus > 0
    beat = await ear.until(lambda: ear.beat)
    assert beat.generation == report.generation
    assert beat.boot_id == report.boot_id
    newer = await ear.until(lambda: ear.beat if ear.beat and ear.beat.beat_seq > beat.beat_seq else None)
    assert newer.hypervisor_ok
    assert agent.stop() == 0


async def test_it_runs_and_stops_a_domain_and_says_so(agent: AgentProcess, ear: Listener) -> None:
    agent.start()
    vm_id = str(uuid.uuid4())
    run = await ear.order(RUN_DOMAIN, RunDomain(vm_id=vm_id, spec=spec(vm_id)), epoch=1)
    assert (await ear.send(run)).state is OrderState.ACCEPTED
    finished = await ear.finished(run)
    assert finished.problem is None
    await ear.until(lambda: ear.of("inventory.domain_changed"))
    stop = await ear.order(STOP_DOMAIN, StopDomain(vm_id=vm_id, methods=(StopMethod.DESTROY,)), epoch=1)
    await ear.send(stop)
    assert (await ear.finished(stop)).outcome is Outcome.SUCCEEDED
    gone = await ear.until(
        lambda: [f for f in ear.of("inventory.domain_changed") if f.domain.state is DomainState.GONE]
    )
    assert (gone[0].domain.vm_id, gone[0].domain.epoch, gone[0].domain.reason) == (vm_id, 1, "destroyed")
    late = await ear.order(RUN_DOMAIN, RunDomain(vm_id=vm_id, spec=spec(vm_id)), epoch=1)
    ack = await ear.send(late)
    assert ack.state is OrderState.REFUSED
    numbers = [fact.seq for name, fact in ear.facts if name.startswith("inventory.")]
    assert numbers == sorted(numbers)


async def test_it_says_a_new_epoch_at_once_and_keeps_it_through_a_pause(
    agent: AgentProcess, ear: Listener
) -> None:
    agent.start()
    vm_id = str(uuid.uuid4())

    async def said(epoch: int, state: DomainState) -> None:
        await ear.until(
            lambda: [(d.epoch, d.state) for d in domains_told(ear, vm_id)][-1:] == [(epoch, state)]
        )

    await ear.send(await ear.order(RUN_DOMAIN, RunDomain(vm_id=vm_id, spec=spec(vm_id)), epoch=1))
    await said(1, DomainState.RUNNING)
    await ear.send(await ear.order(RUN_DOMAIN, RunDomain(vm_id=vm_id, spec=spec(vm_id)), epoch=2))
    await said(2, DomainState.RUNNING)
    pause = ActOnDomain(vm_id=vm_id, action=DomainAction.PAUSE)
    await ear.send(await ear.order(ACT_ON_DOMAIN, pause, epoch=2))
    await said(2, DomainState.PAUSED)


async def test_a_later_run_knows_what_was_told_of_a_qemu_that_libvirt_has_given_up_since(
    agent: AgentProcess, ear: Listener, tmp_path: Path
) -> None:
    """The test driver's domains end with the agent; a process in QEMU's place doesn't. An order named a later epoch."""
    vm_id = str(uuid.uuid4())
    disk = DomainDisk(
        disk_id=str(uuid.uuid4()), source=FileSource(path="/d", format=ImageFormat.RAW), target="vda"
    )
    agent.start()
    run = RunDomain(vm_id=vm_id, spec=msgspec.structs.replace(spec(vm_id), disks=(disk,)))
    for epoch in (3, 4):

        def told_under(epoch: int = epoch) -> bool:
            return any(domain.epoch == epoch for domain in domains_told(ear, vm_id))

        await ear.send(await ear.order(RUN_DOMAIN, run, epoch=epoch))
        await ear.until(told_under)
    act = await ear.order(ACT_ON_DOMAIN, ActOnDomain(vm_id=vm_id, action=DomainAction.RESET), epoch=5)
    await ear.send(act)
    await ear.finished(act)
    agent.kill()
    ear.facts.clear()
    async with process_of(vm_id, tmp_path):
        agent.start()
        (told, *_) = await ear.until(
            lambda: [d for d in domains_told(ear, vm_id) if d.reason == UNKILLABLE], 30
        )
    assert told.state is DomainState.RUNNING
    assert (told.epoch, told.disk_ids) == (4, (disk.disk_id,))


async def test_a_report_under_way_does_not_hide_what_changed_since_it_looked(
    tmp_path: Path, bus: PlainBus, control: Control, ear: Listener
) -> None:
    """A domain gets a new epoch between a report's listing and its writing, for which the journal is kept busy."""
    identity = enrol_by_hand(tmp_path / "state", control, bus.url)
    met: list[Host] = []
    listing, wanted = asyncio.Event(), False

    async def meet(host: Host) -> None:
        met.append(host)

    async def describe(_host: Host) -> HostCapabilities:
        if wanted:
            journal.execute("begin immediate")
            listing.set()
        return HostCapabilities(hostname="toy")

    senses = dataclasses.replace(toy_agent.PARTS.senses, describe=describe)
    parts = dataclasses.replace(toy_agent.PARTS, actions=ACTIONS, senses=senses, background=(meet,))
    settings = AgentConfig(
        state_dir=str(tmp_path / "state"), libvirt_uri="test:///default", beat_seconds=0.05
    )
    stop = asyncio.Event()
    running = asyncio.create_task(Agent(settings, identity, parts).run(stop))
    vm_id = str(uuid.uuid4())
    run = await ear.order(RUN_DOMAIN, RunDomain(vm_id=vm_id, spec=spec(vm_id)), epoch=1)
    await ear.send(run)
    assert (await ear.finished(run)).problem is None
    await ear.until(lambda: ear.of("network.reported"))
    with contextlib.closing(
        sqlite3.connect(tmp_path / "state/journal.sqlite", isolation_level=None)
    ) as journal:
        wanted = True
        word = CommittedWord(host_id=HOST_ID, owner="inventory", generation="", seq=0)
        await ear.client.publish(f"host.{HOST_ID}.report", encode(word))
        await listing.wait()
        wanted = False
        hypervisor = met[0].hypervisor
        await hypervisor.list_domains()
        with hypervisor.events() as events:
            await hypervisor.set_metadata(vm_id, metadata_xml("a VM", "test", Placement(2, 9)))
            async with asyncio.timeout(10):
                while (await events.get()).name is not EventName.METADATA_CHANGED:
                    pass
        await hypervisor.domain(vm_id)
        journal.execute("rollback")
    await hypervisor.pause(vm_id)
    await ear.until(lambda: [f for f in domains_told(ear, vm_id) if f.state is DomainState.PAUSED])
    assert domains_told(ear, vm_id)[-1].epoch == 2
    await hypervisor.destroy(vm_id)  # all of a process share the test driver's default host
    stop.set()
    assert await running == 0


async def test_it_describes_itself(agent: AgentProcess, ear: Listener) -> None:
    agent.start()
    await ear.until(lambda: ear.of("inventory.reported"))
    ask = AskHost(host_id=HOST_ID)
    answer = await ear.client.request(fill(DESCRIBE_HOST.subject, ask), encode(ask), timeout=5)
    assert msgspec.json.decode(answer.data, type=HostCapabilities).cpus > 0


async def test_a_report_that_is_asked_for_begins_a_new_base(agent: AgentProcess, ear: Listener) -> None:
    agent.start()
    first = (await ear.until(lambda: ear.of("inventory.reported")))[0]
    word = CommittedWord(host_id=HOST_ID, owner="inventory", generation="", seq=0, ask="the first")
    await ear.client.publish(f"host.{HOST_ID}.report", encode(word))
    # Another may come in between: libvirtd was connected to.
    again = (await ear.until(lambda: [r for r in ear.of("inventory.reported") if r.asked]))[0]
    assert again.seq > first.seq
    assert again.after_seq == 0
    assert (first.asked, again.asked) == ((), ("the first",))


async def test_a_journal_that_is_an_old_copy_gets_a_new_name(agent: AgentProcess, ear: Listener) -> None:
    agent.start()
    first = (await ear.until(lambda: ear.of("inventory.reported")))[0]
    word = CommittedWord(host_id=HOST_ID, owner="inventory", generation=first.generation, seq=10_000)
    await ear.client.publish(f"host.{HOST_ID}.committed", encode(word))
    again = (
        await ear.until(lambda: [f for f in ear.of("inventory.reported") if f.generation != first.generation])
    )[0]
    assert again.after_seq == 0
    beat = await ear.until(lambda: ear.beat if ear.beat and ear.beat.generation != first.generation else None)
    assert beat.generation == again.generation


async def test_it_ends_itself_when_too_many_threads_are_stuck(
    tmp_path: Path, bus: PlainBus, control: Control
) -> None:
    """The supervisor starts a new one, which has none."""
    identity = enrol_by_hand(tmp_path / "state", control, bus.url)

    async def get_stuck(host: Host) -> None:
        await host.hypervisor.wait_connected(10)
        host.hypervisor.stuck.add(host.config.max_abandoned_calls + 1)

    settings = AgentConfig(state_dir=str(tmp_path / "state"), libvirt_uri="test:///default")
    parts = dataclasses.replace(toy_agent.PARTS, background=(get_stuck,))
    async with asyncio.timeout(20):
        assert await Agent(settings, identity, parts).run(asyncio.Event()) == 75


async def test_orders_about_domains_wait_until_it_is_known_what_runs_here(
    tmp_path: Path, bus: PlainBus, control: Control, ear: Listener
) -> None:
    identity = enrol_by_hand(tmp_path / "state", control, bus.url)
    known = asyncio.Event()

    async def prepare(_host: Host) -> None:
        await known.wait()

    order = Order("domain.toy", Toy, ToyDone)
    actions = (*toy_agent.PARTS.actions, Action(order, work))
    parts = dataclasses.replace(toy_agent.PARTS, actions=actions, prepare=prepare)
    settings = AgentConfig(
        state_dir=str(tmp_path / "state"), libvirt_uri="test:///default", beat_seconds=0.05
    )
    stop = asyncio.Event()
    running = asyncio.create_task(Agent(settings, identity, parts).run(stop))
    domain = await ear.order(order, Toy(path=str(tmp_path / "marks"), mark="d"), object_id="a")
    other = await ear.order(TOY, Toy(path=str(tmp_path / "marks"), mark="o"), object_id="b")
    assert (await ear.send(domain)).state is OrderState.ACCEPTED
    await ear.send(other)
    await ear.finished(other)
    assert (tmp_path / "marks").read_text() == "oo."
    known.set()
    assert (await ear.finished(domain)).outcome is Outcome.SUCCEEDED
    stop.set()
    assert await running == 0


async def test_a_full_spool_ends_in_a_report_that_says_so(
    tmp_path: Path, bus: PlainBus, control: Control
) -> None:
    """With the bus away states are dropped; when it is back each owner gets the whole truth."""
    identity = enrol_by_hand(tmp_path / "state", control, bus.url)
    journal = await Journal.open(tmp_path / "state" / "journal.sqlite", "any", spool_max_bytes=2000)
    body = b'{"host_id":"h","generation":"","seq":0,"boot_id":"b","at":"2026-01-01T00:00:00Z","after_seq":0}'
    for n in range(100):
        await journal.put("inventory", f"fact.host.{HOST_ID}.inventory.toy", body, FactClass.STATE, f"k{n}")
    await journal.close()
    async with listener(bus, control) as ear:
        settings = AgentConfig(state_dir=str(tmp_path / "state"), libvirt_uri="test:///default")
        stop = asyncio.Event()
        running = asyncio.create_task(Agent(settings, identity, toy_agent.PARTS).run(stop))
        report = (await ear.until(lambda: ear.of("inventory.reported")))[0]
        assert report.gap
        assert report.after_seq == 0
        stop.set()
        assert await running == 0


async def test_neither_its_own_death_nor_libvirtds_touches_a_vm(
    tmp_path: Path, bus: PlainBus, control: Control, ear: Listener, libvirt_host: LibvirtHost
) -> None:
    """kill -9 of either: the same QEMU process runs on, and the host is reported as it is."""
    enrol_by_hand(tmp_path / "state", control, bus.url)
    agent = AgentProcess(tmp_path / "state", {"VOLERY_AGENT_LIBVIRT_URI": libvirt_host.uri})
    vm_id = str(uuid.uuid4())

    def reported(after: int) -> list[HostReported]:
        reports = ear.of("inventory.reported")
        return [r for r in reports if r.seq > after and vm_id in [d.vm_id for d in r.domains]]

    try:
        agent.start()
        run = await ear.order(RUN_DOMAIN, RunDomain(vm_id=vm_id, spec=spec(vm_id)), epoch=4)
        await ear.send(run)
        finished = await ear.finished(run, 90)
        assert finished.problem is None
        qemu = libvirt_host.qemu(vm_id)
        agent.kill()
        agent.start()
        report = (await ear.until(lambda: reported(finished.seq), 30))[0]
        assert [(d.epoch, d.state) for d in report.domains if d.vm_id == vm_id] == [(4, DomainState.RUNNING)]
        libvirt_host.kill_daemon()
        await ear.until(lambda: ear.beat is not None and not ear.beat.hypervisor_ok)
        libvirt_host.start_daemon()
        await ear.until(lambda: reported(report.seq), 30)
        assert libvirt_host.qemu(vm_id) == qemu
        stop = await ear.order(STOP_DOMAIN, StopDomain(vm_id=vm_id, methods=(StopMethod.DESTROY,)), epoch=4)
        await ear.send(stop)
        assert (await ear.finished(stop, 60)).outcome is Outcome.SUCCEEDED
    finally:
        agent.kill()
        subprocess.run(["virsh", "-q", "-c", libvirt_host.uri, "destroy", vm_id], capture_output=True)


def test_libvirt_guests_is_noticed(tmp_path: Path) -> None:
    assert not libvirt_guests_enabled(tmp_path)
    wants = tmp_path / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "libvirt-guests.service").symlink_to("/lib/systemd/system/libvirt-guests.service")
    assert libvirt_guests_enabled(tmp_path)


def test_every_order_of_the_contracts_has_one_action() -> None:
    kinds = [action.order.kind for action in ACTIONS]
    orders = {
        value.kind
        for module in (domain_orders, volume_orders, network_orders, leases)
        for value in vars(module).values()
        if isinstance(value, Order)
    }
    assert sorted(kinds) == sorted(orders)


async def test_a_second_agent_on_the_same_journal_does_not_start(agent: AgentProcess, ear: Listener) -> None:
    """Both would hear and obey every order."""
    agent.start()
    await ear.until(lambda: ear.of("inventory.reported"))
    second = AgentProcess(agent.state_dir)
    second.start()
    assert second.process is not None
    assert await asyncio.to_thread(second.process.wait, 20) == 78
    assert "another agent runs with" in agent.log


async def test_full_reports_come_from_time_to_time(agent: AgentProcess, ear: Listener) -> None:
    """An event that never came is mended without anybody asking."""
    agent.environment["VOLERY_AGENT_REPORT_SECONDS"] = "0.3"
    agent.start()
    reports = await ear.until(lambda: ear.of("inventory.reported")[2:])
    assert (reports[0].gap, reports[0].after_seq) == (False, 0)
    assert reports[0].seq >= 3
