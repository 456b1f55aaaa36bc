"""Requests that come many times, late, or with what can't be."""

from __future__ import annotations

import asyncio

import pytest

from services.inventory.service import service
from tests.support.runtime import running
from volery.contracts.cluster import CREATE_CLUSTER, CREATE_DATA_CENTER, CreateCluster, CreateDataCenter
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.vm import (
    CREATE_VM,
    LIST_VMS,
    START_VM,
    UPDATE_VM,
    CreateVm,
    NewDisk,
    NewNic,
    StartVm,
    UpdateVm,
)
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings

MIB = 1024 * 1024


async def cluster_id(bus: Bus) -> str:
    center = await bus.ask(CREATE_DATA_CENTER, CreateDataCenter(name="d"))
    return (await bus.ask(CREATE_CLUSTER, CreateCluster(name="c", data_center_id=center.id))).id


async def test_a_thousand_identical_creates_make_one_vm(configured: Settings) -> None:
    async with running(configured, service) as bus:
        ask = CreateVm(name="one", cluster_id=await cluster_id(bus), memory_bytes=64 * MIB)
        caller = Caller("user:1", "the-key", "the-hash")
        answers = await asyncio.gather(*(bus.ask(CREATE_VM, ask, caller) for _ in range(1000)))
        assert len({op.id for op in answers}) == 1
        assert len((await bus.ask(LIST_VMS, ListQuery())).items) == 1


BAD = {
    "empty name": {"name": ""},
    "long name": {"name": "x" * 256},
    "control character": {"name": "a\x00b"},
    "spaces": {"name": " a"},
    "no memory": {"memory_bytes": 0},
    "absurd memory": {"memory_bytes": 2**60},
    "no cpu": {"vcpus": 0},
    "topology": {"vcpus": 3, "sockets": 2, "cores": 1, "threads": 1},
    "cluster id": {"cluster_id": "../../etc"},
    "network id": {"nics": (NewNic(network_id="not-an-id"),)},
    "mac": {"nics": (NewNic(mac="zz:zz"),)},
    "multicast mac": {"nics": (NewNic(mac="01:00:5e:00:00:01"),)},
    "disk of no size": {"disks": (NewDisk(storage_domain_id=new_id()),)},
    "tags": {"tags": ("a", "a")},
    "a size of huge pages that isn't": {"hugepage_kib": 4},
    "half a huge page": {"memory_bytes": 65 * MIB, "hugepage_kib": 2048},
    "less than a huge page": {"memory_bytes": 64 * MIB, "hugepage_kib": 1048576},
    "priority": {"high_availability": {"enabled": True, "priority": 0}},
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_refused_and_leaves_nothing(configured: Settings, name: str) -> None:
    import msgspec

    async with running(configured, service) as bus:
        fields = {"name": "vm", "cluster_id": await cluster_id(bus), "memory_bytes": 64 * MIB} | BAD[name]
        with pytest.raises(Refused) as refused:
            await bus.ask(CREATE_VM, msgspec.convert(fields, CreateVm))
        assert refused.value.kind is Kind.INVALID
        assert len(refused.value.message) > 20
        assert not (await bus.ask(LIST_VMS, ListQuery())).items


async def test_stale_edits_and_unknown_things_are_refused(configured: Settings) -> None:
    async with running(configured, service) as bus:
        ask = CreateVm(name="vm", cluster_id=await cluster_id(bus), memory_bytes=64 * MIB)
        vm_id = (await bus.ask(CREATE_VM, ask)).object_id
        while True:
            first = await bus.ask(UPDATE_VM, UpdateVm(id=vm_id, description="a"))
            if not first.busy_with:
                break
        edits = [
            bus.ask(UPDATE_VM, UpdateVm(id=vm_id, if_revision=first.revision, description=f"d{i}"))
            for i in range(20)
        ]
        results = await asyncio.gather(*edits, return_exceptions=True)
        assert sum(not isinstance(r, Refused) for r in results) == 1
        assert {r.kind for r in results if isinstance(r, Refused)} == {Kind.STALE}
        with pytest.raises(Refused) as refused:
            await bus.ask(START_VM, StartVm(id=new_id()))
        assert refused.value.kind is Kind.NOT_FOUND
        with pytest.raises(Refused) as refused:
            await bus.ask(CREATE_VM, ask)
        assert refused.value.kind is Kind.CONFLICT
