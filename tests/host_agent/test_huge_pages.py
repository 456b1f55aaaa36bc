"""Huge pages on a host: what the kernel and libvirt say of them, and real guests whose memory is in them.

The machine sets some pages of 2 MiB aside for these tests and takes them back at their end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from host_agent import huge_pages, runningxml
from host_agent.capabilities import Describer, numa_cells
from host_agent.refusals import refused
from host_agent.stats import Sampler
from tests.support.libvirt_host import LibvirtHost, join_networks, new_host
from tests.support.vms import VmHost, tiny_spec, vm_host
from volery.contracts.agent import HugePages
from volery.contracts.domain import DomainState
from volery.contracts.domain_orders import (
    ADMIT_MIGRATION,
    MIGRATE_DOMAIN,
    AdmitMigration,
    MigrateDomain,
    MigrationAdmitted,
)
from volery.contracts.errors import Kind, Refused
from volery.contracts.metrics import FreePages

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
NUMBER = Path("/proc/sys/vm/nr_hugepages")
PAGES = 112
"""Two guests of 96 MiB."""


def kernel(place: Path, sizes: dict[int, tuple[int, int, int]]) -> Path:
    """The kernel's files: by size in KiB how many there are, how many are free, how many of these are reserved."""
    for size, numbers in sizes.items():
        directory = place / f"hugepages-{size}kB"
        directory.mkdir()
        names = ("nr_hugepages", "free_hugepages", "resv_hugepages")
        for name, number in zip(names, numbers, strict=True):
            (directory / name).write_text(f"{number}\n")
    return place


def test_sizes_of_which_there_are_none_are_left_out_and_reserved_pages_are_not_free(tmp_path: Path) -> None:
    place = kernel(tmp_path, {2048: (512, 100, 36), 1048576: (0, 0, 0), 65536: (3, 1, 2)})
    assert huge_pages.read(place) == (
        FreePages(page_kib=2048, count=512, free=64),
        FreePages(page_kib=65536, count=3, free=0),
    )
    assert huge_pages.read(tmp_path / "nowhere") == ()


def test_a_domain_begins_with_the_last_free_page_and_not_beyond(tmp_path: Path) -> None:
    place = kernel(tmp_path, {2048: (512, 100, 36)})
    huge_pages.check(tiny_spec(memory_bytes=128 * MIB, hugepage_kib=2048), place)
    huge_pages.check(tiny_spec(memory_bytes=1 << 40), place)
    for spec, lacking in (
        (tiny_spec(memory_bytes=130 * MIB, hugepage_kib=2048), "set 1 more aside"),
        (tiny_spec(memory_bytes=1 << 30, hugepage_kib=1048576), "0 of this host's 0 are free"),
    ):
        with pytest.raises(Refused, match=lacking) as refusal:
            huge_pages.check(spec, place)
        assert refusal.value.kind is Kind.EXHAUSTED


def test_libvirts_cells_are_read_with_their_huge_pages() -> None:
    cells = """<capabilities><host><topology><cells num='2'>
      <cell id='0'><memory unit='KiB'>4096</memory><pages unit='KiB' size='4'>900</pages>
       <pages unit='KiB' size='2048'>512</pages><pages unit='KiB' size='1048576'>0</pages></cell>
      <cell id='1'><memory unit='KiB'>4096</memory><pages unit='KiB' size='1048576'>2</pages></cell>
    </cells></topology></host></capabilities>"""
    first, second = numa_cells(runningxml.parsed(cells))
    assert first.huge_pages == (HugePages(page_kib=2048, count=512),)
    assert second.huge_pages == (HugePages(page_kib=1048576, count=2),)


@pytest.mark.parametrize(
    ("backing", "expected"),
    [
        ("", 0),
        ("<memoryBacking/>", 0),
        ("<memoryBacking><hugepages/></memoryBacking>", 2048),
        ("<memoryBacking><hugepages><page size='1' unit='G'/></hugepages></memoryBacking>", 1048576),
        ("<memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages></memoryBacking>", 2048),
    ],
)
def test_a_strangers_domain_says_what_backs_it(backing: str, expected: int) -> None:
    assert runningxml.hugepage_kib(runningxml.parsed(f"<domain>{backing}</domain>")) == expected


def test_what_only_this_host_lacks_is_no_reason_to_try_no_other() -> None:
    error = "internal error: Unable to find any usable hugetlbfs mount for 2048 KiB"
    found = refused("start the VM", 1, error)
    assert found.kind is Kind.EXHAUSTED
    assert "mount hugetlbfs" in found.message
    assert found.details["libvirt_code"] == 1


