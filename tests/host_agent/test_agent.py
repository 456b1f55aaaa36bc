"""The whole agent as a process, on libvirt's test driver and a real bus."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.agent_process import AgentProcess, Listener, enrol_by_hand, listener
from tests.support.plain_bus import PlainBus
from tests.support.toy_host import HOST_ID, Control
from volery.contracts.agent import (
    DESCRIBE_HOST,
    AskHost,
    CommittedWord,
    HostCapabilities,
    HostReported,
    OrderState,
    Outcome,
)
from volery.contracts.base import encode, fill
from volery.contracts.domain import DomainSpec
from volery.contracts.domain_orders import RUN_DOMAIN, STOP_DOMAIN, RunDomain, StopDomain, StopMethod


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
    late = await ear.order(RUN_DOMAIN, RunDomain(vm_id=vm_id, spec=spec(vm_id)), epoch=1)
    ack = await ear.send(late)
    assert ack.state is OrderState.REFUSED
    numbers = [fact.seq for name, fact in ear.facts if name.startswith("inventory.")]
    assert numbers == sorted(numbers)


async def test_it_describes_itself(agent: AgentProcess, ear: Listener) -> None:
    agent.start()
    await ear.until(lambda: ear.of("inventory.reported"))
    ask = AskHost(host_id=HOST_ID)
    answer = await ear.client.request(fill(DESCRIBE_HOST.subject, ask), encode(ask), timeout=5)
    assert msgspec.json.decode(answer.data, type=HostCapabilities).cpus > 0


async def test_a_report_that_is_asked_for_begins_a_new_base(agent: AgentProcess, ear: Listener) -> None:
    agent.start()
    first = (await ear.until(lambda: ear.of("inventory.reported")))[0]
    word = CommittedWord(host_id=HOST_ID, owner="inventory", generation="", seq=0)
    await ear.client.publish(f"host.{HOST_ID}.report", encode(word))
    again = (await ear.until(lambda: ear.of("inventory.reported")[1:]))[0]
    assert again.seq > first.seq
    assert again.after_seq == 0


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
