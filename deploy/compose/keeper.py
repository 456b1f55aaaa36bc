"""The container `setup`: makes every identity, certificate, role and configuration, and keeps them right.

It alone sees all secrets. Each other container gets a volume with what is its own, and begins when the file
`complete` is in it. Certificates are renewed here while everything runs; whoever serves one reads it again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Final
from urllib.parse import quote

import asyncpg
from nats.aio.client import Client

from volery.runtime import telemetry
from volery.runtime.bus import connect
from volery.runtime.config import BusConfig, TelemetryConfig, read
from volery.runtime.identity import Realm
from volery.runtime.permissions import OWNERS
from volery.runtime.readiness import look
from volery.setup.database import bootstrap_database
from volery.setup.errors import SetupError
from volery.setup.home import write_private
from volery.setup.nats_server import NatsOperator, NatsOptions, NatsTls, render
from volery.setup.pki import Authority

log = logging.getLogger("setup")

KEEP: Final = Path("/keep")
"""Below it every volume is mounted here, under its own name."""
HEALTHY: Final = Path("/tmp/healthy")  # noqa: S108 - the container's own
USER: Final = 10001
"""`volery` in the image; deploy/Dockerfile says the same."""
SUPERUSER: Final = "database/superuser.password"

NATS_NODES: Final = ("nats-1", "nats-2", "nats-3")
NATS_DIRECTORY: Final = Path("/var/lib/volery/nats")
"""Where a node's volume is mounted in its own container."""
PROGRAMS: Final = (*OWNERS, "gateway")
ALSO: Final[dict[str, tuple[str, ...]]] = {
    "inventory": ("bus/claims.creds", "admin.password"),
    "storage": ("storage.key",),
    "ha": ("bus/sys.creds", "ha.key"),
    "gateway": ("bus/sys.creds", "pki/gateway.pem", "pki/gateway.key"),
}
"""What a program gets of the realm besides its own credentials, its database password and the authority."""

CONNECTIONS_OF_A_ROLE: Final = 60
"""Six replicas of a service, each with a pool of eight, its leader's connection and its relay's."""
AGAIN_SECONDS: Final = 2.0
KEEP_SECONDS: Final = 60.0


def take_volumes() -> None:
    """As root: every volume belongs to `volery`; then this process is `volery`, too."""
    for directory in sorted(KEEP.iterdir()):
        # PostgreSQL's own user reads its password; its volume holds nothing else and is mounted nowhere else.
        directory.chmod(0o755 if directory == (KEEP / SUPERUSER).parent else 0o700)
        os.chown(directory, USER, USER)
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)


def kept(path: Path, size_bytes: int = 24, mode: int = 0o600) -> str:
    """The secret in a file, made when there is none."""
    if not path.exists():
        write_private(path, secrets.token_urlsafe(size_bytes) + "\n", mode=mode)
    return path.read_text().strip()


def put(path: Path, content: str | bytes) -> None:
    """Writes what differs: whoever watches a file's time sees only real changes."""
    data = content.encode() if isinstance(content, str) else content
    if not path.exists() or path.read_bytes() != data:
        write_private(path, data)


def names() -> list[str]:
    """Under which the gateway and the bus are reached from outside: a certificate without them is refused."""
    chosen = f"{os.environ.get('VOLERY_SETUP_PUBLIC_ADDRESS', '')} {os.environ.get('VOLERY_SETUP_NAMES', '')}"
    return [name.strip("[]").lower() for name in chosen.replace(",", " ").split()]


def certify(authority: Authority, server: str, directory: Path) -> None:
    """A certificate for one server under its name here, its names outside, and loopback."""
    addresses, dns = ["127.0.0.1", "::1"], [server, "localhost"]
    for name in names():
        (addresses if ":" in name or name.replace(".", "").isdigit() else dns).append(name)
    authority.ensure(server, dns=dns, addresses=addresses, directory=directory)


def identities(volumes: Path) -> tuple[Realm, dict[str, str]]:
    """Everything but the servers: (bus identities, each service's database password). Repeats change nothing."""
    own = volumes / "realm"
    for folder in ("bus", "pki", "postgres"):
        (own / folder).mkdir(mode=0o700, exist_ok=True)
    realm = Realm.create(own / "bus")
    authority = Authority.open(own / "pki")
    certify(authority, "gateway", own / "pki")
    kept(own / "admin.password", 15)
    kept(own / "storage.key", 48)
    kept(own / "ha.key", 48)
    kept(volumes / SUPERUSER, mode=0o644)
    routes_password = kept(own / "routes.password")
    passwords = {owner: kept(own / "postgres" / f"{owner}.password") for owner in OWNERS}
    for node in NATS_NODES:
        certify(authority, node, volumes / node)
        put(volumes / node / "ca.pem", authority.pem)
        put(volumes / node / "nats.conf", nats_configuration(realm, node, routes_password))
    for program in PROGRAMS:
        _give(own, program, volumes / program)
    return realm, passwords


