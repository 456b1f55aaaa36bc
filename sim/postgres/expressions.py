"""Expressions: each node of the tree becomes a closure over the frame, with PostgreSQL's types and its NULL."""

from __future__ import annotations

import operator
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import asyncpg
from sqlglot import exp

from sim.postgres import parse, types
from sim.postgres.errors import Unsupported, mismatch, postgres, undefined
from sim.postgres.parse import only
from sim.postgres.scope import ARGUMENTS, COMMAND, Compiled, Frame, Query, Run, Scope, refuse

Compiler = Callable[[Scope, Any, str], Compiled]
COMPILERS: dict[type[exp.Expr], Compiler] = {}
"""By kind of node; functions.py and aggregates.py add theirs."""


def compiles(*kinds: type[exp.Expr]) -> Callable[[Compiler], Compiler]:
    def register(compiler: Compiler) -> Compiler:
        for kind in kinds:
            COMPILERS[kind] = compiler
        return compiler

    return register


def expression(scope: Scope, node: exp.Expr, want: str = "unknown") -> Compiled:
    """`want` is the type that a literal or an argument takes here, if it has no own. Raises Unsupported."""
    compiler = COMPILERS.get(type(node))
    if compiler is None:
        raise refuse(node)
    return compiler(scope, node, want)


def condition(scope: Scope, node: exp.Expr) -> Run:
    made = expression(scope, node, "bool")
    if made.kind not in ("bool", "unknown"):
        raise mismatch(f"argument of WHERE must be type boolean, not type {types.spoken(made.kind)}")
    return made.run


def pair(scope: Scope, one: exp.Expr, other: exp.Expr) -> tuple[Compiled, Compiled]:
    """Two expressions that decide each other's type."""
    left = expression(scope, one)
    right = expression(scope, other, left.kind)
    if left.kind == "unknown":
        left = expression(scope, one, right.kind if right.kind != "unknown" else "text")
        if right.kind == "unknown":
            right = expression(scope, other, "text")
    return left, right


def alike(scope: Scope, nodes: list[exp.Expr], want: str = "unknown") -> tuple[list[Compiled], str]:
    """Expressions that become one type, as in CASE or COALESCE."""
    first = [expression(scope, node) for node in nodes]
    kind = "unknown"
    for made in first:
        kind = types.wider(kind, made.kind)
    if kind == "unknown":
        kind = "text" if want == "unknown" else want
    made_again = [expression(scope, node, kind) for node in nodes]
    return [converted(made, kind) for made in made_again], kind


def converted(made: Compiled, kind: str) -> Compiled:
    """The same value as another type."""
    convert = types.cast(made.kind, kind)
    return Compiled(made.run if convert is None else strict(convert, made.run), kind)


def assigned(made: Compiled, kind: str, column: str) -> Run:
    """A value for a column of that type. Raises DatatypeMismatchError."""
    if not types.assignable(made.kind, kind):
        raise mismatch(
            f'column "{column}" is of type {types.spoken(kind)} but expression is of type {types.spoken(made.kind)}'
        )
    return converted(made, kind).run


def strict(function: Callable[[Any], Any], run: Run) -> Run:
    """NULL in, NULL out."""

    def call(f: Frame) -> Any:
        value = run(f)
        return None if value is None else function(value)

    return call


def strict_two(function: Callable[[Any, Any], Any], one: Run, other: Run) -> Run:
    def call(f: Frame) -> Any:
        a = one(f)
        if a is None:
            return None
        b = other(f)
        return None if b is None else function(a, b)

    return call


# Leaves


@compiles(exp.Column)
def _column(scope: Scope, node: exp.Column, want: str) -> Compiled:
    return scope.column(node)


@compiles(exp.Parameter)
def _argument(scope: Scope, node: exp.Parameter, want: str) -> Compiled:
    number = int(node.this.this)
    known = scope.unit.arguments.get(number, "unknown")
    if known == "unknown":
        known = scope.unit.arguments[number] = want
    at = number - 1
    return Compiled(lambda f: f[ARGUMENTS][at], known)


@compiles(exp.Literal)
def _literal(scope: Scope, node: exp.Literal, want: str) -> Compiled:
    if node.is_string:
        text = str(node.this)
        value = text if want in ("unknown", "text") else types.from_text(want)(text)
        return Compiled(lambda f: value, want)
    if not str(node.this).isdigit():
        exact = Decimal(str(node.this))
        return Compiled(lambda f: exact, "numeric")
    number = int(node.this)
    return Compiled(lambda f: number, "int4" if number < 1 << 31 else "int8")


