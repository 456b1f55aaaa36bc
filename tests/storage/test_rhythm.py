"""What storage does every now and then, done at once."""

from __future__ import annotations

from typing import Any

from services.storage import projection, transfers
from services.storage.service import make_service
from tests.storage.scripted_storage import site
from tests.storage.test_disks import attach
from tests.storage.test_transfers import opened
from tests.support.service_process import captured
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.storage import GET_TRANSFER, LIST_TRANSFERS, DiskStatus
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


async def test_a_transfer_whose_time_is_up_is_cancelled_and_later_forgotten(configured: Settings) -> None:
    found: list[Any] = []
    async with site(configured, hosts=1, service=captured(make_service(), found)) as at:
        disk = await at.new_disk(await at.new_domain())
        transfer = await opened(at, disk)
        await transfers.expire(found[0])
        assert (await at.bus.ask(GET_TRANSFER, GetById(id=transfer.id))).state == "ready"
        async with open_direct(configured.database, Owner.STORAGE) as connection:
            await connection.execute("update transfer set expires_at = now() - interval '1 minute'")
            await transfers.expire(found[0])

            async def over() -> bool:
                return (await at.bus.ask(GET_TRANSFER, GetById(id=transfer.id))).state == "cancelled"

            await at.until(over)
            ended = await at.bus.ask(GET_TRANSFER, GetById(id=transfer.id))
            assert ended.problem == "its time was up"
            assert (await at.disk(disk.id)).status is DiskStatus.OK
            await transfers.expire(found[0])
            assert len((await at.bus.ask(LIST_TRANSFERS, ListQuery())).items) == 1
            await connection.execute("update transfer set expires_at = now() - interval '8 days'")
            await transfers.expire(found[0])
        assert (await at.bus.ask(LIST_TRANSFERS, ListQuery())).items == ()


async def test_uses_by_vms_that_are_unknown_end(configured: Settings) -> None:
    found: list[Any] = []
    async with site(configured, hosts=1, service=captured(make_service(), found)) as at:
        domain = await at.new_domain()
        orphan, fresh, known = [await at.new_disk(domain, name) for name in ("orphan", "fresh", "known")]
        unsaid = await at.world.vm(at.center, "known")
        for disk, vm_id in ((orphan, new_id()), (fresh, new_id()), (known, unsaid.id)):
            await attach(at, disk, vm_id)
        async with open_direct(configured.database, Owner.STORAGE) as connection:
            await connection.execute(
                "update disk set doc = jsonb_set(doc::jsonb, '{updated_at}', '\"2020-01-01T00:00:00Z\"')::text"
                " where name <> 'fresh'"
            )
            await connection.execute("delete from vm")
        await projection.release_orphans(found[0])
        assert (await at.disk(orphan.id)).uses == ()
        assert len((await at.disk(fresh.id)).uses) == 1
        assert len((await at.disk(known.id)).uses) == 1
