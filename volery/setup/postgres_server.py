"""The embedded PostgreSQL: its programs, its cluster, its configuration, its unprivileged user."""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from volery.setup.errors import SetupError
from volery.setup.home import write_private

OLDEST_VERSION = 13
_SOCKET_NAME = ".s.PGSQL.5432"
_SUN_PATH_BYTES = 107  # Linux: sockaddr_un.sun_path without its final zero
_OWN_USER = "volery-postgres"


@dataclass(frozen=True)
class PostgresOptions:
    """What may differ between an installation's server and a test's."""

    max_connections: int = 200
    shared_buffers_mb: int = 128
    sync_after_creation: bool = True
    """initdb writes the new cluster through to the disk; a throw-away one needn't."""


@dataclass(frozen=True)
class Cluster:
    """A data directory with the programs of its version and the user it belongs to."""

    programs: Path
    data: Path
    sockets: Path
    user: int | None
    """Whom the server runs as; None when that is who we are."""
    group: int | None
    user_name: str


def installed_versions() -> dict[int, Path]:
    """Major version → directory of programs, of every PostgreSQL server found on this machine."""
    places: list[Path] = []
    on_path = shutil.which("postgres")
    if on_path is not None:
        places.append(Path(on_path).resolve().parent)
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    places += sorted(Path("/usr").glob("pgsql-*/bin"))
    places.append(Path("/usr/bin"))
    found: dict[int, Path] = {}
    for place in places:
        if (place / "postgres").exists() and (place / "initdb").exists():
            version = _version(place)
            if version >= OLDEST_VERSION:
                found.setdefault(version, place)
    return found


def _version(place: Path) -> int:
    # The path says it nearly everywhere; asking the program costs 15 ms.
    named = re.search(r"/(?:postgresql/|pgsql-)(\d+)", str(place))
    if named:
        return int(named[1])
    answer = subprocess.run(
        [str(place / "postgres"), "--version"], capture_output=True, text=True, check=True
    )
    numbers = re.search(r"(\d+)", answer.stdout)
    return int(numbers[1]) if numbers else 0


def prepare(directory: Path, run: Path, options: PostgresOptions) -> Cluster:
    """The cluster in `directory`/data, made when there is none. SetupError says what is missing."""
    data = directory / "data"
    versions = installed_versions()
    if (data / "PG_VERSION").exists():
        wanted = int((data / "PG_VERSION").read_text())
        if wanted not in versions:
            raise SetupError(
                f"The database in {data} was made by PostgreSQL {wanted}, which isn't installed"
                f" (found: {_listed(versions)}). Install PostgreSQL {wanted}'s server, or move the"
                " data with pg_upgrade."
            )
        owner = pwd.getpwuid(data.stat().st_uid)
    else:
        wanted = max(versions, default=0)
        if not wanted:
            raise SetupError(
                f"No PostgreSQL server from version {OLDEST_VERSION} on was found. Install it:"
                " `apt-get install postgresql`, or `dnf install postgresql-server`."
            )
        owner = _unprivileged_user()
    others = None if owner.pw_uid == os.geteuid() else owner.pw_uid
    cluster = Cluster(
        versions[wanted],
        data,
        socket_directory(run),
        others,
        None if others is None else owner.pw_gid,
        owner.pw_name,
    )
    _check_reachable(directory, owner)
    _own(cluster.sockets, owner)
    if not (data / "PG_VERSION").exists():
        _create(cluster, owner, options)
    return cluster


def _listed(versions: dict[int, Path]) -> str:
    return ", ".join(str(v) for v in sorted(versions)) or "none"


def _unprivileged_user() -> pwd.struct_passwd:
    """Who runs a new server: ourselves unless we are root; else the distribution's user or ours."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    for name in ("postgres", _OWN_USER):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    subprocess.run(
        ["useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent",
         "--shell", "/usr/sbin/nologin", "--user-group", _OWN_USER],
        check=True,
    )  # fmt: skip
    return pwd.getpwnam(_OWN_USER)


def _check_reachable(directory: Path, owner: pwd.struct_passwd) -> None:
    if owner.pw_uid == os.geteuid():
        return
    groups = {owner.pw_gid} | {g.gr_gid for g in grp.getgrall() if owner.pw_name in g.gr_mem}
    for parent in [directory, *directory.parents]:
        stat = parent.stat()
        bit = 0o001
        if stat.st_uid == owner.pw_uid:
            bit = 0o100
        elif stat.st_gid in groups:
            bit = 0o010
        if not stat.st_mode & bit:
            raise SetupError(
                f"PostgreSQL runs as the user {owner.pw_name}, who can't pass through {parent}"
                f" (mode {stat.st_mode & 0o777:o}). Allow it with `chmod o+x {parent}`, or set"
                " VOLERY_HOME to a place that every user can reach."
            )


def socket_directory(run: Path) -> Path:
    """Where the server's Unix socket lies: in `run` unless that is too long for the kernel."""
    inside = run / "postgres"
    if len(os.fsencode(inside / _SOCKET_NAME)) <= _SUN_PATH_BYTES:
        return inside
    short = hashlib.sha256(os.fsencode(run)).hexdigest()[:16]
    # Not gettempdir(): the next start, under another TMPDIR, must find the same place.
    base = Path("/run") if os.access("/run", os.W_OK) else Path("/tmp")  # noqa: S108
    return base / f"volery-{os.geteuid()}-{short}"


