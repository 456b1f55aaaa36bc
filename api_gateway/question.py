"""A request becomes the bytes of one question: path, query, headers and body, each checked, joined without decoding
twice."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from api_gateway.exchange import Exchange, unknown_parameter
from api_gateway.problems import HttpRefused, not_fitting
from api_gateway.route import Route
from volery.contracts.base import encode
from volery.contracts.errors import Kind, Refused, invalid

SAFE_ID = re.compile(r"[0-9A-Za-z:._-]{1,128}")
"""What may be the id of anything: UUIDs, operations, devices such as sda. The rest was never given to anybody."""
_ETAG = re.compile(r'"(\d{1,18})"')
_FILTER = "filter."


async def question(route: Route, http: Exchange, body_limit: int) -> bytes:
    """The JSON of the route's question. Raises Refused, HttpRefused, Gone."""
    query = http.query() if http.scope["query_string"] else {}
    if route.lists:
        return encode(list_fields(query, route.parameters, _path_filters(route, http.parameters)))
    parts = [_path_fields(route, http.parameters)] if route.names else []
    if route.fixed:
        parts.append(_inside(encode(route.fixed)))
    _refuse_unknown(route, query)
    if route.query or route.rehearses:
        parts.append(_query_fields(route, query))
    revision = if_match(http)
    if revision is not None:
        if not route.compares:
            raise invalid("If-Match has no meaning here: this does not compare revisions; leave it out")
        parts.append(b'"if_revision":%d' % revision)
    if route.has_body:
        parts.append(await _body_fields(route, http, body_limit))
    return b"{" + b",".join(part for part in parts if part) + b"}"


def _inside(document: bytes) -> bytes:
    """The members of a JSON object without its braces."""
    return document.strip()[1:-1].strip()


def _path_fields(route: Route, parameters: dict[str, str]) -> bytes:
    found = []
    for name, value in parameters.items():
        if not SAFE_ID.fullmatch(value):
            raise Refused(
                Kind.NOT_FOUND, f"there is no {name} {value[:80]!r}: it can't be the id of anything"
            )
        found.append(b'"%s":"%s"' % (route.renamed.get(name, name).encode(), value.encode()))
    return b",".join(found)


def _path_filters(route: Route, parameters: dict[str, str]) -> dict[str, str]:
    """A list below an object is a list with a filter on that object."""
    return dict(route.fixed) | {route.renamed.get(name, name): value for name, value in parameters.items()}


def _refuse_unknown(route: Route, query: dict[str, str]) -> None:
    for name in query:
        if name not in route.parameters:
            raise unknown_parameter(name, sorted(route.parameters))


def _query_fields(route: Route, query: dict[str, str]) -> bytes:
    given = {name: value for name, value in query.items() if name != "expand"}
    try:
        converted = msgspec.convert(given, route.query_type, strict=False)
    except msgspec.ValidationError as error:
        raise not_fitting(error, "query") from None
    return _inside(encode({name: getattr(converted, name) for name in given}))


def list_fields(query: dict[str, str], parameters: frozenset[str], fixed: dict[str, str]) -> dict[str, Any]:
    """The fields of a ListQuery; `fixed` are filters that hold anyway. Raises Refused(invalid)."""
    found: dict[str, Any] = {}
    filters: dict[str, str] = {}
    for name, value in query.items():
        if name == "limit":
            found["limit"] = _limit(value)
        elif name == "fields":
            found["fields"] = [field for field in value.split(",") if field]
        elif name in ("page", "order_by", "search"):
            found[name] = value
        elif name.startswith(_FILTER) and len(name) > len(_FILTER):
            filters[name[len(_FILTER) :]] = value
        elif name not in parameters:
            raise unknown_parameter(name, [*sorted(parameters), "filter.<column>"])
    if filters or fixed:
        found["filter"] = filters | fixed
    return found


def _limit(value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 6:
        raise invalid(f"limit must be a number from 1 to 1000, not {value[:80]!r}", parameter="limit")
    return int(value)


def if_match(http: Exchange) -> int | None:
    """The revision of If-Match; None if there is none, or any (`*`). Raises Refused(invalid)."""
    text = http.header(b"if-match")
    if text is None or text.strip() == "*":
        return None
    found = _ETAG.fullmatch(text.strip().removeprefix("W/"))
    if found is None or int(found[1]) == 0:
        raise invalid(
            f'If-Match must be an ETag as it was answered, such as "7", not {text[:80]!r}', header="If-Match"
        )
    return int(found[1])


async def _body_fields(route: Route, http: Exchange, limit: int) -> bytes:
    if not route.body_required and not (await http.body(limit)).strip():
        return b""
    body, _ = await decoded_body(http, route.body_decoder, limit)
    return _inside(body)


async def decoded_body(http: Exchange, decoder: msgspec.json.Decoder[Any], limit: int) -> tuple[bytes, Any]:
    """The JSON body as it came, and decoded. Raises Refused(invalid, too_large), HttpRefused(unsupported_media_type)."""
    body = (await http.body(limit)).strip()
    if not body:
        raise invalid("a JSON body is needed; /docs shows what is expected")
    media = (http.header(b"content-type") or "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise HttpRefused(
            "unsupported_media_type",
            f"the body must be application/json, not {media[:80]!r}",
            ((b"accept", b"application/json"),),
        )
    try:
        return body, decoder.decode(body)
    except msgspec.ValidationError as error:
        raise not_fitting(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
