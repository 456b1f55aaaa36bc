"""Live migration between two hosts of our own: arrives while it counts, or stays where it was."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from host_agent.events import EventName
from host_agent.migration_parameters import MigrationParameters, migration_stats
from tests.support.libvirt_host import LibvirtHost, join_networks, new_host
from tests.support.vms import VmHost, nic, qcow2_disk, tiny_spec, vm_host
from volery.contracts.base import Done
from volery.contracts.domain import DomainSpec, DomainState
from volery.contracts.domain_orders import (
    ADMIT_MIGRATION,
    FORGET_DOMAIN,
    MIGRATE_DOMAIN,
    AdmitMigration,
    ForgetDomain,
    MigrateDomain,
    MigrationAdmitted,
)
from volery.contracts.errors import Kind, Refused

pytestmark = pytest.mark.timeout(180)


def test_flags_and_parameters_are_libvirts() -> None:
    plain = MigrationParameters("qemu+tcp://b/system", "fd00::2", "<domain/>", auto_converge=False)
    assert plain.flags == 1 | 2 | 4096
    assert plain.params == {"destination_xml": "<domain/>", "migrate_uri": "tcp://[fd00::2]"}
    full = MigrationParameters("u", "10.0.0.2", "<d/>", 100, True, True, 4, unsafe=True)
    assert full.flags == 1 | 2 | 4096 | 8192 | 32768 | 131072 | 512
    assert full.params["bandwidth"] == 100
    assert full.params["parallel.connections"] == 4
    assert full.params["migrate_uri"] == "tcp://10.0.0.2"


def test_progress_counts_what_is_over_there() -> None:
    assert migration_stats({}).percent == 0.0
    stats = migration_stats(
        {"data_total": 200, "data_remaining": 50, "memory_dirty_rate": 7, "downtime_net": 9}
    )
    assert (stats.percent, stats.dirty_pages_per_second, stats.downtime_ms) == (75.0, 7, 9)


@dataclass
class Pair:
    here: VmHost
    there: VmHost
    there_uri: str
    there_address: str
    storage: Path

    def move(self, vm: DomainSpec, **changes: object) -> MigrateDomain:
        return MigrateDomain(
            **{  # type: ignore[arg-type]
                "vm_id": vm.vm_id,
                "destination_uri": self.there_uri,
                "destination_address": self.there_address,
                "destination_epoch": 2,
                "destination_order_seq": 5,
                "disks": vm.disks,
                "nics": vm.nics,
            }
            | changes
        )


@pytest.fixture(scope="module")
def cabled() -> Iterator[tuple[LibvirtHost, LibvirtHost, str]]:
    """Two hosts with a cable between them, and the second one's address."""
    first = new_host()
    second = new_host()
    try:
        _, address = join_networks(first, second)
        for host, bridge in ((first, "br-here"), (second, "br-there")):
            host.run("ip", "link", "add", bridge, "type", "bridge")
            host.run("ip", "link", "set", bridge, "up")
        yield first, second, address
    finally:
        first.stop()
        second.stop()


@pytest.fixture
async def pair(cabled: tuple[LibvirtHost, LibvirtHost, str], tmp_path: Path) -> AsyncIterator[Pair]:
    first, second, address = cabled
    async with vm_host(first.uri, tmp_path) as here, vm_host(second.uri, tmp_path) as there:
        yield Pair(here, there, second.uri, address, tmp_path)


async def _ticks(host: VmHost, vm_id: str) -> int:
    """What the guest counts now: a number that only grows while the same guest lives on."""
    console = await host.hypervisor.open_console(vm_id)
    heard = b""
    async with asyncio.timeout(30):
        while not (found := re.findall(rb"TICK (\d+)\r", heard)):
            heard += await console.read()
    await console.close()
    return int(found[-1])


async def test_a_guest_goes_on_counting_on_the_other_host(pair: Pair) -> None:
    vm = tiny_spec(
        disks=(qcow2_disk(pair.storage, shared_storage=True),), nics=(nic("br-here"),), graphics=True
    )
    await pair.here.run(vm)
    await pair.here.agent_up(vm.vm_id)
    before = await _ticks(pair.here, vm.vm_id)
    assert (
        await pair.there.order(ADMIT_MIGRATION, AdmitMigration(vm_id=vm.vm_id, spec=vm), epoch=2)
        == MigrationAdmitted()
    )
    nics = (type(vm.nics[0])(nic_id=vm.nics[0].nic_id, mac=vm.nics[0].mac, bridge="br-there"),)
    done = await pair.here.order(MIGRATE_DOMAIN, pair.move(vm, nics=nics))
    assert done.total_ms > 0
    assert done.transferred_bytes > 0
    assert (await pair.here.hypervisor.domain(vm.vm_id)).state is DomainState.GONE
    report = await pair.there.hypervisor.domain(vm.vm_id)
    assert (report.state, report.epoch, report.order_seq) == (DomainState.RUNNING, 2, 5)
    assert report.disk_ids == (vm.disks[0].disk_id,)
    assert await _ticks(pair.there, vm.vm_id) > before
    gone = await pair.here.until(lambda e: e.state is DomainState.GONE)
    assert gone.details["reason"] == "migrated"
    await pair.there.until(
        lambda e: e.name is EventName.AGENT_LIFECYCLE and e.details["state"] == "connected"
    )
    assert await pair.here.order(FORGET_DOMAIN, ForgetDomain(vm_id=vm.vm_id), epoch=1) == Done()


