"""The table of snapshots."""

from __future__ import annotations

from typing import Any

from volery.contracts.snapshot import SNAPSHOT_CHANGED, SNAPSHOT_DELETED, Snapshot
from volery.runtime.tables import Nothing, Row, Table

SNAPSHOTS: Table[Snapshot, Nothing] = Table(
    "snapshot",
    Snapshot,
    Nothing,
    columns={"name": "name", "vm_id": "vm_id", "status": "status"},
    changed=SNAPSHOT_CHANGED,
    deleted=SNAPSHOT_DELETED,
)


async def of_vm(pool: Any, vm_id: str) -> list[Row[Snapshot, Nothing]]:
    return await SNAPSHOTS.where(pool, "vm_id = $1", vm_id)
