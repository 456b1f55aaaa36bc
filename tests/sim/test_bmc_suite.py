"""A BMC in memory answers as the real fence agents do against Redfish and IPMI: one suite for all of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from msgspec.structs import replace

from lab.bmc import make_certificate
from lab.board import Fault
from sim.bmc import AGENT, Bmc, runner
from sim.clocks import Time
from sim.loop import new_loop
from sim.machines import HostMachine
from sim.nats import NatsServer
from tests.support import machines
from tests.support.machines import Machine
from volery.contracts.fencing import FenceDevice, PowerAction, PowerAnswer, PowerState
from volery.fencing import running
from volery.fencing.confirm import confirm_off
from volery.fencing.identity import same_machine

pytestmark = pytest.mark.timeout(120)

STATUS, ON, OFF, IDENTITY = (PowerAction.STATUS, PowerAction.ON, PowerAction.OFF, PowerAction.IDENTITY)
SAYS_ON, SAYS_OFF, SAYS_NOTHING = ((PowerState.ON, 0), (PowerState.OFF, 2), (PowerState.UNKNOWN, 1))
"""State and exit code of a status."""
SHORT_SECONDS, GIVES_UP_SECONDS = 6.0, 3.0


class Board(Protocol):
    """A machine that is on, and its BMC."""

    async def act(self, action: PowerAction, seconds: float = 60.0) -> PowerAnswer:
        """What a fence agent comes to that has so much time."""

    def is_on(self) -> bool: ...

    @property
    def dmi_uuid(self) -> str:
        """The machine's, as its own firmware says it."""

    def breaks(self, fault: Fault) -> None: ...

    def unplug(self) -> None:
        """The BMC's own cable."""


Case = Callable[[Board], Awaitable[None]]


async def said(board: Board, action: PowerAction, seconds: float = 60.0) -> tuple[PowerState, int]:
    answer = await board.act(action, seconds)
    assert (answer.action, answer.identity) == (action, "")
    return answer.state, answer.exit_code


async def power_is_read_and_switched(board: Board) -> None:
    assert await said(board, STATUS) == SAYS_ON
    assert await said(board, ON) == (PowerState.ON, 0)
    assert board.is_on()
    assert await said(board, OFF) == (PowerState.OFF, 0)
    assert not board.is_on()
    assert await said(board, STATUS) == SAYS_OFF
    assert await said(board, OFF) == (PowerState.OFF, 0)
    assert await said(board, ON) == (PowerState.ON, 0)
    assert await said(board, STATUS) == SAYS_ON


async def off_is_confirmed_by_two_looks(board: Board) -> None:
    confirmed = await confirm_off(board.act)
    assert (confirmed.off, [a.action for a in confirmed.answers]) == (True, [OFF, STATUS, STATUS])
    assert not board.is_on()


async def it_says_whose_it_is(board: Board) -> None:
    answer = await board.act(IDENTITY)
    assert (answer.state, answer.exit_code) == (PowerState.UNKNOWN, 0)
    assert answer.identity == answer.identity.lower()
    assert same_machine(answer.identity, board.dmi_uuid)


async def one_that_switches_nothing_confirms_nothing(board: Board) -> None:
    board.breaks(Fault.SAYS_ON)
    state, exit_code = await said(board, OFF, SHORT_SECONDS)
    assert state is PowerState.UNKNOWN
    assert exit_code in (1, running.NOT_RUN)
    assert await said(board, STATUS) == SAYS_ON
    assert board.is_on()


async def a_liar_is_believed(board: Board) -> None:
    """By the agent: it is ha that hears the machine, and takes nothing for a proof then."""
    board.breaks(Fault.SAYS_OFF)
    assert await said(board, STATUS) == SAYS_OFF
    assert await said(board, OFF) == (PowerState.OFF, 0)
    assert board.is_on()


async def one_that_is_unplugged_says_nothing(board: Board) -> None:
    board.unplug()
    state, exit_code = await said(board, OFF, GIVES_UP_SECONDS)
    assert state is PowerState.UNKNOWN
    assert exit_code in (1, running.NOT_RUN)
    answer = await board.act(IDENTITY, GIVES_UP_SECONDS)
    assert answer.identity == ""
    assert answer.words
    assert board.is_on()


