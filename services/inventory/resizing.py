"""VMs that are resized to their host: what may be asked of one, and what it keeps where it moves. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from volery.contracts.cpus import CpuPinning, PinningPolicy
from volery.contracts.domain import NumaNode
from volery.contracts.errors import conflict, invalid
from volery.contracts.resizing import VmShape
from volery.contracts.vm import Vm


def is_resized(vm: Vm) -> bool:
    return vm.cpu_pinning.policy is PinningPolicy.RESIZE_AND_PIN


def check(pinning: CpuPinning, nodes: Sequence[NumaNode]) -> None:
    """Raises Refused(invalid). Its own vCPUs and topology may be anything: they are for when it is pinned otherwise."""
    if pinning.policy is PinningPolicy.RESIZE_AND_PIN and nodes:
        raise invalid(
            "a VM that is resized to its host gets the NUMA nodes of that host: leave numa_nodes out, or choose another "
            "cpu_pinning.policy",
            field="numa_nodes",
        )


def kept(vm: Vm) -> VmShape | None:
    """What it runs with and keeps wherever its memory goes. Raises Refused(conflict) when nobody knows that any more."""
    if is_resized(vm) and vm.runs_with is None:
        raise conflict(
            f"VM {vm.name} is resized to its host, and with what it runs isn't known since the database was restored: it can "
            "run on where it is; stop and start it to move it",
            vm_id=vm.id,
        )
    return vm.runs_with
