"""Uploads and downloads: opened, finished, gone on with, cancelled, expired; what a disk is afterwards."""

from __future__ import annotations

import pytest

from tests.storage.scripted_host import GIB
from tests.storage.scripted_storage import Site, site
from tests.storage.test_disks import IQN, attach, iscsi
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.storage import (
    CANCEL_TRANSFER,
    CREATE_TRANSFER,
    DELETE_DISK,
    FIND_TRANSFER_ENDPOINT,
    FINISH_DISK_TRANSFER,
    GET_TRANSFER,
    LIST_TRANSFERS,
    PREPARE_DISKS,
    CreateTransfer,
    Disk,
    DiskStatus,
    FindTransferEndpoint,
    FinishDiskTransfer,
    PrepareDisks,
    Transfer,
)
from volery.contracts.vm import VmStatus
from volery.contracts.volume_orders import TransferDirection
from volery.runtime.programs import Settings

UPLOAD, DOWNLOAD = TransferDirection.UPLOAD, TransferDirection.DOWNLOAD


async def opened(at: Site, disk: Disk, direction: TransferDirection = UPLOAD, **fields: object) -> Transfer:
    if direction is UPLOAD:
        fields = {"size_bytes": GIB // 2} | fields
    ask = CreateTransfer(disk_id=disk.id, direction=direction, **fields)  # type: ignore[arg-type]
    op = await at.done(await at.bus.ask(CREATE_TRANSFER, ask))
    return await at.bus.ask(GET_TRANSFER, GetById(id=op.object_id))


async def test_an_upload_becomes_the_disk_s_content(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        disk = await at.new_disk(await at.new_domain())
        transfer = await opened(at, disk)
        assert transfer.state == "ready"
        assert (await at.disk(disk.id)).status is DiskStatus.LOCKED
        endpoint = await at.bus.ask(FIND_TRANSFER_ENDPOINT, FindTransferEndpoint(id=transfer.id))
        assert endpoint.ticket == at.hosts[0].opened[transfer.id].ticket
        assert len(endpoint.ticket) >= 32
        listed = b"".join(bytes(i) for i in (await at.bus.ask(LIST_TRANSFERS, ListQuery())).items)
        assert endpoint.ticket.encode() not in listed
        with pytest.raises(Refused, match=r"while transfer .* uploads into it"):
            await attach(at, disk, new_id())
        with pytest.raises(Refused, match=r"while transfer .* uploads into it"):
            await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id))
        finish = FinishDiskTransfer(id=transfer.id, sha256="EF" * 32)
        await at.done(await at.bus.ask(FINISH_DISK_TRANSFER, finish))
        disk = await at.disk(disk.id)
        assert (disk.status, disk.sha256, disk.busy_with) == (DiskStatus.OK, "ef" * 32, "")
        assert (await at.bus.ask(GET_TRANSFER, GetById(id=transfer.id))).state == "succeeded"
        with pytest.raises(Refused, match="has succeeded") as refused:
            await at.bus.ask(FIND_TRANSFER_ENDPOINT, FindTransferEndpoint(id=transfer.id))
        assert refused.value.kind is Kind.GONE


