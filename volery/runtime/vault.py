"""Secrets at rest: passwords and tickets are written to the database encrypted, when there is a key file."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from volery.contracts.errors import Kind, Refused

MARK = "sealed:"


@dataclass(frozen=True, slots=True)
class Vault:
    """Seals with the key of an installation; without one, text stays as it is."""

    fernet: Fernet | None
    setting: str
    """The setting that names the key file."""

    @property
    def seals(self) -> bool:
        return self.fernet is not None

    def seal(self, text: str) -> str:
        if self.fernet is None or not text:
            return text
        return MARK + self.fernet.encrypt(text.encode()).decode()

    def open(self, text: str) -> str:
        """Raises Refused(unavailable) when the key file isn't the one that it was sealed with."""
        if not text.startswith(MARK):
            return text
        try:
            if self.fernet is None:
                raise InvalidToken
            return self.fernet.decrypt(text[len(MARK) :].encode()).decode()
        except InvalidToken:
            raise Refused(
                Kind.UNAVAILABLE,
                f"a secret in the database can't be read: {self.setting} isn't the file that it was sealed with; "
                "restore that file",
            ) from None


def open_vault(key_file: str, setting: str) -> Vault:
    """The vault of a key file, which is made when it is missing; `setting` names it. Raises OSError."""
    if not key_file:
        return Vault(None, setting)
    path = Path(key_file)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with open(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(48))
            file.flush()
            os.fsync(file.fileno())
    digest = hashlib.sha256(path.read_bytes().strip()).digest()
    return Vault(Fernet(base64.urlsafe_b64encode(digest)), setting)
