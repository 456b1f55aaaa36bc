"""PostgreSQL's types: how arguments become values, how values become text and each other.

A type is its name in pg_type (`text`, `int8`, …), an array `text[]`. Values are what asyncpg answers with, except that
json, jsonb and inet are their text, jsonb in its canonical form. `unknown` is a literal or an argument whose type its
surroundings decide.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from typing import Any

import asyncpg
import msgspec
from sqlglot import exp

from sim.postgres.errors import Unsupported, postgres, unreadable

Convert = Callable[[Any], Any]

NUMBERS = ("int2", "int4", "int8", "numeric", "float8")
"""Each is converted to a later one where two meet."""
SPOKEN = {
    "int2": "smallint",
    "int4": "integer",
    "int8": "bigint",
    "bool": "boolean",
    "float8": "double precision",
    "timestamptz": "timestamp with time zone",
}
_RANGES = {"int2": 15, "int4": 31, "int8": 63}
_DECLARED = {
    exp.DType.TEXT: "text",
    exp.DType.SMALLINT: "int2",
    exp.DType.INT: "int4",
    exp.DType.BIGINT: "int8",
    exp.DType.BOOLEAN: "bool",
    exp.DType.DOUBLE: "float8",
    exp.DType.TIMESTAMPTZ: "timestamptz",
    exp.DType.INTERVAL: "interval",
    exp.DType.VARBINARY: "bytea",
    exp.DType.JSON: "json",
    exp.DType.JSONB: "jsonb",
    exp.DType.UUID: "uuid",
    exp.DType.INET: "inet",
}


def declared(node: exp.DataType) -> str:
    """The type that a statement names."""
    if node.this is exp.DType.ARRAY:
        (inner,) = node.expressions
        return declared(inner) + "[]"
    if node.this is exp.DType.DECIMAL and not node.expressions:
        return "numeric"
    if node.this is exp.DType.USERDEFINED and node.args["kind"].name == "xid":
        return "xid"
    if node.this not in _DECLARED or node.expressions:
        raise Unsupported(f"the type {node.sql(dialect='postgres')}")
    return _DECLARED[node.this]


def spoken(kind: str) -> str:
    """As PostgreSQL's errors name it."""
    return spoken(kind[:-2]) + "[]" if kind.endswith("[]") else SPOKEN.get(kind, kind)


def in_range(kind: str, value: int) -> int:
    if not -(1 << _RANGES[kind]) <= value < 1 << _RANGES[kind]:
        raise postgres(asyncpg.NumericValueOutOfRangeError, f"{spoken(kind)} out of range")
    return value


# Arguments


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected str")
    if "\0" in value:
        raise postgres(
            asyncpg.CharacterNotInRepertoireError, 'invalid byte sequence for encoding "UTF8": 0x00'
        )
    return value if type(value) is str else str.__str__(value)


def _integer(kind: str) -> Convert:
    bound = 1 << _RANGES[kind]

    def convert(value: Any) -> int:
        if not isinstance(value, int):
            raise TypeError("an integer is required")
        if not -bound <= value < bound:
            raise ValueError(f"value out of int{_RANGES[kind] + 1} range")
        return int(value)

    return convert


