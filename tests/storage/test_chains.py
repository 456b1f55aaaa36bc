"""Chains that differ on the storage, and those of a former release."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from services.storage.service import make_service
from tests.storage.scripted_storage import Site, site
from tests.storage.test_snapshots import (
    files,
    prepared,
    rows,
    snapshot,
)
from tests.support.runtime import running
from volery.contracts.agent import OpenChain
from volery.contracts.base import Owner
from volery.contracts.cluster import GetById
from volery.contracts.domain import FileSource
from volery.contracts.errors import Refused
from volery.contracts.ids import new_id
from volery.contracts.storage import (
    GET_DISK,
    DiskStatus,
)
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings


async def test_a_chain_that_differs_on_the_storage_is_shown_and_not_started(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain, agent = await at.new_domain(), at.hosts[0].agent
        disk, whole = await at.new_disk(domain), await at.new_disk(domain, "whole")
        await at.done(await snapshot(at, disk))
        disk = await at.disk(disk.id)
        leaf = f"/srv/data/{domain.id}/disks/{files(at, disk)[1]}"
        good = at.shelf.volumes[leaf]

        async def problem_of(disk_id: str) -> str:
            now = await at.disk(disk_id)
            return now.chain_problem if now.status is DiskStatus.ILLEGAL else ""

        at.shelf.volumes[leaf] = replace(good, backing="")
        await agent.report("storage")
        problem = await at.until(lambda: problem_of(disk.id))
        assert problem.startswith(f"{files(at, disk)[1]} says that nothing is below it")
        with pytest.raises(Refused, match="says that nothing is below it"):
            await prepared(at, disk)
        at.shelf.volumes[leaf] = good
        await agent.report("storage")
        await at.until(lambda: healed(at, disk.id))
        await prepared(at, await at.disk(disk.id))

        path = f"/srv/data/{domain.id}/disks/{whole.id}.qcow2"
        at.shelf.volumes[path] = replace(at.shelf.volumes[path], backing="elsewhere.qcow2")
        await agent.report("storage")
        problem = await at.until(lambda: problem_of(whole.id))
        assert problem.startswith(f"{whole.id}.qcow2 says that elsewhere.qcow2 is below it")
        at.shelf.volumes[path] = replace(at.shelf.volumes[path], backing="")
        await agent.report("storage")
        await at.until(lambda: healed(at, whole.id))

        opened = OpenChain(disk_id=disk.id, vm_id=new_id(), files=(files(at, disk)[0],))
        at.hosts[0].open_chains = [opened]
        await agent.report("storage")
        problem = await at.until(lambda: problem_of(disk.id))
        assert f"VM {opened.vm_id} has {files(at, disk)[0]} open" in problem
        names = tuple(reversed(files(at, disk)))
        at.hosts[0].open_chains = [replace(opened, files=names)]
        await agent.report("storage")
        await at.until(lambda: healed(at, disk.id))

        del at.shelf.volumes[f"/srv/data/{domain.id}/disks/{files(at, disk)[0]}"]
        await agent.report("storage")

        async def missing() -> bool:
            return (await at.disk(disk.id)).status is DiskStatus.MISSING

        await at.until(missing)


async def healed(at: Site, disk_id: str) -> bool:
    now = await at.disk(disk_id)
    return now.status is DiskStatus.OK and now.chain_problem == ""


async def test_disks_of_a_former_release_have_the_volume_that_they_always_had(configured: Settings) -> None:
    """Its migrations' rows are there, its documents say nothing of volumes; and one that its code made has no row."""
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        old, older = await at.new_disk(domain, "old"), await at.new_disk(domain, "older")
        async with open_direct(configured.database, Owner.STORAGE) as connection:
            await connection.execute(
                """update disk set doc = ((doc::jsonb) - 'volumes' - 'leaf_id' - 'depth' - 'chain_problem')::text"""
            )
            await connection.execute("delete from volume where id = $1", older.id)
        assert type(await prepared(at, older)) is FileSource
        await at.done(await snapshot(at, old))
        assert (await at.disk(old.id)).depth == 2
    async with running(configured, make_service()) as bus, asyncio.timeout(20):
        while (said := await bus.ask(GET_DISK, GetById(id=older.id))).leaf_id == "":
            await asyncio.sleep(0.02)
        assert [volume.id for volume in said.volumes] == [said.leaf_id] == [older.id]
    assert [row for row in await rows(configured) if row[0] == older.id] == [(older.id, "", "ok")]
