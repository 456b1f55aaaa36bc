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
    for number, allowed in enumerate(cpus.pins[: int(vcpu.text or "0")]):
        put_vcpu(root, number, allowed)
    ET.SubElement(_tune(root), "emulatorpin", cpuset=text_of(frozenset[int]().union(*cpus.pins)))


def put_vcpu(root: ET.Element, number: int, allowed: Collection[int]) -> None:
    ET.SubElement(_tune(root), "vcpupin", vcpu=str(number), cpuset=text_of(allowed))


def _tune(root: ET.Element) -> ET.Element:
    tune, vcpu = root.find("cputune"), root.find("vcpu")
    if tune is None:
        assert vcpu is not None, "every domain has vCPUs"
        tune = ET.Element("cputune")
        root.insert(list(root).index(vcpu) + 1, tune)
    return tune


def allowed(root: ET.Element, but: Collection[int] = ()) -> frozenset[int]:
    """Every CPU that something of it is bound to, these vCPUs left out; empty for what isn't bound."""
    texts = [found.get("cpuset", "") for found in root.findall("vcpu")]
    texts += [pin.get("cpuset", "") for pin in root.findall("cputune/emulatorpin")]
    texts += [cpus for vcpu, cpus in of_vcpus(root).items() if vcpu not in but]
    return frozenset[int]().union(*map(read, texts))


def of_vcpus(root: ET.Element) -> dict[int, str]:
    """vCPU → its CPUs, of those that have some said of themselves."""
    found = root.findall("cputune/vcpupin")
    return {int(pin.get("vcpu", "0")): pin.get("cpuset", "") for pin in found}


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
