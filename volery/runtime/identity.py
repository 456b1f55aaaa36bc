"""The bus identities of one installation: who exists, what each may do, and who is cut off.

NATS runs in operator mode: an operator key signs three accounts, each account has one scoped signing key
per role, and a signing key signs users. The server takes a user's permissions from its role's template in
the account's claims, so a new release changes permissions by publishing claims, without new credentials.
Agents make their own key; only its public half is ever seen here.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from volery.contracts.errors import Kind, Refused, conflict, invalid
from volery.contracts.ids import is_id
from volery.runtime.permissions import (
    ACCOUNT_OF,
    ACCOUNTS,
    SERVICES,
    SHARED_SUBJECTS,
    SIGNERS,
    SYSTEM_USERS,
    imported_as,
    permissions_of,
)
from volery.runtime.signing import (
    IdentityError,
    Key,
    format_creds,
    is_public_key,
    parse_creds,
    read_jwt,
    sign_jwt,
)

USERS: Final = (*SERVICES, *SYSTEM_USERS)

FOREVER: Final = 4_102_444_800
"""A revocation cuts tokens issued before a time. Ours is 2100-01-01: the key is dead whatever a clock said."""

SYSTEM_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

NO_LIMIT: Final = {"subs": -1, "data": -1, "payload": -1}
ACCOUNT_LIMITS: Final = {**NO_LIMIT, "imports": -1, "exports": -1, "wildcards": True, "conn": -1}
"""No `leaf`: nobody joins a foreign server to ours."""
JETSTREAM_LIMITS: Final = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}


@dataclass(frozen=True, slots=True)
class Minted:
    """A user whose key was made here: its credentials are shown once and not kept."""

    name: str
    public_key: str
    creds: str
    """Text of a `.creds` file."""


@dataclass(frozen=True, slots=True)
class Realm:
    """The identities in one directory (`secrets/bus`): public halves here, seeds in files of mode 0600.

    `operator.jwt`, `accounts/{ACCOUNT}.jwt`, `{user}.creds`, `keys/{name}.seed`, and `realm.json` with the
    public halves. A program that only connects needs its `.creds`; one that enrols hosts needs also
    `realm.json`, `accounts/` and `keys/agent.seed`; one that revokes needs `keys/operator.seed`.
    """

    directory: Path
    operator: str
    accounts: Mapping[str, str]
    signers: Mapping[str, str]
    """Role to the public half of its signing key."""
    users: Mapping[str, str]
    """Service or system user to its public key."""

    @classmethod
    def create(cls, directory: Path) -> Realm:
        """Make what is missing, keep every key that exists, renew claims that a new release changed.

        Raises IdentityError when keys of an existing realm were lost or damaged.
        """
        for folder in (directory, directory / "keys", directory / "accounts"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(directory):
            known = any((directory / "accounts").iterdir())
            operator = _key(directory, "operator", "operator", known)
            accounts = {name: _key(directory, name, "account", known) for name in ACCOUNTS}
            signers = {role: _key(directory, role, "account", False) for role in ACCOUNT_OF}
            users = {
                user: _user(directory, user, accounts[ACCOUNT_OF[user]].public, signers[user])
                for user in USERS
            }
            realm = cls(
                directory=directory,
                operator=operator.public,
                accounts={name: key.public for name, key in accounts.items()},
                signers={role: key.public for role, key in signers.items()},
                users=users,
            )
            _renew_operator(realm, operator)
            for account in ACCOUNTS:
                realm._renew_account(operator, account, {}, -1)
            _write(directory / "realm.json", realm._to_json())
        return realm

    @classmethod
    def load(cls, directory: Path) -> Realm:
        """The realm that `create` made, from `realm.json` alone. Raises IdentityError without one."""
        path = directory / "realm.json"
        try:
            fields = json.loads(_read(path))
            return cls(directory=directory, **fields)
        except (ValueError, TypeError) as error:
            raise IdentityError(f"{path} is damaged: restore it, or set up again") from error

    @property
    def operator_jwt(self) -> str:
        return _read(self.directory / "operator.jwt").strip()

    @property
    def system_account(self) -> str:
        return self.accounts["SYS"]

    def account_jwt(self, account: str) -> str:
        """The claims of SYS, VOLERY or READERS as last signed here."""
        return _read(self.directory / "accounts" / f"{account}.jwt").strip()

    def resolver_preload(self) -> dict[str, str]:
        """Account public key to its JWT, revocations included."""
        return {key: self.account_jwt(name) for name, key in self.accounts.items()}

    def creds_path(self, user: str) -> Path:
        """Where the credentials of a service, `sys` or `claims` lie."""
        return self.directory / f"{user}.creds"

    def order_keys(self) -> dict[str, str]:
        """Owner to public key, for those whom hosts obey: what an agent pins when it is enrolled."""
        return {owner: self.users[owner] for owner in SIGNERS}

    def revoked(self, account: str) -> frozenset[str]:
        """Public keys that are cut off in this account, as far as this directory knows."""
        return frozenset(self._claims(account)["nats"].get("revocations", {}))

    def render_nats_conf_identity(self, resolver_directory: Path) -> str:
        """The part of a nats-server configuration that says whom to trust.

        Render it anew before each start of a server: if its store was lost, the preloaded claims are all it
        has, and they must hold the newest revocations.
        """
        preload = "\n".join(f'  {key}: "{jwt}"' for key, jwt in self.resolver_preload().items())
        return (
            f'operator: "{self.operator_jwt}"\n'
            f"system_account: {self.system_account}\n"
            "resolver: {\n"
            "  type: full\n"
            f"  dir: {json.dumps(str(resolver_directory))}\n"
            '  interval: "2s"\n'
            "  allow_delete: true\n"
            "}\n"
            f"resolver_preload: {{\n{preload}\n}}\n"
        )

    def sign_account(self, account: str, revoked: Iterable[str], after: int = -1) -> str:
        """The account's JWT with these public keys revoked besides those that are already.

        It is kept in the directory, and newer than `after` (Unix seconds) if it had to be signed anew.
        Raises IdentityError when `keys/operator.seed` isn't here.
        """
        with _locked(self.directory):
            operator = Key(_read(self.directory / "keys" / "operator.seed"))
            return self._renew_account(operator, account, dict.fromkeys(revoked, FOREVER), after)

    def _renew_account(self, operator: Key, account: str, revoked: Mapping[str, int], after: int) -> str:
        path = self.directory / "accounts" / f"{account}.jwt"
        old: dict[str, Any] = {"iat": 0, "nats": {}}
        if path.exists():
            old = self._claims(account)
        nats = account_claims(self, account)
        revocations = {**old["nats"].get("revocations", {}), **revoked}
        if revocations:
            nats["revocations"] = dict(sorted(revocations.items()))
        if old["nats"] == {**nats, "version": 2} and old["iat"] > after:
            return self.account_jwt(account)
        # Servers keep the claims that were issued later, and count whole seconds.
        issued_at = max(int(time.time()), old["iat"] + 1, after + 1)
        token = sign_jwt(operator, self.accounts[account], account, nats, issued_at)
        _write(path, token)
        return token

    def _claims(self, account: str) -> dict[str, Any]:
        return read_jwt(self.account_jwt(account), self.operator)

    def _to_json(self) -> str:
        fields = {
            "operator": self.operator,
            "accounts": self.accounts,
            "signers": self.signers,
            "users": self.users,
        }
        return json.dumps(fields, indent=1) + "\n"


def account_claims(realm: Realm, account: str) -> dict[str, Any]:
    """The `nats` claims of one account: its limits, its roles, what it shares and what it takes."""
    claims: dict[str, Any] = {
        "type": "account",
        "limits": dict(ACCOUNT_LIMITS),
        "signing_keys": [
            _scope(role, realm.signers[role]) for role, home in ACCOUNT_OF.items() if home == account
        ],
    }
    if account == "VOLERY":
        claims["limits"].update(JETSTREAM_LIMITS)
        claims["exports"] = [
            {"name": s, "subject": s, "type": "service", "response_type": "Stream"} for s in SHARED_SUBJECTS
        ]
    if account == "READERS":
        claims["imports"] = [
            {
                "name": subject,
                "subject": subject,
                "local_subject": imported_as(subject),
                "account": realm.accounts["VOLERY"],
                "type": "service",
            }
            for subject in SHARED_SUBJECTS
        ]
    return claims


def _scope(role: str, signing_key: str) -> dict[str, Any]:
    template = {
        **permissions_of(role).claims(),
        **NO_LIMIT,
        # Not as a leaf node, by WebSocket or by MQTT, which have subjects of their own.
        "allowed_connection_types": ["STANDARD"],
    }
    return {"kind": "user_scope", "key": signing_key, "role": role, "template": template}


def mint_agent(
    realm: Realm, host_id: str, agent_public_key: str, expires_in_seconds: int | None = None
) -> str:
    """The JWT of one host's agent. It never expires by default: a host that was off for a year comes back.

    Raises Refused: `invalid` for a host id that isn't a UUID or a key that isn't a user's public key,
    `conflict` for a key that was revoked or belongs to a service.
    """
    # A host named like a service would get that service's inbox.
    if not is_id(host_id):
        raise invalid(f"{host_id!r} is not a host id: enrol with the UUID that the host was given")
    if not is_public_key(agent_public_key, "user"):
        raise invalid(
            f"the public key of host {host_id} is not that of an nkey user (56 characters that begin"
            " with U): let the agent make a new key and enrol again",
            host_id=host_id,
        )
    # Revoking the host later would cut off the service with it.
    if agent_public_key in realm.users.values() or agent_public_key in realm.revoked("VOLERY"):
        raise conflict(
            f"the key of host {host_id} was revoked or belongs to a service: let the agent make a new"
            " key and enrol again",
            host_id=host_id,
        )
    return _sign_user(realm, "agent", host_id, agent_public_key, expires_in_seconds)


def reader_name(system: str) -> str:
    """The user name, and durable consumer name, of an outside system. Raises Refused for a bad name."""
    if not SYSTEM_NAME.fullmatch(system):
        raise invalid(
            f"{system!r} can't name an outside system: use up to 63 lower-case letters, digits and"
            " inner dashes"
        )
    return f"reader-{system}"


def mint_reader(realm: Realm, system: str, expires_in_seconds: int | None = None) -> Minted:
    """Read-only credentials for an outside system, with a new key. Keep `public_key` to revoke it.

    They reach only the consumers that `create_reader_consumers` made for this system, and so only the
    streams chosen there. Raises Refused(invalid) for a bad name.
    """
    name = reader_name(system)
    key = Key.new("user")
    token = _sign_user(realm, "reader", name, key.public, expires_in_seconds)
    return Minted(name, key.public, format_creds(token, key.seed))


def check_revocable(realm: Realm, public_keys: Iterable[str]) -> None:
    """Raises Refused for a key that is malformed or keeps the control plane itself connected."""
    for public_key in public_keys:
        if not is_public_key(public_key, "user"):
            raise invalid(f"{public_key!r} is not a user's public key, so it can't be revoked")
        if public_key in realm.users.values():
            raise Refused(
                Kind.FORBIDDEN,
                f"{public_key} belongs to a service of the control plane: to replace it, delete its"
                " .creds file and set up again",
            )


def _sign_user(realm: Realm, role: str, name: str, public_key: str, expires_in_seconds: int | None) -> str:
    signer = Key(_read(realm.directory / "keys" / f"{role}.seed"))
    account = realm.accounts[ACCOUNT_OF[role]]
    return _user_jwt(signer, account, name, public_key, expires_in_seconds)


def _user_jwt(
    signer: Key, account: str, name: str, public_key: str, expires_in_seconds: int | None = None
) -> str:
    # A scoped user carries no permissions of its own; with any, the server refuses it.
    now = int(time.time())
    expires_at = None if expires_in_seconds is None else now + expires_in_seconds
    nats = {"type": "user", "issuer_account": account}
    return sign_jwt(signer, public_key, name, nats, now, expires_at)


def _key(directory: Path, name: str, kind: str, must_exist: bool) -> Key:
    path = directory / "keys" / f"{name}.seed"
    if path.exists():
        key = Key(_read(path))
        if not is_public_key(key.public, kind):
            raise IdentityError(f"{path} holds no {kind} key: restore it from a backup")
        return key
    if must_exist:
        raise IdentityError(
            f"{path} is missing, and every identity on the bus depends on it: restore it from a backup,"
            f" or delete {directory} to begin anew (every host and reader must then enrol again)"
        )
    key = Key.new(kind)
    _write(path, key.seed)
    return key


def _user(directory: Path, name: str, account: str, signer: Key) -> str:
    """Keep or make one user's credentials; returns its public key."""
    path = directory / f"{name}.creds"
    key = Key.new("user")
    if path.exists():
        token, key = parse_creds(_read(path))
        try:
            claims = read_jwt(token, signer.public)
        except IdentityError:
            claims = {}
        if claims.get("name") == name and claims.get("sub") == key.public:
            return key.public
    _write(path, format_creds(_user_jwt(signer, account, name, key.public), key.seed))
    return key.public


def _renew_operator(realm: Realm, operator: Key) -> None:
    path = realm.directory / "operator.jwt"
    nats = {"type": "operator", "system_account": realm.system_account}
    if path.exists() and read_jwt(_read(path), operator.public)["nats"] == {**nats, "version": 2}:
        return
    _write(path, sign_jwt(operator, operator.public, "volery", nats, int(time.time())))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise IdentityError(
            f"can't read {path} ({error.strerror}): set up the bus identities first, or give this"
            " program the file"
        ) from error


def _write(path: Path, text: str) -> None:
    """Replace a secret at once and durably, never readable by others."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time changes a realm."""
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
