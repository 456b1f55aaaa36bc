"""Checks that every owner makes before it touches anything. Pure; each raises Refused with a sentence."""

from __future__ import annotations

from collections.abc import Iterable

from volery.contracts.base import Entity
from volery.contracts.errors import Kind, Refused, invalid
from volery.contracts.ids import is_id

MAX_NAME = 255
MAX_TEXT = 4096
MAX_TAGS = 64


def name(value: str, noun: str = "name") -> str:
    """1 to 255 printable characters without space at the ends; returned as it is."""
    if not value or len(value) > MAX_NAME:
        raise invalid(f"a {noun} has 1 to {MAX_NAME} characters, not {len(value)}", field=noun)
    if value != value.strip() or not value.isprintable():
        raise invalid(
            f"the {noun} {value!r} has spaces at its ends or characters that can't be printed", field=noun
        )
    return value


def text(value: str, field: str) -> str:
    """At most 4096 characters; line breaks and tabs are the only control characters."""
    if len(value) > MAX_TEXT:
        raise invalid(f"{field} has at most {MAX_TEXT} characters, not {len(value)}", field=field)
    if any(not c.isprintable() and c not in "\n\t" for c in value):
        raise invalid(f"{field} has characters that can't be printed", field=field)
    return value


def tags(values: Iterable[str]) -> tuple[str, ...]:
    """At most 64 distinct ones, each a name."""
    found = tuple(values)
    if len(found) > MAX_TAGS or len(set(found)) != len(found):
        raise invalid(f"an object has at most {MAX_TAGS} tags, each once", field="tags")
    for tag in found:
        name(tag, "tag")
    return found


def object_id(value: str, noun: str) -> str:
    """A UUID in its canonical form."""
    if not is_id(value):
        raise invalid(
            f"{value!r} is not the id of a {noun}: ids are UUIDs; look it up by name first", field=noun
        )
    return value


def between(value: float, low: float, high: float, field: str, unit: str = "") -> None:
    if not low <= value <= high:
        raise invalid(
            f"{field} is {low:g} to {high:g}{' ' + unit if unit else ''}, not {value:g}", field=field
        )


def revision(entity: Entity, if_revision: int, noun: str) -> None:
    """If-Match: refuse an edit of something that has changed since it was read."""
    if if_revision and if_revision != entity.revision:
        raise Refused(
            Kind.STALE,
            f"{noun} {getattr(entity, 'name', entity.id)} is at revision {entity.revision}, not {if_revision}: "
            "somebody changed it meanwhile; read it again and repeat your change",
            revision=entity.revision,
        )
