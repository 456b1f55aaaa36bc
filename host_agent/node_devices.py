"""libvirt's node devices: listed, and mediated ones made and taken away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

from host_agent import runningxml
from host_agent.config import AgentConfig
from host_agent.connections import BULK_SECONDS, Driver
from host_agent.node_xml import Found, FoundMdev, found, found_mdev
from host_agent.pinning import Pinning
from host_agent.refusals import LibvirtError
from volery.contracts.host_devices import HostDevice


class Listed(IntFlag):
    """virConnectListAllNodeDeviceFlags, as far as VMs can have what it lists; its numbers never change."""

    PCI = 1 << 1
    USB = 1 << 2
    SCSI = 1 << 7
    MDEV = 1 << 14
    ALL = PCI | USB | SCSI | MDEV


ACTIVE_DOMAINS = 1
"""VIR_CONNECT_LIST_DOMAINS_ACTIVE"""
MAKING_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class HostdevUse:
    """What one domain has of its host's devices."""

    vm_id: str
    name: str
    installation: str
    """"": Volery did not make it."""
    addresses: frozenset[str]
    """Of PCI, USB and SCSI as `HostDevice.address`, of mediated devices the UUID."""


@dataclass(slots=True)
class Instances:
    """Mediated devices of this Volery's on this host, as far as memory goes: which exist says libvirt."""

    some: bool = True
    """Whether there may be any."""
    beginning: set[str] = field(default_factory=set)
    """UUIDs of those whose domains are being made."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """While some are made or taken away."""
    told: tuple[HostDevice, ...] = ()
    """The host's devices, as they were told last."""


class NodeDevices(Pinning):
    """Every method may raise Refused."""

    def __init__(self, config: AgentConfig, driver: Driver) -> None:
        super().__init__(config, driver)
        self.mdevs = Instances()

    async def node_devices(self) -> tuple[list[Found], list[FoundMdev]]:
        """Nothing, where libvirt has no driver for them."""

        def look(connection: Any) -> tuple[list[Found], list[FoundMdev]]:
            devices, mdevs = list[Found](), list[FoundMdev]()
            for device in self._listed(connection):
                with self._unless(LibvirtError.NO_NODE_DEVICE):
                    root = runningxml.parsed(device.XMLDesc(0))
                    if (mdev := found_mdev(root)) is not None:
                        mdevs.append(mdev)
                    elif (one := found(root)) is not None:
                        devices.append(one)
            return devices, mdevs

        return await self._listing("list the host's devices", look)

    async def hostdev_uses(self) -> list[HostdevUse]:
        """Which domains have devices of the host, also those that Volery did not make."""

        def look(connection: Any) -> list[HostdevUse]:
            uses = []
            for domain in connection.listAllDomains(ACTIVE_DOMAINS):
                with self._unless(LibvirtError.NO_DOMAIN):  # it ended meanwhile
                    root = runningxml.parsed(domain.XMLDesc(0))
                    if addresses := frozenset(runningxml.hostdevs_of(root)):
                        metadata = runningxml.metadata_of(root)
                        whose = metadata.installation if metadata is not None else ""
                        uses.append(HostdevUse(domain.UUIDString(), domain.name(), whose, addresses))
            return uses

        return await self._listing("see who has devices of the host", look)

    async def make_mdev(self, xml: str) -> None:
        await self._call(
            self._work,
            "make a mediated device",
            lambda c: bool(c.nodeDeviceCreateXML(xml, 0)),
            MAKING_SECONDS,
        )

    async def take_mdev(self, name: str) -> None:
        """Done also when it isn't there."""

        def take(connection: Any) -> None:
            with self._unless(LibvirtError.NO_NODE_DEVICE):
                connection.nodeDeviceLookupByName(name).destroy()

        await self._call(self._work, f"take away {name}", take, BULK_SECONDS)

    def _listed(self, connection: Any) -> list[Any]:
        """Nothing from a libvirt that was installed without its driver of node devices."""
        with self._unless(LibvirtError.NO_SUPPORT):
            return list(connection.listAllDevices(int(Listed.ALL)))
        return []

    @contextlib.contextmanager
    def _unless(self, code: LibvirtError) -> Iterator[None]:
        """What is refused with this code is left out."""
        try:
            yield
        except self._driver.error as error:
            refused: Any = error
            if refused.get_error_code() != code:
                raise
