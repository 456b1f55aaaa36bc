"""What leases mean, and what sanlock, wdmd and the kernel say of them, read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from host_agent import leases, sanlock
from host_agent.watchdog import HEADER, Device, Wdmd, ask_wdmd, devices, judged
from volery.contracts.leases import (
    ExpiredLease,
    HostLeaseReading,
    LockspaceReport,
    Watchdog,
    dead_seconds,
    fail_seconds,
    proven,
    unchanged_seconds,
)

NAME = "a-host"


def reading(asked: float, timestamp: int = 700, **changes: object) -> HostLeaseReading:
    values = {
        "asked_seconds": asked,
        "answered_seconds": asked + 0.5,
        "holder": NAME,
        "generation": 3,
        "timestamp": timestamp,
        "io_timeout_seconds": 10,
    }
    return HostLeaseReading(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("io_timeout", "fails", "dead"), [(1, 8, 68), (2, 16, 76), (10, 80, 140), (20, 160, 220)]
)
def test_times_are_sanlocks_own(io_timeout: int, fails: int, dead: int) -> None:
    assert (fail_seconds(io_timeout), dead_seconds(io_timeout)) == (fails, dead)


@pytest.mark.parametrize(
    ("second", "seconds"),
    [
        (reading(250), 149.5),  # from the answer of the first to the question of the second
        (reading(250, timestamp=701), 0),
        (reading(250, generation=4), 0),
        (reading(250, holder="another"), 0),
        (reading(100.2), 0),  # overlapping
        (reading(50), 0),  # told in the wrong order
    ],
)
def test_a_lease_was_not_renewed_between_two_readings(second: HostLeaseReading, seconds: float) -> None:
    assert unchanged_seconds(reading(100), second) == seconds


JOINED = LockspaceReport(domain_id="d", host_number=1, generation=3)
RESETTING = LockspaceReport(domain_id="d", host_number=1, generation=3, reset_host=True)
EARLIER = LockspaceReport(domain_id="d", host_number=1, generation=2, reset_host=True)
SAFE = Watchdog(armed=True, inescapable=True)
SOFT = Watchdog(armed=True)


@pytest.mark.parametrize(
    ("now", "unchanged", "joined", "watchdog", "proof"),
    [
        (reading(0), 143.0, JOINED, SAFE, ExpiredLease.NO_HOLDERS),
        (reading(0), 143.0, RESETTING, SAFE, ExpiredLease.HOST_RESET),
        (reading(0), 142.9, RESETTING, SAFE, ExpiredLease.NOTHING),
        (reading(0), 79.0, RESETTING, SAFE, ExpiredLease.NOTHING),
        (reading(0, io_timeout_seconds=2), 79.0, RESETTING, SAFE, ExpiredLease.HOST_RESET),
        (reading(0), 1e6, RESETTING, SOFT, ExpiredLease.NOTHING),
        (reading(0), 1e6, RESETTING, Watchdog(), ExpiredLease.NOTHING),
        (reading(0), 1e6, None, SAFE, ExpiredLease.NOTHING),
        (
            reading(0),
            1e6,
            EARLIER,
            SAFE,
            ExpiredLease.NOTHING,
        ),  # reported of another boot than the lease is of
        (reading(0, timestamp=0), 1e6, RESETTING, SAFE, ExpiredLease.NOTHING),  # given back: its host lives
    ],
)
def test_what_an_expired_lease_proves(
    now: HostLeaseReading,
    unchanged: float,
    joined: LockspaceReport | None,
    watchdog: Watchdog,
    proof: ExpiredLease,
) -> None:
    assert proven(now, unchanged, joined, watchdog) is proof


WDMD = Wdmd(test_interval=10, fire_seconds=60, last_pet=995)
HARDWARE = Device("watchdog0", "iTCO_wdt", True)
SOFTWARE = Device("watchdog0", "Software Watchdog", True)
IDLE = Device("watchdog1", "iTCO_wdt", False)


@pytest.mark.parametrize(
    ("uses", "wdmd", "found", "armed", "inescapable", "problem"),
    [
        (True, WDMD, (HARDWARE,), True, True, ""),
        (True, WDMD, (IDLE, HARDWARE), True, True, ""),
        (True, WDMD, (SOFTWARE, IDLE), True, False, "a kernel that is stuck"),
        (True, WDMD, (IDLE,), True, False, "doesn't show as active"),
        (True, WDMD, (), True, False, "doesn't show as active"),
        (False, WDMD, (HARDWARE,), False, False, "remove `-w 0`"),
        (True, None, (HARDWARE,), False, False, "wdmd doesn't run"),
        (True, Wdmd(10, 30, 995), (HARDWARE,), False, False, "sanlock needs 60 s"),
        (True, Wdmd(10, 60, 960), (HARDWARE,), False, False, "about to be reset"),
    ],
)
def test_whether_a_host_can_outlive_its_watchdog(
    uses: bool, wdmd: Wdmd | None, found: tuple[Device, ...], armed: bool, inescapable: bool, problem: str
) -> None:
    said = judged(uses, wdmd, found, now=1000.0)
    assert (said.armed, said.inescapable) == (armed, inescapable)
    assert problem in said.problem
    assert bool(said.problem) is not inescapable


def test_devices_are_read_as_the_kernel_tells_them(tmp_path: Path) -> None:
    for name, identity, state in (("watchdog0", "iTCO_wdt\n", "active\n"), ("watchdog1", "", "inactive\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "identity").write_text(identity)
        (tmp_path / name / "state").write_text(state)
    (tmp_path / "watchdog2").mkdir()
    assert devices(tmp_path) == (HARDWARE, Device("watchdog1", "", False), Device("watchdog2", "", False))
    assert devices(tmp_path / "nowhere") == ()


async def test_wdmd_is_asked_over_its_socket(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = HEADER.unpack(await reader.readexactly(HEADER.size))
        writer.write(HEADER.pack(0, asked[1], 0, 0, 10, 60, 995, 0, 0, b""))
        writer.close()

    path = str(tmp_path / "wdmd.sock")
    assert await ask_wdmd(path) is None
    server = await asyncio.start_unix_server(answer, path)
    async with server:
        assert await ask_wdmd(path) == WDMD


STATUS = """\
daemon a-host
    our_host_name=a-host
    use_watchdog=1
    version_str=3.8.5
