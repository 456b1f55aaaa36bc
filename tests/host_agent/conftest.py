"""Hosts for tests of the agent: libvirt's test driver, and libvirt daemons of our own with real QEMU guests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvloop

from host_agent.config import AgentConfig
from host_agent.hypervisor import Hypervisor
from tests.support.libvirt_host import LibvirtHost, new_host
from tests.support.lockspace import Joined, sanlock_daemon
from tests.support.vms import VmHost, vm_host


def pytest_asyncio_loop_factories() -> dict[str, object]:
    """The agent runs on uvloop, whose pipes and children differ from asyncio's: so do its tests."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def libvirt_host() -> Iterator[LibvirtHost]:
    """A libvirtd of our own, shared by a run's tests; each cleans up its domains."""
    host = new_host()
    host.run("ip", "link", "add", "br-one", "type", "bridge")
    host.run("ip", "link", "set", "br-one", "up")
    host.run("ip", "link", "add", "br-two", "type", "bridge")
    host.run("ip", "link", "set", "br-two", "up")
    yield host
    host.stop()


@pytest.fixture
async def qemu(libvirt_host: LibvirtHost, tmp_path: Path) -> AsyncIterator[VmHost]:
    """An agent's domain part on real QEMU."""
    async with vm_host(libvirt_host.uri, tmp_path) as made:
        yield made


@pytest.fixture
async def hypervisor() -> AsyncIterator[Hypervisor]:
    """What is asked which LUNs are open; here nothing is."""
    made = Hypervisor(AgentConfig(libvirt_uri="test:///default"))
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[VmHost]:
    """An agent's domain part on libvirt's test driver."""
    async with vm_host("test:///default", tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with sanlock_daemon(tmp_path_factory.mktemp("sanlock")):
        yield


@pytest.fixture
async def world(daemon: None, tmp_path: Path) -> Joined:
    """A host with a storage domain that could hold leases, and a sanlock daemon."""
    return await Joined.at(tmp_path)
