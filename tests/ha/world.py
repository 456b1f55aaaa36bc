"""Hosts that beat on the real bus, an inventory that takes restarts, and ha with short times."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec.structs import replace as with_fields
from nats.aio.client import Client

from services.ha.config import HaConfig
from services.ha.service import service as declared
from tests.support.speaker import Speaker
from volery.contracts.base import Owner, encode, fill
from volery.contracts.cluster import GET_CLUSTER, Cluster, GetById
from volery.contracts.errors import Refused, conflict, not_found
from volery.contracts.host import LIST_HOSTS, Host, HostStatus
from volery.contracts.ids import new_id
from volery.contracts.liveness import GET_LIVENESS, HostLiveness
from volery.contracts.metrics import BEAT_SUBJECT, Beat
from volery.contracts.operation import Operation, OperationState
from volery.contracts.vm import (
    LIST_VMS,
    RESTART_VM,
    DesiredState,
    HighAvailability,
    RestartVm,
    Vm,
    VmStatus,
)
from volery.runtime.bus import Bus, Caller
from volery.runtime.programs import Settings
from volery.runtime.run import OperationPrivate, Run
from volery.runtime.service import Service
from volery.runtime.tables import commit

NOW = datetime.now(UTC)
CLUSTER_ID = new_id()

SHORT = {
    "VOLERY_HA_SUSPECT_SECONDS": "0.6",
    "VOLERY_HA_DISCONNECT_SECONDS": "0.2",
    "VOLERY_HA_SILENCE_SECONDS": "1.5",
    "VOLERY_HA_SETTLE_SECONDS": "0.3",
    "VOLERY_HA_STORM_HOLD_SECONDS": "2",
    "VOLERY_HA_RESTART_FIRST_DELAY_SECONDS": "0.3",
    "VOLERY_HA_RESTART_LONGEST_DELAY_SECONDS": "0.6",
    "VOLERY_HA_RESTARTS_AT_MOST": "4",
    "VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": "2.5",
    "VOLERY_HA_START_HOLD_SECONDS": "0.5",
    "VOLERY_HA_OFF_RETRY_SECONDS": "3",
    "VOLERY_HA_ON_WAIT_SECONDS": "1",
    "VOLERY_HA_TRY_PEERS_SECONDS": "0.5",
    "VOLERY_HA_READ_LEASE_SECONDS": "0.5",
    "VOLERY_HA_LEASE_AGAIN_SECONDS": "0.5",
}
"""A fifth of the real times: a beat is still several times shorter than the first limit."""
BEAT_SECONDS = 0.1

CLUSTER = Cluster(
    id=CLUSTER_ID, revision=1, created_at=NOW, updated_at=NOW, name="Default", data_center_id="dc"
)


class Hurried(HaConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Without the least silence that a real installation has."""

    def __post_init__(self) -> None:
        return


def ha() -> Service:
    return dataclasses.replace(declared, config=Hurried)


def hurried(configured: Settings, **more: str) -> Settings:
    return dataclasses.replace(configured, environ=SHORT | more)


def host(name: str, **fields: Any) -> Host:
    made = {
        "id": new_id(),
        "revision": 1,
        "created_at": NOW,
        "updated_at": NOW,
        "name": name,
        "cluster_id": CLUSTER_ID,
        "data_center_id": "dc",
        "status": HostStatus.UP,
    }
    return Host(**(made | fields))


def vm(**fields: Any) -> Vm:
    made = {
        "id": new_id(),
        "revision": 1,
        "created_at": NOW,
        "updated_at": NOW,
        "name": "web",
        "cluster_id": CLUSTER_ID,
        "data_center_id": "dc",
        "status": VmStatus.UP,
        "desired": DesiredState.UP,
        "epoch": 1,
        "high_availability": HighAvailability(enabled=True),
    }
    return Vm(**(made | fields))