async def one_that_thinks_too_long_is_given_up(board: Board) -> None:
    board.breaks(Fault.SLOW)
    answer = await board.act(STATUS, 1.0)
    assert answer.state is PowerState.UNKNOWN
    assert answer.exit_code in (1, running.NOT_RUN)
    assert any(words in answer.words for words in GAVE_UP)


async def wrong_credentials_are_refused(board: Board) -> None:
    board.breaks(Fault.REFUSES)
    for action in (STATUS, OFF):
        state, exit_code = await said(board, action, GIVES_UP_SECONDS)
        assert state is PowerState.UNKNOWN
        assert exit_code in (1, running.NOT_RUN)
    assert (await board.act(IDENTITY, GIVES_UP_SECONDS)).identity == ""
    assert board.is_on()


GAVE_UP = ("imed out", "within 1 s", "Unable to obtain correct plug status")
"""What is said of a BMC that thinks too long: by fence_redfish, by who runs agents, by fence_ipmilan when its tool was cut off."""

SUITE: tuple[Case, ...] = (
    power_is_read_and_switched,
    off_is_confirmed_by_two_looks,
    it_says_whose_it_is,
    one_that_switches_nothing_confirms_nothing,
    a_liar_is_believed,
    one_that_is_unplugged_says_nothing,
    one_that_thinks_too_long_is_given_up,
    wrong_credentials_are_refused,
)


# The real ones: Debian's agents against an endpoint that speaks Redfish, and OpenIPMI's simulator


@dataclass
class RealBoard:
    machine: Machine

    async def act(self, action: PowerAction, seconds: float = 60.0) -> PowerAnswer:
        device = replace(self.machine.device, timeout_seconds=seconds)
        return await running.run(action, device, self.machine.secrets)

    def is_on(self) -> bool:
        return self.machine.chassis.is_on()

    @property
    def dmi_uuid(self) -> str:
        return self.machine.chassis.uuid

    def breaks(self, fault: Fault) -> None:
        if fault is Fault.REFUSES:
            self.machine.secrets = {"password": "another"}
        else:
            self.machine.breaks(fault)

    def unplug(self) -> None:
        self.machine.device = replace(self.machine.device, port=1)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bmc") / "bmc.pem"
    make_certificate(path)
    return path


@pytest.fixture(params=machines.KINDS)
def machine(request: pytest.FixtureRequest, tmp_path: Path, certificate: Path) -> Iterator[Machine]:
    with machines.switched_on(request.param, tmp_path, certificate) as one:
        yield one


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.__name__)
async def test_a_real_bmc(case: Case, machine: Machine) -> None:
    await case(RealBoard(machine))


# The one in memory


@dataclass
class SimulatedBoard:
    bmc: Bmc

    async def act(self, action: PowerAction, seconds: float = 60.0) -> PowerAnswer:
        device = FenceDevice(agent=AGENT, address=self.bmc.host.name, timeout_seconds=seconds)
        return await runner({self.bmc.host.name: self.bmc})(action, device, {}, ask_id="ask")

    def is_on(self) -> bool:
        return self.bmc.host.on or self.bmc.host.booting is not None

    @property
    def dmi_uuid(self) -> str:
        return self.bmc.host.hardware_uuid

    def breaks(self, fault: Fault) -> None:
        match fault:
            case Fault.SAYS_ON:
                self.bmc.obeys = False
            case Fault.SAYS_OFF:
                self.bmc.obeys, self.bmc.lies_off = False, True
            case Fault.SLOW:
                self.bmc.answer_seconds = 30.0
            case _:
                self.bmc.refuses = True

    def unplug(self) -> None:
        self.bmc.reachable = False


@pytest.mark.parametrize("case", SUITE, ids=lambda case: case.__name__)
def test_a_bmc_in_memory(case: Case) -> None:
    loop = new_loop(600.0)
    server, lives = NatsServer(loop), asyncio.Event()
    host = HostMachine("one", loop, server, Time(loop), random.Random(1), agent=lives.wait)

    async def main() -> None:
        host.power_on(0.0)
        await asyncio.sleep(0.1)
        await case(SimulatedBoard(Bmc(host)))

    loop.run(main())
    assert not loop.failed
