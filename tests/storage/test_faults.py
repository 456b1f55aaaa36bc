"""Storage while agents, the service itself and the bus's facts fail: nothing is lost, nothing is written twice."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from typing import Any

import msgspec
import pytest

from services.storage.service import make_service
from tests.storage.scripted_host import GIB, MIB
from tests.storage.scripted_storage import Site, key, site, storage_process
from tests.support.bell import Bell
from tests.support.runtime import running
from volery.contracts.agent import VolumeReport
from volery.contracts.base import Owner
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.domain import ImageFormat
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, HOST_DELETED, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.liveness import LIVENESS_CHANGED, LivenessState
from volery.contracts.operation import (
    CANCEL_OPERATION,
    GET_OPERATION,
    CancelOperation,
    GetOperation,
    ListQuery,
    Operation,
)
from volery.contracts.storage import (
    ACT_ON_STORAGE_DOMAIN,
    COPY_DISK,
    CREATE_DISK,
    DELETE_DISK,
    DELETE_STORAGE_DOMAIN,
    DISCOVER_TARGETS,
    GET_DISK,
    GET_STORAGE_DOMAIN,
    LIST_DISKS,
    RESIZE_DISK,
    ActOnStorageDomain,
    CopyDisk,
    CreateDisk,
    DeleteStorageDomain,
    DiscoverTargets,
    Disk,
    DiskStatus,
    DomainKind,
    DomainStatus,
    ResizeDisk,
)
from volery.contracts.volume_orders import CREATE_VOLUME
from volery.contracts.volumes import SNAPSHOT_DISKS, SnapshotDisks
from volery.runtime.database import open_direct
from volery.runtime.programs import Settings
from volery.runtime.service import Service


async def working(at: Site, disk_id: str) -> int:
    """Which host writes the disk now."""

    async def found() -> str:
        return next(iter(at.shelf.writers.get(disk_id, ())), "")

    host_id = await at.until(found)
    return [host.agent.host_id for host in at.hosts].index(host_id)


async def test_an_order_survives_its_agent_and_never_moves_to_another_host(configured: Settings) -> None:
    async with site(configured) as at:
        domain = await at.new_domain()
        held = asyncio.Event()
        for host in at.hosts:
            host.held[CREATE_VOLUME.kind] = held
        op = await at.bus.ask(CREATE_DISK, CreateDisk(name="d", storage_domain_id=domain.id, size_bytes=GIB))
        first = at.hosts[await working(at, op.object_id)]
        await first.agent.kill()
        other = next(host for host in at.hosts if host is not first)
        with pytest.raises(Refused, match=r"while operation .* makes it"):
            await at.bus.ask(DELETE_DISK, DeleteById(id=op.object_id))
        await first.agent.start()
        held.set()
        await at.done(op)
        assert other.agent.begun("volume.create") == []
        assert at.shelf.crowded == []


async def test_the_volume_of_a_host_that_died_is_removed_by_another(configured: Settings) -> None:
    """Not before the proof: until then whatever writes there may go on."""
    ha = Bell()
    async with running(configured, ha.service()), site(configured) as at:
        domain = await at.new_domain()
        for host in at.hosts:
            host.held[CREATE_VOLUME.kind] = asyncio.Event()
        op = await at.bus.ask(CREATE_DISK, CreateDisk(name="d", storage_domain_id=domain.id, size_bytes=GIB))
        first = at.hosts[await working(at, op.object_id)].agent
        await first.kill()
        await at.bus.ask(CANCEL_OPERATION[Owner.STORAGE], CancelOperation(id=op.id))
        with pytest.raises(TimeoutError):
            await at.ended(op, 0.5)
        said = ha.holds(first.host_id, first.boot_id, LivenessState.DEAD, first.boot_id)
        await ha.says(LIVENESS_CHANGED, said)
        assert (await at.ended(op)).state == "cancelled"
        assert (await at.bus.ask(LIST_DISKS, ListQuery())).items == ()
        (other,) = (host.agent for host in at.hosts if host.agent is not first)
        assert len(other.begun("volume.delete")) == 1


async def test_a_cancel_waits_for_a_host_that_is_away(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        at.hosts[0].held[CREATE_VOLUME.kind] = asyncio.Event()
        op = await at.bus.ask(CREATE_DISK, CreateDisk(name="d", storage_domain_id=domain.id, size_bytes=GIB))
        await working(at, op.object_id)
        await at.hosts[0].agent.kill()
        await at.bus.ask(CANCEL_OPERATION[Owner.STORAGE], CancelOperation(id=op.id))
        with pytest.raises(TimeoutError):
            await at.ended(op, 1.0)
        await at.hosts[0].agent.start()
        assert (await at.ended(op)).state == "cancelled"
        assert (await at.bus.ask(LIST_DISKS, ListQuery())).items == ()
        assert at.shelf.volumes == {}


async def test_lost_facts_come_again(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        at.hosts[0].agent.drop = lambda subject: subject.endswith("order_finished")
        disk = await at.new_disk(domain)
        assert disk.status is DiskStatus.OK
        at.hosts[0].agent.drop = lambda subject: True
        await at.hosts[0].agent.report("storage")
        at.hosts[0].agent.drop = lambda subject: False
        again = await at.new_disk(domain, "again")
        assert again.status is DiskStatus.OK


async def test_an_agent_with_a_new_journal_is_admitted_and_reconnected(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        host = at.hosts[0]
        await host.agent.kill()
        host.connected.clear()
        host.agent.lose_journal()
        await host.agent.start()

        async def back() -> bool:
            return domain.id in host.connected

        await at.until(back)
        assert (await at.new_disk(domain)).status is DiskStatus.OK


async def test_a_silent_host_no_longer_counts(configured: Settings) -> None:
    async with site(configured) as at:
        domain = await at.new_domain()
        rows = [{f: getattr(row, f) for f in row.__struct_fields__} for row in at.rows]
        for row, fields in zip(at.rows, rows, strict=True):
            await at.world.put(HOST_CHANGED, type(row)(**fields | {"status": HostStatus.NON_RESPONSIVE}))

        async def inactive() -> bool:
            return (await at.domain(domain.id)).status is DomainStatus.INACTIVE

        await at.until(inactive)
        with pytest.raises(Refused, match="no host of its data center reaches"):
            await at.bus.ask(CREATE_DISK, CreateDisk(name="d", storage_domain_id=domain.id, size_bytes=GIB))
        await at.world.put(HOST_CHANGED, at.rows[0])
        await at.world.take(HOST_DELETED, at.rows[1])

        async def one() -> bool:
            return (await at.domain(domain.id)).host_ids == (at.rows[0].id,)

        await at.until(one)


async def test_what_is_on_the_storage_is_compared_with_what_is_known(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        disk = await at.new_disk(domain)
        path = f"/srv/data/{domain.id}/disks/{disk.id}.qcow2"
        volume = at.shelf.volumes.pop(path)
        stranger = f"/srv/data/{domain.id}/disks/stranger.qcow2"
        at.shelf.volumes[stranger] = VolumeReport(
            path=stranger, size_bytes=1, used_bytes=1, format=ImageFormat.QCOW2
        )
        agent = at.hosts[0].agent
        await agent.report("storage")

        async def status() -> DiskStatus:
            return (await at.disk(disk.id)).status

        async def missing() -> bool:
            return await status() is DiskStatus.MISSING

        await at.until(missing)
        assert (await at.domain(domain.id)).strangers == (stranger,)
        with pytest.raises(Refused, match="its storage says that the volume is gone"):
            await at.bus.ask(RESIZE_DISK, ResizeDisk(id=disk.id, size_bytes=2 * GIB))
        at.shelf.volumes[path] = volume
        await agent.report("storage")

        async def there() -> bool:
            return await status() is DiskStatus.OK

        await at.until(there)
        del at.shelf.volumes[path]
        await agent.report("storage")
        await at.until(missing)
        await at.done(await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id)))
        assert stranger in at.shelf.volumes


async def test_a_volume_that_can_not_be_removed_now_is_removed_later(configured: Settings) -> None:
    async with (
        storage_process(configured, VOLERY_STORAGE_DISCARD_SECONDS="0.5"),
        site(configured, hosts=1, outside=True) as at,
    ):
        domain = await at.new_domain()
        host = at.hosts[0]
        host.refusing["volume.create"] = Refused(Kind.EXHAUSTED, "no space")
        held = host.held["volume.delete"] = asyncio.Event()
        op = await at.bus.ask(CREATE_DISK, CreateDisk(name="d", storage_domain_id=domain.id, size_bytes=GIB))
        assert "no space" in await at.refused(op)
        assert (await at.disk(op.object_id)).status is DiskStatus.ILLEGAL
        held.set()
        row = at.rows[0]
        fields = {f: getattr(row, f) for f in row.__struct_fields__}
        for status in (HostStatus.CONNECTING, HostStatus.UP):
            await at.world.put(HOST_CHANGED, type(row)(**fields | {"status": status}))

        async def gone() -> bool:
            return (await at.bus.ask(LIST_DISKS, ListQuery())).items == ()

        await at.until(gone)


async def test_directories_of_deleted_domains_are_cleaned(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        for action in ("maintain", "detach"):
            await at.done(
                await at.bus.ask(ACT_ON_STORAGE_DOMAIN, ActOnStorageDomain(id=domain.id, action=action))
            )
        await at.bus.ask(DELETE_STORAGE_DOMAIN, DeleteStorageDomain(id=domain.id))

        async def clean() -> bool:
            return at.shelf.markers == set()

        await at.until(clean)


async def test_discovery(configured: Settings) -> None:
    async with site(configured, hosts=1) as at:
        at.shelf.luns["iqn.2026-11.test:a"] = {0: GIB}
        found = await at.bus.ask(DISCOVER_TARGETS, DiscoverTargets(portal="192.0.2.1"))
        assert found.targets[0].luns[0].size_bytes == GIB
        at.hosts[0].refusing["storage.discover_iscsi"] = Refused(Kind.UNAVAILABLE, "the portal is silent")
        with pytest.raises(Refused, match="is silent"):
            await at.bus.ask(DISCOVER_TARGETS, DiscoverTargets(portal="192.0.2.1"))
        with pytest.raises(Refused, match="isn't an iSCSI portal"):
            await at.bus.ask(DISCOVER_TARGETS, DiscoverTargets(portal="h/../x"))


def slow(orders: dict[str, tuple[Any, Any]], chance: random.Random) -> None:
    """Every order takes a moment, so that kills meet it at work."""
    for kind, (order, act) in list(orders.items()):

        async def later(question: Any, act: Any = act) -> Any:
            await asyncio.sleep(chance.uniform(0.0, 0.3))
            return await act(question)

        orders[kind] = (order, later)


async def one(at: Site, chance: random.Random, domain_id: str, verb: str, mine: list[str]) -> str:
    """One operation on disks of one's own, to its end, whatever is killed meanwhile; answers how it ended."""
    caller = key(new_id())
    disk_id = chance.choice(mine) if mine else ""
    if verb in ("create", "cancel") or not disk_id:
        ask = CreateDisk(name=verb, storage_domain_id=domain_id, size_bytes=GIB)
        op = await insist(at, CREATE_DISK, ask, caller)
    elif verb == "copy":
        op = await insist(at, COPY_DISK, CopyDisk(id=disk_id, name="copy"), caller)
    elif verb == "snapshot":
        ask = SnapshotDisks(snapshot_id=new_id(), disk_ids=tuple({disk_id, chance.choice(mine)}))
        op = await insist(at, SNAPSHOT_DISKS, ask, caller)
    elif verb == "grow":
        size = (await insist(at, GET_DISK, GetById(id=disk_id))).size_bytes + MIB
        op = await insist(at, RESIZE_DISK, ResizeDisk(id=disk_id, size_bytes=size), caller)
    else:
        op = await insist(at, DELETE_DISK, DeleteById(id=disk_id), caller)
        mine.remove(disk_id)
    if verb == "cancel" and chance.random() < 0.8:
        with contextlib.suppress(Refused):
            await at.bus.ask(CANCEL_OPERATION[Owner.STORAGE], CancelOperation(id=op.id))
    ended = await insist_ended(at, op)
    if ended.state == "succeeded" and op.object_id not in mine and ended.kind in ("disk.create", "disk.copy"):
        mine.append(op.object_id)
    return str(ended.state)


