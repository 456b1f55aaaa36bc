"""A silent host from the first reading of its BMC to its return, on a real bus and database, with scripted BMCs."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from services.ha import store
from services.ha.watch import HostFacts
from tests.ha.bmcs import AGENT, PASSWORD, Bmc
from tests.ha.site import caller, site, uuid
from tests.ha.world import Inventory, ha, hurried, until, vm
from tests.support.runtime import running
from volery.contracts.errors import Refused
from volery.contracts.fencing import PowerAction, PowerState
from volery.contracts.host import HOST_CHANGED, HostStatus
from volery.contracts.liveness import LivenessState, ProofKind
from volery.contracts.power import (
    CONFIRM_HOST_REBOOTED,
    GET_FENCING,
    PAUSE_FENCING,
    RESUME_FENCING,
    TEST_POWER_MANAGEMENT,
    AskFencing,
    ConfirmHostRebooted,
    FencingScope,
    Identity,
    NewFenceDevice,
    PauseFencing,
    ResumeFencing,
    TestPowerManagement,
)
from volery.contracts.vm import VM_CHANGED, VmStatus
from volery.runtime.database import open_direct, open_pool
from volery.runtime.programs import Settings
from volery.runtime.tables import Stale


async def test_a_bmc_that_says_off_proves_death_without_any_wait(
    configured: Settings, tmp_path: Path
) -> None:
    """Also while fencing is paused, right after ha started, and with a silence that is far from over."""
    slow = {"VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": "600", "VOLERY_HA_START_HOLD_SECONDS": "600"}
    async with site(configured, tmp_path, **slow) as at:
        await at.bus.ask(PAUSE_FENCING, PauseFencing(reason="switch replaced"), caller("pause"))
        at.bmc(0).power = PowerState.OFF
        at.hearts[0].stop()
        dead = await at.becomes(0, "dead")
        assert dead.proof is not None
        assert (dead.proof.kind, dead.proof.boot_id) == (ProofKind.BMC_OFF, "boot-1")
        assert "twice" in dead.proof.details
        kinds = {e.kind: e for e in dead.evidence}
        assert kinds["bmc"].power == kinds["bmc_off_first"].power == "off"
        assert kinds["bmc"].trusted
        assert kinds["bmc"].by.startswith("host h")
        assert at.bmc(0).did(PowerAction.OFF) == 0
        # It comes back under another boot, and the proof about the former one stays.
        at.hearts[0].boot_id = "boot-2"
        at.hearts[0].start()
        up = await at.becomes(0, "up")
        assert up.proof == dead.proof
        assert up.boot_id == "boot-2"
        assert at.bmc(0).did(PowerAction.ON) == 0


async def test_a_frozen_host_is_switched_off_proven_dead_and_switched_on_again(
    configured: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the BMC's password is nowhere in ha's database, in no log, and in no answer."""
    caplog.set_level(logging.DEBUG)
    async with site(configured, tmp_path) as at:
        on = vm(host_id=at.hosts[0].id, epoch=4)
        await at.owner.says(VM_CHANGED, on)
        at.hearts[0].stop()
        await at.says(0, "its BMC says on; it is fenced once it was silent for 2.5 s")
        assert at.bmc(0).did(PowerAction.OFF) == 0
        dead = await at.becomes(0, "dead")
        assert dead.proof is not None
        assert dead.proof.kind is ProofKind.BMC_OFF
        assert at.bmc(0).did(PowerAction.OFF) == 1
        ask = next(a for a in at.bmc(0).asked if a.action is PowerAction.OFF)
        assert (ask.target_host_id, ask.target_boot_id) == (at.hosts[0].id, "boot-1")
        assert ask.host_id in (at.hosts[1].id, at.hosts[2].id)
        await at.owner.says(
            VM_CHANGED, replace(on, revision=2, status=VmStatus.DOWN, status_reason="host_died")
        )
        record = await at.ended("succeeded")
        steps = [step.step for step in record.steps]
        assert steps.index("ordered_off") < steps.index("proven") < steps.index("ordered_on")
        assert at.bmc(0).power is PowerState.ON
        assert (record.requested_by, record.boot_id) == ("service:ha", "boot-1")
        at.hearts[0].boot_id = "boot-2"
        at.hearts[0].start()
        up = await at.becomes(0, "up")
        assert up.fencing == ""
        assert at.bmc(0).did(PowerAction.OFF) == 1
        assert ask.secrets["password"] == PASSWORD
        kept = await at.set_power(
            0, devices=(NewFenceDevice(agent=AGENT, address="bmc0", timeout_seconds=2),)
        )
        await at.tested(0)  # with the password that was kept
        assert PASSWORD not in msgspec.json.encode(kept).decode()
        everything = await whole_database(configured)
        assert AGENT in everything
        assert PASSWORD not in everything
        assert PASSWORD not in caplog.text


