"""Starting many VMs in one call."""

from __future__ import annotations

from enum import StrEnum

from volery.contracts.base import Call, Message
from volery.contracts.operation import Operation


class StartVms(Message):
    """Start VMs that are named, or all of a selection; what is said of a selection narrows it. At most 500.

    Hosts are chosen for all of them at once: VMs that an enforcing positive affinity group keeps on one host get their places
    there together, or none of them is started. What became of each is in the operation's result (`vms`)."""

    vm_ids: tuple[str, ...] = ()
    affinity_group_id: str = ""
    """The VMs of this group."""
    cluster_id: str = ""
    """VMs of this cluster that don't run."""
    tag: str = ""
    """VMs with this tag that don't run."""
    host_id: str = ""
    """Only on this host; "" lets the scheduler choose."""
    all_or_nothing: bool = False
    """Start none, unless a host is found for each of them."""
    dry_run: bool = False


class Became(StrEnum):
    """What became of one of the VMs."""

    RUNNING = "running"
    """It ran already."""
    STARTING = "starting"
    STARTED = "started"
    REFUSED = "refused"
    """It wasn't touched: no place, or it can't be started as it is."""
    FAILED = "failed"
    """It was tried."""
    PLACED = "placed"
    """In a dry run: it would be started there."""


class VmStart(Message):
    """One of the VMs, and what became of it."""

    vm_id: str
    name: str = ""
    became: Became = Became.STARTING
    host_id: str = ""
    host_name: str = ""
    operation_id: str = ""
    """Of its own start."""
    message: str = ""
    """Why not."""
    decision_id: str = ""
    """The whole explanation of its place, or of why there is none."""
    together: tuple[str, ...] = ()
    """Ids of the others that it gets its place with, or none does."""


START_VMS = Call("inventory.vm.start_many", StartVms, Operation, mutates=True, timeout_seconds=60)
