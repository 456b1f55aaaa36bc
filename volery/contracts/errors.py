"""How anything is refused: one exception, a few kinds, a sentence that says what to do."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class Kind(StrEnum):
    """Why a request was refused. The gateway maps each to one HTTP status (`STATUS`)."""

    INVALID = "invalid"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    GONE = "gone"
    STALE = "stale"
    TOO_LARGE = "too_large"
    MISMATCH = "mismatch"
    RATE_LIMITED = "rate_limited"
    INTERNAL = "internal"
    EXHAUSTED = "exhausted"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"


STATUS: dict[Kind, int] = {
    Kind.INVALID: 400,
    Kind.UNAUTHENTICATED: 401,
    Kind.FORBIDDEN: 403,
    Kind.NOT_FOUND: 404,
    Kind.CONFLICT: 409,
    Kind.GONE: 410,
    Kind.STALE: 412,
    Kind.TOO_LARGE: 413,
    Kind.MISMATCH: 422,
    Kind.RATE_LIMITED: 429,
    Kind.INTERNAL: 500,
    Kind.EXHAUSTED: 503,
    Kind.UNAVAILABLE: 503,
    Kind.TIMEOUT: 504,
}


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What crosses the wire when a call is refused."""

    kind: Kind
    message: str
    """A sentence for a person: what happened, to which object, why, and what to do."""
    details: dict[str, Any] = {}
    """Facts a program may use: ids, limits, the rule that refused."""


class Refused(Exception):
    """A request that can't be granted. The only exception that crosses the wire."""

    def __init__(self, kind: Kind | str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.kind = Kind(kind)
        self.message = message
        self.details = details

    def problem(self) -> Problem:
        return Problem(kind=self.kind, message=self.message, details=self.details)


def invalid(message: str, **details: Any) -> Refused:
    return Refused(Kind.INVALID, message, **details)


def not_found(noun: str, object_id: str) -> Refused:
    return Refused(
        Kind.NOT_FOUND,
        f"there is no {noun} {object_id}: it may have been deleted; list {noun}s to see what exists",
        noun=noun,
        id=object_id,
    )


def conflict(message: str, **details: Any) -> Refused:
    return Refused(Kind.CONFLICT, message, **details)


def unavailable(message: str, **details: Any) -> Refused:
    return Refused(Kind.UNAVAILABLE, message, **details)
