"""A host that is cut off while its qemu-img writes a volume: nobody else writes that one until it has ended, what is repeated
elsewhere is another volume's, and when it thaws every content is right. Two real agents, real images, a real iSCSI target.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.storage.domain_model import choose_host
from tests.storage.test_real_host import Real, plane, real
from tests.support.agent_host import IscsiTarget, iscsi_target, qemu_img
from tests.support.plane import Agent, Plane, ended, enrolled_agent, until_host
from volery.contracts.base import Owner
from volery.contracts.cluster import GET_CLUSTER, DeleteById, GetById
from volery.contracts.domain import ImageFormat
from volery.contracts.errors import Refused
from volery.contracts.host import HostStatus
from volery.contracts.ids import new_id
from volery.contracts.operation import CANCEL_OPERATION, GET_OPERATION, CancelOperation, GetOperation
from volery.contracts.storage import (
    CREATE_DISK,
    CREATE_STORAGE_DOMAIN,
    CREATE_TRANSFER,
    DELETE_DISK,
    GET_DISK,
    GET_STORAGE_DOMAIN,
    CreateDisk,
    CreateStorageDomain,
    CreateTransfer,
    Disk,
    DomainKind,
    StorageDomain,
)
from volery.contracts.volume_orders import TransferDirection

__all__ = ["plane"]

MIB = 1024**2
SIZE = 32 * MIB
KINDS = ("qcow2", "raw", "iscsi")


@dataclass
class Two:
    """Two hosts that reach one storage domain of the kind."""

    at: Real
    agents: dict[str, Agent]
    domain: StorageDomain
    kind: str
    luns: dict[int, Path] = field(default_factory=dict)

    def writer_of(self, disk_id: str) -> Agent:
        return self.agents[choose_host(self.agents, disk_id)]

    def disk_written_by(self, agent: Agent) -> str:
        return next(i for i in iter(new_id, "") if self.writer_of(i) is agent)

    async def disk(self, disk_id: str) -> Disk:
        return await self.at.bus.ask(GET_DISK, GetById(id=disk_id))

    def new_disk(self, disk_id: str, copy_of: str = "") -> CreateDisk:
        return CreateDisk(
            id=disk_id,
            name=disk_id[-4:],
            storage_domain_id=self.domain.id,
            size_bytes=SIZE,
            format=ImageFormat.QCOW2 if self.kind == "qcow2" else ImageFormat.RAW,
            copy_of=copy_of,
        )

    async def content(self, disk_id: str) -> str:
        disk = await self.disk(disk_id)
        if disk.lun >= 0:
            return sha256(self.luns[disk.lun].read_bytes()[:SIZE])
        whole = self.at.path / "whole"
        qemu_img("convert", "-f", disk.format, "-O", "raw", self.at.volume(disk), whole)
        try:
            return sha256(whole.read_bytes())
        finally:
            whole.unlink()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def durably(path: Path, content: bytes) -> None:
    """On the disk before anything else is: what databases sync meanwhile would wait for it."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def family(pid: int) -> list[int]:
    """The process and all that it has started."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:  # it has just ended
                continue
    return found


def is_converting(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"qemu-img\0convert\0")
    except OSError:
        return False


def frozen_while_it_converts(agent: Agent, seconds: float = 30.0) -> list[int]:
    """Cut off in the middle: the agent and its qemu-img stand still."""
    assert agent.process is not None
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        tools = [pid for pid in family(agent.process.pid)[1:] if is_converting(pid)]
        for pid in tools:
            os.kill(pid, signal.SIGSTOP)
        if tools:
            os.kill(agent.process.pid, signal.SIGSTOP)
            return [agent.process.pid, *tools]
        time.sleep(0.001)  # nothing tells that a tool has begun, and it is to be met in its middle
    raise AssertionError("it converts nothing")


@contextmanager
def thawed_at_the_end(pids: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def two(plane: Plane, tmp_path: Path, kind: str) -> AsyncIterator[Two]:
    async with real(plane, tmp_path / "data") as at:
        cluster = await at.bus.ask(GET_CLUSTER, GetById(id=at.agent.host.cluster_id))
        other = await enrolled_agent(at.bus, plane, cluster, "h2", VOLERY_AGENT_LIBVIRT_URI="test:///default")
        other.start()
        try:
            await until_host(at.bus, other.host.id, HostStatus.UP)
            agents = {agent.host.id: agent for agent in (at.agent, other)}
            if kind != "iscsi":
                await reached(at, at.domain, agents)
                yield Two(at, agents, at.domain, kind)
                return
            (tmp_path / "target").mkdir()
            with iscsi_target(tmp_path / "target", "volery", "chap-secret-12") as target:
                luns = {number: target.add_lun(number, SIZE) for number in (1, 2)}
                san = await san_at(at, target)
                await reached(at, san, agents)
                yield Two(at, agents, san, kind, luns)
        finally:
            other.stop()


async def san_at(at: Real, target: IscsiTarget) -> StorageDomain:
    ask = CreateStorageDomain(
        name="san",
        kind=DomainKind.ISCSI,
        data_center_id=at.domain.data_center_id,
        portal=target.portal,
        iqn=target.iqn,
        chap_user=target.user,
        chap_password=target.password,
    )
    op = await at.done(await at.bus.ask(CREATE_STORAGE_DOMAIN, ask))
    return await at.bus.ask(GET_STORAGE_DOMAIN, GetById(id=op.object_id))


async def reached(at: Real, domain: StorageDomain, agents: dict[str, Agent]) -> None:
    async with asyncio.timeout(30):
        while True:
            now = await at.bus.ask(GET_STORAGE_DOMAIN, GetById(id=domain.id))
            if set(now.host_ids) == set(agents):
                return
            await asyncio.sleep(0.05)


async def refused(at: Real, disk_id: str, operation_id: str) -> None:
    """Whatever would write the volume elsewhere is told who does."""
    for asked in (
        at.bus.ask(DELETE_DISK, DeleteById(id=disk_id)),
        at.bus.ask(
            CREATE_TRANSFER,
            CreateTransfer(disk_id=disk_id, direction=TransferDirection.UPLOAD, size_bytes=512),
        ),
    ):
        with pytest.raises(Refused) as by:
            await asked
        assert by.value.details["operation"] == operation_id


@pytest.mark.parametrize("kind", KINDS)
async def test_cut_off_in_a_copy(plane: Plane, tmp_path: Path, kind: str) -> None:
    async with two(plane, tmp_path, kind) as with_two:
        at = with_two.at
        source = await at.disk("source", size_bytes=SIZE, format="raw")
        content = random.Random(3).randbytes(SIZE)
        await asyncio.to_thread(durably, at.volume(source), content)
        one, other = with_two.agents.values()
        first, second = with_two.disk_written_by(one), with_two.disk_written_by(other)
        op = await at.bus.ask(CREATE_DISK, with_two.new_disk(first, source.id))
        pids = await asyncio.to_thread(frozen_while_it_converts, one)
        with thawed_at_the_end(pids):
            await refused(at, first, op.id)
            cancelling = await at.bus.ask(CANCEL_OPERATION[Owner.STORAGE], CancelOperation(id=op.id))
            assert cancelling.state == "cancelling"
            # Again, by the other host: another volume.
            again = await at.bus.ask(CREATE_DISK, with_two.new_disk(second, source.id))
            assert (await ended(at.bus, again)).state == "succeeded"
            await refused(at, first, op.id)
            still = await at.bus.ask(GET_OPERATION[Owner.STORAGE], GetOperation(id=op.id))
            assert still.state == "cancelling", "its first process isn't proven ended"
            assert (await with_two.disk(first)).busy_with == op.id
        assert (await ended(at.bus, op)).state == "cancelled"
        with pytest.raises(Refused, match="there is no disk"):
            await with_two.disk(first)
        assert await with_two.content(second) == sha256(content)
        assert await with_two.content(source.id) == sha256(content)
        if kind == "iscsi":
            used = (await with_two.disk(second)).lun
            left = next(path for lun, path in with_two.luns.items() if lun != used)
            assert not any(left.read_bytes())
        folder = at.path / at.domain.id
        kept = {source.id} if kind == "iscsi" else {source.id, second}
        assert {path.name.split(".")[0] for path in (folder / "disks").iterdir()} == kept
        assert list((folder / "staging").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_cut_off_while_an_upload_is_put_into_its_disk(
    plane: Plane,
    tmp_path: Path,
    kind: str,
) -> None:
    async with two(plane, tmp_path, kind) as with_two:
        at = with_two.at
        made = await at.bus.ask(CREATE_DISK, with_two.new_disk(new_id()))
        disk_id = (await at.done(made)).object_id
        contents = [random.Random(seed).randbytes(SIZE) for seed in (1, 2)]
        first = await uploaded(at, tmp_path, disk_id, kind, contents[0])
        op = (await at.http.post(f"/transfers/{first}/finish", json={})).json()
        transfer = (await at.http.get(f"/transfers/{first}")).json()
        pids = await asyncio.to_thread(frozen_while_it_converts, with_two.agents[transfer["host_id"]])
        with thawed_at_the_end(pids):
            await refused(at, disk_id, op["id"])
            assert (await with_two.disk(disk_id)).busy_with == op["id"]
        await at.done(await at.bus.ask(GET_OPERATION[Owner.STORAGE], GetOperation(id=op["id"])))
        assert await with_two.content(disk_id) == sha256(contents[0])
        # The next one is let in now, and nothing of the first comes after it.
        again = await uploaded(at, tmp_path, disk_id, kind, contents[1])
        await at.post(f"/transfers/{again}/finish")
        assert await with_two.content(disk_id) == sha256(contents[1])


async def uploaded(at: Real, tmp_path: Path, disk_id: str, kind: str, content: bytes) -> str:
    """The transfer with all its bytes, in a format that must be converted."""
    raw, image = tmp_path / "raw", tmp_path / "image"
    await asyncio.to_thread(durably, raw, content)
    format = "raw" if kind == "qcow2" else "qcow2"
    qemu_img("convert", "-f", "raw", "-O", format, raw, image)
    sent = image.read_bytes()
    body = {"disk_id": disk_id, "direction": "upload", "size_bytes": len(sent), "format": format}
    transfer = await at.post("/transfers", body)
    put = await at.http.put(f"/transfers/{transfer}/data", content=sent)
    assert put.status_code == 200, put.text
    return transfer