@pytest.fixture(scope="module")
def set_aside() -> Iterator[int]:
    """So many pages more than before; none are left when the tests have ended."""
    before = int(NUMBER.read_text())
    try:
        NUMBER.write_text(str(before + PAGES))
        if int(NUMBER.read_text()) < before + PAGES:
            pytest.fail(
                "this machine has no memory in pieces of 2 MiB left: without it nothing is proven; free some and run it again"
            )
        yield before + PAGES
    finally:
        NUMBER.write_text(str(before))


def with_hugetlbfs(host: LibvirtHost, mounted: bool) -> LibvirtHost:
    """libvirtd looks for the mount when it starts."""
    host.run("sh", "-c", "umount -a -t hugetlbfs; mkdir -p /dev/hugepages")
    if mounted:
        host.run("mount", "-t", "hugetlbfs", "hugetlbfs", "/dev/hugepages")
    host.kill_daemon()
    host.start_daemon()
    return host


@dataclass
class Pair:
    here: VmHost
    there: VmHost
    there_uri: str
    there_address: str


@pytest.fixture(scope="module")
def cabled(set_aside: int) -> Iterator[tuple[LibvirtHost, LibvirtHost, str]]:
    first, second = new_host(), new_host()
    try:
        _, address = join_networks(first, second)
        yield with_hugetlbfs(first, True), with_hugetlbfs(second, True), address
    finally:
        first.stop()
        second.stop()


@pytest.fixture
async def pair(cabled: tuple[LibvirtHost, LibvirtHost, str], tmp_path: Path) -> AsyncIterator[Pair]:
    first, second, address = cabled
    async with vm_host(first.uri, tmp_path) as here, vm_host(second.uri, tmp_path) as there:
        yield Pair(here, there, second.uri, address)


def free() -> int:
    return next((pages.free for pages in huge_pages.read() if pages.page_kib == 2048), 0)


async def test_a_real_guest_starts_on_huge_pages_moves_live_and_gives_them_back(
    pair: Pair, set_aside: int
) -> None:
    """Both hosts are this one machine: while it moves it holds its pages twice, as on two hosts."""
    (cell,) = (await Describer().describe(pair.here.host)).numa
    assert HugePages(page_kib=2048, count=set_aside) in cell.huge_pages
    vm, before = tiny_spec(hugepage_kib=2048), free()
    await pair.here.run(vm)
    await pair.here.agent_up(vm.vm_id)
    assert before - free() == 48, "all 96 MiB, from the beginning"
    (sampled,) = (await Sampler().sample(pair.here.host)).huge_pages
    assert (sampled.count, sampled.free) == (set_aside, before - 48)
    assert (await pair.here.hypervisor.domain(vm.vm_id)).hugepage_kib == 2048

    assert (
        await pair.there.order(ADMIT_MIGRATION, AdmitMigration(vm_id=vm.vm_id, spec=vm), epoch=2)
        == MigrationAdmitted()
    )
    move = MigrateDomain(
        vm_id=vm.vm_id,
        destination_uri=pair.there_uri,
        destination_address=pair.there_address,
        destination_epoch=2,
        destination_order_seq=5,
    )
    await pair.here.order(MIGRATE_DOMAIN, move)
    report = await pair.there.hypervisor.domain(vm.vm_id)
    assert (report.state, report.hugepage_kib) == (DomainState.RUNNING, 2048)
    assert before - free() == 48
    await pair.there.power_off(vm.vm_id)
    assert free() == before


async def test_where_too_few_pages_are_free_it_neither_starts_nor_arrives(pair: Pair) -> None:
    vm = tiny_spec(hugepage_kib=2048, memory_bytes=(free() + 1) * 2 * MIB)
    with pytest.raises(Refused, match="huge pages of 2048 KiB") as refusal:
        await pair.here.run(vm)
    assert refusal.value.kind is Kind.EXHAUSTED
    assert (await pair.here.hypervisor.domain(vm.vm_id)).state is DomainState.GONE
    with pytest.raises(Refused, match="set 1 more aside"):
        await pair.there.order(ADMIT_MIGRATION, AdmitMigration(vm_id=vm.vm_id, spec=vm), epoch=2)


async def test_a_host_whose_libvirtd_sees_no_hugetlbfs_says_what_to_mount(
    set_aside: int, tmp_path: Path
) -> None:
    host = new_host()
    try:
        with_hugetlbfs(host, False)
        async with vm_host(host.uri, tmp_path) as made:
            with pytest.raises(Refused, match="mount hugetlbfs") as refusal:
                await made.run(tiny_spec(hugepage_kib=2048))
            assert refusal.value.kind is Kind.EXHAUSTED
    finally:
        host.stop()
