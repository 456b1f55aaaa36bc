"""Management controllers: what they say, whether they do what they are told, and the fence agent that asks them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from host_agent.fencing import Run
from sim.machines import HostMachine
from volery.contracts.fencing import FenceDevice, PowerAction, PowerAnswer, PowerState
from volery.fencing import rules
from volery.fencing.running import NOT_RUN

AGENT = "fence_sim"
"""A name that no package installs: ha never runs it itself."""
UNREACHABLE_SECONDS = 6.0
STATUS_CODES = {PowerState.ON: 0, PowerState.OFF: 2}
"""How agents end when they are asked for the power."""


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
    refuses: bool = False
    """It has another password."""
    answer_seconds: float = 0.4
    told_off: Callable[[Bmc, PowerAction], None] = lambda bmc, action: None
    """Before it obeys."""
    orders: list[PowerAction] = field(default_factory=list)

    @property
    def honest(self) -> bool:
        return self.reachable and self.obeys and not self.lies_off

    def _says(self) -> PowerState:
        """What it answers when it is asked for the power now."""
        if self.wrong_offs:
            self.wrong_offs -= 1
            return PowerState.OFF
        if self.lies_off and self.host.audible:
            return PowerState.OFF
        return PowerState.ON if self.host.on or self.host.booting is not None else PowerState.OFF

    async def do(self, action: PowerAction, ask_id: str, seconds: float) -> PowerAnswer:
        """What a fence agent answers that ran against it, and was ended after so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                answer = await self._answer(action, seconds)
        except TimeoutError:
            words = f"{AGENT} did not end within {seconds:g} s"
            answer = PowerAnswer(ask_id="", action=action, words=words, exit_code=NOT_RUN)
        return replace(answer, ask_id=ask_id)

    async def _answer(self, action: PowerAction, seconds: float) -> PowerAnswer:
        await asyncio.sleep(self.answer_seconds if self.reachable else UNREACHABLE_SECONDS)
        if not self.reachable or self.refuses:
            words = "it refuses the login" if self.reachable else "no route to the BMC"
            return PowerAnswer(ask_id="", action=action, words=words, exit_code=1)
        if action is PowerAction.IDENTITY:
            return PowerAnswer(ask_id="", action=action, identity=self.host.hardware_uuid, exit_code=0)
        if action is PowerAction.STATUS:
            state = self._says()
            return PowerAnswer(ask_id="", action=action, state=state, exit_code=STATUS_CODES[state])
        return await self._switch(action, seconds)

    async def _switch(self, action: PowerAction, seconds: float) -> PowerAnswer:
        """As agents do: what is so already is left alone, and what was ordered is waited for."""
        wanted = PowerState(action.value)
        self.orders.append(action)
        self.told_off(self, action)
        done = PowerAnswer(ask_id="", action=action, state=wanted, exit_code=0)
        if self._says() is wanted:
            return done
        if self.obeys:
            if action is PowerAction.OFF:
                self.host.lose_power()
            else:
                self.host.power_on()
        end = asyncio.get_running_loop().time() + seconds - rules.OWN_WORDS_SECONDS
        while True:
            await asyncio.sleep(self.answer_seconds)
            if self._says() is wanted:
                return done
            if asyncio.get_running_loop().time() >= end:
                words = f"timed out waiting to power {wanted.value.upper()}"
                return PowerAnswer(ask_id="", action=action, words=words, exit_code=1)


def runner(bmcs: Mapping[str, Bmc]) -> Run:
    """`volery.fencing.running.run` for BMCs in memory; a device's address is its host's name."""

    async def run(
        action: PowerAction, device: FenceDevice, secrets: Mapping[str, str], *, ask_id: str
    ) -> PowerAnswer:
        return await bmcs[device.address].do(action, ask_id, device.timeout_seconds)

    return run
