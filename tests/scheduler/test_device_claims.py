"""Devices of hosts on a real bus and database: each is one VM's, whoever races."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from services.scheduler import device_claims
from services.scheduler.reconcile import adopt_vms, check_counters
from services.scheduler.state import Scheduler
from tests.scheduler.fleets import GIB, cluster, host, hosts_known, inventory, placing, scheduler, until, vm
from tests.scheduler.test_claims_settle import connected, eager
from tests.scheduler.test_devices import VGPU, device
from tests.scheduler.test_placing import claims
from tests.support.runtime import running
from tests.support.speaker import Speaker
from volery.contracts.agent import HostCapabilities
from volery.contracts.cluster import CLUSTER_CHANGED, Cluster
from volery.contracts.errors import Kind, Refused
from volery.contracts.host import HOST_CHANGED, Host
from volery.contracts.host_devices import (
    LIST_HOST_DEVICES,
    AskedDevice,
    AskHostDevices,
    DeviceKind,
    DeviceUse,
    GivenDevice,
    HostDevice,
)
from volery.contracts.ids import new_id
from volery.contracts.scheduling import (
    FIND_ROOM,
    PLACE,
    RELEASE_VM_CLAIMS,
    FindRoom,
    Place,
    Placement,
    Purpose,
    ReleaseVm,
    RoomFor,
)
from volery.contracts.vm import VM_CHANGED
from volery.runtime.bus import Bus
from volery.runtime.config import DatabaseConfig
from volery.runtime.programs import Settings
from volery.runtime.tables import Stale, commit

GPU, SOUND = "10de:1eb8", "10de:10f8"
ONE = (AskedDevice(model=GPU),)
NAMED = (AskedDevice(device="pci_0000_01_00_0"),)
GROUP = (device(1, group=7), device(2, group=7, model=SOUND))


def equipped(c: Cluster, name: str, devices: Sequence[HostDevice], **fields: Any) -> Host:
    capabilities = HostCapabilities(
        memory_bytes=1024 * GIB, cpus=64, machines=("q35",), devices=tuple(devices)
    )
    return host(c.id, name=name, capabilities=capabilities, **fields)


@asynccontextmanager
async def fleet(
    configured: Settings, c: Cluster, *hosts: Host, replicas: int = 1, opened: list[Scheduler] | None = None
) -> AsyncIterator[tuple[Bus, Speaker]]:
    owner = inventory()
    async with running(configured, owner.service(), *(scheduler(opened) for _ in range(replicas))) as bus:
        await owner.says(CLUSTER_CHANGED, c)
        await owner.says(HOST_CHANGED, *hosts)
        await hosts_known(bus, len(hosts))
        yield bus, owner


def given(placed: Placement) -> list[str]:
    assert placed.host_id, placed.message
    return [one.name for one in placed.devices]


async def devices_of(bus: Bus, host_id: str) -> dict[str, DeviceUse]:
    found = await bus.ask(LIST_HOST_DEVICES, AskHostDevices(id=host_id))
    return {use.device.name: use for use in found.devices}


async def given_twice(database: DatabaseConfig) -> list[Any]:
    """Devices that two claims have, by a query that knows nothing of how they are guarded."""
    async with connected(database) as connection:
        return list(
            await connection.fetch(
                """with had as (select id, doc::json->>'host_id' as host, x->>'name' as device,
                                       coalesce(x->>'mdev_type', '') as kind
                                from claim, json_array_elements(coalesce(doc::json->'devices', '[]'::json)) as x)
                   select a.host, a.device, a.id, b.id from had a join had b
                   on a.host = b.host and a.device = b.device and a.id < b.id and (a.kind = '' or b.kind = '')"""
            )
        )


async def test_a_group_is_given_to_one_vm_a_repeat_gets_the_same_and_what_is_given_back_is_given_again(
    configured: Settings, database: DatabaseConfig
) -> None:
    c = cluster()
    h1 = equipped(c, "h1", GROUP)
    async with fleet(configured, c, h1) as (bus, _):
        first = placing(c.id, host_devices=ONE)
        placed = await bus.ask(PLACE, first)
        assert given(placed) == ["pci_0000_01_00_0", "pci_0000_02_00_0"]
        (claim,) = await claims(bus)
        assert claim.devices == placed.devices
        assert (await bus.ask(PLACE, first)).devices == placed.devices

        second = placing(c.id, host_devices=(AskedDevice(model=SOUND),), name="db")
        refused = await bus.ask(PLACE, second)
        assert not refused.host_id
        assert "VM db wants 10de:10f8 of its host, which h1 can't give" in refused.message
        assert "held by VM web" in refused.message
        assert refused.excluded_by == {"host_devices": 1}
        (remedy,) = refused.remedies
        assert remedy.sentence == "give VM db no devices of its host instead of 10de:10f8 (h1 takes it then)"
        uses = await devices_of(bus, h1.id)
        assert {name: use.vm_ids for name, use in uses.items()} == dict.fromkeys(uses, (first.need.vm_id,))
        assert {use.reason for use in uses.values()} == {"a VM has it"}

        await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=first.need.vm_id))
        assert given(await bus.ask(PLACE, second)) == ["pci_0000_01_00_0", "pci_0000_02_00_0"]
        assert await given_twice(database) == []


async def test_a_vm_that_starts_again_gets_the_device_that_it_had(configured: Settings) -> None:
    c = cluster()
    async with fleet(configured, c, equipped(c, "h1", GROUP)) as (bus, _):
        ask = placing(c.id, host_devices=NAMED)
        for epoch in range(1, 6):
            assert given(await bus.ask(PLACE, replace(ask, epoch=epoch)))[0] == "pci_0000_01_00_0"
        assert len(await claims(bus)) == 1


async def test_the_database_refuses_what_was_chosen_by_old_memory(
    configured: Settings, database: DatabaseConfig
) -> None:
    """The guards alone: claims as a scheduler would write them that has not heard of the first."""
    c = cluster()
    h1 = equipped(c, "h1", (device(1), device(2)))
    opened: list[Scheduler] = []
    async with fleet(configured, c, h1, opened=opened) as (bus, _):
        assert given(await bus.ask(PLACE, placing(c.id, host_devices=NAMED)))
        (held,) = await claims(bus)
        pool = opened[0].core.pool
        late = replace(held, id=new_id(), vm_id=new_id())
        with pytest.raises(Stale):
            await commit(pool, device_claims.take(late, "late"))
        free = GivenDevice(name="pci_0000_02_00_0", kind=DeviceKind.PCI)
        with pytest.raises(Stale):  # that one is free, but who says so?
            await commit(pool, device_claims.take(replace(late, devices=(free,)), "late"))
        now = replace(late, devices_revision=held.devices_revision + 1)
        await commit(pool, device_claims.take(replace(now, devices=(free,)), "in time"))
        async with connected(database) as connection:
            rows = await connection.fetch("select device, vm_name from claim_device order by device")
            assert [tuple(row) for row in rows] == [
                ("pci_0000_01_00_0", "web"),
                ("pci_0000_02_00_0", "in time"),
            ]


async def test_instances_are_counted(configured: Settings) -> None:
    c = cluster()
    h1 = equipped(c, "h1", (device(1, mdev_types=VGPU), device(2, mdev_types=VGPU)))
    async with fleet(configured, c, h1) as (bus, _):

        def vgpus(count: int) -> Place:
            return placing(c.id, host_devices=(AskedDevice(mdev_type="vgpu-1", count=count),))

        assert len(given(await bus.ask(PLACE, vgpus(3)))) == 3
        assert Counter(given(await bus.ask(PLACE, vgpus(4)))) == {
            "pci_0000_01_00_0": 1,
            "pci_0000_02_00_0": 3,
        }
        refused = await bus.ask(PLACE, vgpus(2))
        assert "it can make 1 more mediated device vgpu-1" in refused.message
        assert len(given(await bus.ask(PLACE, vgpus(1)))) == 1
        assert (
            "0 of its 2 devices 10de:1eb8 are free"
            in (await bus.ask(PLACE, placing(c.id, host_devices=ONE))).message
        )
        uses = await devices_of(bus, h1.id)
        assert [len(use.vm_ids) for use in uses.values()] == [2, 2]
        assert {use.reason for use in uses.values()} == {"VMs have all that it can be divided into"}


async def test_200_starts_at_once_through_three_replicas_never_give_a_device_twice(
    configured: Settings, database: DatabaseConfig
) -> None:
    c = cluster()
    kinds = [*GROUP, device(3), device(4), device(5, mdev_types=VGPU, model="10de:2230")]
    hosts = [equipped(c, f"h{n}", kinds) for n in range(6)]
    asks: list[tuple[AskedDevice, ...]] = [
        ONE,
        NAMED,
        (AskedDevice(model=GPU, count=2),),
        (AskedDevice(model=SOUND),),
        (AskedDevice(mdev_type="vgpu-1"),),
        (AskedDevice(mdev_type="vgpu-1", count=2), AskedDevice(device="pci_0000_03_00_0")),
        (),
        (AskedDevice(device="pci_0000_05_00_0"),),
    ]
    async with fleet(configured, c, *hosts, replicas=3) as (bus, _):
        questions = [
            placing(c.id, memory_bytes=GIB // 64, host_devices=asks[n % len(asks)]) for n in range(200)
        ]
        answers = await asyncio.gather(*(_placed(bus, each) for each in questions))
        placed = [answer for answer in answers if answer.host_id]
        held = await claims(bus)
        assert {answer.vm_id for answer in placed} == {claim.vm_id for claim in held}
        assert await given_twice(database) == []
        whole = {(h.host_id, d.name) for h in held for d in h.devices if not d.mdev_type}
        for name in ("pci_0000_01_00_0", "pci_0000_02_00_0"):  # groups whole
            assert {h for h, d in whole if d == name} == {h for h, d in whole if d == "pci_0000_01_00_0"}
        made = Counter((h.host_id, d.mdev_type) for h in held for d in h.devices if d.mdev_type)
        assert max(made.values(), default=0) <= 4
        free = {(h.id, f"pci_0000_0{n}_00_0") for h in hosts for n in (1, 2, 3, 4)} - whole
        assert not free, "whoever wanted one got what there was"

        await asyncio.gather(*(bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=claim.vm_id)) for claim in held))

        async def all_free() -> bool:
            everything = tuple(AskedDevice(device=one.name) for one in kinds)
            return (
                await bus.ask(PLACE, placing(c.id, host_devices=everything, place={"dry_run": True}))
            ).fitting == 6

        await until(all_free)


async def _placed(bus: Bus, ask: Place) -> Placement:
    """Asked again under the same epoch when the answer is late: the machine is busy."""
    while True:
        try:
            return await bus.ask(PLACE, ask)
        except Refused as refused:
            if refused.kind is not Kind.TIMEOUT:
                raise


async def test_a_device_that_is_taken_out_or_kept_by_its_host_is_given_no_more(configured: Settings) -> None:
    c = cluster()
    h1 = equipped(c, "h1", (device(1), device(2)))
    opened: list[Scheduler] = []
    async with fleet(configured, c, h1, opened=opened) as (bus, owner):
        busy = device(2, in_use="its network interface eno2 has an address")
        fewer = replace(h1.capabilities, devices=(busy,))
        await owner.says(HOST_CHANGED, replace(h1, revision=2, capabilities=fewer))

        async def said() -> str:
            return (await bus.ask(PLACE, placing(c.id, host_devices=ONE, place={"dry_run": True}))).message

        async def kept() -> bool:
            return "kept by the host: its network interface eno2 has an address" in await said()

        await until(kept)
        await commit(opened[0].core.pool, [device_claims.saw_devices([h1])])  # late: an older revision
        assert list(await devices_of(bus, h1.id)) == [busy.name]
        none = replace(h1.capabilities, devices=())
        await owner.says(HOST_CHANGED, replace(h1, revision=3, capabilities=none))

        async def gone() -> bool:
            return "it has no device 10de:1eb8" in await said()

        await until(gone)
        assert await devices_of(bus, h1.id) == {}
        with pytest.raises(Refused) as refused:
            await bus.ask(LIST_HOST_DEVICES, AskHostDevices(id=new_id()))
        assert refused.value.kind is Kind.NOT_FOUND


async def test_a_vm_that_is_brought_back_gets_a_device_of_another_host_and_ha_hears_whether_there_is_one(
    configured: Settings,
) -> None:
    c = cluster()
    h1, h2 = equipped(c, "h1", GROUP), equipped(c, "h2", GROUP)
    async with fleet(configured, c, h1, h2) as (bus, _):
        ask = placing(c.id, host_devices=ONE)
        at = (await bus.ask(PLACE, ask)).host_id

        async def room() -> tuple[int, list[str]]:
            question = FindRoom(asks=(RoomFor(need=ask.need, excluded_host_ids=(at,)),))
            (found,) = (await bus.ask(FIND_ROOM, question)).rooms
            return found.fitting, [v.rule for v in found.nearest.verdicts] if found.nearest else []

        assert await room() == (1, [])
        other = placing(c.id, host_devices=ONE, name="other")
        assert given(await bus.ask(PLACE, other))

        async def taken() -> bool:
            return await room() == (0, ["host_devices"])

        await until(taken)
        await bus.ask(RELEASE_VM_CLAIMS, ReleaseVm(vm_id=other.need.vm_id))
        again = replace(ask, epoch=2, purpose=Purpose.RESTART, excluded_host_ids=(at,))
        back = await bus.ask(PLACE, again)
        assert given(back) == ["pci_0000_01_00_0", "pci_0000_02_00_0"]
        assert back.host_id != at


async def test_a_vm_that_runs_without_a_claim_keeps_the_devices_that_it_has(
    configured: Settings, database: DatabaseConfig
) -> None:
    """Also where two say that they have one: it stays the first's."""
    c = cluster()
    h1 = equipped(c, "h1", (device(1), device(2)))
    opened: list[Scheduler] = []
    async with fleet(eager(configured), c, h1, opened=opened) as (bus, owner):
        has = (GivenDevice(name="pci_0000_01_00_0", kind=DeviceKind.PCI),)
        vms = [vm(c.id, name=name, host_id=h1.id, given_devices=has) for name in ("one", "two")]
        await owner.says(VM_CHANGED, *vms)
        async with connected(database) as connection:

            async def heard() -> bool:
                return await connection.fetchval("select count(*) from vm where devices <> '[]'") == 2

            await until(heard)
            await connection.execute("update vm set heard_at = now() - interval '1 minute'")
            await adopt_vms(opened[0])
            assert len(await claims(bus)) == 2
            assert await connection.fetchval("select count(*) from claim_device") == 1

        async def held() -> bool:
            return len((await devices_of(bus, h1.id))["pci_0000_01_00_0"].vm_ids) == 1

        await until(held)
        assert given(await bus.ask(PLACE, placing(c.id, host_devices=ONE))) == ["pci_0000_02_00_0"]
        assert not (await bus.ask(PLACE, placing(c.id, host_devices=NAMED))).host_id


async def test_what_the_previous_release_forgets_to_give_back_is_given_back_by_looking(
    configured: Settings, database: DatabaseConfig
) -> None:
    c = cluster()
    opened: list[Scheduler] = []
    async with fleet(configured, c, equipped(c, "h1", (device(1),)), opened=opened) as (bus, _):
        first = placing(c.id, host_devices=ONE)
        assert given(await bus.ask(PLACE, first))
        async with connected(database) as connection:
            await connection.execute("delete from claim")  # as one that knows of no devices would
        dry = placing(c.id, host_devices=ONE, place={"dry_run": True})
        assert not (await bus.ask(PLACE, dry)).host_id
        await check_counters(opened[0])
        assert given(await bus.ask(PLACE, placing(c.id, host_devices=ONE)))
