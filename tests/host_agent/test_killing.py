"""QEMU's processes that libvirt has given up: told as running until they have ended."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from host_agent import qemu_processes
from host_agent.config import AgentConfig
from host_agent.events import HypervisorEvent
from host_agent.hypervisor import Hypervisor
from host_agent.killing import unkillable
from tests.support.vms import new_uuid
from volery.contracts.agent import DomainReport
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import UNKILLABLE
from volery.contracts.errors import Kind, Refused

DISK, NIC, CD = new_uuid(), new_uuid(), "cdrom-sda"
DEVICES = (
    *(
        "-device",
        f'{{"driver":"virtio-blk-pci","bus":"pci.3","drive":"libvirt-1-format","id":"ua-{DISK}","bootindex":1}}',
    ),
    *("-device", f"scsi-cd,bus=scsi0.0,drive=libvirt-2-format,id=ua-{CD}"),
    *(
        "-device",
        f'{{"driver":"virtio-net-pci","netdev":"hostua-{NIC}","id":"ua-{NIC}","mac":"52:54:00:00:00:01"}}',
    ),
    *("-device", '{"driver":"virtserialport","chardev":"charchannel0","id":"channel0"}'),
)
WAITS = "import signal, sys; print(flush=True); signal.pause()"


@asynccontextmanager
async def process_of(vm_id: str, directory: Path, name: str = "qemu-stand-in") -> AsyncIterator[int]:
    """What looks like the VM's QEMU in /proc."""
    program = directory / name
    if not program.exists():
        program.symlink_to(sys.executable)
    arguments = ("-S", "-c", WAITS, "-name", "guest=web", "-uuid", vm_id, *DEVICES)
    process = await asyncio.create_subprocess_exec(program, *arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        yield process.pid
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def hypervisor() -> AsyncIterator[tuple[Hypervisor, asyncio.Queue[HypervisorEvent]]]:
    made = Hypervisor(AgentConfig(libvirt_uri="test:///default"))
    await made.start()
    try:
        await made.wait_connected(10)
        with made.events() as events:
            yield made, events
    finally:
        await made.close()


async def test_whose_process_is_whose(tmp_path: Path) -> None:
    one, two, other = new_uuid(), new_uuid(), new_uuid()
    async with process_of(one, tmp_path) as pid, process_of(two, tmp_path, "sleeper"):
        assert qemu_processes.find({one, two, other}) == {one: pid}
        assert qemu_processes.find({other}) == {}
        assert (qemu_processes.is_killed(pid), qemu_processes.waits(pid)) == (False, "")
    assert qemu_processes.find({one}) == {}
    assert not qemu_processes.is_killed(pid)


async def test_what_libvirt_has_given_up_is_told_until_it_has_ended(tmp_path: Path) -> None:
    """Also by an agent that was started since."""
    vm_id, gone = new_uuid(), new_uuid()
    async with process_of(vm_id, tmp_path) as pid, hypervisor() as (made, events):
        made.expect({vm_id: 7, gone: 3}, {}, "mine")
        listed = {domain.vm_id: domain for domain in await made.list_domains()}
        assert gone not in listed
        for told in (listed[vm_id], await made.domain(vm_id)):
            assert (told.state, told.reason, told.responsive) == (DomainState.RUNNING, UNKILLABLE, False)
            assert (told.epoch, told.installation) == (7, "mine")
        os.kill(pid, 9)
        async with asyncio.timeout(10):
            while (event := await events.get()).vm_id != vm_id:
                pass
        assert event.state is DomainState.GONE
        assert (await made.domain(vm_id)).state is DomainState.GONE
        assert vm_id not in {domain.vm_id for domain in await made.list_domains()}


async def test_what_libvirt_has_given_up_is_told_with_its_disks_and_its_own_epoch(tmp_path: Path) -> None:
    """As it was told last; of what was never told, with what it was started with. Orders may have named later epochs."""
    known, unknown = new_uuid(), new_uuid()
    async with (
        process_of(known, tmp_path),
        process_of(unknown, tmp_path),
        hypervisor() as (made, _),
    ):
        last = DomainReport(
            vm_id=known,
            epoch=5,
            order_seq=8,
            name="web",
            state=DomainState.RUNNING,
            installation="mine",
            disk_ids=("plugged in later",),
            agent_connected=True,
        )
        made.expect({known: 7, unknown: 7}, {known: last}, "mine")
        listed = {domain.vm_id: domain for domain in await made.list_domains()}
        told = listed[known]
        assert (told.epoch, told.order_seq, told.disk_ids) == (5, 8, last.disk_ids)
        assert (told.reason, told.responsive, told.agent_connected) == (UNKILLABLE, False, False)
        told = listed[unknown]
        assert (told.epoch, told.disk_ids, told.nic_ids) == (7, (DISK, CD), (NIC,))


async def test_what_libvirt_has_given_up_is_killed_when_it_is_to_end(tmp_path: Path) -> None:
    vm_id = new_uuid()
    async with process_of(vm_id, tmp_path), hypervisor() as (made, events):
        made.expect({vm_id: 7}, {}, "mine")
        assert (await made.domain(vm_id)).state is DomainState.RUNNING
        with pytest.raises(Refused) as refusal:
            await made.destroy(vm_id)
        assert refusal.value.kind in (Kind.NOT_FOUND, Kind.TIMEOUT)  # whether it has ended by now
        async with asyncio.timeout(10):
            while (await events.get()).state is not DomainState.GONE:
                pass
        assert qemu_processes.find({vm_id}) == {}


def test_the_sentence_says_what_to_do() -> None:
    said = unkillable("the-vm", 0)
    assert (said.kind, said.details["rule"]) == (Kind.TIMEOUT, UNKILLABLE)
    assert "its QEMU was sent SIGKILL and does not end. It has the VM's disks" in said.message
    assert "switch the host off" in said.message
