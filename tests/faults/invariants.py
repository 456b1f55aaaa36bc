"""What must hold after a storm: REST, PostgreSQL, libvirt and the event history agree, and nothing is left over."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import libvirt

from tests.faults.asking import Patient
from tests.faults.history import Witness, history, objects
from tests.faults.hypervisors import Domain, domains_on, taps_in
from tests.faults.users import Promises
from volery.client import api
from volery.client.request import Resource
from volery.contracts.base import Owner
from volery.contracts.operation import ENDED, OperationState
from volery.contracts.storage import ContentType
from volery.contracts.vm import Vm, VmStatus
from volery.runtime.bus import Bus

SETTLE_SECONDS = 240.0
AGREE_SECONDS = 90.0
RUNNING = (VmStatus.UP, VmStatus.PAUSED)
NOUNS: tuple[tuple[Resource[Any], Owner, str], ...] = (
    (api.HOSTS, Owner.INVENTORY, "host"),
    (api.VMS, Owner.INVENTORY, "vm"),
    (api.DISKS, Owner.STORAGE, "disk"),
    (api.STORAGE_DOMAINS, Owner.STORAGE, "storage_domain"),
    (api.NETWORKS, Owner.NETWORK, "network"),
    (api.CLAIMS, Owner.SCHEDULER, "claim"),
)
"""Nouns that REST lists, with their owner and table."""
IN_EVENTS = {"storage_domain": "domain"}
ORDERING = (Owner.INVENTORY, Owner.STORAGE, Owner.NETWORK)


@dataclass(frozen=True)
class Machine:
    """A host as the test reaches it, past Volery."""

    host_id: str
    uri: Callable[[], str]
    enter: Callable[[], Sequence[str]] | None = None
    """Runs a command on it; None where hosts share the machine's network."""


