"""Hosts join the lockspaces of storage domains with leases, and VMs get theirs there."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from services.storage import lease_model
from services.storage.store import HostRow, Member
from tests.storage.scripted_host import StorageHost
from tests.storage.scripted_storage import Site, site
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.leases import LeaseAbility, LockspaceReport, Watchdog
from volery.contracts.storage import (
    ACT_ON_STORAGE_DOMAIN,
    CREATE_STORAGE_DOMAIN,
    DELETE_STORAGE_DOMAIN,
    FIND_LEASE_PROOFS,
    PREPARE_LEASE,
    REACH_DISKS,
    READ_HOST_LEASES,
    RELEASE_LEASE,
    UPDATE_STORAGE_DOMAIN,
    ActOnStorageDomain,
    CreateStorageDomain,
    DeleteStorageDomain,
    DomainKind,
    DomainStatus,
    FindLeaseProofs,
    PrepareLease,
    ReachDisks,
    ReadHostLeases,
    ReleaseLease,
    StorageDomain,
    UpdateStorageDomain,
)
from volery.contracts.vm import VmStatus
from volery.runtime.programs import Settings

ABLE = LeaseAbility(version="3.8", domains=True, watchdog=Watchdog(armed=True, inescapable=True))


async def becomes(at: Site, number: int, **fields: Any) -> None:
    """What inventory says of a host from now on."""
    at.rows[number] = replace(at.rows[number], **fields)
    await at.world.put(HOST_CHANGED, at.rows[number])


async def able(at: Site, number: int, ability: LeaseAbility = ABLE) -> None:
    host = at.rows[number]
    boot_id = at.hosts[number].agent.boot_id
    await becomes(at, number, boot_id=boot_id, capabilities=replace(host.capabilities, leases=ability))


async def joined_by(at: Site, domain: StorageDomain, *numbers: int) -> StorageDomain:
    async def joined() -> StorageDomain | None:
        found = await at.domain(domain.id)
        return found if set(found.lease_host_ids) == {at.rows[n].id for n in numbers} else None

    found: StorageDomain = await at.until(joined)
    return found


@pytest.mark.parametrize(
    ("able_hosts", "fields", "holds"),
    [
        ((0, 1), {}, True),
        ((0, 1), {"leases": False}, False),
        ((0, 1), {"host_id": "local"}, False),
        ((0, 1), {"data_center_id": ""}, False),
        ((0,), {}, False),
    ],
)
async def test_a_new_domain_holds_leases_where_all_hosts_can(
    configured: Settings, able_hosts: tuple[int, ...], fields: dict[str, Any], holds: bool
) -> None:
    async with site(configured, hosts=2) as at:
        for number in able_hosts:
            await able(at, number)
        asked = await at.new_domain(name="asked", path="/srv/asked", leases=True)
        await joined_by(at, asked, *able_hosts)
        own = {"host_id": at.rows[0].id} if fields.get("host_id") == "local" else {}
        domain = await at.new_domain(**fields | own)
        assert domain.leases is holds
        if holds:
            await joined_by(at, domain, 0, 1)


async def test_a_host_alone_is_no_reason_for_leases(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        await able(at, 0)
        await joined_by(at, await at.new_domain(name="asked", path="/srv/asked", leases=True), 0)
        assert not (await at.new_domain()).leases


def numbers_of(at: Site, domain: StorageDomain) -> list[int]:
    return [host.joined[domain.id].host_number for host in at.hosts if domain.id in host.joined]


def joins(host: StorageHost) -> list[Any]:
    return host.agent.begun("lease.join")


async def test_hosts_join_under_numbers_of_their_own_and_again_after_a_boot(configured: Settings) -> None:
    async with site(configured, hosts=3) as at:
        for number in range(3):
            await able(at, number)
        domain = await at.new_domain(leases=True, lease_io_timeout_seconds=2)
        domain = await joined_by(at, domain, 0, 1, 2)
        assert sorted(numbers_of(at, domain)) == [1, 2, 3]
        first = joins(at.hosts[0])[-1]
        assert (first.path, first.io_timeout_seconds, first.reset_host) == (
            f"/srv/data/{domain.id}/leases/lockspace",
            2,
            False,
        )
        before = at.hosts[1].joined[domain.id]
        await at.hosts[1].boot()
        await able(at, 1)

        async def again() -> bool:
            now = at.hosts[1].joined.get(domain.id)
            return now is not None and now.generation == before.generation + 1

        await at.until(again)
        assert at.hosts[1].joined[domain.id].host_number == before.host_number
        await joined_by(at, domain, 0, 1, 2)


async def test_a_host_that_cannot_hold_leases_says_why_and_nothing_else_is_refused(
    configured: Settings,
) -> None:
    async with site(configured, hosts=2) as at:
        await able(at, 0)
        await able(at, 1, LeaseAbility(problem="sanlock doesn't run on this host"))
        domain = await joined_by(at, await at.new_domain(leases=True), 0)

        async def told() -> bool:
            problems = (await at.domain(domain.id)).lease_problems
            return problems == {at.rows[1].id: "sanlock doesn't run on this host"}

        await at.until(told)
        assert joins(at.hosts[1]) == []
        disk = await at.new_disk(domain)
        reach = await at.bus.ask(REACH_DISKS, ReachDisks(disk_ids=(disk.id,)))
        assert set(reach.host_ids) == {row.id for row in at.rows}
        reach = await at.bus.ask(REACH_DISKS, ReachDisks(disk_ids=(disk.id,), lease_domain_id=domain.id))
        assert (reach.host_ids, reach.lease_problem) == ((at.rows[0].id,), "")
        ask = PrepareLease(storage_domain_id=domain.id, vm_id=new_id(), host_id=at.rows[1].id)
        with pytest.raises(Refused, match="sanlock doesn't run on this host"):
            await at.bus.ask(PREPARE_LEASE, ask)


async def test_a_domain_without_leases_has_nobody_join(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        await able(at, 0)
        domain = await at.new_domain()
        await at.hosts[0].agent.report("storage")
        await at.hosts[0].agent.until_committed("storage")
        assert joins(at.hosts[0]) == []
        assert (domain.lease_host_ids, domain.lease_problems) == ((), {})
        ask = PrepareLease(storage_domain_id=domain.id, vm_id=new_id(), host_id=at.rows[0].id)
        with pytest.raises(Refused, match="holds no leases"):
            await at.bus.ask(PREPARE_LEASE, ask)
        await at.bus.ask(UPDATE_STORAGE_DOMAIN, UpdateStorageDomain(id=domain.id, leases=True))
        await joined_by(at, domain, 0)
        await at.bus.ask(UPDATE_STORAGE_DOMAIN, UpdateStorageDomain(id=domain.id, leases=False))

        async def left() -> bool:
            return not at.hosts[0].joined

        await at.until(left)


async def test_a_number_is_not_given_again_while_it_may_be_held(configured: Settings) -> None:
    async with site(configured, hosts=3) as at:
        await able(at, 0)
        domain = await joined_by(at, await at.new_domain(leases=True), 0)
        held = at.hosts[0].joined[domain.id].host_number
        await at.hosts[0].agent.kill()
        await at.world.take(HOST_DELETED, at.rows[0])
        await able(at, 1)
        domain = await joined_by(at, domain, 1)
        assert at.hosts[1].joined[domain.id].host_number != held
        second = at.hosts[1].joined[domain.id].host_number
        await becomes(at, 1, status=HostStatus.MAINTENANCE)

        async def left() -> bool:
            return not at.hosts[1].joined

        await at.until(left)
        await at.hosts[1].agent.until_committed("storage")
        await becomes(at, 1, status=HostStatus.UP)
        domain = await joined_by(at, domain, 1)
        assert at.hosts[1].joined[domain.id].host_number == second


async def test_a_join_that_fails_is_shown_and_tried_again(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        at.hosts[0].refusing["lease.join"] = Refused(Kind.UNAVAILABLE, "sanlock could not join the lockspace")
        await able(at, 0)
        domain = await at.new_domain(leases=True)

        async def told() -> bool:
            return "could not join" in (await at.domain(domain.id)).lease_problems.get(at.rows[0].id, "")

        await at.until(told)
        assert (await at.domain(domain.id)).status is DomainStatus.ACTIVE
        at.hosts[0].refusing.clear()
        await becomes(at, 0, status=HostStatus.NON_OPERATIONAL)
        domain = await joined_by(at, domain, 0)
        assert domain.lease_problems == {}


async def test_a_vms_lease_is_made_once_and_goes_with_it(configured: Settings) -> None:
    async with site(configured, hosts=2) as at:
        for number in range(2):
            await able(at, number)
        domain = await joined_by(at, await at.new_domain(leases=True), 0, 1)
        vm = await at.world.vm(at.center, status=VmStatus.UP, host_id=at.rows[0].id)
        ask = PrepareLease(storage_domain_id=domain.id, vm_id=vm.id, host_id=at.rows[0].id)
        lease = await at.bus.ask(PREPARE_LEASE, ask)
        assert lease == await at.bus.ask(PREPARE_LEASE, ask)
        path = f"/srv/data/{domain.id}/leases/{vm.id}"
        assert (lease.lockspace, lease.key, lease.path) == (domain.id, vm.id, path)
        at.shelf.leases[path] = at.rows[0].id

        off = UpdateStorageDomain(id=domain.id, leases=False)
        with pytest.raises(Refused, match="holds the leases of VM v1"):
            await at.bus.ask(UPDATE_STORAGE_DOMAIN, off)
        maintain = ActOnStorageDomain(id=domain.id, action="maintain")

        async def known() -> bool:
            try:
                op = await at.bus.ask(ACT_ON_STORAGE_DOMAIN, maintain)
            except Refused as refused:
                return "used by running VMs v1" in refused.message
            await at.ended(op)
            return False

        await at.until(known)
        await at.world.put(HOST_CHANGED, at.rows[0])
        await at.bus.ask(RELEASE_LEASE, ReleaseLease(storage_domain_id=domain.id, vm_id=vm.id))
        assert path in at.shelf.leases, "held: it stays"
        at.shelf.leases[path] = ""
        await at.world.delete_vm(vm)

        async def gone() -> bool:
            return path not in at.shelf.leases

        await at.until(gone)
        await at.bus.ask(UPDATE_STORAGE_DOMAIN, off)


async def test_maintenance_leaves_the_lockspace_and_activation_joins_it_again(configured: Settings) -> None:
    async with site(configured, hosts=2) as at:
        for number in range(2):
            await able(at, number)
        domain = await joined_by(at, await at.new_domain(leases=True), 0, 1)
        numbers = numbers_of(at, domain)
        for action in ("maintain", "activate", "maintain", "detach"):
            op = await at.bus.ask(ACT_ON_STORAGE_DOMAIN, ActOnStorageDomain(id=domain.id, action=action))
            await at.done(op)
            if action == "activate":
                await joined_by(at, domain, 0, 1)
                assert numbers_of(at, domain) == numbers
            else:
                assert numbers_of(at, domain) == []
                assert (await at.domain(domain.id)).lease_host_ids == ()
        orders = [kind for kind, _ in at.hosts[0].agent.log if kind in ("lease.leave", "storage.disconnect")]
        assert orders == ["lease.leave", "storage.disconnect"] * 2
        await at.bus.ask(DELETE_STORAGE_DOMAIN, DeleteStorageDomain(id=domain.id))


async def test_only_leases_that_could_prove_something_are_read(configured: Settings) -> None:
    async with site(configured, hosts=2) as at:
        for number in range(2):
            await able(at, number)
        domain = await joined_by(at, await at.new_domain(leases=True), 0, 1)
        silent, reader = at.rows[0].id, at.rows[1].id
        ask = ReadHostLeases(host_id=silent)
        assert (await at.bus.ask(READ_HOST_LEASES, ask)).leases == ()
        on = UpdateStorageDomain(id=domain.id, reset_hosts=True)
        await at.bus.ask(UPDATE_STORAGE_DOMAIN, on)
        for host in at.hosts:
            await host.agent.report("storage")

        async def telling() -> Any:
            return (await at.bus.ask(READ_HOST_LEASES, ask)).leases

        (seen,) = await at.until(telling)
        assert seen.readings is not None
        assert (seen.reader_id, seen.boot_id) == (reader, at.hosts[0].agent.boot_id)
        assert seen.joined == at.hosts[0].joined[domain.id]
        assert seen.readings.second.generation == seen.joined.generation
        found = await at.bus.ask(FIND_LEASE_PROOFS, FindLeaseProofs())
        assert found.domains == dict.fromkeys((silent, reader), domain.name)
        at.hosts[1].refusing["lease.read_host"] = Refused(Kind.UNAVAILABLE, "the storage could not be read")
        (seen,) = (await at.bus.ask(READ_HOST_LEASES, ask)).leases
        assert (seen.readings, seen.problem) == (None, "the storage could not be read")
        await able(at, 0, replace(ABLE, watchdog=Watchdog(armed=True)))

        async def nothing() -> bool:
            return not (await at.bus.ask(READ_HOST_LEASES, ask)).leases

        await at.until(nothing)
        assert list((await at.bus.ask(FIND_LEASE_PROOFS, FindLeaseProofs())).domains) == [reader]
        await becomes(at, 0, status=HostStatus.NON_RESPONSIVE)

        async def nobody_could_read_it() -> bool:
            return not (await at.bus.ask(FIND_LEASE_PROOFS, FindLeaseProofs())).domains

        await at.until(nobody_could_read_it)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kind": DomainKind.ISCSI, "portal": "h:1", "iqn": "iqn.2026-11.x:y"}, "which can't hold leases"),
    ({"path": "/srv/a", "host_id": "local"}, "belongs to one host"),
    ({"path": "/srv/a", "lease_io_timeout_seconds": 0}, "give 1 to 60 s"),
    ({"path": "/srv/a", "leases": False, "reset_hosts": True}, "only if it holds leases"),
]


async def test_leases_where_none_can_be_are_refused(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        for fields, sentence in BAD:
            given = {"name": "n", "kind": DomainKind.DIRECTORY, "leases": True} | fields
            if given.get("host_id"):
                given["host_id"] = at.rows[0].id
            with pytest.raises(Refused, match=sentence):
                await at.bus.ask(CREATE_STORAGE_DOMAIN, CreateStorageDomain(**given))
        domain = await at.new_domain(leases=True)
        change = UpdateStorageDomain(id=domain.id, lease_io_timeout_seconds=2)
        with pytest.raises(Refused, match="switch its leases off"):
            await at.bus.ask(UPDATE_STORAGE_DOMAIN, change)
        assert at.hosts[0].agent.begun("lease.join") == []


MEMBER = Member("d", "h", 1, True, "b1", 7, 10, True)


def test_a_lease_of_another_boot_or_without_watchdog_could_prove_nothing() -> None:
    host = HostRow("h", "h", "c", "up", "", "b1", ABLE)
    assert lease_model.could_prove(MEMBER, lease_model.watchdog_of(MEMBER, host))
    later = HostRow("h", "h", "c", "up", "", "b2", ABLE)
    assert not lease_model.could_prove(MEMBER, lease_model.watchdog_of(MEMBER, later))
    unable = Member("d", "h", 1, True, "b1", 7, 10, False)
    assert not lease_model.could_prove(unable, lease_model.watchdog_of(unable, host))
    assert MEMBER.joined == LockspaceReport(domain_id="d", host_number=1, generation=7, reset_host=True)
