"""SSH to hosts, by a key of ha's own and a host key that is pinned: nothing else is tried, asked or read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncssh

MOST_WORDS = 300


@dataclass(frozen=True, slots=True)
class Place:
    """Where, as whom, and by which host key (`ssh-ed25519 AAAA…`)."""

    address: str
    port: int
    username: str
    host_key: str


@dataclass(frozen=True, slots=True)
class Said:
    """How it ended."""

    worked: bool
    words: str


def new_key(comment: str) -> tuple[str, str]:
    """A private key (PEM), and its public half as one line."""
    key = asyncssh.generate_private_key("ssh-ed25519", comment=comment)
    return key.export_private_key().decode(), key.export_public_key().decode().strip()


def public_half(private: str, comment: str) -> str:
    key = asyncssh.import_private_key(private)
    key.set_comment(comment)
    return key.export_public_key().decode().strip()


def pinned(text: str) -> str:
    """A host's public key without its comment. Raises ValueError for what is none."""
    try:
        key = asyncssh.import_public_key(text.strip())
    except asyncssh.KeyImportError as error:
        raise ValueError(str(error)) from None
    return " ".join(key.export_public_key().decode().split()[:2])


async def log_in(place: Place, private: str, seconds: float) -> Said:
    """In, and out again."""
    return await _bounded(_in_and_out(place, private), place, seconds)


async def restart(place: Place, private: str, command: str, seconds: float) -> Said:
    """Runs the command once; what it printed is of no interest unless it failed."""
    return await _bounded(_run(place, private, command), place, seconds)


async def _bounded(work: Coroutine[Any, Any, Said], place: Place, seconds: float) -> Said:
    at = f"{place.username}@{place.address}:{place.port}"
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        return Said(False, f"{at} did not end within {seconds:g} s")
    except asyncssh.HostKeyNotVerifiable:
        return Said(
            False,
            f"{at} shows another host key than the pinned one: it was made anew, or this is another machine. Look at it, "
            "then set the key",
        )
    except asyncssh.PermissionDenied:
        return Said(False, f"{at} does not let ha in: put `authorized_key` into its authorized_keys")
    except (asyncssh.Error, OSError) as error:
        return Said(False, f"{at} can't be reached: {error}"[:MOST_WORDS])


@asynccontextmanager
async def _connected(place: Place, private: str) -> AsyncIterator[asyncssh.SSHClientConnection]:
    async with asyncssh.connect(
        place.address,
        place.port,
        username=place.username,
        client_keys=[asyncssh.import_private_key(private)],
        known_hosts=([asyncssh.import_public_key(place.host_key)], [], []),
        preferred_auth="publickey",
        config=None,
        agent_path=None,
    ) as connection:
        yield connection


async def _in_and_out(place: Place, private: str) -> Said:
    async with _connected(place, private):
        return Said(True, "")


async def _run(place: Place, private: str, command: str) -> Said:
    async with _connected(place, private) as connection:
        ended = await connection.run(command, check=False)
    if ended.exit_status == 0:
        return Said(True, "its agent was restarted")
    told = str(ended.stderr or ended.stdout or "without a word").strip()
    words = "".join(letter if letter.isprintable() else " " for letter in told)
    return Said(False, f"`{command}` ended with {ended.exit_status}: {words}"[:MOST_WORDS])