@dataclass
class Invariants:
    """Everything that is looked at. `check` raises AssertionError with what doesn't hold."""

    rest: Patient
    bus: Bus
    dsn: str
    """PostgreSQL, as its superuser, database volery."""
    machines: Sequence[Machine]
    files: Path
    """The shared storage domain's directory."""
    promises: Promises
    witness: Witness | None = None
    failed: Counter[str] = field(default_factory=Counter)
    """How operations ended, for the summary."""

    async def check(self) -> None:
        await self._settle()
        for agree in (
            self._vms_agree,
            self._claims_agree,
            self._disks_agree,
            self._nics_agree,
            self._database_agrees,
            self._history_agrees,
        ):
            await self._eventually(agree)
        await self._promises_are_kept()

    async def _eventually(self, look: Callable[[], Awaitable[str]]) -> None:
        """The look's complaint must become empty."""
        until = time.monotonic() + AGREE_SECONDS
        while complaint := await look():
            if time.monotonic() > until:
                raise AssertionError(f"{look.__name__}: {complaint}")
            await asyncio.sleep(0.5)

    async def _settle(self) -> None:
        """Every operation ends, also those that nobody waited for."""
        until = time.monotonic() + SETTLE_SECONDS
        while True:
            operations = await self.rest.operations()
            waiting = [op for op in operations if op.state not in ENDED]
            if not waiting:
                break
            if time.monotonic() > until:
                told = [f"{o.kind} {o.id} {o.state} {[s.name for s in o.steps]}" for o in waiting]
                raise AssertionError(f"operations that don't end: {told}")
            await asyncio.sleep(0.5)
        for op in operations:
            reason = (
                f" ({op.problem.message[:90]})" if op.problem and op.state is OperationState.FAILED else ""
            )
            self.failed[f"{op.kind} {op.state}{reason}"] += 1

    # --- libvirt ------------------------------------------------------------------------------------

    async def _domains(self) -> list[Domain]:
        found: list[Domain] = []
        for machine in self.machines:
            found += await asyncio.to_thread(domains_on, machine.host_id, machine.uri())
        running = Counter(domain.vm_id for domain in found if domain.running)
        if twice := [vm_id for vm_id, count in running.items() if count > 1]:
            raise AssertionError(f"VMs that run on two hosts: {twice}")
        return found

    async def _vms(self) -> list[Vm]:
        return [vm for vm in await self.rest.everything(api.VMS) if not vm.external]

    async def _vms_agree(self) -> str:
        """What REST shows is what libvirt has, under the same epoch and with the same devices."""
        try:
            domains = await self._domains()
        except libvirt.libvirtError as error:
            return f"libvirt: {error}"
        places: dict[str, list[Domain]] = defaultdict(list)
        for domain in domains:
            places[domain.vm_id].append(domain)
        for vm in await self._vms():
            if complaint := _differs(vm, places.pop(vm.id, [])):
                return f"VM {vm.name} {vm.id}: {complaint}"
        return f"nobody knows the domains {dict(places)}" if places else ""

    async def _nics_agree(self) -> str:
        """Every address is one NIC's, every guest's device in a host's network is one running NIC's."""
        vms = await self._vms()
        shown = {nic.id: (vm.id, nic.mac) for vm in vms for nic in vm.nics}
        twice = [mac for mac, count in Counter(mac for _, mac in shown.values()).items() if count > 1]
        if twice:
            raise AssertionError(f"addresses given twice: {twice}")
        rows = await self._rows("select id, vm_id, address from network.nic")
        held = {row["id"]: (row["vm_id"], _mac(row["address"])) for row in rows}
        if held != shown:
            return f"addresses held {_without(held, shown)}, shown {_without(shown, held)}"
        domains = await self._domains()
        for machine in self.machines:
            if machine.enter is None:
                continue
            taps = await asyncio.to_thread(taps_in, machine.enter())
            own = [d.taps for d in domains if d.host_id == machine.host_id]
            wanted = {tap: bridge for one in own for tap, bridge in one.items()}
            if taps != wanted:
                return f"host {machine.host_id} has the devices {taps}, its domains {wanted}"
        return ""

    # --- storage and scheduler -----------------------------------------------------------------------

    async def _claims_agree(self) -> str:
        claims = await self.rest.everything(api.CLAIMS)
        vms = await self.rest.everything(api.VMS)  # strangers take capacity, too
        wanted = sorted((vm.id, vm.host_id, vm.epoch) for vm in vms if vm.status in RUNNING)
        held = sorted((claim.vm_id, claim.host_id, claim.epoch) for claim in claims)
        return f"claims {held}, placed {wanted}" if held != wanted else ""

    async def _disks_agree(self) -> str:
        """Every disk has its file, every file its disk, every attachment its VM."""
        disks = await self.rest.everything(api.DISKS)
        files = {
            path.stem
            for path in self.files.rglob("*")
            if path.suffix in (".qcow2", ".raw", ".iso") and "staging" not in path.parts
        }
        known = {disk.id for disk in disks}
        if files != known:
            return f"disks without a file {known - files}, files without a disk {files - known}"
        used = {(use.vm_id, disk.id) for disk in disks for use in disk.uses}
        attached = {(vm.id, disk.disk_id) for vm in await self._vms() for disk in vm.disks}
        if used != attached:
            return f"used but not attached {used - attached}, attached but not used {attached - used}"
        if locked := [disk.id for disk in disks if disk.busy_with or disk.status != "ok"]:
            return f"disks that are busy or not ok: {locked}"
        wanted = {disk.id for disk in disks if disk.content is ContentType.DATA}
        made = set(self.promises.created.values())
        orphans = [disk_id for disk_id in wanted if disk_id not in made | {d for _, d in used}]
        return f"disks of no VM and no user: {orphans}" if orphans else ""

    # --- PostgreSQL and history ------------------------------------------------------------------------

    async def _rows(self, sql: str) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self.dsn)
        try:
            return list(await connection.fetch(sql))
        finally:
            await connection.close()

    async def _database_agrees(self) -> str:
        """What REST answers is what is committed; no order is open, nothing waits to be told."""
        for resource, owner, table in NOUNS:
            rows = await self._rows(f"select id, revision from {owner}.{table}")
            stored = {row["id"]: row["revision"] for row in rows}
            shown = {item.id: item.revision for item in await self.rest.everything(resource)}
            if stored != shown:
                return f"{table}: REST {_without(shown, stored)}, PostgreSQL {_without(stored, shown)}"
        for owner in ORDERING:
            orders = await self._rows(f"select kind, state from {owner}.host_order where state <> 'finished'")
            if orders:
                return f"orders of {owner} still open: {[tuple(row) for row in orders]}"
        for owner in Owner:
            if count := (await self._rows(f"select count(*) from {owner}.outbox"))[0][0]:
                return f"{count} facts of {owner} are not in its log"
        placed = await self._rows("select vm_id, epoch, host_id, state from inventory.placement")
        wanted = {(vm.id, vm.epoch, vm.host_id) for vm in await self._vms()}
        found = {(row["vm_id"], row["epoch"], row["host_id"]) for row in placed if row["epoch"]}
        unsettled = [row["vm_id"] for row in placed if row["state"] not in ("none", "running")]
        strange = found - wanted
        return f"placements {strange} that no VM shows, {unsettled} unsettled" if strange or unsettled else ""

    async def _history_agrees(self) -> str:
        """The log is in the stream, whole; every revision was told once and in order; the last one is what REST shows."""
        last: dict[Owner, int] = {}
        for owner in Owner:
            events = await history(self.bus, owner)
            (head,) = await self._rows(f"select position from {owner}.log_head")
            positions = [position for position, _ in events]
            if positions != list(range(1, head["position"] + 1)):
                return f"{owner}: the log ends at {head['position']}, the stream has {len(positions)} events"
            last[owner] = head["position"]
            told = objects(events)
            self._edits_were_told(told)
            for resource, of, table in NOUNS:
                if of is not owner:
                    continue
                noun = IN_EVENTS.get(table, table)
                shown = {item.id: item.revision for item in await self.rest.everything(resource)}
                ended = {
                    key.partition("/")[2]: found.revisions[-1]
                    for key, found in told.items()
                    if key.startswith(f"{noun}/") and not found.deleted
                }
                if shown != ended:
                    return f"{noun}: REST {_without(shown, ended)}, history {_without(ended, shown)}"
        if self.witness is not None:
            await self.witness.saw_all(last)
        return ""

    def _edits_were_told(self, told: dict[str, Any]) -> None:
        newest: dict[str, tuple[int, str]] = {}
        for object_id, revision, text in self.promises.edits:
            newest[object_id] = max(newest.get(object_id, (0, "")), (revision, text))
        for key, found in told.items():
            revision, text = newest.get(key.partition("/")[2], (0, ""))
            if revision and (found.revisions[-1] < revision or found.document["description"] != text):
                raise AssertionError(f"{key}: the acknowledged edit {text!r} (revision {revision}) is lost")

    # --- promises ------------------------------------------------------------------------------------

    async def _promises_are_kept(self) -> None:
        """What was acknowledged is there, and came to what its operation says."""
        operations = {op.id: op for op in await self.rest.operations()}
        if lost := [told for ident, told in self.promises.operations.items() if ident not in operations]:
            raise AssertionError(f"acknowledged operations are lost: {lost}")
        there = {item.id for item in await self.rest.everything(api.VMS)}
        there |= {item.id for item in await self.rest.everything(api.DISKS)}
        done = {ident for ident, op in operations.items() if op.state is OperationState.SUCCEEDED}
        gone = {of for ident, of in self.promises.deleted.items() if ident in done}
        made = {of for ident, of in self.promises.created.items() if ident in done}
        ended = {op.object_id for op in operations.values() if op.kind in ("vm.delete", "disk.delete")}
        if undead := gone & there:
            raise AssertionError(f"deleted and still there: {undead}")
        if missing := made - ended - there:
            raise AssertionError(f"created and not there: {missing}")


