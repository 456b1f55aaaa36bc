"""Keeps NATS, PostgreSQL and Volery's programs running where no systemd does; one per installation.

It waits for events only: a process that ends wakes it (pidfd), so does a signal. Killed itself, it
leaves everything running; the next one adopts what it finds.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from volery.setup import embedded, libvirt_daemons, processes, servers
from volery.setup.errors import SetupError
from volery.setup.home import Home
from volery.setup.processes import ProcessId
from volery.setup.programs import (
    PROGRAMS,
    Program,
    fingerprint,
    has_local_host,
    load_environment,
    programs_of,
)

FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 30.0
STABLE_SECONDS = 60.0
"""Who ran so long is started at once again; who ends sooner waits twice as long each time."""
_HOUSEKEEPING_SECONDS = 30.0
_RENEWAL_SECONDS = 3600.0
LOG_BYTES = 20 * 2**20
LOGS_KEPT = 3
_STOP_SECONDS = 30.0
_NAME = "supervisor"


@dataclass
class _Ward:
    """One process in our care."""

    name: str
    start: Callable[[], ProcessId | None]
    """Starts or adopts it; None when it can't be yet. Raises SetupError when it doesn't come up."""
    stop: Callable[[], None]
    process: ProcessId | None = None
    descriptor: int | None = None
    """Becomes readable when the process ends."""
    started_at: float = 0.0
    delay_seconds: float = 0.0
    retry_at: float = 0.0
    fingerprint: str = ""


@dataclass
class Supervisor:
    """The loop. `run` returns after SIGTERM or SIGINT, when everything it kept has been stopped."""

    home: Home
    programs: Sequence[Program]
    wards: list[_Ward] = field(default_factory=list)
    _stopping: bool = False
    _reload: bool = False

    def run(self) -> None:
        self.wards = [*self._server_wards(), *(self._program_ward(p) for p in self.programs)]
        wake = self._listen_for_signals()
        housekeeping_at = renewal_at = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if now >= housekeeping_at:
                rotate_logs(self.home.log)
                housekeeping_at = now + _HOUSEKEEPING_SECONDS
            if now >= renewal_at:
                self._renew_certificates()
                renewal_at = now + _RENEWAL_SECONDS
            if self._reload:
                self._reload = False
                self._restart_changed()
            for ward in self.wards:
                if ward.process is None and now >= ward.retry_at and not self._stopping:
                    self._start(ward)
            self._wait(wake, housekeeping_at)
        self._stop_all()

    def _server_wards(self) -> list[_Ward]:
        home = self.home
        wards = [
            _Ward("postgres", lambda: servers.start_postgres(home).process, lambda: _end(home, "postgres")),
            _Ward("nats", lambda: servers.start_nats(home).process, lambda: _end(home, "nats")),
        ]
        if has_local_host(home) and libvirt_daemons.ours_to_keep():
            # Never stopped with us: other installations, and every virtual machine, may depend on them.
            wards += [
                _Ward(daemon.name, daemon.ensure, lambda: None)
                for daemon in libvirt_daemons.DAEMONS
                if daemon.available()
            ]
        return wards

    def _program_ward(self, program: Program) -> _Ward:
        ward = _Ward(program.name, lambda: None, lambda: stop_program(self.home, program))

        def start() -> ProcessId | None:
            if not program.ready(self.home):
                return None
            found = program.process(self.home)
            if found is not None and _started_as(self.home, program) == fingerprint(self.home):
                return found
            if found is not None:
                stop_program(self.home, program)
            return start_program(self.home, program)

        ward.start = start
        return ward

    def _start(self, ward: _Ward) -> None:
        try:
            ward.process = ward.start()
        except SetupError as error:
            say(f"{ward.name} isn't running: {error}")
            self._back_off(ward)
            return
        if ward.process is None:
            self._back_off(ward)
            return
        try:
            ward.descriptor = os.pidfd_open(ward.process.pid)
        except ProcessLookupError:
            self._ended(ward)
            return
        ward.started_at = time.monotonic()
        say(f"{ward.name} is process {ward.process.pid}")
        if not ward.process.alive():
            self._ended(ward)

    def _ended(self, ward: _Ward) -> None:
        assert ward.process is not None
        status = _status_of(ward.process.pid)
        say(f"{ward.name} (process {ward.process.pid}) ended{status}")
        if ward.descriptor is not None:
            os.close(ward.descriptor)
            ward.descriptor = None
        ward.process = None
        if time.monotonic() - ward.started_at >= STABLE_SECONDS:
            ward.delay_seconds = 0.0
        self._back_off(ward)

    def _back_off(self, ward: _Ward) -> None:
        ward.retry_at = time.monotonic() + ward.delay_seconds
        ward.delay_seconds = min(max(ward.delay_seconds * 2, FIRST_DELAY_SECONDS), LONGEST_DELAY_SECONDS)

    def _restart_changed(self) -> None:
        """After `make up` ran again: what would now run differently is started anew."""
        wanted = fingerprint(self.home)
        for program, ward in zip(reversed(self.programs), reversed(self.wards), strict=False):
            ward.delay_seconds = ward.retry_at = 0.0
            if ward.process is not None and _started_as(self.home, program) != wanted:
                say(f"{ward.name} is started anew: its settings or its code changed")
                ward.stop()
        for ward in self.wards:
            ward.retry_at = 0.0

    def _renew_certificates(self) -> None:
        try:
            if servers.renew_certificates(self.home):
                say("certificates were renewed")
        except SetupError as error:
            say(f"certificates can't be renewed: {error}")

    def _wait(self, wake: socket.socket, housekeeping_at: float) -> None:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        by_descriptor = {w.descriptor: w for w in self.wards if w.descriptor is not None}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.POLLIN)
        due = min([housekeeping_at, *(w.retry_at for w in self.wards if w.process is None)])
        for descriptor, _ in poll.poll(max(0.0, due - time.monotonic()) * 1000 + 1):
            if descriptor == wake.fileno():
                self._take_signals(wake)
            elif by_descriptor[descriptor].process is not None:
                self._ended(by_descriptor[descriptor])

    def _listen_for_signals(self) -> socket.socket:
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        signal.set_wakeup_fd(writing.detach(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        return reading

    def _take_signals(self, wake: socket.socket) -> None:
        for number in wake.recv(64):
            if number == signal.SIGHUP:
                self._reload = True
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._stopping = True

    def _stop_all(self) -> None:
        say("stopping")
        order = {"postgres": 0, "nats": 1}
        for ward in sorted(
            self.wards, key=lambda w: order.get(w.name, 2 + self.wards.index(w)), reverse=True
        ):
            try:
                ward.stop()
            except SetupError as error:
                say(str(error))
        say("stopped")


def _end(home: Home, name: embedded.Name) -> None:
    embedded.stop(home, name)


def _status_of(pid: int) -> str:
    """How a child of ours ended; nothing is known of an adopted process."""
    try:
        _, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return ""
    code = os.waitstatus_to_exitcode(status)
    return f" by signal {signal.Signals(-code).name}" if code < 0 else f" with status {code}"


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}", flush=True)


# --- programs -------------------------------------------------------------------------------


def start_program(home: Home, program: Program) -> ProcessId:
    """Starts the program with the environment that `up` saved."""
    (home.run / f"{program.name}.started-as").write_text(fingerprint(home))
    return processes.spawn(
        program.command(),
        lock=program.lock(home),
        record=program.record(home),
        log=program.log(home),
        environment=load_environment(home),
    )


def stop_program(home: Home, program: Program) -> None:
    process = program.process(home)
    if process is not None and not processes.stop(
        process, ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, 10.0))
    ):
        raise SetupError(f"{program.title} (process {process.pid}) doesn't end.")


def _started_as(home: Home, program: Program) -> str:
    try:
        return (home.run / f"{program.name}.started-as").read_text()
    except FileNotFoundError:
        return ""


def rotate_logs(directory: Path, limit_bytes: int = LOG_BYTES, kept: int = LOGS_KEPT) -> None:
    """Moves on every log above the limit; the writers keep their file and go on at its new start.

    They append, so that emptying the file under them is safe. A line written between the copy and
    the emptying is lost.
    """
    for path in directory.glob("*.log"):
        if path.stat().st_size <= limit_bytes:
            continue
        for number in range(kept - 1, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{number + 1}"))
        path.with_name(f"{path.name}.1").write_bytes(path.read_bytes())
        os.truncate(path, 0)


# --- the supervisor's own process -----------------------------------------------------------


def process(home: Home) -> ProcessId | None:
    """The installation's running supervisor."""
    return processes.running(home.run / f"{_NAME}.lock", home.run / f"{_NAME}.json")


def start(home: Home) -> ProcessId:
    """The installation's supervisor; a running one is told to look for changes."""
    with processes.exclusive(home.run / "supervisor.starting", timeout_seconds=60):
        found = process(home)
        if found is not None:
            processes.signal_process(found, signal.SIGHUP)
            return found
        return processes.spawn(
            [sys.executable, "-m", "volery.setup.supervisor"],
            lock=home.run / f"{_NAME}.lock",
            record=home.run / f"{_NAME}.json",
            log=home.log / f"{_NAME}.log",
            environment=load_environment(home),
        )


def stop(home: Home) -> bool:
    """Stops the supervisor and all that it keeps, in order; also what a killed one left behind.

    Whether anything ran.
    """
    found = process(home)
    if found is not None:
        processes.stop(found, ((signal.SIGTERM, 180.0), (signal.SIGKILL, 10.0)))
    left = [p for p in reversed(PROGRAMS) if p.process(home) is not None]
    for program in left:
        stop_program(home, program)
    servers_left = [name for name in ("nats", "postgres") if embedded.stop(home, name)]
    return found is not None or bool(left) or bool(servers_left)


if __name__ == "__main__":
    here = Home.from_environment()
    Supervisor(here, programs_of(here)).run()
