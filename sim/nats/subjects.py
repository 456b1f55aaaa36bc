"""Who is interested in a subject."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


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


@dataclass(slots=True)
class Interests:
    """All subscriptions, in the order in which they came."""

    exact: dict[str, list[Interest]] = field(default_factory=dict)
    wild: list[tuple[list[str], Interest]] = field(default_factory=list)
    known: dict[str, list[Interest]] = field(default_factory=dict)
    """What was found for a subject since the last change."""

    def add(self, interest: Interest) -> None:
        if "*" in interest.subject or interest.subject.endswith(">"):
            self.wild.append((interest.subject.split("."), interest))
            self.known.clear()
        else:
            self.exact.setdefault(interest.subject, []).append(interest)
            self.known.pop(interest.subject, None)

    def remove(self, gone: Iterable[Interest]) -> None:
        for interest in gone:
            found = self.exact.get(interest.subject)
            if found is not None and interest in found:
                found.remove(interest)
                if not found:
                    del self.exact[interest.subject]
                self.known.pop(interest.subject, None)
            elif found is None or interest not in found:
                before = len(self.wild)
                self.wild = [(pattern, one) for pattern, one in self.wild if one is not interest]
                if len(self.wild) != before:
                    self.known.clear()

    def find(self, subject: str) -> list[Interest]:
        found = self.known.get(subject)
        if found is None:
            tokens = subject.split(".")
            found = list(self.exact.get(subject, ()))
            found += [one for pattern, one in self.wild if tokens_match(pattern, tokens)]
            self.known[subject] = found
        return found
