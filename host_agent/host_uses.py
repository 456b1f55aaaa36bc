"""What the host uses of its own devices: disks that it mounts or builds volumes of, network interfaces that have addresses or
are part of others. From /sys and /proc."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from host_agent.node_xml import Uses

HUB = "09"
"""bDeviceClass of USB hubs."""


def find(ground: Path = Path("/"), addressed: frozenset[str] | None = None) -> Uses:
    """Reads files, so call it in a thread. `addressed`: the interfaces that have addresses; None: asks the kernel."""
    named = _addressed() if addressed is None else addressed
    paths: dict[str, str] = {}
    for name, path in _entries(ground, "sys/class/block"):
        if reason := _disk(ground, name, path):
            paths[_shown(ground, path)] = f"its disk {name} {reason}"
    for name, path in _entries(ground, "sys/class/net"):
        if reason := _interface(name, path, named):
            paths[_shown(ground, path)] = f"its network interface {name} {reason}"
    hubs = (p for _, p in _entries(ground, "sys/bus/usb/devices") if _text(p / "bDeviceClass") == HUB)
    return Uses(paths, frozenset(_shown(ground, path) for path in hubs))


def _entries(ground: Path, place: str) -> Iterator[tuple[str, Path]]:
    """Links of a class to where the devices are."""
    folder = ground / place
    if folder.is_dir():
        for entry in sorted(folder.iterdir()):
            yield entry.name, entry.resolve()


def _shown(ground: Path, path: Path) -> str:
    """As libvirt says it."""
    return f"/{path.relative_to(ground.resolve())}"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _disk(ground: Path, name: str, path: Path) -> str:
    if any((path / "holders").glob("*")):
        return "is part of a volume of the host"
    mounted = _mounted(ground)
    if _text(path / "dev") in mounted or f"/dev/{name}" in mounted:
        return "is mounted"
    return "is swapped to" if f"/dev/{name}" in _text(ground / "proc/swaps").split() else ""


def _mounted(ground: Path) -> Mapping[str, str]:
    """Device numbers and paths of what is mounted. Some file systems have a number of their own and tell the path only."""
    found: dict[str, str] = {}
    for line in _text(ground / "proc/self/mountinfo").splitlines():
        words = line.split()
        source = words[words.index("-") + 2] if "-" in words[:-2] else ""
        found |= {words[2]: source, source: source}
    return found


def _interface(name: str, path: Path, addressed: frozenset[str]) -> str:
    above = sorted(entry.name.removeprefix("upper_") for entry in path.glob("upper_*"))
    if above:
        return f"is part of {above[0]}"
    return "has an address" if name in addressed else ""


def _addressed() -> frozenset[str]:
    """Link-local addresses come by themselves."""
    return frozenset(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(
            a.family == socket.AF_INET
            or (a.family == socket.AF_INET6 and not a.address.lower().startswith("fe80"))
            for a in addresses
        )
    )
