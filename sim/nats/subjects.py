"""Who is interested in a subject."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

ANY = ("*", ">")
"""First tokens of subscriptions that concern every subject."""


def tokens_match(pattern: list[str], tokens: list[str]) -> bool:
    """NATS's wildcards: `*` is one token, `>` at the end is one or more."""
    for index, wanted in enumerate(pattern):
        if wanted == ">":
            return len(tokens) > index
        if index >= len(tokens) or (wanted != "*" and wanted != tokens[index]):
            return False
    return len(pattern) == len(tokens)


def matches(pattern: str, subject: str) -> bool:
    return tokens_match(pattern.split("."), subject.split("."))


@dataclass(slots=True, eq=False)
class Interest:
    """One subscription as the server knows it."""

    connection: Any
    sid: int
    subject: str
    queue: str
    left: int = 0
    """How many more messages it gets; 0 is any number."""


@dataclass(frozen=True, slots=True)
class Hearers:
    """Who is interested in one subject. Never changed: whoever walks it may subscribe and unsubscribe meanwhile."""

    everybody: tuple[Interest, ...]
    each: tuple[Interest, ...]
    """Those that share with nobody."""
    groups: tuple[tuple[Interest, ...], ...]
    """Of each queue one is chosen."""


def _hearers(found: list[Interest]) -> Hearers:
    groups: dict[str, list[Interest]] = {}
    for interest in found:
        if interest.queue:
            groups.setdefault(interest.queue, []).append(interest)
    each = tuple(interest for interest in found if not interest.queue)
    return Hearers(tuple(found), each, tuple(map(tuple, groups.values())))


@dataclass(slots=True)
class Interests:
    """All subscriptions, in the order in which they came."""

    exact: dict[str, list[Interest]] = field(default_factory=dict)
    wild: dict[str, list[tuple[list[str], Interest]]] = field(default_factory=dict)
    """By their first token: hosts that come and go concern few subjects."""
    known: dict[str, dict[str, Hearers]] = field(default_factory=dict)
    """First token → subject → what was found for it since the last change."""

    def add(self, interest: Interest) -> None:
        first, _, _ = interest.subject.partition(".")
        if "*" in interest.subject or interest.subject.endswith(">"):
            self.wild.setdefault(first, []).append((interest.subject.split("."), interest))
        else:
            self.exact.setdefault(interest.subject, []).append(interest)
        self._changed(first, interest.subject)

    def remove(self, gone: Iterable[Interest]) -> None:
        for interest in gone:
            first, _, _ = interest.subject.partition(".")
            found = self.exact.get(interest.subject)
            if found is not None and interest in found:
                found.remove(interest)
                if not found:
                    del self.exact[interest.subject]
            elif first in self.wild:
                self.wild[first] = [each for each in self.wild[first] if each[1] is not interest]
            self._changed(first, interest.subject)

    def _changed(self, first: str, subject: str) -> None:
        if first in ANY:
            self.known.clear()
        elif "*" in subject or subject.endswith(">"):
            self.known.pop(first, None)
        else:
            self.known.get(first, {}).pop(subject, None)

    def find(self, subject: str) -> Hearers:
        first = subject.partition(".")[0]
        known = self.known.get(first)
        if known is None:
            known = self.known[first] = {}
        hearers = known.get(subject)
        if hearers is None:
            tokens = subject.split(".")
            found = list(self.exact.get(subject, ()))
            for wild in (first, *ANY):
                found += [one for pattern, one in self.wild.get(wild, ()) if tokens_match(pattern, tokens)]
            hearers = known[subject] = _hearers(found)
        return hearers
