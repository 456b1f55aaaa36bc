"""Storage on a real host agent with qemu-img, and images of real bytes through the gateway."""

from __future__ import annotations

import asyncio
import hashlib
import random
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest

from api_gateway.config import GatewayConfig
from api_gateway.service import Gateway
from services.inventory.service import service as inventory
from services.storage.service import make_service
from tests.support.agent_host import iscsi_target
from tests.support.plane import (
    Agent,
    Plane,
    default_cluster,
    ended,
    enrolled_agent,
    plane_servers,
    running_plane,
    succeeded,
    until_host,
)
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.domain import ImageFormat
from volery.contracts.errors import Refused
from volery.contracts.host import HostStatus
from volery.contracts.operation import Operation
from volery.contracts.storage import (
    ACT_ON_STORAGE_DOMAIN,
    COPY_DISK,
    CREATE_DISK,
    CREATE_STORAGE_DOMAIN,
    DELETE_DISK,
    DELETE_STORAGE_DOMAIN,
    GET_DISK,
    GET_STORAGE_DOMAIN,
    RESIZE_DISK,
    ActOnStorageDomain,
    CopyDisk,
    CreateDisk,
    CreateStorageDomain,
    DeleteStorageDomain,
    Disk,
    DiskStatus,
    DomainKind,
    ResizeDisk,
    StorageDomain,
)
from volery.runtime.bus import Bus

MIB = 1024**2
PASSWORD = "correct horse battery"


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with plane_servers() as made:
        password = tmp_path / "password"
        password.write_text(PASSWORD)
        made.environ["VOLERY_INVENTORY_ADMIN_PASSWORD_FILE"] = str(password)
        made.environ["VOLERY_STORAGE_KEY_FILE"] = str(tmp_path / "storage.key")
        yield made


@dataclass
class Real:
    """A control plane with one host and one storage domain in a directory of its own."""

    bus: Bus
    http: httpx.AsyncClient
    agent: Agent
    domain: StorageDomain
    path: Path

    async def done(self, operation: Operation) -> Operation:
        return await succeeded(self.bus, operation)

    async def disk(self, name: str, **fields: object) -> Disk:
        ask = CreateDisk(name=name, storage_domain_id=self.domain.id, **fields)  # type: ignore[arg-type]
        op = await self.done(await self.bus.ask(CREATE_DISK, ask))
        return await self.bus.ask(GET_DISK, GetById(id=op.object_id))

    def volume(self, disk: Disk) -> Path:
        return self.path / self.domain.id / "disks" / f"{disk.id}.{disk.format}"

    async def post(self, path: str, body: dict[str, object] | None = None) -> str:
        """What an operation was about, once it has succeeded."""
        answer = await self.http.post(path, json=body or {})
        assert answer.status_code == 202, answer.text
        return (await self.until_succeeded(answer)).object_id

    async def until_succeeded(self, answer: httpx.Response) -> Operation:
        return await self.done(msgspec.json.decode(answer.content, type=Operation))

    async def why_failed(self, answer: httpx.Response) -> str:
        assert answer.status_code == 202, answer.text
        op = await ended(self.bus, msgspec.json.decode(answer.content, type=Operation))
        assert op.problem is not None, op
        return op.problem.message


@asynccontextmanager
async def real(plane: Plane, path: Path) -> AsyncIterator[Real]:
    gateway = Gateway(GatewayConfig(listen="127.0.0.1:0", ca=str(plane.home.ca_certificate)))
    path.mkdir()
    async with running_plane(plane, inventory, make_service(), gateway) as bus:
        cluster = await default_cluster(bus)
        agent = await enrolled_agent(bus, plane, cluster, "h1", VOLERY_AGENT_LIBVIRT_URI="test:///default")
        agent.start()
        try:
            host = await until_host(bus, agent.host.id, HostStatus.UP)
            domain = await made_domain(bus, host.data_center_id, path)
            await gateway.ready.wait()
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{gateway.port}/api/v1",
                timeout=60,
                verify=ssl.create_default_context(),
            ) as http:
                login = await http.post("/sessions", json={"name": "admin", "password": PASSWORD})
                assert login.status_code == 201, login.text
                http.headers["authorization"] = f"Bearer {login.json()['secret']}"
                yield Real(bus, http, agent, domain, path)
        except BaseException:
            print(agent.log())
            raise
        finally:
            agent.stop()