def _give(own: Path, program: str, volume: Path) -> None:
    password = [f"postgres/{program}.password"] if program in OWNERS else []
    for name in ("pki/ca.pem", f"bus/{program}.creds", *password, *ALSO.get(program, ())):
        put(volume / Path(name).name, (own / name).read_bytes())


def complete(volumes: Path) -> None:
    """Lets the other containers begin."""
    for volume in (*PROGRAMS, *NATS_NODES, str(Path(SUPERUSER).parent)):
        (volumes / volume / "complete").touch(0o644)


def nats_configuration(realm: Realm, node: str, routes_password: str) -> str:
    """One node of the cluster. Routes need a certificate and a password: hosts have certificates, too."""
    options = NatsOptions(
        host="0.0.0.0",  # noqa: S104 - its container's; compose says which port is published
        port=4222,
        operator=NatsOperator(realm.operator_jwt, realm.system_account, realm.resolver_preload()),
        tls=NatsTls(
            NATS_DIRECTORY / f"{node}.pem", NATS_DIRECTORY / f"{node}.key", NATS_DIRECTORY / "ca.pem"
        ),
        server_name=node,
        sync_always=True,
    )
    assert options.tls is not None
    text = json.dumps
    routes = (f"nats-route://routes:{quote(routes_password)}@{other}:6222" for other in NATS_NODES)
    cluster = [
        "cluster {",
        '  name: "volery"',
        '  listen: "0.0.0.0:6222"',
        # Containers' addresses mean nothing to hosts, which know the published ones.
        "  no_advertise: true",
        # Nodes tell each other by name, too: certificates hold no container's address.
        f"  advertise: {text(f'{node}:6222')}",
        f"  routes: [{', '.join(text(route) for route in routes)}]",
        f'  authorization {{ user: "routes", password: {text(routes_password)}, timeout: 5 }}',
        "  tls {",
        f"    cert_file: {text(str(options.tls.certificate))}",
        f"    key_file: {text(str(options.tls.key))}",
        f"    ca_file: {text(str(options.tls.ca))}",
        "    verify: true",
        "    timeout: 5",
        "  }",
        "}",
    ]
    return render(NATS_DIRECTORY, options) + "\n".join(cluster) + "\n"


async def database(passwords: dict[str, str]) -> None:
    """Roles and schemas; waits for a PostgreSQL that is still starting."""
    said = ""
    dsn = os.environ["VOLERY_SETUP_DATABASE"]
    while True:
        os.environ["PGPASSWORD"] = (KEEP / SUPERUSER).read_text().strip()
        try:
            await bootstrap_database(dsn, OWNERS, passwords, connection_limit=CONNECTIONS_OF_A_ROLE)
            return
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if said != str(error):
                said = str(error)
                log.info("PostgreSQL isn't ready yet: %s", said)
            await asyncio.sleep(AGAIN_SECONDS)


async def watch(system: Client, replicas: int) -> bool:
    """Whether every NATS server that answers syncs always, and a majority does."""
    found = await look(system, replicas)
    if found:
        HEALTHY.unlink(missing_ok=True)
        log.error("the bus is not as it must be: %s", "; ".join(found))
        return False
    if not HEALTHY.exists():
        log.info("identities, database and bus are as they must be")
        HEALTHY.touch()
    return True


async def keep(volumes: Path) -> None:
    HEALTHY.unlink(missing_ok=True)
    realm, passwords = identities(volumes)
    complete(volumes)
    log.info("identities are made; waiting for PostgreSQL and NATS")
    await database(passwords)
    bus = BusConfig(
        servers=",".join(f"tls://{node}:4222" for node in NATS_NODES),
        credentials_dir=str(realm.directory),
        ca_file=str(volumes / "realm" / "pki" / "ca.pem"),
        replicas=len(NATS_NODES),
    )
    system = await connect(bus, "sys")
    while True:
        right = await watch(system, bus.replicas)
        await asyncio.sleep(KEEP_SECONDS if right else AGAIN_SECONDS)
        identities(volumes)


def main() -> None:
    telemetry.configure("setup", read("VOLERY_TELEMETRY_", TelemetryConfig))
    try:
        take_volumes()
        asyncio.run(keep(KEEP))
    except SetupError as error:
        log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