async def insist(at: Site, call: Any, ask: Any, caller: Any = None) -> Any:
    """The answer, asked again under the same id while storage is down or its answer was lost."""
    while True:
        try:
            return await at.bus.ask(call, ask, caller)
        except Refused as refused:
            if refused.kind not in (Kind.TIMEOUT, Kind.UNAVAILABLE):
                raise
            await asyncio.sleep(0.05)


async def insist_ended(at: Site, operation: Operation) -> Operation:
    async with asyncio.timeout(60):
        while True:
            found: Operation = await insist(at, GET_OPERATION[Owner.STORAGE], GetOperation(id=operation.id))
            if found.ended_at is not None:
                return found
            await asyncio.sleep(0.02)


async def test_random_kills_leave_no_orphan(configured: Settings) -> None:
    """Disks are made, copied, grown, put above new volumes, deleted and cancelled while the service and the agents are killed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with storage_process(configured) as storage, site(configured, hosts=2, outside=True) as at:
        domain = await at.new_domain()
        for host in at.hosts:
            slow(host.agent.orders, chance)
        ended: list[str] = []
        refusals: list[Refused] = []
        stop = asyncio.Event()

        async def busy() -> None:
            mine: list[str] = []
            while not stop.is_set():
                verb = chance.choice(("create", "create", "copy", "grow", "delete", "cancel", "snapshot"))
                try:
                    ended.append(await one(at, chance, domain.id, verb, mine))
                except Refused as refused:
                    refusals.append(refused)

        async def break_things() -> None:
            for _ in range(5):
                await asyncio.sleep(chance.uniform(0.3, 1.0))
                if chance.random() < 0.5:
                    await storage.restart()
                else:
                    host = chance.choice(at.hosts)
                    await host.agent.kill()
                    await asyncio.sleep(chance.uniform(0.0, 0.5))
                    await host.agent.start()
            await asyncio.sleep(1.0)
            stop.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(break_things())
            for _ in range(8):
                group.create_task(busy())
        assert at.shelf.crowded == [], f"seed {seed}"
        assert not [r.message for r in refusals if r.kind is Kind.INTERNAL], f"seed {seed}"
        page = await at.bus.ask(LIST_DISKS, ListQuery(limit=1000))
        disks = [msgspec.json.decode(item, type=Disk) for item in page.items]
        assert all(disk.busy_with == "" and disk.status is DiskStatus.OK for disk in disks), f"seed {seed}"
        top = f"/srv/data/{domain.id}/disks"
        names = {f"{top}/{volume.id}.qcow2" for disk in disks for volume in disk.volumes}
        assert set(at.shelf.volumes) == names, f"seed {seed}"
        for disk in disks:
            assert at.shelf.volumes[f"{top}/{disk.leaf_id}.qcow2"].size_bytes == disk.size_bytes, (
                f"seed {seed}"
            )
        print({state: ended.count(state) for state in sorted(set(ended))})
        assert "succeeded" in ended


def hurried(kind: str, seconds: float) -> Service:
    """The service with another deadline for one kind of operation."""
    service = make_service()
    for part in service.parts:
        part.procedures_[:] = [
            dataclasses.replace(p, deadline_seconds=seconds) if p.kind == kind else p
            for p in part.procedures_
        ]
    return service


async def test_a_deadline_ends_the_operation_and_keeps_the_disk_until_the_host_speaks(
    configured: Settings,
) -> None:
    """Its host is away for good, as far as anybody knows: nobody else may get the volume, also after a restart."""
    parts = {id(part): list(part.procedures_) for part in make_service().parts}
    try:
        async with site(configured, service=hurried("disk.create", 1.0)) as at:
            domain = await at.new_domain()
            held = asyncio.Event()
            for host in at.hosts:
                host.held[CREATE_VOLUME.kind] = held
            ask = CreateDisk(name="d", storage_domain_id=domain.id, size_bytes=GIB)
            op = await at.bus.ask(CREATE_DISK, ask)
            first = at.hosts[await working(at, op.object_id)]
            await first.agent.kill()
            late = await at.ended(op, 30)
            assert (late.state, late.outcome_pending) == ("failed", True)
            assert late.problem is not None
            assert "did not finish by its deadline" in late.problem.message
            with pytest.raises(Refused, match=r"while operation .* makes it"):
                await at.bus.ask(DELETE_DISK, DeleteById(id=op.object_id))
    finally:
        for part in make_service().parts:
            part.procedures_[:] = parts[id(part)]
    async with running(configured, make_service()) as bus:
        with pytest.raises(Refused, match=r"while operation .* makes it"):
            await bus.ask(DELETE_DISK, DeleteById(id=op.object_id))
        await first.agent.start()
        async with asyncio.timeout(20):
            while True:
                freed = await bus.ask(GET_OPERATION[Owner.STORAGE], GetOperation(id=op.id))
                if not freed.outcome_pending:
                    break
                await asyncio.sleep(0.05)
        assert freed.state == "failed"
        assert (await bus.ask(LIST_DISKS, ListQuery())).items == ()
        await first.agent.kill()
    assert at.shelf.crowded == []
    assert at.shelf.volumes == {}


async def test_two_replicas_answer_as_one(configured: Settings) -> None:
    """One leads and one follows; whoever is asked, each disk is made once and every LUN has one disk."""
    async with storage_process(configured), site(configured, hosts=2) as at:
        at.shelf.luns["iqn.2026-11.test:two"] = dict.fromkeys(range(30), GIB)
        domain = await at.new_domain(
            "san", kind=DomainKind.ISCSI, portal="192.0.2.9", iqn="iqn.2026-11.test:two"
        )
        disks = await asyncio.gather(*(at.new_disk(domain, f"d{n}") for n in range(30)))
        assert sorted(disk.lun for disk in disks) == list(range(30))
        ops = [await at.bus.ask(DELETE_DISK, DeleteById(id=disk.id)) for disk in disks]
        await asyncio.gather(*(at.done(op) for op in ops))
        assert (await at.bus.ask(LIST_DISKS, ListQuery())).items == ()


async def test_facts_that_are_lost_for_good_are_made_up_by_lists(configured: Settings) -> None:
    """Facts were trimmed while storage was away: what it knows of hosts, VMs and data centers is what inventory lists."""
    async with storage_process(configured) as storage, site(configured, hosts=2, outside=True) as at:
        domain = await at.new_domain()
        vm = await at.world.vm(at.center, "gone")
        await storage.kill()
        await at.world.take(HOST_DELETED, at.rows[1])
        await at.world.delete_vm(vm)
        other = await at.world.data_center("unheard")
        stream = at.bus.client.jetstream()

        async def relayed() -> bool:
            return (await stream.get_last_msg("FACTS_INVENTORY", "fact.inventory.data_center.>")).seq > 4

        await at.until(relayed)
        await stream.purge_stream("FACTS_INVENTORY")
        await storage.start()

        async def one() -> bool:
            return (await insist(at, GET_STORAGE_DOMAIN, GetById(id=domain.id))).host_ids == (at.rows[0].id,)

        await at.until(one)
        async with open_direct(configured.database, Owner.STORAGE) as connection:
            centers = {row["id"] for row in await connection.fetch("select id from data_center")}
            assert centers == {at.center.id, other.id}
            assert await connection.fetchval("select count(*) from vm") == 0


async def test_a_host_that_takes_no_order_is_said_to_and_why(configured: Settings) -> None:
    configured = dataclasses.replace(configured, environ={"VOLERY_STORAGE_CONNECT_SECONDS": "1"})
    async with site(configured, hosts=1) as at:
        domain = await at.new_domain()
        await at.hosts[0].agent.kill()
        refresh = ActOnStorageDomain(id=domain.id, action="refresh")
        message = await at.refused(await at.bus.ask(ACT_ON_STORAGE_DOMAIN, refresh))
        assert "within 1 s how storage.connect ended: it does not answer on the bus" in message
