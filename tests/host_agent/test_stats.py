"""Samples: libvirt's numbers under our ids, and rates from two looks."""

from __future__ import annotations

from host_agent.stats import Names, Sampler, cpu_nanoseconds, vm_sample
from tests.support.vms import VmHost, nic, tiny_spec
from volery.contracts.domain import DomainDisk, FileSource, ImageFormat
from volery.contracts.metrics import DiskSample, NicSample

VALUES = {
    "cpu.time": 3_000_000_000,
    "balloon.current": 131072,
    "balloon.available": 93772,
    "balloon.usable": 60812,
    "balloon.rss": 269608,
    "block.count": 2,
    "block.0.name": "vda",
    "block.0.rd.bytes": 11,
    "block.0.wr.bytes": 12,
    "block.0.rd.reqs": 13,
    "block.0.wr.reqs": 14,
    "block.0.allocation": 15,
    "block.1.name": "sda",
    "net.count": 1,
    "net.0.name": "vnet3",
    "net.0.rx.bytes": 21,
    "net.0.tx.bytes": 22,
    "net.0.rx.pkts": 23,
    "net.0.rx.drop": 24,
    "net.0.tx.drop": 25,
}


def test_numbers_get_our_ids_and_strangers_are_left_out() -> None:
    sample = vm_sample("vm", VALUES, Names({"vda": "disk-1"}, {"vnet3": "nic-1"}, True), 12.5)
    assert sample.disks == (
        DiskSample(
            disk_id="disk-1",
            read_bytes=11,
            written_bytes=12,
            read_requests=13,
            write_requests=14,
            allocated_bytes=15,
        ),
    )
    assert sample.nics == (
        NicSample(nic_id="nic-1", received_bytes=21, sent_bytes=22, received_packets=23, dropped_packets=49),
    )
    assert sample.memory_used_bytes == (93772 - 60812) * 1024
    assert sample.memory_bytes == 131072 * 1024


def test_a_guest_without_a_balloon_driver_uses_what_qemu_has() -> None:
    values = {"balloon.current": 1024, "balloon.rss": 2048}
    assert vm_sample("vm", values, Names({}, {}, True), 0.0).memory_used_bytes == 2048 * 1024


def test_without_a_control_group_the_vcpus_are_counted() -> None:
    assert cpu_nanoseconds(VALUES) == 3_000_000_000
    assert cpu_nanoseconds({"vcpu.maximum": 2, "vcpu.0.time": 5, "vcpu.1.time": 7}) == 12


async def test_a_host_is_sampled_with_its_vms(driver: VmHost) -> None:
    disk = DomainDisk(disk_id="d1", source=FileSource(path="/d", format=ImageFormat.RAW), target="vda")
    vm = tiny_spec(disks=(disk,), nics=(nic("br0"),))
    await driver.run(vm)
    now = 100.0
    sampler = Sampler(clock=lambda: now)
    first = await sampler.sample(driver.host)
    assert [v.vm_id for v in first.vms] == [vm.vm_id], "only ours"
    assert first.memory_bytes > first.memory_used_bytes > 0
    assert first.boot_id
    now = 110.0
    (second,) = (await sampler.sample(driver.host)).vms
    assert 0.0 <= second.cpu_percent <= 100.0 * vm.vcpus
    await driver.power_off(vm.vm_id)
    assert (await sampler.sample(driver.host)).vms == ()
