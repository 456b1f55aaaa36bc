"""MAC pools: ranges, and how many of their addresses are in use. The first one is made at the first start."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from services.network import mac_model
from services.network.fabric import Fabric
from services.network.store import MAC_POOLS, NETWORK_POOL, NIC_POOL, POOL_NAME, PoolPrivate
from volery.contracts.base import Done
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Refused, conflict
from volery.contracts.ids import new_id
from volery.contracts.naming import checked_id, checked_name, checked_revision
from volery.contracts.network import (
    CREATE_MAC_POOL,
    DELETE_MAC_POOL,
    GET_MAC_POOL,
    LIST_MAC_POOLS,
    UPDATE_MAC_POOL,
    CreateMacPool,
    MacPool,
    UpdateMacPool,
)
from volery.contracts.operation import ListQuery
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Row, Stale, Taken

part = Part()
NOUN = "MAC pool"
DEFAULT_NAME = "Default"


async def make_default(svc: Fabric) -> None:
    """There is always a pool for networks that name none."""
    if await svc.store.default_pool() is not None:
        return
    chosen = mac_model.default_range(svc.random)
    pool = _new(DEFAULT_NAME, (chosen,), False)
    try:
        await svc.core.commit(MAC_POOLS.insert(pool, PoolPrivate(default=True)))
    except Taken:  # another leader was first, or a person had taken the name
        if await svc.store.default_pool() is None:
            pool = replace(pool, name=f"{DEFAULT_NAME} {pool.id[:8]}")
            await svc.core.commit(MAC_POOLS.insert(pool, PoolPrivate(default=True)))


def _new(name: str, ranges: tuple[mac_model.Range, ...], allow_duplicates: bool) -> MacPool:
    now = utc_now()
    return MacPool(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        name=name,
        ranges=tuple(r.text() for r in ranges),
        allow_duplicates=allow_duplicates,
        size=mac_model.size(ranges),
    )


def _taken(taken: Taken, name: str) -> Refused:
    if taken.constraint == POOL_NAME:
        return conflict(f"there is a MAC pool {name!r} already: choose another name", name=name)
    return conflict(f"MAC pool {name} clashes with another one ({taken.constraint})")


@part.answers(CREATE_MAC_POOL)
async def create(svc: Fabric, ask: CreateMacPool, caller: Caller) -> MacPool:
    name = checked_name(NOUN, ask.name)
    pool = _new(name, mac_model.ranges(ask.ranges), ask.allow_duplicates)
    try:
        await svc.core.commit(MAC_POOLS.insert(pool, PoolPrivate()), caller=caller, answer=pool)
    except Taken as taken:
        raise _taken(taken, name) from None
    return pool


@part.answers(UPDATE_MAC_POOL)
async def update(svc: Fabric, ask: UpdateMacPool, caller: Caller) -> MacPool:
    while True:
        row = await MAC_POOLS.get(svc.core.pool, checked_id(NOUN, ask.id))
        checked_revision(NOUN, row.public.name, row.public.revision, ask.if_revision)
        new = await _edited(svc, row, ask)
        new = replace(new, revision=row.public.revision + 1, updated_at=utc_now())
        try:
            await svc.core.commit(MAC_POOLS.update(row, new), caller=caller, answer=new)
        except Stale:
            continue
        except Taken as taken:
            raise _taken(taken, new.name) from None
        return new


async def _edited(svc: Fabric, row: Row[MacPool, PoolPrivate], ask: UpdateMacPool) -> MacPool:
    given = {
        name: value
        for name in ("name", "ranges", "allow_duplicates")
        if (value := getattr(ask, name)) is not msgspec.UNSET
    }
    new = replace(row.public, **given)
    ranges = mac_model.ranges(new.ranges)
    if new.ranges != row.public.ranges:
        outside = await svc.store.outside(row.id, [(r.first, r.last) for r in ranges])
        by_pool = [number for number in outside if mac_model.holds(_ranges(row.public), number)]
        if by_pool:
            raise conflict(
                f"MAC pool {row.public.name} has given {mac_model.mac_text(by_pool[0])}, which would be outside its new "
                "ranges: keep it inside, or remove that NIC first",
                macs=[mac_model.mac_text(number) for number in by_pool],
            )
    return replace(
        new,
        name=checked_name(NOUN, new.name),
        ranges=tuple(r.text() for r in ranges),
        size=mac_model.size(ranges),
    )


def _ranges(pool: MacPool) -> tuple[mac_model.Range, ...]:
    return mac_model.ranges(pool.ranges)


@part.answers(DELETE_MAC_POOL)
async def delete(svc: Fabric, ask: DeleteById, caller: Caller) -> Done:
    done = Done()
    while True:
        row = await MAC_POOLS.get(svc.core.pool, checked_id(NOUN, ask.id))
        checked_revision(NOUN, row.public.name, row.public.revision, ask.if_revision)
        if row.private.default:
            raise conflict(
                f"MAC pool {row.public.name} serves the networks that name none and can't be deleted: change its ranges "
                "instead"
            )
        try:
            await svc.core.commit(MAC_POOLS.delete(row), caller=caller, answer=done)
        except Stale:
            continue
        except Taken as taken:
            raise _used(taken, row.public) from None
        return done


def _used(taken: Taken, pool: MacPool) -> Refused:
    by = {NETWORK_POOL: "networks take their addresses from it", NIC_POOL: "NICs have addresses from it"}
    why = by.get(taken.constraint, "it is in use")
    return conflict(
        f"MAC pool {pool.name} can't be deleted: {why}; remove these first", rule=taken.constraint
    )


async def count(svc: Fabric, pool_id: str) -> None:
    """Say how many addresses are in use. Coalesced: a thousand new NICs make a few facts."""
    used = await svc.store.used_in(pool_id)

    def counted(row: Row[MacPool, PoolPrivate]) -> tuple[MacPool, PoolPrivate]:
        return replace(row.public, used=used), row.private

    await svc.edit(MAC_POOLS, pool_id, counted)


@part.answers(GET_MAC_POOL)
async def get(svc: Fabric, ask: GetById, caller: Caller) -> Any:
    return await MAC_POOLS.raw(svc.core.pool, ask.id)


@part.answers(LIST_MAC_POOLS)
async def listed(svc: Fabric, ask: ListQuery, caller: Caller) -> Any:
    return await page(svc.core.pool, MAC_POOLS, ask)
