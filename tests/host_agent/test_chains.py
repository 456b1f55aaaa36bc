"""Volumes above others, with the real qemu-img, and a guest that runs on a chain of three."""

from __future__ import annotations

import asyncio
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from host_agent import chains, runningxml, storage, volumes
from host_agent.hypervisor import Hypervisor
from tests.support.agent_host import make_host, qemu_io, running
from tests.support.storage_domain import MIB, Domain, connected_domain
from tests.support.vms import VmHost, tiny_spec
from volery.contracts.domain import BackingFile, ChainSource, DomainDisk, FileSource, ImageFormat
from volery.contracts.domain_orders import (
    NOT_SWITCHED,
    SWITCH_DISKS,
    SwitchDisks,
    SwitchedDisk,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import (
    ConnectStorage,
    CopyVolume,
    DeleteVolume,
    DirectoryLocation,
    MakeOverlay,
    MergeVolume,
    ResizeVolume,
)


@pytest.fixture
async def domain(tmp_path: Path, hypervisor: Hypervisor) -> Domain:
    return await connected_domain(
        make_host(tmp_path / "state", hypervisor), tmp_path / "storage, with a comma"
    )


@dataclass
class Stack:
    """A disk whose volumes are made one above the other; `source` is the uppermost."""

    domain: Domain
    disk_id: str
    source: FileSource
    size_bytes: int = 64 * MIB

    async def grow(self) -> ChainSource:
        """One more overlay."""
        order = self.order()
        await chains.overlay(self.domain.host, order, running(self.disk_id))
        self.source = order.source
        return order.source

    def order(self, size_bytes: int = 0, live: bool = False) -> MakeOverlay:
        volume_id, below = new_id(), self.source
        first = BackingFile(path=below.path, format=below.format)
        rest = below.backing if isinstance(below, ChainSource) else ()
        path = self.domain.source(volume_id).path
        source = ChainSource(path=path, format=ImageFormat.QCOW2, backing=(first, *rest))
        return MakeOverlay(
            disk_id=self.disk_id,
            volume_id=volume_id,
            source=source,
            size_bytes=size_bytes or self.size_bytes,
            live=live,
        )

    def write(self, pattern: int, at_mib: int) -> None:
        qemu_io(Path(self.source.path), f"write -P {pattern} {at_mib}M 1M")

    def read(self, pattern: int, at_mib: int) -> None:
        """Fails unless that is there, through all volumes by their headers."""
        qemu_io(Path(self.source.path), f"read -P {pattern} {at_mib}M 1M")


async def stack(domain: Domain, format: ImageFormat = ImageFormat.QCOW2) -> Stack:
    disk_id, source = await domain.create(format)
    return Stack(domain, disk_id, source)


def backing_of(path: str) -> dict[str, str]:
    said = subprocess.run(["qemu-img", "info", "--output=json", "-U", path], check=True, capture_output=True)
    found = json.loads(said.stdout)
    return {key: found.get(key, "") for key in ("backing-filename", "backing-filename-format")}


@pytest.mark.parametrize("format", list(ImageFormat))
async def test_an_overlay_names_what_is_below_by_its_name_alone(domain: Domain, format: ImageFormat) -> None:
    disk = await stack(domain, format)
    qemu_io(Path(disk.source.path), "write -P 7 0 1M") if format is ImageFormat.QCOW2 else None
    base = Path(disk.source.path)
    order = disk.order()
    first = await chains.overlay(domain.host, order, running(disk.disk_id))
    again = await chains.overlay(domain.host, order, running(disk.disk_id))
    assert first == again
    assert (first.size_bytes, first.format) == (64 * MIB, ImageFormat.QCOW2)
    assert backing_of(order.source.path) == {
        "backing-filename": base.name,
        "backing-filename-format": format.value,
    }
    assert Path(order.source.path).stat().st_mode & 0o777 == 0o660
    assert domain.leftovers() == []


async def test_what_is_copied_downloaded_grown_and_deleted_is_the_whole_chain(domain: Domain) -> None:
    disk = await stack(domain)
    for pattern in (1, 2, 3):
        disk.write(pattern, pattern)
        if pattern < 3:
            await disk.grow()
    host, target = domain.host, new_id()
    copy = CopyVolume(disk_id=target, source=disk.source, target=domain.source(target), size_bytes=64 * MIB)
    await volumes.copy(host, copy, running(target))
    assert backing_of(copy.target.path)["backing-filename"] == ""
    for pattern in (1, 2, 3):
        qemu_io(Path(copy.target.path), f"read -P {pattern} {pattern}M 1M")
        disk.read(pattern, pattern)

    grow = ResizeVolume(
        disk_id=disk.disk_id,
        volume_id=Path(disk.source.path).stem,
        source=disk.source,
        size_bytes=128 * MIB,
    )
    assert (await volumes.resize(host, grow, running())).size_bytes == 128 * MIB
    disk.read(0, 100)
    with pytest.raises(Refused, match="hide its end"):
        await chains.overlay(host, disk.order(64 * MIB), running())

    assert isinstance(disk.source, ChainSource)
    for path in (disk.source.path, *(file.path for file in disk.source.backing)):
        one = FileSource(path=path, format=ImageFormat.QCOW2)
        order = DeleteVolume(disk_id=disk.disk_id, volume_id=Path(path).stem, source=one)
        await volumes.delete(host, order, running())
    assert [path.name for path in domain.disks.iterdir()] == [f"{target}.qcow2"]


async def test_a_report_says_what_each_header_names(domain: Domain) -> None:
    disk = await stack(domain, ImageFormat.RAW)
    base = Path(disk.source.path).name
    await disk.grow()
    middle = Path(disk.source.path).name
    await disk.grow()
    (report,) = await storage.report(domain.host)
    below = {Path(volume.path).name: volume.backing for volume in report.volumes}
    assert below == {base: "", middle: base, Path(disk.source.path).name: middle}
    assert report.open_chains == ()


async def test_files_that_are_not_above_each_other_as_said_are_refused(domain: Domain) -> None:
    disk, other = await stack(domain), await stack(domain)
    upper = await disk.grow()
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", Path(other.source.path).name, upper.path],
        check=True,
    )
    ours = DomainDisk(disk_id=disk.disk_id, source=upper, target="vda")
    with pytest.raises(Refused, match="it should be") as refused:
        await chains.check_disks(domain.host.config, [ours])
    assert (refused.value.kind, refused.value.details["rule"]) == (Kind.CONFLICT, chains.BROKEN)
    with pytest.raises(Refused, match="it should be"):
        await disk.grow()
    assert domain.leftovers() == []
    Path(other.source.path).unlink()
    subprocess.run(["qemu-img", "rebase", "-u", "-b", "", upper.path], check=True)
    with pytest.raises(Refused, match="says that nothing is below it"):
        await chains.check_disks(domain.host.config, [ours])
    Path(disk.order().source.backing[-1].path).unlink()
    with pytest.raises(Refused):
        await chains.check_disks(domain.host.config, [ours])


