"""NATS and PostgreSQL as Volery's own children: adopted when alive, started when not, never twice.

Each server has one directory with a lock file that it holds while it lives (see `processes`), a
record of its pid and start time, and a rendered configuration. They run detached: whoever
started them may end, and the next one finds them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Literal

from volery.setup import nats_server, postgres_server, processes
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


def start_nats(home: Home, options: NatsOptions | None = None) -> Embedded:
    """The installation's NATS server, running and answering; adopted or started.

    A port that nobody chose is picked once and kept in settings.env (`VOLERY_SETUP_NATS_PORT`). A live
    server whose configuration changed, such as a renewed certificate, is told to read it again.
    Raises SetupError with the log's end when it doesn't come up.
    """
    options = options or NatsOptions()
    places = _Places.of(home, "nats")
    with processes.exclusive(places.starting, timeout_seconds=_START_SECONDS):
        live = processes.running(places.lock, places.record)
        options = replace(options, port=_nats_port(home, options, taken_is_ours=live is not None))
        port = options.port
        changed = nats_server.write_configuration(home.nats, options)

        def ready() -> bool:
            return nats_server.answers(port)

        if live is not None:
            if changed:
                processes.signal_process(live, signal.SIGHUP)
            if _comes_up(ready, live, "nats-server", places.log):
                return _nats(live, options, places, adopted=True)
        process = processes.spawn(
            nats_server.command(home.nats),
            lock=places.lock,
            record=places.record,
            log=places.log,
        )
        if not _comes_up(ready, process, "nats-server", places.log):
            raise SetupError(processes.exit_report("nats-server", places.log))
        return _nats(process, options, places, adopted=False)


def _nats(process: ProcessId, options: NatsOptions, places: _Places, *, adopted: bool) -> Embedded:
    url = f"{'tls' if options.tls else 'nats'}://127.0.0.1:{options.port}"
    return Embedded("nats", process, url, places.log, adopted=adopted)


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
    options = options or PostgresOptions()
    places = _Places.of(home, "postgres")
    with processes.exclusive(places.starting, timeout_seconds=_START_SECONDS):
        cluster = postgres_server.prepare(home.postgres, home.run, options)
        live = processes.running(places.lock, places.record)
        changed = postgres_server.write_configuration(cluster, options)

        def ready(process: ProcessId) -> bool:
            return postgres_server.accepts_connections(cluster, process.pid)

        if live is not None:
            if changed:
                processes.signal_process(live, signal.SIGHUP)
            if _comes_up(lambda: ready(live), live, "postgres", places.log):
                return _postgres(live, cluster, places, adopted=True)
        postgres_server.forget_crashed_server(cluster)
        process = processes.spawn(
            postgres_server.command(cluster),
            lock=places.lock,
            record=places.record,
            log=places.log,
            user=cluster.user,
            group=cluster.group,
        )
        if not _comes_up(lambda: ready(process), process, "postgres", places.log):
            raise SetupError(processes.exit_report("postgres", places.log))
        return _postgres(process, cluster, places, adopted=False)


def _postgres(
    process: ProcessId, cluster: postgres_server.Cluster, places: _Places, *, adopted: bool
) -> Embedded:
    url = postgres_server.dsn(cluster.sockets, "postgres", "postgres")
    return Embedded("postgres", process, url, places.log, cluster.sockets, adopted=adopted)


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


def _comes_up(ready: Callable[[], bool], process: ProcessId, program: str, log: Path) -> bool:
    """True once the server answers, False when it ended instead; SetupError when neither."""
    deadline = time.monotonic() + _START_SECONDS
    while process.alive():
        if ready():
            return True
        if time.monotonic() > deadline:
            raise SetupError(
                f"{program} (process {process.pid}) doesn't answer after {_START_SECONDS:.0f} s."
                f" Look at {log}."
            )
        time.sleep(_POLL_SECONDS)
    return False


@contextmanager
def temporary_home(prefix: str = "volery-test-") -> Iterator[Home]:
    """A throw-away state directory that PostgreSQL's unprivileged user can reach."""
    home = Home(Path(mkdtemp(prefix=prefix, dir="/tmp")))
    try:
        home.create()
        yield home
    finally:
        rmtree(home.path)


@contextmanager
def temporary_nats(options: NatsOptions | None = None) -> Iterator[Embedded]:
    """A NATS server with JetStream (every message synced) on a free loopback port, then gone.

    Without options it asks for no credentials and speaks no TLS.
    """
    with temporary_home("volery-nats-") as home:
        try:
            yield start_nats(home, options or NatsOptions(preferred_port=None))
        finally:
            stop(home, "nats")


@contextmanager
def temporary_postgres(options: PostgresOptions | None = None) -> Iterator[Embedded]:
    """An empty PostgreSQL (fsync on) on a Unix socket, then gone."""
    with temporary_home("volery-pg-") as home:
        try:
            yield start_postgres(home, options or PostgresOptions(sync_after_creation=False))
        finally:
            # Nothing of it is kept, so it needs no last checkpoint.
            process = status(home, "postgres")
            if process is not None:
                processes.stop(process, ((signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)))
            stop(home, "postgres")
