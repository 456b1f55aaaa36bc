"""Lists: keyset pages over an object table, filtered by its own columns, built from the stored documents."""

from __future__ import annotations

import base64
from typing import Any

import asyncpg
import msgspec

from volery.contracts.errors import invalid
from volery.contracts.operation import ListQuery
from volery.runtime.tables import Table

MAX_PAGE = 1000
MAX_PAGE_BYTES = 850_000
"""Below what one answer may carry; a page that would be larger is cut short."""


def _token(values: tuple[Any, ...]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(values)).decode().rstrip("=")


def _read_token(token: str) -> list[Any]:
    try:
        padded = token + "=" * (-len(token) % 4)
        values = msgspec.json.decode(base64.urlsafe_b64decode(padded), type=list[str | int | float | None])
    except (ValueError, msgspec.DecodeError):
        raise invalid("the page token is not one that a list answered; start without `page`") from None
    if len(values) not in (1, 2) or not isinstance(values[-1], str) or any("\0" in str(v) for v in values):
        raise invalid("the page token does not belong to this list; start without `page`")
    return values


async def page(
    pool: asyncpg.Pool[asyncpg.Record],
    table: Table[Any, Any],
    query: ListQuery,
    condition: str = "true",
    *arguments: Any,
) -> msgspec.Raw:
    """A page as JSON bytes: `{"items":[…],"next":"…"}`.

    `condition` is the store's own and uses $1… for `arguments`. Raises Refused(invalid) for a column that isn't
    one, a page size outside 1 to 1000, or a foreign token.
    """
    if not 1 <= query.limit <= MAX_PAGE:
        raise invalid(f"a page has 1 to {MAX_PAGE} items, not {query.limit}")
    values: list[Any] = list(arguments)
    conditions = [f"({condition})"]

    def slot(value: Any) -> str:
        values.append(value)
        return f"${len(values)}"

    for column, wanted in query.filter.items():
        _known(table, column)
        conditions.append(f"{column}::text = {slot(wanted)}")
    if query.search:
        _known(table, "name")
        conditions.append(f"position(lower({slot(query.search)}) in lower(name)) > 0")
    descending = query.order_by.startswith("-")
    comparison, direction = ("<", "desc") if descending else (">", "asc")
    column = query.order_by.removeprefix("-")
    keys = ["id"]
    if column not in ("", "id"):
        _known(table, column)
        keys = [f"coalesce({column}::text, '')", "id"]
    if query.page:
        bounds = _read_token(query.page)
        if len(bounds) != len(keys):
            raise invalid("the page token belongs to another order_by; start without `page`")
        conditions.append(f"({', '.join(keys)}) {comparison} ({', '.join(slot(str(b)) for b in bounds)})")
    sql = (
        f"select id, doc, {keys[0]} as k from {table.name} where {' and '.join(conditions)} "
        f"order by {', '.join(f'{key} {direction}' for key in keys)} limit {query.limit + 1}"
    )
    return _assemble(await pool.fetch(sql, *values), query, len(keys) == 2)


def _known(table: Table[Any, Any], column: str) -> None:
    if column != "id" and column not in table.columns:
        raise invalid(
            f"{column!r} is not a column of {table.name}; columns are id, {', '.join(sorted(table.columns))}",
            columns=sorted(table.columns),
        )


def _assemble(records: list[asyncpg.Record], query: ListQuery, with_key: bool) -> msgspec.Raw:
    items: list[bytes] = []
    size, last = 0, None
    for record in records[: query.limit]:
        doc = _only(record["doc"].encode(), query.fields)
        if items and size + len(doc) > MAX_PAGE_BYTES:
            break
        items.append(doc)
        size += len(doc) + 1
        last = record
    more = len(records) > len(items)
    token = ""
    if more and last is not None:
        token = _token((last["k"], last["id"]) if with_key else (last["id"],))
    return msgspec.Raw(b'{"items":[' + b",".join(items) + b'],"next":"' + token.encode() + b'"}')


def _only(doc: bytes, fields: tuple[str, ...]) -> bytes:
    if not fields:
        return doc
    whole = msgspec.json.decode(doc, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({k: v for k, v in whole.items() if k in fields or k == "id"})
