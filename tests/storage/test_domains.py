"""The life of a storage domain, on hosts that speak the real protocol."""

from __future__ import annotations

import pytest

from tests.storage.scripted_host import GIB
from tests.storage.scripted_storage import key, site
from volery.contracts.cluster import GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.storage import (
    ACT_ON_STORAGE_DOMAIN,
    ATTACH_DISK_TO,
    ATTACH_STORAGE_DOMAIN,
    CREATE_STORAGE_DOMAIN,
    DELETE_STORAGE_DOMAIN,
    DETACH_DISK_FROM,
    GET_STORAGE_DOMAIN,
    LIST_STORAGE_DOMAINS,
    ActOnStorageDomain,
    AttachDiskTo,
    AttachStorageDomain,
    CreateStorageDomain,
    DeleteStorageDomain,
    DetachDiskFrom,
    DomainKind,
    DomainStatus,
)
from volery.runtime.programs import Settings


async def test_a_new_domain_is_connected_on_every_host(configured: Settings) -> None:
    async with site(configured, hosts=3) as at:
        domain = await at.new_domain()
        assert domain.status is DomainStatus.ACTIVE
        assert set(domain.host_ids) == {host.agent.host_id for host in at.hosts}
        assert domain.capacity_bytes == 100 * GIB
        assert domain.busy_with == ""
        initialised = [q for host in at.hosts for q in host.agent.begun("storage.connect") if q.initialise]
        assert len(initialised) == 1


async def test_a_domain_that_no_host_reaches_leaves_nothing(configured: Settings) -> None:
    async with site(configured) as at:
        for host in at.hosts:
            host.unreachable.add("/srv/nowhere")
        ask = CreateStorageDomain(
            name="n", kind=DomainKind.DIRECTORY, path="/srv/nowhere", data_center_id=at.center.id
        )
        op = await at.bus.ask(CREATE_STORAGE_DOMAIN, ask)
        assert "isn't a directory on this host" in await at.refused(op)
        with pytest.raises(Refused) as refused:
            await at.bus.ask(GET_STORAGE_DOMAIN, GetById(id=op.object_id))
        assert refused.value.kind is Kind.NOT_FOUND
        assert at.shelf.markers == set()
        assert (await at.bus.ask(LIST_STORAGE_DOMAINS, ListQuery())).items == ()


async def test_an_unattached_domain_goes_through_its_whole_life(configured: Settings) -> None:
    async with site(configured) as at:
        domain = await at.new_domain(data_center_id="")
        assert domain.status is DomainStatus.UNATTACHED
        assert domain.capacity_bytes == 100 * GIB
        assert all(not host.connected for host in at.hosts)
        attach = AttachStorageDomain(id=domain.id, data_center_id=at.center.id)
        await at.done(await at.bus.ask(ATTACH_STORAGE_DOMAIN, attach))
        domain = await at.domain(domain.id)
        assert (domain.status, len(domain.host_ids)) == (DomainStatus.ACTIVE, 2)
        with pytest.raises(Refused, match="attached to data center"):
            await at.bus.ask(ATTACH_STORAGE_DOMAIN, attach)
        with pytest.raises(Refused, match="maintenance"):
            await at.bus.ask(DELETE_STORAGE_DOMAIN, DeleteStorageDomain(id=domain.id))
        for action, status in (
            ("maintain", DomainStatus.MAINTENANCE),
            ("activate", DomainStatus.ACTIVE),
            ("refresh", DomainStatus.ACTIVE),
            ("maintain", DomainStatus.MAINTENANCE),
            ("detach", DomainStatus.UNATTACHED),
        ):
            ask = ActOnStorageDomain(id=domain.id, action=action)
            await at.done(await at.bus.ask(ACT_ON_STORAGE_DOMAIN, ask))
            assert (await at.domain(domain.id)).status is status
        await at.bus.ask(DELETE_STORAGE_DOMAIN, DeleteStorageDomain(id=domain.id))
        with pytest.raises(Refused, match="there is no storage domain"):
            await at.domain(domain.id)


