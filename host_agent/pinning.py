"""Guests moved to other physical CPUs while they run."""

from __future__ import annotations

from collections.abc import Collection
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

    async def pin(self, vm_id: str, cpus: Collection[int]) -> None:
        """Each vCPU and QEMU's own threads run on these CPUs from now on. Done when they have left all others."""
        chosen = tuple(cpu in cpus for cpu in range(max(cpus) + 1))

        def move(domain: Any) -> None:
            for vcpu in range(domain.info()[VCPUS]):
                domain.pinVcpu(vcpu, chosen)
            domain.pinEmulator(chosen)

        await self._on(vm_id, "move to other CPUs of the host", move)
