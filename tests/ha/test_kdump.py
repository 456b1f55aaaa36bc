"""Hosts that crash and say so: the rules, and Debian's own fence_kdump_send against ha on a real bus and database."""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace as with_fields
from pathlib import Path

import pytest

from services.ha.config import HaConfig
from services.ha.kdump import open_socket
from services.ha.policies.fencing import HOLDS, is_soft_due
from services.ha.policies.kdump import (
    Dump,
    Ignored,
    Source,
    address_of,
    check_addresses,
    fault_of,
    heard,
    words,
)
from services.ha.policies.soft_fencing import SoftState
from tests.ha.site import Site, site
from tests.ha.test_fencing_rules import SILENT
from tests.ha.world import until
from volery.contracts.errors import Refused
from volery.contracts.fencing import PowerAction
from volery.contracts.liveness import ProofKind
from volery.contracts.power import GET_FENCING, AskFencing, KdumpListener
from volery.runtime.config import ConfigError, read
from volery.runtime.programs import Settings

CONFIG = HaConfig(kdump_finished_seconds=60, kdump_longest_seconds=1800)
MESSAGE = struct.pack("=II", 0x1B302A40, 1)
OURS, OPEN = Source("h", True), Source("h", False)
SENDERS = [
    found
    for place in ("/usr/libexec/fence-agents", "/usr/lib/fence-agents")
    if (found := shutil.which("fence_kdump_send", path=place))
]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (MESSAGE, None),
        (struct.pack(">II", 0x1B302A40, 1), None),
        (struct.pack("<II", 0x1B302A40, 1), None),
        (struct.pack("=II", 0x1B302A40, 2), Ignored.VERSION),
        (struct.pack("=II", 0x1B302A41, 1), Ignored.MAGIC),
        (MESSAGE[:7], Ignored.SIZE),
        (MESSAGE + b"\0", Ignored.SIZE),
        (b"", Ignored.SIZE),
    ],
)
def test_what_is_a_message(data: bytes, fault: Ignored | None) -> None:
    assert fault_of(data) is fault


@pytest.mark.parametrize(
    ("old", "at", "address", "source", "since", "first_at"),
    [
        (None, 100.0, "a", OURS, 50.0, 100.0),
        (Dump(90.0, 95.0, True, "a"), 100.0, "a", OURS, 50.0, 90.0),
        # A sign of life in between, a pause, another address, another word about the network
        (Dump(90.0, 95.0, True, "a"), 100.0, "a", OURS, 92.0, 100.0),
        (Dump(30.0, 40.0, True, "a"), 100.0, "a", OURS, 20.0, 100.0),
        (Dump(90.0, 95.0, True, "a"), 100.0, "b", OURS, 50.0, 100.0),
        (Dump(90.0, 95.0, False, "a"), 100.0, "a", OURS, 50.0, 100.0),
        (Dump(90.0, 95.0, True, "a"), 100.0, "a", OPEN, 50.0, 100.0),
    ],
)
def test_what_is_one_dump(
    old: Dump | None, at: float, address: str, source: Source, since: float, first_at: float
) -> None:
    assert heard(old, at, address, source, since, CONFIG) == Dump(first_at, at, source.trusted, address)


@pytest.mark.parametrize(
    ("dump", "waits"),
    [
        (None, False),
        (Dump(90.0, 95.0, False, "10.0.8.7"), True),
        (Dump(10.0, 41.0, False, "10.0.8.7"), True),
        (Dump(10.0, 40.0, False, "10.0.8.7"), False),
        (Dump(-1701.0, 99.0, False, "10.0.8.7"), False),
        (Dump(5.0, 99.0, False, "10.0.8.7"), False),
    ],
)
def test_how_long_power_waits(dump: Dump | None, waits: bool) -> None:
    found = words(dump, 5.0, 100.0, CONFIG)
    assert bool(found) is waits
    if waits:
        assert "at 10.0.8.7 writes a dump" in found
        assert "60 s after the last message of it, or 30 min after the first" in found


def test_a_host_that_dumps_is_not_logged_in_to() -> None:
    due = with_fields(SILENT, soft=SoftState.DUE)
    assert is_soft_due(due, CONFIG)
    assert not is_soft_due(with_fields(due, dump="it crashed"), CONFIG)
    assert [hold.rule for hold in HOLDS].index("start") < [hold.rule for hold in HOLDS].index("dumping")


def test_addresses_are_spelled_in_one_way_and_belong_to_one_host() -> None:
    assert address_of("::ffff:10.0.8.7") == "10.0.8.7"
    assert address_of("fe80::1%eth0") == "fe80::1"
    assert check_addresses([" 10.0.8.7", "FD00::7", "10.0.8.7"], proves=True, taken={}) == (
        "10.0.8.7",
        "fd00::7",
    )
    assert check_addresses([], proves=False, taken={}) == ()
    for texts, proves, said in (
        (["h7"], False, "are IP addresses"),
        (["0.0.0.0"], False, "no host's own"),
        (["224.0.0.1"], False, "no host's own"),
        ([], True, "kdump_proves needs kdump_addresses"),
        (["10.0.8.8"], False, "already those of host h8"),
        ([f"10.0.8.{n}" for n in range(9)], False, "at most 8, not 9"),
    ):
        with pytest.raises(Refused, match=said):
            check_addresses(texts, proves=proves, taken={"10.0.8.8": "h8"})


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="kdump_port is 70000"):
        read("VOLERY_HA_", HaConfig, {"VOLERY_HA_KDUMP_PORT": "70000"})


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


SILENCE_SECONDS = 4.0
"""Before a fence: a busy machine's first message after the last sign of life comes within it."""


