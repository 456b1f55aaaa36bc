"""A directory that hosts share behaves in memory as the agent's real one: one suite for both."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from host_agent import storage, volumes
from host_agent.action import Action, Host
from sim.loop import new_loop
from sim.storage import HostStorage, Shelf
from tests.support.agent_host import make_host, running
from volery.contracts.agent import StorageDomainReport
from volery.contracts.base import Done, Message, Order
from volery.contracts.domain import FileSource, ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import (
    CONNECT_STORAGE,
    CREATE_VOLUME,
    DELETE_VOLUME,
    DISCONNECT_STORAGE,
    RESIZE_VOLUME,
    ConnectStorage,
    CreateVolume,
    DeleteVolume,
    DirectoryLocation,
    DisconnectStorage,
    ResizeVolume,
    VolumeInfo,
)

pytestmark = pytest.mark.timeout(120)

A = TypeVar("A")
MIB = 1 << 20
HOSTS = ("one", "two")
AWAY = {Kind.UNAVAILABLE, Kind.TIMEOUT}


class Storage(ABC):
    """One directory and two hosts that have it."""

    domain_id: str = ""
    path: str

    @abstractmethod
    async def order(self, host: str, order: Order[Any, A], body: Message) -> A:
        """What a host's agent comes to."""

    @abstractmethod
    async def report(self, host: str) -> tuple[StorageDomainReport, ...]: ...

    @abstractmethod
    def restarts(self, host: str) -> None:
        """The host's agent does."""

    @abstractmethod
    def goes_away(self) -> None:
        """From every host."""

    @abstractmethod
    def comes_back(self) -> None: ...

    @abstractmethod
    def opened(self, path: str) -> contextlib.AbstractContextManager[None]:
        """A running VM has the volume open, on the first host."""

    # Shorthand

    async def connect(self, host: str, *, initialise: bool = False) -> StorageDomainReport:
        where = DirectoryLocation(path=self.path)
        ask = ConnectStorage(domain_id=self.domain_id, location=where, initialise=initialise)
        return await self.order(host, CONNECT_STORAGE, ask)

    async def connected(self) -> None:
        """A new domain, on both hosts."""
        self.domain_id = new_id()
        for host in HOSTS:
            await self.connect(host, initialise=host == HOSTS[0])

    def source(self, disk_id: str) -> FileSource:
        path = f"{self.path}/{self.domain_id}/disks/{disk_id}.qcow2"
        return FileSource(path=path, format=ImageFormat.QCOW2)

    async def create(self, disk_id: str, size: int, host: str = HOSTS[0]) -> VolumeInfo:
        ask = CreateVolume(disk_id=disk_id, source=self.source(disk_id), size_bytes=size)
        return await self.order(host, CREATE_VOLUME, ask)

    async def resize(self, disk_id: str, size: int, host: str = HOSTS[0]) -> VolumeInfo:
        ask = ResizeVolume(disk_id=disk_id, source=self.source(disk_id), size_bytes=size)
        return await self.order(host, RESIZE_VOLUME, ask)

    async def delete(self, disk_id: str, host: str = HOSTS[0]) -> Done:
        return await self.order(
            host, DELETE_VOLUME, DeleteVolume(disk_id=disk_id, source=self.source(disk_id))
        )

    async def volumes(self, host: str) -> dict[str, int]:
        """Path and size of each that a host reports."""
        (report,) = await self.report(host)
        assert (report.domain_id, report.reachable, report.problem) == (self.domain_id, True, "")
        return {volume.path: volume.size_bytes for volume in report.volumes}


Case = Callable[[Storage], Awaitable[None]]


async def refused(order: Awaitable[Any], *kinds: Kind, **details: Any) -> None:
    with pytest.raises(Refused) as refusal:
        await order
    assert refusal.value.kind in kinds, refusal.value.message
    assert {name: refusal.value.details.get(name) for name in details} == details


async def a_domain_is_made_once_and_found_by_every_host(storage: Storage) -> None:
    storage.domain_id = new_id()
    await refused(storage.connect(HOSTS[0]), Kind.NOT_FOUND)
    assert await storage.report(HOSTS[0]) == ()
    for host in (*HOSTS, HOSTS[0]):
        report = await storage.connect(host, initialise=host == HOSTS[0])
        assert (report.domain_id, report.reachable, report.volumes) == (storage.domain_id, True, ())
        assert 0 < report.available_bytes <= report.capacity_bytes
        assert await storage.volumes(host) == {}
    for _ in range(2):
        gone = await storage.order(
            HOSTS[1], DISCONNECT_STORAGE, DisconnectStorage(domain_id=storage.domain_id)
        )
        assert gone == Done()
        assert await storage.report(HOSTS[1]) == ()
    assert await storage.volumes(HOSTS[0]) == {}


