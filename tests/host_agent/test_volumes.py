"""Volumes in a directory domain and on iSCSI, with the real qemu-img and a private target."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from host_agent import children, places, volumes
from host_agent.hypervisor import Hypervisor
from tests.support.agent_host import IscsiTarget, iscsi_target, make_host, qemu_img, qemu_io, running
from tests.support.storage_domain import MIB, Domain, connect_target, connected_domain, lun
from volery.contracts.domain import FileSource, ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import (
    CopyVolume,
    CreateVolume,
    DeleteVolume,
    InspectVolume,
    ResizeVolume,
)

USER, PASSWORD = "volery", "chap-secret-12"


@pytest.fixture
async def domain(tmp_path: Path, hypervisor: Hypervisor) -> Domain:
    return await connected_domain(
        make_host(tmp_path / "state", hypervisor), tmp_path / "storage, with a comma"
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IscsiTarget]:
    with iscsi_target(tmp_path_factory.mktemp("target"), USER, PASSWORD) as made:
        yield made


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("format", "preallocate", "at_least", "at_most"),
    [
        (ImageFormat.QCOW2, False, 0, 1 * MIB),
        (ImageFormat.QCOW2, True, 64 * MIB, 66 * MIB),
        (ImageFormat.RAW, False, 0, 1 * MIB),
        (ImageFormat.RAW, True, 64 * MIB, 65 * MIB),
    ],
)
async def test_create_takes_the_space_that_was_asked_for(
    domain: Domain, format: ImageFormat, preallocate: bool, at_least: int, at_most: int
) -> None:
    disk_id = new_id()
    order = CreateVolume(
        disk_id=disk_id, source=domain.source(disk_id, format), size_bytes=64 * MIB, preallocate=preallocate
    )
    first = await volumes.create(domain.host, order, running(disk_id))
    again = await volumes.create(domain.host, order, running(disk_id))

    assert first == again
    assert (first.size_bytes, first.format) == (64 * MIB, format)
    assert at_least <= first.used_bytes <= at_most
    path = Path(domain.source(disk_id, format).path)
    assert path.stat().st_mode & 0o777 == 0o660
    assert domain.leftovers() == []


async def test_a_file_in_the_way_is_refused_and_kept(domain: Domain) -> None:
    disk_id, source = await domain.create(size=64 * MIB)
    before = sha256(Path(source.path))
    with pytest.raises(Refused, match="already there") as refused:
        await volumes.create(
            domain.host, CreateVolume(disk_id=disk_id, source=source, size_bytes=32 * MIB), running()
        )
    assert refused.value.kind is Kind.CONFLICT
    assert sha256(Path(source.path)) == before


@pytest.mark.parametrize("size", [0, -512, 1000, 2**63])
async def test_impossible_sizes_are_refused(domain: Domain, size: int) -> None:
    disk_id = new_id()
    order = CreateVolume(disk_id=disk_id, source=domain.source(disk_id), size_bytes=size)
    with pytest.raises(Refused) as refused:
        await volumes.create(domain.host, order, running())
    assert refused.value.kind is Kind.INVALID
    assert os.listdir(domain.disks) == []


async def test_a_full_storage_says_so_and_keeps_nothing(domain: Domain) -> None:
    disk_id = new_id()
    huge = os.statvfs(domain.path).f_bavail * os.statvfs(domain.path).f_frsize * 2 // 512 * 512
    order = CreateVolume(
        disk_id=disk_id,
        source=domain.source(disk_id, ImageFormat.RAW),
        size_bytes=huge,
        preallocate=True,
    )
    with pytest.raises(Refused, match="full") as refused:
        await volumes.create(domain.host, order, running())
    assert refused.value.kind is Kind.EXHAUSTED
    assert os.listdir(domain.disks) == domain.leftovers() == []


@pytest.mark.parametrize(
    "path",
    [
        "{disks}/../../{id}.qcow2",
        "{disks}/../disks/{id}.qcow2",
        "/etc/{id}.qcow2",
        "{disks}/{id}.qcow2/x",
        "{disks}/{other}.qcow2",
        "{disks}/{id}.raw",
        "{disks}/{id}.qcow2\n",
        "json:{{}}",
        "",
    ],
)
async def test_paths_outside_the_domain_are_refused(domain: Domain, path: str) -> None:
    disk_id = new_id()
    text = path.format(disks=domain.disks, id=disk_id, other=new_id())
    order = CreateVolume(
        disk_id=disk_id, source=FileSource(path=text, format=ImageFormat.QCOW2), size_bytes=MIB
    )
    with pytest.raises(Refused) as refused:
        await volumes.create(domain.host, order, running())
    assert refused.value.kind is Kind.INVALID


async def test_symbolic_links_are_not_followed(domain: Domain, tmp_path: Path) -> None:
    disk_id, secret = new_id(), tmp_path / "secret"
    secret.write_bytes(b"not yours" * 512)
    source = domain.source(disk_id, ImageFormat.RAW)
    Path(source.path).symlink_to(secret)
    for refused_order in (
        volumes.inspect(domain.host, InspectVolume(disk_id=disk_id, source=source), running()),
        volumes.delete(domain.host, DeleteVolume(disk_id=disk_id, source=source, wipe=True), running()),
        volumes.create(domain.host, CreateVolume(disk_id=disk_id, source=source, size_bytes=MIB), running()),
    ):
        with pytest.raises(Refused, match="isn't a regular file"):
            await refused_order
    assert secret.read_bytes() == b"not yours" * 512


@pytest.mark.parametrize("format", list(ImageFormat))
async def test_resize_only_grows(domain: Domain, format: ImageFormat) -> None:
    disk_id, source = await domain.create(format, 64 * MIB)
    for size in (128 * MIB, 128 * MIB):
        grown = await volumes.resize(
            domain.host, ResizeVolume(disk_id=disk_id, source=source, size_bytes=size), running()
        )
        assert grown.size_bytes == 128 * MIB
    with pytest.raises(Refused, match="can't shrink") as refused:
        await volumes.resize(
            domain.host, ResizeVolume(disk_id=disk_id, source=source, size_bytes=64 * MIB), running()
        )
    assert refused.value.kind is Kind.INVALID
    absent = domain.source(other := new_id(), format)
    with pytest.raises(Refused) as refused:
        await volumes.resize(
            domain.host, ResizeVolume(disk_id=other, source=absent, size_bytes=64 * MIB), running()
        )
    assert refused.value.kind is Kind.NOT_FOUND


@contextlib.asynccontextmanager
async def opened_by_qemu(path: str, socket: Path) -> AsyncIterator[None]:
    """The image open for writing in another QEMU program, as a running VM has it."""
    async with children.child(
        [
            *("qemu-nbd", "--fork", "--persistent", "-f", "qcow2", "-k", str(socket)),
            *("--pid-file", f"{socket}.pid", path),
        ]
    ) as started:
        await started.wait()
    pid = int(Path(f"{socket}.pid").read_text())
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)


async def test_a_volume_in_use_is_neither_resized_nor_deleted_nor_copied(
    domain: Domain, tmp_path: Path
) -> None:
    disk_id, source = await domain.create()
    other = new_id()
    async with opened_by_qemu(source.path, tmp_path / "nbd.sock"):
        for order in (
            volumes.resize(
                domain.host, ResizeVolume(disk_id=disk_id, source=source, size_bytes=96 * MIB), running()
            ),
            volumes.delete(domain.host, DeleteVolume(disk_id=disk_id, source=source), running()),
            volumes.copy(
                domain.host,
                CopyVolume(disk_id=other, source=source, target=domain.source(other), size_bytes=64 * MIB),
                running(),
            ),
            volumes.inspect(domain.host, InspectVolume(disk_id=disk_id, source=source), running()),
        ):
            with pytest.raises(Refused, match="in use") as refused:
                await order
            assert refused.value.kind is Kind.CONFLICT
    assert os.listdir(domain.disks) == [f"{disk_id}.qcow2"]
    assert domain.leftovers() == []


@pytest.mark.parametrize("wipe", [False, True])
async def test_delete_twice(domain: Domain, wipe: bool, tmp_path: Path) -> None:
    disk_id, source = await domain.create(ImageFormat.RAW)
    qemu_io(source.path, "write -P 7 1M 2M", format="raw")
    os.link(source.path, tmp_path / "witness")
    order = DeleteVolume(disk_id=disk_id, source=source, wipe=wipe)
    await volumes.delete(domain.host, order, running())
    await volumes.delete(domain.host, order, running())
    assert os.listdir(domain.disks) == []
    assert (b"\7" in (tmp_path / "witness").read_bytes()) is not wipe


async def test_a_volume_whose_mount_was_lost_is_neither_deleted_nor_missing(
    domain: Domain, tmp_path: Path
) -> None:
    """Its owner would forget the disk, and the file would be back with the mount."""
    disk_id, source = await domain.create()
    domain.path.rename(tmp_path / "elsewhere")
    domain.path.mkdir()
    orders = (
        volumes.delete(domain.host, DeleteVolume(disk_id=disk_id, source=source), running()),
        volumes.resize(
            domain.host, ResizeVolume(disk_id=disk_id, source=source, size_bytes=96 * MIB), running()
        ),
    )
    for order in orders:
        with pytest.raises(Refused, match="mount the shared storage on this host again") as refused:
            await order
        assert refused.value.kind is Kind.UNAVAILABLE
    domain.path.rmdir()
    (tmp_path / "elsewhere").rename(domain.path)
    await volumes.delete(domain.host, DeleteVolume(disk_id=disk_id, source=source), running())
    assert os.listdir(domain.disks) == []


async def test_whoever_cancels_a_deletion_is_told_what_came_of_it(domain: Domain) -> None:
    """At whatever moment: cancelled means that the volume is there, done that it is gone."""
    ended = {"cancelled": 0, "done": 0}
    for moment in range(25):
        disk_id, source = await domain.create(ImageFormat.RAW, MIB)
        task = asyncio.create_task(
            volumes.delete(domain.host, DeleteVolume(disk_id=disk_id, source=source), running())
        )
        await asyncio.wait([task], timeout=moment * 0.004)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            assert Path(source.path).exists(), moment
            ended["cancelled"] += 1
        else:
            assert not Path(source.path).exists(), moment
            ended["done"] += 1
    assert all(ended.values()), ended


@pytest.mark.parametrize("from_format", list(ImageFormat))
@pytest.mark.parametrize("to_format", list(ImageFormat))
async def test_copy_keeps_bytes_and_holes(
    domain: Domain, from_format: ImageFormat, to_format: ImageFormat
) -> None:
    _, source = await domain.create(from_format, 256 * MIB)
    qemu_io(source.path, "write -P 7 3M 5M", "write -P 9 200M 64k", format=from_format)
    copy_id = new_id()
    target = domain.source(copy_id, to_format)
    told: list[float] = []
    order = CopyVolume(disk_id=copy_id, source=source, target=target, size_bytes=512 * MIB)
    info = await volumes.copy(domain.host, order, running(told=told))

    assert info.size_bytes == 512 * MIB
    assert info.used_bytes < 16 * MIB
    compared = subprocess.run(
        ["qemu-img", "compare", "-f", from_format, "-F", to_format, source.path, target.path],
        capture_output=True,
        check=False,
        text=True,
    )
    assert compared.returncode == 0, compared.stdout
    assert told[-1] == 100.0
    assert told == sorted(told)
    with pytest.raises(Refused, match="already there"):
        await volumes.copy(domain.host, order, running())
    assert (await volumes.copy(domain.host, order, running(resumed=True))).size_bytes == 512 * MIB


async def test_a_copy_that_is_cancelled_leaves_nothing(domain: Domain) -> None:
    _, source = await domain.create(ImageFormat.RAW, 512 * MIB)
    qemu_io(source.path, "write -P 7 0 512M", format="raw")
    copy_id = new_id()
    begun = asyncio.Event()
    order = CopyVolume(disk_id=copy_id, source=source, target=domain.source(copy_id), size_bytes=512 * MIB)
    run = running()
    run = type(run)(**{f: getattr(run, f) for f in run.__slots__} | {"progress": lambda p, d: begun.set()})
    task = asyncio.create_task(volumes.copy(domain.host, order, run))
    await asyncio.wait_for(begun.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert f"{copy_id}.qcow2" not in os.listdir(domain.disks)
    assert domain.leftovers() == []


async def test_nobody_writes_a_volume_before_the_former_writer_has_ended(domain: Domain) -> None:
    """The agent was killed, its qemu-img hangs on: an order for the same volume waits, and then says so."""
    disk_id = new_id()
    order = CreateVolume(disk_id=disk_id, source=domain.source(disk_id), size_bytes=MIB)
    async with contextlib.AsyncExitStack() as stack:
        async with places.volume_lock(domain.host.config, disk_id) as hold:
            await stack.enter_async_context(children.child(["sleep", "60"], pass_fds=hold.pass_fds))
        waiting = asyncio.create_task(volumes.create(domain.host, order, running()))
        done, _ = await asyncio.wait([waiting], timeout=0.5)
        assert not done
        assert os.listdir(domain.disks) == []
    assert (await waiting).size_bytes == MIB
    assert os.listdir(Path(domain.host.config.state_dir) / "locks") == []


async def test_a_lock_that_is_never_released_is_refused(tmp_path: Path) -> None:
    async with children.held(tmp_path / "lock", wait_seconds=0, otherwise="never"):
        with pytest.raises(Refused, match="taken") as refused:
            async with children.held(tmp_path / "lock", wait_seconds=0.1, otherwise="taken"):
                pass
    assert refused.value.kind is Kind.CONFLICT
    assert not (tmp_path / "lock").exists()


def hostile_images(directory: Path) -> dict[str, Path]:
    """One file per trick."""
    made = {}

    def path(name: str) -> Path:
        made[name] = directory / name
        return made[name]

    secret = directory / "secret"
    secret.write_bytes(b"s" * 65536)
    qemu_img(
        "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", path("backing file"), "64M"
    )
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={secret}", path("another file"), "65536")
    with path("claims a disk").open("wb") as file:
        qemu_img("create", "-q", "-f", "qcow2", file.name, "64M")
    with made["claims a disk"].open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", 2**63 - 512))
    path("text, not").write_bytes(b"<html>404 not found</html>\n" * 100)
    path("gzip archive").write_bytes(b"\x1f\x8b\x08" + bytes(1000))
    path("whole sectors").write_bytes(os.urandom(1000))
    path("empty").write_bytes(b"")
    qemu_img("create", "-q", "-f", "qcow2", path("was cut short"), "64M")
    qemu_io(made["was cut short"], "write -P 7 0 32M")
    os.truncate(made["was cut short"], 10 * MIB)
    path("header isn't whole").write_bytes(b"QFI\xfb\x00\x00\x00\x03" + bytes(20))
    qemu_img("create", "-q", "-f", "qcow2", path("marked as corrupt"), "64M")
    with made["marked as corrupt"].open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 2))
    qemu_img("create", "-q", "-f", "qcow2", path("is encrypted"), "64M")
    with made["is encrypted"].open("r+b") as file:
        file.seek(32)
        file.write(struct.pack(">I", 2))
    qemu_img("create", "-q", "-f", "qed", path("format is qed"), "64M")
    return made


async def test_hostile_images_are_refused_with_their_reason(domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    tricks = hostile_images(tmp_path / "images")
    for reason, image in tricks.items():
        head = image.read_bytes()[:4]
        format = ImageFormat.QCOW2 if head == b"QFI\xfb" else ImageFormat.RAW
        disk_id = new_id()
        source = domain.source(disk_id, format)
        image.rename(source.path)
        with pytest.raises(Refused, match=reason) as refused:
            await volumes.inspect(
                domain.host, InspectVolume(disk_id=disk_id, source=source, max_bytes=1024**4), running()
            )
        assert refused.value.kind is Kind.INVALID, reason


async def test_a_qcow2_under_a_raw_name_is_refused(domain: Domain) -> None:
    """A guest that writes a qcow2 header into its raw disk gains nothing."""
    disk_id, source = await domain.create(ImageFormat.RAW)
    qemu_img("create", "-q", "-f", "qcow2", source.path, "64M")
    with pytest.raises(Refused, match="its name says raw"):
        await volumes.inspect(domain.host, InspectVolume(disk_id=disk_id, source=source), running())
    described = await volumes.describe(source)
    assert described.size_bytes < MIB


async def test_a_good_image_passes(domain: Domain) -> None:
    disk_id, source = await domain.create()
    qemu_io(source.path, "write -P 7 0 1M")
    info = await volumes.inspect(
        domain.host, InspectVolume(disk_id=disk_id, source=source, max_bytes=64 * MIB), running()
    )
    assert info.size_bytes == 64 * MIB
    with pytest.raises(Refused, match="at most"):
        await volumes.inspect(
            domain.host, InspectVolume(disk_id=disk_id, source=source, max_bytes=63 * MIB), running()
        )


async def test_luns_are_volumes(domain: Domain, target: IscsiTarget) -> None:
    backing = target.add_lun(1, 64 * MIB)
    await connect_target(domain.host, target)
    disk_id = new_id()
    info = await volumes.create(
        domain.host, CreateVolume(disk_id=disk_id, source=lun(target, 1), size_bytes=64 * MIB), running()
    )
    assert info.size_bytes == 64 * MIB
    with pytest.raises(Refused, match="fewer than"):
        await volumes.resize(
            domain.host,
            ResizeVolume(disk_id=disk_id, source=lun(target, 1), size_bytes=65 * MIB),
            running(),
        )

    backing.write_bytes(os.urandom(64 * MIB))
    _, image = await domain.create(ImageFormat.QCOW2, 16 * MIB)
    qemu_io(image.path, "write -P 7 1M 2M")
    copy = CopyVolume(disk_id=disk_id, source=image, target=lun(target, 1), size_bytes=64 * MIB)
    await volumes.copy(domain.host, copy, running())
    data = backing.read_bytes()
    assert data[MIB : 3 * MIB] == b"\7" * (2 * MIB)
    assert not any(data[:MIB]), "what the image doesn't hold must read as zeros"
    assert not any(data[3 * MIB :]), "an earlier user's bytes must not show beyond the image"

    back_id = new_id()
    await volumes.copy(
        domain.host,
        CopyVolume(
            disk_id=back_id, source=lun(target, 1), target=domain.source(back_id), size_bytes=64 * MIB
        ),
        running(),
    )
    qemu_img("convert", "-O", "raw", domain.source(back_id).path, target.directory / "back.raw")
    assert (target.directory / "back.raw").read_bytes() == data

    await volumes.delete(
        domain.host, DeleteVolume(disk_id=disk_id, source=lun(target, 1), wipe=True), running()
    )
    assert not any(backing.read_bytes())


async def test_luns_of_a_stranger_are_refused(domain: Domain, target: IscsiTarget) -> None:
    order = CreateVolume(disk_id=new_id(), source=lun(target, 1), size_bytes=MIB)
    with pytest.raises(Refused, match="connect it first"):
        await volumes.create(domain.host, order, running())


async def test_the_chap_password_is_in_no_argument(domain: Domain, target: IscsiTarget) -> None:
    target.add_lun(2, 256 * MIB)
    _, image = await domain.create(ImageFormat.RAW, 256 * MIB)
    qemu_io(image.path, "write -P 7 0 256M", format="raw")

    async def copy() -> None:
        await connect_target(domain.host, target)
        order = CopyVolume(disk_id=new_id(), source=image, target=lun(target, 2), size_bytes=256 * MIB)
        await volumes.copy(domain.host, order, running())

    copying = asyncio.create_task(copy())
    seen: set[bytes] = set()
    while not (await asyncio.wait([copying], timeout=0.005))[0]:
        seen |= own_children()
    await copying
    assert any(target.iqn.encode() in line for line in seen), "no child was seen at work"
    assert not any(PASSWORD.encode() in line for line in seen)


def own_children() -> set[bytes]:
    """The command lines of this process's children."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    pids = {pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()}
    found = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add(Path(f"/proc/{pid}/cmdline").read_bytes())
    return found
