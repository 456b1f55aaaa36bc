"""Operations of all services behind one path: routed by the prefix of their id, listed as one."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from typing import Any

import msgspec

from api_gateway.desk import Desk
from api_gateway.endpoint import etag, next_link, unchanged, wait_seconds
from api_gateway.exchange import Exchange
from api_gateway.question import SAFE_ID, list_fields
from api_gateway.waiting import owner_of, wait_for_end
from volery.contracts.base import Call, Owner, encode
from volery.contracts.errors import Kind, Refused, invalid, not_found
from volery.contracts.ids import new_id
from volery.contracts.operation import CANCEL_OPERATION, GET_OPERATION, LIST_OPERATIONS
from volery.runtime.bus import Caller
from volery.runtime.core import body_hash

EXHAUSTED = "!"
DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
LIST_SECONDS = 3.0


class _Item(msgspec.Struct):
    id: str


class _Page(msgspec.Struct):
    items: list[msgspec.Raw]
    next: str = ""


class OperationPage(msgspec.Struct):
    """`missing` names services that did not answer: their operations are not in the list."""

    items: list[msgspec.Raw]
    missing: list[str]
    next: str


async def get(desk: Desk, http: Exchange) -> None:
    """One operation; `Prefer: wait=N` answers at its end, or after N seconds."""
    http.refuse_query()
    waits = wait_seconds(http, desk)
    before = desk.feed.next
    answer = await _ask(desk, http, GET_OPERATION, Caller(http.who))
    headers: list[tuple[bytes, bytes]] = []
    if waits:
        operation_id = http.parameters["id"]
        answer, _ = await wait_for_end(desk, operation_id, answer, before, time.monotonic() + waits)
        headers = [(b"preference-applied", b"wait=%d" % int(waits))]
    headers += etag(answer)
    if headers and unchanged(http, headers[-1][1]):
        await http.answer(304, b"", headers)
        return
    await http.answer(200, answer, headers)


async def cancel(desk: Desk, http: Exchange) -> None:
    """Asks the operation's owner to end it; what can't be undone may end as succeeded all the same."""
    http.refuse_query()
    key = new_id()
    caller = Caller(http.who, key, body_hash(http.method.encode(), http.path.encode()))
    answer = await _ask(desk, http, CANCEL_OPERATION, caller)
    http.operation_id = http.parameters["id"]
    location = (b"location", f"/api/v1/operations/{http.parameters['id']}".encode())
    await http.answer(202, answer, [location, *etag(answer)])


async def _ask(desk: Desk, http: Exchange, calls: dict[Owner, Call[Any, Any]], caller: Caller) -> bytes:
    operation_id = http.parameters["id"]
    owner = owner_of(operation_id)
    if owner is None or not SAFE_ID.fullmatch(operation_id):
        raise not_found("operation", operation_id[:80])
    return await desk.ask(calls[owner], encode({"id": operation_id}), caller)


async def listed(desk: Desk, http: Exchange) -> None:
    """One page over all owners in the order of creation, which their ids have after the prefix."""
    query = http.query()
    found = list_fields(query, frozenset({"limit", "page", "order_by", "fields", "search"}), {})
    limit = found.pop("limit", DEFAULT_LIMIT)
    if not 1 <= limit <= MAX_LIMIT:
        raise invalid(f"a page has 1 to {MAX_LIMIT} items, not {limit}", parameter="limit")
    order = found.get("order_by", "")
    if order not in ("", "id", "-id"):
        raise invalid(
            "operations are ordered by id (oldest first) or -id (newest first)", parameter="order_by"
        )
    if "search" in found:
        raise invalid("operations have no name to search; filter.object_id=… finds those of an object")
    places = read_places(found.pop("page", ""))
    owners = [owner for owner in Owner if places.get(owner) != EXHAUSTED]
    pages = await asyncio.gather(
        *(_page(desk, http, owner, {**found, "limit": limit}, places.get(owner, "")) for owner in owners)
    )
    answer = _merged(dict(zip(owners, pages, strict=True)), places, limit, order == "-id")
    await http.answer(200, answer, next_link(http, query, answer))


async def _page(
    desk: Desk, http: Exchange, owner: Owner, query: dict[str, Any], last: str
) -> tuple[list[tuple[str, msgspec.Raw]], bool] | None:
    """An owner's items behind its last one, and whether there are more; None if it doesn't answer."""
    if last:
        query = {**query, "page": keyset_token(last)}
    try:
        raw = await desk.bus.ask_raw(
            LIST_OPERATIONS[owner].subject, encode(query), Caller(http.who), LIST_SECONDS, again=False
        )
    except Refused as refused:
        if refused.kind in (Kind.UNAVAILABLE, Kind.TIMEOUT):
            return None
        raise
    page = msgspec.json.decode(raw, type=_Page)
    return [(msgspec.json.decode(item, type=_Item).id, item) for item in page.items], bool(page.next)


def _merged(
    pages: dict[Owner, tuple[list[tuple[str, msgspec.Raw]], bool] | None],
    places: dict[str, str],
    limit: int,
    newest_first: bool,
) -> bytes:
    rows = [
        (operation_id.partition("-")[2], owner, operation_id, item)
        for owner, page in pages.items()
        if page is not None
        for operation_id, item in page[0]
    ]
    rows.sort(key=lambda row: (row[0], row[1]), reverse=newest_first)
    kept = rows[:limit]
    # An owner whose page ended early bounds what may follow: nothing behind its last item is known yet.
    edges = [
        (page[0][-1][0].partition("-")[2], owner)
        for owner, page in pages.items()
        if page is not None and page[1] and page[0]
    ]
    if edges:
        edge = max(edges) if newest_first else min(edges)
        kept = [
            row for row in kept if ((row[0], row[1]) >= edge if newest_first else (row[0], row[1]) <= edge)
        ]
    after = dict(places)
    for _, owner, operation_id, _ in kept:
        after[owner] = operation_id
    open_ = False
    for owner, page in pages.items():
        if page is None:
            continue
        taken = sum(1 for row in kept if row[1] == owner)
        if taken == len(page[0]) and not page[1]:
            after[owner] = EXHAUSTED
        else:
            open_ = True
    missing = sorted(str(owner) for owner, page in pages.items() if page is None)
    next_ = write_places(after) if open_ else ""
    return encode(OperationPage([row[3] for row in kept], missing, next_))


def keyset_token(last_id: str) -> str:
    """The token of the page behind this id, as the runtime's lists write it."""
    return base64.urlsafe_b64encode(encode((last_id,))).decode().rstrip("=")


def write_places(places: dict[str, str]) -> str:
    return base64.urlsafe_b64encode(encode(places)).decode().rstrip("=")


def read_places(token: str) -> dict[str, str]:
    """Owner → id of the last operation that was shown. Raises Refused(invalid)."""
    if not token:
        return {}
    try:
        padded = token + "=" * (-len(token) % 4)
        places = msgspec.json.decode(base64.urlsafe_b64decode(padded), type=dict[str, str])
    except (binascii.Error, msgspec.DecodeError, UnicodeError, ValueError):
        places = {"": ""}
    if any(
        owner not in set(Owner) or not (last == EXHAUSTED or SAFE_ID.fullmatch(last))
        for owner, last in places.items()
    ):
        raise invalid(
            "the page token is not one that this list answered; start without `page`", parameter="page"
        )
    return places