async def a_host_knows_what_it_has_connected_after_its_agent_was_restarted(storage: Storage) -> None:
    await storage.connected()
    disk = new_id()
    await storage.create(disk, 8 * MIB)
    storage.restarts(HOSTS[0])
    assert await storage.volumes(HOSTS[0]) == {storage.source(disk).path: 8 * MIB}
    assert await storage.delete(disk) == Done()


async def a_volume_is_made_once_and_seen_by_every_host(storage: Storage) -> None:
    await storage.connected()
    disk = new_id()
    made = await storage.create(disk, 8 * MIB)
    assert (made.size_bytes, made.format) == (8 * MIB, ImageFormat.QCOW2)
    assert await storage.create(disk, 8 * MIB, HOSTS[1]) == made
    await refused(storage.create(disk, 16 * MIB), Kind.CONFLICT, size_bytes=8 * MIB)
    for host in HOSTS:
        assert await storage.volumes(host) == {storage.source(disk).path: 8 * MIB}
    for host in reversed(HOSTS):
        assert await storage.delete(disk, host) == Done()
        assert await storage.volumes(host) == {}


async def a_volume_only_grows(storage: Storage) -> None:
    await storage.connected()
    disk = new_id()
    await refused(storage.resize(disk, 8 * MIB), Kind.NOT_FOUND)
    await storage.create(disk, 8 * MIB)
    for size in (16 * MIB, 16 * MIB):
        assert (await storage.resize(disk, size)).size_bytes == 16 * MIB
    await refused(storage.resize(disk, 8 * MIB), Kind.INVALID, size_bytes=16 * MIB)
    assert await storage.volumes(HOSTS[1]) == {storage.source(disk).path: 16 * MIB}


async def impossible_sizes_and_places_are_refused(storage: Storage) -> None:
    await storage.connected()
    disk = new_id()
    for size in (0, 100):
        await refused(storage.create(disk, size), Kind.INVALID)
        await refused(storage.resize(disk, size), Kind.INVALID)
    anothers = CreateVolume(disk_id=new_id(), source=storage.source(disk), size_bytes=8 * MIB)
    await refused(storage.order(HOSTS[0], CREATE_VOLUME, anothers), Kind.INVALID)
    await storage.order(HOSTS[1], DISCONNECT_STORAGE, DisconnectStorage(domain_id=storage.domain_id))
    for order in (storage.create(disk, 8 * MIB, HOSTS[1]), storage.resize(disk, 8 * MIB, HOSTS[1])):
        await refused(order, Kind.INVALID)
    await refused(storage.delete(disk, HOSTS[1]), Kind.INVALID)
    assert await storage.volumes(HOSTS[0]) == {}


async def what_a_vm_has_open_is_left_alone(storage: Storage) -> None:
    await storage.connected()
    disk = new_id()
    made = await storage.create(disk, 8 * MIB)
    path = storage.source(disk).path
    with storage.opened(path):
        for host in HOSTS:
            await refused(storage.resize(disk, 16 * MIB, host), Kind.CONFLICT)
            await refused(storage.delete(disk, host), Kind.CONFLICT)
        assert (await storage.create(disk, 8 * MIB)).size_bytes == made.size_bytes
        assert (await storage.resize(disk, 8 * MIB)).size_bytes == made.size_bytes
        assert await storage.volumes(HOSTS[1]) == {path: 8 * MIB}
    assert await storage.delete(disk) == Done()


async def nothing_is_done_on_storage_that_is_away(storage: Storage) -> None:
    await storage.connected()
    disk, other = new_id(), new_id()
    await storage.create(disk, 8 * MIB)
    storage.goes_away()
    await refused(storage.delete(disk), *AWAY)
    await refused(storage.resize(disk, 16 * MIB), *AWAY)
    await refused(storage.create(other, 8 * MIB), *AWAY)
    await refused(storage.connect(HOSTS[0]), *AWAY, Kind.NOT_FOUND)
    (report,) = await storage.report(HOSTS[0])
    assert (report.reachable, report.volumes, report.capacity_bytes) == (False, (), 0)
    assert report.problem
    gone = DisconnectStorage(domain_id=storage.domain_id)
    assert await storage.order(HOSTS[1], DISCONNECT_STORAGE, gone) == Done()
    storage.comes_back()
    assert await storage.volumes(HOSTS[0]) == {storage.source(disk).path: 8 * MIB}


