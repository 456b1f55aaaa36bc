"""One trial: the fault, the wait for the guest's own word from elsewhere, and what the history says about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from lab import processes
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
from volery.contracts.liveness import HostLiveness, LivenessState, ProofKind
from volery.contracts.operation import Operation
from volery.contracts.power import FenceRecord
from volery.contracts.vm import Vm

E = TypeVar("E", bound=Entity)

RECORD_SECONDS = 120.0
"""A guest that was ordered to run must have written within this."""
CLAIM_SECONDS = 60.0
"""What the scheduler's claims contradict is put right within this."""
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
    began = datetime.now(UTC)
    try:
        kind.first(scene, host)
        faulted = datetime.now(UTC)
        kind.fault(scene, host)
        wrote = first_record(actors, len(before.boots), kind.order_seconds + RECORD_SECONDS)
    finally:
        kind.mend(scene, host)
    all_up(scene)
    found = Found.of(scene, before, began)
    here = {host.name} if kind.proof else set()
    must_hold(ran_elsewhere(scene, kind.proof, kind.fenced, actors, before, found, faulted, here))
    return outcome(found, faulted, wrote)


def outcome(found: Found, faulted: datetime, wrote: datetime) -> Outcome:
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
    try:
        kind.first(scene, host)
        kind.fault(scene, host)
        lasts(actors, kind)
    finally:
        kind.mend(scene, host)
    wrote = last_record(actors)
    all_up(scene)
    scene.wait(lambda: last_record(actors) > wrote, 60, lambda: "the guest to go on writing")
    found = Found.of(scene, before, faulted)
    must_hold(unharmed(scene, kind, actors, before, found, faulted))
    return Outcome(to_order=0.0, to_record=0.0, timeline=timeline(found, faulted, None))


def lasts(actors: Actors, kind: Nothing) -> None:
    """While the fault does. Raises Wrong when the guest stops writing, or should have."""
    until = time.monotonic() + kind.seconds
    wrote, began = last_record(actors), True
    while time.monotonic() < until:
        time.sleep(min(PAUSE_SECONDS, kind.seconds))  # nothing is to come of it
        goes_on = last_record(actors) != wrote
        if not goes_on and not kind.still:
            raise Wrong(f"the guest wrote nothing for {PAUSE_SECONDS:.0f} s")
        if goes_on and kind.still and not began and not kind.may_move:
            raise Wrong("the guest wrote while its host, or its disk, was to stand still")
        wrote, began = last_record(actors), False


def all_up(scene: Scene) -> None:
    for host in scene.client.list(api.HOSTS):
        scene.host_is_up(host.id, 150)


def boots_of_hosts(scene: Scene) -> dict[str, str]:
    """Boot ids by host."""
    return {host.name: host.boot.boot_id if host.boot else "" for host in scene.lab.hosts}


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
    hosts: dict[str, str]
    """Their boot ids."""

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
        return cls(vm, bystander, actors.boots(vm.id), actors.boots(bystander.id), boots_of_hosts(scene))


def writes(scene: Scene, actors: Actors, vm_id: str) -> None:
    """Waits until the guest has written: its agent answers before that."""
    scene.wait(lambda: bool(actors.boots(vm_id)), 60, lambda: f"VM {vm_id} to write on its ledger")


def settled(scene: Scene, vm_id: str) -> Vm:
    return scene.until(
        vm_id, lambda vm: vm.status == "up" and vm.guest.agent_connected and not vm.busy_with, 120
    )