@compiles(exp.Boolean)
def _boolean(scope: Scope, node: exp.Boolean, want: str) -> Compiled:
    value = bool(node.this)
    return Compiled(lambda f: value, "bool")


@compiles(exp.Null)
def _null(scope: Scope, node: exp.Null, want: str) -> Compiled:
    return Compiled(lambda f: None, want)


@compiles(exp.Interval)
def _interval(scope: Scope, node: exp.Interval, want: str) -> Compiled:
    only(node, "this", "unit")
    value = types.span(str(node.this.this), parse.name(node.args["unit"]))
    return Compiled(lambda f: value, "interval")


@compiles(exp.Paren)
def _paren(scope: Scope, node: exp.Paren, want: str) -> Compiled:
    return expression(scope, node.this, want)


@compiles(exp.Cast)
def _cast(scope: Scope, node: exp.Cast, want: str) -> Compiled:
    only(node, "this", "to")
    kind = types.declared(node.args["to"])
    made = expression(scope, node.this, kind)
    return converted(made, kind)


# Arithmetic


def _divide(one: Any, other: Any) -> Any:
    if other == 0:
        raise postgres(asyncpg.DivisionByZeroError, "division by zero")
    if isinstance(one, int) and isinstance(other, int):
        whole = abs(one) // abs(other)
        return whole if (one < 0) == (other < 0) else -whole
    return one / other


_ARITHMETIC: dict[type[exp.Expr], tuple[str, Callable[[Any, Any], Any]]] = {
    exp.Add: ("+", operator.add),
    exp.Sub: ("-", operator.sub),
    exp.Mul: ("*", operator.mul),
    exp.Div: ("/", _divide),
}
_TIMES = {
    ("timestamptz", "+", "interval"): "timestamptz",
    ("interval", "+", "timestamptz"): "timestamptz",
    ("timestamptz", "-", "interval"): "timestamptz",
    ("timestamptz", "-", "timestamptz"): "interval",
    ("interval", "+", "interval"): "interval",
    ("interval", "-", "interval"): "interval",
}


@compiles(exp.Add, exp.Sub, exp.Mul, exp.Div)
def _arithmetic(scope: Scope, node: exp.Binary, want: str) -> Compiled:
    only(node, "this", "expression", "typed")
    sign, function = _ARITHMETIC[type(node)]
    sums = isinstance(node.left, exp.Binary) or isinstance(
        node.right, exp.Binary
    )  # of a long sum each part is read once
    if not sums and {expression(scope, each).kind for each in (node.left, node.right)} == {"unknown"}:
        raise postgres(asyncpg.AmbiguousFunctionError, f"operator is not unique: unknown {sign} unknown")
    one, other = pair(scope, node.left, node.right)
    if one.kind not in types.NUMBERS or other.kind not in types.NUMBERS:
        kind = _TIMES.get((one.kind, sign, other.kind))
        if kind is None:
            raise undefined(
                f"operator does not exist: {types.spoken(one.kind)} {sign} {types.spoken(other.kind)}"
            )
        return Compiled(strict_two(function, one.run, other.run), kind)
    kind = types.wider(one.kind, other.kind)
    if kind == "numeric" and sign == "/":
        raise Unsupported("division of numeric")
    if kind == "float8":
        one, other = converted(one, kind), converted(other, kind)
    run = strict_two(function, one.run, other.run)
    if kind in ("numeric", "float8"):
        return Compiled(run, kind)
    return Compiled(strict(lambda value: types.in_range(kind, value), run), kind)


@compiles(exp.Neg)
def _negative(scope: Scope, node: exp.Neg, want: str) -> Compiled:
    made = expression(scope, node.this, want)
    if made.kind not in (*types.NUMBERS, "interval"):
        raise undefined(f"operator does not exist: - {types.spoken(made.kind)}")
    return Compiled(strict(operator.neg, made.run), made.kind)


