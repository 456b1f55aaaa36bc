"""One trial: the fault, the wait for the guest's own word from elsewhere, and what the history says about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from lab.host import Host
from lab.scene import Scene, TooLate
from services.ha.config import HaConfig
from services.ha.policies.replay import replay
from trials import ledger
from trials.kinds import Elsewhere, Nothing
from volery.client import api
from volery.client.request import Request
from volery.contracts.base import Entity
from volery.contracts.history import Versions
from volery.contracts.liveness import HostLiveness, LivenessState
from volery.contracts.operation import Operation
from volery.contracts.power import FenceRecord
from volery.contracts.vm import Vm

E = TypeVar("E", bound=Entity)

RECORD_SECONDS = 60.0
"""A guest that was ordered to run must have written within this."""
PAUSE_SECONDS = 5.0
"""A guest that runs writes several times within this, also on a busy machine."""


class Wrong(Exception):
    """A trial that did not end as it must: a law, not a time."""


@dataclass(frozen=True)
class Moment:
    """`at`: seconds after the fault."""

    at: float
    what: str


@dataclass(frozen=True)
class Outcome:
    """Of one trial, in seconds."""

    to_order: float
    """From the fault until the restart was ordered."""
    to_record: float
    """From the order until the guest wrote its first record elsewhere."""
    timeline: tuple[Moment, ...]


@dataclass(frozen=True)
class Actors:
    """The VM that is to survive, one on a healthy host that must notice nothing, and their ledgers' files."""

    survivor: str
    bystander: str
    files: dict[str, Path]

    def boots(self, vm_id: str) -> list[ledger.Boot]:
        return ledger.boots_of(self.files[vm_id])


def elsewhere(scene: Scene, kind: Elsewhere, actors: Actors) -> Outcome:
    """Raises Wrong, TooLate, ledger.Torn."""
    before = Before.of(scene, actors)
    host = scene.host(before.vm.host_id)
    faulted = datetime.now(UTC)
    kind.fault(scene, host)
    try:
        wrote = first_record(actors, len(before.boots), kind.order_seconds + RECORD_SECONDS)
    finally:
        kind.mend(scene, host)
    scene.host_is_up(before.vm.host_id, 150)
    found = Found.of(scene, before, faulted)
    check_elsewhere(scene, kind, actors, before, found, faulted)
    if found.order is None:
        raise Wrong("the guest runs elsewhere, but no restart of it is on record")
    order = found.order.created_at
    return Outcome(
        to_order=(order - faulted).total_seconds(),
        to_record=(wrote - order).total_seconds(),
        timeline=timeline(found, faulted, wrote),
    )


def nothing(scene: Scene, kind: Nothing, actors: Actors) -> Outcome:
    """Raises Wrong, TooLate, ledger.Torn."""
    before = Before.of(scene, actors)
    host = scene.host(before.vm.host_id)
    faulted = datetime.now(UTC)
    kind.fault(scene, host)
    try:
        until = time.monotonic() + kind.seconds
        wrote = last_record(actors)
        while time.monotonic() < until:
            time.sleep(min(PAUSE_SECONDS, kind.seconds))  # the fault lasts; nothing is to come of it
            if last_record(actors) == wrote:
                raise Wrong(f"the guest wrote nothing for {PAUSE_SECONDS:.0f} s")
            wrote = last_record(actors)
    finally:
        kind.mend(scene, host)
    scene.host_is_up(before.vm.host_id, 150)
    found = Found.of(scene, before, faulted)
    must_hold(unharmed(scene, actors, before, found, faulted))
    return Outcome(to_order=0.0, to_record=0.0, timeline=timeline(found, faulted, None))


def last_record(actors: Actors) -> int:
    return actors.boots(actors.survivor)[-1].last


def first_record(actors: Actors, known: int, seconds: float) -> datetime:
    """When a boot of the survivor beyond those known wrote on its disk. Raises TooLate."""
    until = time.monotonic() + seconds
    while len(actors.boots(actors.survivor)) == known:
        if time.monotonic() > until:
            raise TooLate(f"waited {seconds:.0f} s for the guest to write")
        time.sleep(0.02)  # the guest writes four times a second: fine enough for a stopwatch
    return datetime.now(UTC)


