"""NATS and PostgreSQL as Volery's own children: adopted when alive, started when not, never twice.

Each server has one directory with a lock file that it holds while it lives (see `processes`), a
record of its pid and start time, and a rendered configuration. They run detached: whoever
started them may end, and the next one finds them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Literal

from volery.setup import nats_server, postgres_server, processes
from volery.setup import undertaker as undertaker_script
from volery.setup.errors import SetupError
from volery.setup.home import Home
from volery.setup.nats_server import NatsOperator, NatsOptions, NatsTls
from volery.setup.postgres_server import PostgresOptions
from volery.setup.processes import ProcessId

__all__ = [
    "Embedded",
    "NatsOperator",
    "NatsOptions",
    "NatsTls",
    "PostgresOptions",
    "start_nats",
    "start_postgres",
    "status",
    "stop",
    "temporary_nats",
    "temporary_postgres",
]

Name = Literal["nats", "postgres"]

_START_SECONDS = 60.0  # a PostgreSQL that recovers from a crash may replay a gigabyte
_POLL_SECONDS = 0.005
_DISK = Path("/tmp")  # noqa: S108 - mkdtemp makes a place of our own in it


@dataclass(frozen=True)
class Embedded:
    """A running server of ours."""

    name: Name
    process: ProcessId
    url: str
    """NATS: `nats://127.0.0.1:4222` or `tls://…`; PostgreSQL: the superuser's DSN."""
    log: Path
    socket_directory: Path | None = None
    adopted: bool = field(default=False, compare=False)
    """It was already running."""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def dsn(self) -> str:
        """The superuser's DSN (PostgreSQL), for the operating system's root or its own user."""
        return self.url

    def service_dsn(self, service: str, password: str, database: str = "volery") -> str:
        """The DSN of a service's own role on its own database."""
        if self.socket_directory is None:
            raise SetupError(f"{self.name} has no database roles.")
        return postgres_server.dsn(self.socket_directory, service, database, password)


@dataclass(frozen=True)
class _Places:
    """Where one server keeps what set-up knows about it."""

    lock: Path
    starting: Path
    record: Path
    log: Path

    @classmethod
    def of(cls, home: Home, name: Name) -> _Places:
        directory = home.nats if name == "nats" else home.postgres
        return cls(
            directory / "server.lock",
            directory / "starting.lock",
            home.run / f"{name}.json",
            home.log / f"{name}.log",
        )


# Signals in order, each with the seconds that it is given.
_STOP: dict[Name, tuple[tuple[int, float], ...]] = {
    "nats": ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)),
    # "Fast" ends sessions and writes a checkpoint; "immediate" leaves that to recovery.
    "postgres": ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)),
}


@dataclass(frozen=True)
class Launch:
    """How a server is started, its configuration being written."""

    arguments: list[str]
    places: _Places
    user: int | None
    group: int | None
    changed: bool
    """The configuration differs from the last time: a live server must read it again."""
    forget_predecessor: Callable[[], None]
    """Removes what a killed server left behind; only to be called while nobody else can run."""

    @property
    def lock(self) -> Path:
        return self.places.lock

    @property
    def record(self) -> Path:
        return self.places.record

    def spawn(self) -> ProcessId:
        return processes.spawn(
            self.arguments,
            lock=self.places.lock,
            record=self.places.record,
            log=self.places.log,
            user=self.user,
            group=self.group,
            when_alone=self.forget_predecessor,
        )


def start_nats(home: Home, options: NatsOptions | None = None) -> Embedded:
    """The installation's NATS server, running and answering; adopted or started.

    A port that nobody chose is picked once and kept in settings.env (`VOLERY_SETUP_NATS_PORT`). A
    live server whose configuration changed, such as a renewed certificate, is told to read it
    again. Raises SetupError with the log's end when it doesn't come up.
    """
    options = options or NatsOptions()
    places = _Places.of(home, "nats")
    with processes.exclusive(places.starting, timeout_seconds=_START_SECONDS):
        launch, port = _prepare_nats(home, options)
        process, adopted = _running(
            launch, "nats-server", lambda p: nats_server.ports_file(home.nats, p.pid).exists()
        )
    url = f"{'tls' if options.tls else 'nats'}://127.0.0.1:{port}"
    return Embedded("nats", process, url, places.log, adopted=adopted)