@compiles(exp.DPipe)
def _joined(scope: Scope, node: exp.DPipe, want: str) -> Compiled:
    one, other = expression(scope, node.left), expression(scope, node.right)
    known = {one.kind, other.kind} - {"unknown"}
    for kind in ("jsonb", "bytea"):
        if kind in known and known <= {kind}:
            one, other = expression(scope, node.left, kind), expression(scope, node.right, kind)
            return Compiled(strict_two(_JOIN[kind], one.run, other.run), kind)
    if any(kind.endswith("[]") for kind in known):
        raise Unsupported("concatenation of arrays")
    if known and "text" not in known and "unknown" not in {one.kind, other.kind}:
        raise undefined(f"operator does not exist: {types.spoken(one.kind)} || {types.spoken(other.kind)}")
    texts = [
        converted(expression(scope, each, "text" if made.kind == "unknown" else "unknown"), "text")
        for each, made in ((node.left, one), (node.right, other))
    ]
    return Compiled(strict_two(operator.add, texts[0].run, texts[1].run), "text")


def _merge(one: str, other: str) -> str:
    left, right = types.parsed(one), types.parsed(other)
    if not isinstance(left, dict) or not isinstance(right, dict):
        raise Unsupported("|| between jsonb values that aren't objects")
    return types.canonical(left | right)


_JOIN: dict[str, Callable[[Any, Any], Any]] = {"jsonb": _merge, "bytea": operator.add}


# Comparison

_COMPARISONS: dict[type[exp.Expr], tuple[str, Callable[[Any, Any], Any]]] = {
    exp.EQ: ("=", operator.eq),
    exp.NEQ: ("<>", operator.ne),
    exp.LT: ("<", operator.lt),
    exp.LTE: ("<=", operator.le),
    exp.GT: (">", operator.gt),
    exp.GTE: (">=", operator.ge),
}


def _comparable(one: str, sign: str, other: str) -> None:
    if types.category(one) != types.category(other) or one == "json":
        raise undefined(f"operator does not exist: {types.spoken(one)} {sign} {types.spoken(other)}")
    if one not in (*types.NUMBERS, "text", "bool", "timestamptz", "interval", "bytea", "text[]", "uuid"):
        raise Unsupported(f"comparison of {types.spoken(one)}")


@compiles(*_COMPARISONS)
def _comparison(scope: Scope, node: exp.Binary, want: str) -> Compiled:
    only(node, "this", "expression")
    sign, function = _COMPARISONS[type(node)]
    if isinstance(node.right, exp.Any):
        return _any(scope, node, sign, function)
    if isinstance(node.left, exp.Tuple) or isinstance(node.right, exp.Tuple):
        return _rows_compared(scope, node, function)
    one, other = pair(scope, node.left, node.right)
    _comparable(one.kind, sign, other.kind)
    return Compiled(strict_two(function, one.run, other.run), "bool")


def _any(scope: Scope, node: exp.Binary, sign: str, function: Callable[[Any, Any], Any]) -> Compiled:
    one = expression(scope, node.left)
    inside = node.right.this.unnest()
    if isinstance(inside, exp.Query):
        raise Unsupported("ANY of a query")
    many = expression(scope, inside, f"{one.kind}[]" if one.kind != "unknown" else "unknown")
    if not many.kind.endswith("[]"):
        raise postgres(asyncpg.WrongObjectTypeError, "op ANY/ALL (array) requires array on right side")
    one = expression(scope, node.left, many.kind[:-2])
    _comparable(one.kind, sign, many.kind[:-2])
    return Compiled(strict_two(lambda value, items: _some(function, value, items), one.run, many.run), "bool")


def _some(function: Callable[[Any, Any], Any], value: Any, items: list[Any]) -> bool | None:
    if any(item is not None and function(value, item) for item in items):
        return True
    return None if None in items else False


def _rows_compared(scope: Scope, node: exp.Binary, function: Callable[[Any, Any], Any]) -> Compiled:
    if not (isinstance(node.left, exp.Tuple) and isinstance(node.right, exp.Tuple)):
        raise refuse(node)
    pairs = [pair(scope, a, b) for a, b in zip(node.left.expressions, node.right.expressions, strict=True)]
    for a, b in pairs:
        _comparable(a.kind, "=", b.kind)
    if isinstance(node, exp.NEQ):
        raise refuse(node)

    def run(f: Frame) -> Any:
        for a, b in pairs:
            left, right = a.run(f), b.run(f)
            if left is None or right is None:
                return None
            if left != right:
                return function(left, right)
        return function(0, 0)

    return Compiled(run, "bool")


@compiles(exp.NullSafeEQ, exp.NullSafeNEQ)
def _distinct(scope: Scope, node: exp.Binary, want: str) -> Compiled:
    if isinstance(node.left, exp.Tuple) and isinstance(node.right, exp.Tuple):
        pairs = [
            pair(scope, a, b) for a, b in zip(node.left.expressions, node.right.expressions, strict=True)
        ]
    else:
        pairs = [pair(scope, node.left, node.right)]
    for a, b in pairs:
        _comparable(a.kind, "=", b.kind)
    same = isinstance(node, exp.NullSafeEQ)
    return Compiled(lambda f: all(a.run(f) == b.run(f) for a, b in pairs) is same, "bool")


