"""The table of what storage answers, hears and runs."""

from __future__ import annotations

from collections.abc import Sequence

from services.storage import (
    connections,
    dead_leases,
    discovery,
    disk_work,
    disks,
    domains,
    losses,
    merges,
    projection,
    snapshots,
    transfers,
    uses,
    vm_leases,
)
from services.storage.config import StorageConfig
from services.storage.reconcile import reconcile, reconcile_all
from services.storage.storage import Storage, open_storage
from volery.contracts.agent import STORAGE_ORDER_FINISHED, STORAGE_ORDER_PROGRESSED, STORAGE_REPORTED
from volery.contracts.base import Owner
from volery.contracts.operation import Operation
from volery.runtime.service import Service
from volery.runtime.tables import Change

RELEASES = {
    "storage_domain": domains.release,
    "disk": disk_work.release,
    "transfer": transfers.release,
    "snapshot": snapshots.release,
}
"""What an operation is about → how its object is freed when it ended."""


async def release(svc: Storage, operation: Operation) -> Sequence[Change]:
    found = RELEASES.get(operation.object_kind)
    return () if found is None else await found(svc, operation)


def make_service() -> Service:
    return Service(
        Owner.STORAGE,
        open_storage,
        StorageConfig,
        [
            domains.part,
            connections.part,
            losses.part,
            disks.part,
            disk_work.part,
            uses.part,
            snapshots.part,
            merges.part,
            transfers.part,
            discovery.part,
            projection.part,
            vm_leases.part,
        ],
        report=STORAGE_REPORTED,
        order_finished=STORAGE_ORDER_FINISHED,
        order_progressed=STORAGE_ORDER_PROGRESSED,
        release=release,
        reconcile=reconcile,
        reconcile_all=reconcile_all,
        on_death=dead_leases.died,
        on_gap=projection.list_again,
    )


service = make_service()
