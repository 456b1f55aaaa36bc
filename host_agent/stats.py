"""Samples of the host and its domains: one bulk call to libvirt that waits for no domain, and /proc."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from host_agent import huge_pages, runningxml
from host_agent.action import Host
from host_agent.events import EventName, HypervisorEvent
from volery.contracts.domain import DomainState
from volery.contracts.errors import Refused
from volery.contracts.metrics import DiskSample, HostSample, NicSample, VmSample
from volery.runtime.clock import monotonic, utc_now

_DISK = {
    "read_bytes": "rd.bytes",
    "written_bytes": "wr.bytes",
    "read_requests": "rd.reqs",
    "write_requests": "wr.reqs",
    "allocated_bytes": "allocation",
}
_NIC = {
    "received_bytes": ("rx.bytes",),
    "sent_bytes": ("tx.bytes",),
    "received_packets": ("rx.pkts",),
    "sent_packets": ("tx.pkts",),
    "dropped_packets": ("rx.drop", "tx.drop"),
}


@dataclass(frozen=True, slots=True)
class Names:
    """A running domain's device names, by what libvirt's statistics call them."""

    disks: Mapping[str, str]
    """disk_id by target (vda)."""
    nics: Mapping[str, str]
    """nic_id by the host's device (vnet0)."""
    ours: bool


@dataclass(slots=True)
class Sampler:
    """Keeps what deltas need: the last CPU times. One per agent."""

    clock: Callable[[], float] = monotonic
    _cpu: dict[str, tuple[float, int]] = field(default_factory=dict)
    _names: dict[str, Names] = field(default_factory=dict)
    _listening: bool = False

    async def sample(self, host: Host) -> HostSample:
        """Everything now. A host without libvirt has no `vms`; raises nothing but cancellation."""
        if not self._listening:
            host.hypervisor.on_event(self._forget)
            psutil.cpu_percent(None)
            self._listening = True
        vms: list[VmSample] = []
        try:
            stats = await host.hypervisor.all_domain_stats()
            now = self.clock()
            for vm_id, values in stats.items():
                names = await self._names_of(host, vm_id, values)
                if names.ours:
                    vms.append(vm_sample(vm_id, values, names, self._cpu_percent(vm_id, values, now)))
            self._cpu = {vm_id: cpu for vm_id, cpu in self._cpu.items() if vm_id in stats}
            self._names = {vm_id: names for vm_id, names in self._names.items() if vm_id in stats}
        except Refused:
            vms.clear()
        return _host_sample(host, tuple(vms))

    def _forget(self, event: HypervisorEvent) -> None:
        if event.state in (DomainState.GONE, DomainState.RUNNING) or event.name in (
            EventName.DEVICE_ADDED,
            EventName.DEVICE_REMOVED,
        ):
            self._names.pop(event.vm_id, None)

    async def _names_of(self, host: Host, vm_id: str, values: Mapping[str, Any]) -> Names:
        names = self._names.get(vm_id)
        if names is None:
            root = runningxml.parsed(await host.hypervisor.domain_xml(vm_id))
            names = self._names[vm_id] = Names(
                disks={d.target: d.ident for d in runningxml.disks_of(root).values()},
                nics={d.target: d.ident for d in runningxml.nics_of(root).values()},
                ours=runningxml.metadata_of(root) is not None,
            )
        return names

    def _cpu_percent(self, vm_id: str, values: Mapping[str, Any], now: float) -> float:
        used = cpu_nanoseconds(values)
        before = self._cpu.get(vm_id)
        self._cpu[vm_id] = (now, used)
        if before is None or now <= before[0] or used < before[1]:
            return 0.0
        return round((used - before[1]) / (now - before[0]) / 1e7, 2)


def cpu_nanoseconds(values: Mapping[str, Any]) -> int:
    """Of the whole QEMU where its control group says so, else of its vCPUs."""
    if "cpu.time" in values:
        return int(values["cpu.time"])
    return sum(int(values.get(f"vcpu.{i}.time", 0)) for i in range(values.get("vcpu.maximum", 0)))


def vm_sample(vm_id: str, values: Mapping[str, Any], names: Names, cpu_percent: float) -> VmSample:
    """libvirt's statistics of one domain, with our ids for its devices; what has no id of ours is left out."""
    available, usable = values.get("balloon.available"), values.get("balloon.usable")
    used_kib = available - usable if available and usable is not None else values.get("balloon.rss", 0)
    return VmSample(
        vm_id=vm_id,
        cpu_percent=cpu_percent,
        memory_used_bytes=max(0, used_kib) * 1024,
        memory_bytes=values.get("balloon.current", 0) * 1024,
        disks=tuple(
            DiskSample(
                disk_id=names.disks[values[f"block.{i}.name"]],
                **{name: values.get(f"block.{i}.{key}", 0) for name, key in _DISK.items()},
            )
            for i in range(values.get("block.count", 0))
            if values.get(f"block.{i}.name") in names.disks
        ),
        nics=tuple(
            NicSample(
                nic_id=names.nics[values[f"net.{i}.name"]],
                **{name: sum(values.get(f"net.{i}.{k}", 0) for k in keys) for name, keys in _NIC.items()},
            )
            for i in range(values.get("net.count", 0))
            if values.get(f"net.{i}.name") in names.nics
        ),
    )


def _host_sample(host: Host, vms: tuple[VmSample, ...]) -> HostSample:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    received, sent = _traffic()
    return HostSample(
        host_id=host.host_id,
        boot_id=Path(host.config.boot_id_path).read_text().strip(),
        at=utc_now(),
        cpu_percent=psutil.cpu_percent(None),
        memory_used_bytes=memory.total - memory.available,
        memory_bytes=memory.total,
        swap_used_bytes=swap.used,
        load=os.getloadavg()[0],
        received_bytes=received,
        sent_bytes=sent,
        huge_pages=huge_pages.read(),
        vms=vms,
    )


def carries_traffic(device: str) -> bool:
    """Whether a network device leads out of the host: not loopback, a guest's tap, a bridge or a tunnel."""
    path = Path("/sys/class/net") / device
    inner = any((path / name).exists() for name in ("bridge", "tun_flags"))
    return device != "lo" and not inner and not device.startswith(("vxlan", "vnet", "ifb", "dummy"))


def _traffic() -> tuple[int, int]:
    counters = [c for name, c in psutil.net_io_counters(pernic=True).items() if carries_traffic(name)]
    return sum(c.bytes_recv for c in counters), sum(c.bytes_sent for c in counters)
