"""Addresses of VMs' NICs: given once, whoever asks at the same time, and given back."""

from __future__ import annotations

from services.network import mac_model
from services.network.fabric import Fabric
from services.network.store import MAC_POOLS, NETWORKS, NIC_ADDRESS, NIC_ID, NicRow, PoolPrivate
from volery.contracts.base import Done
from volery.contracts.errors import Kind, Refused, conflict, not_found
from volery.contracts.naming import checked_id
from volery.contracts.network import (
    ALLOCATE_NIC,
    RELEASE_NIC,
    AllocatedNic,
    AllocateNic,
    MacPool,
    ReleaseNic,
)
from volery.runtime.bus import Caller
from volery.runtime.service import Part
from volery.runtime.tables import Row, Stale, Taken

part = Part()
TURNS = 200
"""Attempts before somebody who loses every race is told to try again."""


@part.answers(ALLOCATE_NIC)
async def allocate(svc: Fabric, ask: AllocateNic, caller: Caller) -> AllocatedNic:
    """Idempotent per NIC: a repeat gets the same address; another network or address moves it there."""
    checked_id("NIC", ask.nic_id)
    checked_id("VM", ask.vm_id)
    wanted = mac_model.mac_number(ask.mac) if ask.mac else 0
    for _ in range(TURNS):
        pool = await _pool(svc, ask.network_id)
        before = await svc.store.nic(ask.nic_id)
        if before is not None and before.vm_id != ask.vm_id:
            raise conflict(f"NIC {ask.nic_id} belongs to VM {before.vm_id}: choose another id")
        after = await _decided(svc, ask, pool, before, wanted)
        answer = AllocatedNic(nic_id=ask.nic_id, mac=mac_model.mac_text(after.address))
        change = [svc.store.give(after)] if before is None else [svc.store.move(before, after)]
        try:
            await svc.core.commit(*(change if after != before else []), caller=caller, answer=answer)
        except Stale:
            continue
        except Taken as taken:
            if taken.constraint in (NIC_ADDRESS, NIC_ID):
                continue
            raise not_found("network", ask.network_id) from None
        svc.core.wake(f"pool:{pool.id}")
        return answer
    raise Refused(
        Kind.UNAVAILABLE, f"MAC pool {pool.public.name} is asked for too much at once: try again shortly"
    )


async def _pool(svc: Fabric, network_id: str) -> Row[MacPool, PoolPrivate]:
    """The pool of a network; a NIC that is plugged nowhere takes from the default one."""
    if not network_id:
        default = await svc.store.default_pool()
        if default is None:
            raise Refused(Kind.UNAVAILABLE, "the default MAC pool is being made: try again in a second")
        return default
    network = (await NETWORKS.get(svc.core.pool, checked_id("network", network_id))).public
    return await MAC_POOLS.get(svc.core.pool, network.mac_pool_id)


async def _decided(
    svc: Fabric,
    ask: AllocateNic,
    pool: Row[MacPool, PoolPrivate],
    before: NicRow | None,
    wanted: int,
) -> NicRow:
    """The NIC as it is to be. Raises Refused when the address given is another's, or none is left."""
    if before is not None and wanted in (0, before.address):
        return NicRow(
            ask.nic_id, ask.vm_id, ask.network_id, before.mac_pool_id, before.address, before.shared
        )
    if not wanted:
        address = await free_address(svc, pool.public)
        return NicRow(ask.nic_id, ask.vm_id, ask.network_id, pool.id, address)
    others = [nic for nic in await svc.store.nics_with(wanted) if nic.id != ask.nic_id]
    if others and not pool.public.allow_duplicates:
        names = await svc.store.vm_names([others[0].vm_id])
        vm = names.get(others[0].vm_id, others[0].vm_id)
        raise mac_model.refuse_taken(mac_model.mac_text(wanted), pool.public.name, vm)
    return NicRow(ask.nic_id, ask.vm_id, ask.network_id, pool.id, wanted, bool(others))


async def free_address(svc: Fabric, pool: MacPool) -> int:
    """An address that nobody has now; somebody who asks at the same time may get it first. Raises Refused(exhausted)."""
    ranges = mac_model.ranges(pool.ranges)
    guesses = list(mac_model.guesses(ranges, svc.random))
    taken = await svc.store.taken(guesses)
    for address in guesses:
        if address not in taken:
            return address
    for one in ranges:
        if (lowest := await svc.store.lowest_free(one.first, one.last)) is not None:
            return lowest
    raise mac_model.exhausted(pool.name, mac_model.size(ranges))


@part.answers(RELEASE_NIC)
async def release(svc: Fabric, ask: ReleaseNic, caller: Caller) -> Done:
    done = Done()
    nic = await svc.store.nic(ask.nic_id)
    await svc.core.commit(svc.store.take_back(ask.nic_id, ask.vm_id), caller=caller, answer=done)
    if nic is not None:
        svc.core.wake(f"pool:{nic.mac_pool_id}")
    return done
