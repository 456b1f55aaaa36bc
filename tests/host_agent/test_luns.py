"""LUNs on a private target: claimed only when blank and open nowhere, blank again when their disk goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_agent import luns, places, runningxml, volumes
from host_agent.action import Host
from host_agent.hypervisor import Hypervisor
from tests.support.agent_host import IscsiTarget, iscsi_target, make_host, running
from tests.support.libvirt_host import LibvirtHost
from tests.support.storage_domain import MIB, connect_target, lun
from tests.support.vms import VmHost, new_uuid, tiny_spec
from volery.contracts.agent import LunClaim, OpenLun
from volery.contracts.domain import DomainDisk, IscsiSource
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import ClaimLun, CreateVolume, DeleteVolume

USER, PASSWORD = "volery", "chap-secret-12"
SIZE = 64 * MIB


@pytest.fixture
def target(tmp_path: Path) -> Iterator[IscsiTarget]:
    with iscsi_target(tmp_path, USER, PASSWORD) as made:
        yield made


@pytest.fixture
async def host(tmp_path: Path, hypervisor: Hypervisor, target: IscsiTarget) -> Host:
    made = make_host(tmp_path / "state", hypervisor)
    target.add_lun(9, MIB)
    await connect_target(made, target)
    return made


def claim(source: IscsiSource, number: int = 1, disk_id: str = "", **fields: object) -> ClaimLun:
    order = {"disk_id": disk_id or new_id(), "source": source, "size_bytes": SIZE, "claim": number}
    return ClaimLun(**order | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("thin", [False, True])
async def test_a_blank_lun_is_claimed_and_left_blank(host: Host, target: IscsiTarget, thin: bool) -> None:
    backing, told = target.add_lun(1, SIZE, thin=thin), list[float]()
    order = claim(lun(target, 1))
    info = await luns.claim(host, order, running(told=told))
    assert (info.size_bytes, told[-1]) == (SIZE, 100.0)
    assert await luns.claim(host, order, running()) == info, "a repeat is a success"
    assert backing.stat().st_blocks == 0, "looking writes nothing"
    for wipe in (False, True):
        with backing.open("r+b") as file:
            file.write(os.urandom(4 * MIB))
        delete = DeleteVolume(disk_id=order.disk_id, source=lun(target, 1), wipe=wipe)
        await volumes.delete(host, delete, running(told=told))
        assert not any(backing.read_bytes())
        given_back = backing.stat().st_blocks == 0
        assert given_back is (thin and not wipe), (
            "unmapped where the target can, written where it was asked for"
        )
    await luns.claim(host, claim(lun(target, 1), 2), running())


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("place", [0, 40 * MIB + 512, SIZE - 1])
async def test_a_lun_with_anything_on_it_is_refused_and_kept(
    host: Host, target: IscsiTarget, thin: bool, place: int
) -> None:
    backing = target.add_lun(1, SIZE, thin=thin)
    with backing.open("r+b") as file:
        file.seek(place)
        file.write(b"x")
    before = backing.read_bytes()
    order = claim(lun(target, 1))
    with pytest.raises(Refused, match="isn't blank") as refused:
        await luns.claim(host, order, running())
    assert (refused.value.kind, refused.value.details["rule"]) == (Kind.CONFLICT, "lun_content")
    assert refused.value.details["offset"] <= place
    assert backing.read_bytes() == before
    assert places.claims(host.config) == ()
    await luns.claim(host, claim(lun(target, 1), overwrite=True), running())
    assert not any(backing.read_bytes())


async def test_claims_are_remembered_and_never_go_back(host: Host, target: IscsiTarget) -> None:
    target.add_lun(1, SIZE)
    first, second = claim(lun(target, 1), 3), claim(lun(target, 1), 4)
    await luns.claim(host, first, running())
    await luns.claim(host, second, running())
    restarted = make_host(Path(host.config.state_dir), host.hypervisor)
    noted = LunClaim(iqn=target.iqn, lun=1, claim=4, disk_id=second.disk_id)
    assert await luns.claims(restarted) == (noted,)
    for stale in (first, claim(lun(target, 1), 4), claim(lun(target, 1), 1, overwrite=True)):
        with pytest.raises(Refused, match="older database") as refused:
            await luns.claim(restarted, stale, running())
        assert refused.value.details["rule"] == "lun_claimed"


async def test_a_lun_that_is_too_small_or_of_a_stranger_is_refused(host: Host, target: IscsiTarget) -> None:
    with pytest.raises(Refused, match="fewer than"):
        await luns.claim(host, claim(lun(target, 9)), running())
    source = IscsiSource(portal=target.portal, iqn="iqn.2026-11.test:none", lun=1)
    with pytest.raises(Refused, match="connect it first"):
        await luns.claim(host, claim(source), running())


async def test_a_lun_at_work_is_open_until_the_work_has_ended(host: Host, target: IscsiTarget) -> None:
    target.add_lun(1, SIZE)
    source, disk_id = lun(target, 1), new_id()
    other = CreateVolume(disk_id=new_id(), source=source, size_bytes=SIZE)
    async with luns.writing(host, disk_id, source):
        assert await luns.open_now(host) == (OpenLun(iqn=target.iqn, lun=1, disk_id=disk_id),)
        with pytest.raises(Refused, match=f"an order for disk {disk_id}"):
            await volumes.create(host, other, running())
    assert await luns.open_now(host) == ()
    await volumes.create(host, other, running())


async def test_a_lun_that_qemu_has_open_is_neither_claimed_nor_wiped(
    qemu: VmHost, libvirt_host: LibvirtHost
) -> None:
    iqn = "iqn.2026-11.test.volery:open"
    portal = libvirt_host.iscsi_target(iqn, "volery", PASSWORD, 32 << 20, port=3261)
    source = IscsiSource(portal=portal, iqn=iqn, lun=1, chap_user="volery", chap_password=PASSWORD)
    disk = DomainDisk(disk_id=new_uuid(), source=source, target="vda", shared_storage=True)
    spec = tiny_spec(disks=(disk,))
    await qemu.run(spec)
    opened = OpenLun(iqn=iqn, lun=1, vm_id=spec.vm_id, disk_id=disk.disk_id)
    assert opened in await luns.open_now(qemu.host)
    with pytest.raises(Refused, match=f"VM {spec.vm_id}") as refused:
        await luns.claim(qemu.host, claim(source, overwrite=True), running())
    assert refused.value.details["rule"] == "lun_open"
    for disk_id in (new_id(), disk.disk_id):
        with pytest.raises(Refused, match=f"VM {spec.vm_id}"):
            await volumes.delete(qemu.host, DeleteVolume(disk_id=disk_id, source=source), running())
    await qemu.power_off(spec.vm_id)
    assert opened not in await luns.open_now(qemu.host)


def test_every_way_to_have_a_lun_open_is_seen() -> None:
    root = runningxml.parsed(
        """<domain><devices>
        <disk><source protocol='iscsi' name='iqn.a:1/7'><host name='h' port='3260'/></source>
          <mirror><source protocol='iscsi' name='iqn.b:1/8'/></mirror><alias name='ua-d1'/></disk>
        <disk><source dev='/dev/disk/by-path/ip-192.0.2.1:3260-iscsi-iqn.c:1-lun-9'/></disk>
        <hostdev><source protocol='iscsi' name='iqn.d:1'/></hostdev>
        <disk><source file='/srv/x.raw'/></disk><disk><source protocol='nbd' name='x/1'/></disk>
        </devices></domain>"""
    )
    found = {(one.iqn, one.lun): one.disk_id for one in runningxml.luns_of(root, "vm")}
    assert found == {("iqn.a:1", 7): "d1", ("iqn.b:1", 8): "d1", ("iqn.c:1", 9): "", ("iqn.d:1", 0): ""}
