"""Lists: keyset pages over an object table, filtered by its own columns, built from the stored documents."""

from __future__ import annotations

import base64
from typing import Any

import asyncpg
import msgspec

from volery.contracts.errors import invalid
from volery.contracts.operation import ListQuery
from volery.runtime.packing import pack
from volery.runtime.tables import Table

MAX_PAGE = 1000
MAX_PAGE_BYTES = 3_000_000
"""A page that would be larger is cut short."""
MAX_CARRIED_BYTES = 850_000
"""Below what one answer may carry once it is packed; a page that can't be packed well is cut to it."""


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
) -> bytes:
    """A page as an answer: JSON bytes `{"items":[…],"next":"…"}`, packed where they are many.

    `condition` is the store's own and uses $1… for `arguments`. Raises Refused(invalid) for a column that isn't
    one, a page size outside 1 to 1000, or a foreign token.
    """
    found = await _find(pool, table, query, condition, *arguments)
    packed = pack(_assemble(found, query, MAX_PAGE_BYTES))
    return packed if len(packed) <= MAX_CARRIED_BYTES else _assemble(found, query, MAX_CARRIED_BYTES)


async def plain_page(pool: asyncpg.Pool[asyncpg.Record], table: Table[Any, Any], query: ListQuery) -> bytes:
    """A page's JSON for a service that adds to it before it answers. Raises like `page`."""
    return _assemble(await _find(pool, table, query), query, MAX_CARRIED_BYTES)


async def _find(
    pool: asyncpg.Pool[asyncpg.Record],
    table: Table[Any, Any],
    query: ListQuery,
    condition: str = "true",
    *arguments: Any,
) -> list[asyncpg.Record]:
    """One row more than the page has: doc, then what it is ordered by."""
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
        f"select doc, {', '.join(keys)} from {table.name} where {' and '.join(conditions)} "
        f"order by {', '.join(f'{key} {direction}' for key in keys)} limit {query.limit + 1}"
    )
    return await pool.fetch(sql, *values)


def _known(table: Table[Any, Any], column: str) -> None:
    if column != "id" and column not in table.columns:
        raise invalid(
            f"{column!r} is not a column of {table.name}; columns are id, {', '.join(sorted(table.columns))}",
            columns=sorted(table.columns),
        )


def _assemble(records: list[asyncpg.Record], query: ListQuery, most_bytes: int) -> bytes:
    """The page of as many rows as fit, at least one."""
    docs = [record["doc"] for record in records[: query.limit]]
    if query.fields:
        docs = [_only(doc, query.fields) for doc in docs]
    items = ",".join(docs).encode()
    if len(items) > most_bytes:
        del docs[_fitting(docs, most_bytes) :]
        items = ",".join(docs).encode()
    token = ""
    if len(records) > len(docs):
        _, *keys = records[len(docs) - 1].values()
        token = _token(tuple(keys))
    return b'{"items":[' + items + b'],"next":"' + token.encode() + b'"}'


def _fitting(docs: list[str], most_bytes: int) -> int:
    size = 0
    for number, doc in enumerate(docs):
        size += len(doc.encode()) + 1
        if size > most_bytes:
            return max(number, 1)
    return len(docs)


def _only(doc: str, fields: tuple[str, ...]) -> str:
    whole = msgspec.json.decode(doc, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({k: v for k, v in whole.items() if k in fields or k == "id"}).decode()