p -1 helper
    ci=0
p 28 qemu
s 0192f0c4-4444-7abc-8def-000000000001:7:/a\\:b/lockspace:0
    io_timeout=2
    host_generation=4
    external_used=1
    space_dead=0
    renewal_last_result=-202
r 0192f0c4-4444-7abc-8def-000000000001:0192f0c4-1111-7abc-8def-000000000001:/a\\:b/x:0:1 p 28
    list=held
r LS:R2:/x:0:9 p -1
"""


def test_the_daemons_words_are_read() -> None:
    said = sanlock.read_status(STATUS)
    assert (said.version, said.name, said.uses_watchdog) == ("3.8.5", "a-host", True)
    (joined,) = said.lockspaces
    assert (joined.host_number, joined.generation, joined.io_timeout_seconds) == (7, 4, 2)
    assert (joined.reset_host, joined.failing) == (True, True)
    assert [(one.key[:4], one.pid) for one in said.held] == [("0192", 28), ("R2", 0)]
    assert sanlock.read_status("") == sanlock.Status()
    assert sanlock.result_of("acquire fd 3\nacquire done -243\n", 1) == -243
    assert sanlock.result_of("gibberish", 1) == -1


def test_libvirt_is_told_apart_by_its_configuration(tmp_path: Path) -> None:
    conf, plugins = tmp_path / "qemu.conf", tmp_path / "plugins"
    assert "no sanlock plugin" in leases.libvirt_problem(conf, (str(plugins),))
    (plugins / "lock-driver").mkdir(parents=True)
    (plugins / "lock-driver" / "sanlock.so").touch()
    assert "can't be read" in leases.libvirt_problem(conf, (str(plugins),))
    for text, works in (
        ('#lock_manager = "sanlock"\n', False),
        ('lock_manager = "lockd"\n', False),
        ('user = "root"\nlock_manager="sanlock"\n', True),
    ):
        conf.write_text(text)
        assert (leases.libvirt_problem(conf, (str(plugins),)) == "") is works