async def test_a_lost_storage_can_be_forgotten_with_its_disks(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain)
        vm_id = new_id()
        await at.bus.ask(ATTACH_DISK_TO, AttachDiskTo(disk_id=disk.id, vm_id=vm_id))
        at.hosts[0].unreachable.add("/srv/data")
        destroy = DeleteStorageDomain(id=domain.id, destroy=True)
        with pytest.raises(Refused, match="put it into maintenance before"):
            await at.bus.ask(DELETE_STORAGE_DOMAIN, destroy)
        maintain = ActOnStorageDomain(id=domain.id, action="maintain")
        await at.done(await at.bus.ask(ACT_ON_STORAGE_DOMAIN, maintain))
        with pytest.raises(Refused, match="is attached to VM"):
            await at.bus.ask(DELETE_STORAGE_DOMAIN, destroy)
        await at.bus.ask(DETACH_DISK_FROM, DetachDiskFrom(disk_id=disk.id, vm_id=vm_id))
        await at.bus.ask(DELETE_STORAGE_DOMAIN, destroy)
        with pytest.raises(Refused, match="there is no disk"):
            await at.disk(disk.id)
        assert len(at.shelf.volumes) == 1


async def test_a_host_that_comes_up_gets_the_domains(configured: Settings) -> None:
    async with site(configured) as at:
        late = at.rows[1]
        down = type(late)(
            **{f: getattr(late, f) for f in late.__struct_fields__} | {"status": HostStatus.MAINTENANCE}
        )
        await at.world.put(HOST_CHANGED, down)
        domain = await at.new_domain()

        async def alone() -> bool:
            return (await at.domain(domain.id)).host_ids == (at.rows[0].id,)

        await at.until(alone)
        await at.world.put(HOST_CHANGED, late)

        async def both() -> bool:
            return set((await at.domain(domain.id)).host_ids) == {row.id for row in at.rows}

        await at.until(both)


async def test_a_local_domain_is_connected_on_its_host_alone(configured: Settings) -> None:
    async with site(configured) as at:
        domain = await at.new_domain(host_id=at.rows[1].id)
        assert domain.host_ids == (at.rows[1].id,)
        assert at.hosts[0].connected == {}


async def test_a_request_id_makes_one_domain(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        ask = CreateStorageDomain(name="once", kind=DomainKind.DIRECTORY, path="/srv/once")
        first = await at.bus.ask(CREATE_STORAGE_DOMAIN, ask, key("k"))
        again = await at.bus.ask(CREATE_STORAGE_DOMAIN, ask, key("k"))
        assert again == first
        with pytest.raises(Refused, match="already"):
            await at.bus.ask(CREATE_STORAGE_DOMAIN, ask, key("other"))


BAD: list[tuple[dict[str, object], str]] = [
    ({"name": " "}, "1 to 255"),
    ({"name": "a\nb"}, "control characters"),
    ({"name": "x" * 256}, "1 to 255"),
    ({"path": "srv"}, "absolute path"),
    ({"path": "/srv/../etc"}, "without `..`"),
    ({"path": "/"}, "absolute path"),
    ({"path": "/srv/\x1b[2J"}, "absolute path"),
    ({"path": "/srv", "portal": "h:1"}, "has no portal"),
    ({"path": "/srv", "data_center_id": "../x"}, "isn't the id"),
    ({"path": "/srv", "data_center_id": new_id()}, "there is no data center"),
    ({"path": "/srv", "host_id": new_id()}, "isn't up"),
    ({"kind": DomainKind.ISCSI, "portal": "a b", "iqn": "iqn.2026-11.x:y"}, "isn't an iSCSI portal"),
    ({"kind": DomainKind.ISCSI, "portal": "h:99999", "iqn": "iqn.2026-11.x:y"}, "isn't an iSCSI portal"),
    ({"kind": DomainKind.ISCSI, "portal": "h", "iqn": "x'; drop"}, "isn't the name of an iSCSI target"),
    (
        {"kind": DomainKind.ISCSI, "portal": "h", "iqn": "iqn.2026-11.x:y", "chap_user": "u"},
        "both a user and a password",
    ),
    ({"kind": DomainKind.ISCSI, "path": "/x", "portal": "h", "iqn": "iqn.2026-11.x:y"}, "has no path"),
]


async def test_bad_domains_are_refused_with_a_reason(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        for fields, sentence in BAD:
            given = {"name": "n", "kind": DomainKind.DIRECTORY} | fields
            with pytest.raises(Refused, match=sentence):
                await at.bus.ask(CREATE_STORAGE_DOMAIN, CreateStorageDomain(**given))  # type: ignore[arg-type]
        assert (await at.bus.ask(LIST_STORAGE_DOMAINS, ListQuery())).items == ()
        assert at.hosts[0].agent.log == []