async def test_a_cancelled_move_leaves_it_running_here_and_nothing_there(pair: Pair) -> None:
    vm = tiny_spec(nics=(nic("br-here"),))
    await pair.here.run(vm)
    await pair.here.agent_up(vm.vm_id)
    order = pair.move(vm, nics=(), bandwidth_mib_per_second=1)
    with pytest.raises(Refused, match="br-here"):  # this bridge isn't there: refused before anything moved
        await pair.here.order(MIGRATE_DOMAIN, order)
    plain = tiny_spec()
    await pair.here.run(plain)
    await pair.here.agent_up(plain.vm_id)
    moving = asyncio.create_task(
        pair.here.order(MIGRATE_DOMAIN, pair.move(plain, bandwidth_mib_per_second=1))
    )
    incoming = await pair.there.until(
        lambda e: e.vm_id == plain.vm_id and e.details.get("event") == "started"
    )
    assert incoming.state is DomainState.INCOMING
    assert (await pair.there.hypervisor.domain(plain.vm_id)).state is DomainState.INCOMING
    async with asyncio.timeout(20):
        while not any(details["total_bytes"] for _, details in pair.here.progress):
            await asyncio.sleep(0.05)
    moving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await moving
    for spec in (vm, plain):
        here = await pair.here.hypervisor.domain(spec.vm_id)
        assert (here.state, here.epoch) == (DomainState.RUNNING, 1)
    await pair.there.until(lambda e: e.vm_id == plain.vm_id and e.state is DomainState.GONE)
    assert (await pair.there.hypervisor.domain(plain.vm_id)).state is DomainState.GONE
    percent, details = pair.here.progress[-1]
    assert 0.0 <= percent < 100.0
    assert details["total_bytes"] > 0


async def test_a_move_that_takes_too_long_is_stopped(pair: Pair) -> None:
    vm = tiny_spec()
    await pair.here.run(vm)
    await pair.here.agent_up(vm.vm_id)
    with pytest.raises(Refused) as refusal:
        await pair.here.order(MIGRATE_DOMAIN, pair.move(vm, bandwidth_mib_per_second=1, timeout_seconds=2.0))
    assert refusal.value.kind is Kind.TIMEOUT
    assert "runs on where it was" in refusal.value.message
    assert (await pair.here.hypervisor.domain(vm.vm_id)).state is DomainState.RUNNING
    async with asyncio.timeout(10):
        while (await pair.there.hypervisor.domain(vm.vm_id)).state is not DomainState.GONE:
            await asyncio.sleep(0.05)


async def test_disks_that_are_not_shared_do_not_move(pair: Pair) -> None:
    vm = tiny_spec(disks=(qcow2_disk(pair.storage),))
    await pair.here.run(vm)
    with pytest.raises(Refused) as refusal:
        await pair.here.order(MIGRATE_DOMAIN, pair.move(vm))
    assert refusal.value.kind is Kind.CONFLICT
    assert "shared storage" in refusal.value.message
    assert (await pair.here.hypervisor.domain(vm.vm_id)).state is DomainState.RUNNING


async def test_an_unreachable_destination_is_a_refusal(pair: Pair) -> None:
    vm = tiny_spec()
    await pair.here.run(vm)
    with pytest.raises(Refused):
        await pair.here.order(
            MIGRATE_DOMAIN, pair.move(vm, destination_uri="qemu+unix:///system?socket=/nowhere")
        )
    assert (await pair.here.hypervisor.domain(vm.vm_id)).state is DomainState.RUNNING
    assert pair.here.hypervisor.connected


async def test_options_of_a_move(pair: Pair) -> None:
    vm = tiny_spec()
    await pair.here.run(vm)
    await pair.here.agent_up(vm.vm_id)
    order = pair.move(vm, parallel_connections=2, post_copy=True, max_downtime_ms=500)
    await pair.here.order(MIGRATE_DOMAIN, order)
    back = pair.move(vm)
    assert (await pair.there.hypervisor.domain(vm.vm_id)).state is DomainState.RUNNING
    assert back.vm_id == vm.vm_id
