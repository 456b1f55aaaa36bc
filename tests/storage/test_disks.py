"""Disks: made, attached, prepared, grown, copied, deleted, and what is refused."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.storage.scripted_host import GIB, MIB
from tests.storage.scripted_storage import Site, key, site
from volery.contracts.base import Owner
from volery.contracts.cluster import DeleteById
from volery.contracts.domain import FileSource, ImageFormat, IscsiSource
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import CANCEL_OPERATION, CancelOperation, ListQuery
from volery.contracts.storage import (
    ACT_ON_STORAGE_DOMAIN,
    ATTACH_DISK_TO,
    COPY_DISK,
    CREATE_DISK,
    DELETE_DISK,
    DETACH_DISK_FROM,
    LIST_DISKS,
    PREPARE_DISKS,
    REACH_DISKS,
    REACH_DISKS_OF_MANY,
    RESIZE_DISK,
    UPDATE_DISK,
    ActOnStorageDomain,
    AttachDiskTo,
    ContentType,
    CopyDisk,
    CreateDisk,
    DetachDiskFrom,
    Disk,
    DiskStatus,
    DomainKind,
    PrepareDisks,
    ReachDisks,
    ReachDisksOfMany,
    ResizeDisk,
    StorageDomain,
    UpdateDisk,
)
from volery.contracts.vm import VM_CHANGED, VmStatus
from volery.runtime.programs import Settings

IQN = "iqn.2026-11.test:disks"


async def iscsi(at: Site, luns: dict[int, int], **fields: str) -> StorageDomain:
    at.shelf.luns[IQN] = luns
    return await at.new_domain("san", kind=DomainKind.ISCSI, portal="192.0.2.1", iqn=IQN, **fields)


async def attach(at: Site, disk: Disk, vm_id: str, **fields: bool) -> Disk:
    return await at.bus.ask(ATTACH_DISK_TO, AttachDiskTo(disk_id=disk.id, vm_id=vm_id, **fields))


async def test_a_disk_is_made_attached_and_prepared(configured: Settings) -> None:
    async with site(configured) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain)
        assert (disk.status, disk.format, disk.busy_with) == (DiskStatus.OK, ImageFormat.QCOW2, "")
        vm_id, host_id = new_id(), at.rows[0].id
        assert (await attach(at, disk, vm_id)).uses[0].vm_id == vm_id
        again = await attach(at, disk, vm_id)
        assert len(again.uses) == 1
        await at.new_disk(domain, "other")
        of_vm = await at.bus.ask(LIST_DISKS, ListQuery(filter={"vm_id": vm_id}))
        assert [json.loads(bytes(item))["id"] for item in of_vm.items] == [disk.id]
        of_vm = await at.bus.ask(LIST_DISKS, ListQuery(filter={"vm_id": vm_id, "name": "other"}))
        assert of_vm.items == ()
        with pytest.raises(Refused, match="VM"):
            await at.bus.ask(LIST_DISKS, ListQuery(filter={"vm_id": "'"}))
        ask = PrepareDisks(vm_id=vm_id, host_id=host_id, disk_ids=(disk.id,))
        prepared = (await at.bus.ask(PREPARE_DISKS, ask)).disks[0]
        path = f"/srv/data/{domain.id}/disks/{disk.id}.qcow2"
        assert prepared.source == FileSource(path=path, format=ImageFormat.QCOW2)
        assert prepared.shared_storage
        assert path in at.shelf.volumes
        reach = await at.bus.ask(REACH_DISKS, ReachDisks(disk_ids=(disk.id,)))
        assert set(reach.host_ids) == {row.id for row in at.rows}
        assert not reach.any_host
        assert (await at.bus.ask(REACH_DISKS, ReachDisks(disk_ids=()))).any_host
        many = ReachDisksOfMany(sets=((disk.id,), (), (disk.id, "gone")))
        first, second, third = (await at.bus.ask(REACH_DISKS_OF_MANY, many)).reaches
        assert first == reach
        assert second.any_host
        assert "gone" in third.unready


async def test_a_disk_belongs_to_one_vm_unless_it_is_shareable(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain)
        first = await at.world.vm(at.center, "first")
        await attach(at, disk, first.id)

        async def named() -> bool:
            with pytest.raises(Refused) as refused:
                await attach(at, disk, new_id())
            return "VM first" in refused.value.message

        await at.until(named)
        with pytest.raises(Refused, match="attached to VM first"):
            await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id))
        with pytest.raises(Refused, match="must be raw"):
            await at.bus.ask(UPDATE_DISK, UpdateDisk(id=disk.id, shareable=True))
        shared = await at.new_disk(domain, "s", format=ImageFormat.RAW, shareable=True)
        await attach(at, shared, first.id)
        await attach(at, shared, new_id())
        with pytest.raises(Refused, match="must stay shareable"):
            await at.bus.ask(UPDATE_DISK, UpdateDisk(id=shared.id, shareable=False))
        await at.world.delete_vm(first)

        async def freed() -> bool:
            return not (await at.disk(disk.id)).uses and len((await at.disk(shared.id)).uses) == 1

        await at.until(freed)


async def test_attaching_at_once_gives_the_disk_to_one(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        disk = await at.new_disk(await at.new_domain())
        answers = await asyncio.gather(
            *(attach(at, disk, new_id()) for _ in range(20)), return_exceptions=True
        )
        assert sum(isinstance(answer, Disk) for answer in answers) == 1
        assert len((await at.disk(disk.id)).uses) == 1
        vm_id = (await at.disk(disk.id)).uses[0].vm_id
        for _ in range(2):
            await at.bus.ask(DETACH_DISK_FROM, DetachDiskFrom(disk_id=disk.id, vm_id=vm_id))
        await at.bus.ask(DETACH_DISK_FROM, DetachDiskFrom(disk_id=new_id(), vm_id=vm_id))


async def test_what_prepare_refuses(configured: Settings) -> None:
    async with site(configured) as at:
        at.hosts[1].unreachable.add("/srv/data")
        domain = await at.new_domain(host_id="")
        vm_id = new_id()
        disk = await at.new_disk(domain, attach_to=vm_id)
        good, bad = at.hosts[0].agent.host_id, at.hosts[1].agent.host_id
        if good not in domain.host_ids:
            good, bad = bad, good
        with pytest.raises(Refused, match="isn't a directory on this host") as refused:
            await at.bus.ask(PREPARE_DISKS, PrepareDisks(vm_id=vm_id, host_id=bad, disk_ids=(disk.id,)))
        assert refused.value.kind is Kind.UNAVAILABLE
        ask = PrepareDisks(vm_id=new_id(), host_id=good, disk_ids=(disk.id,))
        with pytest.raises(Refused, match="isn't attached"):
            await at.bus.ask(PREPARE_DISKS, ask)
        with pytest.raises(Refused, match="there is no disk"):
            await at.bus.ask(PREPARE_DISKS, PrepareDisks(vm_id=vm_id, host_id=good, disk_ids=(new_id(),)))
        await at.bus.ask(PREPARE_DISKS, PrepareDisks(vm_id=vm_id, host_id=good, disk_ids=(disk.id,)))


async def test_luns_are_given_once_and_the_smallest_that_fits(configured: Settings) -> None:
    async with site(configured) as at:
        at.shelf.passwords[IQN] = "secret-word"
        luns = {1: 4 * GIB, 2: GIB, 3: 2 * GIB, 4: GIB}
        domain = await iscsi(at, luns, chap_user="u", chap_password="secret-word")
        disks = await asyncio.gather(*(at.new_disk(domain, f"d{i}") for i in range(4)))
        assert sorted(disk.lun for disk in disks) == [1, 2, 3, 4]
        assert all(disk.format is ImageFormat.RAW and disk.size_bytes == GIB for disk in disks)
        with pytest.raises(Refused, match="no free LUN"):
            await at.bus.ask(CREATE_DISK, CreateDisk(name="x", storage_domain_id=domain.id, size_bytes=GIB))
        small = next(disk for disk in disks if disk.lun == 2)
        await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=small.id)))
        again = await at.new_disk(domain, "again")
        assert again.lun == 2
        with pytest.raises(Refused, match="can't grow"):
            await at.bus.ask(RESIZE_DISK, ResizeDisk(id=again.id, size_bytes=2 * GIB))
        big = next(disk for disk in disks if disk.lun == 1)
        await at.done(await at.bus.ask(RESIZE_DISK, ResizeDisk(id=big.id, size_bytes=3 * GIB)))
        assert (await at.disk(big.id)).size_bytes == 3 * GIB
        await attach(at, big, vm_id := new_id())
        ask = PrepareDisks(vm_id=vm_id, host_id=at.rows[0].id, disk_ids=(big.id,))
        source = (await at.bus.ask(PREPARE_DISKS, ask)).disks[0].source
        assert isinstance(source, IscsiSource)
        assert (source.lun, source.portal, source.chap_password) == (1, "192.0.2.1:3260", "secret-word")

        async def shown() -> bool:
            found = await at.domain(domain.id)
            return {lun.lun for lun in found.luns if lun.disk_id} == {1, 2, 3, 4}

        await at.until(shown)
        assert (
            b"secret-word"
            not in json.dumps(
                [json.loads(bytes(item)) for item in (await at.bus.ask(LIST_DISKS, ListQuery())).items]
            ).encode()
        )


async def test_a_target_is_one_domain_only(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        await iscsi(at, {1: GIB})
        with pytest.raises(Refused, match="one LUN to two disks"):
            await at.new_domain("two", kind=DomainKind.ISCSI, portal="alias.test", iqn=IQN)


async def test_a_failed_disk_leaves_nothing(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        at.hosts[0].refusing["volume.create"] = Refused(Kind.EXHAUSTED, "no space left on the storage")
        op = await at.bus.ask(CREATE_DISK, CreateDisk(name="f", storage_domain_id=domain.id, size_bytes=GIB))
        assert "no space left" in await at.refused(op)
        assert (await at.bus.ask(LIST_DISKS, ListQuery())).items == ()
        assert at.shelf.volumes == {}
        assert len(at.hosts[0].agent.begun("volume.delete")) == 1


async def test_a_cancelled_copy_leaves_nothing_and_frees_its_source(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        vm_id = new_id()
        disk = await at.new_disk(domain, attach_to=vm_id)
        held = at.hosts[0].held["volume.copy"] = asyncio.Event()
        op = await at.bus.ask(COPY_DISK, CopyDisk(id=disk.id, name="c"))

        async def begun() -> bool:
            return bool(at.hosts[0].shelf.writers.get(op.object_id))

        await at.until(begun)
        ask = PrepareDisks(vm_id=vm_id, host_id=at.rows[0].id, disk_ids=(disk.id,))
        with pytest.raises(Refused, match="reads it"):
            await at.bus.ask(PREPARE_DISKS, ask)
        await at.bus.ask(CANCEL_OPERATION[Owner.STORAGE], CancelOperation(id=op.id))
        assert (await at.ended(op)).state == "cancelled"
        assert len((await at.bus.ask(LIST_DISKS, ListQuery())).items) == 1
        held.set()
        copied = await at.done(await at.bus.ask(COPY_DISK, CopyDisk(id=disk.id, name="c2")))
        assert (await at.disk(copied.object_id)).size_bytes == disk.size_bytes
        await at.bus.ask(PREPARE_DISKS, ask)
        await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=copied.object_id)))


async def test_a_disk_grows_on_its_host_or_in_its_running_vm(configured: Settings) -> None:
    async with site(configured) as at:
        disk = await at.new_disk(await at.new_domain())
        vm = await at.world.vm(at.center, "v")
        await attach(at, disk, vm.id)
        await at.done(await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=2 * GIB)))
        assert at.shelf.volumes[next(iter(at.shelf.volumes))].size_bytes == 2 * GIB
        assert at.world.resized == []
        running = {f: getattr(vm, f) for f in vm.__struct_fields__} | {"status": VmStatus.UP}
        await at.world.put(VM_CHANGED, type(vm)(**running))

        async def online() -> bool:
            size = (await at.disk(disk.id)).size_bytes + MIB
            await at.done(await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=size)))
            return bool(at.world.resized)

        await at.until(online)
        assert at.world.resized[0].vm_id == vm.id
        assert (await at.disk(disk.id)).size_bytes == at.world.resized[0].size_bytes
        for size, sentence in ((GIB, "only grows"), (3 * GIB + 1, "whole sectors"), (10**15, "too large")):
            with pytest.raises(Refused, match=sentence):
                await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=size))
        maintain = ActOnStorageDomain(id=disk.storage_domain_id, action="maintain")
        with pytest.raises(Refused, match="running VMs v"):
            await at.bus.ask(ACT_ON_STORAGE_DOMAIN, maintain)
        with pytest.raises(Refused, match="VM v runs with it"):
            await at.bus.ask(COPY_DISK, CopyDisk(id=disk.id, name="c"))


async def test_an_import_takes_the_image_s_size(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain, size_bytes=0, import_url="https://images.test/a.qcow2")
        assert (disk.size_bytes, disk.sha256) == (2 * GIB, "ab" * 32)
        grown = await at.new_disk(domain, "g", size_bytes=3 * GIB, import_url="https://images.test/a.qcow2")
        assert grown.size_bytes == 3 * GIB


async def test_an_iso_is_read_only_and_for_everybody(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        iso = await at.new_disk(domain, "cd", content=ContentType.ISO)
        assert (iso.format, iso.read_only) == (ImageFormat.RAW, True)
        for _ in range(2):
            await attach(at, iso, new_id())
        ask = PrepareDisks(vm_id=new_id(), host_id=at.rows[0].id, disk_ids=(iso.id,))
        assert (await at.bus.ask(PREPARE_DISKS, ask)).disks[0].read_only
        with pytest.raises(Refused, match="ISO"):
            await at.bus.ask(UPDATE_DISK, UpdateDisk(id=iso.id, read_only=False))


BAD: list[tuple[dict[str, object], str]] = [
    ({"size_bytes": 0}, "above zero"),
    ({"size_bytes": -512}, "above zero"),
    ({"size_bytes": 513}, "whole sectors"),
    ({"size_bytes": 10**15 * 512}, "too large"),
    ({"size_bytes": 101 * GIB}, "larger than all"),
    ({"size_bytes": 90 * GIB, "preallocate": True}, "are needed"),
    ({"name": "<disk/>\x00"}, "control characters"),
    ({"name": ""}, "1 to 255"),
    ({"storage_domain_id": new_id()}, "there is no storage domain"),
    ({"storage_domain_id": "../../etc"}, "isn't the id"),
    ({"id": "../x"}, "isn't the id"),
    ({"copy_of": new_id()}, "there is no disk"),
    ({"copy_of": new_id(), "import_url": "http://h/x"}, "not both"),
    ({"import_url": "file:///etc/shadow"}, "http"),
    ({"import_url": "http://u:p@h/x"}, "user or password"),
    ({"import_url": "http://h:0x/y"}, "isn't a URL"),
    ({"import_url": "http://h/x", "sha256": "zz"}, "64 hexadecimal"),
    ({"shareable": True}, "must be raw"),
    ({"tags": ("a",) * 3 + tuple(f"t{i}" for i in range(64))}, "at most 64 tags"),
]


async def test_bad_disks_are_refused_with_a_reason(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        begun = len(at.hosts[0].agent.log)
        for fields, sentence in BAD:
            given = {"name": "n", "storage_domain_id": domain.id, "size_bytes": GIB} | fields
            with pytest.raises(Refused, match=sentence):
                await at.bus.ask(CREATE_DISK, CreateDisk(**given))  # type: ignore[arg-type]
        assert (await at.bus.ask(LIST_DISKS, ListQuery())).items == ()
        assert len(at.hosts[0].agent.log) == begun
        dry = await at.bus.ask(
            CREATE_DISK, CreateDisk(name="n", storage_domain_id=domain.id, size_bytes=GIB, dry_run=True)
        )
        assert dry.state == "pending"
        disk_id = new_id()
        ask = CreateDisk(name="n", storage_domain_id=domain.id, size_bytes=GIB, id=disk_id)
        first = await at.bus.ask(CREATE_DISK, ask, key("a"))
        assert await at.bus.ask(CREATE_DISK, ask, key("a")) == first
        await at.done(first)
        with pytest.raises(Refused, match="already"):
            await at.bus.ask(CREATE_DISK, ask, key("b"))
        disk = await at.disk(disk_id)
        with pytest.raises(Refused) as refused:
            await at.bus.ask(UPDATE_DISK, UpdateDisk(id=disk_id, name="m", if_revision=disk.revision + 1))
        assert refused.value.kind is Kind.STALE
        assert (await at.bus.ask(UPDATE_DISK, UpdateDisk(id=disk_id, name="m"))).name == "m"


async def test_a_wipe_that_is_cut_short_leaves_no_good_disk(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain, wipe_after_delete=True)
        held = at.hosts[0].held["volume.delete"] = asyncio.Event()
        op = await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id))

        async def wiping() -> bool:
            return bool(at.shelf.writers.get(disk.id))

        await at.until(wiping)
        await at.bus.ask(CANCEL_OPERATION[Owner.STORAGE], CancelOperation(id=op.id))
        assert (await at.ended(op)).state == "cancelled"
        assert (await at.disk(disk.id)).status is DiskStatus.ILLEGAL
        held.set()
        await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id)))
        assert at.hosts[0].agent.begun("volume.delete")[-1].wipe