async def made_domain(bus: Bus, data_center_id: str, path: Path) -> StorageDomain:
    ask = CreateStorageDomain(
        name="real", kind=DomainKind.DIRECTORY, path=str(path), data_center_id=data_center_id
    )
    async with asyncio.timeout(20):
        while True:
            try:
                op = await bus.ask(CREATE_STORAGE_DOMAIN, ask)
                break
            except Refused:  # storage has not heard yet that the host is up
                await asyncio.sleep(0.05)
    op = await succeeded(bus, op)
    return await bus.ask(GET_STORAGE_DOMAIN, GetById(id=op.object_id))


def qemu_img(*arguments: str) -> str:
    return subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True).stdout


async def test_disks_on_a_real_directory(plane: Plane, tmp_path: Path) -> None:
    async with real(plane, tmp_path / "data") as at:
        assert at.domain.capacity_bytes > 0
        disk = await at.disk("d", size_bytes=8 * MIB)
        assert (
            msgspec.json.decode(qemu_img("info", "--output=json", str(at.volume(disk))))["virtual-size"]
            == 8 * MIB
        )
        await at.done(await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=12 * MIB)))
        grown = await at.bus.ask(GET_DISK, GetById(id=disk.id))
        assert grown.size_bytes == 12 * MIB
        copy = await at.done(
            await at.bus.ask(COPY_DISK, CopyDisk(id=disk.id, name="c", format=ImageFormat.RAW))
        )
        copied = await at.bus.ask(GET_DISK, GetById(id=copy.object_id))
        assert (copied.size_bytes, copied.format) == (12 * MIB, ImageFormat.RAW)
        assert at.volume(copied).stat().st_size == 12 * MIB
        (at.path / at.domain.id / "disks" / "mine.raw").write_bytes(b"x")
        await at.done(
            await at.bus.ask(ACT_ON_STORAGE_DOMAIN, ActOnStorageDomain(id=at.domain.id, action="refresh"))
        )
        found = await at.bus.ask(GET_STORAGE_DOMAIN, GetById(id=at.domain.id))
        assert [Path(p).name for p in found.strangers] == ["mine.raw"]
        for one in (disk, copied):
            await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=one.id)))
            assert not at.volume(one).exists()
        (at.path / at.domain.id / "disks" / "mine.raw").unlink()
        for action in ("maintain", "detach"):
            ask = ActOnStorageDomain(id=at.domain.id, action=action)
            await at.done(await at.bus.ask(ACT_ON_STORAGE_DOMAIN, ask))
        await at.bus.ask(DELETE_STORAGE_DOMAIN, DeleteStorageDomain(id=at.domain.id))
        async with asyncio.timeout(20):
            while list(at.path.iterdir()):
                await asyncio.sleep(0.05)


async def test_an_upload_goes_on_after_the_agent_was_killed(plane: Plane, tmp_path: Path) -> None:
    async with real(plane, tmp_path / "data") as at:
        content = random.Random(7).randbytes(6 * MIB)
        disk = await at.disk("d", size_bytes=8 * MIB, format="raw")
        sha256 = hashlib.sha256(content).hexdigest()
        transfer = await at.post(
            "/transfers",
            {"disk_id": disk.id, "direction": "upload", "size_bytes": len(content), "sha256": sha256},
        )
        data = f"/transfers/{transfer}/data"
        first = await at.http.put(data, content=content[: 2 * MIB])
        assert first.status_code == 200, first.text
        at.agent.kill()
        at.agent.start()
        async with asyncio.timeout(70):
            while (head := await at.http.head(data)).status_code != 200:
                await asyncio.sleep(0.1)
        received = int(head.headers["upload-offset"])
        assert received == 2 * MIB
        rest = await at.http.put(data, params={"offset": received}, content=content[received:])
        assert rest.status_code == 200, rest.text
        await at.post(f"/transfers/{transfer}/finish")
        disk = await at.bus.ask(GET_DISK, GetById(id=disk.id))
        assert (disk.status, disk.size_bytes, disk.sha256) == (DiskStatus.OK, 8 * MIB, sha256)
        assert at.volume(disk).read_bytes()[: len(content)] == content
        down = await at.post("/transfers", {"disk_id": disk.id, "direction": "download", "format": "raw"})
        got = await at.http.get(f"/transfers/{down}/data")
        assert got.content[: len(content)] == content
        assert len(got.content) == 8 * MIB
        await at.post(f"/transfers/{down}/finish")


