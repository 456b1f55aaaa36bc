"""Functions of values: text, bytes, JSON, times, locks. A new one is a new row."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
from sqlglot import exp

from sim.postgres import parse, types
from sim.postgres.errors import Unsupported, undefined
from sim.postgres.expressions import compiles, converted, expression, strict, strict_two
from sim.postgres.parse import only
from sim.postgres.scope import COMMAND, Compiled, Frame, Scope, refuse

# JSON


def _members(text: str) -> dict[str, msgspec.Raw]:
    return msgspec.json.decode(text, type=dict[str, msgspec.Raw]) if text.lstrip()[:1] == "{" else {}


def _member_text(text: str, key: str) -> str | None:
    raw = _members(text).get(key)
    return None if raw is None else _as_text(bytes(raw).decode())


def _as_text(raw: str) -> str | None:
    if raw == "null":
        return None
    return msgspec.json.decode(raw, type=str) if raw.startswith('"') else raw


def _member(text: str, key: str) -> str | None:
    raw = _members(text).get(key)
    return None if raw is None else bytes(raw).decode()


def _key(node: exp.Expr) -> str:
    """Of `-> 'key'`, the only path there is."""
    path = node.args["expression"]
    parts = path.expressions if isinstance(path, exp.JSONPath) else []
    if len(parts) != 2 or not isinstance(parts[1], exp.JSONPathKey):
        raise refuse(node)
    return str(parts[1].this)


@compiles(exp.JSONExtractScalar, exp.JSONExtract)
def _extract(scope: Scope, node: exp.Expr, want: str) -> Compiled:
    only(node, "this", "expression", "only_json_types")
    made = expression(scope, node.this)
    if made.kind not in ("json", "jsonb"):
        raise undefined(f"operator does not exist: {types.spoken(made.kind)} ->> unknown")
    key = _key(node)
    if isinstance(node, exp.JSONExtractScalar):
        return Compiled(strict(lambda text: _member_text(text, key), made.run), "text")
    return Compiled(strict(lambda text: _member(text, key), made.run), made.kind)


def json_elements(text: str) -> list[str]:
    """The elements of an array as they are written."""
    if text.lstrip()[:1] != "[":
        raise Unsupported("json_array_elements of what isn't an array")
    return [bytes(raw).decode() for raw in msgspec.json.decode(text, type=list[msgspec.Raw])]


def _json_of(kind: str) -> Callable[[Any], str]:
    """A value as json_build_object writes it."""
    if kind in ("json", "jsonb"):
        return str
    if kind in types.NUMBERS or kind == "bool":
        return types.shown(kind)
    if kind == "text":
        return types.canonical
    raise Unsupported(f"{types.spoken(kind)} as JSON")


def _build_object(scope: Scope, arguments: list[exp.Expr]) -> Compiled:
    made = [expression(scope, each, "text") for each in arguments]
    writers = [(each.run, _json_of(each.kind)) for each in made]

    def run(f: Frame) -> str:
        values = [value for each, _ in writers for value in (each(f),)]
        shown = ["null" if v is None else write(v) for v, (_, write) in zip(values, writers, strict=True)]
        return "{" + ", ".join(f"{k} : {v}" for k, v in zip(shown[::2], shown[1::2], strict=True)) + "}"

    return Compiled(run, "json")


# Times


@compiles(exp.CurrentTimestamp)
def _now(scope: Scope, node: exp.CurrentTimestamp, want: str) -> Compiled:
    only(node)
    scope.unit.steady = False
    return Compiled(lambda f: f[COMMAND].tx.now, "timestamptz")


_PARTS = {"day": "days", "hour": "hours", "min": "minutes", "second": "seconds", "week": "weeks"}
_NAMED = {"days": "days", "hours": "hours", "mins": "minutes", "secs": "seconds", "weeks": "weeks"}


@compiles(exp.MakeInterval)
def _make_interval(scope: Scope, node: exp.MakeInterval, want: str) -> Compiled:
    given: dict[str, Compiled] = {}
    for value in node.args.values():
        if value is None:
            continue
        if not isinstance(value, exp.Kwarg):
            raise refuse(node)
        unit = parse.name(value.this)
        if unit not in _NAMED:
            raise refuse(node)
        kind = "float8" if unit == "secs" else "int4"
        given[_NAMED[unit]] = converted(expression(scope, value.expression, kind), kind)

    def run(f: Frame) -> Any:
        parts = {name: made.run(f) for name, made in given.items()}
        return None if None in parts.values() else timedelta(**parts)

    return Compiled(run, "interval")


# Text and bytes


@compiles(exp.Lower)
def _lower(scope: Scope, node: exp.Lower, want: str) -> Compiled:
    only(node, "this")
    return Compiled(strict(str.lower, _text(scope, node.this).run), "text")


def _text(scope: Scope, node: exp.Expr) -> Compiled:
    made = expression(scope, node, "text")
    if made.kind != "text":
        raise undefined(f"function does not exist for {types.spoken(made.kind)}")
    return made


def _whole(scope: Scope, node: exp.Expr) -> Compiled:
    return converted(expression(scope, node, "int4"), "int4")


@compiles(exp.StrPosition)
def _position(scope: Scope, node: exp.StrPosition, want: str) -> Compiled:
    only(node, "this", "substr")
    text, part = _text(scope, node.this), _text(scope, node.args["substr"])
    return Compiled(strict_two(lambda t, p: t.find(p) + 1, text.run, part.run), "int4")


@compiles(exp.Length)
def _length(scope: Scope, node: exp.Length, want: str) -> Compiled:
    only(node, "this")
    made = expression(scope, node.this, "text")
    if made.kind not in ("text", "bytea"):
        raise undefined(f"function length({types.spoken(made.kind)}) does not exist")
    return Compiled(strict(len, made.run), "int4")


@compiles(exp.Replace)
def _replace(scope: Scope, node: exp.Replace, want: str) -> Compiled:
    only(node, "this", "expression", "replacement")
    parts = [_text(scope, node.args[part]).run for part in ("this", "expression", "replacement")]

    def run(f: Frame) -> Any:
        text, old, new = (part(f) for part in parts)
        if text is None or old is None or new is None:
            return None
        return text.replace(old, new) if old else text

    return Compiled(run, "text")


@compiles(exp.Substring)
def _substring(scope: Scope, node: exp.Substring, want: str) -> Compiled:
    only(node, "this", "start", "length")
    if node.args.get("start") is None or node.args["start"].is_string:
        raise refuse(node)
    text, start = _text(scope, node.this), _whole(scope, node.args["start"])
    length = _whole(scope, node.args["length"]) if node.args.get("length") else None

    def run(f: Frame) -> Any:
        value, first = text.run(f), start.run(f)
        count = len(value or "") + 1 if length is None else length.run(f)
        if value is None or first is None or count is None:
            return None
        return value[max(first - 1, 0) : max(first - 1 + count, 0)]

    return Compiled(run, "text")


@compiles(exp.Uuid)
def _uuid(scope: Scope, node: exp.Uuid, want: str) -> Compiled:
    scope.unit.reads(-1)
    return Compiled(lambda f: f[COMMAND].service.uuid(), "uuid")


def _convert_to(scope: Scope, arguments: list[exp.Expr]) -> Compiled:
    text, encoding = arguments
    if not isinstance(encoding, exp.Literal) or str(encoding.this).upper() not in ("UTF8", "UTF-8"):
        raise Unsupported("encodings other than UTF8")
    return Compiled(strict(str.encode, _text(scope, text).run), "bytea")


def _convert_from(scope: Scope, arguments: list[exp.Expr]) -> Compiled:
    body, encoding = arguments
    if not isinstance(encoding, exp.Literal) or str(encoding.this).upper() not in ("UTF8", "UTF-8"):
        raise Unsupported("encodings other than UTF8")
    return Compiled(strict(bytes.decode, expression(scope, body, "bytea").run), "text")


def _cardinality(scope: Scope, arguments: list[exp.Expr]) -> Compiled:
    (array,) = arguments
    made = expression(scope, array, "unknown")
    if not made.kind.endswith("[]"):
        raise undefined(f"function cardinality({types.spoken(made.kind)}) does not exist")
    return Compiled(strict(len, made.run), "int4")


def _hash_text(scope: Scope, arguments: list[exp.Expr]) -> Compiled:
    """As good as PostgreSQL's for telling texts apart, but another number."""
    (text,) = arguments
    return Compiled(
        strict(lambda value: zlib.crc32(value.encode()) - (1 << 31), _text(scope, text).run), "int4"
    )


