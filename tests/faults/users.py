"""What users do during a storm, through REST alone; and what they were promised."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.faults.asking import Patient
from volery.client import api
from volery.client.request import Request, body_of
from volery.client.transport import ProblemError
from volery.contracts.domain import ImageFormat
from volery.contracts.operation import Operation
from volery.contracts.storage import ContentType, CreateDisk
from volery.contracts.vm import CreateVm, NewDisk, NewNic, Vm

MIB = 1024 * 1024
VMS_EACH = 3
DISKS_EACH = 2


class Broken(AssertionError):
    """An answer that must never be given."""


@dataclass
class Promises:
    """What REST acknowledged. None of it may be lost."""

    operations: dict[str, str] = field(default_factory=dict)
    """Id → what it does."""
    edits: list[tuple[str, int, str]] = field(default_factory=list)
    """Object, the revision that the edit made, the description that it wrote."""
    created: dict[str, str] = field(default_factory=dict)
    """Operation that makes an object → the object."""
    deleted: dict[str, str] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Place:
    """Where the users work."""

    cluster_id: str
    domain_id: str
    network_id: str = ""
    """"" is a place without networks and migrations."""
    image_id: str = ""
    """Copied by VMs that have a guest; "" has none."""


@dataclass
class User:
    """One user with a few VMs and disks. `rng` is theirs alone, so that a seed replays their choices."""

    number: int
    rng: random.Random
    rest: Patient
    place: Place
    promises: Promises
    vms: list[str] = field(default_factory=list)
    disks: list[str] = field(default_factory=list)
    iso: str = ""
    turns: int = 0

    async def work(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self.turns += 1
            action = self._choose()
            vm_id = self.rng.choice(self.vms) if self.vms else ""
            try:
                operation = await action(self, vm_id)
            except ProblemError as problem:
                self._refused(action.__name__, problem)
                await asyncio.sleep(self.rng.uniform(0, 0.3))
                continue
            if operation is not None:
                await self._follow(action.__name__, operation)
            await asyncio.sleep(self.rng.uniform(0, 0.3))

    def _choose(self) -> Action:
        if len(self.vms) < VMS_EACH:
            return create_vm
        if len(self.disks) < DISKS_EACH or not self.iso:
            return create_disk
        table = (*ACTIONS, *(LAB_ACTIONS if self.place.network_id else ()))
        return self.rng.choices([a for _, a in table], weights=[w for w, _ in table])[0]

    def _refused(self, what: str, problem: ProblemError) -> None:
        self.promises.refusals[f"{what} {problem.status}"] += 1
        if problem.status >= 500 or problem.status in (400, 401, 403, 422):
            raise Broken(f"{what}: {problem.status} {problem.problem}")
        if problem.status == 404:  # its creation was cancelled or failed
            self.vms = [i for i in self.vms if i not in str(problem.problem)]
            self.disks = [i for i in self.disks if i not in str(problem.problem)]
            self.iso = "" if self.iso and self.iso in str(problem.problem) else self.iso

    async def _follow(self, what: str, operation: Operation) -> None:
        self.promises.operations[operation.id] = f"{what} {operation.object_id}"
        if self.rng.random() < 0.08:
            await self._cancel(operation)
        if self.rng.random() < 0.25:
            await self.rest.ended(operation)

    async def _cancel(self, operation: Operation) -> None:
        try:
            await self.rest.send(Request("POST", f"operations/{operation.id}/cancel", Operation, b"{}"))
        except ProblemError as problem:
            self.promises.refusals[f"cancel {problem.status}"] += 1

    async def begin(self, request: Request[Operation]) -> Operation:
        """An operation; asked for twice now and then, which must not begin a second one."""
        key = str(uuid.uuid4())
        first = await self.rest.send(request, key)
        if self.rng.random() < 0.1:
            again = await self.rest.send(request, key)
            if again.id != first.id:
                raise Broken(f"{request.path} under one key began {first.id} and {again.id}")
        return first

    async def vm(self, vm_id: str) -> Vm:
        return await self.rest.send(api.VMS.get(vm_id))

    def name(self, prefix: str) -> str:
        return f"{prefix}{self.number}-{self.turns}"


Action = Callable[[User, str], Awaitable[Operation | None]]


async def create_vm(user: User, _: str) -> Operation:
    place = user.place
    disks: tuple[NewDisk, ...] = ()
    if user.rng.random() < 0.6:
        disks = (NewDisk(storage_domain_id=place.domain_id, size_bytes=4 * MIB),)
    if place.image_id and not user.vms:
        disks = (NewDisk(storage_domain_id=place.domain_id, copy_of=place.image_id),)
    nics = (NewNic(network_id=place.network_id),) if place.network_id else ()
    ask = CreateVm(
        name=user.name("u"),
        cluster_id=place.cluster_id,
        memory_bytes=(96 if place.image_id and not user.vms else 32) * MIB,
        disks=disks,
        nics=nics,
        start=user.rng.random() < (0.6 if place.network_id else 0.3),
    )
    operation = await user.begin(api.VMS.create(ask, Operation))
    user.vms.append(operation.object_id)
    user.promises.created[operation.id] = operation.object_id
    return operation


async def create_disk(user: User, _: str) -> Operation:
    is_iso = not user.iso
    ask = CreateDisk(
        name=user.name("iso" if is_iso else "d"),
        storage_domain_id=user.place.domain_id,
        size_bytes=1 * MIB,
        content=ContentType.ISO if is_iso else ContentType.DATA,
        format=ImageFormat.RAW if is_iso else ImageFormat.QCOW2,
        read_only=is_iso,
    )
    operation = await user.begin(api.DISKS.create(ask, Operation))
    if is_iso:
        user.iso = operation.object_id
    else:
        user.disks.append(operation.object_id)
    user.promises.created[operation.id] = operation.object_id
    return operation


async def start(user: User, vm_id: str) -> Operation:
    return await user.begin(api.VMS.act(vm_id, "start", Operation))


async def stop(user: User, vm_id: str) -> Operation:
    return await user.begin(api.VMS.act(vm_id, "stop", Operation, {"force": True}))


async def act(user: User, vm_id: str) -> Operation:
    verb = user.rng.choice(("reset", "pause", "unpause"))
    return await user.begin(api.VMS.act(vm_id, verb, Operation))


async def delete_vm(user: User, vm_id: str) -> Operation:
    operation = await user.begin(api.VMS.delete(vm_id, Operation))
    user.vms.remove(vm_id)
    user.promises.deleted[operation.id] = vm_id
    return operation


async def edit_vm(user: User, vm_id: str) -> None:
    """With If-Match, at times with a stale one: what was not seen is never overwritten."""
    seen = await user.vm(vm_id)
    await _edit(user, api.VMS.update, vm_id, seen.revision)


async def edit_disk(user: User, _: str) -> None:
    disk_id = user.rng.choice(user.disks)
    seen = await _disk(user, disk_id)
    if seen is not None:
        await _edit(user, api.DISKS.update, disk_id, seen)


async def _disk(user: User, disk_id: str) -> int | None:
    """The revision of one's own disk; one that isn't there any more is forgotten."""
    try:
        return (await user.rest.send(api.DISKS.get(disk_id))).revision
    except ProblemError as problem:
        if problem.status != 404:
            raise
        user.disks.remove(disk_id)
        return None


async def _edit(user: User, update: Callable[..., Request[Any]], object_id: str, revision: int) -> None:
    stale = user.rng.random() < 0.15 and revision > 1
    seen = revision - 1 if stale else revision
    text = f"edit {user.name('e')}"
    answer = await user.rest.send(
        update(object_id, {"description": text, "tags": [f"t{user.turns}"]}, if_revision=seen)
    )
    if stale or answer.revision != seen + 1 or answer.description != text:
        raise Broken(f"an edit of revision {seen} of {object_id} made {answer.revision} of it")
    user.promises.edits.append((object_id, answer.revision, text))


async def attach_disk(user: User, vm_id: str) -> Operation:
    body = body_of({"disk_id": user.rng.choice(user.disks)})
    return await user.begin(Request("POST", f"vms/{vm_id}/disks", Operation, body))


async def detach_disk(user: User, vm_id: str) -> Operation | None:
    """Only the user's own: the VM's first disk is deleted with it."""
    found = [disk.disk_id for disk in (await user.vm(vm_id)).disks if disk.disk_id in user.disks]
    if not found:
        return None
    return await user.begin(Request("DELETE", f"vms/{vm_id}/disks/{user.rng.choice(found)}", Operation))


async def resize_disk(user: User, vm_id: str) -> Operation | None:
    disks = (await user.vm(vm_id)).disks
    if not disks:
        return None
    disk = user.rng.choice(disks)
    body = {"size_bytes": disk.size_bytes + MIB}
    return await user.begin(api.DISKS.act(disk.disk_id, "resize", Operation, body))


async def delete_disk(user: User, _: str) -> Operation:
    disk_id = user.rng.choice(user.disks)
    operation = await user.begin(api.DISKS.delete(disk_id, Operation))
    user.disks.remove(disk_id)
    user.promises.deleted[operation.id] = disk_id
    return operation


async def change_cd(user: User, vm_id: str) -> Operation:
    medium = user.rng.choice((user.iso, ""))
    body = body_of({"disk_id": medium})
    return await user.begin(Request("PUT", f"vms/{vm_id}/cdroms/sda", Operation, body))


async def _movable(user: User, vm_id: str) -> str:
    """One of the user's VMs that could be moved now, if any."""
    for ident in user.rng.sample(user.vms, len(user.vms)):
        if ident != vm_id and "migrate" in (await user.vm(ident)).allowed_actions:
            return ident
    return vm_id


