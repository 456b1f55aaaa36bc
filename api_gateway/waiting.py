"""`Prefer: wait=N`: the end of an operation, heard on the feed, never polled."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime

import msgspec

from api_gateway.desk import Desk
from volery.contracts.base import Owner


class _Ending(msgspec.Struct):
    ended_at: datetime | None = None


class _Event(msgspec.Struct):
    data: msgspec.Raw


async def wait_for_end(
    desk: Desk, operation_id: str, answer: bytes, after_number: int, until: float
) -> tuple[bytes, bool]:
    """The operation as it was last announced before the monotonic time `until`, and whether it has ended.

    `after_number` is the feed's next number from before the operation was asked for: its end may have come
    sooner than the answer did.
    """
    if has_ended(answer):
        return answer, True
    about = f"operation/{operation_id}"
    owner = operation_id.partition("-")[0]
    wanted = f"dev.volery.{owner}.operation.changed"
    number = after_number
    while True:
        number = max(number, desk.feed.first)
        while number < desk.feed.next:
            event = desk.feed.events[number]
            number += 1
            if event.about == about and event.type == wanted:
                answer = bytes(msgspec.json.decode(event.body, type=_Event).data)
                if has_ended(answer):
                    return answer, True
        left = until - time.monotonic()
        if left <= 0 or desk.feed.closing:
            return answer, False
        # The waiter is the feed's: giving up on time leaves it for the next wake, which skips it.
        await asyncio.wait([desk.feed.waiter()], timeout=left)


def has_ended(operation: bytes) -> bool:
    return msgspec.json.decode(operation, type=_Ending).ended_at is not None


def owner_of(operation_id: str) -> Owner | None:
    """Which service drives the operation; None for an id that no service gave."""
    prefix = operation_id.partition("-")[0]
    return Owner(prefix) if prefix in set(Owner) else None
