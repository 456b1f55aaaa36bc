"""Where the client finds its server, its certificate authority and its token, without being told."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A server and who we are there."""

    url: str
    """https://host:port"""
    token: str = ""
    """Bearer secret; "" is not logged in."""
    ca_file: str = ""
    """Certificate authority of the server; "" is the system's."""


class NoSession(Exception):
    """Nobody said which server; the message says how."""


def user_file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "volery" / "session.json"


def installation_file() -> Path:
    """Left by set-up for root on the machine of `make up`."""
    return Path(os.environ.get("VOLERY_HOME", "/var/lib/volery")) / "secrets" / "cli.json"


def load() -> Session:
    """VOLERY_CLI_URL (with _TOKEN, _CA_FILE), else this person's session, else this machine's installation.

    Raises NoSession.
    """
    if url := os.environ.get("VOLERY_CLI_URL"):
        return Session(
            url=url,
            token=os.environ.get("VOLERY_CLI_TOKEN", ""),
            ca_file=os.environ.get("VOLERY_CLI_CA_FILE", ""),
        )
    files = [user_file(), installation_file()]
    if "VOLERY_HOME" in os.environ:
        files.reverse()
    for path in files:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Session)
        except (FileNotFoundError, PermissionError):
            continue
    raise NoSession("no server is known: run `volery login https://HOST:PORT`, or set VOLERY_CLI_URL")


def save(session: Session, path: Path | None = None) -> Path:
    """Keep it, readable by its owner alone."""
    path = path or user_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_bytes(msgspec.json.encode(session))
    temporary.replace(path)
    return path
