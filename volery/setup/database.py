"""One database, and for each service one role and one schema that no other service can enter."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping

import asyncpg

from volery.setup.errors import SetupError

_NAME = re.compile(r"^[a-z][a-z0-9_]{0,40}$")
_SCRAM_ITERATIONS = 4096
_ONE_AT_A_TIME = 0x766F6C65  # advisory lock: two set-ups at once wait for each other


async def bootstrap_database(
    dsn_superuser: str,
    services: Iterable[str],
    passwords: Mapping[str, str],
    *,
    database: str = "volery",
    connection_limit: int = 24,
) -> None:
    """Makes the database, roles and schemas that are missing and corrects those that differ.

    `passwords` maps each service to its role's password; only its SCRAM verifier is sent, so it
    is in no log. Public loses every right on the database and on schema public. Repeating it
    changes nothing. Raises SetupError for a name that isn't `[a-z][a-z0-9_]*`.
    """
    names = sorted(services)
    for name in [*names, database]:
        if not _NAME.match(name):
            raise SetupError(f"{name!r} can't name a database role or schema: use a-z, 0-9, _.")
    server = await asyncpg.connect(dsn_superuser)
    try:
        await server.execute("select pg_advisory_lock($1)", _ONE_AT_A_TIME)
        await _database(server, database)
        for name in names:
            await _role(server, name, passwords[name], database, connection_limit)
    finally:
        await server.close()
    inside = await asyncpg.connect(dsn_superuser, database=database)
    try:
        await inside.execute("select pg_advisory_lock($1)", _ONE_AT_A_TIME)
        await _schemas(inside, names)
    finally:
        await inside.close()


async def _database(server: asyncpg.Connection[asyncpg.Record], database: str) -> None:
    if not await server.fetchval("select 1 from pg_database where datname = $1", database):
        # template0: nothing that somebody added to template1 comes along.
        await server.execute(f'create database "{database}" template template0')
    for closed in (database, "postgres", "template1"):
        await server.execute(f'revoke all on database "{closed}" from public')


async def _role(
    server: asyncpg.Connection[asyncpg.Record],
    name: str,
    password: str,
    database: str,
    connection_limit: int,
) -> None:
    stored = await server.fetchrow("select rolpassword, rolconnlimit from pg_authid where rolname = $1", name)
    if stored is None:
        await server.execute(
            f'create role "{name}" login noinherit connection limit {connection_limit}'
            f" password '{scram_verifier(password)}'"
        )
    else:
        if stored["rolconnlimit"] != connection_limit:
            await server.execute(f'alter role "{name}" connection limit {connection_limit}')
        if not verifies(stored["rolpassword"], password):
            await server.execute(f"alter role \"{name}\" password '{scram_verifier(password)}'")
    await server.execute(f'grant connect on database "{database}" to "{name}"')
    await server.execute(f'alter role "{name}" in database "{database}" set search_path = "{name}"')


async def _schemas(inside: asyncpg.Connection[asyncpg.Record], names: list[str]) -> None:
    await inside.execute("revoke all on schema public from public")
    for name in names:
        owner = await inside.fetchval(
            "select pg_get_userbyid(nspowner) from pg_namespace where nspname = $1", name
        )
        if owner is None:
            await inside.execute(f'create schema "{name}" authorization "{name}"')
        elif owner != name:
            raise SetupError(
                f"Schema {name} belongs to role {owner}, not to {name}: this database is used by"
                " something else. Give Volery a database of its own."
            )


def scram_verifier(password: str, salt: bytes | None = None) -> str:
    """What PostgreSQL stores for a password (RFC 5802, SCRAM-SHA-256)."""
    salt = os.urandom(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _SCRAM_ITERATIONS)
    client = hmac.digest(salted, b"Client Key", "sha256")
    stored = hashlib.sha256(client).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    text = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return f"SCRAM-SHA-256${_SCRAM_ITERATIONS}:{text[0]}${text[1]}:{text[2]}"


def verifies(stored: str | None, password: str) -> bool:
    """Whether the stored verifier was made from this password by `scram_verifier`."""
    match = re.fullmatch(rf"SCRAM-SHA-256\${_SCRAM_ITERATIONS}:([^$]+)\$.+", stored or "")
    if match is None:
        return False
    expected = scram_verifier(password, base64.b64decode(match[1]))
    return hmac.compare_digest(expected, stored or "")