async def test_an_overlay_above_a_volume_that_a_program_writes_is_refused_unless_it_is_to_be_so(
    domain: Domain,
) -> None:
    disk = await stack(domain)
    writer = await asyncio.create_subprocess_exec(
        *("qemu-io", "-f", "qcow2", disk.source.path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"write 0 64k\n")
        await writer.stdout.readuntil(b"ops/sec")
        with pytest.raises(Refused, match="in use"):
            await disk.grow()
        order = disk.order(live=True)
        await chains.overlay(domain.host, order, running())
    finally:
        assert writer.stdin is not None
        writer.stdin.close()
        await writer.wait()
    assert domain.leftovers() == []
    assert Path(order.source.path).exists()


def test_an_agent_of_before_chains_refuses_one() -> None:
    """It knows files and LUNs only; a file of a chain must not look like one to it."""
    import msgspec

    from volery.contracts.domain import IscsiSource

    source = ChainSource(path="/a", format=ImageFormat.QCOW2, backing=())
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(source), type=FileSource | IscsiSource)


@pytest.mark.parametrize("format", list(ImageFormat))
async def test_a_volume_is_merged_into_the_one_below_and_what_is_above_stays(
    domain: Domain, format: ImageFormat
) -> None:
    """Also by a repeat, and by one after the header above was changed already; the file below grows if need be."""
    disk = await stack(domain, format)
    base = disk.source
    disk.size_bytes = 96 * MIB
    middle = await disk.grow()
    disk.write(1, 1)
    disk.write(2, 2)
    disk.write(9, 90)
    upper = await disk.grow()
    disk.write(3, 2)
    order = MergeVolume(
        disk_id=disk.disk_id, source=middle, above=FileSource(path=upper.path, format=upper.format)
    )
    first = await chains.merge(domain.host, order, running())
    assert (first.size_bytes, first.format) == (96 * MIB, format)
    assert backing_of(upper.path)["backing-filename"] == Path(base.path).name
    assert await chains.merge(domain.host, order, running()) == first
    whole = (BackingFile(path=upper.path, format=upper.format), *upper.backing)
    with pytest.raises(Refused, match="it should be"):
        await chains.check(domain.host.config, [whole])
    merging = BackingFile(path=middle.path, format=middle.format, merging=True)
    await chains.check(domain.host.config, [[whole[0], merging, whole[2]]])
    Path(middle.path).unlink()
    for pattern, at_mib in ((1, 1), (3, 2), (9, 90)):
        disk.read(pattern, at_mib)
    for pattern, at_mib in ((1, 1), (2, 2), (9, 90)):
        qemu_io(Path(base.path), f"read -P {pattern} {at_mib}M 1M", format=format)

    order = MergeVolume(
        disk_id=disk.disk_id,
        source=ChainSource(
            path=upper.path,
            format=upper.format,
            backing=(BackingFile(path=base.path, format=base.format),),
        ),
    )
    await chains.merge(domain.host, order, running())
    qemu_io(Path(base.path), "read -P 3 2M 1M", format=format)


