"""Of which disks a snapshot can be made. Pure: no bus, no database, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from services.storage import disk_model, domain_model
from services.storage.chain_model import Chain
from services.storage.store import VmRow
from volery.contracts.errors import conflict, invalid
from volery.contracts.naming import checked_id
from volery.contracts.storage import ContentType, Disk, StorageDomain
from volery.contracts.together import Holder, Work
from volery.contracts.volumes import SnapshotDisks, VolumeState

MOST_VOLUMES = 64
"""Above each other: each costs a read of what is in none, and QEMU opens them all."""


def checked(ask: SnapshotDisks) -> SnapshotDisks:
    """Raises Refused(invalid)."""
    checked_id("snapshot", ask.snapshot_id)
    if not ask.disk_ids:
        raise invalid("a snapshot needs at least one disk: name those that it is to be of", field="disk_ids")
    for disk_id in ask.disk_ids:
        checked_id("disk", disk_id)
    return replace(ask, disk_ids=tuple(dict.fromkeys(ask.disk_ids)))


def refuse_kind(disk: Disk, domain: StorageDomain) -> None:
    """Raises Refused(conflict) for disks that never have volumes above each other."""
    if disk.content is ContentType.ISO:
        raise conflict(f"disk {disk.name} is an ISO image and never changes: leave it out", rule="iso")
    if not domain_model.BACKENDS[domain.kind].GROWS:
        raise conflict(
            f"disk {disk.name} is a whole LUN of storage domain {domain.name}, with no room for a second volume: leave it "
            "out, or copy it into a domain of kind directory and attach the copy instead",
            rule="whole_lun",
        )
    if disk.shareable:
        raise conflict(
            f"disk {disk.name} is shareable, and VMs that share it would each go on in another volume: make it "
            "unshareable first, or leave it out",
            rule="shareable",
        )


LIVE = frozenset({"up", "powering_up", "reboot_in_progress", "paused"})
"""VM states in which QEMU can go on in another volume."""


def refuse(
    work: Work,
    disk: Disk,
    domain: StorageDomain,
    at_work: Sequence[Holder],
    vms: Mapping[str, VmRow],
    live: str = "",
) -> None:
    """Raises Refused unless the disk's volumes may be changed now. `live`: the VM that may run with it."""
    disk_model.refuse_unsound(disk)
    refuse_kind(disk, domain)
    disk_model.refuse(work, disk, at_work)
    vm = disk_model.running_vm(disk, vms)
    if vm is None or (vm.id == live and vm.status in LIVE):
        return
    what = "wait until it is up or down" if vm.id == live else "stop the VM first"
    raise conflict(
        f"disk {disk.name} is used by VM {vm.name}, which is {vm.status.replace('_', ' ')}: {what}",
        vm_id=vm.id,
        rule="running",
    )


def refuse_depth(disk: Disk, chain: Chain) -> None:
    if len(chain.volumes) >= MOST_VOLUMES:
        raise conflict(
            f"disk {disk.name} has {len(chain.volumes)} volumes above each other, and more aren't made: delete some of its "
            "snapshots first",
            rule="depth",
        )


def refuse_revert(disk: Disk, chain: Chain, snapshot_id: str) -> None:
    """Raises Refused(conflict) unless the volume below the leaf is the snapshot's, whole."""
    if chain.leaf.state is VolumeState.MERGING or len(chain.volumes) < 2:
        raise conflict(
            f"a deletion of the snapshot was begun, and what disk {disk.name} was then is no longer whole: delete the "
            "snapshot again",
            rule="merging",
        )
    if chain.volumes[-2].snapshot_id != snapshot_id:
        raise conflict(
            f"disk {disk.name} has newer snapshots: delete those first, or revert to the newest",
            rule="newer",
            snapshot_id=chain.volumes[-2].snapshot_id,
        )