@pytest.mark.parametrize(("loses", "obeys", "orders"), [(True, True, 1), (False, False, 2)])
async def test_an_order_to_switch_on_is_repeated_only_when_it_is_still_off(
    configured: Settings, tmp_path: Path, loses: bool, obeys: bool, orders: int
) -> None:
    """Its answer was lost, though the machine starts; or the BMC took it and did nothing."""
    async with site(configured, tmp_path, VOLERY_HA_OFF_RETRY_SECONDS="0.5") as at:
        bmc = at.bmc(0)
        bmc.loses = {PowerAction.ON} if loses else set()
        at.hearts[0].stop()

        async def off() -> bool:
            return bmc.power is PowerState.OFF

        async def ordered() -> bool:
            return bmc.did(PowerAction.ON) > 0

        await until(off)
        bmc.obeys = obeys
        await until(ordered)
        bmc.obeys = True
        await at.ended("succeeded")
        assert bmc.power is PowerState.ON
        assert bmc.did(PowerAction.ON) == orders


async def test_a_death_that_is_slow_to_write_is_not_taken_for_a_return(
    configured: Settings, tmp_path: Path
) -> None:
    """A fenced host would stay off, were its record closed while its death waits for the database."""
    async with site(configured, tmp_path) as at:
        at.hearts[0].stop()
        await at.says(0, "its BMC says off; it is asked again")
        async with open_direct(configured.database, "ha") as connection, connection.transaction():
            await connection.execute("select 1 from liveness where id = $1 for update", at.hosts[0].id)

            async def waits() -> bool:
                return bool(await connection.fetchval("select count(*) from pg_locks where not granted"))

            await until(waits)
            readings = at.bmc(0).did(PowerAction.STATUS)

            async def looked_again() -> bool:
                return at.bmc(0).did(PowerAction.STATUS) >= readings + 2

            await until(looked_again)
        record = await at.ended("succeeded")
        assert "ordered_on" in [step.step for step in record.steps]
        assert at.bmc(0).power is PowerState.ON


async def whole_database(configured: Settings) -> str:
    """All that ha keeps: objects, log, requests."""
    found = ""
    async with open_direct(configured.database, "ha") as connection:
        tables = await connection.fetch(
            "select table_name from information_schema.tables where table_schema = current_schema()"
        )
        for row in tables:
            rows = await connection.fetch(f"select * from {row['table_name']}")
            found += str([tuple(r) for r in rows])
    return found


async def test_a_host_that_beats_again_in_time_is_left_alone(configured: Settings, tmp_path: Path) -> None:
    async with site(configured, tmp_path) as at:
        at.hearts[0].stop()
        await at.says(0, "it is fenced once")
        at.hearts[0].start()
        await at.becomes(0, "up")
        for n in (1, 2):
            assert (await at.liveness(n)).state == "up"
        assert at.bmc(0).did(PowerAction.OFF) == 0
        assert await at.records() == []