def _own(directory: Path, owner: pwd.struct_passwd) -> None:
    """Makes the directory the user's; refuses one that somebody else put there."""
    try:
        directory.mkdir(mode=0o755)
    except FileExistsError:
        stat = directory.lstat()
        if stat.st_uid not in (os.geteuid(), owner.pw_uid) or directory.is_symlink():
            raise SetupError(
                f"{directory}, where PostgreSQL's socket belongs, is owned by another user"
                f" (id {stat.st_uid}). Remove it and try again."
            ) from None
    os.chown(directory, owner.pw_uid, owner.pw_gid)


def _create(cluster: Cluster, owner: pwd.struct_passwd, options: PostgresOptions) -> None:
    """initdb beside the final place, then one rename: a half-made cluster is never taken for one."""
    parent = cluster.data.parent
    new = parent / "data.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    os.chown(new, owner.pw_uid, owner.pw_gid)
    made = subprocess.run(
        [
            str(cluster.programs / "initdb"), "--pgdata", str(new), "--username", "postgres",
            "--encoding", "UTF8", "--lc-collate", "C", "--lc-ctype", "C.UTF-8",
            "--lc-messages", "C", "--auth-local", "peer", "--auth-host", "reject",
            "--data-checksums",
            *([] if options.sync_after_creation else ["--no-sync"]),
        ],
        capture_output=True, text=True, check=False, cwd="/",
        user=cluster.user, group=cluster.group,
        extra_groups=[] if cluster.user is not None else None,
    )  # fmt: skip
    if made.returncode:
        raise SetupError(f"initdb couldn't make {new}: {made.stderr.strip()}")
    new.rename(cluster.data)


def write_configuration(cluster: Cluster, options: PostgresOptions) -> bool:
    """Writes our three files into the data directory; whether any differs from before."""
    changed = False
    for name, text in _render(cluster, options).items():
        path = cluster.data / name
        if path.exists() and path.read_text() == text:
            continue
        write_private(path, text)
        stat = cluster.data.stat()
        os.chown(path, stat.st_uid, stat.st_gid)
        changed = True
    return changed


def _render(cluster: Cluster, options: PostgresOptions) -> dict[str, str]:
    settings = {
        "listen_addresses": "''",
        "unix_socket_directories": f"'{_escaped(cluster.sockets)}'",
        "unix_socket_permissions": "0777",  # who gets in is decided by pg_hba.conf
        "max_connections": str(options.max_connections),
        "shared_buffers": f"{options.shared_buffers_mb}MB",
        "huge_pages": "off",  # those of this machine are set aside for VMs
        "dynamic_shared_memory_type": _shared_memory(),
        # Acknowledged means durable.
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "password_encryption": "scram-sha-256",
        "max_wal_size": "1GB",
        "checkpoint_timeout": "15min",
        "jit": "off",  # compiling costs more than our short statements take
        "timezone": "'UTC'",
        "log_timezone": "'UTC'",
        "log_line_prefix": "'%m [%p] %u@%d '",
        "log_destination": "'stderr'",
        "logging_collector": "off",
    }
    return {
        "postgresql.conf": "# Written by Volery at each start; `alter system` overrides it.\n"
        + "".join(f"{key} = {value}\n" for key, value in settings.items()),
        "pg_hba.conf": "# Written by Volery at each start.\n"
        "local all postgres peer map=volery\n"
        "local all all scram-sha-256\n",
        "pg_ident.conf": "# Written by Volery at each start: who may be the superuser.\n"
        + "".join(f"volery {name} postgres\n" for name in sorted({"root", cluster.user_name})),
    }


def _shared_memory() -> str:
    """POSIX shared memory, unless this container's /dev/shm isn't open to the server's user."""
    try:
        usable = Path("/dev/shm").stat().st_mode & 0o002  # noqa: S108
    except FileNotFoundError:
        usable = 0
    return "posix" if usable else "mmap"


def _escaped(path: Path) -> str:
    return str(path).replace("'", "''")


def command(cluster: Cluster) -> list[str]:
    return [str(cluster.programs / "postgres"), "-D", str(cluster.data)]


def forget_crashed_server(cluster: Cluster) -> None:
    """Removes the pid files of a server that is known to have ended.

    The caller holds the directory's lock, which every process of that server held. PostgreSQL itself
    would only look whether the pid exists: after a reboot it may be another program's, and a killed
    server whose parent hasn't asked for its status yet exists as well.
    """
    (cluster.data / "postmaster.pid").unlink(missing_ok=True)
    for name in (_SOCKET_NAME, f"{_SOCKET_NAME}.lock"):
        (cluster.sockets / name).unlink(missing_ok=True)


def accepts_connections(cluster: Cluster, pid: int) -> bool:
    """Whether the server said so in its pid file (line 8, as pg_ctl reads it)."""
    try:
        lines = (cluster.data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def dsn(sockets: Path, role: str, database: str, password: str | None = None) -> str:
    """A libpq URL over the Unix socket, for asyncpg and psql alike."""
    secret = f":{quote(password, safe='')}" if password is not None else ""
    return f"postgresql://{quote(role)}{secret}@/{quote(database)}?host={quote(str(sockets))}"
