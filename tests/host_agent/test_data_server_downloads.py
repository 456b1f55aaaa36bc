"""Downloads through the real HTTPS server: ranges of a volume, and nothing of one that a VM writes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host_agent import children, volumes
from host_agent.hypervisor import Hypervisor
from tests.support.agent_host import qemu_io
from tests.support.storage_domain import MIB
from tests.support.transfers import (
    Transfers,
    converted,
    serving,
)
from volery.contracts.domain import FileSource, ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import (
    TransferDirection,
)


@pytest.fixture
async def made(tmp_path: Path, hypervisor: Hypervisor) -> AsyncIterator[Transfers]:
    async with serving(tmp_path, hypervisor) as made:
        yield made


@pytest.mark.parametrize("format", list(ImageFormat))
async def test_downloads_give_ranges_of_the_volume(made: Transfers, format: ImageFormat) -> None:
    _, source = await made.domain.create(format, 32 * MIB)
    qemu_io(source.path, "write -P 7 1M 3M", "write -P 9 31M 512", format=format)
    content = converted(source)
    order, opened = await made.open(TransferDirection.DOWNLOAD, source)
    assert opened.size_bytes == 32 * MIB
    url = f"/images/{order.ticket}"
    whole = await made.client.get(url)
    assert (whole.status_code, whole.content == content) == (200, True)
    head = await made.client.head(url)
    assert (head.headers["Content-Length"], head.content) == (str(32 * MIB), b"")
    for header, part, status in (
        ("bytes=0-0", slice(0, 1), 206),
        (f"bytes={MIB - 1}-{MIB}", slice(MIB - 1, MIB + 1), 206),
        (f"bytes={30 * MIB}-", slice(30 * MIB, None), 206),
        ("bytes=-1000", slice(-1000, None), 206),
        (f"bytes=100-{99 * MIB}", slice(100, None), 206),
    ):
        answer = await made.client.get(url, headers={"Range": header})
        assert (answer.status_code, answer.content == content[part]) == (status, True), header
    beyond = await made.client.get(url, headers={"Range": f"bytes={32 * MIB}-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{32 * MIB}")
    several = await asyncio.gather(*(made.client.get(url) for _ in range(4)))
    assert all(answer.content == content for answer in several)

    qcow2, opened = await made.open(TransferDirection.DOWNLOAD, source, format=ImageFormat.QCOW2)
    image = (await made.client.get(f"/images/{qcow2.ticket}")).content
    assert len(image) == opened.size_bytes < 16 * MIB
    received = made.domain.path / "received.qcow2"
    received.write_bytes(image)
    assert converted(FileSource(path=str(received), format=ImageFormat.QCOW2)) == content
    await made.finish(order)
    await made.finish(qcow2, cancel=True)
    assert made.domain.leftovers() == []
    assert (await made.client.get(url)).status_code == 404
    assert nbd_servers() == 0


def nbd_servers() -> int:
    """How many qemu-nbd this process has as children."""
    count = 0
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                count += b"qemu-nbd" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return count


async def test_a_volume_that_a_vm_writes_is_not_sent(made: Transfers, tmp_path: Path) -> None:
    _, source = await made.domain.create()
    async with children.child(
        ["qemu-nbd", "--persistent", "-f", "qcow2", "-k", str(tmp_path / "s"), source.path]
    ):
        async with asyncio.timeout(10):
            while not (tmp_path / "s").exists():
                await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="in use") as refused:
            await made.open(TransferDirection.DOWNLOAD, source)
        assert refused.value.kind is Kind.CONFLICT
    with pytest.raises(Refused) as refused:
        await made.open(TransferDirection.DOWNLOAD, made.domain.source(new_id()))
    assert refused.value.kind is Kind.NOT_FOUND


async def test_an_expired_download_lets_go_of_its_volume(made: Transfers) -> None:
    _, source = await made.domain.create()
    await made.open(TransferDirection.DOWNLOAD, source, expires_seconds=0.3)
    assert nbd_servers() == 1
    async with asyncio.timeout(10):
        while nbd_servers():
            await asyncio.sleep(0.02)
    await volumes.describe(source)
