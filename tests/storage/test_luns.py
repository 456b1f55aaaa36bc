"""Which LUN a disk gets: none that a host has open, holds anything, or was given away later than the database knows."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest

from tests.storage.scripted_host import GIB, StorageHost
from tests.storage.scripted_storage import Site, site
from tests.support.scripted_agent import ScriptedAgent, scripted
from volery.contracts.agent import LunClaim, OpenLun
from volery.contracts.base import Owner
from volery.contracts.cluster import DeleteById
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery, OperationState
from volery.contracts.storage import (
    ACT_ON_STORAGE_DOMAIN,
    ATTACH_DISK_TO,
    COPY_DISK,
    CREATE_DISK,
    DELETE_DISK,
    DETACH_DISK_FROM,
    LIST_DISKS,
    PREPARE_DISKS,
    RESIZE_DISK,
    ActOnStorageDomain,
    AttachDiskTo,
    CopyDisk,
    CreateDisk,
    DetachDiskFrom,
    DomainKind,
    PrepareDisks,
    ResizeDisk,
    StorageDomain,
)
from volery.contracts.volume_orders import CLAIM_LUN, COPY_VOLUME, DELETE_VOLUME
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings

IQN = "iqn.2026-11.test:disks"


@contextlib.asynccontextmanager
async def san(
    configured: Settings, luns: dict[int, int], hosts: int = 1
) -> AsyncIterator[tuple[Site, StorageDomain]]:
    async with site(configured, hosts=hosts) as at:
        at.shelf.luns[IQN] = luns
        domain = await at.new_domain("san", kind=DomainKind.ISCSI, portal="192.0.2.1", iqn=IQN)
        yield at, domain


def given(at: Site, kind: str) -> int:
    return sum(len(host.agent.begun(kind)) for host in at.hosts)


async def withheld(at: Site, domain: StorageDomain, *luns: int) -> dict[int, str]:
    """Why these LUNs and no others are withheld, once that is so."""

    async def so() -> bool:
        found = await at.domain(domain.id)
        return {lun.lun for lun in found.luns if lun.withheld} == set(luns)

    await at.until(so)
    found = await at.domain(domain.id)
    assert set(found.strangers) == {f"lun {lun}" for lun in luns}
    return {lun.lun: lun.withheld for lun in found.luns if lun.withheld}


def ask(domain: StorageDomain, **fields: object) -> CreateDisk:
    return CreateDisk(name="d", storage_domain_id=domain.id, **{"size_bytes": GIB} | fields)  # type: ignore[arg-type]


async def say(host: StorageHost) -> None:
    await host.agent.report("storage")
    await host.agent.until_committed("storage")


async def test_a_lun_that_holds_something_is_left_alone_until_it_is_named(configured: Settings) -> None:
    async with san(configured, {1: GIB, 2: GIB, 3: 2 * GIB}) as (at, domain):
        at.shelf.contents |= {(IQN, 1): "somebody's", (IQN, 2): "somebody's"}
        disk = await at.new_disk(domain)
        assert disk.lun == 3
        assert at.shelf.contents == {(IQN, 1): "somebody's", (IQN, 2): "somebody's"}
        why = await withheld(at, domain, 1, 2)
        assert "isn't blank" in why[1]
        assert given(at, CLAIM_LUN.kind) == 3
        with pytest.raises(Refused, match=r"LUN 1 is not given away: .*isn't blank") as refused:
            await at.bus.ask(CREATE_DISK, ask(domain))
        assert refused.value.kind is Kind.EXHAUSTED
        with pytest.raises(Refused, match="not given away"):
            await at.bus.ask(CREATE_DISK, ask(domain, lun=1))
        assert given(at, CLAIM_LUN.kind) == 3, "what was found is remembered"
        with pytest.raises(Refused, match="say which LUN"):
            await at.bus.ask(CREATE_DISK, ask(domain, overwrite=True))
        with pytest.raises(Refused, match="has a disk already"):
            await at.bus.ask(CREATE_DISK, ask(domain, lun=3, overwrite=True))
        with pytest.raises(Refused, match="has no LUN 9"):
            await at.bus.ask(CREATE_DISK, ask(domain, lun=9))
        op = await at.done(await at.bus.ask(CREATE_DISK, ask(domain, lun=1, overwrite=True)))
        assert (await at.disk(op.object_id)).lun == 1
        assert at.shelf.contents == {(IQN, 2): "somebody's"}
        await withheld(at, domain, 2)
        del at.shelf.contents[IQN, 2]
        refresh = ActOnStorageDomain(id=domain.id, action="refresh")
        await at.done(await at.bus.ask(ACT_ON_STORAGE_DOMAIN, refresh))
        await withheld(at, domain)
        assert (await at.new_disk(domain, "again")).lun == 2


async def test_a_lun_that_was_named_and_holds_something_says_how_to_overwrite_it(
    configured: Settings,
) -> None:
    async with san(configured, {1: GIB, 2: GIB}) as (at, domain):
        at.shelf.contents[IQN, 2] = "somebody's"
        message = await at.refused(await at.bus.ask(CREATE_DISK, ask(domain, lun=2)))
        assert "with lun 2 and overwrite" in message
        assert (await at.bus.ask(LIST_DISKS, ListQuery())).items == ()
        assert given(at, DELETE_VOLUME.kind) == 0, "nothing of a stranger's LUN is deleted"
        assert at.shelf.contents == {(IQN, 2): "somebody's"}


async def test_a_lun_that_a_host_has_open_is_never_given_away(configured: Settings) -> None:
    async with san(configured, {1: GIB, 2: GIB}) as (at, domain):
        vm_id, host = new_id(), at.hosts[0]
        host.open_luns.append(OpenLun(iqn=IQN, lun=1, vm_id=vm_id, disk_id=new_id()))
        await say(host)
        why = await withheld(at, domain, 1)
        assert vm_id in why[1]
        assert (await at.new_disk(domain, "a")).lun == 2
        for fields in ({}, {"lun": 1}, {"lun": 1, "overwrite": True}):
            with pytest.raises(Refused, match=f"VM {vm_id}"):
                await at.bus.ask(CREATE_DISK, ask(domain, **fields))
        host.open_luns.clear()
        await say(host)
        await withheld(at, domain)
        assert (await at.new_disk(domain, "b")).lun == 1


async def test_a_host_that_inventory_forgot_is_heard_as_well(configured: Settings) -> None:
    async with san(configured, {1: GIB, 2: GIB}) as (at, domain):
        forgotten = StorageHost(at.shelf, ScriptedAgent(configured.bus.servers, owners=("storage",)))
        forgotten.open_luns.append(OpenLun(iqn=IQN, lun=1, vm_id=new_id()))
        async with scripted(forgotten.agent):
            await forgotten.agent.until_committed("storage", 30)
            why = await withheld(at, domain, 1)
            assert "inventory doesn't know this host" in why[1]
            assert (await at.new_disk(domain)).lun == 2
        with pytest.raises(Refused, match="inventory doesn't know"):
            await at.bus.ask(CREATE_DISK, ask(domain, lun=1, overwrite=True))
        async with open_direct(configured.database, Owner.STORAGE) as connection:
            await connection.execute("update host_lun set seen_at = now() - interval '1 hour'")
        with pytest.raises(Refused, match="inventory doesn't know"):
            await at.bus.ask(CREATE_DISK, ask(domain))
        op = await at.bus.ask(CREATE_DISK, ask(domain, lun=1, overwrite=True))
        assert (await at.disk((await at.done(op)).object_id)).lun == 1


async def test_a_deleted_disk_leaves_its_lun_blank_and_free_at_once(configured: Settings) -> None:
    async with san(configured, {1: GIB, 2: GIB}) as (at, domain):
        disk = await at.new_disk(domain)
        copy = await at.done(await at.bus.ask(COPY_DISK, CopyDisk(id=disk.id, name="c")))
        assert set(at.shelf.contents) == {(IQN, 2)}
        host = at.hosts[0]
        host.open_luns.append(OpenLun(iqn=IQN, lun=2, vm_id=new_id(), disk_id=copy.object_id))
        await say(host)
        await withheld(at, domain)
        host.open_luns.clear()
        await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=copy.object_id)))
        assert at.shelf.contents == {}
        assert (await at.new_disk(domain, "next")).lun == 2, "also before the host has said so again"


async def test_only_what_was_proven_its_own_is_removed_after_a_failure(configured: Settings) -> None:
    async with san(configured, {1: GIB, 2: GIB}) as (at, domain):
        disk = await at.new_disk(domain)
        host = at.hosts[0]
        host.refusing[CLAIM_LUN.kind] = Refused(Kind.UNAVAILABLE, "the target is away")
        assert "away" in await at.refused(await at.bus.ask(CREATE_DISK, ask(domain)))
        assert given(at, DELETE_VOLUME.kind) == 0
        del host.refusing[CLAIM_LUN.kind]
        host.refusing[COPY_VOLUME.kind] = Refused(Kind.UNAVAILABLE, "it was cut short")
        assert "cut short" in await at.refused(await at.bus.ask(COPY_DISK, CopyDisk(id=disk.id, name="c")))
        assert given(at, DELETE_VOLUME.kind) == 1
        assert len((await at.bus.ask(LIST_DISKS, ListQuery())).items) == 1


async def test_a_removal_that_takes_long_is_ordered_once(configured: Settings) -> None:
    configured = dataclasses.replace(configured, environ={"VOLERY_STORAGE_DISCARD_SECONDS": "1"})
    async with san(configured, {1: GIB, 2: GIB}) as (at, domain):
        disk, host, held = await at.new_disk(domain), at.hosts[0], asyncio.Event()
        host.refusing[COPY_VOLUME.kind] = Refused(Kind.UNAVAILABLE, "it was cut short")
        host.held[DELETE_VOLUME.kind] = held
        op = await at.bus.ask(COPY_DISK, CopyDisk(id=disk.id, name="c"))
        assert (await at.ended(op, 40)).state is OperationState.FAILED
        held.set()

        async def gone() -> bool:
            return len((await at.bus.ask(LIST_DISKS, ListQuery())).items) == 1

        await at.until(gone, 60)
        assert given(at, DELETE_VOLUME.kind) == 1


async def test_a_database_that_is_older_than_a_claim_leaves_the_lun_alone(configured: Settings) -> None:
    async with san(configured, {1: GIB, 2: GIB, 3: GIB}) as (at, domain):
        disk, host = await at.new_disk(domain), at.hosts[0]
        vm_id = new_id()
        await at.bus.ask(ATTACH_DISK_TO, AttachDiskTo(disk_id=disk.id, vm_id=vm_id))
        prepare = PrepareDisks(vm_id=vm_id, host_id=at.rows[0].id, disk_ids=(disk.id,))
        await at.bus.ask(PREPARE_DISKS, prepare)
        later = new_id()
        for lun in (1, 2):
            host.claims[lun] = LunClaim(iqn=IQN, lun=lun, claim=7, disk_id=later)
        await say(host)
        why = await withheld(at, domain, 1, 2)
        assert f"disk {later} got it later" in why[2]
        with pytest.raises(Refused, match="may not use LUN 1"):
            await at.bus.ask(PREPARE_DISKS, prepare)
        with pytest.raises(Refused, match="may not use LUN 1"):
            await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=GIB))
        assert (await at.new_disk(domain, "other")).lun == 3
        op = await at.bus.ask(CREATE_DISK, ask(domain, lun=2, overwrite=True))
        await at.done(op)
        assert host.claims[2].claim == 8, "above all that hosts carried out"
        await withheld(at, domain, 1)
        await at.bus.ask(DETACH_DISK_FROM, DetachDiskFrom(disk_id=disk.id, vm_id=vm_id))
        await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id)))
        assert given(at, DELETE_VOLUME.kind) == 0, "the disk goes, the LUN stays as it is"
        await withheld(at, domain, 1)
