"""Conditions and choices: AND, OR, NOT, IS, LIKE, CASE, COALESCE and their like, in three-valued logic."""

from __future__ import annotations

import re
from typing import Any

from sqlglot import exp

from sim.postgres import types
from sim.postgres.errors import Unsupported
from sim.postgres.expressions import alike, compiles, condition, expression, pair, strict
from sim.postgres.parse import conjuncts, only
from sim.postgres.scope import Compiled, Frame, Scope, refuse


@compiles(exp.And)
def _and(scope: Scope, node: exp.And, want: str) -> Compiled:
    parts = [condition(scope, each) for each in conjuncts(node)]

    def run(f: Frame) -> Any:
        result: bool | None = True
        for part in parts:
            value = part(f)
            if value is False:
                return False
            if value is None:
                result = None
        return result

    return Compiled(run, "bool")


@compiles(exp.Or)
def _or(scope: Scope, node: exp.Or, want: str) -> Compiled:
    one, other = condition(scope, node.left), condition(scope, node.right)

    def run(f: Frame) -> Any:
        left = one(f)
        if left is True:
            return True
        right = other(f)
        if right is True:
            return True
        return None if left is None or right is None else False

    return Compiled(run, "bool")


@compiles(exp.Not)
def _not(scope: Scope, node: exp.Not, want: str) -> Compiled:
    return Compiled(strict(lambda value: not value, condition(scope, node.this)), "bool")


@compiles(exp.Is)
def _is(scope: Scope, node: exp.Is, want: str) -> Compiled:
    only(node, "this", "expression", "negate")
    negated = bool(node.args.get("negate"))
    if isinstance(node.expression, exp.Null):
        run = expression(scope, node.this).run
        return Compiled(lambda f: (run(f) is None) is not negated, "bool")
    if isinstance(node.expression, exp.Boolean):
        wanted = bool(node.expression.this)
        run = condition(scope, node.this)
        return Compiled(lambda f: (run(f) is wanted) is not negated, "bool")
    raise refuse(node)


@compiles(exp.Like)
def _like(scope: Scope, node: exp.Like, want: str) -> Compiled:
    only(node, "this", "expression")
    if not isinstance(node.expression, exp.Literal):
        raise Unsupported("LIKE with a pattern that isn't a literal")
    text, pattern = pair(scope, node.this, node.expression)
    if (text.kind, pattern.kind) != ("text", "text"):
        raise Unsupported("LIKE on anything but text")
    words = str(node.expression.this)
    if "\\" in words:
        raise Unsupported("LIKE with an escaped pattern")
    shape = "".join({"%": ".*", "_": "."}.get(each, re.escape(each)) for each in words)
    matches = re.compile(shape, re.S).fullmatch
    return Compiled(strict(lambda value: matches(value) is not None, text.run), "bool")


@compiles(exp.Case)
def _case(scope: Scope, node: exp.Case, want: str) -> Compiled:
    only(node, "this", "ifs", "default")
    tests = []
    for each in node.args["ifs"]:
        test = each.this
        if node.this is not None:
            test = exp.EQ(this=node.this.copy(), expression=test.copy())
        tests.append(condition(scope, test))
    default = node.args.get("default") or exp.Null()
    results, kind = alike(scope, [*(each.args["true"] for each in node.args["ifs"]), default], want)
    rows = list(zip(tests, (made.run for made in results), strict=False))
    otherwise = results[-1].run

    def run(f: Frame) -> Any:
        for test, result in rows:
            if test(f) is True:
                return result(f)
        return otherwise(f)

    return Compiled(run, kind)


@compiles(exp.Coalesce)
def _coalesce(scope: Scope, node: exp.Coalesce, want: str) -> Compiled:
    only(node, "this", "expressions")
    made, kind = alike(scope, [node.this, *node.expressions], want)
    runs = [each.run for each in made]

    def run(f: Frame) -> Any:
        for each in runs:
            value = each(f)
            if value is not None:
                return value
        return None

    return Compiled(run, kind)


@compiles(exp.Greatest, exp.Least)
def _extreme(scope: Scope, node: exp.Greatest | exp.Least, want: str) -> Compiled:
    only(node, "this", "expressions", "ignore_nulls")
    made, kind = alike(scope, [node.this, *node.expressions], want)
    if kind not in (*types.NUMBERS, "text", "timestamptz", "interval"):
        raise refuse(node)
    runs, best = [each.run for each in made], max if isinstance(node, exp.Greatest) else min

    def run(f: Frame) -> Any:
        values = [value for each in runs if (value := each(f)) is not None]
        return best(values) if values else None

    return Compiled(run, kind)


@compiles(exp.Nullif)
def _null_if(scope: Scope, node: exp.Nullif, want: str) -> Compiled:
    only(node, "this", "expression")
    one, other = pair(scope, node.this, node.expression)

    def run(f: Frame) -> Any:
        value = one.run(f)
        return None if value is not None and value == other.run(f) else value

    return Compiled(run, one.kind)
