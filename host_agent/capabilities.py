"""What this host is and can do: from libvirt's capabilities, /proc, and by trying it in a throw-away namespace."""

from __future__ import annotations

import asyncio
import logging
import platform
import shutil
import socket
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from host_agent import children, cpus, host_devices, leases, listening, pins, runningxml
from host_agent.action import Host
from host_agent.hypervisor import Hypervisor
from host_agent.stats import carries_traffic
from volery.contracts.agent import HostCapabilities, HugePages, NumaCell
from volery.contracts.errors import Kind, Refused
from volery.fencing import catalog
from volery.fencing.identity import normal
from volery.setup import kvm
from volery.setup.home import Home

log = logging.getLogger("volery.agent.capabilities")

OLDEST_LIBVIRT = 8_000_000
"""8.0, of 2022: reports guests' interfaces, removes devices by alias, migrates as we ask it to."""
LIBVIRT_GUESTS = Path("/etc/systemd/system/multi-user.target.wants/libvirt-guests.service")
PROBE_SECONDS = 5.0
ORDINARY_PAGE_KIB = 4
_IN_NAMESPACE = ("unshare", "--net", "--")
_PROBES: dict[str, tuple[str, ...]] = {
    "bridge": ("ip", "link", "add", "probe0", "type", "bridge"),
    "bridge_vlan_filtering": ("ip", "link", "add", "probe0", "type", "bridge", "vlan_filtering", "1"),
    "vlan": ("ip", "link", "add", "link", "lo", "name", "probe0", "type", "vlan", "id", "5"),
    "vxlan": ("ip", "link", "add", "probe0", "type", "vxlan", "id", "5", "dstport", "4789"),
    "bond": ("ip", "link", "add", "probe0", "type", "bond"),
    "nft": ("nft", "add", "table", "inet", "probe"),
}
"""A feature, and what only works where the kernel has it."""
_BLOCK_ISCSI = ("/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib64/qemu-kvm", "/usr/lib64/qemu", "/usr/lib/qemu")


async def prepare(host: Host) -> None:
    """Once libvirt answers, before any order: refuses one that is too old, decides between KVM and emulation."""
    hypervisor = host.hypervisor
    versions = await hypervisor.versions()
    if versions.libvirt < OLDEST_LIBVIRT:
        raise Refused(
            Kind.INVALID,
            f"libvirt {numbers(versions.libvirt)} on this host is too old: Volery needs"
            f" {numbers(OLDEST_LIBVIRT)} or newer; upgrade the host's distribution",
            libvirt_version=versions.libvirt,
        )
    if hypervisor.domain_type == "auto":
        hypervisor.domain_type = "kvm" if await _kvm_works(host) else "qemu"
    log.info("domains run as type %s", hypervisor.domain_type)
    await cpus.learn(host)
    for name in await hypervisor.forbid_autostart(host.config.installation):
        log.warning("domain %s had autostart, which is off now: Volery decides where a VM runs", name)
    if LIBVIRT_GUESTS.exists():
        log.warning(
            "libvirt-guests is enabled on this host and may suspend or start VMs beside Volery: run"
            " `systemctl disable libvirt-guests`"
        )


async def _kvm_works(host: Host) -> bool:
    """Whether a guest really ran under KVM, and libvirt knows of it."""
    home = Home(Path(host.config.state_dir))
    home.run.mkdir(parents=True, exist_ok=True)
    found = await asyncio.to_thread(kvm.probe, home)
    log.info("KVM: %s", found.reason)
    return found.works and has_kvm(runningxml.parsed(await host.hypervisor.capabilities_xml()))


def numbers(version_number: int) -> str:
    """libvirt's version number as people write it."""
    return f"{version_number // 1_000_000}.{version_number // 1000 % 1000}.{version_number % 1000}"


@dataclass(slots=True)
class Describer:
    """Asks libvirt each time, and tries the kernel's features once: they don't change while the agent runs."""

    features: tuple[str, ...] | None = None

    async def describe(self, host: Host) -> HostCapabilities:
        if self.features is None:
            self.features = await probe_features()
        hypervisor = host.hypervisor
        versions = await hypervisor.versions()
        root = runningxml.parsed(await hypervisor.capabilities_xml())
        node = await hypervisor.node_info()
        cpu = _host_cpu(root)
        return HostCapabilities(
            hostname=socket.gethostname(),
            hardware_uuid=root.findtext("host/uuid", "") or _machine_uuid(),
            os=_os_name(),
            kernel=platform.release(),
            libvirt_version=versions.libvirt,
            qemu_version=versions.hypervisor,
            agent_version=agent_version(),
            arch=hypervisor.machine.arch,
            kvm=hypervisor.domain_type == "kvm",
            cpus=node.cpus,
            sockets=node.numa_cells * node.sockets,
            cores_per_socket=node.cores_per_socket,
            threads_per_core=node.threads_per_core,
            cpu_vendor=cpu[0],
            cpu_model=cpu[1],
            cpu_models=await _cpu_models(hypervisor),
            cpu_flags=_cpu_flags(),
            memory_bytes=node.memory_bytes,
            numa=numa_cells(root),
            cores=pins.cores(root),
            machines=("pc", "q35") if hypervisor.domain_type == "test" else machines(root),
            nics=physical_nics(),
            features=self.features,
            data_address=listening.address(host.config),
            migration_address=host.config.migration_address
            or host.config.data_address.rpartition(":")[0].strip("[]"),
            libvirt_uri=host.config.migration_libvirt_uri,
            dmi_uuid=dmi_uuid(Path(host.config.dmi_uuid_path)),
            fence_agents=tuple(await asyncio.to_thread(catalog.agents)),
            leases=await leases.describe(host.config),
            devices=await host_devices.describe(host),
        )


