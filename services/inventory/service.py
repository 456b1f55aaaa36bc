"""The table of what inventory answers, hears and runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from msgspec.structs import replace

from services.inventory import (
    accounts,
    clusters,
    dead_parts,
    devices,
    enrolment,
    host_facts,
    hosts,
    io_errors,
    maintenance,
    many_starts,
    migration,
    model,
    power_saving,
    protection,
    readers,
    snapshots,
    starting,
    stopping,
    upgrading,
    vms,
)
from services.inventory.config import InventoryConfig
from services.inventory.desk import Inventory
from services.inventory.endings import bury
from services.inventory.reconcile import reconcile, reconcile_all
from services.inventory.store import CLUSTERS, HOSTS, VMS, Store
from volery.contracts.agent import HOST_REPORTED, INVENTORY_ORDER_FINISHED, INVENTORY_ORDER_PROGRESSED
from volery.contracts.base import Owner
from volery.contracts.operation import Operation
from volery.contracts.vm import DesiredState
from volery.runtime.core import Core, Pace
from volery.runtime.service import Service
from volery.runtime.tables import Change

SHOWN_SECONDS = 1.0
"""What a host's VMs were promised is shown on it at most so often."""


@asynccontextmanager
async def open_inventory(core: Core) -> AsyncIterator[Inventory]:
    core.quarantine.on_end.append(lambda: core.wake("reports/"))
    yield Inventory(core, Store(core.pool, core.wake, Pace(core.wake, SHOWN_SECONDS)), core.config)


async def on_follow(inv: Inventory) -> None:
    """What must exist before anybody asks."""
    await clusters.ensure_blank(inv)
    await accounts.ensure_admin(inv)


async def release(inv: Inventory, operation: Operation) -> Sequence[Change]:
    """The object of an ended operation is free again, and says what may be asked of it now."""
    if operation.object_kind == "vm":
        vm = await VMS.find(inv.core.pool, operation.object_id)
        if vm is None or vm.public.busy_with != operation.id:
            return ()
        freed = VMS.update(vm, model.with_actions(replace(vm.public, busy_with="")))
        if operation.kind == "vm.stop" and vm.public.desired is DesiredState.DOWN:
            freed = freed.and_then(
                lambda: inv.core.wake(f"vm/{operation.object_id}")
            )  # if it runs, it is asked again
        return [freed]
    if operation.object_kind == "cluster":
        cluster = await CLUSTERS.find(inv.core.pool, operation.object_id)
        if cluster is None or cluster.public.busy_with != operation.id:
            return ()
        return [CLUSTERS.update(cluster, replace(cluster.public, busy_with=""))]
    host = await HOSTS.find(inv.core.pool, operation.object_id)
    if host is None:
        return ()
    if (evacuated := dead_parts.released(host, operation)) is not None:
        return [evacuated]
    if host.public.busy_with != operation.id:
        return ()
    return [HOSTS.update(host, replace(host.public, busy_with=""))]


service = Service(
    name=Owner.INVENTORY,
    open=open_inventory,
    config=InventoryConfig,
    parts=[
        clusters.part,
        hosts.part,
        maintenance.part,
        upgrading.part,
        power_saving.part,
        dead_parts.part,
        enrolment.part,
        accounts.part,
        readers.part,
        vms.part,
        starting.part,
        many_starts.part,
        protection.part,
        stopping.part,
        devices.part,
        snapshots.part,
        migration.part,
        host_facts.part,
        io_errors.part,
    ],
    report=HOST_REPORTED,
    order_finished=INVENTORY_ORDER_FINISHED,
    order_progressed=INVENTORY_ORDER_PROGRESSED,
    release=release,
    on_death=bury,
    reconcile=reconcile,
    reconcile_all=reconcile_all,
    on_follow=on_follow,
    on_gap=dead_parts.list_again,
)