async def test_a_host_that_beats_again_while_its_order_is_written_is_not_switched_off(
    configured: Settings, tmp_path: Path
) -> None:
    """The database stands still between the last look and the order."""
    async with site(configured, tmp_path) as at:
        at.hearts[0].stop()
        await at.says(0, "it is fenced once")
        async with open_direct(configured.database, "ha") as connection, connection.transaction():
            await connection.execute("lock table fence_record in exclusive mode")

            async def waits() -> bool:
                return bool(await connection.fetchval("select count(*) from pg_locks where not granted"))

            await until(waits)
            at.hearts[0].start()
            await at.becomes(0, "up")
        record = await at.ended("cancelled")
        assert "held_back" in [step.step for step in record.steps]
        assert at.bmc(0).did(PowerAction.OFF) == 0


async def test_a_host_that_beats_again_while_its_bmc_is_busy_is_not_switched_off(
    configured: Settings, tmp_path: Path
) -> None:
    """A test of its devices holds up the order, and may for minutes."""
    async with site(configured, tmp_path) as at:
        bmc = at.bmc(0)
        at.hearts[0].stop()
        await at.says(0, "it is fenced once")
        busy = bmc.held[PowerAction.IDENTITY] = asyncio.Event()
        ask = TestPowerManagement(id=at.hosts[0].id)
        testing = asyncio.create_task(at.bus.ask(TEST_POWER_MANAGEMENT, ask, caller("test")))
        async with open_direct(configured.database, "ha") as connection:

            async def decided() -> bool:
                return bool(await connection.fetchval("select count(*) from power_off"))

            await until(decided)
        at.hearts[0].start()
        await at.becomes(0, "up")
        busy.set()
        assert (await testing).test_passed
        await at.becomes(0, "up")
        assert bmc.did(PowerAction.OFF) == 0
        assert await at.records() == []


async def test_a_bmc_that_says_off_while_the_host_beats_loses_its_trust(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path) as at:
        at.bmc(0).power = PowerState.OFF
        at.hearts[0].stop()
        await at.becomes(0, "dead")
        at.hearts[0].start()
        up = await at.becomes(0, "up")
        assert up.proof is None
        assert up.boot_id == "boot-1"

        async def distrusted() -> bool:
            return not (await at.power(0)).enabled

        await until(distrusted)
        assert "signs of life" in (await at.power(0)).test_words
        at.hearts[0].stop()
        held = await at.says(0, "its power management is switched off")
        assert held.proof is None


async def test_a_lost_answer_is_read_again_as_status_and_never_repeated_as_an_action(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path) as at:
        at.bmc(0).loses.add(PowerAction.OFF)
        at.hearts[0].stop()
        await at.becomes(0, "dead", 60)
        assert at.bmc(0).did(PowerAction.OFF) == 1


async def test_a_bmc_that_stays_on_is_ordered_off_three_times_then_a_person_is_asked(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path, VOLERY_HA_OFF_RETRY_SECONDS="0.5") as at:
        at.bmc(0).obeys = False
        at.hearts[0].stop()
        await at.says(0, "Cut its power by hand, then confirm it", 60)
        assert at.bmc(0).did(PowerAction.OFF) == 3
        assert (await at.liveness(0)).proof is None
        found = await at.bus.ask(
            CONFIRM_HOST_REBOOTED,
            ConfirmHostRebooted(id=at.hosts[0].id, confirm="h0", reason="plug pulled"),
            caller("confirm"),
        )
        assert found.proof is not None
        assert (found.state, found.proof.kind) == (LivenessState.DEAD, ProofKind.PERSON)
        assert "user:ann" in found.proof.details


async def test_a_swapped_bmc_proves_nothing(configured: Settings, tmp_path: Path) -> None:
    """It was right when it was tested; then somebody changed the cables."""
    async with site(configured, tmp_path) as at:
        at.executors.bmcs["bmc0"] = Bmc(uuid(9), PowerState.OFF)
        at.hearts[0].stop()
        await at.says(0, "its BMC belongs to another machine")
        assert (await at.power(0)).identity is Identity.MISMATCH
        assert (await at.liveness(0)).proof is None
        assert at.bmc(0).did(PowerAction.OFF) == 0


