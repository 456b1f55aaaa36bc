"""Whoever writes a volume holds its lease: storage says so in every order, and removes the lease with the disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from tests.storage.scripted_host import GIB
from tests.storage.scripted_storage import Site, site
from tests.storage.test_dead_leases import FREE, began, party
from tests.storage.test_lockspaces import able, joined_by
from volery.contracts.base import Owner
from volery.contracts.cluster import DeleteById
from volery.contracts.domain import DomainLease
from volery.contracts.errors import Refused
from volery.contracts.health import GET_HEALTH, AskHealth
from volery.contracts.storage import (
    CREATE_DISK,
    DELETE_DISK,
    RESIZE_DISK,
    UPDATE_STORAGE_DOMAIN,
    CreateDisk,
    ResizeDisk,
    UpdateStorageDomain,
)
from volery.runtime.programs import Settings
from volery.setup.embedded import Embedded, start_nats, stop
from volery.setup.home import Home


def leases_of(at: Site, number: int) -> list[DomainLease | None]:
    """Of this host's orders to write volumes."""
    kinds = ("create", "resize", "copy", "delete")
    return [order.lease for kind in kinds for order in at.hosts[number].agent.begun(f"volume.{kind}")]


async def test_a_host_that_has_joined_writes_under_the_volumes_lease_which_goes_with_the_disk(
    configured: Settings,
) -> None:
    async with site(configured, hosts=2) as at:
        await able(at, 1)
        domain = await joined_by(at, await at.new_domain(leases=True), 1)
        disks = [await at.new_disk(domain, name=f"d{number}") for number in range(3)]
        await at.done(await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disks[0].id, size_bytes=2 * GIB)))
        ask = CreateDisk(name="copy", storage_domain_id=domain.id, copy_of=disks[1].id)
        copy = await at.done(await at.bus.ask(CREATE_DISK, ask))
        assert leases_of(at, 0) == []
        keys = [lease.key for lease in leases_of(at, 1) if lease is not None]
        assert keys == [*(disk.id for disk in disks), disks[0].id, copy.object_id]
        path = f"/srv/data/{domain.id}/leases/{disks[0].id}"
        assert leases_of(at, 1)[0] == DomainLease(lockspace=domain.id, key=disks[0].id, path=path)
        assert set(at.shelf.leases) == {f"/srv/data/{domain.id}/leases/{key}" for key in keys}
        for disk_id in set(keys):
            await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=disk_id)))

        async def without() -> bool:
            return not at.shelf.leases

        await at.until(without)


async def test_where_no_host_has_joined_volumes_are_written_as_before(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain(leases=True)
        await at.new_disk(domain)
        await at.new_disk(await at.new_domain(name="plain", path="/srv/other"), name="d2")
        assert leases_of(at, 0) == [None, None]


async def test_what_a_dead_host_wrote_is_written_by_another_once_its_leases_are_free(
    configured: Settings,
) -> None:
    async with party(configured) as made:
        at = made.at
        gate = at.hosts[1].held[FREE] = asyncio.Event()
        await made.dies(0)
        await at.until(lambda: began(made, 1))
        making = asyncio.create_task(at.new_disk(made.domain))
        done, _ = await asyncio.wait({making}, timeout=0.5)
        assert not done
        assert leases_of(at, 1) == []
        gate.set()
        disk = await making
        assert made.is_free(0)
        assert [lease.key for lease in leases_of(at, 1) if lease is not None] == [disk.id]


async def test_disks_keep_nobody_from_switching_leases_off(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        await able(at, 0)
        domain = await joined_by(at, await at.new_domain(leases=True), 0)
        await at.new_disk(domain)
        off = await at.bus.ask(UPDATE_STORAGE_DOMAIN, UpdateStorageDomain(id=domain.id, leases=False))
        assert off.lease_host_ids == ()
        await at.new_disk(domain, name="d2")
        assert [lease is None for lease in leases_of(at, 0)] == [False, True]


@contextlib.contextmanager
def cut(nats: Embedded) -> Iterator[None]:
    """The bus is gone, with all that was on its way; then it is back at the same address."""
    os.kill(nats.pid, signal.SIGKILL)
    try:
        yield
    finally:
        home = Home(nats.log.parent.parent)
        stop(home, "nats")
        assert start_nats(home).url == nats.url


@pytest.mark.parametrize("written", ["meanwhile", "before"])
async def test_a_volume_is_written_after_its_lease_is_free_though_the_bus_was_cut(
    nats: Embedded, configured: Settings, written: str
) -> None:
    """The host that frees it can't say so, or its word got lost: nobody else is asked, and nobody writes until it is known."""
    async with party(configured, hosts=3) as made:
        at = made.at
        gates = {number: asyncio.Event() for number in (1, 2)}
        for number, gate in gates.items():
            at.hosts[number].held[FREE] = gate
            at.hosts[number].agent.drop = lambda subject: subject.endswith("order_finished")
        await made.dies(0)

        async def freer() -> int:
            return next((number for number in gates if made.asked(number)), 0)

        chosen = await at.until(freer)
        op = await at.bus.ask(
            CREATE_DISK, CreateDisk(name="d", storage_domain_id=made.domain.id, size_bytes=GIB)
        )
        if written == "before":
            gates[chosen].set()
            await made.freed(0)
        with cut(nats):
            gates[chosen].set()
            await made.freed(0)
            assert [*leases_of(at, 1), *leases_of(at, 2)] == []
        await at.until(lambda: reached(at))
        await at.done(op)
        (lease,) = [*leases_of(at, 1), *leases_of(at, 2)]
        assert lease is not None
        assert lease.key == op.object_id
        assert [len(made.asked(number)) for number in gates] == [int(number == chosen) for number in gates]
        assert at.shelf.crowded == []


async def reached(at: Site) -> bool:
    """Whether the bus carries questions again."""
    if not at.bus.client.is_connected:
        return False
    try:
        await at.bus.ask(GET_HEALTH[Owner.STORAGE], AskHealth(), again=False)
    except Refused:
        return False
    return True
