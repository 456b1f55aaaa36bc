"""TCP ports for servers that must be told theirs before they start."""

from __future__ import annotations

from volery.setup.processes import free_port


def free_ports(count: int) -> list[int]:
    """Different ones that the kernel gives to nobody's outgoing connection meanwhile, such as another worker's."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return sorted(found)
