"""Settings from the environment: one frozen struct per section, each field documented, a typo refused."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

PREFIX = "VOLERY_"
KNOWN_PREFIXES = (
    "VOLERY_AGENT_",
    "VOLERY_BUS_",
    "VOLERY_DATABASE_",
    "VOLERY_TELEMETRY_",
    "VOLERY_GATEWAY_",
    "VOLERY_INVENTORY_",
    "VOLERY_SCHEDULER_",
    "VOLERY_STORAGE_",
    "VOLERY_NETWORK_",
    "VOLERY_HA_",
    "VOLERY_DWH_",
    "VOLERY_CLI_",
    "VOLERY_LAB_",
    "VOLERY_TEST_",
    "VOLERY_SETUP_",
)
STANDALONE = {"VOLERY_HOME", "VOLERY_TARGET"}
"""Of no section: where an installation is, and what `make` makes."""


class ConfigError(Exception):
    """The environment can't be used as it is; the message names the variable and what it may be."""


class BusConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section VOLERY_BUS_: how a program reaches NATS."""

    servers: str = "nats://127.0.0.1:4222"
    """Comma-separated URLs of every server of the cluster."""
    credentials_dir: str = ""
    """Directory with one `{service}.creds` per service. Empty: no authentication (tests only)."""
    ca_file: str = ""
    """CA certificate that signed the servers' certificates; empty: no TLS."""
    replicas: int = 1
    """R of every stream: 1 for one server, 3 for a cluster of three."""
    require_sync_always: bool = True
    """Not ready unless the servers sync every write before they acknowledge it (needs the sys credentials)."""


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section VOLERY_DATABASE_: how a service reaches PostgreSQL."""

    dsn: str = "postgresql:///volery"
    """libpq URL without user and password: each service connects with its own role, named like the service."""
    passwords_dir: str = ""
    """Directory with one `{service}.password` per service; empty: no password (peer or trust)."""
    pool_max: int = 8
    """Connections per service and process; the relay has one more of its own."""


class TelemetryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section VOLERY_TELEMETRY_: logs, traces, metrics."""

    log_level: str = "INFO"
    otlp_endpoint: str = ""
    """OTLP/HTTP base URL, e.g. http://collector:4318; empty: traces and metrics stay in the process."""
    read_sample_ratio: float = 0.01
    """Share of reads that are traced; operations always are (when an endpoint is set)."""


def read(prefix: str, type_: type[T], environ: Mapping[str, str] | None = None) -> T:
    """The section's settings.

    Raises ConfigError for a variable with this prefix that isn't a setting, or a value that doesn't fit.
    """
    environ = os.environ if environ is None else environ
    fields = {f.name for f in msgspec.structs.fields(type_)}
    given = {
        name[len(prefix) :].lower(): value
        for name, value in environ.items()
        if name.startswith(prefix) and not _is_service_link(name, value)
    }
    for name in sorted(given.keys() - fields):
        raise ConfigError(
            f"{prefix}{name.upper()} is not a setting; the settings are "
            + ", ".join(sorted(prefix + f.upper() for f in fields))
        )
    try:
        return msgspec.convert(given, type_, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"a setting of {prefix}* does not fit: {error}") from None


def refuse_unknown_sections(environ: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for a VOLERY_ variable of no section: a typo there would leave a setting as it is by default."""
    environ = os.environ if environ is None else environ
    for name, value in sorted(environ.items()):
        if _is_service_link(name, value) or name in STANDALONE:
            continue
        if name.startswith(PREFIX) and not name.startswith(KNOWN_PREFIXES):
            meant = difflib.get_close_matches(_section(name), map(_section, KNOWN_PREFIXES), n=1)
            hint = f"did you mean {PREFIX}{meant[0]}_? S" if meant else "s"
            raise ConfigError(
                f"{name} belongs to no section of settings: {hint}ections are {', '.join(KNOWN_PREFIXES)}"
            )


_SERVICE_LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


def _is_service_link(name: str, value: str) -> bool:
    """Kubernetes tells every container where the services of its namespace are, also of one whose name begins with volery."""
    return _SERVICE_LINK.fullmatch(name) is not None or (name.endswith("_PORT") and "://" in value)


def _section(name: str) -> str:
    """The word after VOLERY_."""
    return name.removeprefix(PREFIX).partition("_")[0]