SUITE: tuple[Case, ...] = (
    a_domain_is_made_once_and_found_by_every_host,
    a_host_knows_what_it_has_connected_after_its_agent_was_restarted,
    a_volume_is_made_once_and_seen_by_every_host,
    a_volume_only_grows,
    impossible_sizes_and_places_are_refused,
    what_a_vm_has_open_is_left_alone,
    nothing_is_done_on_storage_that_is_away,
)


async def carried_out(
    actions: tuple[Action[Any, Any], ...], host: Host, order: Order[Any, A], body: Message
) -> A:
    (run,) = (action.run for action in actions if action.order is order)
    return cast("A", await run(host, body, running()))


@dataclass
class RealStorage(Storage):
    """A directory, and two agents' state directories; away is what is there when a mount was lost."""

    top: Path

    def __post_init__(self) -> None:
        self.shared = self.top / "shared"
        self.shared.mkdir()
        self.path = str(self.shared)
        self.hosts = {name: make_host(self.top / name) for name in HOSTS}

    async def order(self, host: str, order: Order[Any, A], body: Message) -> A:
        return await carried_out((*storage.ACTIONS, *volumes.ACTIONS), self.hosts[host], order, body)

    async def report(self, host: str) -> tuple[StorageDomainReport, ...]:
        return await storage.report(self.hosts[host])

    def restarts(self, host: str) -> None:
        self.hosts[host] = make_host(self.top / host)

    def goes_away(self) -> None:
        self.shared.rename(self.top / "elsewhere")
        self.shared.mkdir()

    def comes_back(self) -> None:
        self.shared.rmdir()
        (self.top / "elsewhere").rename(self.shared)

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[None]:
        command = ["qemu-nbd", "--persistent", "-f", "qcow2", "-k", f"{self.top}/nbd.sock", path]
        pid_file = self.top / "nbd.pid"
        subprocess.run([*command[:1], "--fork", "--pid-file", str(pid_file), *command[1:]], check=True)
        pid = int(pid_file.read_text())
        descriptor = os.pidfd_open(pid)
        try:
            yield
        finally:
            os.kill(pid, 9)
            _wait_for_end(descriptor)


def _wait_for_end(descriptor: int) -> None:
    """A pidfd is readable once its process has ended."""
    with select.epoll() as poll:
        poll.register(descriptor, select.EPOLLIN)
        assert poll.poll(20)
    os.close(descriptor)


@dataclass
class SimulatedStorage(Storage):
    path: str = "/shared"
    shelf: Shelf = field(default_factory=Shelf)

    def __post_init__(self) -> None:
        self.disks: dict[str, dict[str, str]] = {name: {} for name in HOSTS}
        self.mounts: dict[str, set[str]] = {name: set() for name in HOSTS}
        self.hosts = {name: self._host(name) for name in HOSTS}

    def _host(self, name: str) -> HostStorage:
        return HostStorage(self.shelf, self.disks[name], lambda: self.shelf.up, self.mounts[name])

    async def order(self, host: str, order: Order[Any, A], body: Message) -> A:
        nobody = make_host(Path("/nowhere"))
        return await carried_out(self.hosts[host].actions(), nobody, order, body)

    async def report(self, host: str) -> tuple[StorageDomainReport, ...]:
        return await self.hosts[host].report(make_host(Path("/nowhere")))

    def restarts(self, host: str) -> None:
        self.hosts[host] = self._host(host)

    def goes_away(self) -> None:
        self.shelf.up = False

    def comes_back(self) -> None:
        self.shelf.up = True

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[None]:
        self.shelf.opened(path, HOSTS[0], "a VM")
        yield
        self.shelf.closed(path, HOSTS[0])


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.__name__)
def test_storage_in_memory(case: Case) -> None:
    loop = new_loop(600.0)

    async def main() -> None:
        await case(SimulatedStorage())

    loop.run(main())
    assert not loop.failed


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.__name__)
async def test_real_storage(case: Case, tmp_path: Path) -> None:
    await case(RealStorage(tmp_path))
