"""The hypervisor when things around it die or hang: libvirtd killed, QEMU stopped, a libvirtd that isn't there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from host_agent.config import AgentConfig
from host_agent.events import EventName
from host_agent.findings import guest_of
from host_agent.hypervisor import Hypervisor
from host_agent.refusals import MEANINGS, Disconnected, LibvirtError, refused
from tests.support.libvirt_host import LibvirtHost
from tests.support.vms import VmHost, new_uuid, tiny_spec, vm_host
from volery.contracts.domain import DomainDisk, DomainState, FileSource, ImageFormat
from volery.contracts.domain_orders import ACT_ON_DOMAIN, ActOnDomain, DomainAction
from volery.contracts.errors import Kind, Refused

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("name", [e.name for e in LibvirtError if hasattr(libvirt, f"VIR_ERR_{e.name}")])
def test_error_numbers_are_libvirts(name: str) -> None:
    assert getattr(libvirt, f"VIR_ERR_{name}") == LibvirtError[name]


def test_every_error_says_what_to_do() -> None:
    assert set(MEANINGS) == set(LibvirtError)
    problem = refused("start the VM", LibvirtError.NO_DOMAIN, "no domain with that id.")
    assert problem.kind is Kind.NOT_FOUND
    assert problem.message == "libvirt could not start the VM: no domain with that id; start the VM first"
    assert refused("x", 9999, "").kind is Kind.INTERNAL


def test_a_guests_own_addresses_are_left_out() -> None:
    info = {
        "hostname": "g1",
        "os.pretty-name": "Some OS 1",
        "if.count": 2,
        "if.0.addr.count": 2,
        "if.0.addr.0.addr": "127.0.0.1",
        "if.0.addr.1.addr": "::1",
        "if.1.addr.count": 3,
        "if.1.addr.0.addr": "192.168.7.5",
        "if.1.addr.1.addr": "fe80::1",
        "if.1.addr.2.addr": "2001:db8::5",
    }
    found = guest_of(info)
    assert (found.hostname, found.os) == ("g1", "Some OS 1")
    assert found.ip_addresses == ("192.168.7.5", "2001:db8::5")


async def test_without_libvirtd_calls_fail_at_once_and_a_start_is_heard(tmp_path: Path) -> None:
    hypervisor = Hypervisor(AgentConfig(libvirt_uri=f"qemu+unix:///system?socket={tmp_path}/none"))
    await hypervisor.start()
    began = time.monotonic()
    with pytest.raises(Disconnected) as refusal:
        await hypervisor.list_domains()
    assert time.monotonic() - began < 2
    assert refusal.value.kind is Kind.UNAVAILABLE
    assert "start libvirtd" in refusal.value.message
    with pytest.raises(Disconnected):
        await hypervisor.wait_connected(0.05)
    assert not hypervisor.connected
    assert hypervisor.problem
    await hypervisor.close()


@pytest.fixture
def daemon(libvirt_host: LibvirtHost) -> Iterator[LibvirtHost]:
    """The shared host, whose libvirtd may be killed: it runs again afterwards."""
    yield libvirt_host
    if not libvirt_host.processes("libvirtd"):
        libvirt_host.start_daemon()


async def test_libvirtd_dies_and_comes_back_and_qemu_never_notices(
    daemon: LibvirtHost, tmp_path: Path
) -> None:
    async with vm_host(daemon.uri, tmp_path) as host:
        spec = tiny_spec()
        await host.run(spec)
        process = daemon.qemu(spec.vm_id)
        daemon.kill_daemon()
        await host.until(lambda e: e.name is EventName.DISCONNECTED, 2)
        assert not host.hypervisor.connected
        pausing = asyncio.create_task(
            host.order(ACT_ON_DOMAIN, ActOnDomain(vm_id=spec.vm_id, action=DomainAction.PAUSE))
        )
        with pytest.raises(Disconnected):
            await pausing  # can't be repeated blindly: its owner is told that libvirtd was away
        again = asyncio.create_task(host.run(spec))  # looks first, so it waits for libvirtd instead
        since = len(host.heard)
        await asyncio.to_thread(daemon.start_daemon)
        await host.until(lambda e: e.name is EventName.CONNECTED, 10, since=since)
        assert (await again).state is DomainState.RUNNING
        assert daemon.qemu(spec.vm_id) == process
        report = await host.hypervisor.domain(spec.vm_id)
        assert (report.epoch, report.state) == (1, DomainState.RUNNING)
        since = len(host.heard)
        os.kill(process, signal.SIGKILL)
        await host.until(lambda e: e.state is DomainState.GONE, 20, since=since)


async def test_a_vm_that_died_while_libvirtd_was_away_is_missed(daemon: LibvirtHost, tmp_path: Path) -> None:
    async with vm_host(daemon.uri, tmp_path) as host:
        spec = tiny_spec()
        await host.run(spec, paused=True)
        process = daemon.qemu(spec.vm_id)
        daemon.kill_daemon()
        os.kill(process, signal.SIGKILL)
        since = len(host.heard)
        await asyncio.to_thread(daemon.start_daemon)
        event = await host.until(lambda e: e.state is DomainState.GONE, 20, since=since)
        assert event.vm_id == spec.vm_id
        assert event.changes_report


async def test_a_stopped_qemu_stalls_nobody_else_and_can_be_ended(
    libvirt_host: LibvirtHost, tmp_path: Path
) -> None:
    async with vm_host(libvirt_host.uri, tmp_path, domain_call_seconds=2.0) as host:
        stuck, well = tiny_spec(), tiny_spec()
        await asyncio.gather(host.run(stuck), host.run(well))
        process = libvirt_host.qemu(stuck.vm_id)
        os.kill(process, signal.SIGSTOP)
        hypervisor = host.hypervisor
        try:
            calls = [
                asyncio.create_task(hypervisor.pause(stuck.vm_id)),
                *(asyncio.create_task(hypervisor.guest_info(stuck.vm_id)) for _ in range(8)),
            ]
            await host.until(lambda e: e.name is EventName.UNRESPONSIVE, 5)
            with pytest.raises(Refused) as refusal:
                await calls[0]
            assert refusal.value.kind is Kind.TIMEOUT
            assert hypervisor.unresponsive == {stuck.vm_id}
            assert hypervisor.stuck.count >= 1

            async with asyncio.timeout(3):
                states = {d.vm_id: d for d in await hypervisor.list_domains()}
                assert not states[stuck.vm_id].responsive
                assert states[well.vm_id].responsive
                stats = await hypervisor.all_domain_stats()
                assert {stuck.vm_id, well.vm_id} <= set(stats)
                await hypervisor.pause(well.vm_id)
                await hypervisor.resume(well.vm_id)
            began = time.monotonic()
            with pytest.raises(Refused, match="power the VM off"):
                await hypervisor.pause(stuck.vm_id)
            assert time.monotonic() - began < 0.5

            await host.power_off(stuck.vm_id)
            assert (await hypervisor.domain(stuck.vm_id)).state is DomainState.GONE
            await host.until(lambda e: e.name is EventName.RESPONSIVE, 30)
            await asyncio.gather(*calls, return_exceptions=True)
            assert hypervisor.stuck.count == 0
            assert hypervisor.unresponsive == frozenset()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


async def test_a_mount_that_hangs_stalls_only_the_vm_on_it(libvirt_host: LibvirtHost, tmp_path: Path) -> None:
    path, server = libvirt_host.hanging_file(16 << 20)
    source = FileSource(path=str(path), format=ImageFormat.RAW)
    async with vm_host(libvirt_host.uri, tmp_path, domain_call_seconds=2.0) as host:
        hanging = tiny_spec(disks=(DomainDisk(disk_id=new_uuid(), source=source, target="vda"),))
        well = tiny_spec()
        await asyncio.gather(host.run(hanging), host.run(well))
        await host.agent_up(hanging.vm_id)
        hypervisor = host.hypervisor
        os.kill(server, signal.SIGSTOP)
        try:
            async with asyncio.timeout(15):
                assert {hanging.vm_id, well.vm_id} <= set(await hypervisor.all_domain_stats())
            with pytest.raises(Refused):
                await hypervisor.pause(hanging.vm_id)
            assert hypervisor.unresponsive == {hanging.vm_id}
            async with asyncio.timeout(3):
                assert {hanging.vm_id, well.vm_id} <= {d.vm_id for d in await hypervisor.list_domains()}
                assert {hanging.vm_id, well.vm_id} <= set(await hypervisor.all_domain_stats())
                await hypervisor.pause(well.vm_id)
                await hypervisor.resume(well.vm_id)
        finally:
            os.kill(server, signal.SIGCONT)
        await host.until(lambda e: e.name is EventName.RESPONSIVE, 20)
        assert hypervisor.unresponsive == frozenset()


async def test_a_stopped_libvirtd_is_noticed_by_keepalive(daemon: LibvirtHost, tmp_path: Path) -> None:
    async with vm_host(daemon.uri, tmp_path) as host:
        daemon.kill_daemon(signal.SIGSTOP)
        try:
            since = len(host.heard)
            listing = asyncio.create_task(host.hypervisor.list_domains())
            await host.until(lambda e: e.name is EventName.DISCONNECTED, 15, since=since)
            with pytest.raises(Refused):
                await listing
        finally:
            daemon.kill_daemon(signal.SIGCONT)
        await host.until(lambda e: e.name is EventName.CONNECTED, 30, since=since)
        await host.hypervisor.list_domains()


async def test_many_listings_while_a_console_and_orders_go_on(qemu: VmHost) -> None:
    spec = tiny_spec()
    await qemu.run(spec)
    console = await qemu.hypervisor.open_console(spec.vm_id)

    async def listen() -> bytes:
        heard = b""
        async with asyncio.timeout(60):
            while b"TICK 2" not in heard:
                heard += await console.read()
        return heard

    listening = asyncio.create_task(listen())
    for _ in range(50):
        reports, stats = await asyncio.gather(
            qemu.hypervisor.list_domains(), qemu.hypervisor.all_domain_stats()
        )
        assert spec.vm_id in {r.vm_id for r in reports}
        assert spec.vm_id in stats
    assert b"GUEST-UP" in await listening
    await console.write(b"\necho he''llo\n")
    heard = b""
    async with asyncio.timeout(20):
        while b"hello" not in heard:
            heard += await console.read()
    await qemu.power_off(spec.vm_id)
    async with asyncio.timeout(10):
        while await console.read():
            pass
    with pytest.raises(ConnectionError):
        await console.write(b"x")
    await console.close()


async def test_a_console_of_what_does_not_run_is_refused(qemu: VmHost) -> None:
    with pytest.raises(Refused) as refusal:
        await qemu.hypervisor.open_console(new_uuid())
    assert refusal.value.kind is Kind.NOT_FOUND


async def test_secrets_and_networks(qemu: VmHost) -> None:
    xml = (
        "<secret ephemeral='yes' private='yes'><uuid>0192f0c4-9999-7abc-8def-000000000001</uuid>"
        "<usage type='iscsi'><target>t-secret</target></usage></secret>"
    )
    for value in ("first-password", "second-password"):
        await qemu.hypervisor.put_secret(xml, value)
    network = "<network><name/></network>"
    await qemu.hypervisor.create_network("<network><name>t-net</name><bridge name='t-nat0'/></network>")
    assert ("t-net", True, "t-nat0") in [
        (n.name, n.active, n.bridge) for n in await qemu.hypervisor.networks()
    ]
    for _ in range(2):
        await qemu.hypervisor.destroy_network("t-net")
    assert "t-net" not in [n.name for n in await qemu.hypervisor.networks()]
    with pytest.raises(Refused):
        await qemu.hypervisor.create_network(network)