def launch_nats(home: Home, options: NatsOptions) -> Launch:
    """Everything ready to start the server, for a supervisor that isn't ours."""
    places = _Places.of(home, "nats")
    with processes.exclusive(places.starting, timeout_seconds=_START_SECONDS):
        return _prepare_nats(home, options)[0]


def _prepare_nats(home: Home, options: NatsOptions) -> tuple[Launch, int]:
    places = _Places.of(home, "nats")
    live = processes.running(places.lock, places.record) is not None
    port = _nats_port(home, options, taken_is_ours=live)
    changed = nats_server.write_configuration(home.nats, replace(options, port=port))
    launch = Launch(
        nats_server.command(home.nats),
        places,
        None,
        None,
        changed,
        lambda: nats_server.forget_ports(home.nats),
    )
    return launch, port


def _running(launch: Launch, program: str, ready: Callable[[ProcessId], bool]) -> tuple[ProcessId, bool]:
    """(process, adopted) once it answers."""
    live = processes.running(launch.lock, launch.record)
    if live is not None:
        if launch.changed:
            processes.signal_process(live, signal.SIGHUP)
        if _comes_up(ready, live, program, launch.places.log):
            return live, True
    process = launch.spawn()
    if not _comes_up(ready, process, program, launch.places.log):
        raise SetupError(processes.exit_report(program, launch.places.log))
    return process, False


def _nats_port(home: Home, options: NatsOptions, *, taken_is_ours: bool) -> int:
    kept = home.settings().get("VOLERY_SETUP_NATS_PORT")
    port = options.port or (int(kept) if kept and kept.isdigit() else 0)
    if not port:
        port = processes.free_port(options.preferred_port, options.host)
    elif not taken_is_ours and not processes.port_is_free(port, options.host):
        raise SetupError(
            f"NATS can't listen on TCP port {port}: another program does. End that program"
            f" (`ss -ltnp 'sport = :{port}'` names it), or set VOLERY_SETUP_NATS_PORT in"
            f" {home.settings_file} to a free port; hosts enrolled before must be told the new one."
        )
    home.change_settings({"VOLERY_SETUP_NATS_PORT": str(port)})
    return port


def start_postgres(home: Home, options: PostgresOptions | None = None) -> Embedded:
    """The installation's PostgreSQL, running and accepting connections; adopted or started.

    The data directory is made when there is none. Raises SetupError with what to do.
    """
    places = _Places.of(home, "postgres")
    with processes.exclusive(places.starting, timeout_seconds=_START_SECONDS):
        launch, cluster = _prepare_postgres(home, options or PostgresOptions())
        process, adopted = _running(
            launch, "postgres", lambda p: postgres_server.accepts_connections(cluster, p.pid)
        )
    url = postgres_server.dsn(cluster.sockets, "postgres", "postgres")
    return Embedded("postgres", process, url, places.log, cluster.sockets, adopted=adopted)


def launch_postgres(home: Home, options: PostgresOptions | None = None) -> Launch:
    """Everything ready to start the server, for a supervisor that isn't ours."""
    places = _Places.of(home, "postgres")
    with processes.exclusive(places.starting, timeout_seconds=_START_SECONDS):
        return _prepare_postgres(home, options or PostgresOptions())[0]


def _prepare_postgres(home: Home, options: PostgresOptions) -> tuple[Launch, postgres_server.Cluster]:
    places = _Places.of(home, "postgres")
    cluster = postgres_server.prepare(home.postgres, home.run, options)
    changed = postgres_server.write_configuration(cluster, options)
    launch = Launch(
        postgres_server.command(cluster),
        places,
        cluster.user,
        cluster.group,
        changed,
        lambda: postgres_server.forget_crashed_server(cluster),
    )
    return launch, cluster