def _transaction(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError("an integer is required")
    if not 0 <= value < 1 << 32:
        raise ValueError("value out of uint32 range")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("a boolean is required")
    return value


def _float(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError("must be real number")
    return float(value)


def _moment(value: Any) -> datetime:
    if not isinstance(value, datetime):
        raise TypeError("expected a datetime.date or datetime.datetime instance")
    if value.tzinfo is None:
        raise Unsupported("times without a time zone")
    return value.astimezone(UTC)


def _span(value: Any) -> timedelta:
    if not isinstance(value, timedelta):
        raise TypeError("expected timedelta")
    return value


def _bytes(value: Any) -> bytes:
    return bytes(memoryview(value))


_TAKEN: dict[str, Convert] = {
    "text": _text,
    "int2": _integer("int2"),
    "int4": _integer("int4"),
    "int8": _integer("int8"),
    "xid": _transaction,
    "bool": _boolean,
    "float8": _float,
    "timestamptz": _moment,
    "interval": _span,
    "bytea": _bytes,
}


@cache
def taker(kind: str) -> Convert:
    """How an argument of this type is taken. Raises as asyncpg's encoders do."""
    if kind.endswith("[]"):
        each = taker(kind[:-2])

        def take(value: Any) -> list[Any]:
            if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
                raise TypeError("a sized iterable container expected")
            return [None if item is None else each(item) for item in value]

        return take
    if kind in ("json", "jsonb"):
        return from_text(kind)
    if kind not in _TAKEN:
        raise Unsupported(f"arguments of type {spoken(kind)}")
    return _TAKEN[kind]


# Text


def shown(kind: str) -> Convert:
    """How a value of this type becomes text."""
    if kind in ("text", "json", "jsonb", "inet", "uuid", "int2", "int4", "int8"):
        return str
    if kind == "bool":
        return lambda value: "true" if value else "false"
    if kind == "timestamptz":
        return _show_moment
    if kind == "float8":
        return _show_float
    if kind == "numeric":
        return lambda value: format(value, "f")
    raise Unsupported(f"{spoken(kind)} as text")


def _show_moment(value: datetime) -> str:
    text = value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    return f"{text}.{value.microsecond:06d}".rstrip("0") + "+00" if value.microsecond else text + "+00"


def _show_float(value: float) -> str:
    text = repr(value)
    if "e" in text or "n" in text:
        raise Unsupported(f"the float {value!r} as text")
    return text.removesuffix(".0")


_INTEGER = re.compile(r"\s*[+-]?\d+\s*")


def _read_integer(kind: str) -> Convert:
    def convert(text: str) -> int:
        if not _INTEGER.fullmatch(text):
            raise unreadable(spoken(kind), text)
        value = int(text)
        if not -(1 << _RANGES[kind]) <= value < 1 << _RANGES[kind]:
            raise postgres(
                asyncpg.NumericValueOutOfRangeError, f'value "{text}" is out of range for type {spoken(kind)}'
            )
        return value

    return convert


def _read_moment(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise unreadable("timestamp with time zone", text) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _read_boolean(text: str) -> bool:
    word = text.strip().lower()
    if word in ("t", "true", "yes", "on", "1"):
        return True
    if word in ("f", "false", "no", "off", "0"):
        return False
    raise unreadable("boolean", text)


def _read_json(text: str) -> str:
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        raise postgres(asyncpg.InvalidTextRepresentationError, "invalid input syntax for type json") from None
    return text


def canonical(value: Any) -> str:
    """jsonb as text: keys by length, then bytes."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda k: (len(k.encode()), k.encode()))
        return "{" + ", ".join(f"{canonical(k)}: {canonical(value[k])}" for k in keys) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(canonical, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else _scalar(value)


def _scalar(value: Any) -> str:
    return format(value, "f") if isinstance(value, Decimal) else json.dumps(value)


def _read_jsonb(text: str) -> str:
    return canonical(json.loads(_read_json(text), parse_float=Decimal))


def _read_inet(text: str) -> str:
    try:
        found = ipaddress.ip_interface(text)
    except ValueError:
        raise unreadable("inet", text) from None
    whole = found.network.prefixlen == found.max_prefixlen
    return str(found.ip) if whole else str(found)


def _read_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise unreadable("double precision", text) from None


def _read_bytes(text: str) -> bytes:
    if text.startswith("\\x"):
        return bytes.fromhex(text[2:])
    if "\\" in text:
        raise Unsupported("bytea in its escape format")
    return text.encode()


_UNITS = {
    "microsecond": "microseconds",
    "millisecond": "milliseconds",
    "second": "seconds",
    "minute": "minutes",
    "hour": "hours",
    "day": "days",
    "week": "weeks",
}


def span(amount: str, unit: str) -> timedelta:
    """`'10'` and `MINUTES`."""
    name = unit.lower().removesuffix("s")
    if name not in _UNITS:
        raise Unsupported(f"intervals in {unit}")
    return timedelta(**{_UNITS[name]: float(amount)})


def _read_span(text: str) -> timedelta:
    words = text.split()
    if len(words) != 2:
        raise Unsupported(f"the interval {text!r}")
    return span(*words)


def _read_array(kind: str) -> Convert:
    def convert(text: str) -> list[Any]:
        if text != "{}":
            raise Unsupported(f"the array literal {text!r}")
        return []

    return convert


def from_text(kind: str) -> Convert:
    """How text of this type is read."""
    if kind.endswith("[]"):
        return _read_array(kind)
    if kind in _RANGES:
        return _read_integer(kind)
    readers: dict[str, Convert] = {
        "text": str,
        "bool": _read_boolean,
        "float8": _read_float,
        "timestamptz": _read_moment,
        "json": _read_json,
        "jsonb": _read_jsonb,
        "inet": _read_inet,
        "bytea": _read_bytes,
        "interval": _read_span,
    }
    if kind not in readers:
        raise Unsupported(f"{spoken(kind)} read from text")
    return readers[kind]


# Each other


def _rounded(kind: str) -> Convert:
    def convert(value: Any) -> int:
        if isinstance(value, float):
            return in_range(kind, round(value))  # to even, as C's rint does
        return in_range(kind, int(Decimal(value).quantize(Decimal(1), rounding=ROUND_HALF_UP)))

    return convert


def cast(source: str, target: str) -> Convert | None:
    """The explicit cast between two types; None when nothing needs doing. Raises when there is none."""
    if source == target:
        return None
    if source in NUMBERS and target in NUMBERS:
        if target in _RANGES:
            return _rounded(target) if source in ("numeric", "float8") else lambda v: in_range(target, v)
        return float if target == "float8" else Decimal
    if target == "text":
        return shown(source)
    if source in ("text", "unknown"):
        return from_text(target)
    if (source, target) == ("json", "jsonb"):
        return _read_jsonb
    if (source, target) == ("jsonb", "json"):
        return None
    if (source, target) == ("bool", "int4"):
        return int
    if (source, target) == ("int4", "bool"):
        return bool
    raise postgres(asyncpg.CannotCoerceError, f"cannot cast type {spoken(source)} to {spoken(target)}")


def assignable(source: str, target: str) -> bool:
    """Whether a value of this type may be written to a column of that type without a cast."""
    if source == target or "unknown" in (source, target):
        return True
    if source in NUMBERS and target in NUMBERS:
        return True
    return target == "text" and not source.endswith("[]")


def category(kind: str) -> str:
    """What may be compared with each other."""
    return "number" if kind in NUMBERS else kind


def wider(one: str, other: str) -> str:
    """The type of two that meet in one expression."""
    if one == other or other == "unknown":
        return one
    if one == "unknown":
        return other
    if one in NUMBERS and other in NUMBERS:
        return max(one, other, key=NUMBERS.index)
    raise postgres(
        asyncpg.DatatypeMismatchError, f"types {spoken(one)} and {spoken(other)} cannot be matched"
    )


def parsed(text: str) -> Any:
    """json as Python has it, numbers without loss."""
    return json.loads(text, parse_float=Decimal)
