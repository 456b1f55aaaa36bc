"""A silent host's agent is restarted over SSH first: with a real SSH server, a real bus and database, and scripted BMCs."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from pathlib import Path

import asyncssh
import msgspec
import pytest
from msgspec.structs import replace

from services.ha import ssh
from services.ha.config import HaConfig
from services.ha.policies.fencing import HOLDS, Act, decide, is_soft_due
from services.ha.policies.soft_fencing import HOLDS as SOFT_HOLDS
from services.ha.policies.soft_fencing import Soft, SoftState, state_of
from tests.ha.site import Site, caller, site
from tests.ha.test_fencing_rules import READ_ON, SILENT
from tests.ha.world import until
from volery.contracts.cluster import DeleteById, GetById
from volery.contracts.errors import Kind, Refused
from volery.contracts.fencing import PowerAction, PowerState
from volery.contracts.host import HostStatus
from volery.contracts.ids import new_id
from volery.contracts.liveness import LivenessState
from volery.contracts.operation import ListQuery
from volery.contracts.power import FenceRecord
from volery.contracts.soft_fence import (
    DELETE_SOFT_FENCE,
    GET_SOFT_FENCE,
    LIST_SOFT_FENCES,
    SET_SOFT_FENCE,
    TEST_SOFT_FENCE,
    SetSoftFence,
    SoftFence,
    TestSoftFence,
)
from volery.runtime.database import open_pool
from volery.runtime.programs import Settings

CONFIG = HaConfig()
NONE, DUE, RUNNING = SoftState.NONE, SoftState.DUE, SoftState.RUNNING


@pytest.mark.parametrize(
    ("soft", "silence", "expected"),
    [
        (Soft(), 60.0, NONE),
        (Soft(enabled=True), 9.9, NONE),
        (Soft(enabled=True), 10.0, DUE),
        (Soft(enabled=True, begun_age=599.0), 60.0, NONE),
        (Soft(enabled=True, begun_age=601.0), 60.0, DUE),
        (Soft(enabled=True, running=True, begun_age=1.0), 60.0, RUNNING),
        (Soft(enabled=False, running=True, begun_age=1.0), 60.0, RUNNING),
        (Soft(enabled=True, begun_age=5.0, worked_age=4.9), 60.0, RUNNING),
        (Soft(enabled=True, begun_age=6.0, worked_age=5.1), 60.0, NONE),
    ],
)
def test_when_it_is_due(soft: Soft, silence: float, expected: SoftState) -> None:
    assert state_of(soft, silence, CONFIG) is expected


def test_power_waits_for_it_and_a_proof_does_not() -> None:
    due = with_fields(SILENT, soft=DUE)
    assert is_soft_due(due, CONFIG)
    for soft in (DUE, RUNNING):
        waits = decide(with_fields(SILENT, soft=soft), CONFIG)
        assert (waits.act, waits.rule) == (Act.WAIT, "soft_fence")
    assert decide(SILENT, CONFIG).act is Act.POWER_OFF
    assert not is_soft_due(with_fields(due, power=with_fields(READ_ON, state=PowerState.OFF)), CONFIG)
    assert not is_soft_due(with_fields(due, state=LivenessState.DEAD), CONFIG)
    assert not is_soft_due(with_fields(due, suspected=False), CONFIG)
    # Read as soon as ever.
    assert decide(with_fields(due, power=with_fields(READ_ON, read_age=None)), CONFIG).act is Act.READ


def test_who_is_left_alone_is_left_alone_over_ssh_too() -> None:
    due = with_fields(SILENT, soft=DUE)
    assert not is_soft_due(with_fields(due, status=HostStatus.MAINTENANCE), CONFIG)
    assert not is_soft_due(with_fields(due, paused="by ann"), CONFIG)
    assert not is_soft_due(with_fields(due, cut_off=True), CONFIG)
    assert not is_soft_due(with_fields(due, leading=10.0), CONFIG)
    assert is_soft_due(with_fields(due, power=None), CONFIG)
    assert is_soft_due(with_fields(due, ours=True), CONFIG)
    assert {hold.rule for hold in HOLDS} >= SOFT_HOLDS


@dataclass
class Door:
    """A host's SSH server, which lets in whom it is told to."""

    port: int
    host_key: str
    trusted: set[str] = field(default_factory=set)
    ran: list[str] = field(default_factory=list)
    logins: int = 0
    exit_code: int = 0
    then: Callable[[], None] = lambda: None

    def ask(self, host_id: str) -> SetSoftFence:
        return SetSoftFence(id=host_id, address="127.0.0.1", port=self.port, host_key=self.host_key)


@asynccontextmanager
async def sshd() -> AsyncIterator[Door]:
    key = asyncssh.generate_private_key("ssh-ed25519")
    door = Door(0, key.export_public_key().decode() + " root@host")

    class Server(asyncssh.SSHServer):
        def public_key_auth_supported(self) -> bool:
            return True

        def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
            return (
                username == "root" and " ".join(key.export_public_key().decode().split()[:2]) in door.trusted
            )

        def auth_completed(self) -> None:
            door.logins += 1

    async def run(process: asyncssh.SSHServerProcess[str]) -> None:
        door.ran.append(process.command or "")
        door.then()
        process.stderr.write("Unit volery-agent.service not found.\n" if door.exit_code else "")
        process.exit(door.exit_code)

    server = await asyncssh.listen(
        "127.0.0.1", 0, server_factory=Server, server_host_keys=[key], process_factory=run
    )
    async with server:
        door.port = server.get_port()
        yield door


