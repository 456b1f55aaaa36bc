"""Two of five hosts break at one moment, each with a guest on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from lab.scene import Scene
from trials import faults
from trials.kinds import Rack
from trials.trial import (
    RECORD_SECONDS,
    Actors,
    Before,
    Found,
    Outcome,
    Wrong,
    all_up,
    first_record,
    must_hold,
    outcome,
    ran_elsewhere,
    settled,
    switched,
    unnoticed,
)
from volery.client import api
from volery.contracts.liveness import ProofKind

HELD_SECONDS = 60.0
"""The second host is left alone for at least this long after the first was ordered off."""


def rack(scene: Scene, kind: Rack, pairs: tuple[Actors, Actors]) -> Outcome:
    """`pairs`: the two guests on the broken hosts, each with the same bystander. Raises Wrong, TooLate, ledger.Torn."""
    spread(scene, [pairs[0].survivor, pairs[1].survivor, pairs[0].bystander])
    befores = [Before.of(scene, actors) for actors in pairs]
    began = datetime.now(UTC)
    hosts = [scene.host(before.vm.host_id) for before in befores]
    for host in hosts:
        if kind.frozen:
            faults.freeze_without_watchdog(scene, host)
        else:
            host.power_off()
    if kind.frozen:
        return one_is_fenced(scene, kind, pairs, befores, began)
    wrote = [
        first_record(actors, len(before.boots), kind.order_seconds + RECORD_SECONDS)
        for actors, before in zip(pairs, befores, strict=True)
    ]
    for host in hosts:
        host.power_on()
    all_up(scene)
    broken = {host.name for host in hosts}
    found = [Found.of(scene, before, began) for before in befores]
    for actors, before, its in zip(pairs, befores, found, strict=True):
        must_hold(ran_elsewhere(scene, ProofKind.BMC_OFF, False, actors, before, its, began, broken))
    outcomes = [outcome(its, began, at) for its, at in zip(found, wrote, strict=True)]
    return max(outcomes, key=lambda one: one.to_order)


def one_is_fenced(
    scene: Scene, kind: Rack, pairs: Sequence[Actors], befores: Sequence[Before], began: datetime
) -> Outcome:
    """Which of both is ha's to choose."""
    first: list[int] = []

    def writes_anew() -> bool:
        first[:] = [
            n
            for n, (a, b) in enumerate(zip(pairs, befores, strict=True))
            if len(a.boots(b.vm.id)) > len(b.boots)
        ]
        return bool(first)

    scene.wait(
        writes_anew, kind.order_seconds + RECORD_SECONDS, lambda: "one of the guests to write elsewhere"
    )
    wrote = datetime.now(UTC)
    gone, left = first[0], 1 - first[0]
    actors, before = pairs[left], befores[left]
    time.sleep(HELD_SECONDS)  # nothing more is to come of it
    told = scene.client.send(api.LIVENESS.get(before.vm.host_id)).fencing
    if len(actors.boots(before.vm.id)) != len(before.boots):
        raise Wrong("the guest of the second host was started elsewhere, past the brake")
    scene.host(before.vm.host_id).thaw()
    all_up(scene)
    settled(scene, before.vm.id)
    broken = switched(scene, before)
    found = Found.of(scene, befores[gone], began)
    must_hold(
        {
            f"one host was switched: {broken}": lambda: broken == {scene.host(befores[gone].vm.host_id).name},
            f"a person was told of the brake: {told!r}": lambda: "which is the most without a person" in told,
            **ran_elsewhere(scene, ProofKind.BMC_OFF, True, pairs[gone], befores[gone], found, began, broken),
            **unnoticed(scene, actors, before.vm, before.boots),
        }
    )
    return outcome(found, began, wrote)


def spread(scene: Scene, vm_ids: Sequence[str]) -> None:
    """Each on a host of its own."""
    hosts = [host.id for host in scene.client.list(api.HOSTS)]
    taken: set[str] = set()
    for vm_id in vm_ids:
        vm = settled(scene, vm_id)
        if vm.host_id in taken:
            free = next(host_id for host_id in hosts if host_id not in taken)
            scene.act(vm_id, "migrate", {"host_id": free})
            vm = settled(scene, vm_id)
        taken.add(vm.host_id)
