"""Logical networks: made, edited, deleted. Hosts follow by reconciling (see hosts)."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from services.network import model
from services.network.fabric import Fabric
from services.network.store import (
    ATTACHMENTS,
    MAC_POOLS,
    NETWORK_BRIDGE,
    NETWORK_NAME,
    NETWORK_POOL,
    NETWORK_SUBNET,
    NETWORK_VNI,
    NETWORKS,
    NIC_NETWORK,
)
from volery.contracts.base import Done
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Kind, Refused, conflict
from volery.contracts.ids import new_id
from volery.contracts.naming import checked_id, checked_revision
from volery.contracts.network import (
    CREATE_NETWORK,
    DELETE_NETWORK,
    GET_NETWORK,
    LIST_ATTACHMENTS,
    LIST_NETWORKS,
    UPDATE_NETWORK,
    CreateNetwork,
    Network,
    UpdateNetwork,
)
from volery.contracts.network_orders import NetworkKind
from volery.contracts.operation import ListQuery
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Nothing, Stale, Taken

part = Part()
NOUN = "network"
TURNS = 50


@part.answers(CREATE_NETWORK)
async def create(svc: Fabric, ask: CreateNetwork, caller: Caller) -> Network:
    """What Volery picks (VNI, subnet, bridge) is picked again when somebody else was faster."""
    ask = model.checked(ask)
    await svc.check_data_center(ask.data_center_id)
    await svc.check_clusters(ask.data_center_id, ask.cluster_ids)
    pool_id = await _pool_id(svc, ask.mac_pool_id)
    for _ in range(TURNS):
        network = await _new(svc, ask, pool_id)
        try:
            await svc.core.commit(NETWORKS.insert(network, Nothing()), caller=caller, answer=network)
        except Taken as taken:
            if _picked(taken, ask):
                continue
            raise _taken(taken, network) from None
        return network
    raise Refused(Kind.UNAVAILABLE, f"network {ask.name} could not be numbered: try again shortly")


def _picked(taken: Taken, ask: CreateNetwork) -> bool:
    """Whether what clashed was Volery's own choice."""
    picked = {NETWORK_BRIDGE: True, NETWORK_VNI: not ask.vni, NETWORK_SUBNET: not ask.subnet}
    return picked.get(taken.constraint, False)


def _taken(taken: Taken, network: Network) -> Refused:
    sentences = {
        NETWORK_NAME: f"there is a network {network.name!r} in this data center already: choose another name",
        NETWORK_VNI: f"VNI {network.vni} is another network's: choose another one, or leave it out",
        NETWORK_SUBNET: f"subnet {network.subnet} overlaps another network's: choose another one, or leave it out",
        NETWORK_POOL: f"there is no MAC pool {network.mac_pool_id}",
    }
    return conflict(
        sentences.get(taken.constraint, f"network {network.name} clashes with another one"),
        rule=taken.constraint,
    )


async def _pool_id(svc: Fabric, pool_id: str) -> str:
    if pool_id:
        return (await MAC_POOLS.get(svc.core.pool, pool_id)).id
    default = await svc.store.default_pool()
    if default is None:
        raise Refused(Kind.UNAVAILABLE, "the default MAC pool is being made: try again in a second")
    return default.id


async def _new(svc: Fabric, ask: CreateNetwork, pool_id: str) -> Network:
    now = utc_now()
    network_id = new_id()
    vni, subnet = ask.vni, ask.subnet
    if ask.kind is NetworkKind.VXLAN and not vni:
        vni = model.pick_vni(svc.random)
    if ask.kind is NetworkKind.NAT and not subnet:
        subnet = model.pick_subnet(svc.config.nat_range, await svc.store.subnets(), svc.random)
    return Network(
        id=network_id,
        revision=1,
        created_at=now,
        updated_at=now,
        name=ask.name,
        data_center_id=ask.data_center_id,
        kind=ask.kind,
        description=ask.description,
        tags=ask.tags,
        vlan=ask.vlan,
        mtu=ask.mtu,
        vni=vni,
        subnet=subnet,
        bridge=model.bridge_name(network_id, svc.config.device_suffix),
        mac_pool_id=pool_id,
        cluster_ids=ask.cluster_ids,
        required=ask.required,
    )


@part.answers(UPDATE_NETWORK)
async def update(svc: Fabric, ask: UpdateNetwork, caller: Caller) -> Network:
    while True:
        row = await NETWORKS.get(svc.core.pool, checked_id(NOUN, ask.id))
        checked_revision(NOUN, row.public.name, row.public.revision, ask.if_revision)
        new = model.edited(row.public, ask)
        await svc.check_clusters(new.data_center_id, new.cluster_ids)
        new = replace(new, revision=row.public.revision + 1, updated_at=utc_now())
        try:
            await svc.core.commit(NETWORKS.update(row, new), caller=caller, answer=new)
        except Stale:
            continue
        except Taken as taken:
            raise _taken(taken, new) from None
        return new


@part.answers(DELETE_NETWORK)
async def delete(svc: Fabric, ask: DeleteById, caller: Caller) -> Done:
    """Refused while a NIC is plugged into it. Its hosts drop the bridge by themselves afterwards."""
    done = Done()
    while True:
        row = await NETWORKS.get(svc.core.pool, checked_id(NOUN, ask.id))
        checked_revision(NOUN, row.public.name, row.public.revision, ask.if_revision)
        going = [ATTACHMENTS.delete(a) for a in await svc.store.attachments_for(row.id)]
        try:
            await svc.core.commit(NETWORKS.delete(row), *going, caller=caller, answer=done)
        except Stale:
            continue
        except Taken as taken:
            if taken.constraint != NIC_NETWORK:
                raise
            raise await _used(svc, row.public) from None
        return done


async def _used(svc: Fabric, network: Network) -> Refused:
    users = await svc.store.users_of(network.id)
    names = await svc.store.vm_names(users)
    shown = sorted(names.get(vm_id, vm_id) for vm_id in users)
    some = ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
    return conflict(
        f"network {network.name} can't be deleted: NICs of VM {some} are plugged into it; unplug or remove these first",
        vms=shown[:100],
    )


@part.answers(GET_NETWORK)
async def get(svc: Fabric, ask: GetById, caller: Caller) -> Any:
    return await NETWORKS.raw(svc.core.pool, ask.id)


@part.answers(LIST_NETWORKS)
async def listed(svc: Fabric, ask: ListQuery, caller: Caller) -> Any:
    return await page(svc.core.pool, NETWORKS, ask)


@part.answers(LIST_ATTACHMENTS)
async def attachments(svc: Fabric, ask: ListQuery, caller: Caller) -> Any:
    return await page(svc.core.pool, ATTACHMENTS, ask)