async def allowed(at: Site, door: Door) -> SoftFence:
    """Host 0's agent may be restarted."""
    made = await at.bus.ask(SET_SOFT_FENCE, door.ask(at.hosts[0].id), caller("set"))
    options, _, public = made.authorized_key.partition("ssh-ed25519 ")
    assert options == 'restrict,command="systemctl restart volery-agent" '
    door.trusted = {f"ssh-ed25519 {public.split()[0]}"}
    return made


async def soft_records(at: Site) -> list[FenceRecord]:
    return [r for r in await at.records() if "over SSH" in r.reason]


async def test_an_agent_that_hangs_is_restarted_and_its_host_keeps_its_power(
    configured: Settings, tmp_path: Path
) -> None:
    async with sshd() as door, site(configured, tmp_path) as at:
        await allowed(at, door)
        door.then = at.hearts[0].start
        at.hearts[0].stop()
        await until(lambda: soft_records(at), 30)
        up = await at.becomes(0, "up")
        assert (up.proof, door.ran) == (None, ["systemctl restart volery-agent"])
        record = (await soft_records(at))[0]
        assert (record.state, record.steps[-1].step) == ("succeeded", "soft_fence")
        assert record.steps[-1].words == "its agent was restarted"
        assert at.bmc(0).did(PowerAction.OFF) == 0
        # It hangs again soon after: once was enough, and now its power is switched.
        door.then = lambda: None
        at.hearts[0].stop()
        await at.becomes(0, "dead")
        assert len(door.ran) == 1
        assert at.bmc(0).did(PowerAction.OFF) == 1


async def test_a_restart_that_does_not_help_is_in_the_evidence_and_power_is_switched(
    configured: Settings, tmp_path: Path
) -> None:
    async with sshd() as door, site(configured, tmp_path) as at:
        await allowed(at, door)
        door.exit_code = 5
        at.hearts[0].stop()
        dead = await at.becomes(0, "dead")
        said = next(e for e in dead.evidence if e.kind == "soft_fence")
        assert "ended with 5: Unit volery-agent.service not found." in said.details
        assert said.reached == "nothing"
        assert len(door.ran) == at.bmc(0).did(PowerAction.OFF) == 1
        assert (await soft_records(at))[0].state == "failed"


async def test_it_is_set_tested_and_forgotten_and_the_key_stays_with_ha(
    configured: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with sshd() as door, site(configured, tmp_path, powered=False) as at:
        made = await allowed(at, door)
        host_id = at.hosts[0].id
        assert "root@host" not in made.host_key
        passed = await at.bus.ask(TEST_SOFT_FENCE, TestSoftFence(id=host_id), caller("test"))
        assert (passed.test_passed, passed.test_words, door.ran, door.logins) == (
            True,
            "ha can log in",
            [],
            1,
        )
        again = await at.bus.ask(SET_SOFT_FENCE, door.ask(host_id), caller("set"))
        assert again.authorized_key == made.authorized_key
        renewed = await at.bus.ask(SET_SOFT_FENCE, replace(door.ask(host_id), new_key=True), caller("set"))
        assert renewed.authorized_key != made.authorized_key
        failed = await at.bus.ask(TEST_SOFT_FENCE, TestSoftFence(id=host_id), caller("test"))
        assert not failed.test_passed
        assert "does not let ha in: put `authorized_key`" in failed.test_words
        other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
        await at.bus.ask(SET_SOFT_FENCE, replace(door.ask(host_id), host_key=other), caller("set"))
        wrong = await at.bus.ask(TEST_SOFT_FENCE, TestSoftFence(id=host_id), caller("test"))
        assert "shows another host key than the pinned one" in wrong.test_words
        assert door.logins == 1
        listed = await at.bus.ask(LIST_SOFT_FENCES, ListQuery())
        assert [msgspec.json.decode(i, type=SoftFence).id for i in listed.items] == [host_id]
        async with open_pool(configured.database, "ha") as pool:
            kept = await pool.fetchval("select private from soft_fence")
        assert "sealed:" in kept
        assert "PRIVATE KEY" not in kept + caplog.text
        await at.bus.ask(DELETE_SOFT_FENCE, DeleteById(id=host_id), caller("delete"))
        with pytest.raises(Refused) as gone:
            await at.bus.ask(GET_SOFT_FENCE, GetById(id=host_id))
        assert gone.value.kind is Kind.NOT_FOUND
        for change, words in (
            ({"host_key": "10.0.0.7 nonsense"}, "host_key is no public key"),
            ({"address": "-oProxyCommand=id"}, "address is a host name or an IP address"),
            ({"username": "root;id"}, "username is a user of the host"),
            ({"unit": "agent; reboot"}, "unit is the name of a systemd unit"),
            ({"unit": "--force"}, "unit is the name of a systemd unit"),
            ({"port": 0}, "port is 1 to 65535"),
        ):
            with pytest.raises(Refused, match=words) as refused:
                await at.bus.ask(SET_SOFT_FENCE, replace(door.ask(host_id), **change), caller("set"))
            assert refused.value.kind is Kind.INVALID
        with pytest.raises(Refused) as unknown:
            await at.bus.ask(SET_SOFT_FENCE, door.ask(new_id()), caller("set"))
        assert unknown.value.kind is Kind.NOT_FOUND


async def test_a_server_that_says_nothing_takes_no_longer_than_it_may() -> None:
    async with sshd() as door:
        place = ssh.Place("127.0.0.1", door.port, "root", ssh.pinned(door.host_key))
        private, public = ssh.new_key("ha")
        door.trusted = {" ".join(public.split()[:2])}
        assert await ssh.log_in(place, private, 10) == ssh.Said(True, "")
    nobody = await ssh.log_in(place, private, 10)
    assert not nobody.worked
    assert "can't be reached" in nobody.words