@dataclass(frozen=True)
class Found:
    """What is on record since it began; `liveness` is the host's whole history."""

    liveness: list[tuple[datetime, HostLiveness]]
    vm: list[tuple[datetime, Vm]]
    order: Operation | None
    """The restart of the survivor."""
    records: list[FenceRecord]

    @classmethod
    def of(cls, scene: Scene, before: Before, began: datetime) -> Found:
        host_id, vm_id = before.vm.host_id, before.vm.id
        operations = scene.client.list(api.OPERATIONS, filter={"object_id": vm_id})
        starts = sorted(
            (op for op in operations if op.created_at >= began and op.kind == "vm.restart"),
            key=lambda op: op.created_at,
        )
        records = scene.client.list(api.FENCE_RECORDS)
        return cls(
            liveness=list(versions(scene, "liveness", host_id, HostLiveness)),
            vm=[(at, vm) for at, vm in versions(scene, "vm", vm_id, Vm) if at >= began],
            order=starts[0] if starts else None,
            records=[r for r in records if r.created_at >= began],
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


def ran_elsewhere(
    scene: Scene,
    proof: ProofKind | None,
    fenced: bool,
    actors: Actors,
    before: Before,
    found: Found,
    faulted: datetime,
    broken: set[str],
) -> Must:
    """The VM was restarted as it must be, and no host but the `broken` had another boot since."""
    now = settled(scene, before.vm.id)
    order = found.order
    where = places(scene, now)
    orders = [r for r in found.records if r.requested_by == "service:ha"]
    other_boots = switched(scene, before)
    return {
        **by_proof(proof, found, faulted),
        "its restart was ordered after the fault": lambda: order is not None and order.created_at > faulted,
        f"it runs once, and elsewhere: {where}": lambda: (
            len(where) == 1 and now.host_id != before.vm.host_id and now.epoch > before.vm.epoch
        ),
        "it booted once": lambda: len(actors.boots(now.id)) == len(before.boots) + 1,
        f"ha ordered this host off, or nobody: {orders}": lambda: (
            [r.host_id for r in orders] == [before.vm.host_id] * fenced
        ),
        "every fence has ended": lambda: all(r.ended_at for r in orders),
        f"no host but {broken} was switched: {other_boots}": lambda: other_boots == broken,
        **unnoticed(scene, actors, before.bystander, before.bystanders_boots),
    }


def by_proof(proof: ProofKind | None, found: Found, faulted: datetime) -> Must:
    """The host was dead by this proof before the restart was ordered; or nobody believed it dead."""
    if proof is None:
        believed = believed_dead(found, faulted)
        return {f"no host was believed dead: {believed}": lambda: not believed}
    death, order = proven(found, faulted), found.order
    return {
        f"the proof is {proof}: {death.proof}": lambda: death.proof is not None and death.proof.kind is proof,
        "the proof comes before the order": lambda: (
            order is not None and death.judged_at is not None and death.judged_at < order.created_at
        ),
    }


def believed_dead(found: Found, since: datetime) -> list[HostLiveness]:
    return [h for at, h in found.liveness if at >= since and h.state is LivenessState.DEAD]


def switched(scene: Scene, before: Before) -> set[str]:
    """Hosts in another boot than before."""
    return {name for name, boot_id in boots_of_hosts(scene).items() if boot_id != before.hosts[name]}


def unnoticed(
    scene: Scene, actors: Actors, before: Vm, boots: list[ledger.Boot], *, may_move: bool = False
) -> Must:
    """The VM runs as it did, in the same boot, and at the same place unless it `may_move`."""
    now = settled(scene, before.id)
    where = places(scene, now)
    return {
        f"{now.name} was left alone": lambda: (
            may_move or (now.epoch, now.host_id) == (before.epoch, before.host_id)
        ),
        f"{now.name} runs once: {where}": lambda: len(where) == 1,
        f"{now.name} was never booted anew": lambda: (
            [boot.id for boot in actors.boots(now.id)] == [boot.id for boot in boots]
        ),
        f"{now.name} has one claim": lambda: has_one_claim(scene, now),
    }


def has_one_claim(scene: Scene, vm: Vm) -> bool:
    """The claim of a place that the VM has left is kept until nothing was heard of it for some seconds."""
    seen: list[tuple[str, int, str]] = []

    def one() -> bool:
        found = scene.client.list(api.CLAIMS, filter={"vm_id": vm.id})
        seen[:] = [(claim.host_id, claim.epoch, claim.state) for claim in found]
        return len(seen) == 1

    scene.wait(one, CLAIM_SECONDS, lambda: f"one claim of VM {vm.name}, and there are {seen}")
    return True


def unharmed(
    scene: Scene, kind: Nothing, actors: Actors, before: Before, found: Found, faulted: datetime
) -> Must:
    """Nobody was restarted, switched or believed dead."""
    believed = believed_dead(found, faulted)
    told = {h.fencing for at, h in found.liveness if at >= faulted}
    return {
        **unnoticed(scene, actors, before.vm, before.boots, may_move=kind.may_move),
        **unnoticed(scene, actors, before.bystander, before.bystanders_boots),
        f"no restart was ordered: {found.order}": lambda: found.order is None,
        f"ha ordered its host off, or nobody: {found.records}": lambda: (
            {r.host_id for r in found.records} == ({before.vm.host_id} if kind.fence_tried else set())
        ),
        "every fence has ended": lambda: all(r.ended_at for r in found.records),
        f"no host was switched: {switched(scene, before)}": lambda: not switched(scene, before),
        f"no host was believed dead: {believed}": lambda: not believed,
        f"a person was told {kind.says!r}: {told}": lambda: (
            not kind.says or any(kind.says in words for words in told)
        ),
    }


def places(scene: Scene, vm: Vm) -> list[str]:
    """The hosts that have a QEMU of this VM."""
    return [h.name for h in scene.lab.hosts if h.boot and any(vm.id in line for line in running(h))]


def running(host: Host) -> list[str]:
    return [processes.command_line(pid) for pid in host.pids("qemu-system-x86")]


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
