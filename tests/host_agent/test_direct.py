"""Whole images are read and written past the page cache, and through it only where a file system can't do otherwise."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from host_agent import chains, direct, volumes
from host_agent.hypervisor import Hypervisor
from tests.host_agent.test_chains import stack
from tests.support.agent_host import qemu_io, running
from tests.support.storage_domain import MIB, Domain, connected_domain
from tests.support.transfers import Transfers, converted, serving
from volery.contracts.domain import FileSource, ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import CopyVolume, MergeVolume, TransferDirection

A_FEW_PAGES = 4 * MIB
"""Of 48 MiB: headers and tables are looked at by others, too."""


@pytest.fixture
async def made(tmp_path: Path, hypervisor: Hypervisor) -> AsyncIterator[Transfers]:
    async with serving(tmp_path, hypervisor) as made:
        yield made


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A file system that has nothing but the page cache, and refuses direct I/O."""
    place = tmp_path / "ram"
    place.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def in_cache(source: FileSource) -> int:
    """How many bytes of the file the kernel keeps."""
    said = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", source.path],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(said.stdout)


def forget(source: FileSource) -> None:
    with open(source.path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert in_cache(source) == 0


async def written(domain: Domain, format: ImageFormat) -> FileSource:
    _, source = await domain.create(format, 64 * MIB)
    qemu_io(source.path, "write -P 7 0 48M", format=format)
    return source


def copying(domain: Domain, source: FileSource, format: ImageFormat) -> CopyVolume:
    disk_id = new_id()
    target = domain.source(disk_id, format)
    return CopyVolume(disk_id=disk_id, source=source, target=target, size_bytes=64 * MIB)


def content(source: FileSource) -> str:
    return hashlib.sha256(converted(source)).hexdigest()


@pytest.mark.parametrize("to", list(ImageFormat))
@pytest.mark.parametrize("format", list(ImageFormat))
async def test_a_copy_leaves_nothing_of_either_image_in_the_cache(
    made: Transfers, format: ImageFormat, to: ImageFormat
) -> None:
    source = await written(made.domain, format)
    forget(source)
    order = copying(made.domain, source, to)
    await volumes.copy(made.domain.host, order, running())
    assert isinstance(order.target, FileSource)
    assert in_cache(source) < A_FEW_PAGES
    assert in_cache(order.target) < A_FEW_PAGES
    assert content(order.target) == content(source)


@pytest.mark.parametrize("format", list(ImageFormat))
async def test_an_upload_is_put_into_its_volume_past_the_cache(made: Transfers, format: ImageFormat) -> None:
    _, target = await made.domain.create(format, 64 * MIB)
    data = os.urandom(MIB) * 48
    order = await made.upload(target, data)
    await made.finish(order)
    assert in_cache(target) < A_FEW_PAGES
    assert converted(target)[: len(data)] == data


async def test_a_download_is_read_past_the_cache(made: Transfers) -> None:
    source = await written(made.domain, ImageFormat.RAW)
    expected = content(source)
    forget(source)
    order, _ = await made.open(TransferDirection.DOWNLOAD, source)
    answer = await made.client.get(f"/images/{order.ticket}")
    assert hashlib.sha256(answer.content).hexdigest() == expected
    assert in_cache(source) < A_FEW_PAGES


@pytest.mark.parametrize("format", list(ImageFormat))
async def test_a_volume_is_merged_past_the_cache(made: Transfers, format: ImageFormat) -> None:
    disk = await stack(made.domain, format)
    base, upper = disk.source, await disk.grow()
    qemu_io(upper.path, "write -P 9 0 48M")
    for source in (base, upper):
        forget(source)
    await chains.merge(made.host, MergeVolume(disk_id=disk.disk_id, source=upper), running())
    assert in_cache(base) < A_FEW_PAGES
    assert in_cache(upper) < A_FEW_PAGES
    assert converted(base)[: 48 * MIB] == b"\x09" * 48 * MIB


async def test_where_there_is_only_the_cache_it_is_used(made: Transfers, in_memory: Path) -> None:
    there = await connected_domain(made.host, in_memory)
    here = await written(made.domain, ImageFormat.QCOW2)
    to = copying(there, here, ImageFormat.RAW)
    await volumes.copy(made.host, to, running())
    assert isinstance(to.target, FileSource)
    back = copying(made.domain, to.target, ImageFormat.RAW)
    await volumes.copy(made.host, back, running())
    assert isinstance(back.target, FileSource)
    assert content(to.target) == content(back.target) == content(here)
    assert in_cache(to.target) >= 48 * MIB
    order, _ = await made.open(TransferDirection.DOWNLOAD, to.target)
    answer = await made.client.get(f"/images/{order.ticket}")
    assert hashlib.sha256(answer.content).hexdigest() == content(here)


async def test_another_refusal_is_not_tried_again() -> None:
    tried = []

    async def full(caches: object) -> None:
        tried.append(caches)
        raise Refused(Kind.EXHAUSTED, "the storage is full")

    with pytest.raises(Refused, match="full"):
        await direct.converted(full)
    assert tried == [("-T", "none", "-t", "none")]
