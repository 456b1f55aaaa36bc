"""Guests moved to other physical CPUs while they run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from host_agent.config import AgentConfig
from host_agent.connections import Driver
from host_agent.cpu_room import CpuRoom
from host_agent.killing import Killing

VCPUS = 3
"""Where a domain's info has their number."""


class Pinning(Killing):
    """`pin`, and who has which CPUs alone."""

    def __init__(self, config: AgentConfig, driver: Driver) -> None:
        super().__init__(config, driver)
        self.cpus = CpuRoom()

    async def pin(
        self,
        vm_id: str,
        cpus: Collection[int],
        vcpus: Mapping[int, Collection[int]] = MappingProxyType({}),
    ) -> None:
        """Each vCPU and QEMU's own threads run on these CPUs from now on, some vCPUs on CPUs of their own. Done when they have
        left all others."""

        def move(domain: Any) -> None:
            for vcpu in range(domain.info()[VCPUS]):
                domain.pinVcpu(vcpu, _map(vcpus.get(vcpu, cpus)))
            domain.pinEmulator(_map(cpus))

        await self._on(vm_id, "move to other CPUs of the host", move)


def _map(cpus: Collection[int]) -> tuple[bool, ...]:
    return tuple(cpu in cpus for cpu in range(max(cpus) + 1))
