"""Configuration versions: every revision of every object, from every owner's facts, exactly once."""

from __future__ import annotations

import base64
import binascii
import importlib
import pkgutil
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

import volery.contracts
from services.dwh import store
from services.dwh.model import check_limit, foreign_page
from services.dwh.state import Dwh
from volery.contracts.base import Fact, Owner
from volery.contracts.errors import invalid
from volery.contracts.history import LIST_VERSIONS, ListVersions, Version, Versions
from volery.runtime.bus import Caller
from volery.runtime.hear_owners import Said
from volery.runtime.service import Part
from volery.runtime.tables import Change

part = Part()

MOST_VERSIONS = 1000
MOST_BYTES = 800_000
"""Of one answer."""

NOUNS: dict[str, str] = {
    "storage.domain": "storage_domain",
    "ha.host": "liveness",
    "inventory.user": "user",
}
"""What a fact's noun is called here, where its own token would be ambiguous between owners."""


class Head(msgspec.Struct, frozen=True):
    """What is read of any object."""

    id: str
    revision: int
    created_at: datetime
    updated_at: datetime


_heads = msgspec.json.Decoder(Head)


def owners_facts() -> dict[str, Fact[Any]]:
    """Every fact about an object that an owner declares in the contracts, by its subject."""
    found: dict[str, Fact[Any]] = {}
    for module in pkgutil.iter_modules(volery.contracts.__path__):
        for value in vars(importlib.import_module(f"volery.contracts.{module.name}")).values():
            if (
                isinstance(value, Fact)
                and value.owner in set(Owner)
                and _verb(value) in ("changed", "deleted")
            ):
                found[value.subject] = value
    return found


def _verb(fact: Fact[Any]) -> str:
    return fact.name.rpartition(".")[2]


def noun_of(fact: Fact[Any]) -> str:
    """`inventory.vm.changed` is about `vm`."""
    stem = fact.name.rpartition(".")[0]
    return NOUNS.get(stem, stem.partition(".")[2])


def version_of(noun: str, doc: msgspec.Raw, *, deleted: bool = False) -> store.VersionRow:
    """A document as the version it is."""
    head = _heads.decode(doc)
    return store.VersionRow(noun, head.id, head.revision, head.updated_at, deleted, bytes(doc).decode())


FACTS = owners_facts()
KNOWN_NOUNS = sorted({noun_of(fact) for fact in FACTS.values()})


# Undecoded: what is kept is what was said, also fields that this code doesn't know.
_RAW: list[Fact[Any]] = [Fact(fact.subject, msgspec.Raw) for fact in FACTS.values()]


@part.hears_together(*_RAW)
async def heard(dwh: Dwh, said: Sequence[Said]) -> list[Change]:
    return store.versions_said(
        [version_of(noun_of(fact), payload, deleted=_verb(fact) == "deleted") for fact, payload in said]
    )


@part.answers(LIST_VERSIONS)
async def list_versions(dwh: Dwh, ask: ListVersions, caller: Caller) -> Versions:
    if ask.noun not in KNOWN_NOUNS:
        raise invalid(f"{ask.noun!r} has no versions; kept are {', '.join(KNOWN_NOUNS)}", nouns=KNOWN_NOUNS)
    check_limit(ask.limit, MOST_VERSIONS)
    after = _read_token(ask.page) if ask.page else None
    records = await store.versions(dwh.core.pool, ask.noun, ask.id, ask.at, after, ask.limit + 1)
    items: list[Version] = []
    size = 0
    for record in records[: ask.limit]:
        size += len(record["doc"])
        if items and size > MOST_BYTES:
            break
        items.append(Version(**dict(record) | {"doc": msgspec.Raw(record["doc"].encode())}))
    more = len(records) > len(items)
    return Versions(items=tuple(items), next=_token(items[-1]) if more and items else "")


def _token(last: Version) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode((last.id, last.revision))).decode().rstrip("=")


def _read_token(token: str) -> tuple[str, int]:
    try:
        padded = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        return msgspec.json.decode(padded, type=tuple[str, int])
    except (binascii.Error, msgspec.DecodeError, UnicodeError):
        raise foreign_page() from None
