"""Ed25519 keys of the bus (nkeys): making them, signing NATS JWTs with them, and signing orders.

An order is signed by the service that gives it, over its subject and its payload, because the bus alone
can't say who sent it: a reply subject isn't checked against permissions, so whoever may publish anything
can make a server deliver an acknowledgement to any subject.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import nkeys
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

PREFIXES: Final = {
    "operator": nkeys.PREFIX_BYTE_OPERATOR,
    "account": nkeys.PREFIX_BYTE_ACCOUNT,
    "user": nkeys.PREFIX_BYTE_USER,
}
"""Kinds of key that Volery makes. The public halves begin with O, A and U."""

CREDS: Final = """-----BEGIN NATS USER JWT-----
{jwt}
------END NATS USER JWT------

************************* IMPORTANT *************************
The seed below proves who you are: keep it secret.

-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------

*************************************************************
"""


class IdentityError(RuntimeError):
    """A key, a token or a file of them is missing, damaged or foreign. The message says what to do."""


class Key:
    """A private nkey. `repr` shows the public half only, so that it may stand in a trace."""

    def __init__(self, seed: str) -> None:
        """Raises IdentityError if `seed` isn't one."""
        try:
            self._pair = nkeys.from_seed(seed.strip().encode())
            self.public: str = self._pair.public_key.decode()
        except (nkeys.NkeysError, binascii.Error, ValueError) as error:
            raise IdentityError(
                "this isn't the seed of an nkey (it begins with S and has 58 characters):"
                " restore the file it came from, or have the identity made anew"
            ) from error
        self.seed = seed.strip()

    @classmethod
    def new(cls, kind: str) -> Key:
        """A fresh key: `operator`, `account` or `user`."""
        return cls(nkeys.encode_seed(os.urandom(32), PREFIXES[kind]).decode())

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        signature: bytes = self._pair.sign(message)
        return signature

    def __repr__(self) -> str:
        return f"Key({self.public})"


@lru_cache(maxsize=4096)
def _verify_key(public_key: str) -> tuple[int, VerifyKey]:
    try:
        raw = base64.b32decode(public_key)
    except (binascii.Error, ValueError):
        raise ValueError("not base32") from None
    if len(raw) != 35 or int.from_bytes(raw[-2:], "little") != nkeys.crc16(raw[:-2]):
        raise ValueError("wrong length or checksum")
    return raw[0], VerifyKey(raw[1:33])


def is_public_key(text: str, kind: str) -> bool:
    """Whether `text` is the public half of a key of this kind, checksum and all."""
    try:
        return bool(_verify_key(text)[0] == PREFIXES[kind])
    except ValueError:
        return False


def encode_segment(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode_segment(text: str) -> bytes:
    """Bytes of a token's segment (base64url without padding). Raises ValueError."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


_HEADER: Final = encode_segment(b'{"typ":"JWT","alg":"ed25519-nkey"}')


def sign_jwt(
    issuer: Key,
    subject: str,
    name: str,
    nats: Mapping[str, Any],
    issued_at: int,
    expires_at: int | None = None,
) -> str:
    """A NATS JWT, version 2. `nats` holds its own claims, with `type`. Times are Unix seconds."""
    claims: dict[str, Any] = {
        "iat": issued_at,
        "iss": issuer.public,
        "name": name,
        "nats": {**nats, "version": 2},
        "sub": subject,
    }
    if expires_at is not None:
        claims["exp"] = expires_at
    digest = hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).digest()
    claims["jti"] = base64.b32encode(digest).rstrip(b"=").decode()
    body = f"{_HEADER}.{encode_segment(json.dumps(claims, separators=(',', ':')).encode())}"
    return f"{body}.{encode_segment(issuer.sign(body.encode()))}"


def read_jwt(token: str, issuer: str) -> dict[str, Any]:
    """The claims of a JWT that `issuer` (a public key) signed. Raises IdentityError for another."""
    try:
        body, _, signature = token.strip().rpartition(".")
        _verify_key(issuer)[1].verify(body.encode(), decode_segment(signature))
        claims: dict[str, Any] = json.loads(decode_segment(body.split(".")[1]))
    except (ValueError, IndexError, BadSignatureError) as error:
        raise IdentityError(f"this token was not signed by {issuer}, or it is damaged") from error
    return claims


def format_creds(jwt: str, seed: str) -> str:
    """The text of a `.creds` file, as every NATS client reads it."""
    return CREDS.format(jwt=jwt, seed=seed)


def parse_creds(text: str) -> tuple[str, Key]:
    """(JWT, key) of a `.creds` file. Raises IdentityError when there is none in it."""
    lines = [line.strip() for line in text.splitlines()]
    found = [lines[i + 1] for i, line in enumerate(lines[:-1]) if line.startswith("-----BEGIN")]
    if len(found) != 2 or found[0].count(".") != 2:
        raise IdentityError(
            "these aren't NATS credentials (a JWT block and a seed block):"
            " restore the file, or have it made anew"
        )
    return found[0], Key(found[1])


_DOMAIN: Final = b"volery order v1\n"
"""Keeps an order's signature from standing for anything else signed with the same key."""


class Signer:
    """Signs orders as one service. The public half is what agents pin at enrolment."""

    def __init__(self, seed: str) -> None:
        self._key = Key(seed)
        self.public_key = self._key.public

    def sign(self, subject: str, payload: bytes) -> str:
        """Text for the header `Volery-Signature`: who signed, and the signature, 143 characters."""
        signature = self._key.sign(_DOMAIN + subject.encode() + b"\n" + payload)
        return f"{self.public_key}.{encode_segment(signature)}"


def verify(public_key: str, subject: str, payload: bytes, header: str) -> bool:
    """Whether `header` is `public_key`'s signature of this payload for this subject. Never raises."""
    who, _, signature = header.partition(".")
    if who != public_key:
        return False
    try:
        message = _DOMAIN + subject.encode() + b"\n" + payload
        _verify_key(public_key)[1].verify(message, decode_segment(signature))
    except (ValueError, BadSignatureError):
        return False
    return True


class Verifier:
    """Knows which key belongs to which owner, and says whose order it is."""

    def __init__(self, owners: Mapping[str, str]) -> None:
        """`owners` maps each owner that may give orders to its public key, as pinned at enrolment."""
        self._owner_of = {key: owner for owner, key in owners.items()}

    def owner_of(self, subject: str, payload: bytes, header: str) -> str | None:
        """The owner that signed it; None for anybody else, a changed payload or another subject."""
        who = header.partition(".")[0]
        owner = self._owner_of.get(who)
        return owner if owner and verify(who, subject, payload, header) else None
