"""Uploads through the real HTTPS server, with real images, a killed agent, a full disk and LUNs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from host_agent import transfers
from host_agent.hypervisor import Hypervisor
from tests.host_agent.test_volumes import hostile_images
from tests.support.agent_host import IscsiTarget, iscsi_target, make_host, qemu_img, running
from tests.support.certificates import make_certificate
from tests.support.storage_domain import MIB, connect_target, connected_domain, lun
from tests.support.transfers import (
    TICKET,
    Transfers,
    converted,
    disk_of,
    noise,
    reachable,
    serving,
    stream,
)
from volery.contracts.domain import ImageFormat
from volery.contracts.errors import Kind, Problem, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import (
    FinishTransfer,
    OpenTransfer,
    TransferDirection,
    TransferOpened,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def made(tmp_path: Path, hypervisor: Hypervisor) -> AsyncIterator[Transfers]:
    async with serving(tmp_path, hypervisor) as made:
        yield made


@pytest.mark.parametrize("format", list(ImageFormat))
async def test_a_raw_upload_becomes_the_volume(made: Transfers, format: ImageFormat) -> None:
    data = noise(3 * MIB) + bytes(20 * MIB) + noise(MIB + 512, 2)
    _, source = await made.domain.create(format, 64 * MIB)
    order = await made.upload(source, data)
    staged = made.domain.staging / f"{order.transfer_id}.upload"
    assert staged.stat().st_blocks * 512 < 6 * MIB, "holes must stay holes"
    digest = hashlib.sha256(data).hexdigest()
    info = await made.finish(order, digest.upper())
    assert info.sha256 == digest
    assert info.size_bytes == 64 * MIB, "a larger volume keeps its size"
    assert info.used_bytes < 8 * MIB
    assert converted(source) == data.ljust(64 * MIB, b"\0")
    assert made.domain.leftovers() == []
    assert (await made.client.head(f"/images/{order.ticket}")).status_code == 404
    repeat = await made.finish(order, digest)
    assert repeat.size_bytes == 64 * MIB


async def test_a_raw_image_as_large_as_its_volume_is_not_copied(made: Transfers) -> None:
    source = made.domain.source(new_id(), ImageFormat.RAW)
    order = await made.upload(source, noise(4 * MIB))
    inode = (made.domain.staging / f"{order.transfer_id}.upload").stat().st_ino
    await made.finish(order)
    assert os.stat(source.path).st_ino == inode
    assert os.stat(source.path).st_mode & 0o777 == 0o660


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi", "vhdx"])
async def test_images_of_other_formats_areconverted(made: Transfers, format: str, tmp_path: Path) -> None:
    plain = tmp_path / "plain.raw"
    plain.write_bytes(noise(5 * MIB))
    qemu_img("convert", "-f", "raw", "-O", format, plain, tmp_path / "image")
    source = made.domain.source(new_id())
    order = await made.upload(source, (tmp_path / "image").read_bytes())
    info = await made.finish(order)
    assert info.format is ImageFormat.QCOW2
    assert converted(source)[: 5 * MIB] == plain.read_bytes()


async def test_an_upload_resumes_where_it_was(made: Transfers) -> None:
    data = noise(9 * MIB)
    source = made.domain.source(new_id(), ImageFormat.RAW)
    order, _ = await made.open(TransferDirection.UPLOAD, source, len(data))
    url = f"/images/{order.ticket}"
    first = await made.client.put(url, content=data[: 2 * MIB])
    assert first.json()["received_bytes"] == 2 * MIB
    with pytest.raises(Refused, match="send the rest") as refused:
        await made.finish(order)
    assert refused.value.details == {"received_bytes": 2 * MIB, "size_bytes": 9 * MIB}

    ranged = {"Content-Range": f"bytes {2 * MIB}-{4 * MIB - 1}/{9 * MIB}"}
    assert (await made.client.put(url, content=data[2 * MIB : 4 * MIB], headers=ranged)).status_code == 200
    head = await made.client.head(url)
    assert (head.headers["Upload-Offset"], head.headers["Upload-Length"]) == (str(4 * MIB), str(9 * MIB))
    beyond = await made.client.put(f"{url}?offset={5 * MIB}", content=b"x")
    assert beyond.status_code == 409
    assert msgspec.json.decode(beyond.content, type=Problem).kind is Kind.CONFLICT
    # again from an earlier byte: what was sent twice is taken from the second time
    again = await made.client.put(f"{url}?offset={3 * MIB}", content=stream(data[3 * MIB :]))
    assert again.json()["received_bytes"] == 9 * MIB
    info = await made.finish(order, hashlib.sha256(data).hexdigest())
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    assert Path(source.path).read_bytes() == data


async def interrupted(
    data: bytes, kill_after: int, server: asyncio.subprocess.Process
) -> AsyncIterator[bytes]:
    """The data, up to the byte at which the server is killed."""
    sent = 0
    async for piece in stream(data):
        yield piece
        sent += len(piece)
        if sent >= kill_after:
            server.send_signal(signal.SIGKILL)
            await server.wait()
            return


async def test_an_upload_survives_a_killed_agent(tmp_path: Path) -> None:
    host = make_host(tmp_path / "state")
    certificate = make_certificate(tmp_path / "state" / "identity")
    domain = await connected_domain(host, tmp_path / "storage")
    data = noise(64 * MIB)
    source = domain.source(new_id(), ImageFormat.RAW)
    order = OpenTransfer(
        transfer_id=new_id(),
        disk_id=disk_of(source),
        ticket=TICKET,
        direction=TransferDirection.UPLOAD,
        source=source,
        size_bytes=len(data),
    )
    trust = ssl.create_default_context(cafile=str(certificate))
    received = 0
    for attempt in range(4):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.data_program", str(tmp_path / "state")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(order))
        process.stdin.close()
        opened = msgspec.json.decode(await process.stdout.readline(), type=TransferOpened)
        assert opened.received_bytes >= received
        received = opened.received_bytes

        async with httpx.AsyncClient(
            base_url=f"https://{opened.data_address}", verify=trust, timeout=60
        ) as client:
            await reachable(client)
            kill_after = (attempt + 1) * 10 * MIB if attempt < 3 else len(data)
            body = interrupted(data[received:], kill_after, process)
            put = client.put(f"/images/{TICKET}?offset={received}", content=body)
            if attempt < 3:
                with pytest.raises(httpx.HTTPError):
                    await put
            else:
                assert (await put).json()["received_bytes"] == len(data)
                process.kill()
                await process.wait()
    assert received > 10 * MIB, "nothing was kept of the interrupted uploads"
    finish = FinishTransfer(
        transfer_id=order.transfer_id,
        disk_id=order.disk_id,
        target=source,
        max_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    # A server that is killed just then leaves this, too.
    (domain.staging / f".{order.transfer_id}.upload.json.1").write_text("{")
    await transfers.finish_transfer(make_host(tmp_path / "state"), finish, running())
    assert Path(source.path).read_bytes() == data
    assert domain.leftovers() == []


async def test_after_a_power_cut_only_what_was_synced_counts(made: Transfers, tmp_path: Path) -> None:
    data = noise(4 * MIB)
    source = made.domain.source(new_id(), ImageFormat.RAW)
    order, _ = await made.open(TransferDirection.UPLOAD, source, len(data))
    await made.client.put(f"/images/{order.ticket}", content=data[: 2 * MIB])
    staged = made.domain.staging / f"{order.transfer_id}.upload"
    with staged.open("ab") as file:  # what the kernel had in memory, and now may be anything
        file.write(b"?" * MIB)
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another-boot\n")
    rebooted = make_host(tmp_path / "state", boot_id_path=str(boot_id))
    opened = await transfers.open_transfer(rebooted, order, running())
    assert opened.received_bytes == 2 * MIB


async def test_a_new_request_takes_over_from_one_that_hangs(made: Transfers) -> None:
    data = noise(4 * MIB)
    source = made.domain.source(new_id(), ImageFormat.RAW)
    order, _ = await made.open(TransferDirection.UPLOAD, source, len(data))
    sent = asyncio.Event()

    async def hanging() -> AsyncIterator[bytes]:
        yield data[:MIB]
        sent.set()
        await asyncio.Event().wait()

    old = asyncio.create_task(made.client.put(f"/images/{order.ticket}", content=hanging()))
    await sent.wait()
    new = await made.client.put(f"/images/{order.ticket}?offset=0", content=data)
    assert new.json()["received_bytes"] == len(data)
    old.cancel()
    await asyncio.gather(old, return_exceptions=True)
    await made.finish(order, hashlib.sha256(data).hexdigest())


async def test_more_than_announced_is_refused(made: Transfers) -> None:
    source = made.domain.source(new_id(), ImageFormat.RAW)
    order, _ = await made.open(TransferDirection.UPLOAD, source, MIB)
    url = f"/images/{order.ticket}"
    announced = await made.client.put(url, content=bytes(MIB + 1))
    assert announced.status_code == 413
    assert (await made.client.put(url, content=stream(bytes(8 * MIB)))).status_code == 413
    staged = made.domain.staging / f"{order.transfer_id}.upload"
    assert staged.stat().st_size <= MIB
    assert (await made.client.put(url, content=bytes(MIB))).status_code == 200


async def test_wrong_tickets_and_requests(made: Transfers) -> None:
    source = made.domain.source(new_id(), ImageFormat.RAW)
    order, _ = await made.open(TransferDirection.UPLOAD, source, MIB)
    url = f"/images/{order.ticket}"
    for method, path, status in (
        ("PUT", "/images/unknown-ticket-123456", 404),
        ("PUT", f"/images/{order.ticket}x", 404),
        ("GET", "/", 404),
        ("GET", f"/console/{order.ticket}", 404),
        ("DELETE", url, 400),
        ("PUT", f"{url}?offset=-1", 400),
        ("PUT", f"{url}?offset=1e3", 400),
        ("PUT", f"{url}?offset=99999999999999999999999", 400),
    ):
        answer = await made.client.request(method, path, content=b"x")
        assert answer.status_code == status, (method, path, answer.text)
        assert msgspec.json.decode(answer.content, type=Problem).message
    odd = await made.client.put(url, content=b"x", headers={"Content-Range": "lines 1-2"})
    assert odd.status_code == 400
    expired, _ = await made.open(TransferDirection.UPLOAD, source, MIB, expires_seconds=0.0)
    assert (await made.client.put(f"/images/{expired.ticket}", content=b"x")).status_code == 404


@pytest.mark.parametrize(
    "fields",
    [
        {"transfer_id": "../../etc/x"},
        {"disk_id": "x/y"},
        {"ticket": "short"},
        {"ticket": "with/slash-0123456789"},
        {"size_bytes": 0},
        {"size_bytes": 2**62},
    ],
)
async def test_odd_orders_are_refused(made: Transfers, fields: dict[str, Any]) -> None:
    source = made.domain.source(new_id(), ImageFormat.RAW)
    with pytest.raises(Refused) as refused:
        await made.open(TransferDirection.UPLOAD, source, MIB, **fields)
    assert refused.value.kind is Kind.INVALID
    assert made.domain.leftovers() == []


async def test_hostile_uploads_never_reach_the_volume(made: Transfers, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for reason, image in hostile_images(tmp_path / "images").items():
        data = image.read_bytes()
        if not data:
            continue
        _, source = await made.domain.create(ImageFormat.QCOW2, 64 * MIB)
        before = Path(source.path).read_bytes()
        order = await made.upload(source, data)
        with pytest.raises(Refused, match=reason) as refused:
            await made.finish(order)
        assert refused.value.kind is Kind.INVALID
        assert Path(source.path).read_bytes() == before
        assert made.domain.leftovers() == []


async def test_vmdks_that_name_other_files_are_refused(made: Transfers, tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "vmdk", tmp_path / "base.vmdk", "64M")
    delta, flat, lying = (tmp_path / name for name in ("delta.vmdk", "flat.vmdk", "lying.vmdk"))
    qemu_img("create", "-q", "-f", "vmdk", "-b", tmp_path / "base.vmdk", "-F", "vmdk", delta)
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", flat, "64M")
    header = bytearray((tmp_path / "base.vmdk").read_bytes())
    header[12:20] = bytes(8)  # a capacity of 0: QEMU would open the extents that the descriptor names
    lying.write_bytes(header)
    for image, reason in ((delta, "backing file"), (flat, "vmdk-descriptor"), (lying, "in other files")):
        order = await made.upload(made.domain.source(new_id()), image.read_bytes())
        with pytest.raises(Refused, match=reason):
            await made.finish(order)
        assert made.domain.leftovers() == os.listdir(made.domain.disks) == []


async def test_a_small_image_that_claims_a_huge_disk_is_refused(made: Transfers, tmp_path: Path) -> None:
    """A qcow2 of some hundred kilobytes whose tables claim 4 TiB of data."""
    bomb = tmp_path / "bomb.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", bomb, "4T")
    source = made.domain.source(new_id(), ImageFormat.RAW)
    order = await made.upload(source, bomb.read_bytes())
    with pytest.raises(Refused, match="at most"):
        await made.finish(order, max_bytes=10 * 1024**3)
    assert made.domain.leftovers() == []


async def test_a_wrong_checksum_leaves_nothing(made: Transfers) -> None:
    _, source = await made.domain.create(ImageFormat.RAW, 2 * MIB)
    order = await made.upload(source, noise(2 * MIB))
    with pytest.raises(Refused, match="SHA-256") as refused:
        await made.finish(order, "0" * 64)
    assert refused.value.kind is Kind.MISMATCH
    assert made.domain.leftovers() == []
    assert not any(Path(source.path).read_bytes())


async def test_cancel_cleans_up_also_in_the_middle(made: Transfers) -> None:
    source = made.domain.source(new_id(), ImageFormat.RAW)
    order, _ = await made.open(TransferDirection.UPLOAD, source, 8 * MIB)
    sent = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield noise(MIB)
        sent.set()
        await asyncio.Event().wait()

    putting = asyncio.create_task(made.client.put(f"/images/{order.ticket}", content=endless()))
    await sent.wait()
    await made.finish(order, cancel=True)
    await made.finish(order, cancel=True)
    assert made.domain.leftovers() == []
    assert os.listdir(made.domain.disks) == []
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


async def test_a_full_storage_keeps_the_upload_resumable(made: Transfers, small_disk: Path) -> None:
    domain = await connected_domain(made.host, small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(5 * MIB))
    data = noise(6 * MIB)
    source = domain.source(new_id(), ImageFormat.RAW)
    order, _ = await made.open(TransferDirection.UPLOAD, source, len(data))
    full = await made.client.put(f"/images/{order.ticket}", content=data)
    assert full.status_code == 503
    problem = msgspec.json.decode(full.content, type=Problem)
    assert problem.kind is Kind.EXHAUSTED
    assert "No space left" in problem.message
    received = int((await made.client.head(f"/images/{order.ticket}")).headers["Upload-Offset"])
    assert 0 < received < len(data)
    ballast.unlink()
    rest = await made.client.put(f"/images/{order.ticket}?offset={received}", content=data[received:])
    assert rest.json()["received_bytes"] == len(data)
    await made.finish(order, hashlib.sha256(data).hexdigest())
    assert Path(source.path).read_bytes() == data


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IscsiTarget]:
    with iscsi_target(tmp_path_factory.mktemp("target"), "volery", "chap-secret-12") as made:
        yield made


async def test_luns_are_sent_and_received(made: Transfers, target: IscsiTarget) -> None:
    backing = target.add_lun(1, 16 * MIB)
    await connect_target(made.host, target)
    source = lun(target, 1)
    data = noise(8 * MIB)
    backing.write_bytes(noise(16 * MIB, 3))
    order = await made.upload(source, data)
    info = await made.finish(order, hashlib.sha256(data).hexdigest())
    assert info.size_bytes == 16 * MIB
    assert backing.read_bytes() == data.ljust(16 * MIB, b"\0")

    fetched, _ = await made.open(TransferDirection.DOWNLOAD, source)
    assert (await made.client.get(f"/images/{fetched.ticket}")).content == backing.read_bytes()
    qcow2, _ = await made.open(TransferDirection.DOWNLOAD, source, format=ImageFormat.QCOW2)
    assert (await made.client.get(f"/images/{qcow2.ticket}")).content[:4] == b"QFI\xfb"
    for transfer in (fetched, qcow2):
        await made.finish(transfer)
    staging = Path(made.host.config.state_dir) / "staging"
    assert [name for _, _, names in os.walk(staging) for name in names] == []

    large = await made.upload(source, noise(16 * MIB) + bytes(512))
    with pytest.raises(Refused, match="16777728"):
        await made.finish(large)
