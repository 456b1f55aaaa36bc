"""`expand=`: the objects that a page's items name by id, read in one batch and put beside the ids."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from api_gateway.desk import Desk
from api_gateway.exchange import Exchange
from api_gateway.route import Route
from volery.contracts.base import Call, encode
from volery.contracts.errors import Kind, Refused, invalid
from volery.runtime.bus import Caller

AT_ONCE = 32


class _Page(msgspec.Struct):
    items: list[dict[str, msgspec.Raw]]
    next: str = ""


async def expanded(route: Route, desk: Desk, http: Exchange, wanted: str, answer: bytes) -> bytes:
    """The page with `host` beside `host_id`, and so on; null where there is none. Raises Refused."""
    page = msgspec.json.decode(answer, type=_Page)
    caller = Caller(http.who)
    for name in dict.fromkeys(wanted.split(",")):
        if name not in route.expands:
            known = ", ".join(route.expands)
            raise invalid(f"{name[:80]!r} can't be expanded here; what can is: {known}", parameter="expand")
        field, call = route.expands[name]
        ids = {msgspec.json.decode(item[field], type=str) for item in page.items if field in item} - {""}
        found = await _get_all(desk, call, caller, ids)
        for item in page.items:
            if field in item:
                item[name] = found.get(msgspec.json.decode(item[field], type=str), msgspec.Raw(b"null"))
    return encode(page)


async def _get_all(desk: Desk, call: Call[Any, Any], caller: Caller, ids: set[str]) -> dict[str, msgspec.Raw]:
    turns = asyncio.Semaphore(AT_ONCE)

    async def get(object_id: str) -> msgspec.Raw | None:
        async with turns:
            try:
                return msgspec.Raw(await desk.ask(call, encode({"id": object_id}), caller))
            except Refused as refused:
                if refused.kind is Kind.NOT_FOUND:
                    return None  # deleted since the page was read
                raise

    order = sorted(ids)
    answers = await asyncio.gather(*(get(object_id) for object_id in order))
    return {object_id: answer for object_id, answer in zip(order, answers, strict=True) if answer is not None}
