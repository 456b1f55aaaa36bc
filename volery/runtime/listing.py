"""Listing another owner's objects again: what a service does that may have missed facts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec

from volery.contracts.base import Call
from volery.contracts.operation import ListQuery
from volery.runtime.bus import Bus

E = TypeVar("E")

PAGE = 200


async def pages(bus: Bus, call: Call[ListQuery, Any], type_: type[E]) -> AsyncIterator[list[E]]:
    """All objects of a noun, a page at a time, decoded as `type_` (msgspec.Raw: as they are). Raises Refused when its owner doesn't answer."""
    following = ""
    decoder = msgspec.json.Decoder(type_)
    while True:
        page = await bus.ask(call, ListQuery(limit=PAGE, page=following))
        yield [decoder.decode(item) for item in page.items]
        following = page.next
        if not following:
            return
