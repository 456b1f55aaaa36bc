"""The guests of a lab's trials, each with a ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lab.scene import Scene
from trials import ledger
from trials.kinds import Kind, Rack, Storage
from volery.cli.storage import send_image
from volery.client import api
from volery.contracts.domain import ImageFormat
from volery.contracts.operation import Operation
from volery.contracts.storage import CreateDisk
from volery.contracts.vm import HighAvailability, NewDisk, Vm

Guest = tuple[Vm, Path]
"""A highly available VM, and its ledger's file."""


@dataclass
class Company:
    """They go from one kind of trial to the next, until their ledgers are half full, or are to be elsewhere."""

    scene: Scene
    guests: list[Guest] = field(default_factory=list)
    storage: Storage = "shared"
    hired: int = 0

    def cast(self, kind: Kind) -> list[Guest]:
        """The survivor, the bystander, and of a rack a companion."""
        if self.guests and (self.storage != kind.storage or self._is_half_written()):
            for vm, _ in self.guests:
                self.scene.remove(vm)
            self.guests = []
        if not self.guests:
            self.storage, self.hired = kind.storage, self.hired + 1
            parts = ("survivor", "bystander", *(("companion",) if isinstance(kind, Rack) else ()))
            self.guests = [actor(self.scene, f"{part}-{self.hired}", kind.storage) for part in parts]
        return self.guests

    def _is_half_written(self) -> bool:
        return any(ledger.boots_of(file)[-1].last > ledger.SECTORS / 2 for _, file in self.guests)


def actor(scene: Scene, name: str, storage: Storage) -> Guest:
    blank = scene.lab.layout.state / f"{name}.ledger"
    blank.write_bytes(ledger.blank())
    domain = scene.disk_domain() if storage == "disk" else scene.client.find(api.STORAGE_DOMAINS, storage)
    if storage == "iscsi":
        scene.lab.target.add_lun(ledger.SIZE)
        scene.client.wait(scene.client.send(api.STORAGE_DOMAINS.act(domain.id, "refresh", Operation)))
    ask = CreateDisk(
        name=f"{name}-ledger", storage_domain_id=domain.id, size_bytes=ledger.SIZE, format=ImageFormat.RAW
    )
    disk_id = scene.client.wait(scene.client.send(api.DISKS.create(ask, Operation))).object_id
    send_image(scene.client, disk_id, blank)
    vm = scene.guest(name, NewDisk(disk_id=disk_id), high_availability=HighAvailability(enabled=True))
    return vm, ledgers_file(scene, disk_id, storage)


def ledgers_file(scene: Scene, disk_id: str, storage: Storage) -> Path:
    if storage == "iscsi":
        return scene.lab.target.backing_file(scene.client.send(api.DISKS.get(disk_id)).lun)
    top = scene.lab.layout.disk if storage == "disk" else scene.lab.shared
    found = (path for path in top.rglob(f"*{disk_id}*") if path.is_file())
    (file,) = (path for path in found if path.parent.name != "leases")
    return file
