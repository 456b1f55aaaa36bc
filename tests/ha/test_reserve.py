"""Reserved capacity: whether there is room for the VMs of hosts that die together, and how it is told."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.ha.policies.reserve import HostRoom, Standing, missing, sentences
from tests.ha.places import GIB, place
from tests.ha.world import until, vm
from volery.contracts.cluster import CLUSTER_CHANGED, GetById
from volery.contracts.errors import Refused
from volery.contracts.protection import GET_RESERVE, ClusterReserve
from volery.contracts.vm import VM_CHANGED
from volery.runtime.programs import Settings


def room(name: str, memory: int, vcpus: int = 100) -> HostRoom:
    return HostRoom(name, name, memory, vcpus)


def standing(name: str, host_id: str, memory: int, vcpus: int = 1) -> Standing:
    return Standing(name, "c", host_id, memory, vcpus)


def test_the_host_that_could_not_die_is_named_with_its_largest_vm() -> None:
    hosts = [room("a", 4), room("b", 3), room("c", 2)]
    vms = [standing("big", "a", 3), standing("small", "a", 2), standing("other", "b", 1)]
    assert missing(hosts, vms, 1) is None
    found = missing(hosts, [*vms, standing("third", "a", 2)], 1)
    assert found is not None
    assert (found.hosts, found.vm, found.memory_bytes, found.vms) == (("a",), "third", 2, 1)
    message, change = sentences("C", 1, found)
    assert "if a died, VM third" in message
    assert "add a host" in change
    two = missing(hosts, vms, 2)
    assert two is not None
    assert two.hosts == ("a", "b")


def test_vcpus_count_too() -> None:
    assert missing([room("a", 9), room("b", 9, vcpus=1)], [standing("v", "a", 1, vcpus=2)], 1) is not None


hosts_of = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(
    lambda sizes: [room(str(n), size, 3) for n, size in enumerate(sizes)]
)
vms_of = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3)), max_size=5
).map(lambda some: [standing(f"v{n}", str(h), m, c) for n, (h, m, c) in enumerate(some)])  # fmt: skip


def fits(hosts: list[HostRoom], vms: list[Standing]) -> bool:
    """Any packing at all: the oracle tries every one."""
    for places in itertools.product(hosts, repeat=len(vms)):
        if all(
            sum(v.memory_bytes or 0 for v, p in zip(vms, places, strict=True) if p is h) <= h.memory_bytes
            and sum(v.vcpus for v, p in zip(vms, places, strict=True) if p is h) <= h.vcpus
            for h in hosts
        ):
            return True
    return not vms


@settings(max_examples=200, deadline=None)
@given(hosts_of, vms_of, st.integers(1, 2))
def test_what_is_said_to_fit_does_whichever_hosts_die(
    hosts: list[HostRoom], vms: list[Standing], failures: int
) -> None:
    found = missing(hosts, vms, failures)
    if found is None:
        for lost in itertools.combinations(hosts, min(failures, len(hosts))):
            rest = [h for h in hosts if h not in lost]
            assert fits(rest, [v for v in vms if v.host_id in {h.id for h in lost}])
    else:
        rest = [h for h in hosts if h.name not in found.hosts]
        homeless = [v for v in vms if v.host_id in found.hosts]
        assert len(found.hosts) == min(failures, len(hosts))
        if len(homeless) == 1:
            assert not fits(rest, homeless)


async def test_it_is_told_when_the_reserve_is_lost_and_when_it_is_kept_again(
    configured: Settings, tmp_path: Path
) -> None:
    async with place(configured, tmp_path) as at:

        async def said(kept: bool) -> ClusterReserve:
            async def so() -> ClusterReserve | None:
                try:
                    found = await at.bus.ask(GET_RESERVE, GetById(id=at.cluster.id))
                except Refused:
                    return None
                return found if found.kept is kept else None

            shown: ClusterReserve = await until(so)
            return shown

        wanting = replace(at.cluster, revision=2, reserve_host_failures=1)
        await at.owner.says(CLUSTER_CHANGED, wanting)
        assert (await said(True)).host_failures == 1
        large = vm(name="large", host_id=at.hosts[0].id, memory_bytes=7 * GIB, cluster_id=at.cluster.id)
        await at.owner.says(VM_CHANGED, large)
        lost = await said(False)
        assert "if h0 died, VM web (1.1 GiB) would find none" in lost.message
        await at.says_vm(large, memory_bytes=GIB)
        await said(True)
        await at.owner.says(CLUSTER_CHANGED, replace(wanting, revision=3, reserve_host_failures=0))

        async def gone() -> bool:
            try:
                await at.bus.ask(GET_RESERVE, GetById(id=at.cluster.id))
            except Refused:
                return True
            return False

        await until(gone)
