"""The supervisor: restarts what dies, adopts what lives, stops in order, and dies without harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.setup.supervise import STEADY
from volery.runtime.identity import Realm
from volery.setup import embedded, processes, programs, servers, supervisor
from volery.setup.home import Home
from volery.setup.processes import ProcessId

SECONDS = 30.0


def until(found: Callable[[], bool]) -> None:
    """There is no event to wait for: what is watched is another process's doing."""
    deadline = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.02)


@pytest.fixture
def prepared(home: Home) -> Iterator[Home]:
    home.change_settings({"VOLERY_SETUP_NATS_PORT": str(processes.free_port())})
    servers.ensure_certificates(home)
    Realm.create(home.bus_credentials)
    programs.save_environment(home, programs.environment(home, {}))
    yield home
    process = STEADY.process(home)
    if process is not None:
        processes.signal_process(process, signal.SIGKILL)


@pytest.fixture
def supervise(prepared: Home) -> Iterator[Callable[[], ProcessId]]:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> ProcessId:
        log = (prepared.log / "supervisor.log").open("ab")
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.setup.supervise"],
            env={**os.environ, "VOLERY_HOME": str(prepared.path)},
            cwd=Path(__file__).parents[2],
            stdout=log,
            stderr=log,
        )
        log.close()
        started.append(child)
        process = ProcessId.of(child.pid)
        assert process is not None
        return process

    yield start
    for child in started:
        child.terminate()
        child.wait(60)


def starts(home: Home) -> list[str]:
    path = home.run / "starts"
    return path.read_text().splitlines() if path.exists() else []


def everything(home: Home) -> list[ProcessId | None]:
    return [embedded.status(home, "nats"), embedded.status(home, "postgres"), STEADY.process(home)]


def test_starts_all_restarts_what_is_killed_and_stops_in_order(
    prepared: Home, supervise: Callable[[], ProcessId]
) -> None:
    myself = supervise()
    until(lambda: all(everything(prepared)) and bool(starts(prepared)))
    before = everything(prepared)
    for process in before:
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: len(starts(prepared)) == 2)
    until(lambda: all(new and new != old for new, old in zip(everything(prepared), before, strict=True)))
    processes.signal_process(myself, signal.SIGTERM)
    assert processes.wait_for_exit(myself, SECONDS)
    assert everything(prepared) == [None, None, None]
    assert (prepared.run / "ended-in-order").exists()
    told = (prepared.log / "supervisor.log").read_text()
    assert "ended by signal SIGKILL" in told


def test_killed_itself_it_harms_nothing_and_the_next_adopts(
    prepared: Home, supervise: Callable[[], ProcessId]
) -> None:
    first = supervise()
    until(lambda: all(everything(prepared)) and bool(starts(prepared)))
    before = everything(prepared)
    os.kill(first.pid, signal.SIGKILL)
    assert processes.wait_for_exit(first, SECONDS)
    assert everything(prepared) == before
    supervise()
    until(lambda: "steady is process" in (prepared.log / "supervisor.log").read_text().rpartition("nats")[2])
    assert everything(prepared) == before
    assert len(starts(prepared)) == 1
    steady = before[2]
    assert steady is not None
    os.kill(steady.pid, signal.SIGKILL)
    until(lambda: (now := STEADY.process(prepared)) is not None and now != steady)


def test_changed_settings_start_the_program_anew_after_a_hangup(
    prepared: Home, supervise: Callable[[], ProcessId]
) -> None:
    myself = supervise()
    until(lambda: len(starts(prepared)) == 1)
    before = STEADY.process(prepared)
    processes.signal_process(myself, signal.SIGHUP)
    prepared.change_settings({"VOLERY_TEST_VALUE": "new"})
    assert programs.save_environment(prepared, programs.environment(prepared, {}))
    processes.signal_process(myself, signal.SIGHUP)
    until(lambda: len(starts(prepared)) == 2)
    assert STEADY.process(prepared) != before
    assert starts(prepared)[1].endswith(" new")


def test_what_ends_again_and_again_is_started_ever_more_rarely(
    prepared: Home, supervise: Callable[[], ProcessId]
) -> None:
    (prepared.run / "end-at-once").touch()
    started = time.monotonic()
    supervise()
    until(lambda: len(starts(prepared)) >= 4)
    # At once, then after 0.5 and 1 s: the fourth start isn't sooner.
    assert time.monotonic() - started >= 1.5
    assert "ended with status 3" in (prepared.log / "supervisor.log").read_text()


def test_logs_are_bounded_and_their_writers_go_on(home: Home) -> None:
    path = home.log / "x.log"
    with path.open("ab") as writer:
        for text in (b"first" * 100, b"second" * 100, b"third" * 100, b"fourth" * 100):
            writer.write(text)
            writer.flush()
            supervisor.rotate_logs(home.log, limit_bytes=100, kept=2)
        writer.write(b"on")
    assert path.read_bytes() == b"on"
    assert (home.log / "x.log.1").read_bytes() == b"fourth" * 100
    assert (home.log / "x.log.2").read_bytes() == b"third" * 100
    assert sorted(p.name for p in home.log.iterdir()) == ["x.log", "x.log.1", "x.log.2"]


def test_programs_get_settings_but_nothing_of_set_up_s_own(home: Home) -> None:
    home.change_settings({"VOLERY_HA_X": "1", "VOLERY_SETUP_NAMES": "volery.example"})
    values = programs.environment(home, {"VOLERY_HA_X": "0", "VOLERY_BUS_SERVERS": "tls://x"})
    assert values["VOLERY_HA_X"] == "1"
    assert values["VOLERY_BUS_SERVERS"] == "tls://x"
    assert not any(name.startswith("VOLERY_SETUP_") for name in values)
    assert "HOME" not in values