@dataclass
class Heart:
    """An agent, as far as ha hears one."""

    client: Client
    host_id: str
    boot_id: str = "boot-1"
    generation: str = "journal-1"
    seq: int = 0
    leaving: bool = False
    task: asyncio.Task[None] | None = None

    async def beat(self) -> None:
        self.seq += 1
        beat = Beat(
            host_id=self.host_id,
            generation=self.generation,
            boot_id=self.boot_id,
            beat_seq=self.seq,
            clock_ms=0,
            leaving=self.leaving,
        )
        await self.client.publish(fill(BEAT_SUBJECT, beat), encode(beat))

    async def _beat_on(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(BEAT_SECONDS)

    def start(self) -> None:
        self.task = asyncio.create_task(self._beat_on())

    def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None


@asynccontextmanager
async def hearts(client: Client, *hosts: Host) -> AsyncIterator[list[Heart]]:
    beating = [Heart(client, h.id) for h in hosts]
    for heart in beating:
        heart.start()
    try:
        yield beating
    finally:
        for heart in beating:
            heart.stop()


async def becomes(bus: Bus, host_id: str, state: str, seconds: float = 8.0) -> HostLiveness:
    """Waits for a state. Fails after the deadline, with what it is instead."""
    end = time.monotonic() + seconds
    found: HostLiveness | None = None
    while time.monotonic() < end:
        try:
            found = await bus.ask(GET_LIVENESS, GetById(id=host_id))
        except Refused:
            found = None
        if found is not None and found.state == state:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"not {state} within {seconds} s: {found}")


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 8.0) -> Any:
    end = time.monotonic() + seconds
    while True:
        value = await condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.02)


@dataclass
class Inventory(Speaker):
    """Says VMs and hosts, and takes requests to restart."""

    owner: Owner = Owner.INVENTORY
    asked: list[tuple[RestartVm, str, float]] = field(default_factory=list)
    refusal: Refused | None = None
    ends_with: Refused | None = None
    """How every restart fails that is taken."""
    end: asyncio.Event | None = None
    """Restarts go on until it is set, and fail (by `ends_with`, if that is said)."""

    def __post_init__(self) -> None:
        self.lists = [(LIST_HOSTS, Host), (LIST_VMS, Vm)]
        self.answers = [(RESTART_VM, self._restart), (GET_CLUSTER, self._cluster)]
        self.runs = [("vm.restart", self._run)]
        self.knows(CLUSTER)

    async def _cluster(self, _: Speaker, ask: GetById, caller: Caller) -> Cluster:
        found = self.objects.get(ask.id)
        if not isinstance(found, Cluster):
            raise not_found("cluster", ask.id)
        return found

    async def _restart(self, _: Speaker, ask: RestartVm, caller: Caller) -> Operation:
        self.asked.append((ask, caller.request_id, time.monotonic()))
        if self.refusal is not None:
            raise self.refusal
        if self.end is not None:
            return await self._begun(ask, caller)
        now = datetime.now(UTC)
        operation = Operation(
            id=f"inventory-{new_id()}",
            revision=1,
            created_at=now,
            updated_at=now,
            kind="vm.restart",
            object_kind="vm",
            object_id=ask.vm_id,
            deadline=now + timedelta(seconds=60),
        )
        if self.ends_with is not None:
            problem = self.ends_with.problem()
            operation = with_fields(operation, state=OperationState.FAILED, problem=problem, ended_at=now)
            await self._keep(operation)
        return operation

    async def _begun(self, ask: RestartVm, caller: Caller) -> Operation:
        assert self.core is not None
        op, begun = self.core.operations.begin(
            "vm.restart",
            object_kind="vm",
            object_id=ask.vm_id,
            object_name=ask.vm_id,
            question=ask,
            caller=caller,
        )
        await self.core.commit(begun, caller=caller, answer=op)
        return op

    async def _run(self, _: Speaker, run: Run) -> None:
        assert self.end is not None
        await self.end.wait()
        raise self.ends_with or conflict("its disk is gone")

    async def _keep(self, operation: Operation) -> None:
        """So that it can be asked for, as from any service."""
        assert self.core is not None
        await commit(self.core.pool, [self.core.operations.table.insert(operation, OperationPrivate())])
