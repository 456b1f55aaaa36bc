"""The three shapes of message: a Call asks, an Order commands one host, a Fact says what happened.

Each is declared in one line in the module of its noun. The subject's placeholders are filled from the
payload's own fields, so no call site writes a subject by hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any, Generic, TypeVar, dataclass_transform

import msgspec

PLACEHOLDER = re.compile(r"\{(\w+)\}")
UNSAFE_TOKEN = re.compile(r"[^A-Za-z0-9_-]")


class Owner(StrEnum):
    """The services that own data: each has its own log, stream, schema, role and bus user."""

    INVENTORY = "inventory"
    SCHEDULER = "scheduler"
    STORAGE = "storage"
    NETWORK = "network"
    HA = "ha"
    DWH = "dwh"


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class MessageMeta(msgspec.StructMeta):
    """Makes every message frozen, keyword-only and untracked by the garbage collector.

    msgspec doesn't inherit `kw_only`, and collection dominates decoding of long lists.
    """

    def __new__(
        mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any
    ) -> MessageMeta:
        options = {"frozen": True, "kw_only": True, "gc": False} | options
        made: MessageMeta = super().__new__(mcls, name, bases, namespace, **options)
        return made


class Message(msgspec.Struct, metaclass=MessageMeta):
    """A value on the wire. New fields need defaults; existing fields never change type."""


class Done(Message):
    """An answer with nothing to add."""


class Entity(Message):
    """What every public object has. `revision` counts its changes and is its ETag."""

    id: str
    revision: int
    created_at: datetime
    updated_at: datetime


Q = TypeVar("Q", bound=Message)
A = TypeVar("A")
E = TypeVar("E", bound=Message)

_encoder = msgspec.json.Encoder()


def encode(value: object) -> bytes:
    """JSON bytes of a message."""
    return _encoder.encode(value)


def fill(subject: str, payload: Message) -> str:
    """The subject with its placeholders taken from the payload's fields.

    Raises ValueError if a value could change the subject's shape (a dot, a wildcard, nothing).
    """

    parts = _parts(subject)
    filled = parts[0]
    for at in range(1, len(parts), 2):
        value = str(getattr(payload, parts[at]))
        if not value or UNSAFE_TOKEN.search(value):
            raise ValueError(f"{parts[at]}={value!r} can't stand in the subject {subject}")
        filled += value + parts[at + 1]
    return filled


@cache
def _parts(subject: str) -> list[str]:
    """Literal, name, literal, name, …, literal."""
    return PLACEHOLDER.split(subject)


def wildcard(subject: str) -> str:
    """The subject with every placeholder replaced by `*`."""
    return PLACEHOLDER.sub("*", subject)


@dataclass(frozen=True, slots=True)
class Call(Generic[Q, A]):
    """Question and answer, now: NATS request/reply. `mutates` calls carry a request id."""

    subject: str
    question: type[Q]
    answer: type[A]
    mutates: bool = False
    """Whether it changes anything: then a repeat under the same request id returns the first answer."""
    timeout_seconds: float = 10.0

    @property
    def owner(self) -> str:
        return self.subject.split(".", 1)[0]

    def encode(self, question: Q) -> bytes:
        return encode(question)


@dataclass(frozen=True, slots=True)
class Order(Generic[Q, A]):
    """Do this on one host, surely: journaled by the agent before it is acknowledged.

    `kind` names it inside the envelope that goes to `host.{host_id}.order`; `answer` is its result.
    """

    kind: str
    question: type[Q]
    answer: type[A]
    repeat_safe: bool = True
    """Whether doing it twice is harmless. What isn't ends as `outcome unknown` after a crash in the middle."""
    deadline_seconds: float = 300.0

    def encode(self, question: Q) -> bytes:
        return encode(question)


@dataclass(frozen=True, slots=True)
class Fact(Generic[E]):
    """This happened: past tense, many readers. Written in the statement that made it true.

    The first token after `fact.` is the owner, whose stream it is in.
    """

    subject: str
    payload: type[E]

    @property
    def owner(self) -> str:
        return self.subject.split(".")[1]

    @property
    def name(self) -> str:
        """The CloudEvents type: the subject without its ids, e.g. `inventory.vm.changed`."""
        return ".".join(t for t in self.subject.split(".")[1:] if not t.startswith("{"))

    def subject_for(self, payload: E) -> str:
        return fill(self.subject, payload)

    def encode(self, payload: E) -> bytes:
        return encode(payload)
