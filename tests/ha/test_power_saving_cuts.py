"""Whoever puts a host to sleep or wakes it ends in the middle: the next one goes on, no host is off with a VM on it, and
nothing is switched twice. Questions that come late switch nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ha.powered import Powered, powered, until
from tests.ha.site import caller
from volery.contracts.domain_orders import MIGRATE_DOMAIN
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import PowerAction, PowerState
from volery.contracts.power import POWER_DOWN, POWER_UP, OrderPower
from volery.runtime.programs import Settings


@dataclass(frozen=True)
class Cut:
    """A moment at which something is held up while a replica ends."""

    what: str
    holds: Callable[[Powered, asyncio.Event], None]
    reached: Callable[[Powered], bool]


def _holds_bmc(action: PowerAction) -> Callable[[Powered, asyncio.Event], None]:
    def hold(at: Powered, gate: asyncio.Event) -> None:
        at.bmcs[0].held[action] = gate

    return hold


def _holds_move(at: Powered, gate: asyncio.Event) -> None:
    at.machines[0].held[MIGRATE_DOMAIN.kind] = gate


def _holds_report(at: Powered, gate: asyncio.Event) -> None:
    """It beats and says nothing."""
    agent = at.machines[0].agent
    agent.muted = True

    async def speaks() -> None:
        await gate.wait()
        agent.muted = False

    agent._spawn(speaks())


def _holds_boot(at: Powered, gate: asyncio.Event) -> None:
    at.bmcs[0].starts = False

    async def boots() -> None:
        await gate.wait()
        await at.machines[0].boot()

    at.bmcs[0].switching.add(asyncio.create_task(boots()))


SLEEPING = (
    Cut(
        "moving",
        _holds_move,
        lambda at: any(type(a).__name__ == "MigrateDomain" for a in at.machines[0].asked),
    ),
    Cut("whose", _holds_bmc(PowerAction.IDENTITY), lambda at: at.identities() > at.known_identities),
    Cut("off", _holds_bmc(PowerAction.OFF), lambda at: at.bmcs[0].did(PowerAction.OFF) > 0),
    Cut("is off", _holds_bmc(PowerAction.STATUS), lambda at: at.bmcs[0].power is PowerState.OFF),
)
WAKING = (
    Cut("on", _holds_bmc(PowerAction.ON), lambda at: at.bmcs[0].did(PowerAction.ON) > 0),
    Cut("report", _holds_boot, lambda at: at.bmcs[0].power is PowerState.ON),
)


@pytest.mark.parametrize("who", ["inventory", "ha", "both"])
@pytest.mark.parametrize("cut", SLEEPING, ids=lambda cut: cut.what.replace(" ", "_"))
async def test_who_is_cut_off_in_the_middle_goes_on(
    configured: Settings, tmp_path: Path, cut: Cut, who: str
) -> None:
    async with powered(configured, tmp_path) as at:
        web = await at.vm(0, "web")
        gate = asyncio.Event()
        at.known_identities = at.identities()
        cut.holds(at, gate)
        begun = await at.begun(0, "save-power")
        await _reached(at, cut)
        await _again(at, who)
        gate.set()
        op = await at.ended(begun)
        assert op["state"] == "succeeded", op
        await at.settled_plug(0)
        await at.is_host(0, power_saving="asleep", status="maintenance", busy_with="")
        assert at.bmcs[0].power is PowerState.OFF
        assert at.bmcs[0].victims == [()]
        assert at.bmcs[0].did(PowerAction.OFF) == 1
        home = await at.where(web)
        assert home in (at.machines[1].id, at.machines[2].id)
        assert [web in machine.domains for machine in at.machines].count(True) == 1


@pytest.mark.parametrize("who", ["inventory", "ha", "both"])
@pytest.mark.parametrize("cut", WAKING, ids=lambda cut: cut.what)
async def test_who_is_cut_off_while_waking_goes_on(
    configured: Settings, tmp_path: Path, cut: Cut, who: str
) -> None:
    async with powered(configured, tmp_path) as at:
        await at.sleeps(0)
        gate = asyncio.Event()
        cut.holds(at, gate)
        begun = await at.begun(0, "wake")
        await _reached(at, cut)
        await _again(at, who)
        gate.set()
        op = await at.ended(begun)
        assert op["state"] == "succeeded", op
        host = await at.is_host(0, power_saving="awake", status="up", busy_with="")
        assert host["power_on_proven_at"] is not None
        assert at.bmcs[0].did(PowerAction.ON) == 1
        assert at.bmcs[0].victims == [()]


async def _reached(at: Powered, cut: Cut) -> None:
    async def reached() -> bool:
        return cut.reached(at)

    await until(reached)


async def _again(at: Powered, who: str) -> None:
    if who == "both":
        await at.inventory.end()
        await at.ha.end()
        await at.ha.begin()
        await at.inventory.begin()
    else:
        await (at.inventory if who == "inventory" else at.ha).again()


async def test_a_question_that_comes_late_switches_nothing(configured: Settings, tmp_path: Path) -> None:
    """It was decided before the host was woken; and one about another boot, or a host that isn't leaving."""
    async with powered(configured, tmp_path) as at:
        await at.sleeps(0)
        asleep = await at.host(0)
        assert (await at.does(0, "wake"))["state"] == "succeeded"
        await at.is_host(0, status="up", busy_with="")
        late = OrderPower(id=asleep["id"], revision=asleep["revision"], boot_id=at.machines[0].agent.boot_id)
        refused = await _refused(at, late)
        assert (refused.kind, refused.details["rule"]) == (Kind.CONFLICT, "late")
        now = await at.host(0)
        up = OrderPower(id=now["id"], revision=now["revision"], boot_id=now["boot_id"])
        refused = await _refused(at, up)
        assert (refused.kind, refused.details["rule"]) == (Kind.UNAVAILABLE, "not_heard")
        assert at.bmcs[0].did(PowerAction.OFF) == 1

        again = await at.world.bus.ask(POWER_UP, up, caller("up"))
        assert (again.state, again.was) == (PowerState.ON, PowerState.ON)
        assert at.bmcs[0].did(PowerAction.ON) == 1


async def _refused(at: Powered, ask: OrderPower) -> Refused:
    with pytest.raises(Refused) as caught:
        await at.world.bus.ask(POWER_DOWN, ask, caller("down"))
    return caught.value


async def test_an_order_that_may_still_come_true_lets_nobody_say_that_it_is_on(
    configured: Settings, tmp_path: Path
) -> None:
    """The executor's answer gets lost, and the machine is off a while later: it is asleep, not up."""
    async with powered(configured, tmp_path) as at:
        bmc = at.bmcs[0]
        bmc.obeys, bmc.loses = False, {PowerAction.OFF}
        begun = await at.begun(0, "save-power")

        async def ordered() -> bool:
            return bmc.did(PowerAction.OFF) > 0

        await until(ordered)
        await asyncio.sleep(4)
        assert (await at.host(0))["power_saving"] == "falling_asleep"
        bmc.power = PowerState.OFF
        await at.machines[0].die()
        op = await at.ended(begun)
        assert op["state"] == "succeeded", op
        await at.is_host(0, power_saving="asleep", status="maintenance")
        assert bmc.did(PowerAction.OFF) == 1
