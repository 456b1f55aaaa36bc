"""The host's libvirt, as the agent sees it: the only module that talks to it. No libvirt type leaves it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import libvirt
import msgspec

from host_agent import domxml, runningxml
from host_agent.audit import audit
from host_agent.config import AgentConfig
from host_agent.connections import BULK_SECONDS, OPEN_SECONDS, RESCUE_SECONDS, START_SECONDS
from host_agent.cpu_room import CpuSeat
from host_agent.events import EVENTS, EventName, HypervisorEvent, state_of
from host_agent.findings import GuestInfo, NetworkState, NodeInfo, Versions, guest_of
from host_agent.migration_parameters import MigrationParameters, MigrationStats, migration_stats
from host_agent.node_devices import NodeDevices
from host_agent.serial_console import ConsoleStream
from volery.contracts.agent import DomainReport, OpenChain, OpenLun
from volery.contracts.domain_orders import StopMethod

T = TypeVar("T")

KEEPALIVE = (2, 3)
"""Seconds between probes, and how many may be lost."""
GUEST_SECONDS = 5
"""What a guest agent gets for its answer."""
STATS = (
    libvirt.VIR_DOMAIN_STATS_STATE
    | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
    | libvirt.VIR_DOMAIN_STATS_BALLOON
    | libvirt.VIR_DOMAIN_STATS_VCPU
    | libvirt.VIR_DOMAIN_STATS_INTERFACE
    | libvirt.VIR_DOMAIN_STATS_BLOCK
)
GUEST_INFO = (
    libvirt.VIR_DOMAIN_GUEST_INFO_HOSTNAME
    | libvirt.VIR_DOMAIN_GUEST_INFO_OS
    | libvirt.VIR_DOMAIN_GUEST_INFO_INTERFACES
)
SHUTDOWN = {
    StopMethod.GUEST_AGENT: libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT,
    StopMethod.ACPI: libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN,
}
LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


@functools.cache
def _event_thread() -> None:
    """libvirt's own event loop in a thread: once per process, before the first connection.

    Not libvirtaio: every call of every connection touches the event loop from its worker thread, and neither
    libvirtaio nor uvloop may be touched from there. Keepalives also go on while Python is busy.
    """
    libvirt.registerErrorHandler(lambda *_: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()


@dataclass(frozen=True, slots=True)
class LibvirtDriver:
    """How connections are opened, listened to and dropped."""

    uri: str
    error: type[Exception] = libvirt.libvirtError

    def open(self) -> Any:
        _event_thread()
        connection = libvirt.open(self.uri)
        with contextlib.suppress(libvirt.libvirtError):  # the test driver has none
            connection.setKeepAlive(*KEEPALIVE)
        return connection

    def is_alive(self, connection: Any) -> bool:
        try:
            return bool(connection.isAlive())
        except libvirt.libvirtError:
            return False

    def close(self, connection: Any) -> None:
        """Closing is a call that can block too: never in the caller's thread."""
        threading.Thread(target=_close_quietly, args=(connection,), daemon=True).start()

    def listen(self, heard: Callable[[HypervisorEvent], None], closed: Callable[[], None]) -> Any:
        connection = self.open()
        with contextlib.suppress(libvirt.libvirtError):  # the test driver never goes away
            connection.registerCloseCallback(lambda *_: closed(), None)
        for row in EVENTS:

            def decoded(_c: Any, domain: Any, *arguments: Any, decode: Any = row.decode) -> None:
                event = decode(domain.UUIDString(), *arguments[:-1])
                if event is not None:
                    heard(event)

            with contextlib.suppress(libvirt.libvirtError):  # not every driver knows every event
                connection.domainEventRegisterAny(None, row.libvirt_id, decoded, None)
        return connection


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """A domain that ends meanwhile is left out of a list."""
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise


def _close_quietly(connection: Any) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()


