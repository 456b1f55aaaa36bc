"""Data centers, clusters and the Blank template: create, edit, delete, list."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from msgspec.structs import replace

from services.inventory import admission, model
from services.inventory.desk import Inventory
from services.inventory.store import CLUSTERS, DATA_CENTERS, TEMPLATES
from volery.contracts.base import Done
from volery.contracts.cluster import (
    CREATE_CLUSTER,
    CREATE_DATA_CENTER,
    DELETE_CLUSTER,
    DELETE_DATA_CENTER,
    GET_CLUSTER,
    GET_DATA_CENTER,
    LIST_CLUSTERS,
    LIST_DATA_CENTERS,
    UPDATE_CLUSTER,
    UPDATE_DATA_CENTER,
    Cluster,
    CreateCluster,
    CreateDataCenter,
    DataCenter,
    DeleteById,
    GetById,
    UpdateCluster,
    UpdateDataCenter,
)
from volery.contracts.errors import conflict
from volery.contracts.ids import new_id
from volery.contracts.operation import ListQuery
from volery.contracts.template import BLANK_TEMPLATE_ID, GET_TEMPLATE, LIST_TEMPLATES, Template
from volery.runtime import checks
from volery.runtime.bus import Caller
from volery.runtime.clock import utc_now
from volery.runtime.pages import page
from volery.runtime.service import Part
from volery.runtime.tables import Nothing, Stale, Taken

part = Part()


@part.answers(CREATE_DATA_CENTER)
async def create_data_center(inv: Inventory, ask: CreateDataCenter, caller: Caller) -> DataCenter:
    now = utc_now()
    made = DataCenter(
        id=new_id(),
        revision=1,
        created_at=now,
        updated_at=now,
        name=checks.name(ask.name),
        description=checks.text(ask.description, "description"),
        local=ask.local,
        tags=checks.tags(ask.tags),
    )
    try:
        await inv.core.commit(DATA_CENTERS.insert(made, Nothing()), caller=caller, answer=made)
    except Taken:
        raise name_taken("data center", ask.name) from None
    return made


@part.answers(UPDATE_DATA_CENTER)
async def update_data_center(inv: Inventory, ask: UpdateDataCenter, caller: Caller) -> Any:
    while True:
        row = await DATA_CENTERS.get(inv.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "data center")
        new = replace(row.public, **model.given(ask))
        checks.name(new.name)
        checks.text(new.description, "description")
        checks.tags(new.tags)
        try:
            update = DATA_CENTERS.update(row, new)
            await inv.core.commit(update, caller=caller, answer=update.document)
        except Stale:
            continue
        except Taken:
            raise name_taken("data center", new.name) from None
        return update.document


@part.answers(DELETE_DATA_CENTER)
async def delete_data_center(inv: Inventory, ask: DeleteById, caller: Caller) -> Done:
    while True:
        row = await DATA_CENTERS.get(inv.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "data center")
        if clusters := await inv.store.clusters_in(ask.id):
            raise conflict(
                f"data center {row.public.name} still has {clusters} clusters; delete or move them first",
                clusters=clusters,
            )
        try:
            await inv.core.commit(DATA_CENTERS.delete(row), caller=caller, answer=Done())
        except Stale:
            continue
        return Done()


@part.answers(GET_DATA_CENTER)
async def get_data_center(inv: Inventory, ask: GetById, caller: Caller) -> Any:
    return await DATA_CENTERS.raw(inv.core.pool, ask.id)


@part.answers(LIST_DATA_CENTERS)
async def list_data_centers(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, DATA_CENTERS, ask)


@part.answers(CREATE_CLUSTER)
async def create_cluster(inv: Inventory, ask: CreateCluster, caller: Caller) -> Cluster:
    model.check_cluster(
        ask.name,
        ask.description,
        ask.tags,
        ask.memory_overcommit_percent,
        ask.cpu_overcommit_ratio,
        ask.reserve_host_failures,
    )
    checks.object_id(ask.data_center_id, "data center")
    await DATA_CENTERS.get(inv.core.pool, ask.data_center_id)
    now = utc_now()
    made = Cluster(id=new_id(), revision=1, created_at=now, updated_at=now, **model.given(ask))
    try:
        await inv.core.commit(CLUSTERS.insert(made, Nothing()), caller=caller, answer=made)
    except Taken:
        raise name_taken("cluster", ask.name) from None
    return made


@part.answers(UPDATE_CLUSTER)
async def update_cluster(inv: Inventory, ask: UpdateCluster, caller: Caller) -> Any:
    while True:
        row = await CLUSTERS.get(inv.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "cluster")
        new = replace(row.public, **model.given(ask))
        model.check_cluster(
            new.name,
            new.description,
            new.tags,
            new.memory_overcommit_percent,
            new.cpu_overcommit_ratio,
            new.reserve_host_failures,
        )
        await admission.of_cluster(inv, row.public, new, caller)
        try:
            update = CLUSTERS.update(row, new)
            await inv.core.commit(update, caller=caller, answer=update.document)
        except Stale:
            continue
        except Taken:
            raise name_taken("cluster", new.name) from None
        return update.document


@part.answers(DELETE_CLUSTER)
async def delete_cluster(inv: Inventory, ask: DeleteById, caller: Caller) -> Done:
    while True:
        row = await CLUSTERS.get(inv.core.pool, ask.id)
        checks.revision(row.public, ask.if_revision, "cluster")
        hosts, vms = await inv.store.hosts_in_cluster(ask.id), await inv.store.vms_in_cluster(ask.id)
        if hosts or vms:
            raise conflict(
                f"cluster {row.public.name} still has {hosts} hosts and {vms} VMs; delete or move them first",
                hosts=hosts,
                vms=vms,
            )
        try:
            await inv.core.commit(CLUSTERS.delete(row), caller=caller, answer=Done())
        except Stale:
            continue
        return Done()


@part.answers(GET_CLUSTER)
async def get_cluster(inv: Inventory, ask: GetById, caller: Caller) -> Any:
    return await CLUSTERS.raw(inv.core.pool, ask.id)


@part.answers(LIST_CLUSTERS)
async def list_clusters(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, CLUSTERS, ask)


@part.answers(GET_TEMPLATE)
async def get_template(inv: Inventory, ask: GetById, caller: Caller) -> Any:
    return await TEMPLATES.raw(inv.core.pool, ask.id)


@part.answers(LIST_TEMPLATES)
async def list_templates(inv: Inventory, ask: ListQuery, caller: Caller) -> Any:
    return await page(inv.core.pool, TEMPLATES, ask)


async def ensure_blank(inv: Inventory) -> None:
    """The Blank template is always there."""
    if await TEMPLATES.find(inv.core.pool, BLANK_TEMPLATE_ID) is None:
        now = utc_now()
        blank = Template(
            id=BLANK_TEMPLATE_ID,
            revision=1,
            created_at=now,
            updated_at=now,
            name="Blank",
            description="An empty VM.",
        )
        with suppress(Taken):  # another replica was first
            await inv.core.commit(TEMPLATES.insert(blank, Nothing()))


def name_taken(noun: str, name: str) -> Exception:
    return conflict(f"there is a {noun} named {name!r} already; choose another name", name=name)
