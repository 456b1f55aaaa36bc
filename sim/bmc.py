"""Management controllers: what they say, whether they do what they are told, and the fence agent that asks them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from host_agent.fencing import Run
from sim.machines import HostMachine
from volery.contracts.fencing import FenceDevice, PowerAction, PowerAnswer, PowerState

AGENT = "fence_sim"
"""A name that no package installs: ha never runs it itself."""
UNREACHABLE_SECONDS = 6.0


@dataclass(eq=False)
class Bmc:
    host: HostMachine
    reachable: bool = True
    obeys: bool = True
    """False: it confirms nothing and switches nothing."""
    lies_off: bool = False
    """It says off, but only while its host can be heard: a lie about a silent host can't be told from the truth."""
    wrong_offs: int = 0
    """So many more answers say off that aren't true: it is in the middle of a reset."""
    answer_seconds: float = 0.4
    told_off: Callable[[Bmc, PowerAction], None] = lambda bmc, action: None
    """Before it obeys."""
    orders: list[PowerAction] = field(default_factory=list)

    @property
    def honest(self) -> bool:
        return self.reachable and self.obeys and not self.lies_off

    @property
    def state(self) -> PowerState:
        if self.lies_off and self.host.audible:
            return PowerState.OFF
        return PowerState.ON if self.host.on or self.host.booting is not None else PowerState.OFF

    async def do(self, action: PowerAction, ask_id: str) -> PowerAnswer:
        """What a fence agent answers that ran against it."""
        await asyncio.sleep(self.answer_seconds if self.reachable else UNREACHABLE_SECONDS)
        if not self.reachable:
            return PowerAnswer(ask_id=ask_id, action=action, words="no route to the BMC", exit_code=1)
        if action is PowerAction.IDENTITY:
            identity = self.host.hardware_uuid
            return PowerAnswer(ask_id=ask_id, action=action, identity=identity, exit_code=0)
        if action in (PowerAction.ON, PowerAction.OFF):
            self.orders.append(action)
            self.told_off(self, action)
            if not self.obeys:
                return PowerAnswer(ask_id=ask_id, action=action, words="it takes no orders", exit_code=1)
            if action is PowerAction.OFF:
                self.host.lose_power()
            else:
                self.host.power_on()
            await asyncio.sleep(self.answer_seconds)
        if self.wrong_offs:
            self.wrong_offs -= 1
            return PowerAnswer(ask_id=ask_id, action=action, state=PowerState.OFF, exit_code=0)
        return PowerAnswer(ask_id=ask_id, action=action, state=self.state, exit_code=0)


def runner(bmcs: Mapping[str, Bmc]) -> Run:
    """`volery.fencing.running.run` for BMCs in memory; a device's address is its host's name."""

    async def run(
        action: PowerAction, device: FenceDevice, secrets: Mapping[str, str], *, ask_id: str
    ) -> PowerAnswer:
        return await bmcs[device.address].do(action, ask_id)

    return run
