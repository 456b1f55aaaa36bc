"""Where VMs are, as far as placing others next to them or apart from them goes: claims, and what runs without one. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from services.scheduler.config import SchedulerConfig
from services.scheduler.model import CONFIRMED, ENDED_STATUSES, SETTLED_STATUSES, SeenVm, memory_taken
from services.scheduler.policies.bound import Seat
from volery.contracts.scheduling import Claim
from volery.contracts.vm import VmStatus


def hosts_of(claims: Collection[Claim], vm: SeenVm | None) -> frozenset[str]:
    """The hosts where it is or may be; several while it moves. A claim of a run that has ended counts no more, even
    though nobody has given it back yet: the VMs of a dead host must not wait for one another's."""
    if vm is not None and vm.deleted:
        return frozenset()
    held = {claim.host_id for claim in claims if vm is None or not _over(claim, vm)}
    newest = max((claim.epoch for claim in claims), default=-1)
    if vm is not None and vm.host_id and vm.status not in ENDED_STATUSES and (not held or vm.epoch > newest):
        held.add(vm.host_id)
    return frozenset(held)


def _over(claim: Claim, vm: SeenVm) -> bool:
    if claim.epoch > vm.epoch or (claim.epoch == vm.epoch and claim.state != CONFIRMED):
        return False
    if vm.status == VmStatus.WAIT_FOR_LAUNCH:
        return claim.epoch < vm.epoch
    elsewhere = vm.status in SETTLED_STATUSES and vm.host_id != claim.host_id
    return vm.status in ENDED_STATUSES or elsewhere


def seats(
    vm_ids: Iterable[str],
    claims: Iterable[Claim],
    vms: Mapping[str, SeenVm],
    config: SchedulerConfig,
    without: Collection[str] = (),
) -> dict[str, Seat]:
    """VM → its seat, leaving out the hosts `without`."""
    held: dict[str, list[Claim]] = {vm_id: [] for vm_id in vm_ids}
    for claim in claims:
        held[claim.vm_id].append(claim)
    found = {}
    for vm_id, own in held.items():
        vm = vms.get(vm_id)
        if vm is None and not own:
            continue
        found[vm_id] = Seat(
            name=vm.name if vm is not None else vm_id,
            host_ids=hosts_of(own, vm) - frozenset(without),
            memory=own[0].memory_bytes
            if vm is None
            else memory_taken(vm.memory_bytes, config, vm.hugepage_kib),
            vcpus=vm.vcpus if vm is not None else own[0].vcpus,
        )
    return found
