"""A host that its administrator shuts down: its VMs end in order and its agent says why; a restart of the agent alone
touches none."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from host_agent.config import AgentConfig
from host_agent.shutdown import by_mark, by_systemd, end_guests
from tests.support.agent_process import AgentProcess, Listener, enrol_by_hand, listener
from tests.support.plain_bus import PlainBus
from tests.support.toy_host import HOST_ID, Control
from tests.support.vms import VmHost, tiny_spec
from volery.contracts.agent import CommittedWord, DomainChanged, OrderState
from volery.contracts.base import encode
from volery.contracts.domain import DomainSpec, DomainState
from volery.contracts.domain_orders import RUN_DOMAIN, RunDomain
from volery.contracts.metrics import Beat


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
    mark = {"VOLERY_AGENT_SHUTDOWN_MARK_PATH": str(tmp_path / "going-down")}
    process = AgentProcess(tmp_path / "state", mark)
    yield process
    process.kill()


@pytest.fixture
async def ear(bus: PlainBus, control: Control) -> AsyncIterator[Listener]:
    async with listener(bus, control) as heard:
        yield heard


async def running_vm(ear: Listener) -> str:
    vm_id = str(uuid.uuid4())
    spec = DomainSpec(vm_id=vm_id, name="web", title="a VM", memory_bytes=64 << 20, installation="test")
    run = await ear.order(RUN_DOMAIN, RunDomain(vm_id=vm_id, spec=spec), epoch=3)
    await ear.send(run)
    assert (await ear.finished(run)).problem is None
    return vm_id


def gone(ear: Listener) -> list[DomainChanged]:
    return [f for f in ear.of("inventory.domain_changed") if f.domain.state is DomainState.GONE]


async def test_a_host_that_is_shut_down_ends_its_vms_and_says_why(
    agent: AgentProcess, ear: Listener, tmp_path: Path
) -> None:
    agent.start()
    vm_id = await running_vm(ear)
    (tmp_path / "going-down").touch()
    assert agent.process is not None
    beats = await ear.client.subscribe(f"beat.host.{HOST_ID}")
    await ear.client.flush()
    assert not msgspec.json.decode((await beats.next_msg(5)).data, type=Beat).leaving
    agent.process.terminate()
    fact = (await ear.until(lambda: gone(ear)))[0]
    assert (fact.domain.vm_id, fact.domain.epoch, fact.domain.reason) == (vm_id, 3, "host_shutdown")
    async with asyncio.timeout(10):
        while not msgspec.json.decode((await beats.next_msg(5)).data, type=Beat).leaving:
            pass
    # It waits until somebody took note, and takes in nothing meanwhile.
    other = str(uuid.uuid4())
    spec = DomainSpec(vm_id=other, name="other", title="", memory_bytes=64 << 20, installation="test")
    refused = await ear.send(await ear.order(RUN_DOMAIN, RunDomain(vm_id=other, spec=spec), epoch=1))
    assert refused.state is OrderState.REFUSED
    assert refused.problem is not None
    assert "is being shut down" in refused.problem.message
    # What was said last is among it; a number it never said would make it an old copy.
    last = max(f.seq for name, f in ear.facts if name.startswith("inventory."))
    word = CommittedWord(host_id=HOST_ID, owner="inventory", generation=fact.generation, seq=last)
    await ear.client.publish(f"host.{HOST_ID}.committed", encode(word))
    assert await asyncio.to_thread(agent.stop) == 0
    assert "1 VMs were ended before" in agent.log


async def test_an_agent_that_is_ended_alone_ends_nothing(agent: AgentProcess, ear: Listener) -> None:
    agent.start()
    await running_vm(ear)
    assert await asyncio.to_thread(agent.stop) == 0
    assert gone(ear) == []
    assert "the agent ends: it was asked to" in agent.log


@pytest.mark.parametrize(
    ("said", "status", "going"),
    [("stopping", 1, True), ("running", 0, False), ("degraded", 1, False), ("offline", 1, False)],
)
async def test_what_systemd_says(tmp_path: Path, said: str, status: int, going: bool) -> None:
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\n[ "$1" = is-system-running ] && echo {said}\nexit {status}\n')
    systemctl.chmod(0o755)
    assert await by_systemd(AgentConfig(), str(systemctl)) is going


async def test_without_systemd_and_mark_nothing_is_shut_down(tmp_path: Path) -> None:
    assert not await by_systemd(AgentConfig(), str(tmp_path / "none"))
    assert not await by_mark(AgentConfig())
    assert not await by_mark(AgentConfig(shutdown_mark_path=str(tmp_path / "none")))


async def test_a_guest_that_does_not_listen_is_ended_after_its_time(qemu: VmHost) -> None:
    """One that has not booted hears no ACPI. A domain that isn't Volery's is left alone."""
    spec = tiny_spec(kernel_path="", initrd_path="", kernel_cmdline="")
    async with asyncio.timeout(60):
        await qemu.order(RUN_DOMAIN, RunDomain(vm_id=spec.vm_id, spec=spec), epoch=1)
        assert await end_guests(qemu.host.hypervisor, 0.5) == [spec.vm_id]
        assert (await qemu.host.hypervisor.domain(spec.vm_id)).state is DomainState.GONE
