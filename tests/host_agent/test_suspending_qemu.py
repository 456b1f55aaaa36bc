"""Suspending to disk with real libvirt and QEMU: a guest runs from its memory once, whatever is cut short."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host_agent import suspension
from host_agent.domxml import Placement
from tests.support.libvirt_host import LibvirtHost
from tests.support.vms import VmHost, new_uuid, nic, qcow2_disk, tiny_spec
from volery.contracts.base import Done
from volery.contracts.domain import (
    DomainSpec,
    DomainState,
)
from volery.contracts.domain_orders import (
    DISCARD_MEMORY,
    SAVE_DOMAIN,
    DiscardMemory,
    RunDomain,
    SaveDomain,
)
from volery.contracts.errors import Kind, Refused

pytestmark = pytest.mark.timeout(180)


async def test_suspended_to_disk_it_goes_on_where_it_was(qemu: VmHost, tmp_path: Path) -> None:
    spec = tiny_spec(disks=(qcow2_disk(tmp_path),), nics=(nic("br-one"),))
    await qemu.run(spec, epoch=1)
    await qemu.agent_up(spec.vm_id)
    path = tmp_path / "memory"
    await qemu.order(SAVE_DOMAIN, SaveDomain(vm_id=spec.vm_id, path=str(path)))
    assert (await qemu.hypervisor.domain(spec.vm_id)).state is DomainState.GONE
    assert await qemu.order(SAVE_DOMAIN, SaveDomain(vm_id=spec.vm_id, path=str(path)), resumed=True) == Done()

    since = len(qemu.heard)
    answer = await qemu.run(spec, epoch=2, order_seq=7, restore_path=str(path))
    assert answer.state is DomainState.RUNNING
    assert not path.exists()
    report = await qemu.hypervisor.domain(spec.vm_id)
    assert (report.epoch, report.order_seq) == (2, 7)
    await qemu.agent_up(spec.vm_id, since=since)
    console = await qemu.hypervisor.open_console(spec.vm_id)
    heard = b""
    async with asyncio.timeout(20):
        while b"TICK" not in heard:
            heard += await console.read()
    await console.close()
    assert b"GUEST-UP" not in heard


@contextmanager
def immovable(path: Path) -> Iterator[None]:
    """A file that can neither be renamed nor removed, and is read as ever."""
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


async def suspended(qemu: VmHost, path: Path) -> DomainSpec:
    spec = tiny_spec(disks=(qcow2_disk(path.parent),))
    await qemu.run(spec, epoch=1)
    await qemu.agent_up(spec.vm_id)
    await qemu.order(SAVE_DOMAIN, SaveDomain(vm_id=spec.vm_id, path=str(path)))
    return spec


async def goes_on(qemu: VmHost, spec: DomainSpec, path: Path, order_seq: int) -> None:
    since = len(qemu.heard)
    answer = await qemu.run(spec, epoch=2, order_seq=order_seq, restore_path=str(path))
    assert answer.state is DomainState.RUNNING
    assert not [file for file in path.parent.iterdir() if file.name.startswith(path.name)]
    await qemu.agent_up(spec.vm_id, since=since)


async def waits_restored(qemu: VmHost, spec: DomainSpec, path: Path, order_seq: int) -> None:
    """As an agent leaves it that was killed in the middle."""
    order = RunDomain(vm_id=spec.vm_id, spec=spec, restore_path=str(path))
    await suspension.restore(qemu.host, order, Placement(2, order_seq))


def ran(qemu: VmHost, since: int) -> bool:
    return any(e.details.get("event") == "resumed" for e in qemu.heard[since:])


async def test_a_guest_runs_only_once_its_memory_can_never_be_restored_again(
    qemu: VmHost, tmp_path: Path
) -> None:
    path = tmp_path / "memory"
    spec = await suspended(qemu, path)
    whole, since = path.stat().st_size, len(qemu.heard)
    with immovable(path), pytest.raises(Refused, match="can't be put aside") as refused:
        await qemu.run(spec, epoch=2, restore_path=str(path))
    assert refused.value.kind is Kind.UNAVAILABLE
    assert (await qemu.hypervisor.domain(spec.vm_id)).state is DomainState.GONE
    assert not ran(qemu, since)
    assert path.stat().st_size == whole
    await goes_on(qemu, spec, path, order_seq=2)


@pytest.mark.parametrize("spent", [False, True])
async def test_a_restoration_that_was_cut_short_goes_on(qemu: VmHost, tmp_path: Path, spent: bool) -> None:
    path = tmp_path / "memory"
    spec = await suspended(qemu, path)
    since = len(qemu.heard)
    await waits_restored(qemu, spec, path, order_seq=5)
    if spent:
        await suspension.spend(str(path))
    assert not ran(qemu, since)
    assert path.exists() is not spent
    await goes_on(qemu, spec, path, order_seq=5)
    assert ran(qemu, since)


async def test_memory_with_which_a_guest_may_have_run_is_never_restored(qemu: VmHost, tmp_path: Path) -> None:
    """Its host died between the two, or the VM was ended there."""
    path = tmp_path / "memory"
    spec = await suspended(qemu, path)
    await waits_restored(qemu, spec, path, order_seq=2)
    await suspension.spend(str(path))
    await qemu.power_off(spec.vm_id)
    with pytest.raises(Refused, match="isn't on this host any more") as refused:
        await qemu.run(spec, epoch=3, order_seq=3, restore_path=str(path))
    assert refused.value.kind is Kind.CONFLICT
    assert "gives its memory up" in refused.value.message
    assert (await qemu.hypervisor.domain(spec.vm_id)).state is DomainState.GONE


async def test_a_restoration_that_is_cancelled_before_the_guest_runs_keeps_the_memory(
    qemu: VmHost, tmp_path: Path
) -> None:
    path = tmp_path / "memory"
    spec = await suspended(qemu, path)
    since = len(qemu.heard)
    running = asyncio.create_task(qemu.run(spec, epoch=2, order_seq=2, restore_path=str(path)))
    await qemu.until(lambda e: e.details.get("reason") == "domain_started", since=since)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (await qemu.hypervisor.domain(spec.vm_id)).state is DomainState.GONE
    assert not ran(qemu, since)
    await goes_on(qemu, spec, path, order_seq=3)


async def test_discarded_memory_goes_and_nothing_else_does(qemu: VmHost, tmp_path: Path) -> None:
    vm_id, other = new_uuid(), tmp_path / "precious"
    path = tmp_path / f"{vm_id}-3.save"
    for file in (path, path.with_name(path.name + ".spent"), other):
        file.write_text("memory")
    for _ in range(2):
        await qemu.order(DISCARD_MEMORY, DiscardMemory(of_vm_id=vm_id, path=str(path)))
    assert list(tmp_path.glob("*.save*")) == []
    with pytest.raises(Refused, match="isn't the name of a saved memory"):
        await qemu.order(DISCARD_MEMORY, DiscardMemory(of_vm_id=vm_id, path=str(other)))
    assert other.exists()


async def test_a_cancelled_suspension_ends_on_one_side_or_the_other(qemu: VmHost, tmp_path: Path) -> None:
    spec = tiny_spec(memory_bytes=512 << 20)
    await qemu.run(spec)
    path = tmp_path / "memory"
    saving = asyncio.create_task(qemu.order(SAVE_DOMAIN, SaveDomain(vm_id=spec.vm_id, path=str(path))))
    await qemu.until(lambda e: e.details.get("event") == "suspended")
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    state = (await qemu.hypervisor.domain(spec.vm_id)).state
    assert (state, path.exists()) in ((DomainState.RUNNING, False), (DomainState.GONE, True))


async def test_a_suspension_without_room_leaves_the_vm_running(
    qemu: VmHost, libvirt_host: LibvirtHost
) -> None:
    small = libvirt_host.path / "small"
    libvirt_host.run("mkdir", str(small))
    libvirt_host.run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small))
    spec = tiny_spec()
    await qemu.run(spec)
    await qemu.agent_up(spec.vm_id)
    with pytest.raises(Refused):
        await qemu.order(SAVE_DOMAIN, SaveDomain(vm_id=spec.vm_id, path=str(small / "memory")))
    assert (await qemu.hypervisor.domain(spec.vm_id)).state is DomainState.RUNNING
    assert libvirt_host.run("ls", str(small)) == ""
    with pytest.raises(Refused, match="storage domain"):
        await qemu.order(SAVE_DOMAIN, SaveDomain(vm_id=spec.vm_id, path="/no/such/place/memory"))
    libvirt_host.run("umount", str(small))
