"""A connected directory domain, and shorthand for its volumes."""

from __future__ import annotations

import os
from pathlib import Path

from host_agent import storage, volumes
from host_agent.action import Host
from tests.support.agent_host import IscsiTarget, running
from volery.contracts.domain import FileSource, ImageFormat, IscsiSource
from volery.contracts.ids import new_id
from volery.contracts.volume_orders import ConnectStorage, CreateVolume, DirectoryLocation, IscsiLocation

MIB = 1024 * 1024


class Domain:
    def __init__(self, host: Host, domain_id: str, path: Path) -> None:
        self.host, self.domain_id, self.path = host, domain_id, path
        self.disks = path / domain_id / "disks"
        self.staging = path / domain_id / "staging"

    def source(self, disk_id: str, format: ImageFormat = ImageFormat.QCOW2) -> FileSource:
        return FileSource(path=str(self.disks / f"{disk_id}.{format}"), format=format)

    async def create(
        self, format: ImageFormat = ImageFormat.QCOW2, size: int = 64 * MIB, preallocate: bool = False
    ) -> tuple[str, FileSource]:
        disk_id = new_id()
        order = CreateVolume(
            disk_id=disk_id, source=self.source(disk_id, format), size_bytes=size, preallocate=preallocate
        )
        await volumes.create(self.host, order, running(disk_id))
        return disk_id, self.source(disk_id, format)

    def leftovers(self) -> list[str]:
        return sorted(os.listdir(self.staging))


async def connected_domain(host: Host, path: Path) -> Domain:
    """A new domain in that directory."""
    domain_id = new_id()
    path.mkdir(exist_ok=True)
    where = DirectoryLocation(path=str(path))
    order = ConnectStorage(domain_id=domain_id, location=where, initialise=True)
    await storage.connect(host, order, running())
    return Domain(host, domain_id, path)


async def connect_target(host: Host, target: IscsiTarget) -> None:
    where = IscsiLocation(
        portal=target.portal, iqn=target.iqn, chap_user=target.user, chap_password=target.password
    )
    await storage.connect(host, ConnectStorage(domain_id=new_id(), location=where), running())


def lun(target: IscsiTarget, number: int) -> IscsiSource:
    return IscsiSource(
        portal=target.portal,
        iqn=target.iqn,
        lun=number,
        chap_user=target.user,
        chap_password=target.password,
    )