class Hypervisor(NodeDevices):
    """`start` once, `close` at the end. Every method may raise Refused; `Disconnected` when libvirtd is away."""

    def __init__(self, config: AgentConfig) -> None:
        super().__init__(config, LibvirtDriver(config.libvirt_uri))
        self._audit: asyncio.Task[None] | None = None
        self._guests: dict[str, GuestInfo] = {}
        self.leaving: set[str] = set()
        """VMs that a migration is taking away from here."""
        self.domain_type = "test" if self.uri.startswith(("test:", "test+")) else config.hypervisor
        """kvm, qemu or test. `auto` becomes kvm or qemu by `capabilities.choose`; until then it counts as qemu."""

    async def start(self) -> None:
        await super().start()
        self._audit = asyncio.create_task(audit(self), name="audit")

    async def close(self) -> None:
        if self._audit is not None:
            self._audit.cancel()
            await asyncio.gather(self._audit, return_exceptions=True)
        await super().close()

    @property
    def machine(self) -> domxml.Machine:
        """What domain XML for this host needs to know."""
        return domxml.Machine("qemu" if self.domain_type == "auto" else self.domain_type)

    # What there is

    async def list_domains(self) -> list[DomainReport]:
        """Every domain of this host, also those that Volery did not make. Works while domains hang."""
        listed = await self._listing("list the domains", lambda c: self._reports(c.listAllDomains(0)))
        return await self.with_left(listed)

    async def domain(self, vm_id: str, known: DomainReport | None = None) -> DomainReport:
        """One domain now; state GONE when this host doesn't have it. `known`: only its state may differ from that."""

        def look(connection: Any) -> list[DomainReport]:
            with _unless_gone():
                domain = connection.lookupByUUIDString(vm_id)
                if known is None:
                    return self._reports([domain])
                state, reason = state_of(*domain.state(), leaving=vm_id in self.leaving)
                return [self.told(domain, msgspec.structs.replace(known, state=state, reason=reason))]
            return []

        found = await self._listing(f"look at VM {vm_id}", look)
        return found[0] if found else await self.not_listed(vm_id)

    async def domain_xml(self, vm_id: str, *, migratable: bool = False) -> str:
        """The running domain's XML, without secrets; `migratable`: as another libvirtd would want it."""
        flags = libvirt.VIR_DOMAIN_XML_MIGRATABLE if migratable else 0
        doing = f"read the configuration of VM {vm_id}"
        return await self._listing(doing, lambda c: str(c.lookupByUUIDString(vm_id).XMLDesc(flags)))

    async def open_luns(self) -> list[OpenLun]:
        """The iSCSI LUNs that are open in any domain."""
        return await self._of_active("see which LUNs are open", runningxml.luns_in)

    async def open_chains(self) -> list[tuple[str, OpenChain]]:
        """What our disks have open in every domain, and the path that each writes."""
        return await self._of_active("see which files are open", runningxml.chains_in)

    async def cpu_seats(self) -> list[CpuSeat]:
        """Which physical CPUs each domain may use."""
        return await self._of_active("see who uses which CPUs", runningxml.cpu_seats_in)

    async def _of_active(self, doing: str, read: Callable[[str, str], Iterable[T]]) -> list[T]:
        """What `read` makes of XML and id of each domain that has a process, also of those that Volery did not make."""

        def look(connection: Any) -> list[T]:
            found: list[T] = []
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with _unless_gone():
                    found += read(domain.XMLDesc(0), domain.UUIDString())
            return found

        return await self._listing(doing, look)

    async def all_domain_stats(self) -> dict[str, dict[str, Any]]:
        """libvirt's statistics by vm_id; of a domain that hangs only what is known without it."""
        flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
        flags |= libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT

        def take(connection: Any) -> dict[str, dict[str, Any]]:
            return {d.UUIDString(): stats for d, stats in connection.getAllDomainStats(STATS, flags)}

        return await self._listing("take statistics", take)

    def _reports(self, domains: list[Any]) -> list[DomainReport]:
        """In a thread. A domain that ends meanwhile is left out."""
        found = []
        for domain in domains:
            with _unless_gone():
                vm_id, (state, reason) = domain.UUIDString(), domain.state()
                root = runningxml.parsed(domain.XMLDesc(0))
                now, why = state_of(state, reason, leaving=vm_id in self.leaving)
                report = runningxml.report(root, vm_id, now, why, responsive=vm_id not in self._late)
                found.append(self.told(domain, self._with_guest(report)))
        return found

    def _with_guest(self, report: DomainReport) -> DomainReport:
        if (guest := self._guests.get(report.vm_id)) is None or not report.agent_connected:
            return report
        seen = {"hostname": guest.hostname, "ip_addresses": guest.ip_addresses, "guest_os": guest.os}
        return msgspec.structs.replace(report, **seen)

    async def capabilities_xml(self) -> str:
        doing = "read the host's capabilities"
        return await self._call(self._bulk, doing, lambda c: str(c.getCapabilities()), START_SECONDS)

    async def domain_capabilities_xml(
        self, domain_type: str, machine: str = "q35", arch: str = "x86_64"
    ) -> str:
        def read(connection: Any) -> str:
            return str(connection.getDomainCapabilities(None, arch, machine, domain_type))

        return await self._call(self._bulk, f"read what {domain_type} domains can have", read, START_SECONDS)

    async def versions(self) -> Versions:
        return await self._call(
            self._bulk, "read versions", lambda c: Versions(c.getLibVersion(), c.getVersion()), START_SECONDS
        )

    async def node_info(self) -> NodeInfo:
        def read(connection: Any) -> NodeInfo:
            _, memory_mib, cpus, _, cells, sockets, cores, threads = connection.getInfo()
            return NodeInfo(memory_mib << 20, cpus, cells, sockets, cores, threads)

        return await self._call(self._bulk, "read the host's size", read, BULK_SECONDS)

    async def forbid_autostart(self, installation: str) -> list[str]:
        """Domains of ours that libvirtd would start by itself don't any more; their names."""

        def forbid(connection: Any) -> list[str]:
            found = []
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_AUTOSTART):
                metadata = runningxml.metadata_of(runningxml.parsed(domain.XMLDesc(0)))
                if metadata is not None and metadata.installation == installation:
                    domain.setAutostart(0)
                    found.append(domain.name())
            return found

        return await self._call(self._bulk, "look for domains with autostart", forbid, BULK_SECONDS)

    # A domain's life

    async def create(self, xml: str, *, paused: bool = False) -> None:
        """Start a transient domain. Refused(conflict) when one of this id or name is here."""
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0

        def start(connection: Any) -> None:
            if self.domain_type == "test":  # that driver knows no flags
                domain = connection.createXML(xml, 0)
                if paused:
                    domain.suspend()
            else:
                connection.createXML(xml, flags)

        await self._call(self._work, "start the VM", start, START_SECONDS)

    async def restore(self, path: str, xml: str, *, paused: bool = False) -> None:
        """Start a domain from its saved memory with this XML, which must describe the same machine."""
        flags = libvirt.VIR_DOMAIN_SAVE_PAUSED if paused else libvirt.VIR_DOMAIN_SAVE_RUNNING

        def restore(connection: Any) -> None:
            if self.domain_type == "test":  # that driver knows neither flags nor another XML
                connection.restore(path)
                if paused:
                    saved = runningxml.parsed(connection.saveImageGetXMLDesc(path, 0))
                    connection.lookupByUUIDString(saved.findtext("uuid")).suspend()
            else:
                connection.restoreFlags(path, xml, flags)

        await self._call(self._work, f"restore the VM from {path}", restore, START_SECONDS)

    async def saved_xml(self, path: str) -> str:
        """The domain XML inside a saved memory image, as another restore would want it."""
        flags = libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE
        doing = f"read the saved memory {path}"
        return await self._call(
            self._work, doing, lambda c: str(c.saveImageGetXMLDesc(path, flags)), BULK_SECONDS
        )

    async def save(self, vm_id: str, path: str, seconds: float) -> None:
        """Memory to a file, then QEMU ends."""
        await self._on(vm_id, "suspend to disk", lambda d: d.save(path), seconds, long=True)

    async def reset(self, vm_id: str) -> None:
        """The reset button; also of a domain that hangs."""
        await self._rescue_call(vm_id, "reset", lambda d: d.reset(0))

    async def shutdown(self, vm_id: str, method: StopMethod) -> None:
        """Ask the guest to power off; returns when it was asked."""
        if method is StopMethod.DESTROY:
            await self.destroy(vm_id)
            return
        doing = f"ask by {method.value.replace('_', ' ')} for a shutdown of"
        await self._on(vm_id, doing, lambda d: d.shutdownFlags(SHUTDOWN[method]), 2.0 * GUEST_SECONDS)

    async def pause(self, vm_id: str) -> None:
        await self._on(vm_id, "pause", lambda d: d.suspend())

    async def resume(self, vm_id: str) -> None:
        await self._on(vm_id, "resume", lambda d: d.resume())

    async def reboot(self, vm_id: str) -> None:
        """Ask the guest to reboot, by its agent if it has one, else by ACPI."""
        await self._on(vm_id, "reboot", lambda d: d.reboot(0), 2.0 * GUEST_SECONDS)

    async def set_metadata(self, vm_id: str, element: str) -> None:
        """Replace what Volery keeps in the domain (`domxml.metadata_xml`)."""
        kind, uri = libvirt.VIR_DOMAIN_METADATA_ELEMENT, domxml.NAMESPACE
        await self._on(vm_id, "mark", lambda d: d.setMetadata(kind, element, "volery", uri, LIVE))

    # Devices

    async def attach_device(self, vm_id: str, xml: str) -> None:
        await self._on(vm_id, "plug a device into", lambda d: d.attachDeviceFlags(xml, LIVE))

    async def detach_device(self, vm_id: str, alias: str) -> None:
        """Asks the guest; DEVICE_REMOVED tells when it has let go."""
        await self._on(vm_id, f"unplug {alias} from", lambda d: d.detachDeviceAlias(alias, LIVE))

    async def update_device(self, vm_id: str, xml: str, *, force: bool = False) -> None:
        flags = LIVE | (libvirt.VIR_DOMAIN_DEVICE_MODIFY_FORCE if force else 0)
        await self._on(vm_id, "change a device of", lambda d: d.updateDeviceFlags(xml, flags))

    async def block_resize(self, vm_id: str, target: str, size_bytes: int) -> None:
        flags = libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES
        await self._on(vm_id, f"resize disk {target} of", lambda d: d.blockResize(target, size_bytes, flags))

    async def block_size(self, vm_id: str, target: str) -> int:
        """Bytes that the guest sees."""
        return int(await self._on(vm_id, f"measure disk {target} of", lambda d: d.blockInfo(target)[0]))

    async def snapshot_disks(self, vm_id: str, xml: str) -> None:
        """QEMU goes on in other files, for all disks in the XML (`switching`) at one moment or for none."""
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        await self._on(vm_id, "make a snapshot of", lambda d: d.snapshotCreateXML(xml, flags))

    # Migration

    async def migrate(self, vm_id: str, parameters: MigrationParameters, seconds: float) -> None:
        """Returns when the VM runs on the destination; raises Refused while it runs here as before."""

        def move(domain: Any) -> None:
            domain.migrateToURI3(parameters.destination_uri, parameters.params, parameters.flags)

        self.leaving.add(vm_id)
        try:
            await self._on(vm_id, "migrate", move, seconds, long=True)
        finally:
            self.leaving.discard(vm_id)

    async def set_max_downtime(self, vm_id: str, milliseconds: int) -> None:
        """How long the VM may stand still at the end of its migration; may be set before and while it runs."""
        doing = "set the downtime of"
        await self._rescue_call(vm_id, doing, lambda d: d.migrateSetMaxDowntime(milliseconds), BULK_SECONDS)

    async def start_post_copy(self, vm_id: str) -> None:
        doing = "switch to post-copy"
        await self._rescue_call(vm_id, doing, lambda d: d.migrateStartPostCopy(0), BULK_SECONDS)

    async def abort_job(self, vm_id: str) -> None:
        """End a running migration, save or dump; the VM goes on here."""
        await self._rescue_call(vm_id, "abort the running job of", lambda d: d.abortJob())

    async def job_stats(self, vm_id: str) -> MigrationStats:
        doing = f"ask how far the migration of VM {vm_id} is"
        return await self._call(
            self._bulk, doing, lambda c: migration_stats(c.lookupByUUIDString(vm_id).jobStats()), BULK_SECONDS
        )

    # The guest's agent

    async def guest_info(self, vm_id: str) -> GuestInfo:
        """Asked of one guest at a time, with a time limit: a stuck agent delays no order."""

        def ask(domain: Any) -> Any:
            domain.agentSetResponseTimeout(GUEST_SECONDS)
            return domain.guestInfo(GUEST_INFO, 0)

        async with self._guest_turns:
            doing = f"ask the guest agent of VM {vm_id}"
            return guest_of(
                await self._domain_call(self._work, vm_id, doing, ask, 4.0 * GUEST_SECONDS, marks=False)
            )

    def remember_guest(self, vm_id: str, info: GuestInfo | None) -> None:
        """Goes into the domain's reports from now on; None: its agent is gone."""
        if info != self._guests.get(vm_id):
            if info is None:
                del self._guests[vm_id]
            else:
                self._guests[vm_id] = info
            self.emit(HypervisorEvent(EventName.GUEST_CHANGED, vm_id))

    # Secrets and networks

    async def put_secret(self, xml: str, value: str) -> None:
        """Define a secret and set its value; a repeat replaces it."""
        await self._call(
            self._work,
            "keep the storage's password",
            lambda c: c.secretDefineXML(xml, 0).setValue(value.encode(), 0),
            BULK_SECONDS,
        )

    async def networks(self) -> list[NetworkState]:
        def read(connection: Any) -> list[NetworkState]:
            found = []
            for network in connection.listAllNetworks(0):
                xml = network.XMLDesc(0)
                bridge = runningxml.parsed(xml).find("bridge")
                name = bridge.get("name", "") if bridge is not None else ""
                found.append(NetworkState(network.name(), bool(network.isActive()), name, xml))
            return found

        return await self._listing("list the networks", read)

    async def create_network(self, xml: str) -> None:
        """Start a transient network."""
        await self._call(self._work, "start the network", lambda c: c.networkCreateXML(xml), START_SECONDS)

    async def destroy_network(self, name: str) -> None:
        """End a network; one that doesn't exist is a success."""

        def end(connection: Any) -> None:
            for network in connection.listAllNetworks(0):
                if network.name() == name:
                    persistent = network.isPersistent()
                    if network.isActive():
                        network.destroy()
                    if persistent:
                        network.undefine()

        await self._call(self._work, f"end the network {name}", end, RESCUE_SECONDS)

    # The serial console

    async def open_console(self, vm_id: str) -> ConsoleStream:
        """The domain's serial console. Whoever had it open before loses it."""
        loop = asyncio.get_running_loop()

        def attach() -> ConsoleStream:
            connection = self._driver.open()
            try:
                stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
                domain = connection.lookupByUUIDString(vm_id)
                domain.openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE)
            except libvirt.libvirtError:
                self._driver.close(connection)
                raise
            console = ConsoleStream(
                loop, stream, lambda: self._driver.close(connection), libvirt.libvirtError
            )
            console.listen()
            return console

        doing = f"open the console of VM {vm_id}"
        return await self._call(self._rescue, doing, lambda _: attach(), OPEN_SECONDS)

    async def open_graphics(self, vm_id: str) -> socket.socket:
        """A connection to the domain's VNC server, handed over by QEMU itself: no port that another VM may have now."""

        def hand_over(domain: Any) -> socket.socket:
            descriptor = domain.openGraphicsFD(0, libvirt.VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH)
            return socket.socket(fileno=descriptor)

        doing = f"open the VNC console of VM {vm_id}"
        return await self._domain_call(self._work, vm_id, doing, hand_over, OPEN_SECONDS, marks=True)