def status(home: Home, name: Name) -> ProcessId | None:
    """The running server's process, None when it isn't running."""
    places = _Places.of(home, name)
    return processes.running(places.lock, places.record)


def stop(home: Home, name: Name) -> bool:
    """Stops the server in good order, by force in the end; whether there was one to stop."""
    places = _Places.of(home, name)
    if not places.lock.exists():
        return False
    with processes.exclusive(places.starting, timeout_seconds=_START_SECONDS):
        process = processes.running(places.lock, places.record)
        if process is None:
            return False
        if not processes.stop(process, _STOP[name]):
            raise SetupError(f"{name} (process {process.pid}) doesn't end. Look at {places.log}.")
        places.record.unlink(missing_ok=True)
    return True


def _comes_up(ready: Callable[[ProcessId], bool], process: ProcessId, program: str, log: Path) -> bool:
    """True once the server answers, False when it ended instead; SetupError when neither."""
    deadline = time.monotonic() + _START_SECONDS
    while process.alive():
        if ready(process):
            return True
        if time.monotonic() > deadline:
            raise SetupError(
                f"{program} (process {process.pid}) doesn't answer after {_START_SECONDS:.0f} s."
                f" Look at {log}."
            )
        time.sleep(_POLL_SECONDS)
    return False


def throw_away_place(memory: Path = Path("/dev/shm"), least_bytes: int = 4 * 2**30) -> Path:  # noqa: S108
    """Where throw-away servers keep their files: in memory if it has room for them, else on disk.

    They sync as ever, but on a disk that many tests write to each sync takes long. A PostgreSQL writes
    up to max_wal_size, and each worker of a test run has one.
    """
    try:
        space = os.statvfs(memory)
    except OSError:
        return _DISK
    roomy = space.f_bavail * space.f_frsize >= least_bytes and os.access(memory, os.W_OK)
    return memory if roomy else _DISK


@contextmanager
def temporary_home(prefix: str = "volery-test-", parent: Path = _DISK) -> Iterator[Home]:
    """A throw-away state directory, in /tmp unless told where, that PostgreSQL's unprivileged user can reach."""
    home = Home(Path(mkdtemp(prefix=prefix, dir=parent)))
    try:
        home.create()
        yield home
    finally:
        rmtree(home.path)


@contextmanager
def _buried(server: Embedded, home: Home) -> Iterator[None]:
    """Should this process be killed, the server ends and its directory goes."""
    undertaker = subprocess.Popen(
        [sys.executable, "-I", "-S", undertaker_script.__file__, str(server.pid), str(home.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert undertaker.stdin is not None
    try:
        yield
    finally:
        undertaker.kill()  # we live, so the server is stopped in good order
        undertaker.stdin.close()
        undertaker.wait()


@contextmanager
def temporary_nats(options: NatsOptions | None = None) -> Iterator[Embedded]:
    """A NATS server with JetStream (every message synced) on a free loopback port, then gone.

    Without options it asks for no credentials and speaks no TLS.
    """
    with temporary_home("volery-nats-", throw_away_place()) as home:
        try:
            server = start_nats(home, options or NatsOptions(preferred_port=None))
            with _buried(server, home):
                yield server
        finally:
            stop(home, "nats")


@contextmanager
def temporary_postgres(options: PostgresOptions | None = None) -> Iterator[Embedded]:
    """An empty PostgreSQL (fsync on) on a Unix socket, in memory if there is room, then gone."""
    with temporary_home("volery-pg-", throw_away_place()) as home:
        try:
            server = start_postgres(home, options or PostgresOptions(sync_after_creation=False))
            with _buried(server, home):
                yield server
        finally:
            # Nothing of it is kept, so it needs no last checkpoint.
            process = status(home, "postgres")
            if process is not None:
                processes.stop(process, ((signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)))
            stop(home, "postgres")
