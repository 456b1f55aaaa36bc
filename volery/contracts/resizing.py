"""What a VM runs with that takes the shape of its host: as many vCPUs as that gives it, built as that is."""

from __future__ import annotations

from volery.contracts.base import Message
from volery.contracts.domain import NumaNode


class VmShape(Message):
    """Of the CPUs and memory of a VM, as one host gives them; its vCPUs are numbered socket by socket, core by core."""

    vcpus: int
    sockets: int
    cores: int
    """Of each socket."""
    threads: int
    """Of each core."""
    numa_nodes: tuple[NumaNode, ...] = ()
    """One for each of the host's cells that it has CPUs of, with its memory there. None: the host has one cell."""
