"""What becomes of VMs whose hosts are lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Homeless:
    """A VM without a place, and why."""

    vm_id: str
    name: str
    from_host_id: str
    message: str
    change: str


@dataclass(frozen=True, slots=True)
class Loss:
    """What becomes of the protected VMs of hosts that are lost together."""

    hosts: tuple[str, ...]
    places: Mapping[str, str]
    """VM → where it goes."""
    homeless: tuple[Homeless, ...] = ()