def _machine_uuid() -> str:
    """For a driver that knows no host UUID: the machine id in a UUID's form."""
    try:
        return str(uuid.UUID(Path("/etc/machine-id").read_text().strip()))
    except (OSError, ValueError):
        return ""


def dmi_uuid(path: Path) -> str:
    """The UUID that the firmware has for this machine, lower case; "" where it can't be read or is nobody's own."""
    try:
        digits = normal(path.read_text())
    except OSError:
        return ""
    return str(uuid.UUID(digits)) if digits else ""


def agent_version() -> str:
    """Of the installed package; "0" in a checkout that was never installed."""
    try:
        return version("volery")
    except PackageNotFoundError:
        return "0"


def has_kvm(capabilities: ET.Element) -> bool:
    return capabilities.find("guest/arch[@name='x86_64']/domain[@type='kvm']") is not None


def _host_cpu(capabilities: ET.Element) -> tuple[str, str]:
    """Vendor and model of the host's CPU, in libvirt's words."""
    return capabilities.findtext("host/cpu/vendor", ""), capabilities.findtext("host/cpu/model", "")


async def _cpu_models(hypervisor: Hypervisor) -> tuple[str, ...]:
    if hypervisor.domain_type == "test":
        return ()
    xml = await hypervisor.domain_capabilities_xml(hypervisor.machine.domain_type)
    return usable_models(runningxml.parsed(xml))


def usable_models(domain_capabilities: ET.Element) -> tuple[str, ...]:
    """CPU models that a domain of this type can really have here, sorted."""
    models = domain_capabilities.findall("cpu/mode[@name='custom']/model")
    return tuple(sorted(m.text or "" for m in models if m.get("usable") == "yes"))


def numa_cells(capabilities: ET.Element) -> tuple[NumaCell, ...]:
    return tuple(
        NumaCell(
            cell=int(cell.get("id", "0")),
            memory_bytes=int(cell.findtext("memory", "0")) * 1024,
            cpus=tuple(int(cpu.get("id", "0")) for cpu in cell.findall("cpus/cpu")),
            huge_pages=tuple(_huge_pages(cell)),
        )
        for cell in capabilities.findall("host/topology/cells/cell")
    )


def _huge_pages(cell: ET.Element) -> Iterator[HugePages]:
    """libvirt counts ordinary pages the same way."""
    for pages in cell.findall("pages"):
        size, count = int(pages.get("size", "0")), int(pages.text or "0")
        if size > ORDINARY_PAGE_KIB and count:
            yield HugePages(page_kib=size, count=count)


def machines(capabilities: ET.Element) -> tuple[str, ...]:
    """Machine types of 64-bit guests, with the short names (q35) that stand for the newest."""
    found: set[str] = set()
    for machine in capabilities.findall("guest/arch[@name='x86_64']/machine"):
        found.add(machine.text or "")
    return tuple(sorted(found))


def physical_nics() -> tuple[str, ...]:
    """Devices that lead out of the host and could carry a logical network."""
    return tuple(sorted(p.name for p in Path("/sys/class/net").iterdir() if carries_traffic(p.name)))


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return platform.system()


def _cpu_flags() -> tuple[str, ...]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()


async def probe_features() -> tuple[str, ...]:
    """What the kernel and the installed programs allow here."""
    results = await asyncio.gather(*(_works(command) for command in _PROBES.values()))
    found = {name for name, works in zip(_PROBES, results, strict=True) if works}
    if "nft" in found and "bridge" in found and shutil.which("dnsmasq"):
        found.add("nat")
    if any(Path(place, "block-iscsi.so").exists() for place in _BLOCK_ISCSI):
        found.add("iscsi")
    return tuple(sorted(found))


async def _works(command: tuple[str, ...]) -> bool:
    """Whether the command succeeds in a network namespace of its own, which ends with it."""
    try:
        await children.run([*_IN_NAMESPACE, *command], timeout_seconds=PROBE_SECONDS)
    except (children.ChildFailed, FileNotFoundError):
        return False
    return True
