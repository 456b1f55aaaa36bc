"""Whether the death of its host would bring a VM back elsewhere; if not, why, and the smallest change. Pure.

Each reason stands by itself: a VM that is pinned, on a host whose death can't be proven, has both. What follows from one
(a pinned VM fits on no other host) is not said again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from volery.contracts.power import Identity, PowerManagement
from volery.contracts.protection import ProtectionReason, ReasonCode, VmNeed
from volery.contracts.scheduling import Room

CODES: Mapping[str, ReasonCode] = {
    "host_state": ReasonCode.NO_OTHER_HOST,
    "pinned": ReasonCode.PINNED,
    "cpu": ReasonCode.CAPACITY,
    "cpu_overcommit": ReasonCode.CAPACITY,
    "memory": ReasonCode.CAPACITY,
    "swap": ReasonCode.CAPACITY,
    "host_devices": ReasonCode.HOST_DEVICES,
    "network": ReasonCode.NETWORK,
    "storage": ReasonCode.STORAGE,
    "cpu_model": ReasonCode.CPU_MODEL,
    "machine": ReasonCode.MACHINE,
    "affinity_vms": ReasonCode.AFFINITY,
    "affinity_hosts": ReasonCode.AFFINITY,
}
"""The scheduler's rule that a host breaks → what that is called here; rules that only one placement has are left out."""

CONSEQUENCES: Mapping[ReasonCode, frozenset[str]] = {
    ReasonCode.PINNED: frozenset({"pinned"}),
    ReasonCode.LOCAL_DISK: frozenset({"storage"}),
    ReasonCode.STORAGE: frozenset({"storage"}),
}
"""A reason that was found already → the rules that no host can keep because of it."""


@dataclass(frozen=True, slots=True)
class HostProof:
    """What a host's death could be proven by while it is silent."""

    id: str
    name: str
    power: PowerManagement | None = None
    paused: str = ""
    """Fencing is switched off for it: until when, and why."""
    lacking: tuple[str, ...] = ()
    """Fence agents of its devices that neither another host of its cluster nor ha's own machine has."""
    lease: str = ""
    """The storage domain whose lease, once expired, would prove it: the host's watchdog resets it with that lease."""


def why_no_proof(host: HostProof) -> tuple[ProtectionReason, ...]:
    """Why nobody but a person could say that this host is dead; empty: its power management can, or a lease that expires."""
    if host.lease:
        return ()
    name, power = host.name, host.power
    if power is None:
        return (
            _no_proof(
                f"host {name} has no power management: when it falls silent, nobody but a person can prove that it is "
                "dead",
                f"give {name} power management: its BMC, and a fence agent that speaks to it",
            ),
        )
    if not power.enabled:
        return (
            _no_proof(f"the power management of host {name} is switched off", f"enable it for {name} again"),
        )
    if power.identity is not Identity.CHECKED:
        said = power.test_words or "nobody has been able to ask it yet"
        return (
            _no_proof(
                f"it isn't certain that the BMC of host {name} is its own ({power.identity}): {said}",
                f"correct the address of its BMC, then test the power management of {name}",
            ),
        )
    if not power.test_passed:
        return (
            _no_proof(
                f"the last test of the power management of host {name} failed: {power.test_words}",
                f"repair its BMC or the way to it, then test the power management of {name}",
            ),
        )
    if host.lacking:
        agents = ", ".join(host.lacking)
        return (
            _no_proof(
                f"no other host of its cluster has the fence agent of host {name}: {agents}",
                f"install {agents} on another host of its cluster",
            ),
        )
    if host.paused:
        return (
            ProtectionReason(
                code=ReasonCode.FENCING_PAUSED,
                message=f"host {name} would not be switched off: {host.paused}",
                change="end the pause of fencing",
            ),
        )
    return ()


def judge(vm: VmNeed, room: Room, proofs: Mapping[str, HostProof]) -> tuple[ProtectionReason, ...]:
    """Everything that stands against bringing it back elsewhere; empty when nothing does.

    `room` leaves out the host that the VM runs on; `proofs` are the hosts of its cluster. Of a VM that doesn't run two
    hosts must be able to take it, and one at least must be able to be proven dead.
    """
    found = list(_of_the_vm(vm, proofs))
    found += _of_its_host(vm, proofs)
    codes = {reason.code for reason in found}
    found += _of_the_others(vm, room, codes)
    return tuple(found)


def _of_the_vm(vm: VmNeed, proofs: Mapping[str, HostProof]) -> Iterator[ProtectionReason]:
    name = f"VM {vm.need.name}"
    if vm.same_host:
        yield ProtectionReason(
            code=ReasonCode.SAME_HOST,
            message=f"{name} is to be restarted on its own host only, as was asked",
            change="let it be restarted elsewhere (high_availability.where)",
        )
    if vm.local_host_id:
        yield ProtectionReason(
            code=ReasonCode.LOCAL_DISK,
            message=f"a disk of {name} is in a local directory of host {_named(vm.local_host_id, proofs)}, which no "
            "other host reaches",
            change="move its disks to a shared storage domain",
        )
    for why in vm.unready[:1]:
        yield ProtectionReason(
            code=ReasonCode.STORAGE,
            message=f"{name} could be started nowhere now, since a disk of it can't be used: {why}",
            change="bring its storage domain back, or wait for the disk",
        )
    pinned = set(vm.need.host_ids)
    if len(pinned) == 1 or (pinned and vm.host_id and pinned <= {vm.host_id}):
        yield ProtectionReason(
            code=ReasonCode.PINNED,
            message=f"{name} is pinned to host {_named(next(iter(pinned)), proofs)} alone",
            change="pin it to another host too, or to none",
        )


def _named(host_id: str, proofs: Mapping[str, HostProof]) -> str:
    return proofs[host_id].name if host_id in proofs else host_id


def _of_its_host(vm: VmNeed, proofs: Mapping[str, HostProof]) -> Sequence[ProtectionReason]:
    if vm.host_id:
        host = proofs.get(vm.host_id)
        return why_no_proof(host) if host is not None else ()
    against = [why_no_proof(host) for _, host in sorted(proofs.items())]
    return against[0] if against and all(against) else ()


def _of_the_others(vm: VmNeed, room: Room, known: set[ReasonCode]) -> Iterator[ProtectionReason]:
    wanted = 1 if vm.host_id else 2
    name, nearest = f"VM {vm.need.name}", room.nearest
    if room.fitting >= wanted:
        return
    if room.hosts < wanted or nearest is None:
        yield ProtectionReason(
            code=ReasonCode.NO_OTHER_HOST,
            message=f"the cluster of {name} has no other host",
            change="add a host to the cluster",
        )
        return
    settled = {rule for code in known for rule in CONSEQUENCES.get(code, ())}
    for verdict in nearest.verdicts:
        if verdict.rule in settled or verdict.rule not in CODES:
            continue
        yield ProtectionReason(
            code=CODES[verdict.rule],
            message=f"no other host could take {name} now; the nearest is {nearest.name}: {verdict.message}",
            change=verdict.change,
        )


def _no_proof(message: str, change: str) -> ProtectionReason:
    return ProtectionReason(code=ReasonCode.NO_PROOF, message=message, change=change)
