"""MAC pools: an address is never given twice, whoever asks at once; exhausted is a clear refusal."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.network import mac_model
from tests.network.scripted_network import Plant, plant
from volery.contracts.cluster import DeleteById
from volery.contracts.errors import Kind, Refused
from volery.contracts.ids import new_id
from volery.contracts.network import (
    ALLOCATE_NIC,
    CREATE_MAC_POOL,
    DELETE_MAC_POOL,
    RELEASE_NIC,
    UPDATE_MAC_POOL,
    AllocateNic,
    CreateMacPool,
    ReleaseNic,
    UpdateMacPool,
)
from volery.runtime.programs import Settings

FIRST = 0x566F1A000000


@st.composite
def pools(draw: st.DrawFn) -> tuple[mac_model.Range, ...]:
    """Some ranges that don't overlap, in any order."""
    marks = sorted(draw(st.sets(st.integers(FIRST, FIRST + 0xFFFF), min_size=2, max_size=16)))
    pairs = list(zip(marks[::2], marks[1::2], strict=False))
    return tuple(mac_model.Range(a, b) for a, b in pairs)


@given(pools(), st.randoms())
def test_every_place_of_a_pool_is_another_address(
    pool: tuple[mac_model.Range, ...], shuffler: random.Random
) -> None:
    texts = [r.text() for r in pool]
    shuffler.shuffle(texts)
    assert mac_model.ranges(texts) == tuple(sorted(pool))
    total = mac_model.size(pool)
    places = {0, total - 1, total // 2, *(shuffler.randrange(total) for _ in range(20))}
    addresses = [mac_model.at(pool, place) for place in places]
    assert len(set(addresses)) == len(places)
    assert all(mac_model.holds(pool, address) for address in addresses)
    assert all(mac_model.holds(pool, guess) for guess in mac_model.guesses(pool, shuffler))
    for address in addresses:
        assert mac_model.mac_number(mac_model.mac_text(address)) == address


@given(st.integers(0, 2**32))
def test_the_default_range_is_unicast_and_whole(seed: int) -> None:
    chosen = mac_model.default_range(random.Random(seed))
    assert chosen.size == 65536
    assert mac_model.ranges([chosen.text()]) == (chosen,)
    assert mac_model.mac_text(chosen.first).startswith("56:6f:")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "isn't a range"),
        ("56:6f:1a:00:00:00", "isn't a range"),
        ("56:6f:1a:00:00:09-56:6f:1a:00:00:00", "ends before"),
        ("01:00:5e:00:00:00-01:00:5e:00:00:09", "multicast"),
        ("00:00:00:00:00:00-00:00:00:00:00:09", "empty"),
        ("56:6f:1a:00:00:00-58:6f:1a:00:00:00", "multicast"),
        ("56:6f:1a:00:00:00-56:6f:1a:00:00:zz", "isn't a MAC address"),
    ],
)
def test_bad_ranges(text: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        mac_model.ranges([text])


def span(count: int) -> str:
    return mac_model.Range(FIRST, FIRST + count - 1).text()


async def small_pool(at: Plant, count: int, name: str = "small", **fields: bool) -> str:
    pool = await at.bus.ask(CREATE_MAC_POOL, CreateMacPool(name=name, ranges=(span(count),), **fields))
    network = await at.network(f"net-{name}", mac_pool_id=pool.id)
    return network.id


async def test_addresses_are_never_given_twice_while_many_ask(configured: Settings) -> None:
    """120 takers of a pool of 64, half of whom give back: no two hold one address, and all 64 can be held."""
    async with plant(configured, hosts=0) as at:
        network_id = await small_pool(at, 64)
        held: dict[str, str] = {}
        refusals: list[Refused] = []

        async def take(number: int) -> None:
            nic = AllocateNic(nic_id=new_id(), vm_id=new_id(), network_id=network_id)
            try:
                mac = (await at.bus.ask(ALLOCATE_NIC, nic)).mac
            except Refused as refusal:
                refusals.append(refusal)
                return
            assert mac not in held, f"{mac} was given twice"
            held[mac] = nic.nic_id
            if number % 2:
                await asyncio.sleep(0)
                del held[mac]
                await at.bus.ask(RELEASE_NIC, ReleaseNic(nic_id=nic.nic_id, vm_id=nic.vm_id))

        for start in range(0, 120, 40):
            await asyncio.gather(*(take(number) for number in range(start, start + 40)))
        assert {refusal.kind for refusal in refusals} <= {Kind.EXHAUSTED}
        while len(held) < 64:
            nic = AllocateNic(nic_id=new_id(), vm_id=new_id(), network_id=network_id)
            mac = (await at.bus.ask(ALLOCATE_NIC, nic)).mac
            assert mac not in held
            held[mac] = nic.nic_id
        with pytest.raises(Refused, match="all 64 are in use") as full:
            await at.bus.ask(
                ALLOCATE_NIC, AllocateNic(nic_id=new_id(), vm_id=new_id(), network_id=network_id)
            )
        assert full.value.kind is Kind.EXHAUSTED

        async def counted() -> bool:
            return (await at.pool("small")).used == 64

        await at.until(counted)


async def test_a_nic_keeps_its_address_and_can_be_given_one(configured: Settings) -> None:
    async with plant(configured, hosts=0) as at:
        network = await at.network()
        nic_id, vm_id = new_id(), new_id()
        ask = AllocateNic(nic_id=nic_id, vm_id=vm_id, network_id=network.id)
        first = await at.bus.ask(ALLOCATE_NIC, ask)
        assert await at.bus.ask(ALLOCATE_NIC, ask) == first
        assert first.mac.startswith("56:6f:")
        moved = AllocateNic(nic_id=nic_id, vm_id=vm_id, network_id=(await at.network("n2")).id)
        assert (await at.bus.ask(ALLOCATE_NIC, moved)).mac == first.mac
        given_mac = AllocateNic(nic_id=nic_id, vm_id=vm_id, network_id=network.id, mac="02:00:00:00:00:01")
        assert (await at.bus.ask(ALLOCATE_NIC, given_mac)).mac == "02:00:00:00:00:01"
        nowhere = await at.bus.ask(ALLOCATE_NIC, AllocateNic(nic_id=new_id(), vm_id=vm_id, network_id=""))
        assert nowhere.mac.startswith("56:6f:")
        for mac, sentence in (("nonsense", "isn't a MAC"), ("01:00:5e:00:00:01", "multicast")):
            with pytest.raises(Refused, match=sentence):
                await at.bus.ask(
                    ALLOCATE_NIC,
                    AllocateNic(nic_id=new_id(), vm_id=vm_id, network_id=network.id, mac=mac),
                )
        with pytest.raises(Refused, match="belongs to VM"):
            await at.bus.ask(ALLOCATE_NIC, AllocateNic(nic_id=nic_id, vm_id=new_id(), network_id=network.id))
        taken = AllocateNic(nic_id=new_id(), vm_id=vm_id, network_id=network.id, mac="02:00:00:00:00:01")
        with pytest.raises(Refused, match="is in use by VM"):
            await at.bus.ask(ALLOCATE_NIC, taken)
        with pytest.raises(Refused, match="there is no network"):
            await at.bus.ask(ALLOCATE_NIC, AllocateNic(nic_id=new_id(), vm_id=vm_id, network_id=new_id()))
        await at.bus.ask(RELEASE_NIC, ReleaseNic(nic_id=nic_id, vm_id=vm_id))
        await at.bus.ask(RELEASE_NIC, ReleaseNic(nic_id=nic_id, vm_id=vm_id))
        await at.bus.ask(ALLOCATE_NIC, taken)


async def test_a_pool_may_allow_duplicates_by_hand(configured: Settings) -> None:
    async with plant(configured, hosts=0) as at:
        network_id = await small_pool(at, 4, allow_duplicates=True)
        mac = mac_model.mac_text(FIRST)
        for _ in range(2):
            ask = AllocateNic(nic_id=new_id(), vm_id=new_id(), network_id=network_id, mac=mac)
            assert (await at.bus.ask(ALLOCATE_NIC, ask)).mac == mac
        picked = [
            (
                await at.bus.ask(
                    ALLOCATE_NIC, AllocateNic(nic_id=new_id(), vm_id=new_id(), network_id=network_id)
                )
            ).mac
            for _ in range(3)
        ]
        assert len({mac, *picked}) == 4


async def test_pools_in_use_stay_as_they_are(configured: Settings) -> None:
    async with plant(configured, hosts=0) as at:
        network_id = await small_pool(at, 8)
        pool = await at.pool("small")
        mac = mac_model.mac_text(FIRST + 7)
        await at.bus.ask(
            ALLOCATE_NIC, AllocateNic(nic_id=new_id(), vm_id=new_id(), network_id=network_id, mac=mac)
        )
        with pytest.raises(Refused, match="outside its new ranges"):
            await at.bus.ask(UPDATE_MAC_POOL, UpdateMacPool(id=pool.id, ranges=(span(4),)))
        larger = await at.bus.ask(UPDATE_MAC_POOL, UpdateMacPool(id=pool.id, ranges=(span(16),)))
        assert larger.size == 16
        with pytest.raises(Refused, match="can't be deleted"):
            await at.bus.ask(DELETE_MAC_POOL, DeleteById(id=pool.id))
        with pytest.raises(Refused, match="serves the networks"):
            await at.bus.ask(DELETE_MAC_POOL, DeleteById(id=(await at.pool()).id))
        with pytest.raises(Refused, match="overlap"):
            await at.bus.ask(CREATE_MAC_POOL, CreateMacPool(name="o", ranges=(span(4), span(2))))
        with pytest.raises(Refused, match="already"):
            await at.bus.ask(CREATE_MAC_POOL, CreateMacPool(name="small", ranges=(span(4),)))
