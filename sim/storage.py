"""Storage that all hosts share, in memory: who has which volume open for writing, and what agents are ordered to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from host_agent.action import Action, Host, Running
from host_agent.volumes import check_size
from volery.contracts.agent import BridgeReport, StorageDomainReport, VolumeReport
from volery.contracts.base import Done, Order
from volery.contracts.domain import FileSource
from volery.contracts.errors import Kind, Refused, conflict, invalid, not_found
from volery.contracts.network_orders import APPLY_NETWORKS, ApplyNetworks, NetworksApplied
from volery.contracts.volume_orders import (
    CONNECT_STORAGE,
    CREATE_VOLUME,
    DELETE_VOLUME,
    DISCONNECT_STORAGE,
    RESIZE_VOLUME,
    ConnectStorage,
    CreateVolume,
    DeleteVolume,
    DirectoryLocation,
    DisconnectStorage,
    ResizeVolume,
    VolumeInfo,
)

GIB = 1 << 30
WORK_SECONDS = 0.05


@dataclass
class Shelf:
    """A directory that every host has mounted."""

    markers: set[tuple[str, str]] = field(default_factory=set)
    """(path, domain id)"""
    volumes: dict[str, VolumeReport] = field(default_factory=dict)
    writers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Volume → host → what writes it."""
    on_two_writers: Callable[[str, dict[str, str]], None] = lambda path, writers: None
    up: bool = True

    def opened(self, path: str, host: str, what: str) -> None:
        writers = self.writers.setdefault(path, {})
        writers[host] = what
        if len(writers) > 1:
            self.on_two_writers(path, writers)

    def closed(self, path: str, host: str) -> None:
        self.writers.get(path, {}).pop(host, None)

    def put(self, source: FileSource, size_bytes: int) -> VolumeInfo:
        self.volumes[source.path] = VolumeReport(
            path=source.path, size_bytes=size_bytes, used_bytes=1 << 20, format=source.format
        )
        return self.info(source)

    def info(self, source: FileSource) -> VolumeInfo:
        known = self.volumes[source.path]
        return VolumeInfo(size_bytes=known.size_bytes, used_bytes=known.used_bytes, format=known.format)

    def refuse_in_use(self, path: str) -> None:
        if self.writers.get(path):
            raise conflict(f"{path} is in use: a running VM or an image program has it open")


@dataclass
class HostStorage:
    """What one host has connected."""

    shelf: Shelf
    connected: dict[str, str] = field(default_factory=dict)
    """Domain → path, on the host's disk: the agent that is started next knows it, too."""
    reachable: Callable[[], bool] = lambda: True
    mounts: set[str] = field(default_factory=set)
    """Of the machine: they outlive the agent, not the boot."""

    def look(self, domain_id: str) -> StorageDomainReport:
        top = f"{self.connected[domain_id]}/{domain_id}"
        if not self.reachable() or top not in self.mounts:
            problem = "it doesn't answer" if top in self.mounts else "it isn't mounted"
            return StorageDomainReport(domain_id=domain_id, reachable=False, problem=problem)
        return StorageDomainReport(
            domain_id=domain_id,
            reachable=True,
            capacity_bytes=1000 * GIB,
            available_bytes=900 * GIB,
            volumes=tuple(v for p, v in self.shelf.volumes.items() if p.startswith(f"{top}/")),
        )

    async def report(self, host: Host) -> tuple[StorageDomainReport, ...]:
        return tuple(self.look(domain_id) for domain_id in self.connected)

    def actions(self) -> tuple[Action[Any, Any], ...]:
        def row(order: Order[Any, Any], act: Callable[[Any], Any]) -> Action[Any, Any]:
            async def run(host: Host, ask: Any, running: Running) -> Any:
                await asyncio.sleep(WORK_SECONDS)
                if order is not DISCONNECT_STORAGE and not self.reachable():
                    raise Refused(Kind.UNAVAILABLE, "the storage doesn't answer; mend its network")
                return act(ask)

            return Action(order, run)

        return (
            row(CONNECT_STORAGE, self._connect),
            row(DISCONNECT_STORAGE, self._disconnect),
            row(CREATE_VOLUME, self._create),
            row(RESIZE_VOLUME, self._resize),
            row(DELETE_VOLUME, self._delete),
        )

    def _connect(self, ask: ConnectStorage) -> StorageDomainReport:
        assert isinstance(ask.location, DirectoryLocation)
        path = ask.location.path
        if ask.initialise:
            self.shelf.markers.add((path, ask.domain_id))
        if (path, ask.domain_id) not in self.shelf.markers:
            raise Refused(Kind.NOT_FOUND, f"{path} has no storage domain {ask.domain_id}")
        self.connected[ask.domain_id] = path
        self.mounts.add(f"{path}/{ask.domain_id}")
        return self.look(ask.domain_id)

    def _disconnect(self, ask: DisconnectStorage) -> Done:
        path = self.connected.pop(ask.domain_id, "")
        self.mounts.discard(f"{path}/{ask.domain_id}")
        return Done()

    def _own(self, ask: CreateVolume | ResizeVolume | DeleteVolume) -> FileSource:
        """Where the disk's volume is, if that is in a connected domain."""
        source = ask.source
        assert isinstance(source, FileSource)
        for domain_id, path in self.connected.items():
            if source.path == f"{path}/{domain_id}/disks/{ask.disk_id}.{source.format}":
                return source
        raise invalid(f"{source.path} isn't the place of disk {ask.disk_id} in a connected storage domain")

    def _create(self, ask: CreateVolume) -> VolumeInfo:
        check_size(ask.size_bytes)
        source = self._own(ask)
        if source.path not in self.shelf.volumes:
            return self.shelf.put(source, ask.size_bytes)
        known = self.shelf.info(source)
        if known.size_bytes != ask.size_bytes:
            raise conflict(f"{source.path} is already there", size_bytes=known.size_bytes)
        return known

    def _resize(self, ask: ResizeVolume) -> VolumeInfo:
        check_size(ask.size_bytes)
        source = self._own(ask)
        if source.path not in self.shelf.volumes:
            raise not_found("volume", source.path)
        known = self.shelf.info(source)
        if ask.size_bytes < known.size_bytes:
            raise invalid(f"disk {ask.disk_id} can't shrink", size_bytes=known.size_bytes)
        if ask.size_bytes == known.size_bytes:
            return known
        self.shelf.refuse_in_use(source.path)
        return self.shelf.put(source, ask.size_bytes)

    def _delete(self, ask: DeleteVolume) -> Done:
        source = self._own(ask)
        self.shelf.refuse_in_use(source.path)
        self.shelf.volumes.pop(source.path, None)
        return Done()


@dataclass
class HostNetworks:
    """The logical networks of one host: they do whatever they are told."""

    networks: tuple[BridgeReport, ...] = ()

    async def report(self, host: Host) -> tuple[BridgeReport, ...]:
        return self.networks

    def actions(self) -> tuple[Action[Any, Any], ...]:
        return (Action(APPLY_NETWORKS, self._apply),)

    async def _apply(self, host: Host, ask: ApplyNetworks, running: Running) -> NetworksApplied:
        await asyncio.sleep(WORK_SECONDS)
        self.networks = tuple(
            BridgeReport(network_id=n.network_id, bridge=n.bridge, in_sync=True) for n in ask.networks
        )
        return NetworksApplied(networks=self.networks)
