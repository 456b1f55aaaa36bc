"""What may be written into the fields that every noun has: names, descriptions, tags, ids."""

from __future__ import annotations

from volery.contracts.errors import Kind, Refused, invalid
from volery.contracts.ids import is_id

MAX_NAME = 255
MAX_DESCRIPTION = 4096
MAX_TAGS = 64


def checked_name(noun: str, name: str) -> str:
    """The name without blanks around it. Raises Refused(invalid) unless 1 to 255 printable characters remain."""
    trimmed = name.strip()
    if not 1 <= len(trimmed) <= MAX_NAME:
        raise invalid(
            f"the name of a {noun} has 1 to {MAX_NAME} characters, this one has {len(trimmed)}", field="name"
        )
    if not trimmed.isprintable():
        raise invalid(f"the name of a {noun} can't hold control characters: {trimmed!r}", field="name")
    return trimmed


def checked_description(description: str) -> str:
    """Raises Refused(invalid) for more than 4,096 characters, or control characters but line ends and tabs."""
    if len(description) > MAX_DESCRIPTION:
        raise invalid(
            f"a description has at most {MAX_DESCRIPTION} characters, this one has {len(description)}",
            field="description",
        )
    if not description.translate({9: None, 10: None, 13: None}).isprintable():
        raise invalid("a description can't hold control characters", field="description")
    return description


def checked_tags(tags: tuple[str, ...]) -> tuple[str, ...]:
    """The tags, each once, in their order. Raises Refused(invalid) for more than 64 or one that isn't a name."""
    unique = tuple(dict.fromkeys(checked_name("tag", tag) for tag in tags))
    if len(unique) > MAX_TAGS:
        raise invalid(f"an object has at most {MAX_TAGS} tags, not {len(unique)}", field="tags")
    return unique


def checked_id(noun: str, object_id: str) -> str:
    """Raises Refused(invalid) for what can't be the id of anything."""
    if not is_id(object_id):
        raise invalid(f"{object_id[:80]!r} isn't the id of a {noun}: ids are UUIDs in lower case", field="id")
    return object_id


def checked_revision(noun: str, name: str, revision: int, if_revision: int) -> None:
    """Raises Refused(stale) when somebody changed it since the caller read it (If-Match); 0 is any."""
    if if_revision and if_revision != revision:
        raise Refused(
            Kind.STALE,
            f"{noun} {name} has changed: it is at revision {revision}, not {if_revision}; read it again and decide anew",
            revision=revision,
        )