@dataclass(frozen=True)
class Before:
    """How things stood."""

    vm: Vm
    bystander: Vm
    boots: list[ledger.Boot]
    bystanders_boots: list[ledger.Boot]

    @classmethod
    def of(cls, scene: Scene, actors: Actors) -> Before:
        """The two on different hosts, up, with nothing under way."""
        vm = settled(scene, actors.survivor)
        bystander = settled(scene, actors.bystander)
        if vm.host_id == bystander.host_id:
            scene.act(bystander.id, "migrate")
            bystander = settled(scene, actors.bystander)
        for vm_id in (vm.id, bystander.id):
            writes(scene, actors, vm_id)
        return cls(vm, bystander, actors.boots(vm.id), actors.boots(bystander.id))


def writes(scene: Scene, actors: Actors, vm_id: str) -> None:
    """Waits until the guest has written: its agent answers before that."""
    scene.wait(lambda: bool(actors.boots(vm_id)), 60, lambda: f"VM {vm_id} to write on its ledger")


def settled(scene: Scene, vm_id: str) -> Vm:
    return scene.until(
        vm_id, lambda vm: vm.status == "up" and vm.guest.agent_connected and not vm.busy_with, 120
    )


@dataclass(frozen=True)
class Found:
    """What is on record since the fault; `liveness` is the host's whole history."""

    liveness: list[tuple[datetime, HostLiveness]]
    vm: list[tuple[datetime, Vm]]
    order: Operation | None
    """The restart of the survivor."""
    records: list[FenceRecord]

    @classmethod
    def of(cls, scene: Scene, before: Before, faulted: datetime) -> Found:
        host_id, vm_id = before.vm.host_id, before.vm.id
        operations = scene.client.list(api.OPERATIONS, filter={"object_id": vm_id})
        starts = sorted(
            (op for op in operations if op.created_at >= faulted and op.kind == "vm.restart"),
            key=lambda op: op.created_at,
        )
        records = scene.client.list(api.FENCE_RECORDS, filter={"host_id": host_id})
        return cls(
            liveness=list(versions(scene, "liveness", host_id, HostLiveness)),
            vm=[(at, vm) for at, vm in versions(scene, "vm", vm_id, Vm) if at >= faulted],
            order=starts[0] if starts else None,
            records=[r for r in records if r.created_at >= faulted],
        )


def versions(scene: Scene, noun: str, object_id: str, kind: type[E]) -> Iterator[tuple[datetime, E]]:
    """All that was ever said about the object, as history kept it."""
    page = ""
    while True:
        query = {"noun": noun, "id": object_id, "limit": "1000", "page": page}
        found = scene.client.send(Request("GET", "history/versions", Versions, query=query))
        for version in found.items:
            yield version.valid_from, msgspec.json.decode(version.doc, type=kind)
        if not (page := found.next):
            return


Must = dict[str, Callable[[], bool]]
"""What must hold, in words, and whether it does."""


def must_hold(must: Must) -> None:
    """Raises Wrong at the first that doesn't."""
    for what, holds in must.items():
        if not holds():
            raise Wrong(f"this doesn't hold: {what}")


def check_elsewhere(
    scene: Scene, kind: Elsewhere, actors: Actors, before: Before, found: Found, faulted: datetime
) -> None:
    """Raises Wrong at the first thing that may not be."""
    now = settled(scene, before.vm.id)
    death, order = proven(found, faulted), found.order
    where = places(scene, now)
    record = next((r for r in found.records if r.requested_by == "service:ha"), None)
    must: Must = {
        f"the proof is {kind.proof}: {death.proof}": lambda: (
            death.proof is not None and death.proof.kind is kind.proof
        ),
        "the proof comes before the order": lambda: (
            order is not None and death.judged_at is not None and death.judged_at < order.created_at
        ),
        f"it runs once, and elsewhere: {where}": lambda: (
            len(where) == 1 and now.host_id != before.vm.host_id and now.epoch > before.vm.epoch
        ),
        "it booted once": lambda: len(actors.boots(now.id)) == len(before.boots) + 1,
        f"ha ordered the host off: {kind.fenced}": lambda: (record is not None) is kind.fenced,
        "the fence has ended": lambda: record is None or record.ended_at is not None,
    }
    must_hold(must | unnoticed(scene, actors, before.bystander, before.bystanders_boots))