def _without(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in first.items() if second.get(key) != value}


def _mac(address: int) -> str:
    return ":".join(f"{byte:02x}" for byte in address.to_bytes(6, "big"))


def _differs(vm: Vm, places: Sequence[Domain]) -> str:
    """How a VM isn't what libvirt has; "" when it is."""
    if len(places) > 1:
        return f"has domains on several hosts: {places}"
    domain = places[0] if places else None
    if vm.busy_with:
        return f"still busy with {vm.busy_with}"
    if vm.status is VmStatus.DOWN:
        return f"down, but runs on {domain.host_id}" if domain else ""
    if vm.status not in RUNNING:
        return f"is {vm.status}"
    if domain is None:
        return f"is {vm.status} on {vm.host_id}, libvirt has it nowhere"
    shown = (vm.host_id, vm.epoch, vm.status is VmStatus.PAUSED)
    real = (domain.host_id, domain.epoch, domain.paused)
    if shown != real:
        return f"host, epoch, paused are {shown}, libvirt says {real}"
    disks = frozenset(disk.disk_id for disk in vm.disks)
    if disks != domain.disks - _drives(vm):
        return f"has the disks {sorted(disks)}, libvirt {sorted(domain.disks)}"
    nics = {nic.id: (nic.mac, nic.link_up) for nic in vm.nics}
    return f"has the NICs {nics}, libvirt {dict(domain.nics)}" if nics != domain.nics else ""


def _drives(vm: Vm) -> frozenset[str]:
    return frozenset(f"cdrom-{cdrom.target}" for cdrom in vm.cdroms)
