"""What a host says it can do, from real libvirt's words and from trying the kernel."""

from __future__ import annotations

from host_agent.capabilities import (
    OLDEST_LIBVIRT,
    Describer,
    has_kvm,
    machines,
    numa_cells,
    numbers,
    prepare,
    usable_models,
)
from host_agent.runningxml import parsed
from tests.support.vms import VmHost

CAPABILITIES = """<capabilities><host><uuid>589f4977-f200-4562-85ff-c13724480cf1</uuid>
 <topology><cells num='1'><cell id='0'><memory unit='KiB'>2048</memory>
  <cpus num='2'><cpu id='0'/><cpu id='1'/></cpus></cell></cells></topology></host>
 <guest><arch name='i686'><machine>isapc</machine></arch></guest>
 <guest><arch name='x86_64'><machine canonical='pc-q35-7.2'>q35</machine><machine>pc-q35-7.2</machine>
  <domain type='qemu'/><domain type='kvm'/></arch></guest></capabilities>"""
MODELS = """<domainCapabilities><cpu><mode name='maximum' supported='yes'/><mode name='custom' supported='yes'>
 <model usable='yes'>qemu64</model><model usable='no'>EPYC</model><model usable='yes'>Westmere</model>
 </mode></cpu></domainCapabilities>"""


def test_libvirts_words_are_read() -> None:
    root = parsed(CAPABILITIES)
    (cell,) = numa_cells(root)
    assert (cell.memory_bytes, cell.cpus) == (2048 * 1024, (0, 1))
    assert machines(root) == ("pc-q35-7.2", "q35")
    assert has_kvm(root)
    assert not has_kvm(parsed("<capabilities/>"))
    assert usable_models(parsed(MODELS)) == ("Westmere", "qemu64")
    assert numbers(OLDEST_LIBVIRT) == "8.0.0"


async def test_the_test_drivers_host_describes_itself(driver: VmHost) -> None:
    await prepare(driver.host)
    found = await Describer().describe(driver.host)
    assert (found.cpus, found.memory_bytes) == (16, 3 << 30)
    assert found.arch == "x86_64"
    assert "q35" in found.machines
    assert found.hardware_uuid
    assert found.os
    assert found.cpu_flags
    assert "bridge" in found.features
    assert not found.kvm


async def test_a_real_host_describes_itself(qemu: VmHost) -> None:
    await prepare(qemu.host)
    found = await Describer().describe(qemu.host)
    assert found.libvirt_version >= OLDEST_LIBVIRT
    assert found.qemu_version > 5_000_000
    assert "q35" in found.machines
    assert "qemu64" in found.cpu_models
    assert found.cpus * found.memory_bytes > 0
    assert found.numa[0].cpus
    assert not found.kvm