async def test_the_brake_lets_one_of_ten_go_and_asks_a_person_for_the_others(
    configured: Settings, tmp_path: Path
) -> None:
    """And hosts that lost their power by themselves don't count."""
    async with site(configured, tmp_path, 10) as at:
        at.bmc(9).power = PowerState.OFF
        for n in (0, 1, 2, 9):
            at.hearts[n].stop()
        await at.becomes(9, "dead")

        async def braked() -> bool:
            said = [await at.liveness(n) for n in (0, 1, 2)]
            held = ["the most without a person" in s.fencing for s in said]
            return sum(held) == 2 and any(s.state is LivenessState.DEAD for s in said)

        await until(braked, 60)
        assert sum(at.bmc(n).did(PowerAction.OFF) for n in range(10)) == 1
        found = await at.bus.ask(GET_FENCING, AskFencing())
        assert [(b.hosts, b.ordered_off, b.limit) for b in found.brakes] == [(10, 1, 1)]
        assert len(found.held) == 2


async def test_when_most_of_a_cluster_is_silent_ha_orders_nothing(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path, 3, VOLERY_HA_STORM_HOLD_SECONDS="0.5") as at:
        for n in (0, 1):
            at.hearts[n].stop()
        for n in (0, 1):
            await at.says(n, "it may be ha that is cut off", 60)
            assert at.bmc(n).did(PowerAction.OFF) == 0
        # A person tells which of them are off; each is believed by itself.
        await at.becomes(0, "non_responsive")
        confirm = ConfirmHostRebooted(id=at.hosts[0].id, confirm="h0")
        assert (await at.bus.ask(CONFIRM_HOST_REBOOTED, confirm, caller("confirm"))).state == "dead"
        assert (await at.becomes(1, "non_responsive")).proof is None


async def test_a_host_that_said_that_it_reboots_is_given_time_unless_a_vm_is_left_on_it(
    configured: Settings, tmp_path: Path
) -> None:
    async with site(configured, tmp_path, 4, VOLERY_HA_REBOOT_QUIET_SECONDS="60") as at:
        left = vm(host_id=at.hosts[1].id, status=VmStatus.UP)
        await at.owner.says(VM_CHANGED, left)
        for number in (0, 1):
            at.hearts[number].leaving = True
            await at.hearts[number].beat()
            at.hearts[number].stop()
        await at.becomes(1, "dead")
        held = await at.says(0, "its administrator shut it down or reboots it")
        assert at.bmc(1).did(PowerAction.OFF) == 1
        assert (held.state, at.bmc(0).did(PowerAction.OFF)) == (LivenessState.NON_RESPONSIVE, 0)
        at.hearts[0].leaving, at.hearts[0].boot_id = False, "boot-2"
        at.hearts[0].start()
        back = await at.becomes(0, "up")
        assert back.proof is not None
        assert back.proof.kind is ProofKind.NEW_BOOT
        at.hearts[0].stop()  # this time it said nothing before, and only the brake holds
        await at.says(0, "the most without a person")


async def test_maintenance_and_pauses_hold_and_let_go(configured: Settings, tmp_path: Path) -> None:
    async with site(configured, tmp_path) as at:
        scope = {"scope": FencingScope.HOST, "object_id": at.hosts[0].id}
        pause = PauseFencing(**scope, reason="firmware")  # type: ignore[arg-type]
        await at.bus.ask(PAUSE_FENCING, pause, caller("pause"))
        kept = replace(at.hosts[1], revision=2, status=HostStatus.MAINTENANCE)
        await at.owner.says(HOST_CHANGED, kept)
        at.hearts[0].stop()
        await at.says(0, "by user:ann: firmware", 60)
        assert at.bmc(0).did(PowerAction.OFF) == 0
        await at.bus.ask(RESUME_FENCING, ResumeFencing(**scope), caller("resume"))  # type: ignore[arg-type]
        await at.becomes(0, "dead", 60)
        at.hearts[0].boot_id = "boot-2"
        at.hearts[0].start()
        await at.becomes(0, "up")
        at.hearts[1].stop()
        await at.says(1, "it is in maintenance")
        assert at.bmc(1).did(PowerAction.OFF) == 0


