"""Ids are UUIDs in text form, one NewType per noun, so that a VM's id can't be passed for a host's."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NewType

DataCenterId = NewType("DataCenterId", str)
ClusterId = NewType("ClusterId", str)
HostId = NewType("HostId", str)
VmId = NewType("VmId", str)
TagId = NewType("TagId", str)
StorageDomainId = NewType("StorageDomainId", str)
DiskId = NewType("DiskId", str)
TransferId = NewType("TransferId", str)
NetworkId = NewType("NetworkId", str)
NicId = NewType("NicId", str)
MacPoolId = NewType("MacPoolId", str)
UserId = NewType("UserId", str)
TokenId = NewType("TokenId", str)
OrderId = NewType("OrderId", str)
OperationId = NewType("OperationId", str)
"""`{owner}-{uuid7}`: the owner is the service that drives it, and how the gateway routes to it."""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Source:
    """Where ids get their time and their chance from."""

    now_ms: Callable[[], int] = _now_ms
    """Unix time."""
    random_bytes: Callable[[int], bytes] = os.urandom


REAL = Source()
SOURCE: ContextVar[Source] = ContextVar("volery_ids", default=REAL)
"""Where the running task's ids come from; the simulation gives it one that repeats itself."""


def new_id() -> str:
    """A UUIDv7 in text form: sorts by the time it was made, so keyset pages follow creation.

    Layout after RFC 9562 §5.7: 48 bits of Unix milliseconds, then random bits.
    """
    source = SOURCE.get()
    value = source.now_ms() << 80 | int.from_bytes(source.random_bytes(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def random_id() -> str:
    """A UUIDv4 in text form, for what is not listed: orders, journals."""
    return str(uuid.UUID(bytes=SOURCE.get().random_bytes(16), version=4))


def random_token(size: int) -> str:
    """So many random bytes in hexadecimal. Not for secrets."""
    return SOURCE.get().random_bytes(size).hex()


def is_id(text: str) -> bool:
    """Whether the text is a UUID in its canonical form, safe in a subject and in a path."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