async def migrate(user: User, vm_id: str) -> Operation:
    vm_id = await _movable(user, vm_id)
    return await user.begin(api.VMS.act(vm_id, "migrate", Operation, {"timeout_seconds": 60}))


async def migrate_and_cancel(user: User, vm_id: str) -> Operation:
    vm_id = await _movable(user, vm_id)
    body = {"bandwidth_mib_per_second": 1, "auto_converge": False, "timeout_seconds": 60}
    operation = await user.begin(api.VMS.act(vm_id, "migrate", Operation, body))
    user.promises.operations[operation.id] = f"migrate {vm_id}"
    await asyncio.sleep(user.rng.uniform(0, 2.0))
    await user._cancel(operation)
    return operation


async def plug_nic(user: User, vm_id: str) -> Operation | None:
    if len((await user.vm(vm_id)).nics) >= 3:
        return None
    body = body_of({"nic": {"network_id": user.place.network_id}})
    return await user.begin(Request("POST", f"vms/{vm_id}/nics", Operation, body))


async def unplug_nic(user: User, vm_id: str) -> Operation | None:
    nics = (await user.vm(vm_id)).nics
    if not nics:
        return None
    return await user.begin(Request("DELETE", f"vms/{vm_id}/nics/{user.rng.choice(nics).id}", Operation))


async def toggle_link(user: User, vm_id: str) -> Operation | None:
    nics = (await user.vm(vm_id)).nics
    if not nics:
        return None
    nic = user.rng.choice(nics)
    body = body_of({"link_up": not nic.link_up})
    return await user.begin(Request("PATCH", f"vms/{vm_id}/nics/{nic.id}", Operation, body))


ACTIONS: tuple[tuple[int, Action], ...] = (
    (6, start),
    (4, stop),
    (3, act),
    (2, delete_vm),
    (5, edit_vm),
    (2, edit_disk),
    (4, attach_disk),
    (3, detach_disk),
    (3, resize_disk),
    (1, delete_disk),
    (4, change_cd),
)
LAB_ACTIONS: tuple[tuple[int, Action], ...] = (
    (8, migrate),
    (3, migrate_and_cancel),
    (3, plug_nic),
    (3, unplug_nic),
    (3, toggle_link),
)