async def test_images_go_to_a_lun_and_back_through_the_gateway(plane: Plane, tmp_path: Path) -> None:
    """On the LUN as on a file: what was there goes, what wasn't sent reads as zeros, and it is blank in the end."""
    user, password = "volery", "chap-secret-12"
    (tmp_path / "target").mkdir()
    with iscsi_target(tmp_path / "target", user, password) as target:
        backing = target.add_lun(1, 16 * MIB, thin=True)
        foreign = target.add_lun(2, 12 * MIB)
        foreign.write_bytes(b"somebody's".ljust(12 * MIB, b"\0"))
        async with real(plane, tmp_path / "data") as at:
            ask = CreateStorageDomain(
                name="san",
                kind=DomainKind.ISCSI,
                data_center_id=at.domain.data_center_id,
                portal=target.portal,
                iqn=target.iqn,
                chap_user=user,
                chap_password=password,
            )
            op = await at.done(await at.bus.ask(CREATE_STORAGE_DOMAIN, ask))
            san = await at.bus.ask(GET_STORAGE_DOMAIN, GetById(id=op.object_id))
            assert {lun.lun: lun.size_bytes for lun in san.luns} == {1: 16 * MIB, 2: 12 * MIB}
            made = await at.bus.ask(
                CREATE_DISK, CreateDisk(name="d", storage_domain_id=san.id, size_bytes=10 * MIB)
            )
            disk = await at.bus.ask(GET_DISK, GetById(id=(await at.done(made)).object_id))
            assert disk.lun == 1, "the smaller one has something on it"
            image = tmp_path / "image.qcow2"
            content = random.Random(5).randbytes(3 * MIB)
            (tmp_path / "raw").write_bytes(content.ljust(8 * MIB, b"\0"))
            qemu_img("convert", "-O", "qcow2", str(tmp_path / "raw"), str(image))
            sent = image.read_bytes()
            sha256 = hashlib.sha256(sent).hexdigest()
            body = {"disk_id": disk.id, "direction": "upload", "size_bytes": len(sent), "sha256": sha256}
            transfer = await at.post("/transfers", body)
            for offset in range(0, len(sent), MIB):
                piece = sent[offset : offset + MIB]
                put = await at.http.put(
                    f"/transfers/{transfer}/data", params={"offset": offset}, content=piece
                )
                assert put.status_code == 200, put.text
            await at.post(f"/transfers/{transfer}/finish")
            disk = await at.bus.ask(GET_DISK, GetById(id=disk.id))
            assert (disk.status, disk.sha256) == (DiskStatus.OK, sha256)
            assert backing.read_bytes() == content.ljust(16 * MIB, b"\0")
            for format, tail in (("raw", 16 * MIB), ("qcow2", 0)):
                down = await at.post(
                    "/transfers", {"disk_id": disk.id, "direction": "download", "format": format}
                )
                got = await at.http.get(f"/transfers/{down}/data")
                assert got.status_code == 200, got.text
                await at.post(f"/transfers/{down}/finish")
                if tail:
                    assert got.content == content.ljust(tail, b"\0")
            (tmp_path / "back.qcow2").write_bytes(got.content)
            qemu_img("compare", "-f", "qcow2", "-F", "raw", str(tmp_path / "back.qcow2"), str(backing))
            await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id)))
            assert not any(backing.read_bytes())
            assert foreign.read_bytes().startswith(b"somebody's")
            san = await at.bus.ask(GET_STORAGE_DOMAIN, GetById(id=san.id))
            assert san.strangers == ("lun 2",)


async def test_an_image_that_is_none_changes_nothing(plane: Plane, tmp_path: Path) -> None:
    async with real(plane, tmp_path / "data") as at:
        backing, evil = tmp_path / "backing.qcow2", tmp_path / "evil.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", str(backing), "4M")
        qemu_img("create", "-q", "-f", "qcow2", "-b", str(backing), "-F", "qcow2", str(evil))
        disk = await at.disk("d", size_bytes=8 * MIB)
        before = at.volume(disk).read_bytes()
        content = evil.read_bytes()
        transfer = await at.post(
            "/transfers", {"disk_id": disk.id, "direction": "upload", "size_bytes": len(content)}
        )
        put = await at.http.put(f"/transfers/{transfer}/data", content=content)
        assert put.status_code == 200, put.text
        answer = await at.http.post(f"/transfers/{transfer}/finish", json={})
        failed = await ended(at.bus, msgspec.json.decode(answer.content, type=Operation))
        assert failed.state == "failed"
        assert failed.problem is not None
        assert "backing" in failed.problem.message
        disk = await at.bus.ask(GET_DISK, GetById(id=disk.id))
        assert disk.status is DiskStatus.OK
        assert at.volume(disk).read_bytes() == before
        assert list((at.path / at.domain.id / "staging").iterdir()) == []
