"""Every SQL statement of ha."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TypeAlias

import asyncpg

from services.ha.policies.restart_order import WatchedVm
from volery.contracts.base import Message
from volery.contracts.liveness import (
    LIVENESS_CHANGED,
    LIVENESS_DELETED,
    RESTART_CHANGED,
    RESTART_DELETED,
    HostLiveness,
    VmRestart,
)
from volery.contracts.vm import Vm
from volery.runtime.tables import Change, Table

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


class LivenessPrivate(Message):
    admitted_generation: str = ""
    """The journal of the agent that inventory admitted; "" is any."""


class RestartPrivate(Message):
    attempts: tuple[datetime, ...] = ()
    """When restarts were asked for, oldest first; only those that still count."""
    pending: str = ""
    """The request id of an attempt whose answer isn't known yet."""
    epoch: int = 0
    """The placement that crashed."""


LIVENESS: Table[HostLiveness, LivenessPrivate] = Table(
    "liveness",
    HostLiveness,
    LivenessPrivate,
    columns={"host_name": "host_name", "cluster_id": "cluster_id", "state": "state"},
    changed=LIVENESS_CHANGED,
    deleted=LIVENESS_DELETED,
    noun="host",
)

RESTARTS: Table[VmRestart, RestartPrivate] = Table(
    "restart",
    VmRestart,
    RestartPrivate,
    columns={"vm_id": "vm_id", "vm_name": "vm_name", "gave_up": "gave_up"},
    changed=RESTART_CHANGED,
    deleted=RESTART_DELETED,
)

_VM = "id, name, epoch, status, desired, reason, host_id, enabled, priority, busy"


def saw_vm(vm: Vm) -> Change:
    """Facts and lists may come twice: a revision already known changes nothing."""
    return Change(
        """insert into vm (id, revision, name, epoch, status, desired, reason, host_id, enabled, priority, busy)
           values ({0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10})
           on conflict (id) do update set revision = excluded.revision, name = excluded.name,
               epoch = excluded.epoch, status = excluded.status, desired = excluded.desired,
               reason = excluded.reason, enabled = excluded.enabled, priority = excluded.priority,
               busy = excluded.busy,
               host_id = case when excluded.host_id = '' then vm.host_id else excluded.host_id end
           where vm.revision < excluded.revision""",
        (
            vm.id,
            vm.revision,
            vm.name,
            vm.epoch,
            str(vm.status),
            str(vm.desired),
            vm.status_reason,
            vm.host_id,
            vm.high_availability.enabled,
            vm.high_availability.priority,
            bool(vm.busy_with),
        ),
        guarded=False,
    )


def vms_gone(vm_ids: Sequence[str]) -> Change:
    return Change("delete from vm where id = any({0}::text[])", (list(vm_ids),), guarded=False)


async def known_vms(pool: Pool) -> set[str]:
    return {r["id"] for r in await pool.fetch("select id from vm")}


async def crashed_vms(pool: Pool) -> list[WatchedVm]:
    """Those that may need a restart, the most important first."""
    records = await pool.fetch(
        f"""select {_VM} from vm where enabled and status = 'down' and desired = 'up' and not busy
            order by priority desc, id"""
    )
    return [WatchedVm(**dict(r)) for r in records]


async def vm(pool: Pool, vm_id: str) -> WatchedVm | None:
    record = await pool.fetchrow(f"select {_VM} from vm where id = $1", vm_id)
    return None if record is None else WatchedVm(**dict(record))
