"""Physical CPUs in a domain's XML: which its vCPUs and QEMU's own threads run on. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection

from volery.contracts.cpus import CpuCore, GivenCpus


def text_of(cpus: Collection[int]) -> str:
    """As libvirt and we write them: "0,2,3"."""
    return ",".join(map(str, sorted(cpus)))


def read(text: str) -> frozenset[int]:
    """Also ranges, and what is taken out of them: "0-3,^2,8"."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.removeprefix("^").partition("-")
        cpus = range(int(first), int(last or first) + 1)
        found = found.difference(cpus) if part.startswith("^") else found.union(cpus)
    return frozenset(found)


def put(root: ET.Element, cpus: GivenCpus | None, shared: Collection[int] | None) -> None:
    """What a pinned domain got; any other may use the CPUs that are shared, which is all of them when that is None."""
    vcpu = root.find("vcpu")
    assert vcpu is not None, "every domain has vCPUs"
    vcpu.attrib.pop("cpuset", None)
    tune = root.find("cputune")
    if tune is not None:
        for tag in ("vcpupin", "emulatorpin"):
            for old in tune.findall(tag):
                tune.remove(old)
    if cpus is None:
        if shared is not None:
            vcpu.set("cpuset", text_of(shared))
        return
    if tune is None:
        tune = ET.Element("cputune")
        root.insert(list(root).index(vcpu) + 1, tune)
    for number, allowed in enumerate(cpus.pins[: int(vcpu.text or "0")]):
        ET.SubElement(tune, "vcpupin", vcpu=str(number), cpuset=text_of(allowed))
    ET.SubElement(tune, "emulatorpin", cpuset=text_of(frozenset[int]().union(*cpus.pins)))


def allowed(root: ET.Element) -> frozenset[int]:
    """Every CPU that something of it is bound to; empty for a domain that isn't bound."""
    texts = [found.get("cpuset", "") for found in root.findall("vcpu")]
    texts += [
        pin.get("cpuset", "") for tag in ("vcpupin", "emulatorpin") for pin in root.findall(f"cputune/{tag}")
    ]
    return frozenset[int]().union(*map(read, texts))


def cores(capabilities: ET.Element) -> tuple[CpuCore, ...]:
    """The host's cores from libvirt's capabilities, in the order of their first threads; none where it doesn't say which
    threads are siblings."""
    found: dict[tuple[int, ...], CpuCore] = {}
    for cell in capabilities.findall("host/topology/cells/cell"):
        for cpu in cell.findall("cpus/cpu"):
            threads = tuple(sorted(read(cpu.get("siblings", ""))))
            if not threads:
                return ()
            socket = int(cpu.get("socket_id", "0"))
            found[threads] = CpuCore(cell=int(cell.get("id", "0")), socket=socket, cpus=threads)
    return tuple(found[threads] for threads in sorted(found))
