"""A host that sends and receives volumes over HTTPS, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from host_agent import data_server, listening, transfers
from host_agent.action import Host
from host_agent.hypervisor import Hypervisor
from tests.support.agent_host import make_host, qemu_img, running
from tests.support.certificates import make_certificate
from tests.support.storage_domain import Domain, connected_domain
from volery.contracts.domain import FileSource, ImageFormat, VolumeSource
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import (
    FinishTransfer,
    OpenTransfer,
    TransferDirection,
    TransferOpened,
    VolumeInfo,
)

TICKET = "ticket-0123456789abcdef"


class Transfers:
    """A host with its data server, a domain, and a client."""

    def __init__(self, host: Host, domain: Domain, client: httpx.AsyncClient) -> None:
        self.host, self.domain, self.client = host, domain, client

    async def open(
        self,
        direction: TransferDirection,
        source: VolumeSource,
        size: int = 0,
        format: ImageFormat = ImageFormat.RAW,
        **fields: Any,
    ) -> tuple[OpenTransfer, TransferOpened]:
        order = OpenTransfer(
            **{
                "transfer_id": new_id(),
                "disk_id": disk_of(source),
                "ticket": f"{TICKET}-{new_id()}",
                "direction": direction,
                "source": source,
                "size_bytes": size,
                "format": format,
                **fields,
            }
        )
        return order, await transfers.open_transfer(self.host, order, running())

    async def upload(self, source: VolumeSource, data: bytes, **fields: Any) -> OpenTransfer:
        order, _ = await self.open(TransferDirection.UPLOAD, source, len(data), **fields)
        answer = await self.client.put(f"/images/{order.ticket}", content=data)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"received_bytes": len(data), "size_bytes": len(data)}
        return order

    async def finish(
        self, order: OpenTransfer, sha256: str = "", *, cancel: bool = False, max_bytes: int = 1024**4
    ) -> VolumeInfo:
        finish = FinishTransfer(
            transfer_id=order.transfer_id,
            disk_id=order.disk_id,
            target=order.source,
            max_bytes=max_bytes,
            sha256=sha256,
            cancel=cancel,
        )
        return await transfers.finish_transfer(self.host, finish, running())


def disk_of(source: VolumeSource) -> str:
    return Path(source.path).stem if isinstance(source, FileSource) else new_id()


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, hypervisor: Hypervisor) -> AsyncIterator[Transfers]:
    host = make_host(tmp_path / "state", hypervisor)
    certificate = make_certificate(tmp_path / "state" / "identity")
    domain = await connected_domain(host, tmp_path / "storage")
    task = asyncio.create_task(data_server.serve(host))
    base = f"https://{listening.address(host.config)}"
    trust = ssl.create_default_context(cafile=str(certificate))
    async with httpx.AsyncClient(base_url=base, verify=trust, timeout=60) as client:
        await reachable(client)
        yield Transfers(host, domain, client)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def reachable(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(httpx.ConnectError):
                await client.get("/")
                return
            await asyncio.sleep(0.02)


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


async def stream(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def raw_bytes(source: FileSource) -> bytes:
    return subprocess.run(
        ["qemu-img", "dd", "-f", source.format, "-O", "raw", f"if={source.path}", "of=/dev/stdout", "bs=1M"],
        capture_output=True,
        check=False,
    ).stdout or converted(source)


def converted(source: FileSource) -> bytes:
    target = f"{source.path}.whole"
    qemu_img("convert", "-f", source.format, "-O", "raw", source.path, target)
    data = Path(target).read_bytes()
    os.unlink(target)
    return data