async def test_an_upload_that_lacks_bytes_goes_on(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        disk = await at.new_disk(await at.new_domain())
        transfer = await opened(at, disk)
        at.hosts[0].refusing["transfer.finish"] = Refused(
            Kind.CONFLICT, "it has 5 of 9 bytes: send the rest first", received_bytes=5, size_bytes=9
        )
        assert "send the rest" in await at.refused(
            await at.bus.ask(FINISH_DISK_TRANSFER, FinishDiskTransfer(id=transfer.id))
        )
        transfer = await at.bus.ask(GET_TRANSFER, GetById(id=transfer.id))
        assert (transfer.state, transfer.received_bytes) == ("ready", 5)
        before = len(at.hosts[0].agent.begun("transfer.open"))
        await at.bus.ask(FIND_TRANSFER_ENDPOINT, FindTransferEndpoint(id=transfer.id, again=True))
        assert len(at.hosts[0].agent.begun("transfer.open")) == before + 1
        at.hosts[0].refusing.clear()
        await at.done(await at.bus.ask(FINISH_DISK_TRANSFER, FinishDiskTransfer(id=transfer.id)))
        assert (await at.disk(disk.id)).status is DiskStatus.OK


async def test_a_bad_image_changes_nothing(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        disk = await at.new_disk(await at.new_domain())
        transfer = await opened(at, disk)
        at.hosts[0].refusing["transfer.finish"] = Refused(Kind.INVALID, "the image names a backing file")
        assert "backing file" in await at.refused(
            await at.bus.ask(FINISH_DISK_TRANSFER, FinishDiskTransfer(id=transfer.id))
        )
        found = await at.bus.ask(GET_TRANSFER, GetById(id=transfer.id))
        assert (found.state, found.problem) == ("failed", "the image names a backing file")
        assert (await at.disk(disk.id)).status is DiskStatus.OK


async def test_a_lun_written_half_way_is_illegal_until_a_good_upload(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await iscsi(at, {1: GIB})
        assert domain.iqn == IQN
        disk = await at.new_disk(domain)
        transfer = await opened(at, disk)
        at.hosts[0].refusing["transfer.finish"] = Refused(Kind.UNAVAILABLE, "the target went away")
        await at.refused(await at.bus.ask(FINISH_DISK_TRANSFER, FinishDiskTransfer(id=transfer.id)))
        assert (await at.disk(disk.id)).status is DiskStatus.ILLEGAL
        with pytest.raises(Refused, match="can't be trusted"):
            await attach(at, disk, new_id())
        at.hosts[0].refusing.clear()
        transfer = await opened(at, disk)
        await at.done(await at.bus.ask(FINISH_DISK_TRANSFER, FinishDiskTransfer(id=transfer.id)))
        assert (await at.disk(disk.id)).status is DiskStatus.OK


async def test_cancelled_expired_and_failed_transfers_free_the_disk(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        disk = await at.new_disk(await at.new_domain())
        transfer = await opened(at, disk)
        await at.done(await at.bus.ask(CANCEL_TRANSFER, GetById(id=transfer.id)))
        assert (await at.disk(disk.id)).status is DiskStatus.OK
        assert at.hosts[0].opened == {}
        at.hosts[0].refusing["transfer.open"] = Refused(Kind.EXHAUSTED, "no space for the upload")
        op = await at.bus.ask(
            CREATE_TRANSFER, CreateTransfer(disk_id=disk.id, direction=UPLOAD, size_bytes=512)
        )
        assert "no space" in await at.refused(op)
        failed = await at.bus.ask(GET_TRANSFER, GetById(id=op.object_id))
        assert (failed.state, failed.problem) == ("failed", "no space for the upload")
        assert (await at.disk(disk.id)).status is DiskStatus.OK


async def test_a_download_keeps_writers_away(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        disk = await at.new_disk(await at.new_domain())
        vm = await at.world.vm(at.center, "v")
        await attach(at, disk, vm.id)
        transfer = await opened(at, disk, DOWNLOAD)
        assert transfer.size_bytes == GIB
        prepare = PrepareDisks(vm_id=vm.id, host_id=at.rows[0].id, disk_ids=(disk.id,))
        with pytest.raises(Refused, match="reads it"):
            await at.bus.ask(PREPARE_DISKS, prepare)
        await at.done(await at.bus.ask(FINISH_DISK_TRANSFER, FinishDiskTransfer(id=transfer.id)))
        await at.bus.ask(PREPARE_DISKS, prepare)
        await at.world.vm(at.center, "v", vm_id=vm.id, status=VmStatus.UP)

        async def running() -> bool:
            try:
                again = await opened(at, disk, DOWNLOAD)
            except Refused as refused:
                return "runs with it" in refused.message
            await at.done(await at.bus.ask(CANCEL_TRANSFER, GetById(id=again.id)))
            return False

        await at.until(running)
        with pytest.raises(Refused, match="can't be uploaded into while VM v runs"):
            await at.bus.ask(
                CREATE_TRANSFER, CreateTransfer(disk_id=disk.id, direction=UPLOAD, size_bytes=512)
            )


async def test_bad_transfers_are_refused(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        disk = await at.new_disk(await at.new_domain())
        for fields, sentence in (
            ({"disk_id": new_id(), "direction": UPLOAD, "size_bytes": 1}, "there is no disk"),
            ({"disk_id": "x", "direction": UPLOAD, "size_bytes": 1}, "isn't the id"),
            ({"disk_id": disk.id, "direction": UPLOAD}, "how many bytes"),
            ({"disk_id": disk.id, "direction": UPLOAD, "size_bytes": 2 * GIB}, "larger than disk"),
            ({"disk_id": disk.id, "direction": UPLOAD, "size_bytes": 1, "sha256": "1"}, "64 hexadecimal"),
            ({"disk_id": disk.id, "direction": DOWNLOAD, "size_bytes": 1}, "neither"),
        ):
            with pytest.raises(Refused, match=sentence):
                await at.bus.ask(CREATE_TRANSFER, CreateTransfer(**fields))  # type: ignore[arg-type]
        for call, ask in (
            (GET_TRANSFER, GetById(id=new_id())),
            (CANCEL_TRANSFER, GetById(id="nothing")),
            (FINISH_DISK_TRANSFER, FinishDiskTransfer(id=new_id())),
            (FIND_TRANSFER_ENDPOINT, FindTransferEndpoint(id=new_id())),
        ):
            with pytest.raises(Refused) as refused:
                await at.bus.ask(call, ask)  # type: ignore[call-overload]
            assert refused.value.kind is Kind.NOT_FOUND
        assert (await at.disk(disk.id)).status is DiskStatus.OK