async def test_nothing_is_merged_under_a_program_that_has_it_open(domain: Domain) -> None:
    disk = await stack(domain)
    upper = await disk.grow()
    disk.write(1, 1)
    reader = await asyncio.create_subprocess_exec(
        *("qemu-io", "-r", "-f", "qcow2", upper.path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(b"read 0 64k\n")
        await reader.stdout.readuntil(b"ops/sec")
        with pytest.raises(Refused, match="in use"):
            await chains.merge(domain.host, MergeVolume(disk_id=disk.disk_id, source=upper), running())
    finally:
        assert reader.stdin is not None
        reader.stdin.close()
        await reader.wait()
    qemu_io(Path(upper.backing[0].path), "read -P 0 1M 1M")


async def test_a_guest_runs_on_a_chain_of_three_and_says_so(qemu: VmHost, tmp_path: Path) -> None:
    domain = await connected_domain(qemu.host, tmp_path / "storage")
    disk = await stack(domain)
    names = [Path(disk.source.path).name]
    for _ in range(2):
        disk.write(5, len(names))
        await disk.grow()
        names.insert(0, Path(disk.source.path).name)
    tmp_path.chmod(0o755)
    spec = tiny_spec(disks=(DomainDisk(disk_id=disk.disk_id, source=disk.source, target="vda"),))
    await qemu.run(spec)
    (report,) = await storage.report(qemu.host)
    assert report.open_chains is not None
    assert [(c.disk_id, c.vm_id, c.files) for c in report.open_chains] == [
        (disk.disk_id, spec.vm_id, tuple(names))
    ]
    where = DirectoryLocation(path=str(domain.path))
    looked = await storage.connect(
        qemu.host, ConnectStorage(domain_id=domain.domain_id, location=where), running()
    )
    assert looked.open_chains == report.open_chains
    with pytest.raises(Refused, match="in use"):
        await disk.grow()
    await qemu.power_off(spec.vm_id)
    disk.read(5, 1)
    disk.read(5, 2)

    subprocess.run(["qemu-img", "rebase", "-u", "-b", "", disk.source.path], check=True)
    with pytest.raises(Refused, match="nothing is below it"):
        await qemu.run(spec, epoch=2)


async def test_a_running_guest_goes_on_in_new_volumes_of_all_its_disks(qemu: VmHost, tmp_path: Path) -> None:
    domain = await connected_domain(qemu.host, tmp_path / "storage")
    tmp_path.chmod(0o755)
    disks = [await stack(domain), await stack(domain, ImageFormat.RAW), await stack(domain)]
    spec = tiny_spec(
        disks=tuple(
            DomainDisk(disk_id=disk.disk_id, source=disk.source, target=f"vd{letter}")
            for disk, letter in zip(disks, "abc", strict=True)
        )
    )
    await qemu.run(spec)

    async def overlays(*of: Stack) -> SwitchDisks:
        switched = []
        for disk in of:
            made = disk.order(live=True)
            await chains.overlay(qemu.host, made, running(disk.disk_id))
            switched.append(SwitchedDisk(disk_id=disk.disk_id, source=made.source))
        return SwitchDisks(vm_id=spec.vm_id, disks=tuple(switched))

    async def writes() -> dict[str, str]:
        root = runningxml.parsed(await qemu.hypervisor.domain_xml(spec.vm_id))
        found = runningxml.disks_of(root)
        return {disk: device.element.find("source").get("file") for disk, device in found.items()}

    for _ in range(2):
        order = await overlays(*disks[:2])
        await qemu.order(SWITCH_DISKS, order)
        await qemu.order(SWITCH_DISKS, order)
        for disk, one in zip(disks, order.disks, strict=False):
            disk.source = one.source
        assert await writes() == {disk.disk_id: disk.source.path for disk in disks}
    (report,) = await storage.report(qemu.host)
    assert report.open_chains is not None
    assert {c.disk_id: len(c.files) for c in report.open_chains} == {
        disk.disk_id: depth for disk, depth in zip(disks, (3, 3, 1), strict=True)
    }

    before = await writes()
    skipping = await overlays(disks[0])
    disks[0].source = skipping.disks[0].source
    above = await overlays(disks[0])
    with pytest.raises(Refused) as refused:
        await qemu.order(SWITCH_DISKS, above)
    assert refused.value.details["rule"] == NOT_SWITCHED
    Path(skipping.disks[0].source.path).write_bytes(b"no image")
    with pytest.raises(Refused) as refused:
        await qemu.order(SWITCH_DISKS, skipping)
    assert refused.value.details["rule"] == NOT_SWITCHED
    one = await overlays(disks[2])
    torn = SwitchDisks(vm_id=spec.vm_id, disks=(*one.disks, skipping.disks[0]))
    with pytest.raises(Refused) as refused:
        await qemu.order(SWITCH_DISKS, torn)
    assert refused.value.details["rule"] == NOT_SWITCHED
    assert await writes() == before, "all or none"
    await qemu.power_off(spec.vm_id)