async def test_a_new_leader_ends_what_the_former_one_began(configured: Settings, tmp_path: Path) -> None:
    """The leader is killed between the order and the proof; the executor then obeys the new one only."""
    async with site(configured, tmp_path, replicas=2) as at:
        at.bmc(0).obeys = False
        at.hearts[0].stop()

        async def ordered() -> bool:
            return at.bmc(0).did(PowerAction.OFF) >= 1

        await until(ordered, 60)
        former = at.executors.highest_token
        assert at.owner.core is not None
        connection_of = open_direct(configured.database, "ha")
        async with connection_of as connection:
            killed = await connection.fetchval(
                """select count(pg_terminate_backend(pid)) from pg_locks
                   where locktype = 'advisory' and granted and pid <> pg_backend_pid()
                     and objid = hashtext('volery-leader-ha')::bigint::bit(32)::bigint::oid"""
            )
        assert killed >= 1
        at.bmc(0).obeys = True
        at.bmc(0).power = PowerState.OFF
        await at.becomes(0, "dead", 60)
        record = await at.ended("succeeded", 60)
        assert at.executors.highest_token > former
        assert at.bmc(0).power is PowerState.ON
        assert [s.step for s in record.steps].count("proven") == 1


async def test_a_person_is_not_believed_against_a_sign_of_life(configured: Settings, tmp_path: Path) -> None:
    async with site(configured, tmp_path, powered=False) as at:
        confirm = ConfirmHostRebooted(id=at.hosts[0].id, confirm="h0")
        with pytest.raises(Refused, match="showed a sign of life"):
            await at.bus.ask(CONFIRM_HOST_REBOOTED, confirm, caller("confirm"))
        at.hearts[0].stop()
        await at.says(0, "it has no power management")
        await at.becomes(0, "non_responsive")
        with pytest.raises(Refused, match="type the host's name, h0"):
            await at.bus.ask(CONFIRM_HOST_REBOOTED, replace(confirm, confirm="h1"), caller("confirm"))
        dead = await at.bus.ask(CONFIRM_HOST_REBOOTED, confirm, caller("confirm"))
        assert dead.state == "dead"
        again = await at.bus.ask(CONFIRM_HOST_REBOOTED, confirm, caller("confirm"))
        assert again.proof == dead.proof
        at.hearts[0].start()
        assert (await at.becomes(0, "up")).proof is None


async def test_the_brakes_last_place_is_taken_once_and_by_the_leader_only(
    configured: Settings, tmp_path: Path
) -> None:
    """Whoever asks at the same time; the same boot again takes none."""
    async with running(hurried(configured), Inventory().service(), ha()):
        pass  # its tables are there
    hosts = [HostFacts(f"h{n}", 1, cluster_id="c") for n in range(8)]
    now = datetime.now(UTC)
    since = now - timedelta(minutes=10)
    async with open_pool(configured.database, "ha") as pool:
        token = await pool.fetchval("select token from leader")

        async def book(each: HostFacts, token: int) -> bool:
            return await store.book_power_off(pool, token, each, "boot", 3, since, now)

        taken = await asyncio.gather(*(book(each, token) for each in hosts))
        assert sum(taken) == 3
        first = hosts[taken.index(True)]
        assert await book(first, token)
        with pytest.raises(Stale):
            await book(first, token - 1)
        assert await store.book_power_off(pool, token, HostFacts("x", 1, cluster_id="d"), "b", 1, since, now)
        later = now + timedelta(minutes=11)
        assert await store.book_power_off(
            pool, token, hosts[taken.index(False)], "boot", 3, later - timedelta(minutes=10), later
        )
