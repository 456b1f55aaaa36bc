"""Refusals as RFC 9457 problems: a stable `type`, the sentence, and facts a program may use."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from opentelemetry import trace

from volery.contracts.errors import STATUS, Kind, Refused

BASE = "https://volery.dev/problems/"
CONTENT_TYPE = b"application/problem+json"

TITLES: dict[str, str] = {
    Kind.INVALID: "The request is not valid",
    Kind.UNAUTHENTICATED: "Who are you?",
    Kind.FORBIDDEN: "Not allowed",
    Kind.NOT_FOUND: "Not found",
    Kind.CONFLICT: "Conflicts with what is",
    Kind.GONE: "No longer available",
    Kind.STALE: "Changed meanwhile",
    Kind.TOO_LARGE: "Too large",
    Kind.MISMATCH: "The key was used for another request",
    Kind.RATE_LIMITED: "Too many attempts",
    Kind.INTERNAL: "Something went wrong inside Volery",
    Kind.EXHAUSTED: "Nothing left to serve this",
    Kind.UNAVAILABLE: "Not available right now",
    Kind.TIMEOUT: "No answer in time: the outcome is unknown",
    "method_not_allowed": "The method is not allowed here",
    "unsupported_media_type": "The body is of another type",
}
STATUSES: dict[str, int] = {
    **{str(kind): status for kind, status in STATUS.items()},
    "method_not_allowed": 405,
    "unsupported_media_type": 415,
}
RETRY_SECONDS: dict[str, int] = {
    Kind.RATE_LIMITED: 10,
    Kind.EXHAUSTED: 2,
    Kind.UNAVAILABLE: 2,
    Kind.TIMEOUT: 1,
}


class HttpRefused(Exception):
    """A refusal that only HTTP knows: a method, a media type."""

    def __init__(self, kind: str, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.headers = headers


class ProblemDocument(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What every error answers, as `application/problem+json` (RFC 9457). More members may follow: the facts
    behind the refusal, such as ids, limits, and `pointer` to the part of the body that is meant."""

    type: str
    """`https://volery.dev/problems/{kind}`: stable, what a program decides by."""
    title: str
    status: int
    detail: str
    """A sentence for a person: what happened, to which object, why, and what to do."""
    instance: str = ""
    """Path of the request."""
    trace_id: str = ""
    """Under which the logs of all services have this request."""


def document(kind: str, message: str, instance: str, details: dict[str, Any] | None = None) -> bytes:
    """The problem's JSON. Details never replace a member of the standard."""
    found: dict[str, Any] = {
        "type": BASE + kind,
        "title": TITLES.get(kind, kind),
        "status": STATUSES[kind],
        "detail": message,
        "instance": instance,
    }
    for name, value in (details or {}).items():
        found.setdefault(name, value)
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        found.setdefault("trace_id", trace.format_trace_id(context.trace_id))
    return msgspec.json.encode(found)


_PATH = re.compile(r" - at `(?:key in )?\$([^`]*)`")
_PART = re.compile(r"\.([^.\[\]]+)|\[([^\]]*)\]")
_FIELD = re.compile(r"(?:unknown|missing required) field `([^`]*)`")


def pointer(message: str) -> str:
    """The JSON pointer (RFC 6901) to what msgspec complains about: `$.disks[0]` becomes /disks/0."""
    at = _PATH.search(message)
    parts = [name or index for name, index in _PART.findall(at[1])] if at else []
    field = _FIELD.search(message)
    if field:
        parts.append(field[1])
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)


def not_fitting(error: msgspec.ValidationError, where: str = "body") -> Refused:
    """A value that doesn't fit the contract: which, where, and where to read how it should be."""
    message = str(error)
    found = pointer(message)
    sentence = _PATH.sub("", message)
    place = f"the {where} at {found}" if found else f"the {where}"
    return Refused(
        Kind.INVALID,
        f"{place} does not fit: {sentence[:1].lower()}{sentence[1:]}; /docs shows what is expected",
        pointer=found,
    )