@compiles(exp.Between)
def _between(scope: Scope, node: exp.Between, want: str) -> Compiled:
    only(node, "this", "low", "high")
    both = exp.And(
        this=exp.GTE(this=node.this.copy(), expression=node.args["low"].copy()),
        expression=exp.LTE(this=node.this.copy(), expression=node.args["high"].copy()),
    )
    return expression(scope, both)


@compiles(exp.In)
def _in(scope: Scope, node: exp.In, want: str) -> Compiled:
    only(node, "this", "expressions", "query")
    if node.args.get("query") is not None:
        return _in_query(scope, node)
    made, kind = alike(scope, [node.this, *node.expressions])
    _comparable(kind, "=", kind)
    one, items = made[0], made[1:]
    return Compiled(lambda f: _listed(one.run(f), [item.run(f) for item in items]), "bool")


def _listed(value: Any, items: list[Any]) -> bool | None:
    return None if value is None else _some(operator.eq, value, items)


def _in_query(scope: Scope, node: exp.In) -> Compiled:
    values, kind = subquery(scope, node.args["query"])
    one = expression(scope, node.this, kind)
    _comparable(one.kind, "=", kind)

    def run(f: Frame) -> Any:
        value, found = one.run(f), values(f)
        if not found:
            return False
        if value is None:
            return None
        return True if (value,) in found else None if (None,) in found else False

    return Compiled(run, "bool")


def subquery(scope: Scope, node: exp.Expr) -> tuple[Run, str]:
    """A query of one column as a set of its rows, and the column's type."""
    query, run = _query(scope, node)
    if len(query.columns) != 1:
        raise postgres(asyncpg.PostgresSyntaxError, "subquery must return only one column")
    memo = scope.unit.memo()

    def as_set(f: Frame) -> Any:
        rows = run(f)
        kept = f[COMMAND].memo.get(memo)
        if kept is None or kept[0] is not rows:
            kept = f[COMMAND].memo[memo] = (rows, set(rows))
        return kept[1]

    return as_set, query.columns[0][1]


def _query(scope: Scope, node: exp.Expr) -> tuple[Query, Callable[[Frame], list[tuple[Any, ...]]]]:
    """A query inside an expression; one that depends on nothing outside runs once per statement."""
    unit = scope.unit
    before = unit.slots
    with unit.recording() as seen:
        query = unit.query(node.unnest(), unit, scope)
    if any(slot < before for slot in seen):
        return query, query.run
    memo = unit.memo()

    def once(f: Frame) -> list[tuple[Any, ...]]:
        known: dict[int, Any] = f[COMMAND].memo
        if memo not in known:
            known[memo] = query.run(f)
        found: list[tuple[Any, ...]] = known[memo]
        return found

    return query, once


@compiles(exp.Exists)
def _exists(scope: Scope, node: exp.Exists, want: str) -> Compiled:
    _, run = _query(scope, node.this)
    return Compiled(lambda f: bool(run(f)), "bool")


@compiles(exp.Array)
def _array(scope: Scope, node: exp.Array, want: str) -> Compiled:
    """Of a query's rows. One of single elements isn't written by the product."""
    inside = node.expressions
    if len(inside) != 1 or not isinstance(inside[0], exp.Query):
        raise refuse(node)
    query, run = _query(scope, inside[0])
    if len(query.columns) != 1:
        raise postgres(asyncpg.PostgresSyntaxError, "subquery must return only one column")
    return Compiled(lambda f: [row[0] for row in run(f)], f"{query.columns[0][1]}[]")


@compiles(exp.Subquery)
def _scalar(scope: Scope, node: exp.Subquery, want: str) -> Compiled:
    only(node, "this")
    query, run = _query(scope, node.this)
    if len(query.columns) != 1:
        raise postgres(asyncpg.PostgresSyntaxError, "subquery must return only one column")

    def value(f: Frame) -> Any:
        rows = run(f)
        if len(rows) > 1:
            raise postgres(
                asyncpg.CardinalityViolationError,
                "more than one row returned by a subquery used as an expression",
            )
        return rows[0][0] if rows else None

    return Compiled(value, query.columns[0][1])
