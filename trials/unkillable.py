"""A VM is forced off while its QEMU can't be ended: that is said, nothing of it is given away, and it is down when it is."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from lab import disk
from lab.host import Host
from lab.scene import Scene
from trials import faults
from trials.kinds import Unkillable
from trials.trial import (
    Actors,
    Before,
    Found,
    Must,
    Outcome,
    Wrong,
    believed_dead,
    first_record,
    has_one_claim,
    last_record,
    must_hold,
    places,
    switched,
    timeline,
    unnoticed,
)
from volery.client import api
from volery.client.transport import OperationFailed, ProblemError
from volery.contracts.operation import Operation
from volery.contracts.vm import Vm

LOOKS = 6
LOOK_SECONDS = 5.0
ENDS_SECONDS = 30.0
SENTENCE = "was sent SIGKILL and does not end"


def unkillable(scene: Scene, kind: Unkillable, actors: Actors) -> Outcome:
    """Raises Wrong, TooLate, ledger.Torn."""
    before = Before.of(scene, actors)
    host, vm = scene.host(before.vm.host_id), before.vm
    faulted = datetime.now(UTC)
    try:
        faults.cut_directory(scene, host)
        words = refused(scene, vm)
        wrote = last_record(actors)
        for _ in range(LOOKS):
            time.sleep(LOOK_SECONDS)  # nothing is to come of it
            must_hold(holds_all(scene, kind, host, vm))
        must_hold(said(words, last_record(actors) - wrote))
    finally:
        disk.join(host)
    down = scene.until(vm.id, lambda now: now.status == "down" and not now.busy_with, ENDS_SECONDS)
    time.sleep(LOOK_SECONDS)  # nothing is to come of it
    found = Found.of(scene, before, faulted)
    must_hold(stays_down(scene, actors, before, down, found, faulted))
    scene.act(vm.id, "start")
    back = first_record(actors, len(before.boots), 60)
    return Outcome(to_order=0.0, to_record=0.0, timeline=timeline(found, faulted, back))


def refused(scene: Scene, vm: Vm) -> str:
    """Why it could not be forced off. Raises Wrong if it was."""
    try:
        scene.act(vm.id, "stop", {"force": True})
    except OperationFailed as failed:
        return str(failed)
    raise Wrong("the VM was said to be stopped, though its QEMU could not be ended")


def said(words: str, wrote: int) -> Must:
    return {
        f"the stop says what is so: {words}": lambda: SENTENCE in words and "switch the host off" in words,
        "nothing of it was written meanwhile": lambda: wrote == 0,
    }


def holds_all(scene: Scene, kind: Unkillable, host: Host, vm: Vm) -> Must:
    """Nobody takes the VM for down, and it has what it had."""
    now, where = scene.client.send(api.VMS.get(vm.id)), places(scene, vm)
    shown = (now.status, now.status_reason, now.desired, now.host_id, now.epoch)
    holders = host.exec(["sanlock", "client", "status"]).stdout if kind.io_timeout_seconds else vm.id
    return {
        f"it is not said to be down: {shown}": lambda: (
            shown == ("not_responding", "unkillable", "down", vm.host_id, vm.epoch)
        ),
        f"its QEMU is where it was, and nowhere else: {where}": lambda: where == [host.name],
        "it has one claim": lambda: has_one_claim(scene, now),
        f"its host holds its lease: {holders}": lambda: vm.id in holders,
        "it can't be started": lambda: not may_start(scene, vm),
    }


def may_start(scene: Scene, vm: Vm) -> bool:
    try:
        scene.client.send(api.VMS.act(vm.id, "start", Operation))
    except ProblemError:
        return False
    return True


def stays_down(
    scene: Scene, actors: Actors, before: Before, down: Vm, found: Found, faulted: datetime
) -> Must:
    """Once QEMU has ended, the stop has come to its end, and nothing else has."""
    now, where = scene.client.send(api.VMS.get(down.id)), places(scene, down)
    believed, others = believed_dead(found, faulted), switched(scene, before)
    return {
        f"it is down as it was asked to be: {down.status_reason}, {down.desired}": lambda: (
            (down.status_reason, down.desired) == ("user", "down")
        ),
        f"it stays down: {now.status} {where}": lambda: now.status == "down" and not where,
        f"no restart was ordered: {found.order}": lambda: found.order is None,
        "it never booted": lambda: len(actors.boots(down.id)) == len(before.boots),
        f"nobody was switched off, or believed dead: {others} {believed}": lambda: (
            not others and not believed and not found.records
        ),
        **unnoticed(scene, actors, before.bystander, before.bystanders_boots),
    }