@asynccontextmanager
async def dumping(at: Site, port: int) -> AsyncIterator[None]:
    """A crash kernel that says so every second, from 127.0.0.1, and is heard."""
    assert SENDERS, "Debian's fence-agents are not installed: deploy/bootstrap.sh test"
    before = (await listener(at)).heard
    process = await asyncio.create_subprocess_exec(SENDERS[0], "-p", str(port), "-i", "1", "127.0.0.1")

    async def is_heard() -> bool:
        return (await listener(at)).heard > before

    try:
        await until(is_heard)
        yield
    finally:
        process.kill()
        await process.wait()


def send(port: int, data: bytes, sender: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as by:
        by.bind((sender, 0))
        by.sendto(data, ("127.0.0.1", port))


@asynccontextmanager
async def listening_site(
    configured: Settings, tmp_path: Path, **more: str
) -> AsyncIterator[tuple[Site, int]]:
    port = free_port()
    settings = {
        "VOLERY_HA_KDUMP_PORT": str(port),
        "VOLERY_HA_KDUMP_FINISHED_SECONDS": "6",
        "VOLERY_HA_SILENCE_BEFORE_FENCE_SECONDS": str(SILENCE_SECONDS),
    } | more
    async with site(configured, tmp_path, **settings) as at:
        yield at, port


async def listener(at: Site) -> KdumpListener:
    found = (await at.bus.ask(GET_FENCING, AskFencing())).kdump
    assert found is not None
    return found


async def is_known(at: Site, port: int, sender: str) -> None:
    """Waits until messages from there count."""

    async def counted() -> bool:
        before = (await listener(at)).heard
        send(port, MESSAGE, sender)
        return (await listener(at)).heard > before

    await until(counted)


async def test_power_waits_while_a_host_dumps_and_goes_on_when_it_is_over(
    configured: Settings, tmp_path: Path
) -> None:
    async with listening_site(configured, tmp_path) as (at, port):
        await at.set_power(0, kdump_addresses=("127.0.0.1",))
        await at.tested(0)
        await is_known(at, port, "127.0.0.1")
        async with dumping(at, port):
            at.hearts[0].stop()
            beyond = asyncio.get_running_loop().time() + SILENCE_SECONDS + 2
            held = await at.says(0, "its crash kernel at 127.0.0.1 writes a dump")
            kinds = {e.kind: e for e in held.evidence}
            assert kinds["kdump"].by == "127.0.0.1"
            assert not kinds["kdump"].trusted
            # Beyond the silence before a fence: it proves nothing, and nothing is switched.
            await until(lambda: _passed(beyond), 10)
            still = await at.liveness(0)
            assert (still.state, still.proof) == ("non_responsive", None)
            assert at.bmc(0).did(PowerAction.OFF) == 0
        dead = await at.becomes(0, "dead")
        assert dead.proof is not None
        assert dead.proof.kind is ProofKind.BMC_OFF
        assert at.bmc(0).did(PowerAction.OFF) == 1


async def _passed(moment: float) -> bool:
    return asyncio.get_running_loop().time() >= moment


async def test_a_dump_by_a_closed_network_is_the_proof_and_nobody_else_is_believed(
    configured: Settings, tmp_path: Path
) -> None:
    async with listening_site(configured, tmp_path) as (at, port):
        await at.set_power(0, kdump_addresses=("127.0.0.1",), kdump_proves=True)
        await at.set_power(1, kdump_addresses=("127.0.0.2",))
        with pytest.raises(Refused, match="already those of host h0"):
            await at.set_power(2, kdump_addresses=("::ffff:127.0.0.1",))
        for number in (0, 1):
            await at.tested(number)
        await is_known(at, port, "127.0.0.2")
        send(port, b"x", "127.0.0.1")
        send(port, MESSAGE, "127.0.0.3")
        send(port, struct.pack("=II", 0x1B302A40, 2), "127.0.0.1")

        async def ignored() -> bool:
            return (await listener(at)).ignored.items() >= {"wrong_size": 1, "unknown_version": 1}.items()

        await until(ignored)
        told = await listener(at)
        assert told.ignored["unknown_address"] >= 1
        assert (told.port, told.last_ignored) == (port, "from 127.0.0.1: unknown_version")
        async with dumping(at, port):
            at.hearts[0].stop()
            dead = await at.becomes(0, "dead")
        assert dead.proof is not None
        assert (dead.proof.kind, dead.proof.boot_id) == (ProofKind.KDUMP, "boot-1")
        assert "its crash kernel said twice" in dead.proof.details
        assert {e.kind: e for e in dead.evidence}["kdump_first"].trusted
        assert at.bmc(0).did(PowerAction.OFF) == 0
        # It lives: whoever told it can send by that network, and is believed no more.
        at.hearts[0].start()
        up = await at.becomes(0, "up")
        assert up.proof is None
        after = await at.power(0)
        assert not after.kdump_proves
        assert "its network is open" in after.test_words


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 0))
        port = other.getsockname()[1]
        with pytest.raises(
            OSError, match=rf"UDP port {port} for crash kernels \(VOLERY_HA_KDUMP_PORT\): Address"
        ):
            open_socket(port)


async def test_a_port_that_is_taken_stops_nothing_else_and_is_taken_once_it_is_free(
    configured: Settings, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 0))
        port = other.getsockname()[1]
        async with site(configured, tmp_path, 1, powered=False, VOLERY_HA_KDUMP_PORT=str(port)) as at:
            assert f"UDP port {port} for crash kernels" in (await listener(at)).problem
            other.close()

            async def heard() -> bool:
                send(port, MESSAGE, "127.0.0.9")
                found = await listener(at)
                return not found.problem and found.ignored.get("unknown_address", 0) > 0

            await until(heard)