def unnoticed(scene: Scene, actors: Actors, before: Vm, boots: list[ledger.Boot]) -> Must:
    """The VM runs as it did, at the same place, in the same boot."""
    now = settled(scene, before.id)
    where = places(scene, now)
    return {
        f"{now.name} was left alone": lambda: (now.epoch, now.host_id) == (before.epoch, before.host_id),
        f"{now.name} runs once: {where}": lambda: len(where) == 1,
        f"{now.name} was never booted anew": lambda: (
            [boot.id for boot in actors.boots(now.id)] == [boot.id for boot in boots]
        ),
        f"{now.name} has one claim": lambda: (
            len(list(scene.client.list(api.CLAIMS, filter={"vm_id": now.id}))) == 1
        ),
    }


def unharmed(scene: Scene, actors: Actors, before: Before, found: Found, faulted: datetime) -> Must:
    """Nobody was restarted, fenced or believed dead."""
    believed = [h for at, h in found.liveness if at >= faulted and h.state is LivenessState.DEAD]
    return {
        **unnoticed(scene, actors, before.vm, before.boots),
        **unnoticed(scene, actors, before.bystander, before.bystanders_boots),
        f"no restart was ordered: {found.order}": lambda: found.order is None,
        f"no host was fenced: {found.records}": lambda: not found.records,
        f"no host was believed dead: {believed}": lambda: not believed,
    }


def places(scene: Scene, vm: Vm) -> list[str]:
    """The hosts that have a QEMU of this VM."""
    return [h.name for h in scene.lab.hosts if h.boot and any(vm.id in line for line in running(h))]


def running(host: Host) -> list[str]:
    return [
        Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        for pid in host.pids("qemu-system-x86")
    ]


def proven(found: Found, faulted: datetime) -> HostLiveness:
    """The judgement that the host is dead, once judging by what is on record has come to the same. Raises Wrong."""
    judged: list[HostLiveness] = []
    for _, liveness in found.liveness:
        if liveness.judged_at and (not judged or liveness.judged_at != judged[-1].judged_at):
            judged.append(liveness)
    again = replay([liveness for _, liveness in found.liveness], HaConfig())
    for told, judgement in zip(judged, again, strict=True):
        if told.state is LivenessState.DEAD and told.judged_at and told.judged_at >= faulted:
            if judgement.state is not LivenessState.DEAD:
                raise Wrong(f"judged again by its recorded evidence the host is {judgement.state}, not dead")
            return told
    raise Wrong("the restart was ordered, but no judgement on record says that the host is dead")


def timeline(found: Found, faulted: datetime, wrote: datetime | None) -> tuple[Moment, ...]:
    """What was announced since the fault, in order; of each object only what changed."""
    moments: list[tuple[datetime, str]] = []
    if wrote is not None:
        moments.append((wrote, "the guest writes from elsewhere"))
    if found.order is not None:
        moments.append((found.order.created_at, "restart ordered"))
        if found.order.ended_at is not None:
            moments.append((found.order.ended_at, f"start {found.order.state}"))
    told = ("", "", "")
    for at, liveness in found.liveness:
        proof = f"{liveness.proof.kind}: {liveness.proof.details}" if liveness.proof else ""
        now = (str(liveness.state), proof if liveness.state is LivenessState.DEAD else "", liveness.fencing)
        if at >= faulted:
            said = [word for word, was in zip(now, told, strict=True) if word and word != was]
            moments += [(at, "host " + "; ".join(said))] if said else []
        told = now
    status = ""
    for at, vm in found.vm:
        if vm.status != status:
            moments.append((at, f"VM {vm.status}"))
        status = vm.status
    moments += [(step.at, f"fence {step.step}") for record in found.records for step in record.steps]
    moments.sort(key=lambda moment: moment[0])
    return tuple(Moment((at - faulted).total_seconds(), what) for at, what in moments)
