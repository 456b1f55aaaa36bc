"""A host that can't read a storage domain that others read has lost it, after a while, and has it back after a while."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.storage.scripted_host import StorageHost
from tests.storage.scripted_storage import Site, site
from tests.support import losses
from volery.contracts.agent import STORAGE_CHECKED
from volery.contracts.base import Owner
from volery.contracts.host import HostStatus
from volery.contracts.storage import DomainStatus, StorageDomain
from volery.runtime.programs import Settings


@pytest.fixture
def hurried(configured: Settings) -> Settings:
    return losses.hurried(configured, Owner.STORAGE, again_seconds=600)


async def fails(host: StorageHost, domain: StorageDomain) -> None:
    """Its path hangs there, and its agent has noticed."""
    host.unreachable.add(domain.path)
    await host.agent.say(
        "storage", STORAGE_CHECKED, domain_id=domain.id, readable=False, problem=f"{domain.path} hangs"
    )


async def mends(host: StorageHost, domain: StorageDomain) -> None:
    host.unreachable.discard(domain.path)
    await host.agent.say("storage", STORAGE_CHECKED, domain_id=domain.id, readable=True)


async def shows(at: Site, domain: StorageDomain, holds: Callable[[StorageDomain], object]) -> StorageDomain:
    async def shown() -> StorageDomain | None:
        now = await at.domain(domain.id)
        return now if holds(now) else None

    found: StorageDomain = await at.until(shown)
    return found


async def test_a_host_loses_what_another_reads_and_gets_it_back(hurried: Settings) -> None:
    async with site(hurried) as at:
        domain = await at.new_domain()
        await shows(at, domain, lambda now: len(now.host_ids) == 2)
        here, there = at.hosts[0].agent.host_id, at.hosts[1].agent.host_id
        await fails(at.hosts[0], domain)
        now = await shows(at, domain, lambda now: now.unreachable)
        assert (now.host_ids, now.lost) == ((there,), {})
        now = await shows(at, domain, lambda now: now.lost)
        assert now.lost == {here: f"{domain.path} hangs"}
        assert now.status is DomainStatus.ACTIVE
        await mends(at.hosts[0], domain)
        now = await shows(at, domain, lambda now: len(now.host_ids) == 2)
        assert list(now.lost) == [here], "it must read it for a while first"
        now = await shows(at, domain, lambda now: not now.lost)
        assert now.unreachable == {}


async def test_what_everybody_lost_is_inactive_and_lost_by_nobody(hurried: Settings) -> None:
    async with site(hurried) as at:
        domain = await at.new_domain()
        await shows(at, domain, lambda now: len(now.host_ids) == 2)
        for host in at.hosts:
            await fails(host, domain)
        now = await shows(at, domain, lambda now: len(now.unreachable) == 2)
        assert now.status is DomainStatus.INACTIVE
        other = await at.new_domain("other", path="/srv/other")
        await fails(at.hosts[1], other)
        await shows(at, other, lambda now: now.lost)  # by now it would have been decided
        assert (await at.domain(domain.id)).lost == {}
        await mends(at.hosts[0], domain)
        now = await shows(at, domain, lambda now: now.status is DomainStatus.ACTIVE)
        assert now.lost == {}


async def test_a_host_in_maintenance_has_lost_nothing(hurried: Settings) -> None:
    async with site(hurried) as at:
        domain = await at.new_domain()
        await shows(at, domain, lambda now: len(now.host_ids) == 2)
        await fails(at.hosts[0], domain)
        await shows(at, domain, lambda now: now.lost)
        row = at.rows[0]
        await at.world.host(at.center, row.id, row.name, status=HostStatus.MAINTENANCE)
        now = await shows(at, domain, lambda now: not now.lost)
        assert now.unreachable == {}
