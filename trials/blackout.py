"""A round of blackout: everything dead at one moment, back in any order, one host and its BMC late."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime

from lab.board import Fault
from lab.host import Host
from lab.scene import Scene
from trials import faults
from trials.trial import (
    Actors,
    Before,
    Moment,
    Must,
    Outcome,
    Wrong,
    all_up,
    has_one_claim,
    must_hold,
    places,
    settled,
)
from volery.client import api
from volery.contracts.vm import Vm

BACK_SECONDS = 180.0
"""A VM whose host is back, and the control plane, writes within this."""
LATE_SECONDS = 30.0
"""How long the late host is waited for after the others' VMs run."""


def blackout(scene: Scene, actors: Actors, number: int) -> Outcome:
    """Round `number` decides the order, and who is late. Raises Wrong, TooLate, ledger.Torn."""
    before = Before.of(scene, actors)
    began = datetime.now(UTC)
    late = scene.lab.hosts[number % len(scene.lab.hosts)]
    moments: list[Moment] = []

    def happened(what: str) -> None:
        moments.append(Moment((datetime.now(UTC) - began).total_seconds(), what))

    faults.kill_plane(scene)
    for host in scene.lab.hosts:
        scene.lab.bmc(host.number).set_fault(Fault.UNREACHABLE)
        host.power_off()
    happened("everything is dead")
    for name, comes_back in in_any_order(scene, late, random.Random(number)):  # noqa: S311 - no secret
        comes_back()
        happened(f"{name} is back")
    homes = {vm.id: scene.host(vm.host_id).name for vm in (before.vm, before.bystander)}
    counts = {before.vm.id: len(before.boots), before.bystander.id: len(before.bystanders_boots)}
    ours = (before.vm, before.bystander)
    for vm in (vm for vm in ours if homes[vm.id] != late.name):
        runs_anew(scene, actors, vm, counts[vm.id])
        happened(f"{vm.name} writes")
    for vm in (vm for vm in ours if homes[vm.id] == late.name):
        waits(scene, actors, vm, counts[vm.id])
        happened(f"{vm.name} waits for {late.name}")
    comes_on(scene, late)
    happened(f"{late.name} is back")
    for vm in ours:
        runs_anew(scene, actors, vm, counts[vm.id])
    happened("all VMs write")
    all_up(scene)
    for vm in ours:
        must_hold(ran_once(scene, actors, vm, counts[vm.id]))
    records = [r for r in scene.client.list(api.FENCE_RECORDS) if r.created_at >= began]
    must_hold({f"no host was fenced: {records}": lambda: not records})
    return Outcome(to_order=0.0, to_record=0.0, timeline=tuple(moments))


Back = tuple[str, Callable[[], None]]


def in_any_order(scene: Scene, late: Host, order: random.Random) -> list[Back]:
    """The control plane and all hosts but the late one."""

    def on(host: Host) -> Back:
        return host.name, lambda: comes_on(scene, host)

    plane_back: Back = ("the control plane", lambda: faults.start_plane(scene, late))
    found = [plane_back, *(on(host) for host in scene.lab.hosts if host.number != late.number)]
    order.shuffle(found)
    return found


def comes_on(scene: Scene, host: Host) -> None:
    """The host, and its BMC with it."""
    scene.lab.bmc(host.number).set_fault(Fault.NONE)
    host.power_on()


def runs_anew(scene: Scene, actors: Actors, vm: Vm, known: int) -> None:
    scene.wait(
        lambda: len(actors.boots(vm.id)) > known,
        BACK_SECONDS,
        lambda: f"VM {vm.name} to run after the blackout",
    )


def waits(scene: Scene, actors: Actors, vm: Vm, known: int) -> None:
    """Nobody has proven that its host is dead. Raises Wrong when it is started all the same."""
    until = time.monotonic() + LATE_SECONDS
    while time.monotonic() < until:
        time.sleep(1.0)  # nothing is to come of it
        if places(scene, vm) or len(actors.boots(vm.id)) > known:
            raise Wrong(f"VM {vm.name} was started though its host is neither back nor proven dead")


def ran_once(scene: Scene, actors: Actors, vm: Vm, known: int) -> Must:
    now = settled(scene, vm.id)
    where = places(scene, now)
    return {
        f"{now.name} runs once: {where}": lambda: len(where) == 1,
        f"{now.name} booted once": lambda: len(actors.boots(now.id)) == known + 1,
        f"{now.name} has a new epoch": lambda: now.epoch > vm.epoch,
        f"{now.name} has one claim": lambda: has_one_claim(scene, now),
    }