# Locks


def _locking(method: str, kind: str) -> Callable[[Scope, list[exp.Expr]], Compiled]:
    def compile_call(scope: Scope, arguments: list[exp.Expr]) -> Compiled:
        (key,) = arguments
        number = converted(expression(scope, key, "int8"), "int8").run
        scope.unit.reads(-1)

        def run(f: Frame) -> Any:
            command = f[COMMAND]
            return getattr(command.service, method)(command, number(f))

        return Compiled(run, kind)

    return compile_call


# Transactions


def _always(figure: int, kind: str) -> Callable[[Scope, list[exp.Expr]], Compiled]:
    def compile_call(scope: Scope, arguments: list[exp.Expr]) -> Compiled:
        return Compiled(lambda f: figure, kind)

    return compile_call


def _age(scope: Scope, arguments: list[exp.Expr]) -> Compiled:
    """Every row counts as just written: whoever asks what changed since gets all of it."""
    (one,) = arguments
    if isinstance(one, exp.Cast):
        expression(scope, one)
    return Compiled(lambda f: 0, "int4")


_BY_NAME: dict[str, Callable[[Scope, list[exp.Expr]], Compiled]] = {
    "convert_to": _convert_to,
    "convert_from": _convert_from,
    "hashtext": _hash_text,
    "cardinality": _cardinality,
    "json_build_object": _build_object,
    "age": _age,
    "pg_current_snapshot": _always(1, "int8"),
    "pg_snapshot_xmin": _always(1, "int8"),
    "pg_advisory_lock": _locking("advisory_lock", "void"),
    "pg_try_advisory_lock": _locking("try_advisory_lock", "bool"),
    "pg_advisory_unlock": _locking("advisory_unlock", "bool"),
}


@compiles(exp.Anonymous)
def _named(scope: Scope, node: exp.Anonymous, want: str) -> Compiled:
    name = parse.name(node.this)
    if name not in _BY_NAME:
        raise Unsupported(f"the function {name}")
    return _BY_NAME[name](scope, node.expressions)
